"""What a run has seen of its data, and where it goes on when it resumes: no sequence twice, none left out.

A batch begins at a position, not at a number of batches (see `data.batches`), so batch size and accumulation may change from
one start to the next. The order of the data may not: another `seed` or `shuffle_window` is another order, in which what was
seen lies all over. So an order that was begun is kept, whatever these two say later, until the data are others. With other
data, or with sequences of another length, the position means nothing: there the order begins anew, at its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain_xla.config import RunConfig, build_config
from pretrain_xla.data.batches import position_after
from pretrain_xla.redact import redacted_tree
from pretrain_xla.run_folder.checkpoint_marker import CheckpointInfo, DataPosition

WITHOUT_EFFECT = {
    "init", "train_dir", "cache_dir", "cache_gb", "remote_reads", "prefetch_batches", "mode", "from_checkpoint",
    "strict_graph", "topology", "compile_cache",
}  # fmt: skip
"""Settings of which nothing that follows depends in a run that goes on."""


def resume_position(info: CheckpointInfo | None, config: RunConfig, data: str, sequences: int) -> DataPosition:
    """Where a run stands in its data.

    Args:
        info: of the checkpoint that it begins from. None means there is none.
        config: of the run now.
        data: fingerprint of the shards that it will read.
        sequences: in these.

    Raises:
        UserError: a checkpoint from before there was a position has a config that is not understood.
    """
    begun = DataPosition(tokens_seen(info), 0, config.train.seed, config.data.shuffle_window)
    if info is None or info.step == 0 or _begins_anew(info, config, data):
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
    # Before they were counted, every step had as many.
    return info.seen.tokens if info.seen is not None else info.step * _config(info).tokens_per_step


def describe_changes(info: CheckpointInfo, config: RunConfig, seen: DataPosition) -> str | None:
    """One line on the settings that are not those of the checkpoint, and on what does not follow them. None means all are."""
    changes = [f"{key} {_word(had)} → {_word(has)}" for key, had, has in _changes(info.config, config)]
    parts = [f"settings changed since step {info.step}: {', '.join(changes)}"] if changes else []
    if (seen.seed, seen.shuffle_window) != (config.train.seed, config.data.shuffle_window):
        parts.append(
            "so that nothing comes twice or is left out, the data stay in the order of "
            f"seed {seen.seed} and shuffle_window {seen.shuffle_window}"
        )
    if _length(info) not in (None, config.model.seq_length):
        parts.append(f"cut into sequences of {config.model.seq_length} tokens, the data begin anew")
    return "; ".join(parts) or None


def has_other_data(info: CheckpointInfo, data: str) -> bool:
    """Whether a checkpoint's run saw other shards than those of this fingerprint."""
    return info.data not in ("", data)


def _begins_anew(info: CheckpointInfo, config: RunConfig, data: str) -> bool:
    return has_other_data(info, data) or _length(info) not in (None, config.model.seq_length)


def _length(info: CheckpointInfo) -> int | None:
    length: int | None = info.config.get("model", {}).get("seq_length")
    return length


def _config(info: CheckpointInfo) -> RunConfig:
    return build_config(info.config, f"config of the checkpoint of step {info.step}")


def _changes(saved: dict[str, Any], config: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """(setting, its value then, its value now); one that there was not then, or is not now, is left out."""
    now = redacted_tree(config.model_dump(mode="json"))  # as a checkpoint has it
    for section in ("model", "data", "optim", "train", "parallel"):
        had = saved.get(section, {})
        for key, value in now[section].items():
            if key in had and key not in WITHOUT_EFFECT and had[key] != value:
                yield key, had[key], value


def _word(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_word, value)) or "none"
    return "none" if value is None else str(value)
