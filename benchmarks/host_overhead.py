"""Host overhead of the trainer: `python benchmarks/host_overhead.py`, about five minutes on two cores.

For each runtime on the CPU, two training loops with the same model and batches alternate in one process, so that other load on
the machine affects both alike:

* textbook: as in a tutorial. torch.optim.AdamW with its scheduler, `loss.item()` each step, the batch read and copied in the
  loop. On XLA with `torch_xla.sync()` after each step.
* ours: everything that training runs: the compiled step, the prefetch thread, metrics read every ten steps, the graph guard.

It prints tokens/s of each, their ratio (ours / textbook; above 1 means ours is faster), and the share of our step that the host
spends on tracing, waiting for input, and metrics and files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def textbook(config: Any, batches: Any, device: Any, sync: Callable[[], None]) -> Callable[[int], None]:
    """A textbook training loop with the same model; returns a function that runs one step."""
    import torch

    from pretrain_xla.model import GPT, initialize

    model = GPT(config.model)
    initialize(model, 0)
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optim.learning_rate, betas=config.optim.betas, weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
    losses: list[float] = []

    def step(index: int) -> None:
        tokens = torch.from_numpy(batches.rows(index)).to(device)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        sync()
        losses.append(loss.item())

    return step


def measure(kind: str, rounds: int, steps: int) -> None:
    """Compare the loops on one runtime, and print the measurements."""
    import torch

    from pretrain_xla.config import build_config
    from pretrain_xla.config_file import load_yaml
    from pretrain_xla.run_folder.metrics import read_metrics
    from pretrain_xla.runtime import start
    from pretrain_xla.train.step import METRICS
    from pretrain_xla.train.trainer import Trainer

    tree = load_yaml(str(ROOT / "configs" / "quickstart.yaml"))
    folder = Path(tempfile.mkdtemp())
    draws = np.random.default_rng(0)
    for split in ("train", "valid"):
        (folder / split).mkdir()
        np.save(folder / split / "0.npy", draws.integers(0, tree["model"]["vocab_size"], 400_000).astype(np.uint16))
    tree["data"] = {"train_dir": str(folder / "train"), "valid_dir": str(folder / "valid")}
    tree["logging"] |= {"run_dir": str(folder / "run")}
    tree["parallel"] = {"runtime": kind}
    tree["train"] |= {"train_steps": steps, "valid_interval": 10**6, "valid_steps": 1, "train_batch_size": 8}
    tree["checkpoint"] |= {"save_interval": 10**6}
    tree["optim"] |= {"warmup_steps": 2}
    config = build_config(tree, "benchmark")
    (folder / "run").mkdir()
    runtime = start(config)
    trainer = Trainer(config, runtime)

    if kind == "xla":
        import torch_xla

        sync: Callable[[], None] = torch_xla.sync
    else:
        sync = runtime.wait
    plain = textbook(config, trainer.batches, runtime.device, sync)
    history = [runtime.place_like(torch.zeros(config.logging.log_interval, len(METRICS)), None)]
    traced: list[float] = []

    def ours(first: int, count: int) -> tuple[float, float]:
        """Seconds per step, and seconds of them spent waiting for input, of the trainer's own path without its files."""
        from pretrain_xla.data.prefetch import pipeline

        begin = time.perf_counter()
        depth, stop = config.data.prefetch_batches, first + count
        ahead = pipeline(trainer._read, runtime.place_batch, first, stop, depth, trainer.batches.threads)
        with ahead as batches, runtime.watch():
            for index, tokens in enumerate(batches):
                called = time.perf_counter()
                history[0] = trainer._train_step(tokens, history[0])
                traced.append(time.perf_counter() - called)
                if (index + 1) % config.logging.log_interval == 0:
                    runtime.fetch(history[0])
                trainer.guard.check(index)
            runtime.wait()
            return (time.perf_counter() - begin) / count, batches.seconds_waited / count

    def reference(first: int, count: int) -> float:
        begin = time.perf_counter()
        for index in range(first, first + count):
            plain(index)
        return (time.perf_counter() - begin) / count

    reference(0, 3), ours(0, 3)  # compile
    pairs, waits = [], []
    for number in range(rounds):
        first = 3 + number * steps
        theirs = reference(first, steps)
        mine, waited = ours(first, steps)
        pairs.append((theirs, mine))
        waits.append(waited / mine)
    tokens = config.tokens_per_step
    theirs, mine = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(a / b for a, b in pairs)
    print(
        f"{kind:5}  textbook {tokens / theirs:8,.0f} tokens/s   ours {tokens / mine:8,.0f} tokens/s   "
        f"ratio {statistics.median(ratios):.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f}, {rounds} pairs)"
    )
    if kind == "xla":
        only_trace = trace_seconds(trainer, history[0])
        print(
            f"       a step of {mine * 1e3:.0f} ms: tracing {only_trace * 1e3:.1f} ms ({only_trace / mine:.1%}; "
            f"on a TPU it overlaps with the device), waiting for input {statistics.median(waits):.2%}"
        )
    else:
        print(f"       a step of {mine * 1e3:.0f} ms: waiting for input {statistics.median(waits):.2%}")

    # The whole trainer, with its files, against its steps alone: the cost of logging.
    trainer = Trainer(config, runtime)
    trainer.fit()
    rows = [row for row in read_metrics(str(folder / "run" / "metrics.jsonl")) if "tokens_per_second" in row]
    whole = statistics.median(row["tokens_per_second"] for row in rows)
    print(
        f"       with metrics, TensorBoard and console: {whole:,.0f} tokens/s, {whole * mine / tokens:.3f} of the steps alone"
    )
    runtime.close()
    shutil.rmtree(folder)


def trace_seconds(trainer: Any, history: Any) -> float:
    """Median seconds to trace a step, in Python, without the device."""
    import torch_xla

    seconds = []
    for index in range(5):
        tokens = trainer.runtime.place_batch(trainer._read(index))
        begin = time.perf_counter()
        kept = trainer.step(tokens, history)
        seconds.append(time.perf_counter() - begin)
        torch_xla.sync()
        del kept
    return statistics.median(seconds)


def main() -> None:
    """Run each runtime in its own process: XLA must be initialised before autograd starts its threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", choices=("xla", "torch"), help="measure only this runtime, in this process")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each loop")
    parser.add_argument("--steps", type=int, default=20, help="steps per measurement")
    flags = parser.parse_args()
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    if flags.runtime:
        measure(flags.runtime, flags.rounds, flags.steps)
        return
    for kind in ("xla", "torch"):
        command = [
            sys.executable,
            __file__,
            "--runtime",
            kind,
            "--rounds",
            str(flags.rounds),
            "--steps",
            str(flags.steps),
        ]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
