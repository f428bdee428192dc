"""Checks of tensors before they are saved or used: missing names, wrong shapes, NaN and infinity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pretrain_xla.errors import UserError


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Describe the first tensor that holds NaN or infinity, or return None.

    Looks at minimum and maximum: one pass that allocates nothing, faster than `isfinite` (docs/LOG.md).
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            bounds = torch.stack(torch.aminmax(tensor.detach()))
            if not torch.isfinite(bounds).all():
                bad = int((~torch.isfinite(tensor)).sum())
                return f"{name} holds NaN or infinity in {bad:,} of {tensor.numel():,} places"
    return None


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights with NaN or infinity.

    Raises:
        UserError: names the first such tensor, and where it was read.
    """
    if (fault := not_finite(tensors)) is not None:
        raise UserError(f"{where}: {fault}, so it cannot be used: name an older checkpoint or another model")


def check_names(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that do not fit a model.

    Raises:
        UserError: names the first tensor that is missing, unknown to the model, or of another shape.
    """
    found, needed = ({name: tuple(tensor.shape) for name, tensor in ones.items()} for ones in (tensors, wanted))
    check_shapes(found, needed, where)


def check_shapes(
    shapes: Mapping[str, tuple[int, ...] | None], wanted: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """The same by names and shapes."""
    for name in (*wanted, *shapes):
        if name not in shapes:
            raise UserError(f"{where} lacks {name}: name another")
        if name not in wanted:
            raise UserError(f"{where} holds {name}, which its model does not have: name another")
        if (found := shapes[name]) != (shape := wanted[name]):
            raise UserError(f"{where} holds {name} in the shape {found}, and its model has {shape}: name another")
