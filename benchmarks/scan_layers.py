"""Layers as one loop against layers one by one, by the TPU compiler: `python benchmarks/scan_layers.py`, no TPU, eight minutes.

The same model is compiled through preflight with `scan_layers` and without, both with `rematerialization: full` and 8 sequences
on one chip. Two ratios are asked for: the estimated step of the loop against that of the layers one by one, which should be
at most 1.03; and the time to compile 48 looped layers against 12, which should be at most 1.5. Unrolled, 48 layers need more
memory to compile than most machines have; their step is taken from those of 4 and 12 layers, in a straight line (`--check 24`
compiles that many as well, and shows how straight it is).
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


def variant(name: str, layers: int, loop: bool, width: int | None) -> RunConfig:
    """One chip's share of a config's step. width: another one, in heads of 128 and with a feed-forward of 8/3 of it."""
    changes: dict[str, Any] = {"rematerialization": "full", "scan_layers": loop}
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
    wanted = [(FEW, False), (SHALLOW, False), (SHALLOW, True), (DEEP, True)]
    wanted += [(flags.check, False)] if flags.check else []
    reports: dict[tuple[int, bool], Report] = {}
    with Compiler(resolve_topology(flags.topology), options={}, total=len(wanted)) as compiler:
        for layers, loop in wanted:
            label = f"{name}, {layers} layers, {'loop' if loop else 'one by one'}"
            reports[layers, loop] = compiler.compile(variant(name, layers, loop, flags.width), label)
    few, shallow = milliseconds(reports[FEW, False]), milliseconds(reports[SHALLOW, False])

    def line(layers: int) -> float:
        return shallow + (layers - SHALLOW) * (shallow - few) / (SHALLOW - FEW)

    print(
        f"\n{name}{f', width {flags.width}' if flags.width else ''}, {flags.topology}, 8 sequences, full rematerialisation"
    )
    print(f"{'':24}{'loop, ms':>12}{'one by one, ms':>16}{'ratio':>8}{'loop compiles, s':>18}{'one by one, s':>16}")
    for layers in (SHALLOW, DEEP):
        looped, apart = reports[layers, True], reports.get((layers, False))
        ours, other = milliseconds(looped), line(layers)
        seconds = f"{apart.compile_seconds:.0f}" if apart else "not compiled"
        title = f"{layers} layers" + ("" if apart else ", by a line")
        print(f"{title:24}{ours:>12.2f}{other:>16.2f}{ours / other:>8.3f}{looped.compile_seconds:>18.0f}{seconds:>16}")
    compile_ratio = reports[DEEP, True].compile_seconds / reports[SHALLOW, True].compile_seconds
    print(f"compiling {DEEP} looped layers / {SHALLOW}: {compile_ratio:.2f}", flush=True)
    if flags.check:
        found = milliseconds(reports[flags.check, False])
        print(f"{flags.check} layers one by one: {found:.2f} ms, by the line {line(flags.check):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=("modern_124m", "gpt2_124m"), metavar="NAME", help="of configs/")
    parser.add_argument("--topology", default="v5e-1", help="one device")
    parser.add_argument("--width", type=int, help="another d_model, a multiple of 384")
    parser.add_argument("--check", type=int, help="compile that many layers one by one as well")
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
