"""From the checks to the file of what was measured, `calibration/<chip>.json`; its schema is in `preflight/calibration.py`."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain_xla.config import RunConfig
from pretrain_xla.doctor.check import Check
from pretrain_xla.preflight.calibration import Calibration, CollectiveRate, Estimated, MeasuredStep, chip_file
from pretrain_xla.preflight.report import settings
from pretrain_xla.runtime.bench_sizes import COLLECTIVES


def calibration_of(
    checks: Sequence[Check],
    *,
    chip: str,
    software: Mapping[str, str],
    config: RunConfig | None,
    same_chip: bool,
    earlier: Calibration | None,
) -> Calibration | None:
    """What was measured on these devices. None means that the devices were not examined, or that one of their checks failed.

    Args:
        checks: all that were made.
        chip: name in the table of chips; on other machines, of the device.
        software: versions by name.
        config: whose steps were made. None means none.
        same_chip: whether preflight's estimate is one of this very chip.
        earlier: the file that is replaced. Its step is kept if none was made now.
    """
    by_name = {check.name: check for check in checks}
    measured = {name: check for name, check in by_name.items() if name not in ("versions",) and "storage" not in name}
    if "devices" not in by_name or any(check.status == "failed" for check in measured.values()):
        return None
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    devices = by_name["devices"].figures
    rates = {name: by_name[name].figures for name in ("matmul", "stream") if name in by_name}
    step = next((check.figures for check in checks if "step_seconds" in check.figures), None)
    found = None if step is None or config is None else _step(step, config, same_chip, now)
    return Calibration(
        measured=now,
        chip=chip_file(chip),
        device=devices["name"],
        devices=devices["count"],
        hosts=by_name["hosts"].figures["machines"],
        software=dict(software),
        matmul_flops_per_second=rates.get("matmul", {}).get("rate"),
        matmul_dtype=rates.get("matmul", {}).get("dtype"),
        stream_bytes_per_second=rates.get("stream", {}).get("rate"),
        collectives={
            kind: CollectiveRate(**{key: by_name[kind].figures[key] for key in CollectiveRate.model_fields})
            for kind in COLLECTIVES
            if kind in by_name and "seconds" in by_name[kind].figures
        },
        step=found or (earlier.step if earlier is not None else None),
    )


def _step(figures: Mapping[str, Any], config: RunConfig, same_chip: bool, now: datetime.datetime) -> MeasuredStep:
    estimate = figures["estimate"]
    known = same_chip and estimate["seconds"] is not None
    return MeasuredStep(
        measured=now,
        topology=estimate["topology"] if same_chip else None,
        config=settings(config) | {key: getattr(config.model, key) for key in ("d_model", "num_layers", "d_ff")},
        estimate=Estimated(
            libtpu=estimate["libtpu"],
            optimistic_seconds=estimate["optimistic_seconds"],
            conservative_seconds=estimate["seconds"],
            hbm_bytes=estimate["hbm_bytes"],
        )
        if known
        else None,
        ratio=estimate["ratio"] if known else None,
        **{
            key: figures[key]
            for key in (
                *("devices", "mesh", "parameters", "tokens_per_step", "compile_seconds", "step_seconds"),
                *("tokens_per_second", "mfu", "memory_bytes"),
            )
        },
    )
