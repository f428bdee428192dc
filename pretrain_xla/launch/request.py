"""What was asked for on the command line, checked, as the state of a launch that has not begun."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.flags import parse_flags
from pretrain_xla.launch.calls import Network
from pretrain_xla.launch.slices import check_zones, resolve_slice
from pretrain_xla.launch.state import State, check_name
from pretrain_xla.redact import redacted

PROGRAM = "python -m pretrain_xla launch"
_SECRET_NAME = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)


@dataclass(frozen=True)
class LaunchFlags:
    """Train on a slice of Google's TPUs until the run is done, and leave nothing behind: flags of the launch, then `--`, then
    those of `train`. The same command continues a run. `launch status`, `logs`, `stop` and `ssh NAME` look after one."""

    topology: str
    """The slice: v5e-16 (or v5litepod-16), v4-32, v5p-128, v6e-8 …"""
    bucket: str
    """Folder of the run in a bucket near the zones, such as gs://B/runs/NAME: state, code, checkpoints, records."""
    zone: tuple[str, ...] = ()
    """Zones to ask, in this order."""
    name: str | None = None
    """Name of the run and its slice. None means the last part of --bucket."""
    spot: bool = False
    """Spot: cheaper, and taken back at any time; the run then goes on with another slice."""
    reserved: bool = False
    """From a reservation."""
    flex_start: bool = False
    """Flex-start: for up to seven days, where there is such (gcloud's alpha commands)."""
    max_dollars: float | None = None
    """Stop and delete the slice before it has cost more, at --price-per-chip-hour. None means no limit."""
    max_hours: float | None = None
    """The same by hours of slices. None means no limit."""
    price_per_chip_hour: float | None = None
    """Dollars for an hour of a chip. None means the list price on demand, which is more than spot costs."""
    stall_minutes: float = 60.0
    """Minutes without a step after which the stacks are collected and another slice is asked for."""
    keep: bool = False
    """Keep the slice after the run's end; it costs money until you delete it."""
    dry_run: bool = False
    """Print every call in order, and make none."""
    preflight: bool = True
    """Before anything is created, compile the step for that slice: does it fit, how long, how much?"""
    copy_model: bool = True
    """At the end, copy the last checkpoint to this machine, too. The records are copied in any case."""
    run_folder: str | None = None
    """Local folder for the records. None means runs/NAME."""
    uncommitted: Literal["ask", "send", "leave"] = "ask"
    """Files that are changed or new since the last commit: ask, send them to the workers too, or leave them out."""
    secret: tuple[str, ...] = ()
    """Names of variables with secrets for the run; WANDB_API_KEY and HF_TOKEN are taken if they are set."""
    env: tuple[str, ...] = ()
    """NAME=VALUE of other variables for the run."""
    package: tuple[str, ...] = ()
    """Packages to install on the workers besides the requirements."""
    project: str | None = None
    """Project. None means that of your gcloud."""
    internal_ips: bool = False
    """Workers without external addresses, reached from inside the network; it needs Private Google Access and Cloud NAT."""
    network: str | None = None
    """Network. None means the project's default."""
    subnetwork: str | None = None
    """Subnetwork. None means the default one."""
    service_account: str | None = None
    """The workers' service account, which must be able to write to the bucket. None means the project's default."""


@dataclass(frozen=True)
class Request:
    """A checked request. command: the flags of `train` as they were given. notes: to be shown."""

    flags: LaunchFlags
    command: tuple[str, ...]
    config: RunConfig
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.flags.name or self.flags.bucket.rstrip("/").rpartition("/")[2]

    @property
    def bucket(self) -> str:
        """URL of the run's folder."""
        url = self.flags.bucket.rstrip("/")
        return f"file://{url}" if url.startswith("/") else url

    @property
    def tier(self) -> str:
        """How the slice is paid."""
        flags = self.flags
        return (
            "spot"
            if flags.spot
            else "reserved"
            if flags.reserved
            else "flex-start"
            if flags.flex_start
            else "on-demand"
        )

    @property
    def network(self) -> Network:
        """How the slice is connected."""
        flags = self.flags
        return Network(flags.internal_ips, flags.network, flags.subnetwork, flags.service_account)

    @property
    def local(self) -> str:
        """Local folder of the records."""
        return self.flags.run_folder or f"runs/{self.name}"

    def state(self, project: str, secrets: Sequence[str], commit: str, now: float) -> State:
        """The state of a launch of this that has not begun."""
        flags, wanted = self.flags, resolve_slice(self.flags.topology)
        environment = dict(one.split("=", 1) for one in flags.env)
        if self.config.wandb.wandb_logging and self.config.wandb.wandb_resume_id is None:  # one W&B run over all slices
            environment = {"WANDB_RUN_ID": f"{self.name}-{int(now)}", "WANDB_RESUME": "allow"} | environment
        extras = [*(["wandb"] if self.config.wandb.wandb_logging else []), *flags.package]
        return State(
            name=self.name,
            bucket=self.bucket,
            project=project,
            topology=flags.topology,
            zones=list(dict.fromkeys(flags.zone)),
            tier=self.tier,
            arguments=[*self.command, "--run-dir", "../run", "--checkpoints-dir", f"{self.bucket}/checkpoints"],
            environment=environment,
            secrets=list(secrets),
            extras=list(dict.fromkeys(extras)),
            commit=commit,
            hosts=wanted.hosts,
            network=asdict(self.network),
            max_dollars=flags.max_dollars,
            max_hours=flags.max_hours,
            price_per_chip_hour=flags.price_per_chip_hour,
            stall_minutes=flags.stall_minutes,
            keep=flags.keep,
            created=now,
        )


def checked(flags: LaunchFlags, command: Sequence[str]) -> Request:
    """Check a request, as far as nothing else needs to be asked.

    Raises:
        UserError: it cannot be met.
    """
    if not command:
        raise UserError(
            f"launch: name the run's flags after `--`, as in: {PROGRAM} … -- --config configs/modern_124m.yaml"
        )
    if redacted(flags.bucket) != flags.bucket or ("://" not in flags.bucket and not flags.bucket.startswith("/")):
        raise UserError(f"--bucket {flags.bucket}: name a folder in a bucket, such as gs://BUCKET/runs/NAME")
    if flags.bucket.startswith("gs://") and not re.fullmatch(r"gs://[^/]+/.*[^/].*", flags.bucket):
        raise UserError(
            f"--bucket {flags.bucket}: name a folder in that bucket, such as {flags.bucket.rstrip('/')}/runs/NAME"
        )
    if sum((flags.spot, flags.reserved, flags.flex_start)) > 1:
        raise UserError(
            "--spot, --reserved and --flex-start exclude each other: give one of them, or none for on demand"
        )
    for key in ("max_dollars", "max_hours", "price_per_chip_hour", "stall_minutes"):
        value = getattr(flags, key)
        if value is not None and not value > 0:
            raise UserError(f"--{key.replace('_', '-')} {value:g}: must be more than 0")
    for one in flags.env:
        name, equals, _ = one.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--env {name}: write it as NAME=VALUE")
        if _SECRET_NAME.search(name):
            raise UserError(f"--env {name}=… would be written down: export {name} here, and give --secret {name}")
    wanted = resolve_slice(flags.topology)
    notes = check_zones(flags.zone, wanted)
    config = parse_flags(list(command), program="launch … --", description="").config
    request = Request(flags, tuple(command), config, tuple(notes))
    check_name(request.name)
    return request
