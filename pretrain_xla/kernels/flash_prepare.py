"""Query/key norms and rotary positions inside the flash kernels, from projections as they are, and their derivatives.

Outside, XLA would read and write queries and keys in HBM once more for each of them in the forward and again in the
backward, and change their layout for the halves of a head. In the kernel they are in VMEM already. Nothing is kept for
the backward but the projections themselves. The mathematics is that of `RMSNorm` and `rotate` in `model/layers.py`; between
norm and rotation the values stay fp32.
What each costs in the compiler's schedule: docs/LOG.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pretrain_xla.kernels.flash_kernels import Heads, duplicate, each_block, join, only


@dataclass(frozen=True)
class Preparation:
    """What is done to each query and key head, norm first; what is None is not done.

    Args:
        cos: cosines of the rotary angles, (T, E/2) in fp32; `sin` likewise.
        query_norm: weight (E,) of the queries' RMS norm, fp32; 1 + weight, where the parameter is zero-centred.
        key_norm: the keys'.
    """

    cos: jax.Array | None = None
    sin: jax.Array | None = None
    query_norm: jax.Array | None = None
    key_norm: jax.Array | None = None

    @property
    def keys(self) -> bool:
        """Whether anything is done to keys."""
        return self.cos is not None or self.key_norm is not None

    @property
    def queries(self) -> bool:
        """Whether anything is done to queries."""
        return self.cos is not None or self.query_norm is not None

    @property
    def tables(self) -> int:
        """Operands as long as the sequence."""
        return 0 if self.cos is None else 2

    def operands(self, heads: Heads) -> dict[str, jax.Array]:
        """The kernels' operands, as wide as a block; the sines carry the sign of their half."""
        arrays: dict[str, jax.Array] = {}
        if self.cos is not None and self.sin is not None:
            arrays["cos"] = jnp.tile(self.cos, (1, 2 * heads.per_block))
            arrays["sin"] = jnp.tile(jnp.concatenate((-self.sin, self.sin), axis=1), (1, heads.per_block))
        for name, weight in (("query_norm", self.query_norm), ("key_norm", self.key_norm)):
            if weight is not None:
                arrays[name] = jnp.tile(weight, heads.per_block)[None]
        return arrays


NOTHING = Preparation()
Tables = tuple[jax.Array, jax.Array] | None
"""Cosines and signed sines of the rows at hand, (T, W)."""


def whole(array: jax.Array) -> pl.BlockSpec:
    """A block that is the array, in every grid step."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def tables_of(refs: dict[str, Any], rows: Any) -> Tables:
    """The tables' rows in VMEM, if there are tables."""
    return (refs["cos"][rows], refs["sin"][rows]) if "cos" in refs else None


def weight_of(refs: dict[str, Any], name: str) -> jax.Array | None:
    """The norm's weight in VMEM, if there is one."""
    return refs[f"{name}_norm"][...] if f"{name}_norm" in refs else None


def prepare_rows(refs: dict[str, Any], name: str, x_TW: jax.Array, rows: Any, heads: Heads) -> jax.Array:
    """Queries or keys (by `name`) of these rows, as attention wants them, in their type."""
    if "cos" not in refs and f"{name}_norm" not in refs:
        return x_TW
    return prepare(x_TW, weight_of(refs, name), tables_of(refs, rows), heads).astype(x_TW.dtype)


def prepare_keys(refs: dict[str, Any], heads: Heads, tokens: int, group: Any, span_index: Any = 0) -> tuple[Any, Any]:
    """References to the grid step's keys and values as attention wants them, made in scratch where they change."""
    refs = refs | {"key": refs["key"].at[0], "value": refs["value"].at[0]}
    names = [name for name in ("key", "value") if f"prepared_{name}" in refs]
    half = group // (heads.groups // 2) if heads.spread else None

    def fill() -> None:
        def one_block(first: Any) -> None:
            rows = pl.ds(first, heads.block_for(tokens))
            for name in names:
                x = refs[name][rows]
                x = prepare_rows(refs, name, x, rows, heads) if name == "key" else x
                refs[f"prepared_{name}"][rows] = duplicate(x, half, heads)

        each_block(tokens, heads, one_block)

    if names:
        # They serve all spans, and unless they are one half of a block, all query heads of their group.
        pl.when((span_index == 0) & (heads.spread | (group == 0)))(fill)
    return refs.get("prepared_key", refs["key"]), refs.get("prepared_value", refs["value"])


def prepare(x_TW: jax.Array, weight_1W: jax.Array | None, tables: Tables, heads: Heads) -> jax.Array:
    """Normalised and turned, in fp32."""
    x = x_TW.astype(jnp.float32)
    if weight_1W is not None:
        x = x * _inverse_root(x, heads) * weight_1W
    if tables is not None:
        cos, sin = tables
        x = x * cos + _other_half(x, heads) * sin
    return x


def prepare_backward(
    dx_TW: jax.Array, x_TW: jax.Array, weight_1W: jax.Array | None, tables: Tables, heads: Heads
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of the projection and of the weight, the latter summed over these rows, all in fp32.

    Args:
        dx_TW: gradient of what `prepare` returned, fp32.
        x_TW: the projection; the rest as there.
    """
    if tables is not None:
        cos, sin = tables
        dx_TW = dx_TW * cos - _other_half(dx_TW, heads) * sin
    if weight_1W is None:
        return dx_TW, None
    x = x_TW.astype(jnp.float32)
    inverse = _inverse_root(x, heads)
    normed = x * inverse
    dweight = (dx_TW * normed).sum(axis=0, keepdims=True)
    dnormed = dx_TW * weight_1W
    return inverse * (dnormed - normed * _head_mean(dnormed * normed, heads)), dweight


def _inverse_root(x_TW: jax.Array, heads: Heads) -> jax.Array:
    return lax.rsqrt(_head_mean(x_TW * x_TW, heads) + heads.norm_eps)


def _head_mean(x_TW: jax.Array, heads: Heads) -> jax.Array:
    """Mean over each head's lanes, in all of them."""
    sums = [only(x_TW, n, heads).sum(axis=1, keepdims=True) for n in range(heads.per_block)]
    return join(sums, heads) * (1 / heads.head_dim)


def _other_half(x_TW: jax.Array, heads: Heads) -> jax.Array:
    """Each channel's partner in the rotation, half a head away."""
    half = heads.head_dim // 2
    back = pltpu.roll(x_TW, half, 1)
    if heads.per_block == 1:
        return back
    lane = lax.broadcasted_iota(jnp.int32, x_TW.shape, 1)
    return jnp.where(lane % heads.head_dim < half, pltpu.roll(x_TW, heads.lanes - half, 1), back)
