"""Documents in rows of tokens: which token belongs to which, its place there, and which targets count.

A row is cut out of a stream of documents, so it begins and ends anywhere, and no token is wasted on padding. What tells the
documents apart is found on the device, in the tokens themselves: batches keep their shape, and nothing but tokens is read.
An end-of-text belongs to the document that it ends. What follows it in the stream is its target all the same, so each
token is predicted once; the first of a document by the end of another, as it is when a model goes on after an end-of-text.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_xla.model.loss import IGNORED


def number_documents(tokens_BT: Tensor, end_of_text: int) -> Tensor:
    """For each token the number of end-of-texts before it in its row: segments_BT, int32, from 0, never falling."""
    ends_BT = (tokens_BT == end_of_text).to(torch.int32)
    return ends_BT.cumsum(1, dtype=torch.int32) - ends_BT


def positions_within(segments_BT: Tensor) -> Tensor:
    """Each token's position in its document, or in what its row has of it: positions_BT, int32, from 0."""
    length = segments_BT.shape[1]
    positions_T = torch.arange(length, dtype=torch.int32, device=segments_BT.device)
    begins_BT = F.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0))
    starts_BT = torch.where(begins_BT, positions_T, 0)
    # The running maximum in log T steps; `cummax` becomes a window as long as the row, which takes the TPU compiler minutes.
    reach = 1
    while reach < length:
        starts_BT = torch.maximum(starts_BT, F.pad(starts_BT[:, :-reach], (reach, 0)))
        reach *= 2
    return positions_T - starts_BT


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a model learns from rows of T + 1 tokens: from each of the first T the next one.

    end_of_text: id that ends a document, where documents are kept apart. None means a row is one text. ignored: ids that do not
    count where they are the target. padded: there may be rows of a negative id, which are no text and count for nothing.
    """

    end_of_text: int | None = None
    ignored: tuple[int, ...] = ()
    padded: bool = False

    def loss(self, forward: Callable[..., Tensor], tokens_BS: Tensor) -> Tensor:
        """Summed loss of the targets that count, over the number of all targets (0-d, fp32, nats).

        That number is the same for each micro-batch and replica, so that the mean over them is exact however rows are
        divided. Over `counted` of the whole step it becomes the mean over the targets that count.

        Args:
            forward: the model, called as `GPT.forward`.
            tokens_BS: int32, S = T + 1.
        """
        tokens_BT, targets_BT = tokens_BS[:, :-1], tokens_BS[:, 1:]
        if self.padded:
            tokens_BT = tokens_BT.clamp(min=0)
        segments_BT = None if self.end_of_text is None else number_documents(tokens_BT, self.end_of_text)
        if not self.ignored and not self.padded:
            return forward(tokens_BT, targets_BT, segments_BT)
        left_out_BT = self._left_out(targets_BT)
        loss = forward(tokens_BT, torch.where(left_out_BT, IGNORED, targets_BT), segments_BT)
        return loss * (~left_out_BT).float().mean()

    def counted(self, tokens: Tensor) -> Tensor | None:
        """Share (0-d, fp32) of the targets in rows of tokens (…, S) that count. None means all of them."""
        return (~self._left_out(tokens[..., 1:])).float().mean() if self.ignored or self.padded else None

    def _left_out(self, targets: Tensor) -> Tensor:
        padding = [targets < 0] if self.padded else []
        return functools.reduce(operator.or_, [*padding, *(targets == token for token in self.ignored)])
