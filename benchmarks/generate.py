"""Speed of generation: `python benchmarks/generate.py`, about ten minutes on two cores.

A random GPT-2 of the quick start's size, and one of 124M parameters, continue a random prompt greedily in four ways. The ways
alternate in one process, so that other load on the machine affects all of them alike. The measured time includes the prompt.

* transformers: `generate` with its cache, eager PyTorch on the CPU, from the same weights.
* torch: ours with its cache, on the torch runtime.
* xla: ours with its cache, on the xla runtime (`PJRT_DEVICE=CPU`).
* xla, no cache: ours with `--no-cache`; each token recomputes a window of 512 tokens, so that few are generated.

It prints tokens/s, ratios with their spread over the rounds, how many tokens agree, and the graphs that XLA compiled.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PJRT_DEVICE", "CPU")
LENGTH = 512


@dataclass(frozen=True)
class Size:
    """A model's shape, and how many tokens to generate with and without a cache."""

    name: str
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    cached: int
    uncached: int


SIZES = (
    Size("quick start, 2M", 2048, 192, 4, 3, cached=256, uncached=32),
    Size("GPT-2, 124M", 50257, 768, 12, 12, cached=64, uncached=2),
)


def measure(size: Size, rounds: int) -> None:
    """Compare the ways for one model, and print the measurements."""
    # XLA first: see CONTRIBUTING.md. Nothing here runs a backward pass, but this order costs nothing.
    from pretrain_xla.config import build_config
    from pretrain_xla.generate.continuation import Continuation, Request
    from pretrain_xla.generate.decoder import Decoder
    from pretrain_xla.generate.sampling import Sampling
    from pretrain_xla.interop.load import load_model
    from pretrain_xla.model import GPT, Execution
    from pretrain_xla.runtime import Runtime, start

    greedy = Sampling(temperature=0)
    import torch
    import transformers

    transformers.set_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=size.vocab_size,
            n_positions=LENGTH,
            n_embd=size.d_model,
            n_layer=size.num_layers,
            n_head=size.num_heads,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        loaded = load_model(folder)
    prompt = torch.randint(0, size.vocab_size, (LENGTH - size.cached,)).tolist()
    window = torch.randint(0, size.vocab_size, (LENGTH - size.uncached,)).tolist()
    runtimes: dict[str, Runtime] = {}
    decoders: dict[str, Decoder] = {}
    for kind in ("xla", "torch"):
        tree = {"model": loaded.config.model_dump(), "parallel": {"runtime": kind, "device": "cpu"}}
        runtimes[kind] = start(build_config(tree, "benchmark"))
        model = GPT(loaded.config)
        model.load_state_dict(loaded.tensors, strict=True)
        model = runtimes[kind].prepare_model(model.eval(), Execution())
        decoders[kind] = Decoder(model, runtimes[kind])

    @torch.no_grad()
    def reference() -> list[int]:
        ids = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=size.cached,
            do_sample=False,
            pad_token_id=0,
        )
        return ids[0, len(prompt) :].tolist()

    def ours(kind: str, text: list[int], count: int, *, cached: bool) -> list[int]:
        request = Request(count, greedy, cached=cached)
        return [token for _, token in Continuation(decoders[kind], [text], request)]

    ways: dict[str, tuple[Callable[[], list[int]], int]] = {
        "transformers": (reference, size.cached),
        "torch": (lambda: ours("torch", prompt, size.cached, cached=True), size.cached),
        "xla": (lambda: ours("xla", prompt, size.cached, cached=True), size.cached),
        "xla, no cache": (lambda: ours("xla", window, size.uncached, cached=False), size.uncached),
    }
    first = {name: way() for name, (way, _) in ways.items() if name != "xla, no cache"}  # compiles, too
    graphs = dict(runtimes["xla"].graph_counts().graphs)
    ways["xla, no cache"][0]()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (way, count) in ways.items():
            begin = time.perf_counter()
            assert len(way()) == count
            rates[name].append(count / (time.perf_counter() - begin))
    print(f"{size.name}: {size.cached} tokens after {len(prompt)}, {rounds} rounds")
    for name, values in rates.items():
        print(f"  {name:14} {statistics.median(values):9,.1f} tokens/s")
    for above, below in (("torch", "transformers"), ("xla", "transformers"), ("xla", "xla, no cache")):
        ratios = sorted(a / b for a, b in zip(rates[above], rates[below], strict=True))
        print(f"  {above} / {below}: {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})")
    for name in ("torch", "xla"):
        same = [a == b for a, b in zip(first[name], first["transformers"], strict=True)]
        agree = same.index(False) if False in same else len(same)
        print(f"  {name}: the first {agree} of {len(same)} tokens agree with transformers")
    print(f"  graphs compiled on XLA for {size.cached} tokens: {graphs}", flush=True)
    for runtime in runtimes.values():
        runtime.close()


def main() -> None:
    """All sizes, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way")
    parser.add_argument("--only", type=int, choices=range(len(SIZES)), help="only this size")
    flags = parser.parse_args()
    for size in SIZES if flags.only is None else [SIZES[flags.only]]:
        measure(size, flags.rounds)


if __name__ == "__main__":
    main()
