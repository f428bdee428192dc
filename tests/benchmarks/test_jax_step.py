"""The JAX step of the benchmarks computes the same as ours: same losses, same parameters after three updates."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest
import torch

from benchmarks import jax_model, jax_step
from pretrain_xla.config import RunConfig, build_config
from pretrain_xla.model import GPT, initialize
from pretrain_xla.optim import learning_rate, make_optimizer
from pretrain_xla.optim.clipping import clip_by_global_norm

GPT2 = {"num_heads": 4}
MODERN = {
    "num_heads": 2,
    "head_dim": 32,
    "activation": "silu",
    "gated": True,
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "qk_norm": True,
    "positions": "rotary",
    "bias": False,
}


def tiny(architecture: dict[str, object]) -> RunConfig:
    sizes = {"vocab_size": 300, "seq_length": 32, "d_model": 48, "num_layers": 2, "d_ff": 80, "tie_weights": True}
    # Clipping and decay that matter, and three updates that cover the warm-up, the peak and the decay.
    optim = {
        "learning_rate": 1e-3,
        "min_lr": 1e-4,
        "betas": (0.9, 0.95),
        # Without rotary positions a key's bias does not change the attention weights: its gradient is rounding noise, which
        # Adam with a smaller epsilon would amplify to full updates.
        "adam_eps": 1e-6,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "warmup_steps": 2,
        "decay_steps": 5,
    }
    return build_config({"model": sizes | architecture, "optim": optim}, "test")


def draw_model(config: RunConfig) -> GPT:
    """Weights with which every bias and every norm matters."""
    model = GPT(config.model)
    initialize(model, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def draw_tokens(config: RunConfig, steps: int) -> np.ndarray:
    shape = (steps, 4, config.model.seq_length + 1)
    return np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)


def torch_steps(config: RunConfig, model: GPT, tokens_NBS: np.ndarray) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of our step, computed as `TrainStep` does."""
    optimizer = make_optimizer(
        model.named_parameters(), config.optim, lambda step: learning_rate(step, config.optim, config.model.d_model)
    )
    losses, norms = [], []
    for tokens_BS in torch.from_numpy(tokens_NBS):
        loss = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
        gradients = torch.autograd.grad(loss, optimizer.parameters)
        clipped, norm = clip_by_global_norm(gradients, config.optim.max_grad_norm)
        optimizer.update(clipped)
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms


@pytest.mark.parametrize("architecture", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_three_updates_equal_ours(architecture: dict[str, object]) -> None:
    config = tiny(architecture)
    model = draw_model(config)
    tokens_NBS = draw_tokens(config, 3)
    trainer = jax_step.build(config, attention="reference")
    params = jax_model.params_from_torch(model.state_dict(), config.model)
    first_shapes = jax.eval_shape(lambda: trainer.init(jax.random.key(0)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, first_shapes.params)

    state = jax_step.State(params, jax_step.make_optimizer(config.optim).init(params))
    # Most of this test is compilation, which takes half the time without LLVM's optimization.
    step = jax.jit(trainer.step, donate_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
    losses, norms = [], []
    for tokens_BS in tokens_NBS:
        state, metrics = step(state, tokens_BS)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    before = jax_model.params_from_torch(model.state_dict(), config.model)
    our_losses, our_norms = torch_steps(config, model, tokens_NBS)

    assert min(our_norms) > 2 * config.optim.max_grad_norm
    np.testing.assert_allclose(losses, our_losses, atol=1e-5, rtol=0)
    np.testing.assert_allclose(norms, our_norms, rtol=1e-4)
    ours = jax_model.params_from_torch(model.state_dict(), config.model)
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=0, err_msg=jax.tree_util.keystr(path)),
        state.params,
        ours,
    )
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), ours, before)
    still = {path for path, most in jax.tree.leaves_with_path(moved) if most < 1e-3}
    assert all("'key']['bias" in jax.tree_util.keystr(path) for path in still), still


def test_unsupported_options_are_refused() -> None:
    with pytest.raises(ValueError, match="num_kv_heads, dropout"):
        jax_step.build(tiny({"num_heads": 4, "num_kv_heads": 2, "dropout": 0.1}))
