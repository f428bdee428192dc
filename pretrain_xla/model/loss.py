"""The training loss."""

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Target of a token that is left out of the mean, as in PyTorch."""


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean over tokens of log-sum-exp(logits) - logits[target], in fp32 and nats, as a 0-d tensor.

    targets_BT: the right token ids, int32 or int64; -100 leaves a token out of the mean. The mean of none is 0.
    """
    targets_N = targets_BT.flatten().long()
    total = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_N, ignore_index=IGNORED, reduction="sum")
    return total * (1.0 / (targets_N != IGNORED).sum().clamp(min=1).float())
