"""The training loss."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean over tokens of log-sum-exp(logits) - logits[target], in fp32 and nats, as a 0-d tensor.

    PyTorch's own, because it is the right form everywhere: fused kernels on GPU and CPU, and on XLA a compare with an
    iota that melts into the reductions. (A gather would cost a scatter over all of B, T, V in its backward pass.)

    Args:
        logits_BTV: scores, any floating type.
        targets_BT: the right token ids, int32 or int64; -100 leaves a token out of the mean.
    """
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten().long())
