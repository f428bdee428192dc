"""Replacing a module by another version of itself."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

Version = TypeVar("Version", bound=nn.Module)


def rewritten(module: nn.Module, version: type[Version], **attributes: Any) -> Version:
    """`module` as a subclass of its class, with the same parameters, buffers and hooks, and with `attributes` set besides.

    The two share their parameters; do not use the module where the new one's are taken away (`StackedBlocks`).
    """
    assert issubclass(version, type(module)), (version, type(module))
    new = version.__new__(version)
    new.__dict__ = vars(module) | {"_modules": module._modules.copy()}
    for name, value in attributes.items():
        setattr(new, name, value)
    return new
