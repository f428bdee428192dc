"""The calls of gcloud that a launch makes, as argument lists: nothing else of Google Cloud is used.

NAME is the run's name, and the id of both its queued resource and its node. Every call ends in `--quiet`, and in
`--project=PROJECT` except the first. Standard input is empty unless said. Calls with `--format=json` print JSON on stdout; of
others the exit status counts, and of `ssh` the output is passed on. Errors come as `ERROR: (gcloud.…) TEXT` on stderr with a
status that is not 0; `gcloud.py` classifies TEXT.

Account and project (an empty or missing `core.account` means that nobody is logged in):

    gcloud config list --format=json

Before (the first three for each zone; the last only for a gs:// bucket):

    gcloud compute tpus accelerator-types describe TYPE --zone=ZONE --format=json           NOT_FOUND: not in that zone
    gcloud compute tpus queued-resources describe NAME --zone=ZONE --format=json            NOT_FOUND: the name is free
    gcloud beta quotas info describe QUOTA_ID --service=tpu.googleapis.com --format=json    `dimensionsInfos`
    gcloud storage buckets describe gs://BUCKET --format=json                               `location`, as US-WEST4 or US

A slice (`--provisioning-model` is in alpha only; `describe` has `state.state`, and `state.failedData.error` if it FAILED):

    gcloud compute tpus queued-resources create NAME --node-id=NAME --zone=ZONE --accelerator-type=TYPE
        --runtime-version=VERSION --labels=pretrain-xla=NAME --valid-after-duration=0s --valid-until-duration=SECONDSs
        [--spot | --reserved] [--internal-ips] [--service-account=ACCOUNT] [--network=NETWORK] [--subnetwork=SUBNETWORK]
    gcloud alpha compute tpus queued-resources create … --provisioning-model=flex-start --max-run-duration=SECONDSs
    gcloud compute tpus queued-resources describe NAME --zone=ZONE --format=json
    gcloud compute tpus tpu-vm describe NAME --zone=ZONE --format=json                      `state`, `networkEndpoints`
    gcloud compute tpus queued-resources delete NAME --zone=ZONE --force                    waits until it is gone
    gcloud compute tpus tpu-vm delete NAME --zone=ZONE                                      only if the node is left over
    gcloud compute tpus queued-resources list --zone=ZONE --format=json                     the sweep: `name` ends in /NAME
    gcloud compute tpus tpu-vm list --zone=ZONE --format=json                               the sweep: `name` ends in /NAME

Workers, one call for each worker I, several at a time. COMMAND is `bash -c '…'` in the worker's home, with all paths below
`$HOME/NAME`; what it needs from us comes by standard input:

    gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=I --strict-host-key-checking=no [--internal-ip]
        --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4 --ssh-flag=-oConnectTimeout=30
        --command=COMMAND

| COMMAND                                   | stdin                | stdout                                                    |
|-------------------------------------------|----------------------|-----------------------------------------------------------|
| unpack the code into `NAME/code`          | a .tar.gz            |                                                           |
| `bash …/on_worker/setup.sh NAME`          | versions to install  | last line: JSON, name → version of what is installed      |
| `NAME/venv/bin/python …/start.py NAME`    | JSON: the secrets,   | `started`, or `running` if it already is                  |
|                                           | the run's command    |                                                           |
| `… …/follow.py NAME OFFSET SECONDS BEAT`  |                      | lines of JSON, for up to SECONDS                          |
| `… …/stacks.py NAME`, `… …/stop.py NAME`  |                      | text                                                      |

`…` is `NAME/code/pretrain_xla/launch/on_worker`. A worker where `NAME/venv/bin/python` has all that is required is not set up
again. The run gets `PJRT_DEVICE=TPU` unless the worker's environment has PJRT_DEVICE. Its log is `NAME/run.log`, its folder
`NAME/run`; its checkpoints and records go to the bucket.

`ssh` for `launch ssh NAME` has no `--command`, and the user's terminal.

The bucket (PATH is what `--bucket` names; for another URL or a folder that all workers mount, fsspec is used and not gcloud):

    gcloud storage cat gs://PATH/FILE                                                        a missing file: status not 0
    gcloud storage cp - gs://PATH/FILE                                                       standard input is the file
    gcloud storage rsync gs://PATH/FOLDER FOLDER --recursive
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

TPUS = ("compute", "tpus")
LABEL = "pretrain-xla"
ON_WORKER = "code/pretrain_xla/launch/on_worker"
KEEP_ALIVE = ("-oServerAliveInterval=15", "-oServerAliveCountMax=4", "-oConnectTimeout=30")
"""A silent connection, such as during a compilation, is dropped by routers; a dead one is noticed within a minute."""


@dataclass(frozen=True)
class Network:
    """How the slice is connected, and as whom it acts. None means the project's defaults."""

    internal_ips: bool = False
    network: str | None = None
    subnetwork: str | None = None
    service_account: str | None = None


@dataclass(frozen=True)
class Calls:
    """The calls for one run. name: of the run. project: None means that of the user's gcloud."""

    name: str
    project: str | None
    network: Network = Network()

    def account(self) -> list[str]:
        """Account and project that gcloud is set to."""
        return ["config", "list", "--format=json", "--quiet"]

    def accelerator_type(self, kind: str, zone: str) -> list[str]:
        """Whether a zone has this type of slice."""
        return self._end([*TPUS, "accelerator-types", "describe", kind, f"--zone={zone}"], json=True)

    def quota(self, quota_id: str) -> list[str]:
        """A quota, by zone."""
        return self._end(["beta", "quotas", "info", "describe", quota_id, "--service=tpu.googleapis.com"], json=True)

    def bucket(self, bucket: str) -> list[str]:
        """Where a bucket is."""
        return self._end(["storage", "buckets", "describe", f"gs://{bucket}"], json=True)

    def create(self, zone: str, kind: str, version: str, tier: str, wait: float, longest: float | None) -> list[str]:
        """Ask for a slice.

        Args:
            zone: where.
            kind: accelerator type.
            version: runtime version.
            tier: spot, on-demand, reserved or flex-start.
            wait: seconds until the request expires if it is not met; so it cannot be met when nobody waits for it any more.
            longest: seconds after which a flex-start slice is deleted by itself.
        """
        flags = [
            f"--node-id={self.name}",
            f"--zone={zone}",
            f"--accelerator-type={kind}",
            f"--runtime-version={version}",
        ]
        # gcloud sends no limit, without a word, unless both ends of the interval are given.
        until = f"--valid-until-duration={max(round(wait), 1)}s"
        flags += [f"--labels={LABEL}={self.name}", "--valid-after-duration=0s", until]
        flags += {"spot": ["--spot"], "reserved": ["--reserved"]}.get(tier, [])
        network = self.network
        if tier == "flex-start":
            flags += ["--provisioning-model=flex-start", f"--max-run-duration={round(longest or 7 * 86400)}s"]
        flags += ["--internal-ips"] if network.internal_ips else []
        for flag, value in (
            ("service-account", network.service_account),
            ("network", network.network),
            ("subnetwork", network.subnetwork),
        ):
            flags += [f"--{flag}={value}"] if value else []
        first = ["alpha"] if tier == "flex-start" else []
        return self._end([*first, *TPUS, "queued-resources", "create", self.name, *flags])

    def request(self, zone: str) -> list[str]:
        """The state of the request."""
        return self._end([*TPUS, "queued-resources", "describe", self.name, f"--zone={zone}"], json=True)

    def node(self, zone: str) -> list[str]:
        """The state of the slice itself."""
        return self._end([*TPUS, "tpu-vm", "describe", self.name, f"--zone={zone}"], json=True)

    def delete(self, zone: str) -> list[str]:
        """Delete the request and its slice."""
        return self._end([*TPUS, "queued-resources", "delete", self.name, f"--zone={zone}", "--force"])

    def delete_node(self, zone: str) -> list[str]:
        """Delete a slice whose request is gone."""
        return self._end([*TPUS, "tpu-vm", "delete", self.name, f"--zone={zone}"])

    def requests(self, zone: str) -> list[str]:
        """All requests of a zone."""
        return self._end([*TPUS, "queued-resources", "list", f"--zone={zone}"], json=True)

    def nodes(self, zone: str) -> list[str]:
        """All slices of a zone."""
        return self._end([*TPUS, "tpu-vm", "list", f"--zone={zone}"], json=True)

    def ssh(self, zone: str, worker: int, command: str | None) -> list[str]:
        """Run a command of a shell on a worker. None means a terminal there."""
        flags = [f"--zone={zone}", f"--worker={worker}", "--strict-host-key-checking=no"]
        flags += ["--internal-ip"] if self.network.internal_ips else []
        flags += [f"--ssh-flag={flag}" for flag in KEEP_ALIVE]
        flags += [f"--command={command}"] if command is not None else []
        return self._end([*TPUS, "tpu-vm", "ssh", self.name, *flags])

    def read(self, url: str) -> list[str]:
        """Print a file of the bucket."""
        return self._end(["storage", "cat", url])

    def write(self, url: str) -> list[str]:
        """Write standard input to a file of the bucket."""
        return self._end(["storage", "cp", "-", url])

    def download(self, url: str, folder: str) -> list[str]:
        """Copy a folder of the bucket to this machine."""
        return self._end(["storage", "rsync", url, folder, "--recursive"])

    def _end(self, words: Sequence[str], json: bool = False) -> list[str]:
        project = [f"--project={self.project}"] if self.project else []
        return [*words, *(["--format=json"] if json else []), *project, "--quiet"]


def on_worker(name: str, *words: str, program: str | None = None) -> str:
    """A command for `ssh`: one of the programs in `on_worker/` with its words, in the worker's home.

    program: what runs it; None means the Python of the run.
    """
    runner = program or f"{name}/venv/bin/python"
    script, *rest = words
    return as_bash(f'cd "$HOME" && exec {runner} {name}/{ON_WORKER}/{script} {shlex.join([name, *rest])}')


def unpack(name: str) -> str:
    """A command for `ssh` that replaces the code by the archive on standard input: whole, or not at all; not under a run."""
    return as_bash(
        f'cd "$HOME" && mkdir -p {name} && if [ -e {name}/run.lock ] && ! flock -n {name}/run.lock true; then exit 0; fi; '
        f"rm -rf {name}/code.new && mkdir {name}/code.new && tar -xzf - -C {name}/code.new "
        f"&& rm -rf {name}/code && mv {name}/code.new {name}/code"
    )


def as_bash(script: str) -> str:
    """A command for bash, whatever the login shell is."""
    return f"bash -c {shlex.quote(script)}"


def shown(arguments: Sequence[str]) -> str:
    """A call as a line for a shell, to be copied."""
    return shlex.join(["gcloud", *arguments])
