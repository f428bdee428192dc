"""Documents kept apart in a row: each gets what it would get alone, whatever the model and the way it is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain_xla.config import ModelConfig
from pretrain_xla.model import GPT, Execution, cross_entropy, initialize
from pretrain_xla.model.documents import Examples, number_documents, positions_within
from pretrain_xla.model.torch_rewrite import optimize_for_torch
from pretrain_xla.model.xla import XlaContext, optimize_for_xla
from pretrain_xla.model.xla.stacked import unstack_layers

END = 0
ROW = torch.tensor([[5, 1, END, END, 7, 8, 9, END, 3, 2, 1, 4], [6] * 12], dtype=torch.int32)
"""Two documents, one that is nothing but its end, one that goes on after the row; and a row within one document."""


def test_an_end_of_text_belongs_to_what_it_ends() -> None:
    segments_BT = number_documents(ROW, END)
    assert segments_BT.dtype == torch.int32
    assert segments_BT.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3], [0] * 12]
    assert positions_within(segments_BT).tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 0, 1, 2, 3], [*range(12)]]


def test_positions_begin_anew_in_rows_of_any_length() -> None:
    for length in (1, 2, 7, 8, 9, 100):
        tokens_BT = torch.randint(0, 5, (20, length), generator=torch.Generator().manual_seed(length))
        for row, found in zip(tokens_BT.tolist(), positions_within(number_documents(tokens_BT, END)), strict=True):
            expected, position = [], 0
            for token in row:
                expected.append(position)
                position = 0 if token == END else position + 1
            assert found.tolist() == expected


MODELS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rotary": {
        "positions": "rotary",
        "norm": "rmsnorm",
        "gated": True,
        "qk_norm": True,
        "num_kv_heads": 2,
        "bias": False,
    },
    "soft-caps": {"positions": "rotary", "num_kv_heads": 1, "attention_softcap": 2.0, "logit_softcap": 3.0},
    "no positions": {"positions": "none"},
}
WAYS: dict[str, Callable[[GPT], GPT]] = {
    "plain": lambda model: model,
    "xla": lambda model: optimize_for_xla(model, Execution(), XlaContext()),
    "xla, scan": lambda model: optimize_for_xla(model, Execution(scan_layers=True), XlaContext()),
    "xla, selective": lambda model: optimize_for_xla(model, Execution("selective"), XlaContext()),
    "torch, selective": lambda model: optimize_for_torch(model, Execution("selective")),
    "torch, full": lambda model: optimize_for_torch(model, Execution("full")),
    "torch, chunked loss": lambda model: optimize_for_torch(model, Execution(loss_chunk=5)),
}


def make(kind: str, attention: str) -> GPT:
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "seq_length": 12,
        "d_model": 24,
        "num_layers": 2,
        "num_heads": 4,
        "d_ff": 40,
    }
    model = GPT(ModelConfig(**sizes, **MODELS[kind], attention=attention))
    initialize(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def named_gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    gradients = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    return unstack_layers(gradients) | {"loss": loss.detach()}


def apart(model: GPT, targets_BT: Tensor) -> dict[str, Tensor]:
    """Summed loss of each document of `ROW` alone, and its gradients: what no mask, segment or reset has touched."""
    loss = torch.zeros(())
    for row, targets, numbers in zip(ROW, targets_BT, number_documents(ROW, END), strict=True):
        for number in numbers.unique():
            own = numbers == number
            loss = loss + own.sum() * cross_entropy(model(row[own][None]), targets[own][None])
    return named_gradients(model, loss)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_logits_are_those_of_each_document_alone(kind: str, attention: str) -> None:
    model = make(kind, attention)
    segments_BT = number_documents(ROW, END)
    with torch.no_grad():
        together_BTV = model(ROW, None, segments_BT)
        for row, logits_TV, numbers in zip(ROW, together_BTV, segments_BT, strict=True):
            for number in numbers.unique():
                own = numbers == number
                torch.testing.assert_close(logits_TV[own], model(row[own][None])[0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(together_BTV[0, -1], model(ROW)[0, -1], atol=1e-3), "and not those of the whole row"


@pytest.mark.parametrize("kind", ["learned", "rotary"])
@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_are_those_of_each_document_alone(kind: str, way: str) -> None:
    targets_BT = ROW.roll(-1, 1)
    expected = apart(make(kind, "reference"), targets_BT)
    model = WAYS[way](make(kind, "sdpa"))
    loss = ROW.numel() * model(ROW, targets_BT, number_documents(ROW, END))
    found = named_gradients(model, loss)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=1e-5)


def test_examples_are_the_next_tokens_of_a_document() -> None:
    model, rows_BS = make("learned", "sdpa"), torch.cat([ROW, ROW[:, :1]], dim=1)
    expected = apart(model, rows_BS[:, 1:])["loss"] / ROW.numel()
    torch.testing.assert_close(Examples(END).loss(model, rows_BS).detach(), expected)
    assert Examples(END).counted(rows_BS) is None
    torch.testing.assert_close(Examples().loss(model, rows_BS), model(rows_BS[:, :-1], rows_BS[:, 1:]))


@pytest.mark.parametrize("way", ["plain", "torch, chunked loss"])
def test_tokens_left_out_of_the_loss(way: str) -> None:
    model, rows_BS = WAYS[way](make("learned", "sdpa")), torch.cat([ROW, ROW[:, :1]], dim=1)
    examples = Examples(ignored=(END, 6))
    targets_BT = rows_BS[:, 1:].long()
    losses_BT = -model(rows_BS[:, :-1]).log_softmax(-1).gather(-1, targets_BT[..., None])[..., 0]
    counts_BT = (targets_BT != END) & (targets_BT != 6)
    torch.testing.assert_close(examples.counted(rows_BS), counts_BT.float().mean())
    torch.testing.assert_close(examples.loss(model, rows_BS), losses_BT[counts_BT].sum() / ROW.numel())
    # Of a micro-batch in which nothing counts, nothing comes; a NaN would ruin the others.
    nothing = examples.loss(model, rows_BS[1:])
    assert float(nothing) == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(nothing, list(model.parameters())))
