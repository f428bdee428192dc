"""Tensors that are there and are numbers: what is missing, or holds NaN or infinity, is named before it is kept or used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pretrain_xla.errors import UserError


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the first tensor that holds NaN or infinity, beginning with its name. None means all are numbers.

    The least and the greatest value tell, in one pass with nothing allocated: 20 times as fast as `isfinite` (docs/LOG.md).
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            bounds = torch.stack(torch.aminmax(tensor.detach()))
            if not torch.isfinite(bounds).all():
                bad = int((~torch.isfinite(tensor)).sum())
                return f"{name} holds NaN or infinity in {bad:,} of {tensor.numel():,} places"
    return None


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are no numbers.

    Raises:
        UserError: names the first tensor that holds NaN or infinity, and where it was read.
    """
    if (fault := not_finite(tensors)) is not None:
        raise UserError(f"{where}: {fault}, so nothing can be had from it: name an older or another one")


def check_names(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are not those of a model.

    Raises:
        UserError: names the first tensor that is missing, of another shape, or none of the model's.
    """
    for name in (*wanted, *tensors):
        if name not in tensors:
            raise UserError(f"{where} lacks {name}: name another")
        if name not in wanted:
            raise UserError(f"{where} holds {name}, which its model does not have: name another")
        if (found := tuple(tensors[name].shape)) != (shape := tuple(wanted[name].shape)):
            raise UserError(f"{where} holds {name} in the shape {found}, and its model has {shape}: name another")
