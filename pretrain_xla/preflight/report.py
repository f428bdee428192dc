"""The report on one configuration as plain values, which `--json` prints and `render.py` shows."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from pretrain_xla.config import RunConfig
from pretrain_xla.model.flops import parameter_count
from pretrain_xla.preflight.calibration import calibration_path, read_calibration
from pretrain_xla.preflight.collectives import Collective, find_collectives
from pretrain_xla.preflight.compile_result import CompileResult
from pretrain_xla.preflight.estimate import Estimate, Speed, estimate_step, speed
from pretrain_xla.preflight.health import Finding, config_findings, input_findings, module_findings
from pretrain_xla.preflight.hlo import Module
from pretrain_xla.preflight.memory import Memory, read_memory
from pretrain_xla.preflight.topology import Topology


@dataclasses.dataclass(frozen=True)
class Run:
    """The configured run at the estimated rates, without validation and restarts; dollars if a price was given."""

    steps: int
    tokens: int
    hours_optimistic: float
    hours_conservative: float
    dollars_optimistic: float | None
    dollars_conservative: float | None


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """The conservative estimate times a measured ratio.

    file: where the ratio was read. measured: when, as an ISO date. basis: on what, for display. hours, dollars: of the run.
    """

    file: str
    measured: str
    basis: str
    ratio: float
    speed: Speed
    hours: float
    dollars: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """One configuration on one slice. estimate, collectives and run are missing if it does not fit; so is calibrated, and if
    nothing was measured on this chip."""

    topology: str
    libtpu_topology: str
    libtpu: str
    chips: int
    devices: int
    device_noun: str
    parameters: int
    settings: dict[str, Any]
    mesh: dict[str, int]
    sequences_per_device: float
    tokens_per_step: int
    memory: Memory
    estimate: Estimate | None
    collectives: tuple[Collective, ...]
    run: Run | None
    calibrated: Calibrated | None
    findings: tuple[Finding, ...]
    trace_seconds: float
    compile_seconds: float
    host_cores: int

    @property
    def fits(self) -> bool:
        """Whether the step fits, by the compiler."""
        return self.memory.fits

    def to_tree(self) -> dict[str, Any]:
        """As values for JSON. It has the conservative figures also under their former name, sober."""
        tree: dict[str, Any] = {"fits": self.fits} | dataclasses.asdict(self)
        for section in (tree["estimate"], tree["run"]):
            if section is not None:
                former = {key.replace("conservative", "sober"): value for key, value in section.items()}
                section.update(former)
        return tree


def make_report(
    config: RunConfig,
    topology: Topology,
    result: CompileResult,
    price_per_chip_hour: float | None,
    calibration_folder: str | None = None,
) -> Report:
    """The report on a compilation.

    Args:
        config: the config that was compiled.
        topology: the slice.
        result: the compiler's result.
        price_per_chip_hour: dollars, for the run's cost.
        calibration_folder: folder of files of measurements. None means that none is read.

    Raises:
        UserError: the chip's file there is damaged.
    """
    module = Module(result.compiled.hlo_text) if result.compiled else None
    memory = read_memory(result, module, topology)
    findings = config_findings(config, topology.chip.name) + input_findings(result, memory)
    collectives: tuple[Collective, ...] = ()
    estimate = None
    run = None
    calibrated = None
    if module is not None:
        collectives = find_collectives(module, topology)
        estimate = estimate_step(config, module, collectives, topology)
        findings += module_findings(config, module)
        run = _run(config, topology, estimate, price_per_chip_hour)
        calibrated = _calibrated(config, topology, estimate, run, calibration_folder)
    rows = config.train.train_batch_size / (result.mesh["data"] * result.mesh["fsdp"])
    return Report(
        topology=topology.name,
        libtpu_topology=topology.libtpu_name,
        libtpu=result.libtpu,
        chips=topology.chips,
        devices=topology.devices,
        device_noun=topology.chip.device_noun,
        parameters=parameter_count(config.model),
        settings=settings(config),
        mesh=result.mesh,
        sequences_per_device=rows,
        tokens_per_step=config.tokens_per_step,
        memory=memory,
        estimate=estimate,
        collectives=collectives,
        run=run,
        calibrated=calibrated,
        findings=tuple(sorted(findings, key=lambda finding: finding.level, reverse=True)),
        trace_seconds=result.trace_seconds,
        compile_seconds=result.compile_seconds,
        host_cores=len(os.sched_getaffinity(0)),
    )


def settings(config: RunConfig) -> dict[str, Any]:
    """The settings that determine memory and time."""
    train, model = config.train, config.model
    return {
        "seq_length": model.seq_length,
        "train_batch_size": train.train_batch_size,
        "gradient_accum_step": train.gradient_accum_step,
        "mixed_precision": train.mixed_precision or "fp32",
        "rematerialization": train.rematerialization,
        "loss_chunk": train.loss_chunk,
        "scan_layers": train.scan_layers,
        "attention": model.attention,
    }


def _run(config: RunConfig, topology: Topology, estimate: Estimate, price: float | None) -> Run:
    steps = config.train.train_steps
    hours = [steps * speed.seconds / 3600 for speed in (estimate.optimistic, estimate.conservative)]
    dollars = [None if price is None else hour * topology.chips * price for hour in hours]
    return Run(steps, steps * config.tokens_per_step, hours[0], hours[1], dollars[0], dollars[1])


def _calibrated(
    config: RunConfig, topology: Topology, estimate: Estimate, run: Run, folder: str | None
) -> Calibrated | None:
    """The estimate scaled by what was measured on this chip. None means that no step was measured on it."""
    found = read_calibration(folder, topology.chip.name) if folder is not None else None
    if folder is None or found is None or found.step is None or found.step.ratio is None:
        return None
    step, ratio = found.step, found.step.ratio
    packages = ", ".join(f"{name} {found.software[name]}" for name in ("torch_xla", "libtpu") if name in found.software)
    where = f"{step.topology or found.device} ({step.devices} devices; {packages})"
    scaled = speed(estimate.conservative.seconds * ratio, config, topology)
    dollars = None if run.dollars_conservative is None else run.dollars_conservative * ratio
    return Calibrated(
        file=str(calibration_path(folder, topology.chip.name)),
        measured=step.measured.strftime("%Y-%m-%d"),
        basis=f"{step.parameters / 1e6:.1f}M parameters on {where}",
        ratio=ratio,
        speed=scaled,
        hours=run.hours_conservative * ratio,
        dollars=dollars,
    )
