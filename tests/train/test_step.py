"""The training step on a CPU, against a loop in plain PyTorch, and against itself with other micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain_xla.config import RunConfig
from pretrain_xla.model import GPT, initialize
from pretrain_xla.model.documents import Examples
from pretrain_xla.optim import learning_rate, make_optimizer
from pretrain_xla.runtime.torch_runtime import TorchRuntime
from pretrain_xla.train.step import METRICS, TrainStep
from pretrain_xla.train.update_guard import UpdateGuard

Make = Callable[..., RunConfig]
SEQUENCES, UPDATES, HISTORY = 8, 3, 4


def make_model(config: RunConfig) -> GPT:
    model = GPT(config.model)
    initialize(model, seed=5)
    with torch.no_grad():  # norms and biases that are not identities, so that each has a gradient
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def make_step(
    config: RunConfig, runtime: TorchRuntime, model: nn.Module | None = None, examples: Examples | None = None
) -> TrainStep:
    model = model or make_model(config)
    schedule = lambda step: learning_rate(step, config.optim, config.model.d_model)  # noqa: E731
    return TrainStep(model, make_optimizer(model.named_parameters(), config.optim, schedule), runtime, config, examples)


def batches(config: RunConfig) -> list[Tensor]:
    """Global batches `[sequences, T + 1]`, one for each update."""
    generator = torch.Generator().manual_seed(2)
    shape = (SEQUENCES, config.model.seq_length + 1)
    ids = [torch.randint(0, config.model.vocab_size, shape, generator=generator) for _ in range(UPDATES)]
    return [tokens.to(torch.int32) for tokens in ids]


def split_batch(tokens_NS: Tensor, micro_batches: int) -> Tensor:
    """The same sequences as `[rows, micro-batches, T + 1]`."""
    return tokens_NS.reshape(micro_batches, -1, tokens_NS.shape[1]).transpose(0, 1)


def train(step: TrainStep, config: RunConfig) -> Tensor:
    """All updates; returns the history."""
    history = torch.zeros(HISTORY, len(METRICS))
    for tokens in batches(config):
        history = step(split_batch(tokens, config.train.gradient_accum_step), history)
    return history


OPTIM = {"adam_eps": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "max_grad_norm": 0.5}


def test_it_matches_the_plain_loop(make_config: Make, runtime: TorchRuntime) -> None:
    config = make_config(optim=OPTIM)
    reference = make_model(config)
    matrices = [p for p in reference.parameters() if p.dim() >= 2]
    others = [p for p in reference.parameters() if p.dim() < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    expected = []
    for update, tokens in enumerate(batches(config)):
        rate = float(learning_rate(torch.tensor(update), config.optim, config.model.d_model))
        for group in adamw.param_groups:
            group["lr"] = rate
        loss = reference(tokens[:, :-1], tokens[:, 1:])
        adamw.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        adamw.step()
        expected.append([float(loss), float(norm), rate])
    assert min(norm for _, norm, _ in expected) > 0.5, "so that clipping has an effect"

    step = make_step(config, runtime)
    history = train(step, config)
    torch.testing.assert_close(history[-UPDATES:, :3], torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert not history[:, 3:].any(), "nothing is skipped"
    assert not history[: HISTORY - UPDATES].any(), "older rows move up"
    for (name, parameter), other in zip(step.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-6, msg=name)
        assert parameter.grad is None
    assert int(step.optimizer.step) == UPDATES


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_accumulation_makes_the_same_update(micro_batches: int, make_config: Make, runtime: TorchRuntime) -> None:
    whole = make_config(optim=OPTIM)
    split = make_config(
        optim=OPTIM, train={"gradient_accum_step": micro_batches, "train_batch_size": SEQUENCES // micro_batches}
    )
    one, other = make_step(whole, runtime), make_step(split, runtime)
    torch.testing.assert_close(train(other, split), train(one, whole), rtol=1e-5, atol=1e-6)
    before = dict(make_model(whole).named_parameters())
    for (name, parameter), accumulated in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(accumulated, parameter, rtol=0, atol=1e-6, msg=name)
        assert not torch.equal(parameter, before[name]), name


IGNORED = tuple(range(20, 37))
"""Nearly half of the ids, so that micro-batches differ in how many tokens they ignore."""


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("micro_batches", [1, 8])
def test_the_mean_is_over_tokens_that_count_however_the_batch_is_split(
    micro_batches: int, max_grad_norm: float, make_config: Make, runtime: TorchRuntime
) -> None:
    config = make_config(
        optim=OPTIM | {"max_grad_norm": max_grad_norm},
        train={"gradient_accum_step": micro_batches, "train_batch_size": SEQUENCES // micro_batches},
    )
    step = make_step(config, runtime, examples=Examples(ignored=IGNORED))
    reference = make_model(config)
    tokens = batches(config)[0]
    targets = tokens[:, 1:].clone()
    targets[targets >= 20] = -100  # PyTorch's own way of leaving them out of the mean
    loss = nn.functional.cross_entropy(reference(tokens[:, :-1]).flatten(0, 1), targets.flatten().long())
    loss.backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm or 1e9)

    history = step(split_batch(tokens, micro_batches), torch.zeros(HISTORY, len(METRICS)))
    assert history[-1, :2].tolist() == pytest.approx([float(loss), float(norm)], rel=1e-5)
    # The first moment after one update is the gradient that it got, times 1 - beta.
    state = step.optimizer.state
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(state[f"first_moment.{name}"], 0.1 * parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_step_in_which_every_token_is_ignored_changes_nothing(make_config: Make, runtime: TorchRuntime) -> None:
    config = make_config(optim=OPTIM | {"weight_decay": 0.0})
    step = make_step(config, runtime, examples=Examples(ignored=tuple(range(37))))
    before = [parameter.clone() for parameter in step.model.parameters()]
    history = step(split_batch(batches(config)[0], 1), torch.zeros(HISTORY, len(METRICS)))
    assert history[-1, :2].tolist() == [0, 0]
    assert all(torch.equal(old, new) for old, new in zip(before, step.model.parameters(), strict=True))


def test_a_history_that_a_thread_still_reads_does_not_change(make_config: Make, runtime: TorchRuntime) -> None:
    config = make_config()
    step, old = make_step(config, runtime), torch.zeros(HISTORY, len(METRICS))
    new = step(split_batch(batches(config)[0], 1), old)
    assert not old.any()
    assert new[-1, :3].all()


def test_every_tensor_that_it_changes_is_in_its_state(make_config: Make, runtime: TorchRuntime) -> None:
    config = make_config(train={"spike_sigma": 6.0})
    step = make_step(config, runtime)
    guard = [f"guard.{name}" for name in (*step.guard.state, *step.guard.diagnosis)]
    names = [*dict(step.model.named_parameters()), *step.optimizer.state, *guard]
    before = [tensor.clone() for tensor in step.state()]
    train(step, config)
    for name, old, new in zip(names, before, step.state(), strict=True):
        assert not torch.equal(old, new) or name in ("guard.skipped_in_a_row", "guard.bad_gradients"), name


def test_a_parameter_without_a_gradient_is_an_error(make_config: Make, runtime: TorchRuntime) -> None:
    config = make_config()
    model = make_model(config)
    model.unused_norm = nn.LayerNorm(3, bias=False)
    with pytest.raises(AssertionError, match="unused"):
        train(make_step(config, runtime, model), config)


def scaled(config: RunConfig) -> RunConfig:
    """With fp16's loss scaling. On a CPU the model still computes in fp32, so only the scaling differs."""
    changed = copy.deepcopy(config)
    return changed.model_copy(update={"train": config.train.model_copy(update={"mixed_precision": "fp16"})})


def test_loss_scaling_changes_no_update(make_config: Make, runtime: TorchRuntime) -> None:
    config = make_config(optim=OPTIM, train={"gradient_accum_step": 2})
    plain, with_scale = make_step(config, runtime), make_step(scaled(config), runtime)
    assert with_scale.loss_scale is not None
    torch.testing.assert_close(train(with_scale, config), train(plain, config), rtol=1e-5, atol=1e-6)
    for one, other in zip(plain.model.parameters(), with_scale.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert int(with_scale.loss_scale.good_steps) == UPDATES


def test_an_overflow_skips_the_update_and_halves_the_scale(make_config: Make, runtime: TorchRuntime) -> None:
    config = make_config(optim=OPTIM)
    step = make_step(scaled(config), runtime)
    assert step.loss_scale is not None
    tokens = split_batch(batches(config)[0], 1)
    step(tokens, torch.zeros(HISTORY, len(METRICS)))
    with torch.no_grad():
        step.model.get_parameter("head.weight").mul_(100)  # gradients above 1.2 …
        whole = batches(config)[0]
        loss = step.model(whole[:, :-1], whole[:, 1:])
    step.loss_scale.scale.fill_(3e38)  # … which times this overflow fp32
    watched = [*step.model.parameters(), *step.optimizer.state.values()]
    before = [tensor.clone() for tensor in watched]
    history = step(tokens, torch.zeros(HISTORY, len(METRICS)))
    assert float(step.loss_scale.scale) == pytest.approx(1.5e38)
    assert all(torch.equal(old, new) for old, new in zip(before, watched, strict=True))
    assert float(history[-1, 0]) == pytest.approx(float(loss)), "the loss shown is the unscaled one"


@pytest.mark.parametrize("changes", [{}, {"positions": "rotary", "norm": "rmsnorm", "gated": True, "qk_norm": True}])
def test_no_operation_reads_a_value(changes: dict[str, Any], make_config: Make, runtime: TorchRuntime) -> None:
    # A meta tensor has no value, so a read anywhere in the step would raise; on a TPU it would stop the device.
    config = make_config(model=changes, train={"gradient_accum_step": 2, "spike_sigma": 6.0})
    with torch.device("meta"):
        model = GPT(config.model)
    step = make_step(config, runtime, model, Examples(end_of_text=0, ignored=(1, 2)))
    step.guard = UpdateGuard(step.guard.names, config.train, lambda _name, new: new.to("meta"))
    tokens = torch.empty(4, 2, config.model.seq_length + 1, dtype=torch.int32, device="meta")
    history = step(tokens, torch.empty(HISTORY, len(METRICS), device="meta"))
    assert history.is_meta
    assert history.shape == (HISTORY, len(METRICS))
