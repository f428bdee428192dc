"""Where a resumed run continues in its data, so that no sequence is repeated or skipped.

A position counts sequences, not batches (see `data.batches`), so batch size and accumulation may change on resume. The order
of the data must not: with another `seed` or `shuffle_window`, the sequences already seen would be spread over the new order.
So a run keeps the order that it started with until its data change. With other data, or another sequence length, the position
has no meaning, and the run starts at the beginning of the new order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain_xla.config import RunConfig, build_config
from pretrain_xla.config.old_settings import translate
from pretrain_xla.data.batches import position_after
from pretrain_xla.redact import redacted_tree
from pretrain_xla.run_folder.checkpoint_marker import CheckpointInfo, DataPosition

WITHOUT_EFFECT = {
    "init", "train_dir", "cache_dir", "cache_gb", "remote_reads", "prefetch_batches", "mode", "from_checkpoint",
    "strict_graph", "topology", "compile_cache", "max_skipped_updates",
    "hang_timeout", "stop_after",
}  # fmt: skip
"""Settings that do not change what a resumed run computes."""


def resume_position(info: CheckpointInfo | None, config: RunConfig, data: str, sequences: int) -> DataPosition:
    """Position in the data at which a run continues.

    Args:
        info: of the checkpoint that it resumes from. None means a new run.
        config: of the run now.
        data: fingerprint of the shards to read.
        sequences: number of sequences in them.

    Raises:
        UserError: an older checkpoint has no position, and its config cannot be parsed.
    """
    begun = DataPosition(tokens_seen(info), 0, config.train.seed, config.data.shuffle_window)
    if info is None or info.step == 0 or _starts_over(info, config, data):
        return begun
    if info.seen is not None:
        return info.seen
    had = _config(info)
    position = position_after(info.step, had.sequences_per_step, sequences, drop_last=had.data.drop_last)
    return DataPosition(begun.tokens, position, had.train.seed, had.data.shuffle_window)


def tokens_seen(info: CheckpointInfo | None) -> int:
    """Tokens that a checkpoint's run has trained on."""
    if info is None or info.step == 0:
        return 0
    # Older checkpoints do not count tokens; all of their steps had the same number.
    return info.seen.tokens if info.seen is not None else info.step * _config(info).tokens_per_step


def describe_changes(info: CheckpointInfo, config: RunConfig, seen: DataPosition) -> str | None:
    """One line on the settings that differ from the checkpoint's, and on those that the data order ignores, or None."""
    changes = [f"{key} {_word(had)} → {_word(has)}" for key, had, has in _changes(info.config, config)]
    parts = [f"settings changed since step {info.step}: {', '.join(changes)}"] if changes else []
    if (seen.seed, seen.shuffle_window) != (config.train.seed, config.data.shuffle_window):
        parts.append(
            f"the data keep the order of seed {seen.seed} and shuffle_window {seen.shuffle_window}, so that no sequence is "
            "repeated or skipped"
        )
    if _length(info) not in (None, config.model.seq_length):
        parts.append(f"with sequences of {config.model.seq_length} tokens, the data start from their beginning")
    return "; ".join(parts) or None


def has_other_data(info: CheckpointInfo, data: str) -> bool:
    """Whether a checkpoint's run was trained on other shards than those with this fingerprint."""
    return info.data not in ("", data)


def _starts_over(info: CheckpointInfo, config: RunConfig, data: str) -> bool:
    return has_other_data(info, data) or _length(info) not in (None, config.model.seq_length)


def _length(info: CheckpointInfo) -> int | None:
    length: int | None = info.config.get("model", {}).get("seq_length")
    return length


def _config(info: CheckpointInfo) -> RunConfig:
    return build_config(info.config, f"config of the checkpoint of step {info.step}")


def _changes(saved: dict[str, Any], config: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """(setting, old value, new value) of each setting that changed and that exists in both configs."""
    saved = translate(saved, "config of the checkpoint")
    now = redacted_tree(config.model_dump(mode="json"))  # as it is stored in a checkpoint
    for section in ("model", "data", "optim", "train", "parallel"):
        had = saved.get(section, {})
        for key, value in now[section].items():
            if key in had and key not in WITHOUT_EFFECT and had[key] != value:
                yield key, had[key], value


def _word(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_word, value)) or "none"
    return "none" if value is None else str(value)
