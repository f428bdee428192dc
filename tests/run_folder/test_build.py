"""A run's `Examples`, from its settings and its data's manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain_xla.config import RunConfig
from pretrain_xla.data.batches import Batches
from pretrain_xla.data.dataset import open_dataset
from pretrain_xla.errors import UserError
from pretrain_xla.model.documents import Examples, number_documents
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.run_folder.build import build_examples

Make = Callable[..., RunConfig]
SEPARATE = {"separate_documents": True}


def test_by_default_documents_are_not_separated_and_no_token_is_ignored(make_config: Make, tokens: Path) -> None:
    dataset = open_dataset(str(tokens / "train"), 8, 37)
    assert build_examples(make_config(), dataset) == Examples()
    assert build_examples(make_config(train={"loss_ignore_tokens": (9, 3, 9)}), dataset) == Examples(None, (3, 9))


def test_shards_without_a_known_end_of_text(make_config: Make, tokens: Path) -> None:
    dataset = open_dataset(str(tokens / "train"), 8, 37)
    with pytest.raises(UserError, match=r"train: separate_documents must know .* --end-of-text"):
        build_examples(make_config(data=SEPARATE), dataset)
    assert build_examples(make_config(data=SEPARATE | {"end_of_text": 5}), dataset) == Examples(5)
    assert build_examples(make_config(data=SEPARATE), None).end_of_text is not None, "preflight has no data"


def test_prepared_documents_have_an_end_of_text_and_no_token_is_wasted(make_config: Make, tmp_path: Path) -> None:
    words = np.random.default_rng(0).integers(97, 123, (300, 40))
    texts = ["".join(map(chr, row[: 1 + number % 40])) for number, row in enumerate(words)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(texts))
    prepare(str(tmp_path / "text.txt"), str(tmp_path / "data"), "bytes", progress=False)
    dataset = open_dataset(str(tmp_path / "data" / "train"), 8, 257)
    examples = build_examples(make_config(model={"vocab_size": 257}, data=SEPARATE), dataset)
    assert examples == Examples(256)

    batches = Batches(dataset, sequences_per_batch=4, seq_length=8, seed=0, shuffle=False)
    steps = batches.sequences_per_epoch // 4
    rows = np.concatenate([batches.rows(step) for step in range(steps)])
    stream = np.load(tmp_path / "data" / "train" / "000000.npy")
    targets = rows[:, 1:].reshape(-1)
    assert (targets == stream[1 : 1 + len(targets)]).all(), "each is predicted once, whatever document it is in"
    assert len(stream) - len(targets) < 8 * 4 + 1, "except at the end of the shard"
    ends = (rows[:, :-1] == 256).sum(1)
    segments = number_documents(torch.from_numpy(rows[:, :-1]), 256)
    assert (segments[:, -1].numpy() == ends - (rows[:, 7] == 256)).all()
    assert ends.max() > 1, "several documents in a row"
