"""Tries configurations by compiling them, one at a time, each in its own process, and shows progress."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pretrain_xla.config import LEAVES, RunConfig, build_config
from pretrain_xla.errors import UserError
from pretrain_xla.preflight.calibration import read_calibration
from pretrain_xla.preflight.client import Request, compile_request
from pretrain_xla.preflight.render import console, duration
from pretrain_xla.preflight.report import Report, make_report
from pretrain_xla.preflight.topology import Topology


@dataclasses.dataclass(frozen=True)
class Trial:
    """A configuration that was tried. changes: setting → value, relative to the requested one. error: why it is impossible."""

    changes: dict[str, Any]
    report: Report | None
    error: str = ""

    @property
    def fits(self) -> bool:
        """Whether it was compiled and fits."""
        return self.report is not None and self.report.fits

    @property
    def tokens_per_second(self) -> float:
        """By the conservative estimate; 0 if it does not fit."""
        return self.report.estimate.conservative.tokens_per_second if self.report and self.report.estimate else 0.0

    @property
    def label(self) -> str:
        """The changes as flags."""
        return " ".join(flag(leaf, value) for leaf, value in self.changes.items()) or "as configured"


def flag(leaf: str, value: Any) -> str:
    """A setting's value as a flag."""
    name = "--" + leaf.replace("_", "-")
    if value is True:
        return name
    if value is False:
        return name.replace("--", "--no-", 1)
    return f"{name} {value}"


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A config with some settings replaced.

    Raises:
        UserError: the result is not a valid config.
    """
    tree = config.model_dump()
    for leaf, value in changes.items():
        tree[LEAVES[leaf]][leaf] = value
    return build_config(tree, "preflight")


class Compiler:
    """Compiles configurations for one slice, and shows progress on stderr: a live line on a terminal, else a line for each.

    Args:
        topology: the slice.
        options: compiler options by name.
        price_per_chip_hour: dollars. None means that no cost is reported.
        calibration: folder of measurements, see `calibration.py`. None means that none is read.
        total: number of expected compilations, for the progress bar. None means one.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        options: Mapping[str, str] | None = None,
        price_per_chip_hour: float | None = None,
        calibration: str | None = None,
        total: int = 1,
    ) -> None:
        self.topology = topology
        self.options = dict(options or {})
        self.price_per_chip_hour = price_per_chip_hour
        self.calibration = calibration
        if calibration is not None:
            read_calibration(calibration, topology.chip.name)  # a damaged file is reported now, and not after a minute
        self.done = 0
        self._total = total
        self._seconds = 0.0
        self._console = console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, left="")

    def __enter__(self) -> Compiler:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, more: int) -> None:
        """Expect `more` further compilations."""
        self._total = self.done + more
        self._bar.update(self._task, total=self._total)

    def compile(self, config: RunConfig, label: str = "the step", save: Path | None = None) -> Report:
        """Compile one configuration.

        Raises:
            UserError: it cannot be built or compiled, for another reason than its size.
        """
        began = time.monotonic()
        if not self._console.is_terminal:
            self._console.print(f"compiling {label} for {self.topology.libtpu_name} …", markup=False, soft_wrap=True)
        request = Request(config, self.topology, self.options, save)
        result = compile_request(request, lambda stage: self._show(stage, label))
        self._seconds += time.monotonic() - began
        self.done += 1
        self._bar.update(self._task, completed=self.done)
        return make_report(config, self.topology, result, self.price_per_chip_hour, self.calibration)

    def attempt(self, base: RunConfig, changes: Mapping[str, Any]) -> Trial:
        """Compile a changed configuration; an impossible one is a result, too."""
        trial = Trial(dict(changes), None)
        try:
            return dataclasses.replace(trial, report=self.compile(changed(base, changes), trial.label))
        except UserError as error:
            return dataclasses.replace(trial, error=str(error))

    def _show(self, stage: str, label: str) -> None:
        left = ""
        if self.done and self._total > self.done:
            left = f"about {duration(self._seconds / self.done * (self._total - self.done))} left"
        self._bar.update(self._task, description=f"{stage} {label}", left=left)
