"""Prompts in, tokens out: prefill reads the texts and chooses the first token, decode generates one token after another.

Each is one graph for one set of shapes, which includes the choice of a token. Decode is a loop on the device around the model
and the choice: the host reads tokens only after a call, `iterations` at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain_xla.generate.cache import ExtendCache, FillCache, Places
from pretrain_xla.generate.sampling import Rules, choose
from pretrain_xla.generate.window import bucket
from pretrain_xla.model import GPT
from pretrain_xla.runtime import Runtime

MOST_TOKENS = 32
"""Maximum number of tokens in one call of decode."""


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen, as tensors on the host.

    Attributes:
        rules, numbers: see `Sampling`.
        stops: ids that end a text, int32 [N], at least one.
        seen: see `choose`, [B, V].
    """

    rules: Rules
    numbers: Tensor
    stops: Tensor
    seen: Tensor | None


class OneToken(nn.Module):
    """An iteration of the loop: runs the model on the newest tokens and chooses the next ones."""

    def __init__(self, model: GPT, rules: Rules, choices: int) -> None:
        super().__init__()
        self.model, self.rules, self.choices = model, rules, choices

    def forward(
        self, carried: list[Tensor], slices: list[Tensor], fixed: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """See `runtime.base.Repeat`.

        Args:
            carried: the newest token_B and its slot_1; whether each row is alive_B; seen_BV if the rules need it;
                the cache.
            slices: chance_B.
            fixed: first_B, the numbers of the sampling, and the ids that end a text.
        """
        token_B, slot_1, alive_B = carried[:3]
        seen = [carried[3] | _hot(token_B, carried[3].shape[1])] if self.rules.penalizes else []
        cache = carried[3 + len(seen) :]
        first_B, numbers_5, stops_N = fixed
        places = Places(slot_1, first_B)
        segments = ExtendCache(self.model.config, places, cache)
        x_B1D = self.model.hidden(token_B[:, None], places.positions(), segments)
        logits_BV = self.model.logits(x_B1D)[:, -1, : self.choices]
        next_B = choose(logits_BV, self.rules, numbers_5, slices[0], *seen)
        alive_B = alive_B & (next_B[:, None] != stops_N).all(-1)
        return [next_B, slot_1 + 1, alive_B, *seen, *cache], [next_B], alive_B.any()


class Decoder:
    """One model on one runtime: call `prefill`, then `decode` while there are slots left.

    Args:
        model: the model.
        runtime: where it runs.
        choices: only ids below this may be chosen. None means all ids of the model. Many models have rows for ids that their
            tokenizer does not have, which could not be decoded.

    Attributes:
        choices: as above.
        slots_left: tokens that `decode` can still generate before the texts must be prefilled again.
    """

    def __init__(self, model: GPT, runtime: Runtime, choices: int | None = None) -> None:
        self.model, self.runtime = model, runtime
        self.choices = min(choices or model.config.vocab_size, model.config.vocab_size)
        self.slots_left = 0
        self._cache: list[Tensor] = []
        self._prefills: dict[tuple[Rules, int], Callable[..., Tensor]] = {}
        self._decodes: dict[Rules, Callable[..., Tensor]] = {}

    def prefill(self, windows: Sequence[Sequence[int]], choice: Choice, chance_B: Tensor, *, more: int) -> list[int]:
        """Read the texts, at least one token each, and choose the next token of each.

        Args:
            windows: ids of each row, at most `seq_length`.
            choice: how to choose.
            chance_B: random number for this token, on the host.
            more: how many tokens `decode` must be able to add; 0 means that no cache is kept.
        """
        longest = max(map(len, windows))
        limit = self.model.config.seq_length
        slots = self._size(min(longest + more, limit)) if more else 0
        tokens_BT = np.zeros((len(windows), self._size(longest)), dtype=np.int32)
        for row, window in enumerate(windows):
            tokens_BT[row, longest - len(window) : longest] = window
        first_B = torch.tensor([longest - len(window) for window in windows])
        self._choice, self._first_B = choice, self._place(first_B)
        self._numbers_5, self._stops_N = self._place(choice.numbers), self._place(choice.stops)
        self._seen = [self._place(choice.seen)] if choice.seen is not None else []
        self._slot_1 = self._place(torch.tensor([longest]))
        self._cache = []  # freed before the new one is allocated, so that memory never holds both
        key = (choice.rules, slots)
        if key not in self._prefills:
            self._prefills[key] = self._compile_prefill(*key)
        self._token_B = self._prefills[key](
            self._place(torch.from_numpy(tokens_BT)),
            self._first_B,
            self._place(torch.tensor([longest - 1])),
            self._numbers_5,
            self._place(chance_B),
            *self._seen,
        )
        self.slots_left = max(slots - longest, 0)
        return self._read(self._token_B)

    def decode(self, iterations: int, alive: Sequence[bool], chance_NB: Tensor) -> list[list[int]]:
        """The next tokens of all rows; fewer than `iterations` if every row has ended. Tokens of an ended row are meaningless.

        Args:
            iterations: at most `MOST_TOKENS` and `slots_left`.
            alive: rows that have not ended.
            chance_NB: random numbers for these tokens, on the host.
        """
        assert iterations <= min(MOST_TOKENS, self.slots_left)
        rules = self._choice.rules
        if rules not in self._decodes:
            self._decodes[rules] = self._compile_decode(rules)
        padded_NB = torch.nn.functional.pad(chance_NB, (0, 0, 0, MOST_TOKENS - len(chance_NB)), value=1.0)
        state = [self._token_B, self._slot_1, self._place(torch.tensor(alive)), *self._seen]
        tokens_NB = self._decodes[rules](
            self._place(torch.tensor(iterations, dtype=torch.int32)), self._place(padded_NB), state
        )
        self.slots_left -= iterations
        return self._read(tokens_NB)[:iterations]

    def _compile_prefill(self, rules: Rules, slots: int) -> Callable[..., Tensor]:
        model, choices = self.model, self.choices

        @torch.no_grad()
        def prefill(
            tokens_BT: Tensor, first_B: Tensor, last_1: Tensor, numbers_5: Tensor, chance_B: Tensor, *seen: Tensor
        ) -> Tensor:
            places = Places(torch.arange(tokens_BT.shape[1], device=tokens_BT.device), first_B)
            cache = FillCache(model.config, places, slots)
            x_BTD = model.hidden(tokens_BT, places.positions(), cache)
            logits_BV = model.logits(x_BTD.index_select(1, last_1))[:, 0, :choices]
            self._cache = cache.tensors
            return choose(logits_BV, rules, numbers_5, chance_B, *seen)

        compiled: Callable[..., Tensor] = self.runtime.compile(prefill, "prefill", state=lambda: self._cache)
        return compiled

    def _compile_decode(self, rules: Rules) -> Callable[..., Tensor]:
        repeat = self.runtime.repeat(OneToken(self.model, rules, self.choices))

        def decode(iterations: Tensor, chance_NB: Tensor, state: list[Tensor]) -> Tensor:
            fixed = [self._first_B, self._numbers_5, self._stops_N]
            (tokens_NB,) = repeat(iterations, [*state, *self._cache], [chance_NB], fixed)
            return tokens_NB

        compiled: Callable[..., Tensor] = self.runtime.compile(decode, "decode", state=lambda: self._cache)
        return compiled

    def _size(self, length: int) -> int:
        return bucket(length, self.model.config.seq_length) if self.runtime.static_shapes else length

    def _place(self, host: Tensor) -> Tensor:
        return self.runtime.place_like(host, None)

    def _read(self, tokens: Tensor) -> Any:
        with self.runtime.planned():
            return self.runtime.fetch(tokens).result().tolist()


def _hot(token_B: Tensor, width: int) -> Tensor:
    """True at each row's token, [B, width]."""
    return torch.arange(width, device=token_B.device) == token_B[:, None]
