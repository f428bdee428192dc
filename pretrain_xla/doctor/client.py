"""Starts the process that opens the devices, waits for it within a time limit, and reads what it has finished."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pretrain_xla
from pretrain_xla.doctor.check import Figures
from pretrain_xla.runtime.tpu_chip import pci_chips

CPU_DEVICES = "4"
"""Virtual devices of a CPU, for the collectives."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the process has done. figures: by stage. errors: of the stages that failed. broken: (stage, what happened) where the
    process itself ended or was ended. None means that it came to its end."""

    figures: dict[str, Figures]
    errors: dict[str, str]
    broken: tuple[str, str] | None


def ask(request: dict[str, Any], seconds: float, tick: Callable[[str], None] = lambda stage: None) -> Answer:
    """Run the job of a request; `tick` is called a few times a second with the present stage.

    Args:
        request: see `worker.py`.
        seconds: after so long the process is killed.
    """
    with tempfile.TemporaryDirectory(prefix="doctor-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        ended = _run(folder, environment(request["job"]), seconds, tick)
        figures, errors = _read(folder / "results.jsonl")
        stage = _stage(folder)
        if stage == "done":
            return Answer(figures, errors, None)
        if ended is None:
            return Answer(figures, errors, (stage, f"nothing came for {seconds:.0f} s, so it was ended"))
        words = _last_words((folder / "stderr").read_text(encoding="utf-8", errors="replace"))
        return Answer(figures, errors, (stage, f"the process ended with status {ended}: {words}"))


def environment(job: str) -> dict[str, str]:
    """The environment of the process: this one's, with several devices if a CPU is examined."""
    root = str(Path(pretrain_xla.__file__).resolve().parents[1])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    made = {**os.environ, "PYTHONPATH": path}
    on_cpu = os.environ.get("PJRT_DEVICE", "TPU" if pci_chips() else "CPU") == "CPU"
    if job == "devices" and on_cpu:
        made.setdefault("CPU_NUM_DEVICES", CPU_DEVICES)
    return made


def _run(folder: Path, variables: dict[str, str], seconds: float, tick: Callable[[str], None]) -> int | None:
    """The exit status. None means that it was killed after `seconds`."""
    command = [sys.executable, "-m", "pretrain_xla.doctor.worker", str(folder)]
    limit = time.monotonic() + seconds
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
        try:
            while (status := process.poll()) is None:
                if time.monotonic() > limit:
                    return None
                tick(_stage(folder))
                time.sleep(0.1)
            return status
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _stage(folder: Path) -> str:
    path = folder / "stage"
    return path.read_text(encoding="utf-8") if path.exists() else "start"


def _read(path: Path) -> tuple[dict[str, Figures], dict[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    figures = {row["stage"]: row["figures"] for row in rows if "figures" in row}
    return figures, {row["stage"]: row["error"] for row in rows if "error" in row}


def _last_words(text: str) -> str:
    """The last line of a process that says something: its error, or the message with which libtpu ended it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    fatal = [line for line in lines if re.match(r"F\d{4} |error: ", line)]
    return " ".join((fatal or lines or ["without a message"])[-1].split())[:400]
