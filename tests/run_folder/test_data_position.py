"""A run that resumes with other settings: no sequence is repeated or skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain_xla.config import RunConfig, build_config
from pretrain_xla.data.batches import Batches
from pretrain_xla.errors import UserError
from pretrain_xla.interop.families import FAMILIES
from pretrain_xla.interop.model_card import model_card
from pretrain_xla.interop.model_source import LoadedModel
from pretrain_xla.run_folder.checkpoint import CheckpointInfo, CheckpointStore
from pretrain_xla.run_folder.checkpoint_marker import DataPosition
from pretrain_xla.run_folder.data_position import describe_changes, resume_position, tokens_seen
from pretrain_xla.run_folder.metrics import read_metrics
from pretrain_xla.runtime.torch_runtime import TorchRuntime
from pretrain_xla.train.trainer import Trainer
from tests.small_run import TINY

Make = Callable[..., RunConfig]
LENGTH = TINY["seq_length"]
SEQUENCES = (400 - 1) // LENGTH


def config(**changes: Any) -> RunConfig:
    """A config from its sections."""
    return build_config(changes, "test")


def saved(run: RunConfig, step: int, seen: DataPosition | None = None, data: str = "data") -> CheckpointInfo:
    """The marker of a checkpoint of this run; `seen` None means one from before the position was saved."""
    return CheckpointInfo(step, None, data, run.model_dump(mode="json"), seen=seen)


def test_a_new_run_has_seen_nothing() -> None:
    run = config(train={"seed": 4}, data={"shuffle_window": 3})
    assert resume_position(None, run, "data", 100) == DataPosition(0, 0, 4, 3)
    assert resume_position(saved(run, 0), run, "data", 100) == DataPosition(0, 0, 4, 3), "an imported model"


def test_a_run_continues_at_the_saved_position_whatever_the_batch_size() -> None:
    seen = DataPosition(12_345, 678, 4, 3)
    old = config(train={"seed": 4, "train_batch_size": 8}, data={"shuffle_window": 3})
    new = config(train={"seed": 5, "train_batch_size": 2, "gradient_accum_step": 16}, data={"shuffle_window": 9})
    assert resume_position(saved(old, 50, seen), new, "data", 100) == seen
    assert tokens_seen(saved(old, 50, seen)) == 12_345


def test_the_position_of_an_old_checkpoint_follows_from_its_own_batch_size() -> None:
    old = config(train={"seed": 4, "train_batch_size": 8, "gradient_accum_step": 2}, data={"shuffle_window": 3})
    new = config(train={"seed": 4, "train_batch_size": 4})
    assert resume_position(saved(old, 10), new, "data", 100) == DataPosition(10 * 16 * 512, 160, 4, 3)
    dropping = config(train={"train_batch_size": 16}, data={"drop_last": True})
    # An epoch of 100 sequences has six batches of 16: the tenth batch is the fourth of the second epoch.
    assert resume_position(saved(dropping, 10), new, "data", 100).position == 164
    assert resume_position(saved(dropping, 12), new, "data", 100).position == 196


def test_other_data_or_another_length_start_from_the_beginning_and_keep_the_token_count() -> None:
    seen = DataPosition(12_345, 678, 4, 3)
    run = config(train={"seed": 5}, data={"shuffle_window": 9})
    for info, now in (
        (saved(run, 50, seen), "others"),
        (saved(config(model={"seq_length": 256}), 50, seen), "data"),
    ):
        assert resume_position(info, run, now, 100) == DataPosition(12_345, 0, 5, 9)
    assert resume_position(saved(run, 50, seen, data=""), run, "data", 100) == seen, "the data are unknown"


def test_changed_settings_are_listed_in_one_line() -> None:
    old = config(train={"train_batch_size": 8, "seed": 4}, optim={"betas": (0.9, 0.95)})
    info = saved(old, 50, DataPosition(1, 2, 4, 8))
    assert describe_changes(info, old, DataPosition(1, 2, 4, 8)) is None
    moved = old.model_copy(
        update={
            "data": old.data.model_copy(update={"train_dir": "elsewhere", "prefetch_batches": 9}),
            "logging": old.logging.model_copy(update={"log_interval": 1}),
        }
    )
    assert describe_changes(info, moved, DataPosition(1, 2, 4, 8)) is None, "nothing that matters"
    new = config(
        train={"train_batch_size": 4, "gradient_accum_step": 3, "seed": 5, "mixed_precision": "bf16"},
        optim={"betas": (0.9, 0.98), "decay_steps": 9000},
    )
    assert describe_changes(info, new, DataPosition(1, 2, 4, 8)) == (
        "settings changed since step 50: betas 0.9 0.95 → 0.9 0.98, decay_steps 20000 → 9000, seed 4 → 5, "
        "train_batch_size 8 → 4, gradient_accum_step 1 → 3, mixed_precision none → bf16; the data keep the order of "
        "seed 4 and shuffle_window 8, so that no sequence is repeated or skipped"
    )
    line = describe_changes(
        info, config(model={"seq_length": 256}, train={"train_batch_size": 8, "seed": 4}), DataPosition(1, 0, 4, 8)
    )
    assert line is not None
    assert line.endswith("; with sequences of 256 tokens, the data start from their beginning")


def test_old_settings_of_a_checkpoint_are_not_changes() -> None:
    info = saved(config(), 50)
    info.config["train"] |= {"do_test": False, "preflight_only": False, "use_syncfree_optim": True}
    info.config["parallel"] |= {"ddp": True}
    del info.config["train"]["mode"]
    seen = DataPosition(1, 2, config().train.seed, config().data.shuffle_window)
    assert describe_changes(info, config(parallel={"mp_start_method": "spawn"}), seen) is None
    assert "mp_start_method spawn → none" in str(describe_changes(info, config(), seen))


def test_settings_that_were_added_or_removed_are_not_changes() -> None:
    old = config()
    info = saved(old, 50)
    del info.config["train"]["loss_ignore_tokens"]
    info.config["train"]["forgotten"] = 3
    assert describe_changes(info, old, resume_position(saved(old, 50), old, "data", 100)) is None


@pytest.mark.parametrize("fault", [{"position": -1}, {"tokens": "many"}, {"shuffle_window": 0}, {"more": 1}])
def test_a_marker_with_an_impossible_position_is_refused(fault: dict[str, Any], tmp_path: Path) -> None:
    seen = {"tokens": 1, "position": 2, "seed": 3, "shuffle_window": 4}
    (tmp_path / "step_00000001").mkdir()
    marker = {"step": 1, "valid_loss": None, "data": "", "config": {}, "seen": seen}
    (tmp_path / "step_00000001" / "checkpoint.json").write_text(json.dumps(marker))
    store = CheckpointStore(str(tmp_path), limit=1)
    assert store.info(1).seen == DataPosition(**seen)
    (tmp_path / "step_00000001" / "checkpoint.json").write_text(json.dumps(marker | {"seen": seen | fault}))
    with pytest.raises(UserError, match=r"checkpoint\.json cannot be read"):
        store.info(1)


def test_a_model_card_counts_the_tokens_seen() -> None:
    run = config(train={"train_batch_size": 8})
    even, uneven = DataPosition(50 * 8 * 512, 400, 1, 8), DataPosition(123_456, 241, 1, 8)
    for seen, expected in (
        (even, "50 steps of 4,096 tokens, 204,800 in all"),
        (uneven, "50 steps, 123,456 tokens in all"),
    ):
        loaded = LoadedModel(run.model, {}, None, "run", saved(run, 50, seen))
        assert f"\n- {expected}\n" in model_card(loaded, FAMILIES[0], "a title", has_tokenizer=False)


class RecordingTrainer(Trainer):
    """A trainer that records the rows of each step."""

    def __init__(self, config: RunConfig, runtime: TorchRuntime) -> None:
        self.fed: list[np.ndarray] = []
        super().__init__(config, runtime)

    def _read(self, step: int) -> np.ndarray:
        rows_BAS = super()._read(step)
        self.fed.append(rows_BAS)
        return rows_BAS


def in_order(fed: list[np.ndarray]) -> np.ndarray:
    """The sequences of the steps in training order: micro-batch by micro-batch."""
    return np.concatenate([rows_BAS.swapaxes(0, 1).reshape(-1, LENGTH + 1) for rows_BAS in fed])


def test_a_run_continues_at_its_position_with_any_batch_size(
    make_config: Make, tokens: Path, runtime: TorchRuntime, capsys: pytest.CaptureFixture[str]
) -> None:
    segments = [(2, 4, 1, 7), (4, 3, 2, 7), (5, 8, 1, 8), (30, 2, 1, 8)]  # last step, batch, micro-batches, seed
    Path(make_config().run_dir).mkdir()
    fed: list[np.ndarray] = []
    seen: list[int] = []
    for last, batch, accumulation, seed in segments:
        train = {
            "train_steps": last,
            "train_batch_size": batch,
            "gradient_accum_step": accumulation,
            "seed": seed,
            "valid_interval": 100,
        }
        trainer = RecordingTrainer(make_config(train=train), runtime)
        trainer.fit()
        fed += trainer.fed
        seen.append(sum(rows_BAS[:, :, 1:].size for rows_BAS in fed))
        store = CheckpointStore(trainer.config.checkpoints_dir, 1)
        assert store.info(last).seen == DataPosition(seen[-1], seen[-1] // LENGTH, 7, 8)
        summary = json.loads(Path(trainer.config.run_dir, "summary.json").read_text())
        assert summary["tokens"] == seen[-1]
    order = Batches(trainer.batches.dataset, sequences_per_batch=100, seq_length=LENGTH, seed=7)
    assert len(in_order(fed)) == 8 + 12 + 8 + 50 > SEQUENCES
    np.testing.assert_array_equal(in_order(fed), order.rows(0)[:78])
    counted = {row["step"]: row["tokens"] for row in read_metrics(trainer.log.path) if "tokens" in row}
    assert [counted[last] for last, *_ in segments] == seen
    assert sorted(counted.values()) == list(counted.values())
    output = " ".join(capsys.readouterr().out.split())
    assert "settings changed since step 2: train_steps" not in output
    assert "since step 2: train_batch_size 4 → 3, gradient_accum_step 1 → 2, train_steps 2 → 4" in output
    assert "seed 7 → 8" in output
    assert output.count("the data keep the order of seed 7") == 2

    # Another run continues from this checkpoint at that position; with other data it starts from their beginning.
    branch = {"run_dir": str(tokens / "branch")}
    continued = make_config(logging=branch, train={"from_checkpoint": trainer.config.run_dir, "train_steps": 32})
    assert in_order([RecordingTrainer(continued, runtime)._read(30)]).tolist() == order.rows(0)[78:82].tolist()
    np.save(tokens / "train" / "001.npy", np.arange(100, dtype=np.uint16) % 37)
    other = RecordingTrainer(continued, runtime)
    assert other.data_position == DataPosition(seen[-1], 0, continued.train.seed, 8)
    assert "on those in" in capsys.readouterr().out
