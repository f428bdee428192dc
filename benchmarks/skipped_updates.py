"""What it costs to be able to skip an update: `python benchmarks/skipped_updates.py`, about two minutes on two idle cores.

For each runtime on the CPU, three steps of the quick start's model alternate in one process: without any guard, with the one
that every run has, and with `spike_sigma` as well. It prints milliseconds of processor time of each, and the ratio to the
first. A step has one sequence only, so that the update is a large part of it. For a TPU, compare
`python -m pretrain_xla preflight` with and without `--spike-sigma 6`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def measure(kind: str, rounds: int, steps: int) -> None:
    """Compare the three on one runtime, and print the measurements."""
    import torch

    from pretrain_xla.config import build_config
    from pretrain_xla.config_file import load_yaml
    from pretrain_xla.runtime import start

    tree = load_yaml(str(ROOT / "configs" / "quickstart.yaml"))
    tree["parallel"] = {"runtime": kind}
    tree["train"] |= {"train_batch_size": 1, "gradient_accum_step": 1}
    torch.set_num_threads(1)  # a thread that waits for another would count
    runtime = start(build_config(tree, "benchmark"))
    runs: dict[str, Callable[[], None]] = {}
    for name, sigma in (("no guard", None), ("guard", None), ("spikes", 6.0)):
        tree["train"]["spike_sigma"] = sigma
        runs[name] = loop(build_config(tree, "benchmark"), runtime, guarded=name != "no guard")
        for _ in range(3):  # compile
            runs[name]()
    runtime.wait()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.process_time()
            for _ in range(steps):
                run()
            runtime.wait()
            found[name].append((time.process_time() - begin) / steps)
    for name, seconds in found.items():
        ratios = sorted(one / plain for one, plain in zip(seconds, found["no guard"], strict=True))
        print(
            f"{kind:5}  {name:8}  {statistics.median(seconds) * 1e3:8.1f} ms a step   ratio {statistics.median(ratios):.3f} "
            f"(from {ratios[0]:.3f} to {ratios[-1]:.3f}, {rounds} rounds)",
            flush=True,
        )
    runtime.close()


def loop(config: Any, runtime: Any, *, guarded: bool) -> Callable[[], None]:
    """A function that runs one step."""
    import numpy as np
    import torch
    from torch import Tensor

    from pretrain_xla.model import GPT, initialize
    from pretrain_xla.optim.clipping import clip_by_global_norm
    from pretrain_xla.run_folder.build import build_optimizer, execution_of
    from pretrain_xla.train.step import METRICS, TrainStep

    class WithoutGuard(TrainStep):
        def _clip_and_update(self, loss: Tensor, gradients: list[Tensor], counted: Tensor | None) -> Tensor:
            gradients, norm = clip_by_global_norm(gradients, self.max_grad_norm, counted)
            rate = self.optimizer.update(gradients)
            zero = torch.zeros_like(norm)
            return torch.stack([loss.detach(), norm, rate, zero, zero])

    model = GPT(config.model, runtime.compute_dtype)
    initialize(model, 0)
    model = runtime.prepare_model(model, execution_of(config))

    def place(name: str, shape: torch.Size, like: Tensor) -> Tensor:
        return runtime.place_like(torch.zeros(shape, dtype=torch.int32 if name == "step" else torch.float32), like)

    optimizer = build_optimizer(config, model, place, runtime.map_matrices)
    step = (TrainStep if guarded else WithoutGuard)(model, optimizer, runtime, config)
    compiled = runtime.compile(step, "train", state=step.state)
    train = config.train
    shape = (train.train_batch_size, train.gradient_accum_step, config.model.seq_length + 1)
    tokens = runtime.place_batch(np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32))
    history = [runtime.place_like(torch.zeros(config.logging.log_interval, len(METRICS)), None)]

    def run() -> None:
        history[0] = compiled(tokens, history[0])

    return run


def main() -> None:
    """Run each runtime in its own process: XLA must be initialised before autograd starts its threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", choices=("xla", "torch"), help="measure only this runtime, in this process")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each step")
    parser.add_argument("--steps", type=int, default=10, help="steps per measurement")
    flags = parser.parse_args()
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    if flags.runtime:
        measure(flags.runtime, flags.rounds, flags.steps)
        return
    for kind in ("xla", "torch"):
        words = ["--runtime", kind, "--rounds", str(flags.rounds), "--steps", str(flags.steps)]
        subprocess.run([sys.executable, __file__, *words], check=True)


if __name__ == "__main__":
    main()
