"""Our training step against JAX's, by the TPU compiler: `python benchmarks/tpu_step.py`, no TPU, six to eight minutes.

For each config, both steps are compiled for one chip (8 sequences of the config's length, no accumulation, weights and
optimizer state donated), each in its own process: ours as the trainer runs it, through preflight; and `jax_step.py`, with the
same architecture, optimizer and numerics in plain JAX and optax.

It prints a table with the ratios ours / JAX (below 1, ours is ahead) and the rules by which kernels are counted alike; then
whether ours is ahead, and whether both need the same memory and flops. The two save different things for the backward passes of
their kernels: `--plain-attention` compiles both without kernels, so that memory and flops must agree. `--operations N` shows
where either side's bytes go, by source line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.step_figures import RULES, Figures, expensive_lines, print_checks, print_table, read_figures  # noqa: E402
from pretrain_xla.config import RunConfig, build_config  # noqa: E402
from pretrain_xla.config_file import load_yaml  # noqa: E402
from pretrain_xla.errors import UserError  # noqa: E402
from pretrain_xla.preflight.client import ENVIRONMENT, STALE, Request, compile_request  # noqa: E402
from pretrain_xla.preflight.compile_result import Compiled  # noqa: E402
from pretrain_xla.preflight.hlo import Module  # noqa: E402
from pretrain_xla.preflight.topology import resolve_topology  # noqa: E402

CONFIGS = ("gpt2_124m", "modern_124m_adamw")
SEQUENCES = 8
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def one_chip(name: str, layers: int | None, plain_attention: bool = False) -> RunConfig:
    """One of our configs, reduced to one chip's share of a step."""
    tree = load_yaml(str(ROOT / "configs" / f"{name}.yaml"))
    tree["train"] |= {"train_batch_size": SEQUENCES, "gradient_accum_step": 1}
    if layers is not None:
        tree["model"] |= {"num_layers": layers}
    if plain_attention:
        tree["model"] |= {"attention": "reference"}
    return build_config(tree, name)


def compile_ours(config: RunConfig, topology: str) -> Compiled:
    """Compile the trainer's step as preflight does, for one chip of the topology's kind."""
    chip = resolve_topology(f"{resolve_topology(topology).chip.name}-1")
    compiled = compile_request(Request(config, chip)).compiled
    if compiled is None:
        raise UserError("our step does not fit")
    return compiled


def compile_jax(config: RunConfig, topology: str, residual: str) -> Compiled:
    """Compile the JAX step in its own process, with the environment that preflight gives to its own."""
    kept = {key: value for key, value in os.environ.items() if key not in STALE}
    with tempfile.TemporaryDirectory(prefix="tpu-step-") as folder:
        request = {
            "config": config.model_dump(mode="json"),
            "topology": topology,
            "residual_dtype": residual,
            "attention": "reference" if config.model.attention == "reference" else "splash",
        }
        (Path(folder) / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, __file__, "--jax-worker", folder]
        done = subprocess.run(command, env=kept | ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError("the JAX step was not compiled: " + " | ".join(done.stderr.strip().splitlines()[-4:]))
        return Compiled(**json.loads((Path(folder) / "compiled.json").read_text(encoding="utf-8")))


def jax_worker(folder: Path) -> None:
    """Compile the JAX step that `request.json` describes, and write the compiler's figures to `compiled.json`."""
    from benchmarks.jax_step import compile_for
    from pretrain_xla.preflight import compiler

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    config = RunConfig.model_validate(request["config"])
    topology = resolve_topology(request["topology"])
    began = time.perf_counter()
    choices = {key: request[key] for key in ("residual_dtype", "attention")}
    executable = compile_for(config, topology.libtpu_name, SEQUENCES, **choices)
    seconds = time.perf_counter() - began
    text = executable.as_text()
    assert text is not None
    compiled = compiler.read_figures(text, executable.memory_analysis(), executable.cost_analysis(), seconds)
    (folder / "compiled.json").write_text(json.dumps(dataclasses.asdict(compiled)), encoding="utf-8")


def compare(name: str, flags: argparse.Namespace) -> None:
    """Compile both sides of one config, and print their figures."""
    config = one_chip(name, flags.layers, flags.plain_attention)
    chip = resolve_topology(flags.topology).chip
    residuals = tuple(SHORT) if flags.both_residuals else (flags.residual,)
    sides = {"ours": partial(compile_ours, config, flags.topology)}
    for residual in residuals:
        title = "JAX" if len(residuals) == 1 else f"JAX {SHORT[residual]}"
        sides[title] = partial(compile_jax, config, flags.topology, residual)
    figures: dict[str, Figures] = {}
    lines = []
    for title, compile_side in sides.items():
        print(f"compiling {name}, {title} …", file=sys.stderr, flush=True)
        compiled = compile_side()
        print(f"  {compiled.seconds:.0f} s", file=sys.stderr, flush=True)
        if flags.save_hlo:
            flags.save_hlo.mkdir(parents=True, exist_ok=True)
            file = flags.save_hlo / f"{name}_{title.replace(' ', '_').lower()}.hlo"
            file.write_text(compiled.hlo_text, encoding="utf-8")
        module = Module(compiled.hlo_text)
        figures[title] = read_figures(config, compiled, module, chip)
        if flags.operations:
            lines += [f"{title}: the lines that move the most bytes", *expensive_lines(module, chip, flags.operations)]
    print(f"\n{name}: {config.model.num_layers} layers, {SEQUENCES} x {config.model.seq_length:,} tokens, {chip.name}")
    print_table(config, figures)
    print_checks(config, figures)
    print(*lines, sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=CONFIGS, metavar="NAME", help="files of configs/, without .yaml")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--topology", default="v5e:2x2", help="a slice of chips of this kind; one of them is used")
    parser.add_argument(
        "--residual", choices=tuple(SHORT), default="float32", help="type of JAX's residual stream; ours is float32"
    )
    parser.add_argument("--both-residuals", action="store_true", help="compile JAX's step with each type")
    parser.add_argument(
        "--plain-attention", action="store_true", help="no kernels on either side, so that both save and count the same"
    )
    parser.add_argument(
        "--operations", type=int, default=0, metavar="N", help="show the N lines that move the most bytes"
    )
    parser.add_argument("--save-hlo", type=Path, metavar="DIR", help="keep the compiled modules")
    parser.add_argument("--jax-worker", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.jax_worker:
        jax_worker(flags.jax_worker)
        return
    try:
        for name in flags.config:
            compare(name, flags)
    except UserError as error:
        sys.exit(f"error: {error}")
    print("\n" + RULES)


if __name__ == "__main__":
    main()
