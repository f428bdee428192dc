"""Tokens to the same loss, by recipe: `python benchmarks/tokens_to_loss.py --text FILE…`, an hour or more on two cores.

Small models of one size are trained on real text in bf16, each by a recipe of `recipes.py`, with several seeds, and validated
on the same 65,536 tokens of documents that no recipe trains on. Both runtimes give the same losses; on a CPU torch.compile is
more than twice as fast as XLA. The other recipes train for the size's full budget.
`ours` trains for several shares of it, each run with a schedule of its own length; between two of them the share that reaches a
loss is interpolated, over the logarithm of the tokens.

It prints each recipe's loss, tokens, operations and wall-clock time, and the share of each other recipe's tokens that `ours`
needs for its loss: mean over the seeds, least and most. `loss.png` shows the losses over the tokens.

Every finished run is a line of `results.jsonl` in the output folder, and is not run again. `--sweep RECIPE RATE…` tries
learning rates on seed 0, which no reported run uses. `--ablate` takes the ingredients of `ours` out, one at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import queue
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.recipes import (  # noqa: E402
    ABLATIONS,
    CONTESTANTS,
    SIZES,
    TOKENS_PER_STEP,
    VOCAB_SIZE,
    Size,
    Tree,
    ablated,
    recipe,
)
from pretrain_xla.config import build_config  # noqa: E402
from pretrain_xla.model.flops import flops_per_token, parameter_count  # noqa: E402

TUNING_SEED = 0
SCRIPTS = {"torch": "run_pretrain.py", "xla": "run_pretrain_xla.py"}


Job = tuple[str, Tree, int]
"""Name, config and seed of a run."""


class Runs:
    """Runs of configs, each once: what is in `results.jsonl` is not run again.

    Arguments:
        folder: holds `results.jsonl`.
        data: the prepared text.
        runtime: "torch" or "xla".
        jobs: runs at a time. Each has an equal share of the cores to itself: small models keep one core busier than several.
    """

    def __init__(self, folder: Path, data: Path, runtime: str = "torch", jobs: int = 1) -> None:
        self.folder, self.data, self.runtime = folder, data, runtime
        self.file = folder / "results.jsonl"
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self.done: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}
        cores = sorted(os.sched_getaffinity(0))
        self.jobs = max(1, min(jobs, len(cores)))
        self._free: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for index in range(self.jobs):
            self._free.put(cores[index :: self.jobs])
        self._lock = threading.Lock()

    def results(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """The results of several runs, in order."""
        once = {self._key(tree, seed): (name, tree, seed) for name, tree, seed in reversed(jobs)}
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(self.result, *job) for job in reversed(once.values())]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [self.result(*job) for job in jobs]

    def result(self, name: str, tree: Tree, seed: int) -> dict[str, Any]:
        """The result of a config with a seed: `loss` (validation, inf where it diverged), `tokens`, `seconds`, `flops` …"""
        key = self._key(tree, seed)
        if key not in self.done:
            cores = self._free.get()
            try:
                row = {"key": key, "name": name, "seed": seed} | self._run(key, name, tree, seed, cores)
            finally:
                self._free.put(cores)
            with self._lock, self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.done[key] = row
        return self.done[key]

    def _key(self, tree: Tree, seed: int) -> str:
        whole = tree | {"parallel": {"runtime": self.runtime}}
        return hashlib.sha256(json.dumps([whole, seed], sort_keys=True).encode()).hexdigest()[:16]

    def loss(self, name: str, tree: Tree, seed: int) -> float:
        """Final validation loss of a config with a seed."""
        return float(self.result(name, tree, seed)["loss"])

    def _run(self, key: str, name: str, tree: Tree, seed: int, cores: Sequence[int]) -> dict[str, Any]:
        run_dir, file = self.folder / f"run_{key}", self.folder / f"{key}.yaml"
        tree = {
            **tree,
            "parallel": {"runtime": self.runtime},
            "train": tree["train"] | {"seed": seed},
            "data": {"train_dir": str(self.data / "train"), "valid_dir": str(self.data / "valid")},
            "logging": tree["logging"] | {"run_dir": str(run_dir)},
        }
        config = build_config(tree, name)
        file.write_text(yaml.safe_dump(tree), encoding="utf-8")
        steps = config.train.train_steps
        print(f"{time.strftime('%H:%M')} {name}, seed {seed}, {steps} steps …", file=sys.stderr, flush=True)
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, SCRIPTS[self.runtime], "--config", str(file)],
            cwd=ROOT,
            env=os.environ | {"PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": str(len(cores))},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        seconds = time.perf_counter() - began
        diverged = done.returncode != 0 and ("nan" in done.stdout.lower() or "finite" in done.stdout)
        if done.returncode and not diverged:
            raise SystemExit(f"{name} failed:\n{done.stdout[-3000:]}")
        loss = math.inf if diverged else _last_valid_loss(run_dir)
        shutil.rmtree(run_dir)
        file.unlink()
        print(f"      {name}, seed {seed}: {loss:.4f} in {seconds:.0f} s", file=sys.stderr, flush=True)
        tokens = steps * TOKENS_PER_STEP
        return {
            "loss": loss,
            "steps": steps,
            "tokens": tokens,
            "flops": flops_per_token(config.model) * tokens,
            "parameters": parameter_count(config.model),
            "seconds": round(seconds, 1),
            "model": tree["model"],
            "optim": tree["optim"],
        }


def _last_valid_loss(run_dir: Path) -> float:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [float(row["valid_loss"]) for row in rows if "valid_loss" in row][-1]


def prepare_text(texts: Sequence[str], folder: Path) -> Path:
    """Tokenize the text once, with a byte-level BPE that is trained on it; documents are held out by their hash."""
    data = folder / f"data_{hashlib.sha256(' '.join(texts).encode()).hexdigest()[:8]}"
    if (data / "dataset.json").exists():
        return data
    sources = list(texts) or ["quickstart"]
    weights = ["--weights", ":".join("1" * len(sources))] if len(sources) > 1 else []
    options = [*weights, "--train-vocab-size", str(VOCAB_SIZE), "--valid-fraction", "0.02"]
    command = [sys.executable, "-m", "pretrain_xla", "prepare", *sources, str(data), *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return data


def share_needed(target: float, points: Sequence[tuple[float, float]]) -> float:
    """The share at which a loss is reached, between (share, loss) points of falling loss; inf where none reaches it.

    Over the logarithm of the share, and never below the first point: what is not measured is not claimed.
    """
    ordered = sorted(points)
    if ordered[0][1] <= target:
        return ordered[0][0]
    for (left, above), (right, below) in itertools.pairwise(ordered):
        if below <= target < above:
            part = (above - target) / (above - below)
            return math.exp(math.log(left) + part * (math.log(right) - math.log(left)))
    return math.inf


def spread(values: Iterable[float]) -> str:
    """Mean, least and most."""
    known = list(values)
    return f"{statistics.fmean(known):.3f} ({min(known):.3f} to {max(known):.3f})"


def compare(runs: Runs, size: Size, seeds: Sequence[int]) -> bool:
    """Run all recipes, print the tables, draw the plot; whether `ours` reaches every target."""
    runs.results(
        [
            job
            for seed in seeds
            for job in (
                *((name, recipe(name, size, size.steps), seed) for name in CONTESTANTS[:-1]),
                *_ours(size, seed),
            )
        ]
    )
    others = {
        name: [runs.result(name, recipe(name, size, size.steps), seed) for seed in seeds] for name in CONTESTANTS[:-1]
    }
    ours = {
        share: [runs.result(f"ours {share:g}", recipe("ours", size, round(size.steps * share)), seed) for seed in seeds]
        for share in size.budgets
    }
    rows = others | {f"ours, {share:g} of the tokens": results for share, results in ours.items()}
    print(f"{'recipe':28s} {'parameters':>10s} {'steps':>6s} {'tokens':>10s} {'operations':>11s} {'minutes':>8s}  loss")
    for name, results in rows.items():
        one, minutes = results[0], statistics.fmean(result["seconds"] for result in results) / 60
        print(
            f"{name:28s} {one['parameters']:10,d} {one['steps']:6d} {one['tokens']:10,d} {one['flops']:11.2e} {minutes:8.1f}  "
            + spread(result["loss"] for result in results)
        )
    print("\nshare of a recipe's tokens that ours needs for its loss")
    reached = True
    for (name, results), target in zip(others.items(), size.targets, strict=True):
        shares = [
            share_needed(results[index]["loss"], [(share, ours[share][index]["loss"]) for share in size.budgets])
            for index in range(len(seeds))
        ]
        reached &= statistics.fmean(shares) <= target
        print(f"{name:28s} {spread(shares)}; at most {target:g} wanted")
    draw(runs.folder / "loss.png", list(rows.values()), list(rows))
    return reached


def _ours(size: Size, seed: int) -> list[Job]:
    """The runs of `ours` with a seed, one for each budget."""
    return [(f"ours {share:g}", recipe("ours", size, round(size.steps * share)), seed) for share in size.budgets]


def sweep(runs: Runs, size: Size, contestant: str, rates: Sequence[float], share: float) -> None:
    """Print the loss at each learning rate, on the seed that is for tuning."""
    steps = round(size.steps * share)
    jobs = [(f"{contestant} {rate:g}", recipe(contestant, size, steps, rate), TUNING_SEED) for rate in rates]
    for rate, result in zip(rates, runs.results(jobs), strict=True):
        print(f"{contestant} at {rate:g}: {result['loss']:.4f}")


def ablate(runs: Runs, size: Size, ingredients: Sequence[str], seeds: Sequence[int]) -> None:
    """Print the loss without each ingredient, and the tokens that `ours` needs for that loss, as a share of the ablation's."""
    share = size.budgets[-2]
    steps = round(size.steps * share)
    runs.results(
        [
            job
            for seed in seeds
            for job in (*_ours(size, seed), *((f"without {i}", ablated(i, size, steps), seed) for i in ingredients))
        ]
    )
    points = {
        seed: [(s, runs.loss(f"ours {s:g}", recipe("ours", size, round(size.steps * s)), seed)) for s in size.budgets]
        for seed in seeds
    }
    whole = [dict(points[seed])[share] for seed in seeds]
    print(f"{'ours':28s} {spread(whole)}")
    for name in ingredients:
        tree = ablated(name, size, steps)
        losses = [runs.loss(f"without {name}", tree, seed) for seed in seeds]
        saved = [share_needed(loss, points[seed]) / share for loss, seed in zip(losses, seeds, strict=True)]
        print(
            f"{'without ' + name:28s} {spread(losses)}; ours gets there with {spread(saved)} of the tokens", flush=True
        )


TITLES = {
    "baseline": "GPT-2, nanoGPT's recipe",
    "baseline_tuned": "the same, best learning rate",
    "modern": "modern architecture, AdamW",
    "ours": "ours",
}


def draw(path: Path, results: Sequence[Sequence[dict[str, Any]]], names: Sequence[str]) -> None:
    """Plot the final losses over the tokens, a point for each run; a line at the mean of each other recipe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = plt.subplots(figsize=(7, 4.5))
    curve: list[tuple[float, float]] = []
    for name, runs in zip(names, results, strict=True):
        tokens, losses = [run["tokens"] for run in runs], [run["loss"] for run in runs]
        contestant = name.split(",")[0]
        index = CONTESTANTS.index(contestant)
        title = None if curve and contestant == "ours" else TITLES[contestant]
        axes.scatter(
            tokens, losses, s=40 - 9 * index, marker="sDo."[index], color=f"C{index}", label=title, zorder=index
        )
        if contestant == "ours":
            curve.append((tokens[0], statistics.fmean(losses)))
        else:
            axes.axhline(statistics.fmean(losses), linewidth=0.8, color=f"C{index}", alpha=0.5, zorder=0)
    axes.plot(*zip(*curve, strict=True), color=f"C{CONTESTANTS.index('ours')}", linewidth=1)
    axes.set(xscale="log", xlabel="tokens trained on, each run to the end of its schedule", ylabel="validation loss")
    ticks = sorted({tokens for tokens, _ in curve} | {run["tokens"] for runs in results for run in runs})
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / 1e6:.2f}M"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", nargs="*", default=[], metavar="FILE", help="default: the documentation inside Python"
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="2M", help="parameters of GPT-2's architecture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "tokens_to_loss")
    parser.add_argument("--runtime", choices=("torch", "xla"), default="torch")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--sweep", nargs="+", metavar=("RECIPE", "RATE"), help="learning rates to try on seed 0")
    parser.add_argument("--share", type=float, default=1.0, help="--sweep: steps as a share of the budget")
    parser.add_argument("--ablate", nargs="*", metavar="INGREDIENT", help=f"of {', '.join(ABLATIONS)}; none named: all")
    flags = parser.parse_args()
    size = SIZES[flags.size]
    folder = flags.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(folder, prepare_text(flags.text, folder), flags.runtime, flags.jobs)
    jobs: list[Callable[[], object]] = []
    if flags.sweep:
        jobs.append(lambda: sweep(runs, size, flags.sweep[0], [float(rate) for rate in flags.sweep[1:]], flags.share))
    if flags.ablate is not None:
        jobs.append(lambda: ablate(runs, size, flags.ablate or list(ABLATIONS), flags.seeds))
    for job in jobs:
        job()
    if not jobs and not compare(runs, size, flags.seeds):
        raise SystemExit("ours does not reach every target")


if __name__ == "__main__":
    main()
