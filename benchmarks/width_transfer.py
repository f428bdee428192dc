"""Whether the best learning rate is the best at four times the width: `python benchmarks/width_transfer.py --text FILE…`

Models of two widths are trained by `ours` of `recipes.py`, and by the same with AdamW, with all learning rates times a factor.
The learning rates are those for width 192 (`base_d_model`). The best factor of a width is where a parabola over the logarithm
of the factor, through the best one tried and its neighbours, is lowest. It prints the losses and the ratio of the best factors
of the two widths: a rule that holds gives 1. `--no-base` leaves `base_d_model` out, for comparison.

Finished runs are kept and shared with `tokens_to_loss.py`, as are the options.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.recipes import SIZES, Tree, recipe  # noqa: E402
from benchmarks.tokens_to_loss import TUNING_SEED, Runs, prepare_text  # noqa: E402

WIDTHS = (64, 256)
HEAD_DIM = 32
STEPS = 120
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
RATES = ("learning_rate", "embedding_learning_rate", "head_learning_rate", "scalar_learning_rate")
# AdamW's learning rate for the blocks' matrices, where Muon's is 0.02.
ADAMW = {"optim_type": "adamw", "learning_rate": 0.008}


def config(optim_type: str, d_model: int, factor: float, with_base: bool) -> Tree:
    """`ours` at a width, with all learning rates times a factor."""
    tree = recipe("ours", SIZES["2M"], STEPS)
    d_ff = round(d_model * 8 / 3 / HEAD_DIM) * HEAD_DIM
    tree["model"] |= {"d_model": d_model, "num_heads": d_model // HEAD_DIM, "head_dim": HEAD_DIM, "d_ff": d_ff}
    if optim_type == "adamw":
        tree["optim"] |= ADAMW
    tree["optim"] |= {name: tree["optim"][name] * factor for name in RATES}
    if not with_base:
        del tree["optim"]["base_d_model"]
    return tree


def best_factor(points: Sequence[tuple[float, float]]) -> float:
    """Where a parabola through the lowest of (factor, loss) points and its neighbours is lowest; nan if that is an end."""
    ordered = sorted(points)
    index = min(range(len(ordered)), key=lambda i: ordered[i][1])
    if index in (0, len(ordered) - 1):
        return math.nan
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(x), y) for x, y in ordered[index - 1 : index + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    return math.exp((x0 + x1) / 2 - left / (2 * curvature))


def transfer(runs: Runs, optim_type: str, with_base: bool, seeds: Sequence[int]) -> float:
    """Print the losses at both widths; the ratio of the best factors."""
    names = {(width, factor): f"{optim_type} {width} x{factor:g}" for width in WIDTHS for factor in FACTORS}
    jobs = [
        (name, config(optim_type, width, factor, with_base), seed)
        for (width, factor), name in names.items()
        for seed in seeds
    ]
    results = iter(runs.results(jobs))
    losses = {key: sum(next(results)["loss"] for _ in seeds) / len(seeds) for key in names}
    print(f"{optim_type}{'' if with_base else ', the same learning rates at both widths'}")
    print(f"{'width':>6s}" + "".join(f"{'x' + format(factor, 'g'):>9s}" for factor in FACTORS) + f"{'best':>9s}")
    best = {}
    for width in WIDTHS:
        best[width] = best_factor([(factor, losses[width, factor]) for factor in FACTORS])
        print(f"{width:6d}" + "".join(f"{losses[width, factor]:9.4f}" for factor in FACTORS) + f"{best[width]:9.2f}")
    ratio = best[WIDTHS[1]] / best[WIDTHS[0]]
    print(f"best factor at {WIDTHS[1]} / at {WIDTHS[0]}: {ratio:.2f}\n", flush=True)
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="*", default=[], metavar="FILE", help="default: Python's own documentation")
    parser.add_argument("--optim-type", nargs="+", choices=("muon", "adamw"), default=["muon", "adamw"])
    parser.add_argument("--no-base", action="store_true", help="the same learning rates at both widths")
    parser.add_argument("--seeds", type=int, nargs="+", default=[TUNING_SEED])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "tokens_to_loss")
    parser.add_argument("--runtime", choices=("torch", "xla"), default="torch")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    flags = parser.parse_args()
    folder = flags.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(folder, prepare_text(flags.text, folder), flags.runtime, flags.jobs)
    for optim_type in flags.optim_type:
        transfer(runs, optim_type, not flags.no_base, flags.seeds)


if __name__ == "__main__":
    main()
