"""What can be known before anything is created: zones, quota, names, the bucket's place, data, secrets, the step itself."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.launch.acquire import look
from pretrain_xla.launch.archive import holds
from pretrain_xla.launch.context import Launch
from pretrain_xla.launch.gcloud import Gcloud, GcloudError, Kind
from pretrain_xla.launch.slices import EGRESS_PER_GB, Slice
from pretrain_xla.redact import redacted

BYTES_PER_PARAMETER = 12
"""Of a checkpoint: the weights and two moments in fp32."""
WORLD = ("WANDB_API_KEY", "HF_TOKEN")
TAKEN = ("run_dir", "checkpoints_dir", "topology")


def account(gcloud: Gcloud, call: list[str], project: str | None) -> str:
    """The project, after checking that somebody is logged in.

    Raises:
        UserError: nobody is, or there is no project.
    """
    try:
        core = gcloud.json(call).get("core", {})
    except (GcloudError, AttributeError) as error:
        raise UserError(f"gcloud config list failed: {error}") from None
    if not core.get("account"):
        raise UserError("gcloud has no account: run `gcloud auth login`, and give the same command again")
    found = project or core.get("project")
    if not found:
        raise UserError("gcloud has no project: name it with --project, or run `gcloud config set project PROJECT`")
    return str(found)


def zones_with(launch: Launch, wanted: Slice) -> list[str]:
    """Those of the launch's zones that have such slices.

    Raises:
        UserError: none has.
    """
    kept = []
    for zone in launch.state.zones:
        try:
            launch.gcloud.json(launch.calls.accelerator_type(wanted.accelerator_type, zone))
            kept.append(zone)
        except GcloudError as error:
            if error.kind not in (Kind.NOT_FOUND, Kind.NOT_OFFERED):
                raise UserError(f"{zone} cannot be asked for {wanted.accelerator_type}: {error.text}") from None
            launch.say(f"note: {zone} has no {wanted.accelerator_type}, and is left out")
    if not kept:
        raise UserError(f"none of --zone {' '.join(launch.state.zones)} has {wanted.accelerator_type}: name others")
    return kept


def check_quota(launch: Launch, wanted: Slice) -> list[str]:
    """Warnings where the quota of a zone is too small, or not known."""
    quota_id = wanted.quota_id(launch.state.tier)
    try:
        tree = launch.gcloud.json(launch.calls.quota(quota_id))
    except GcloudError as error:
        return [f"the quota {quota_id} is not known ({error.text[:150]})"]
    limits = quota_limits(tree)
    default = limits.get("")
    short = [
        f"{zone}: the quota {quota_id} is {limit:g}, and {wanted.accelerator_type} has {wanted.chips} chips: ask for more in "
        "the console"
        for zone in launch.state.zones
        if (limit := limits.get(zone, default)) is not None and limit < wanted.chips
    ]
    return short


def quota_limits(tree: Any) -> dict[str, float]:
    """Zone → limit in what `quotas info describe` prints; the key "" has that of all other zones. -1 there means no limit."""
    limits: dict[str, float] = {}
    for one in tree.get("dimensionsInfos") or () if isinstance(tree, dict) else ():
        value = (one.get("details") or {}).get("value")
        if value is None:
            continue
        limit = float(value) if float(value) >= 0 else float("inf")
        named = (one.get("dimensions") or {}).get("zone")
        for zone in [named] if named else [*(one.get("applicableLocations") or ()), ""]:
            limits.setdefault(zone, limit)
    return limits


def check_name_free(launch: Launch) -> None:
    """Check that no zone has a request or a slice of this name; for a run that is new.

    Raises:
        UserError: one has.
    """
    for zone in launch.state.zones:
        found = look(launch, zone)
        if not found.nothing:
            raise UserError(
                f"{launch.state.name} in {zone} is there already ({found.request or found.node}), and no launch is known that "
                "made it: choose another --name, or delete it"
            )


def check_bucket(launch: Launch, gigabytes: float) -> list[str]:
    """A warning if the bucket is in another region than a zone, with what that would cost.

    Raises:
        UserError: there is no such bucket, or it may not be read.
    """
    url = launch.bucket.url
    if not url.startswith("gs://"):
        return [f"{url} is not a Google bucket: this machine and every worker must reach it"]
    name = url.removeprefix("gs://").split("/")[0]
    try:
        location = str(launch.gcloud.json(launch.calls.bucket(name)).get("location", "")).lower()
    except GcloudError as error:
        fix = f"make it with `gcloud storage buckets create gs://{name}`"
        raise UserError(f"--bucket {url}: {error.text}; {fix}") from None
    far = [zone for zone in launch.state.zones if not is_near(location, zone)]
    if not far:
        return []
    cost = gigabytes * EGRESS_PER_GB
    return [
        f"gs://{name} is in {location}, and {', '.join(far)} elsewhere: about {gigabytes:,.0f} GB of checkpoints and data "
        f"between them would cost ${cost:,.2f} or more, and slow the run: a bucket in {far[0].rpartition('-')[0]} avoids it"
    ]


def is_near(location: str, zone: str) -> bool:
    """Whether a bucket's location (us-west4, us, eu …) has a zone in it."""
    region = zone.rpartition("-")[0]
    return location in (region, {"europe": "eu"}.get(region.split("-")[0], region.split("-")[0]))


def traffic(config: RunConfig, parameters: int) -> float:
    """GB that a run moves between its bucket and its slice: checkpoints and tokens, of two bytes each."""
    saves = max(config.train.train_steps // config.checkpoint.save_interval, 1)
    data = config.tokens_per_step * config.train.train_steps * 2 if "://" in config.data.train_dir else 0
    return (saves * parameters * BYTES_PER_PARAMETER + data) / 1e9


def check_arguments(arguments: Sequence[str], config: RunConfig, repository: str, uncommitted: bool) -> list[str]:
    """Check that the command can run on a worker; returns notes.

    Raises:
        UserError: it sets what the launch sets, holds a password, or needs a file that is not on the workers.
    """
    named = [word.split("=", 1)[0].lstrip("-").replace("-", "_") for word in arguments if word.startswith("--")]
    if taken := [leaf for leaf in TAKEN if leaf in named]:
        raise UserError(f"--{taken[0].replace('_', '-')} is set by the launch: leave it out")
    if any(redacted(word) != word for word in arguments):
        raise UserError(
            "the command holds a password or token in a URL, which would be in logs: pass it with --secret instead"
        )
    files = [b for a, b in itertools.pairwise(arguments) if a == "--config"]
    files += [word.split("=", 1)[1] for word in arguments if word.startswith("--config=")]
    notes = []
    for name, path in [*(("config", file) for file in files), *_data(config)]:
        if "://" in path or path.startswith("hf:"):
            continue
        if os.path.isabs(path):
            notes.append(f"--{name} {path} must be on every worker: a disk that all mount")
        elif not holds(repository, path, uncommitted):
            fix = (
                "commit it"
                if name == "config"
                else f"copy it to the bucket (gcloud storage cp -r {path} gs://…), and name that"
            )
            raise UserError(f"--{name} {path} is not in the committed code, so no worker will have it: {fix}")
    return notes


def _data(config: RunConfig) -> list[tuple[str, str]]:
    return [("train-dir", config.data.train_dir), ("valid-dir", config.data.valid_dir)]


def chosen_secrets(names: Sequence[str], config: RunConfig, environment: Mapping[str, str]) -> list[str]:
    """Names of the variables that are passed on: those named, and the keys that the config needs.

    Raises:
        UserError: one is not set.
    """
    needed = ["WANDB_API_KEY"] if config.wandb.wandb_logging and "WANDB_MODE" not in environment else []
    needed += ["HF_TOKEN"] if config.checkpoint.hub_repo else []
    chosen = list(dict.fromkeys([*names, *needed, *(name for name in WORLD if environment.get(name))]))
    if missing := [name for name in chosen if not environment.get(name)]:
        raise UserError(
            f"{missing[0]} is not set in the environment: export {missing[0]}=…, and give the same command again"
        )
    return chosen


def preflight(
    arguments: Sequence[str], topology: str, price: float, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The report of preflight on the very step, by our own command. None means that it cannot be had on this machine.

    Raises:
        UserError: the step does not fit, or the command is wrong.
    """
    say("compiles the step for that slice (preflight), to see whether it fits; --no-preflight leaves it out")
    command = [sys.executable, "-m", "pretrain_xla", "preflight", "--json", "--no-suggestions", "--topology", topology]
    done = subprocess.run(
        [*command, "--price-per-chip-hour", f"{price:g}", *arguments], capture_output=True, text=True, check=False
    )
    error = (
        done.stderr.strip().splitlines()[-1].removeprefix("error: ")
        if done.stderr.strip()
        else f"status {done.returncode}"
    )
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        if "not installed" in error or "requirements-xla_tpu" in error:
            say(f"note: there is no preflight on this machine ({error})")
            return None
        raise UserError(f"preflight: {error}") from None
    if not report["fits"]:
        raise UserError(
            f"the step does not fit on {topology}: `python -m pretrain_xla preflight --topology {topology} …` shows what takes "
            "the memory and what would fit"
        )
    return report


def check_price(report: dict[str, Any], max_dollars: float | None, max_hours: float | None) -> list[str]:
    """Notes on what the run will take.

    Raises:
        UserError: even the optimistic estimate is beyond the budget.
    """
    run = report["run"]
    notes = []
    for what, limit, unit in (("hours", max_hours, "{:,.1f} h"), ("dollars", max_dollars, "${:,.2f}")):
        low, high = run[f"{what}_optimistic"], run[f"{what}_conservative"]
        words = f"{unit.format(low)} to {unit.format(high)}"
        if limit is not None and low is not None and low > limit:
            raise UserError(
                f"the run is estimated to take {words}, and --max-{what} is {limit:g}: raise it, lower --train-steps, or give "
                "--no-preflight to train until it is spent"
            )
        notes.append(
            f"the run is estimated to take {words}" + (f" of --max-{what} {limit:g}" if limit is not None else "")
        )
        if limit is not None and high is not None and high > limit:
            notes.append(f"it may be stopped before its end, by --max-{what} {limit:g}")
    return notes
