"""An update of a NaN loss is skipped on the device, in the same graph, and changes no bit: on XLA over a mesh, and by two
processes of torch DDP, of which one has the bad row; `verify`."""

from collections.abc import Callable
from pathlib import Path

from pretrain_xla.run_folder.checkpoint import CheckpointStore

from .conftest import VOCAB_SIZE, metrics, run, summary, torchrun

BAD = {5, 6, 11}
SCRIPT = """
import sys
sys.argv = ["run_pretrain.py", *sys.argv[1:]]
import torch
from pretrain_xla.cli import run_pretrain
from pretrain_xla.model.documents import Examples
from pretrain_xla.train.trainer import Trainer

MARK, BAD = {mark}, {bad}  # a row of the embedding that is no token
plain_loss, plain_read, plain_step, before = Examples.loss, Trainer._read, Trainer._one_step, {{}}

def loss(self, forward, tokens_BS):
    plain = plain_loss(self, forward, tokens_BS)
    if self.padded:  # validation
        return plain
    return plain * torch.where(tokens_BS == MARK, torch.nan, 1.0).mean()

def read(self, step):
    tokens = plain_read(self, step)
    if step + 1 in BAD and self.runtime.is_main:
        tokens[0, 0, 0] = MARK
    return tokens

def one_step(self, done, tokens):
    plain_step(self, done, tokens)
    if done in (4, 6):
        with self.runtime.planned():
            state = {{name: tensor.detach().cpu().clone() for name, tensor in self.step.named_state().items()}}
        changed = [name for name, tensor in state.items() if done == 6 and not torch.equal(tensor, before[name])]
        assert changed == ["guard.skipped_in_a_row"] * (done == 6), changed
        before.update(state)

Examples.loss, Trainer._read, Trainer._one_step = loss, read, one_step
run_pretrain("{runtime}")
"""


def test_a_nan_loss_is_skipped_on_the_device(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(SCRIPT.format(mark=VOCAB_SIZE + 1, bad=BAD, runtime="xla"))
    mesh = {"mesh_fsdp": 2, "mesh_tensor": 2, "scan_layers": True}
    settings = {"optim_type": "muon", "muon_row_beta": 0.9, "gradient_accum_step": 2, "spike_sigma": 8.0}
    words = flags(tmp_path / "run", **settings, **mesh, train_steps=16, valid_interval=100, save_interval=8)
    done = run(str(script), *words, "--strict-graph", PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4")
    assert done.status == 0, done.errors
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert {row["step"] for row in rows if row["loss"] is None} == BAD
    assert {row["step"]: row["skipped_in_a_row"] for row in rows if "skipped" in row} == {5: 1, 6: 2, 11: 1}
    counts = summary(tmp_path / "run")
    assert counts["graphs"] == {"train": 1, "validation": 1, "other": 0}
    assert counts["unplanned_host_transfers"] == 0
    assert counts["skipped_updates"] == len(BAD)
    last = CheckpointStore(str(tmp_path / "run" / "checkpoints"), limit=9).load(16)
    assert int(last["optimizer.step"]) == 16 - len(BAD)
    assert last["guard.recent"].gt(0).sum() == 2 * (16 - len(BAD))
    # The same steps without the fault have the same numbers, until the first of them.
    words = ["-m", "pretrain_xla", "verify", str(tmp_path / "run"), "--from-step", "0", "--steps", "6"]
    done = run(*words, PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4")
    assert done.status == 1, done.errors
    assert "steps 1 to 6: they part at step 5, whose loss was nan and is " in done.output


def test_with_ddp_all_processes_skip_the_same_update(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(SCRIPT.format(mark=VOCAB_SIZE + 1, bad=BAD, runtime="torch"))
    words = flags(tmp_path / "run", train_steps=12, valid_interval=100, save_interval=12)
    done = torchrun(2, str(script), *words)
    assert done.status == 0, done.errors
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert {row["step"] for row in rows if row["loss"] is None} == BAD
    assert {row["step"]: row["skipped_in_a_row"] for row in rows if "skipped" in row} == {5: 1, 6: 2, 11: 1}
    assert summary(tmp_path / "run")["skipped_updates"] == len(BAD)
