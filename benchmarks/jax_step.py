"""The same training step in JAX and optax, which `tpu_step.py` compares ours with.

The architecture (`jax_model.py`), the optimizer and the numerics are those of `pretrain_xla`;
`tests/benchmarks/test_jax_step.py` tests that both agree over three updates. `compile_for` needs no TPU and no weights: it
compiles for a named topology from shapes alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from jax import Array
from jax._src import tpu_custom_call
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.jax_model import ATTENTION, Tree, init_params, loss_of
from pretrain_xla.config import OptimConfig, RunConfig

MOSAIC_VERSION = 7
"""Newest version of Mosaic's IR that libtpu 0.0.21 reads; jax 0.7.1 writes version 8 by default."""


class State(NamedTuple):
    """What a step reads and updates."""

    params: Tree
    optimizer: optax.OptState


@dataclass(frozen=True)
class JaxStep:
    """A training step, not yet jitted.

    Attributes:
        init: key → first `State`; under `jax.eval_shape` it costs no memory.
        step: (state, tokens_BS) → (next state, metrics); jit it with `donate_argnums=0`.
    """

    init: Callable[[Array], State]
    step: Callable[[State, Array], tuple[State, dict[str, Array]]]


def build(
    config: RunConfig, *, attention: str = "splash", residual_dtype: str | None = None, mesh: Mesh | None = None
) -> JaxStep:
    """Build the step of a run, for one micro-batch: gradient accumulation is not part of the comparison.

    Args:
        config: `model` and `optim`; `train.mixed_precision` gives the compute type.
        attention: splash or flash (JAX's two Pallas kernels; TPU only), or reference.
        residual_dtype: type of the residual stream; None means the compute type. The torch side keeps it in float32.
        mesh: devices along one axis `data`, over which sequences are sharded; None means one device.

    Raises:
        ValueError: the config uses something that only the torch side has.
    """
    model = config.model
    _refuse_unsupported(config)
    optimizer = make_optimizer(config.optim)
    compute_dtype = jnp.dtype(jnp.bfloat16 if config.train.mixed_precision == "bf16" else jnp.float32)
    attend = partial(ATTENTION[attention], scale=model.query_scale or model.heads_dim**-0.5)
    if mesh is not None and attention != "reference":
        # The partitioner cannot see into a kernel: state that each device runs it on its own sequences.
        attend = jax.shard_map(attend, mesh=mesh, in_specs=(P("data"),) * 3, out_specs=P("data"), check_vma=False)
    loss = partial(
        loss_of,
        model=model,
        attend=attend,
        compute_dtype=compute_dtype,
        residual_dtype=jnp.dtype(residual_dtype or compute_dtype),
    )

    def init(key: Array) -> State:
        params = init_params(key, model)
        return State(params, optimizer.init(params))

    def step(state: State, tokens_BS: Array) -> tuple[State, dict[str, Array]]:
        value, gradients = jax.value_and_grad(loss)(state.params, tokens_BS)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        metrics = {"loss": value, "grad_norm": optax.global_norm(gradients)}
        return State(optax.apply_updates(state.params, updates), optimizer_state), metrics

    return JaxStep(init, step)


def compile_for(
    config: RunConfig,
    topology: str,
    sequences_per_chip: int,
    *,
    chips: int = 1,
    attention: str = "splash",
    residual_dtype: str | None = None,
) -> jax.stages.Compiled:
    """Compile the step with the real TPU compiler, for data parallelism over the first chips of a topology.

    Args:
        config: see `build`.
        topology: for example `v5e:2x4`; see `jax.experimental.topologies`.
        sequences_per_chip: sequences of `model.seq_length` tokens for each chip in a step.
        chips: number of chips, each with all parameters.
        attention: see `build`.
        residual_dtype: see `build`.
    """
    # libtpu would otherwise ask the host for these; it is loaded at the first topology.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    devices = topologies.get_topology_desc(topology, "tpu").devices[:chips]
    mesh = Mesh(np.array(devices), ("data",))
    trainer = build(config, attention=attention, residual_dtype=residual_dtype, mesh=mesh)

    def on_mesh(leaf: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    shapes = jax.eval_shape(lambda: trainer.init(jax.random.key(0)))
    state = jax.tree.map(lambda leaf: on_mesh(leaf, P()), shapes)
    tokens_shape = (sequences_per_chip * chips, config.model.seq_length + 1)
    tokens_BS = on_mesh(jax.ShapeDtypeStruct(tokens_shape, jnp.int32), P("data"))
    with mock.patch.object(tpu_custom_call, "get_ir_version", return_value=MOSAIC_VERSION):
        lowered = jax.jit(trainer.step, donate_argnums=0).lower(state, tokens_BS)
    return lowered.compile()


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clipping, then AdamW with warm-up and cosine decay; weight decay applies only to matrices."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.decay_steps, config.min_lr
    )
    adamw = optax.adamw(
        lambda step: schedule(step + 1),  # our first update already has a learning rate above 0
        b1=config.betas[0],
        b2=config.betas[1],
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params),
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw) if config.max_grad_norm else adamw


def _refuse_unsupported(config: RunConfig) -> None:
    """Fail on what this step does not support, instead of comparing different steps."""
    model, optim = config.model, config.optim
    unsupported = {
        "num_kv_heads": model.kv_heads != model.num_heads,
        "norm": model.norm == "rmsnorm_zero_centered" or (model.norm == "layernorm" and model.qk_norm),
        "post_norm": model.post_norm,
        "attention_softcap": model.attention_softcap is not None,
        "logit_softcap": model.logit_softcap is not None,
        "scale_embeddings": model.scale_embeddings,
        "tie_weights": not model.tie_weights,
        "dropout": model.dropout > 0,
        "init": model.init != "gpt2",
        "optim_type": optim.optim_type != "adamw",
        "decay_method": optim.decay_method != "cosine",
        "mixed_precision": config.train.mixed_precision == "fp16",
    }
    if any(unsupported.values()):
        raise ValueError(f"the JAX step does not support {', '.join(key for key, bad in unsupported.items() if bad)}")
