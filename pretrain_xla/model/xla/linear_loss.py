"""The training loss from the last hidden state, without ever keeping the logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_xla.model.gpt import GPT, PADDING_LOGIT
from pretrain_xla.model.loss import IGNORED
from pretrain_xla.model.xla.context import ONE_DEVICE, Layout, Scan, python_scan


@dataclasses.dataclass(frozen=True)
class Head:
    """What lies between the last hidden state and the loss.

    vocab_size: rows of the output table that are real. softcap: bound on the logits. None means no bound. chunk: tokens of a
    device whose logits exist at one time. None means all. scan: runs the chunks. layout: how the tokens lie on devices.
    """

    vocab_size: int
    softcap: float | None = None
    chunk: int | None = None
    scan: Scan = python_scan
    layout: Layout = ONE_DEVICE


class LinearLossGPT(GPT):
    """`GPT` with `linear_cross_entropy` for its loss. chunk, scan, layout: see `Head`."""

    chunk: int | None
    scan: Scan
    layout: Layout

    def loss(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """See `GPT.loss`."""
        table = self.embedding if self.head is None else self.head
        head = Head(self.config.vocab_size, self.config.logit_softcap, self.chunk, self.scan, self.layout)
        return linear_cross_entropy(x_BTD, table.weight.to(x_BTD.dtype), targets_BT, head)


def linear_cross_entropy(x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, head: Head) -> Tensor:
    """`cross_entropy(x @ weight.T, targets)`, with its gradients computed at once and by hand.

    Only the logits of `head.chunk` tokens of a device exist at a time, in the type of x; in the chunk that made them they are
    turned into the gradients of x and of the weight, so that nothing is computed again, or kept, for the backward pass. Against
    autograd's way that saves three passes over [tokens, V] even with a single chunk: the target's logit is the product
    with one row of the table instead of a masked sum over all of them, the count of targets likewise, and the gradient's
    sum over V is known to be zero.

    Args:
        x_BTD: output of the last norm, in the compute type.
        weight_VD: output table, in the compute type, V a multiple of the padding.
        targets_BT: the right token ids, int32 or int64; -100 leaves a token out of the mean. The mean of none is 0.
        head: see `Head`; a chunk is what `_cut` makes of `head.chunk`.

    Returns:
        The mean in fp32 and nats, 0-d. It can be differentiated once.
    """
    loss: Tensor = _LinearCrossEntropy.apply(x_BTD, weight_VD, targets_BT, head)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, head: Head) -> Tensor:
        x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
        share, shards = _share(targets_N), head.layout.shards(len(x_BTD))
        chunks, size = _cut(len(x_ND) // shards, head.chunk)
        if chunks == 1:
            loss_P, grad_x_ND, grad_weight_VD = _loss_and_gradients(x_ND, weight_VD, targets_N, share, head)
        else:
            shape = shards, chunks, size
            loss_P, grad_x_ND, grad_weight_VD = _in_chunks(x_ND, weight_VD, targets_N, share, head, shape)
        ctx.save_for_backward(grad_x_ND.view(x_BTD.shape), grad_weight_VD, share)
        ctx.weight_dtype = weight_VD.dtype
        return loss_P.sum() * share

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_x_BTD, grad_weight_VD, share = ctx.saved_tensors
        factor = grads[0] * share if grad_x_BTD.dtype == torch.float16 else grads[0]
        return (grad_x_BTD * factor).to(grad_x_BTD.dtype), (grad_weight_VD * factor).to(ctx.weight_dtype), None, None


def _share(targets_N: Tensor) -> Tensor:
    """Weight of one counted target in the mean."""
    return 1.0 / (targets_N != IGNORED).sum().clamp(min=1).float()


def _cut(tokens: int, chunk: int | None) -> tuple[int, int]:
    """Number and length of the chunks of so many tokens, of at most `chunk` each.

    Equal ones that are full, if that takes less than twice as many chunks as need be; else the last one is filled up.
    """
    if chunk is None or chunk >= tokens:
        return 1, tokens
    least = -(-tokens // chunk)
    full = next((count for count in range(least, 2 * least) if tokens % count == 0), None)
    return (full, tokens // full) if full else (least, -(-tokens // least))


def _in_chunks(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, share: Tensor, head: Head, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`_loss_and_gradients` as a scan: an iteration takes C tokens of each of P shards, which are on devices of their own.

    shape: P, the number of iterations L, and C. In the scan nothing goes between devices but what a split vocabulary needs: the
    weight is gathered before it, and each shard sums its own gradient of the weight; these are added up after it.
    """
    constrain, (shards, chunks, size) = head.layout.constrain, shape
    tokens = len(x_ND) // shards

    def cut(tensor: Tensor, filling: int) -> Tensor:
        own = tensor.unflatten(0, (shards, tokens))
        if chunks * size > tokens:
            own = F.pad(own, (0, 0) * (own.dim() - 2) + (0, chunks * size - tokens), value=filling)
        iterations = own.unflatten(1, (chunks, size)).transpose(0, 1)
        return constrain(iterations, (None, "batch", *(None,) * (iterations.dim() - 2)))

    def body(carried: list[Tensor], chunk: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        total_P, sums, share, weight_VD = carried
        x_ND, targets_N = chunk[0].flatten(0, 1), chunk[1].flatten()
        loss_P, grad_x_ND, grad_weight = _loss_and_gradients(x_ND, weight_VD, targets_N, share, head, shards)
        grad_x_PCD = grad_x_ND.unflatten(0, (shards, size))
        return [total_P + loss_P, sums + grad_weight, share, weight_VD], [grad_x_PCD]

    weight_VD = constrain(weight_VD, ("vocabulary", None))
    total_P = constrain(torch.zeros(shards, device=x_ND.device), ("batch",))
    one = torch.zeros(weight_VD.shape, device=x_ND.device)
    sums = one if shards == 1 else constrain(one.repeat(shards, 1, 1), ("batch", "vocabulary", None))
    slices = [cut(x_ND, 0), cut(targets_N, IGNORED)]
    (total_P, sums, *_), (grad_x_LPCD,) = head.scan(body, [total_P, sums, share, weight_VD], slices)
    grad_weight_VD = sums if shards == 1 else constrain(sums.sum(0), ("vocabulary", "width"))
    grad_x_PND = grad_x_LPCD.transpose(0, 1).flatten(1, 2)[:, :tokens]
    return total_P, grad_x_PND.flatten(0, 1), grad_weight_VD


def _loss_and_gradients(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, share: Tensor, head: Head, shards: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss of N tokens, and the gradients of `share` times it: of x in x's type, of the weight in fp32.

    shards: equal shards of the tokens that lie on devices of their own. The loss is that of each, [P], and so is the weight's
    gradient if there are more than one, [P, V, D].

    In fp16 the share, one over the number of tokens, would be lost to underflow here: there it is left out, and comes with
    the loss scale in backward. Elsewhere it comes before the products, so that the sum over replicas directly follows them
    and can be made once after all micro-batches.
    """
    logits_NV = (x_ND @ weight_VD.T).float()
    rows_ND = F.embedding(targets_N.clamp(min=0), weight_VD)
    target_N = (x_ND.float() * rows_ND.float()).sum(-1)
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
        target_N = head.softcap * torch.tanh(target_N / head.softcap)
    columns_V = torch.arange(len(weight_VD), device=x_ND.device, dtype=targets_N.dtype)
    masked_NV = torch.where(columns_V < head.vocab_size, logits_NV, PADDING_LOGIT)
    maximum_N1 = masked_NV.amax(-1, keepdim=True)
    logsumexp_N1 = maximum_N1 + torch.log(torch.exp(masked_NV - maximum_N1).sum(-1, keepdim=True))
    valid_N = targets_N != IGNORED
    loss_P = torch.where(valid_N, logsumexp_N1[:, 0] - target_N, 0.0).unflatten(0, (shards, -1)).sum(1)
    grad_NV = torch.exp(masked_NV - logsumexp_N1) - (columns_V == targets_N[:, None]).float()
    if head.softcap is not None:
        grad_NV = grad_NV * (1.0 - (logits_NV / head.softcap).square())
    weight_N = valid_N.float() if x_ND.dtype == torch.float16 else torch.where(valid_N, share, 0.0)
    grad_NV = (grad_NV * weight_N[:, None]).to(x_ND.dtype)
    if shards == 1:
        return loss_P, grad_NV @ weight_VD, (grad_NV.T @ x_ND).float()
    grad_PCV, x_PCD = grad_NV.unflatten(0, (shards, -1)), x_ND.unflatten(0, (shards, -1))
    return loss_P, grad_NV @ weight_VD, (grad_PCV.transpose(1, 2) @ x_PCD).float()
