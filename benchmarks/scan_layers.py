"""Scanned against unrolled layers, by the TPU compiler: `python benchmarks/scan_layers.py`, no TPU, eight minutes.

Preflight compiles the same model with `scan_layers` and without, both with `rematerialization: full` and 8 sequences on one
chip. Two ratios have a limit: the estimated step of scanned layers over that of unrolled ones, at most 1.03; and the time to
compile 48 scanned layers over 12, at most 1.5. Compiling 48 unrolled layers needs more memory than most hosts have, so their
step is extrapolated linearly from 4 and 12 layers (`--check 24` also compiles 24, to show how linear it is).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tpu_step import one_chip  # noqa: E402
from pretrain_xla.config import RunConfig  # noqa: E402
from pretrain_xla.errors import UserError  # noqa: E402
from pretrain_xla.preflight.report import Report  # noqa: E402
from pretrain_xla.preflight.topology import resolve_topology  # noqa: E402
from pretrain_xla.preflight.trials import Compiler, changed  # noqa: E402

FEW, SHALLOW, DEEP = 4, 12, 48


def variant(name: str, layers: int, scan: bool, width: int | None) -> RunConfig:
    """One chip's share of a config's step; `width` replaces d_model, with heads of 128 and a feed-forward of 8/3 of it."""
    changes: dict[str, Any] = {"rematerialization": "full", "scan_layers": scan}
    if width is not None:
        changes |= {"d_model": width, "num_heads": width // 128, "head_dim": 128, "d_ff": 8 * width // 3}
    return changed(one_chip(name, layers), changes)


def milliseconds(report: Report) -> float:
    """A step by preflight's conservative estimate, kernels included."""
    if report.estimate is None:
        raise UserError(f"{report.settings} does not fit")
    return 1e3 * report.estimate.conservative.seconds


def compare(name: str, flags: argparse.Namespace) -> None:
    """Compile one config in each way, and print both ratios."""
    variants = [(FEW, False), (SHALLOW, False), (SHALLOW, True), (DEEP, True)]
    variants += [(flags.check, False)] if flags.check else []
    reports: dict[tuple[int, bool], Report] = {}
    with Compiler(resolve_topology(flags.topology), options={}, total=len(variants)) as compiler:
        for layers, scan in variants:
            label = f"{name}, {layers} layers, {'scan' if scan else 'unrolled'}"
            reports[layers, scan] = compiler.compile(variant(name, layers, scan, flags.width), label)
    few, shallow = milliseconds(reports[FEW, False]), milliseconds(reports[SHALLOW, False])

    def extrapolate(layers: int) -> float:
        return shallow + (layers - SHALLOW) * (shallow - few) / (SHALLOW - FEW)

    print(
        f"\n{name}{f', width {flags.width}' if flags.width else ''}, {flags.topology}, 8 sequences, full rematerialisation"
    )
    print(f"{'':24}{'scan, ms':>12}{'unrolled, ms':>16}{'ratio':>8}{'scan compiles, s':>18}{'unrolled, s':>16}")
    for layers in (SHALLOW, DEEP):
        scanned, unrolled = reports[layers, True], reports.get((layers, False))
        ours, other = milliseconds(scanned), extrapolate(layers)
        seconds = f"{unrolled.compile_seconds:.0f}" if unrolled else "not compiled"
        title = f"{layers} layers" + ("" if unrolled else ", extrapolated")
        print(f"{title:24}{ours:>12.2f}{other:>16.2f}{ours / other:>8.3f}{scanned.compile_seconds:>18.0f}{seconds:>16}")
    compile_ratio = reports[DEEP, True].compile_seconds / reports[SHALLOW, True].compile_seconds
    print(f"compiling {DEEP} scanned layers / {SHALLOW}: {compile_ratio:.2f}", flush=True)
    if flags.check:
        found = milliseconds(reports[flags.check, False])
        print(f"{flags.check} layers unrolled: {found:.2f} ms, extrapolated {extrapolate(flags.check):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=("modern_124m", "gpt2_124m"), metavar="NAME", help="of configs/")
    parser.add_argument("--topology", default="v5e-1", help="one device")
    parser.add_argument("--width", type=int, help="another d_model, a multiple of 384")
    parser.add_argument("--check", type=int, help="also compile this many layers unrolled")
    flags = parser.parse_args()
    if flags.width is not None and (flags.width <= 0 or flags.width % 384):
        parser.error(f"--width {flags.width}: give a multiple of 384, as 1536")
    try:
        for name in flags.config:
            compare(name, flags)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
