"""Flash attention for TPUs in the layout of the projections: what the forward and the backward kernel share.

The heads stay side by side in the last dimension, (B, T, heads * E), as a linear layer writes them and the output
projection reads them, and a kernel's blocks are its columns. The kernel that comes with JAX wants (B, H, T, E): XLA then
transposes queries, keys, values, the result and all their gradients in HBM, and pads heads of width 64 to the 128 lanes
of a register, which doubles the traffic. Here a block is as wide as a head, but at least 128 lanes: with E = 64 it holds
two heads. Masking the lanes of one of them and multiplying all 128 costs the matrix unit what padding would.

Shapes: B batch, T tokens, H query heads, K key/value heads, G = H / K, E head width, W lanes of a block, N = W / E heads
of a block, F = H * E columns of queries, S = K * E columns of keys, C query blocks across the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pretrain_xla.kernels.flash_limits import LANES, Heads, span_for, supports

NEGATIVE = -0.7 * 3.4e38
"""Score of a masked key: finite, since -inf minus -inf is not a number."""


def each_block(tokens: int, heads: Heads, body: Callable[[Any], None]) -> None:
    """Call `body` with the first token of each block: a span's as straight code, and a loop over spans."""
    block, span = heads.block_for(tokens), span_for(heads, tokens)

    def one_span(index: Any, _: None) -> None:
        for row in range(0, span, block):
            body(pl.multiple_of(index * span + row, block))

    if span == tokens:
        one_span(0, None)
    else:
        lax.fori_loop(0, tokens // span, one_span, None)


def check(heads: Heads, tokens: int) -> None:
    """Raise ValueError with the reason when the kernels cannot do this."""
    reason = supports(heads, tokens)
    if reason is not None:
        raise ValueError(f"flash attention: {reason}. Use plain attention.")


def cost(heads: Heads, batch: int, tokens: int, itemsize: int, *, backward: bool) -> pl.CostEstimate:
    """What a kernel does: operations, exponentials and tangents, and bytes between HBM and VMEM.

    Operations are those of the matrix unit: whole blocks on the diagonal, all lanes of a block (twice the useful ones at
    E = 64), and in the backward the scores once more.
    """
    block, width = heads.block_for(tokens), itemsize * heads.head_dim
    steps = tokens // block
    scores = batch * heads.num_heads * (steps * (steps + 1) // 2) * block**2
    query_arrays, key_arrays, products = (4, 4, 5) if backward else (2, 2, 2)
    per_token = heads.num_heads * (width * query_arrays + 4) + heads.num_kv_heads * width * key_arrays
    return pl.CostEstimate(
        flops=products * 2 * heads.lanes * scores,
        transcendentals=scores if heads.softcap is None else 2 * scores,
        bytes_accessed=batch * tokens * per_token,
    )


def compiler_params(heads: Heads, tokens: int, itemsize: int, grid: int, buffers: int) -> pltpu.CompilerParams:
    """Which grid dimensions are independent, and a bound on VMEM: XLA keeps all of it free while the kernel runs.

    `buffers` are the (T, W) arrays of the kernel, twice where a block is fetched ahead; 4 MB are for spilled registers,
    of which libtpu 0.0.21 needs at most 2. A generous bound costs HBM traffic around the kernels (docs/LOG.md).
    """
    needed = 4 * 2**20 + buffers * tokens * heads.lanes * itemsize
    semantics: list[Any] = ["parallel", "parallel", "arbitrary", "arbitrary"]
    return pltpu.CompilerParams(dimension_semantics=semantics[:grid], vmem_limit_bytes=needed)


@contextmanager
def mosaic_version(version: int = 7) -> Iterator[None]:
    """Emit kernels in an older Mosaic version while tracing and lowering.

    JAX 0.7.1 writes version 8, which the libtpu 0.0.21 that torch_xla 2.9 pins refuses.
    """
    with mock.patch("jax._src.tpu_custom_call.get_ir_version", return_value=version):
        yield


def product(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Matrix product over one dimension of each, accumulated in fp32; fp32 operands are multiplied as fp32."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def own_lanes(head: Any, heads: Heads, rows: int) -> jax.Array:
    """Mask (rows, W) of one head's lanes."""
    return lax.broadcasted_iota(jnp.int32, (rows, heads.lanes), 1) // heads.head_dim == head


def only(x_TW: jax.Array, head: int, heads: Heads) -> jax.Array:
    """Zero in the lanes of the other head; x itself where a block holds one."""
    if heads.per_block == 1:
        return x_TW
    # Selected in fp32: before v6e the vector unit has no 16-bit lanes.
    kept = jnp.where(own_lanes(head, heads, x_TW.shape[0]), x_TW.astype(jnp.float32), 0.0)
    return kept.astype(x_TW.dtype)


def join(parts: list[jax.Array], heads: Heads) -> jax.Array:
    """Each head's own lanes of its part."""
    if heads.per_block == 1:
        return parts[0]
    # Parts may be columns (T, 1).
    return jnp.where(own_lanes(0, heads, parts[0].shape[0]), parts[0], parts[1])


def duplicate(x_TW: jax.Array, half: Any, heads: Heads) -> jax.Array:
    """One of a block's two key/value heads in both halves, for the two query heads that read it; x where half is None."""
    if half is None:
        return x_TW
    x = x_TW.astype(jnp.float32)
    return jnp.where(own_lanes(half, heads, x.shape[0]), x, pltpu.roll(x, heads.head_dim, 1)).astype(x_TW.dtype)


def fold(dx_TW: jax.Array, half: Any, heads: Heads) -> jax.Array:
    """Transpose of `duplicate`: the sum of both halves in one; dx itself where nothing was duplicated."""
    if half is None:
        return dx_TW
    both = dx_TW + pltpu.roll(dx_TW, heads.head_dim, 1)
    return jnp.where(own_lanes(half, heads, dx_TW.shape[0]), both, 0.0)


def capped(scores: jax.Array, heads: Heads) -> tuple[jax.Array, jax.Array | None]:
    """Scaled and capped scores, and the tanh inside the cap, which its derivative needs."""
    if heads.softcap is None:
        return scores * heads.scale, None
    bent = jnp.tanh(scores * (heads.scale / heads.softcap))
    return bent * heads.softcap, bent


def first_token(segments_1T: jax.Array, segment_11: jax.Array) -> jax.Array:
    """The number of tokens in documents before a given one. In fp32, which is exact here: sums of integers have no lowering."""
    return (segments_1T < segment_11).astype(jnp.float32).sum().astype(jnp.int32)


def as_column(row_1T: jax.Array) -> jax.Array:
    """(1, T) → (T, 1). Transposed as whole registers, the only way that lanes become sublanes."""
    return jnp.transpose(jnp.broadcast_to(row_1T, (LANES, row_1T.shape[1])))[:, :1]


def as_row(column_T1: jax.Array) -> jax.Array:
    """(T, 1) → (1, T)."""
    return jnp.transpose(jnp.broadcast_to(column_T1, (column_T1.shape[0], LANES)))[:1]
