"""Attention against the reference: the comparison itself, and a kernel that gives a wrong result."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pretrain_xla.doctor.kernels import compare, model_of, torch_subject
from pretrain_xla.doctor.verdicts import judge_kernels

MODEL = model_of(16)
RIGHT = torch_subject(MODEL, torch.device("cpu"))


def test_the_attention_of_this_machine() -> None:
    check = judge_kernels(compare(RIGHT, MODEL))
    assert check.status == "ok", check
    assert set(check.figures["errors"]) == {
        "result",
        *(f"gradient of {what}" for what in ("queries", "keys", "values")),
    }


def test_a_kernel_with_a_wrong_result() -> None:
    def wrong(*tensors: Tensor) -> list[Tensor]:
        out, query, key, value = RIGHT.attend(*tensors)
        key[1, 3] += 0.01 * key.abs().max()  # one token of the second device
        return [out, query, key, value]

    check = judge_kernels(compare(dataclasses.replace(RIGHT, attend=wrong, rows=2), MODEL))
    assert check.status == "failed"
    assert "gradient of keys" in check.found
    assert "on device 1" in check.found
