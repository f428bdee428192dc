"""Chunked loss on four virtual devices: the reference's values on every mesh, and no collective over data in the loop."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
import torch, torch_xla
from pretrain_xla.config import build_config
from pretrain_xla.model import GPT, initialize
from pretrain_xla.model.xla.stacked import unstack_layers
from pretrain_xla.runtime.xla.runtime import XlaRuntime
from pretrain_xla.run_folder.build import build_examples, execution_of

SIZES = dict(vocab_size=61, vocab_multiple=16, seq_length=11, d_model=32, num_layers=2, num_heads=4, d_ff=64, norm="rmsnorm",
             positions="rotary", attention="reference")
LOOPS = dict(scan_layers=True, rematerialization="full", gradient_accum_step=2)
CASES = {  # A device has 22 tokens, or 44 if two share them; 7 divides neither, nor do the next numbers of chunks.
    "fsdp": ((1, 4, 1), dict(tie_weights=True), dict(loss_chunk=7)),
    "data x fsdp": ((2, 2, 1), dict(logit_softcap=3.0), dict(loss_chunk=11)),
    "data x tensor": ((2, 1, 2), dict(tie_weights=True), dict(loss_chunk=11)),
    "fsdp x tensor": ((1, 2, 2), dict(), dict(loss_chunk=11, **LOOPS)),
    "dropout": ((4, 1, 1), dict(dropout=0.1), dict(loss_chunk=11)),
}

def config_of(mesh, model, train):
    axes = dict(zip(("mesh_data", "mesh_fsdp", "mesh_tensor"), mesh, strict=True))
    batch = 8 // train.get("gradient_accum_step", 1)
    return build_config({
        "model": SIZES | model,
        "train": dict(train_batch_size=batch, loss_ignore_tokens=[7], **train),
        "data": dict(separate_documents=True, end_of_text=3),
        "parallel": axes,
    }, "test")

def gradients_of(config, runtime):
    '''The loss and each gradient by name; runtime None means the reference in plain torch.'''
    model = GPT(config.model)
    initialize(model, 3)
    accumulation, examples = config.train.gradient_accum_step, build_examples(config, None)
    generator = torch.Generator().manual_seed(0)
    ids_BAS = torch.randint(0, 61, (8 // accumulation, accumulation, 12), generator=generator, dtype=torch.int32)
    ids_BAS[:3, :, :5] = 7  # ignored, and not equally many on each device
    if runtime is None:
        loss = torch.stack([examples.loss(model, ids_BS) for ids_BS in ids_BAS.unbind(1)]).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    else:
        model = runtime.prepare_model(model, execution_of(config))
        runtime.seed(5)
        forward, ids_BAS = runtime.forward(model), runtime.place_batch(ids_BAS.numpy())
        loss, gradients = runtime.gradients(examples.loss, forward, dict(model.named_parameters()), ids_BAS)
        torch_xla.sync()
    names = [name for name, _ in model.named_parameters()]
    tensors = dict(zip(names, (gradient.cpu() for gradient in gradients), strict=True))
    return unstack_layers(tensors) | {"loss": loss.detach().cpu()}

for case, (mesh, model, train) in CASES.items():
    config = config_of(mesh, model, train)
    runtime = XlaRuntime(config)
    found = gradients_of(config, runtime)
    for module in Path(sys.argv[1]).glob("*"):  # what the compiler has dumped so far
        module.rename(Path(sys.argv[2], f"{case}.{module.name}"))
    if config.model.dropout:  # the same masks as without chunks, and so the same values
        expected = gradients_of(config_of(mesh, model, {}), runtime)
    else:
        expected = gradients_of(config, None)
    assert found.keys() == expected.keys()
    for name in expected:
        message = lambda text: f"{case}, {name}: {text}"
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4, msg=message)
"""
COLLECTIVE = re.compile(
    r"= (\S+) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*?"
    r"(?:replica_groups|source_target_pairs)=(\S+)"
)


def collectives_in_loops(module: str) -> list[str]:
    """Shape and devices of each collective that is not in the entry computation of an optimised HLO module."""
    bodies = [computation for computation in re.split(r"\n\n", module) if not computation.startswith("ENTRY")]
    return [f"{shape} {groups}" for body in bodies for shape, groups in COLLECTIVE.findall(body)]


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")
def test_chunked_loss(tmp_path: Path) -> None:
    root, dump, kept = Path(__file__).parents[2], tmp_path / "dump", tmp_path / "kept"
    kept.mkdir()
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags = f"{quick} --xla_dump_to={dump} --xla_dump_hlo_as_text"
    extra = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4", "PYTHONPATH": str(root), "XLA_FLAGS": flags}
    command = [sys.executable, "-c", SCRIPT, str(dump), str(kept)]
    run = subprocess.run(command, env=os.environ | extra, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]

    def in_loops(case: str) -> list[str]:
        modules = [path.read_text() for path in kept.glob(f"{case}.*after_optimizations.txt")]
        (step,) = [module for module in modules if " while(" in module]
        return collectives_in_loops(step)

    for case in ("fsdp", "data x fsdp", "dropout"):
        assert not in_loops(case), case
    # With the vocabulary sharded in two, both halves are summed, and nothing comes from devices with other tokens.
    assert all("{{0,1},{2,3}}" in text for text in in_loops("data x tensor")), in_loops("data x tensor")
    assert in_loops("data x tensor")
