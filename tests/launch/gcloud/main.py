"""One call: its command line is read, time passes, it is answered."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import account, clock, nodes, queued, remote, schedule, storage, texts
from .state import State, held
from .syntax import Call, Misused, read

_Answer = Callable[[State, Call, str], Any]
COMMANDS: dict[str, _Answer] = {
    "auth list": account.accounts,
    "config list": account.configuration,
    "config get-value": account.value,
    "quotas info describe": account.one_quota,
    "compute tpus locations list": account.locations,
    "compute tpus accelerator-types list": account.types,
    "compute tpus accelerator-types describe": account.one_type,
    "compute tpus tpu-vm accelerator-types list": account.types,
    "compute tpus tpu-vm accelerator-types describe": account.one_type,
    "compute tpus tpu-vm versions list": account.images,
    "compute tpus tpu-vm versions describe": account.one_image,
    "compute tpus queued-resources create": queued.create,
    "compute tpus queued-resources describe": queued.describe,
    "compute tpus queued-resources list": queued.list_all,
    "compute tpus queued-resources delete": queued.delete,
    "compute tpus tpu-vm describe": nodes.describe,
    "compute tpus tpu-vm list": nodes.list_all,
    "compute tpus tpu-vm delete": nodes.delete,
    "compute tpus tpu-vm ssh": remote.prepare,
    "compute tpus tpu-vm scp": remote.prepare,
    "storage buckets describe": storage.bucket,
    "storage cat": storage.cat,
    "storage cp": storage.copy,
    "storage rsync": storage.synchronize,
}
_UNHELD = ("storage cp",)
"""Reads standard input, and so does not hold the state."""
_WITHOUT_LOGIN = ("auth list", "config list", "config get-value")


def main(folder: Path, arguments: Sequence[str]) -> int:
    """Answer a call; returns its exit status. Each is written to the file `calls`, before and after."""
    _note(folder, [*arguments])
    command, status = "", 0
    try:
        call = read(arguments)
        command = call.command
        status = _answer(folder, call, arguments)
    except Misused as error:
        command, status = error.command, error.status
        _error(command, error.text)
    except texts.Failed as error:
        status = error.status
        _error(command, error.text)
    except KeyboardInterrupt:
        status = 1
        print("\n\nCommand killed by keyboard interrupt\n", file=sys.stderr)
    finally:
        with held(folder) as state:
            schedule.called(state, command, [*arguments], ended=True)
        _note(folder, {"ended": command, "status": status})
    return status


def _answer(folder: Path, call: Call, arguments: Sequence[str]) -> int:
    with held(folder) as state:
        schedule.called(state, call.command, [*arguments], ended=False)
        clock.advance(state)
        zone = _zone(state, call)
        latency = (state.zone(zone) or {}).get("latency", 0.0)
    time.sleep(latency)
    with held(folder) as state:
        clock.advance(state)
        if state.data["account"] is None and call.words not in _WITHOUT_LOGIN:
            raise texts.Failed(texts.NOT_LOGGED_IN)
        if state.data["login_has_run_out"] and call.words not in _WITHOUT_LOGIN:
            raise texts.Failed(texts.REAUTHENTICATE)
        answer = None if call.words in _UNHELD else COMMANDS[call.words](state, call, zone)
    if call.words in _UNHELD:
        COMMANDS[call.words](state, call, zone)
    if call.words.endswith((" ssh", " scp")):
        assert answer is not None
        return (remote.ssh if call.words.endswith(" ssh") else remote.scp)(call, answer)
    if isinstance(answer, dict) and "said" in answer:
        _operation(folder, answer)
    else:
        _show(call, answer)
    return 0


def _zone(state: State, call: Call) -> str:
    """The zone of a call that has one."""
    if not call.words.startswith("compute tpus"):
        return ""
    resource = "tpu" if " tpu-vm " in call.words else "queued_resource"
    if not (state.data["project"] or "--project" in call.values):
        raise texts.missing_attribute(resource, "project", "core/project")
    if call.words == "compute tpus locations list":
        return ""
    if "--zone" not in call.values:
        raise texts.missing_attribute(resource, "zone", "compute/zone")
    return call.values["--zone"]


def _operation(folder: Path, answer: dict[str, Any]) -> None:
    """Wait as gcloud does, until what was asked for is done."""
    print(answer["said"], file=sys.stderr, flush=True)
    print("Waiting for operation [projects/a-project/operations/1] to complete", end="...", file=sys.stderr, flush=True)
    kind, key = answer.get("until_gone", ("", ""))
    while kind:
        with held(folder) as state:
            clock.advance(state)
            if key not in state.data[kind]:
                break
        time.sleep(0.02)
    print("done.", answer["then"], sep="\n", file=sys.stderr, flush=True)


def _show(call: Call, answer: Any) -> None:
    if answer is None:
        return
    if isinstance(answer, str):
        sys.stdout.write(answer)
        return
    if isinstance(answer, bytes):
        sys.stdout.buffer.write(answer)
        return
    if (form := call.values.get("--format")) != "json":
        raise texts.Failed(f"the stand-in for gcloud shows JSON only, and not {form or 'tables'}", 70)
    if call.values.keys() & {"--filter", "--limit", "--sort-by", "--flatten"}:
        raise texts.Failed("the stand-in for gcloud shows all, and neither filters nor sorts", 70)
    print(json.dumps(answer, indent=2))


def _error(command: str, text: str) -> None:
    where = ".".join(["gcloud", *command.split()])
    print(f"ERROR: ({where}) {text}", file=sys.stderr, flush=True)


def _note(folder: Path, what: Any) -> None:
    with (folder / "calls").open("a") as file:
        file.write(json.dumps(what) + "\n")
