"""AdamW with all of its state on the device.

`torch.optim.AdamW` keeps one step counter for each parameter and chooses among four implementations by device. Here there is
one counter, one implementation in `torch._foreach` operations (a few kernels on CUDA, fused by XLA and torch.compile), and
state that is addressed by parameter name, so that a checkpoint means the same on every runtime. It is tested against
`torch.optim.AdamW`. torch_xla's `syncfree.AdamW` serves one tensor at a time and only skips steps that are not finite. What an
update costs on a TPU, beside optax's: docs/LOG.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from pretrain_xla.config import OptimConfig


def decayed(parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices (embeddings included), never to biases and norms."""
    return parameter.dim() >= 2


def _zeros(name: str, parameter: Tensor) -> Tensor:
    zeros = torch.zeros((), dtype=torch.int32) if name == "step" else torch.zeros(parameter.shape)
    return zeros.to(parameter.device)


class AdamW:
    """Adam with decoupled (adamw) or L2 (adam) weight decay; Loshchilov & Hutter 2019, algorithm 2.

    Attributes:
        step: 0-d int32 device tensor, updates made so far.
        state: name of the tensor (`step`, `first_moment.<parameter>`, `second_moment.<parameter>`) → tensor.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        schedule: Callable[[Tensor], Tensor],
        place: Callable[[str, Tensor], Tensor] | None = None,
        decays: Callable[[str, Tensor], bool] | None = None,
    ) -> None:
        """See the class.

        Args:
            named_parameters: already on the devices.
            config: type, betas, eps, weight decay.
            schedule: 0-d step → 0-d learning rate.
            place: makes a state tensor by its name and its parameter (`step`: the first parameter). None: zeros.
            decays: whether weight decay applies, by name and parameter. None: `decayed`.
        """
        place = place or _zeros
        decays = decays or (lambda _name, parameter: decayed(parameter))
        named = list(named_parameters)
        # Decayed parameters first, so that each group is one contiguous list for the foreach operations.
        named.sort(key=lambda item: not decays(*item))
        self.config = config
        self.schedule = schedule
        self.names = [name for name, _ in named]
        self.parameters: list[Tensor] = [parameter for _, parameter in named]
        self.decayed_count = sum(decays(name, parameter) for name, parameter in named)
        self.first_moments = [place(f"first_moment.{name}", parameter) for name, parameter in named]
        self.second_moments = [place(f"second_moment.{name}", parameter) for name, parameter in named]
        self.step = place("step", self.parameters[0])

    @property
    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next update depends on, besides the parameters themselves."""
        tensors = {"step": self.step}
        for name, first, second in zip(self.names, self.first_moments, self.second_moments, strict=True):
            tensors[f"first_moment.{name}"] = first
            tensors[f"second_moment.{name}"] = second
        return tensors

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], skip: Tensor | None = None) -> Tensor:
        """One update of the parameters in place; returns the learning rate used (0-d float32).

        Args:
            gradients: in the order of `parameters`, already reduced over replicas and clipped.
            skip: 0-d bool tensor; where it is true nothing changes, not even the step (fp16 overflow).
        """
        rate = self.schedule(self.step)
        new_step = self.step + 1 if skip is None else self.step + (~skip).to(torch.int32)
        if skip is None:
            self._update(list(gradients), rate, new_step)
        else:
            tensors = [*self.parameters, *self.first_moments, *self.second_moments]
            before = [tensor.clone() for tensor in tensors]
            self._update(list(gradients), rate, self.step + 1)
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(torch.where(skip, old, tensor))
        self.step.copy_(new_step)
        return rate

    def _update(self, gradients: list[Tensor], rate: Tensor, new_step: Tensor) -> None:
        beta1, beta2 = self.config.betas
        count = self.decayed_count
        weight_decay = self.config.weight_decay
        if weight_decay and self.config.optim_type == "adam":
            decay = torch._foreach_mul(self.parameters[:count], weight_decay)
            gradients = [*torch._foreach_add(gradients[:count], decay), *gradients[count:]]
        elif weight_decay and count:
            torch._foreach_mul_(self.parameters[:count], 1.0 - rate * weight_decay)

        # Plain products and sums: tracing lerp and addcmul on XLA takes as long as all the rest of the update.
        torch._foreach_mul_(self.first_moments, beta1)
        torch._foreach_add_(self.first_moments, gradients, alpha=1.0 - beta1)
        torch._foreach_mul_(self.second_moments, beta2)
        torch._foreach_add_(self.second_moments, torch._foreach_mul(gradients, gradients), alpha=1.0 - beta2)

        position = new_step.to(torch.float32)
        correction1 = 1.0 - torch.pow(beta1, position)
        correction2 = 1.0 - torch.pow(beta2, position)
        denominators = torch._foreach_sqrt(self.second_moments)
        torch._foreach_mul_(denominators, correction2.rsqrt())
        torch._foreach_add_(denominators, self.config.adam_eps)
        updates = torch._foreach_div(self.first_moments, denominators)
        torch._foreach_mul_(updates, rate / correction1)
        torch._foreach_sub_(self.parameters, list(updates))


@torch.no_grad()
def clip_by_global_norm(
    gradients: Sequence[Tensor], max_norm: float, unit: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """Scale gradients so that their joint L2 norm is at most `max_norm`; 0 only measures.

    Args:
        gradients: as they came.
        max_norm: the bound.
        unit: what the gradients are to be divided by first (0-d), in the same pass over them. None: 1.

    Returns:
        The gradients and their norm before clipping (0-d float32). No host branch: the factor is computed on the device.
    """
    norm = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum().sqrt()
    norm = norm if unit is None else norm / unit
    if max_norm == 0.0 and unit is None:
        return list(gradients), norm
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(norm)
    factor = factor if unit is None else factor / unit
    return list(torch._foreach_mul(list(gradients), factor)), norm
