"""`--dry-run`: every call of a launch that meets no trouble, in order, as lines for a shell."""

from __future__ import annotations

import json

from pretrain_xla.launch.calls import Calls, on_worker, shown, unpack
from pretrain_xla.launch.finish import CHECKPOINTS, RECORDS
from pretrain_xla.launch.slices import resolve_slice
from pretrain_xla.launch.state import FILE, State
from pretrain_xla.launch.timing import Timing
from pretrain_xla.redact import HIDDEN


def dry_run(state: State, calls: Calls, timing: Timing, local: str, steps: int) -> list[str]:
    """The lines; a line that begins with # is a comment."""
    wanted, zones, name, bucket = resolve_slice(state.topology), state.zones, state.name, state.bucket
    google = bucket.startswith("gs://")
    zone, wait = zones[0], timing.zone_wait if len(zones) > 1 else timing.only_zone_wait
    price = wanted.price(zone) if state.price_per_chip_hour is None else state.price_per_chip_hour * wanted.chips
    lines = [
        f"# {wanted.accelerator_type}: {wanted.chips} chips, {wanted.hosts} hosts, image {wanted.runtime_version}, "
        f"{state.tier}; ${price:.2f} an hour in {zone}",
        "# before: who, which zones, quota, is the name free, where is the bucket",
        shown(calls.account()),
        *(shown(calls.accelerator_type(wanted.accelerator_type, one)) for one in zones),
        shown(calls.quota(wanted.quota_id(state.tier))),
        *(shown(call(one)) for one in zones for call in (calls.request, calls.node)),
    ]
    if google:
        lines += [
            shown(calls.bucket(bucket.removeprefix("gs://").split("/")[0])),
            "# the code and the state; the state is written again at each change",
            f"git archive --format=tar.gz HEAD | {shown(calls.write(f'{bucket}/code.tar.gz'))}",
            f"{shown(calls.write(f'{bucket}/{FILE}'))} < {FILE}",
        ]
    lines.append(
        f"# a slice: each zone in turn, for {wait / 60:.0f} minutes; what FAILED or was SUSPENDED is deleted first"
    )
    for one in zones:
        create = calls.create(
            one,
            wanted.accelerator_type,
            wanted.runtime_version,
            state.tier,
            wait,
            None if state.max_hours is None else state.max_hours * 3600,
        )
        lines += [shown(create), shown(calls.request(one)), shown(calls.node(one))]
        if one != zones[-1]:
            lines.append(f"{shown(calls.delete(one))}   # if it has none, before the next zone is asked")
    given = {"environment": state.environment | dict.fromkeys(state.secrets, HIDDEN), "arguments": state.arguments}
    lines += [
        f"# each of the {wanted.hosts} workers: code, environment, start; wanted.txt has the versions of the first, and",
        "# ends in `# end`",
        _each(wanted.hosts, calls, zone, unpack(name), "git archive --format=tar.gz HEAD | "),
        _each(
            wanted.hosts, calls, zone, on_worker(name, "setup.sh", *state.extras, program="bash"), after=" < wanted.txt"
        ),
        f"# start.json: {json.dumps(given)}",
        _each(wanted.hosts, calls, zone, on_worker(name, "start.py"), after=" < start.json"),
        "# follow the log, from the byte that arrived last; between two connections, look at the slice",
        shown(calls.ssh(zone, 0, on_worker(name, "follow.py", "0", f"{timing.follow:g}", f"{timing.heartbeat:g}"))),
        shown(calls.node(zone)),
        "# at the end: copy back, delete, and see that nothing is left",
    ]
    if google:
        lines.append(shown(calls.download(f"{bucket}/{RECORDS}", local)))
        step = f"step_{steps:08d}"
        lines.append(shown(calls.download(f"{bucket}/{CHECKPOINTS}/{step}", f"{local}/{CHECKPOINTS}/{step}")))
    if state.keep:
        return [*lines, "# --keep: the slice stays, and costs money until:", f"# {shown(calls.delete(zone))}"]
    return [
        *lines,
        shown(calls.delete(zone)),
        *(shown(call(one)) for one in zones for call in (calls.requests, calls.nodes)),
    ]


def _each(hosts: int, calls: Calls, zone: str, command: str, before: str = "", after: str = "") -> str:
    line = f"{before}{shown(calls.ssh(zone, 0, command))}{after}"
    if hosts == 1:
        return line
    numbers = f"$(seq 0 {hosts - 1})"
    return f"for worker in {numbers}; do {line.replace('--worker=0', '--worker=$worker')}; done"
