"""A model that continues text.

Shapes are static: the window is always `seq_length` tokens, padded on the right (attention is causal, so the padding is never
seen), and the position of the last token is a device value. So one graph serves every prompt and every length. Each token costs
a whole forward pass; there is no key/value cache yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pretrain_xla.config import build_config
from pretrain_xla.data.manifest import dataset_info
from pretrain_xla.data.tokenizer import Tokenizer, decode_after, load_tokenizer
from pretrain_xla.errors import UserError
from pretrain_xla.generate.sampling import Sampling, sample
from pretrain_xla.model import GPT
from pretrain_xla.runtime import Runtime, start
from pretrain_xla.train.checkpoint import open_checkpoint
from pretrain_xla.train.files import find_tokenizer
from pretrain_xla.train.resume import Start


class Generator:
    """A model and a tokenizer, ready on a device."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, runtime: Runtime) -> None:
        self.model, self.tokenizer, self.runtime = model.eval(), tokenizer, runtime
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}: "
                "it is not the model's; name the right one with --tokenizer"
            )
        runtime.place_model(model)
        self._rows = runtime.mesh["data"] * runtime.mesh.get("fsdp", 1)

        @torch.no_grad()
        def logits(tokens_R1T: Tensor, position_1: Tensor) -> Tensor:
            x_RTD = model.hidden(tokens_R1T[:, 0])
            return model.logits(x_RTD.index_select(1, position_1))[0, 0]

        self._logits = runtime.compile(logits, "generate", state=tuple)

    @staticmethod
    def load(path: str, *, tokenizer: str | None, runtime: str, device: str, which: str = "newest") -> Generator:
        """A trained model from its run folder, checkpoints folder or one checkpoint.

        Args:
            path: any of the three.
            tokenizer: see `load_tokenizer`; none: the one that the run was trained with.
            runtime: `xla` or `torch`.
            device: for torch, `auto`, `cpu` or `cuda`.
            which: `newest` or `best` checkpoint.

        Raises:
            UserError: no checkpoint, a damaged one, or no tokenizer that fits.
        """
        store, step = open_checkpoint(path, which)
        info = store.info(step)
        parallel = {"runtime": runtime, "device": device}
        config = build_config({"model": info.config["model"], "parallel": parallel}, store.folder(step))
        loaded = load_tokenizer(tokenizer or _tokenizer_of(store.root, info.config))
        model = GPT(config.model)
        Start(store, step, tensors=store.load(step)).load_model(model)
        return Generator(model, loaded, start(config))

    def stream(self, prompt: str, *, max_new_tokens: int, sampling: Sampling, seed: int) -> Iterator[int]:
        """New tokens one by one, until `max_new_tokens` or end-of-text (which is not given out).

        Once the text is longer than `seq_length`, its oldest tokens are forgotten.
        """
        draws = torch.Generator().manual_seed(seed)
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.end_of_text]
        for _ in range(max_new_tokens):
            token = sample(self._next_logits(ids), sampling, draws)
            if token == self.tokenizer.end_of_text:
                return
            ids.append(token)
            yield token

    def generate(self, prompt: str, *, max_new_tokens: int, sampling: Sampling, seed: int) -> str:
        """The prompt and its continuation."""
        tokens = self.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)
        return prompt + decode_after(self.tokenizer, prompt, list(tokens))

    def _next_logits(self, ids: Sequence[int]) -> Tensor:
        """Scores of the token after `ids` [V], on the host."""
        length = self.model.config.seq_length
        window = ids[-length:]
        # On a mesh every device gets the same row: one sequence cannot be split over data.
        padded = np.zeros((self._rows, 1, length), dtype=np.int32)
        padded[:, 0, : len(window)] = window
        position = self.runtime.place_like(torch.tensor([len(window) - 1]), None)
        scores_V = self._logits(self.runtime.place_batch(padded), position)
        with self.runtime.planned():
            return self.runtime.fetch(scores_V).result()


def _tokenizer_of(checkpoints_dir: str, config: dict[str, dict[str, str]]) -> str:
    """Name of the tokenizer that a run was trained with: its own copy, or what its data's manifest says."""
    if own := find_tokenizer(checkpoints_dir):
        return own
    named = config["data"]["tokenizer"]
    info = None if named else dataset_info(config["data"]["train_dir"])
    return named or (info.tokenizer_name if info else "gpt2")
