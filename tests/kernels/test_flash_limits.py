"""Whether a model attends by the kernels on a chip, and why not: what the header of a run says. Without jax."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest

from pretrain_xla.config import ModelConfig
from pretrain_xla.kernels import flash_limits
from pretrain_xla.kernels.flash_limits import why_plain


@pytest.mark.parametrize(
    ("changes", "chip", "tensor", "reason"),
    [
        ({}, "v5e", 1, None),
        ({}, "v6e", 2, None),
        ({"seq_length": 1024}, "v4", 1, None),
        ({"seq_length": 2048}, "v4", 1, "on v4 of at most 1024"),
        ({}, "v3", 1, "the compiler takes no bf16 kernels for v3"),
        ({}, None, 1, "the kernels are for TPUs"),
        ({"attention": "reference"}, "v5e", 1, "--attention reference"),
        ({"dropout": 0.1}, "v5e", 1, "--dropout 0.1"),
        ({"num_heads": 16}, "v5e", 1, "heads are 48 wide"),
        ({}, "v5e", 4, "3 key/value heads of width 64 do not fill 128-lane blocks"),
        ({"seq_length": 100}, "v5e", 1, "100 tokens are not a multiple"),
    ],
)
def test_the_reason_for_plain_attention(
    changes: dict[str, Any], chip: str | None, tensor: int, reason: str | None
) -> None:
    found = why_plain(ModelConfig(**changes), chip, tensor)
    assert found == reason if reason is None else reason in (found or "")


def test_it_needs_no_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    spec = importlib.util.spec_from_file_location("limits_without_jax", str(flash_limits.__file__))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.why_plain(ModelConfig(), "v5e", 1) is None
