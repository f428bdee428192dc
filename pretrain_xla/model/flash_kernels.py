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
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
"""Width of a TPU vector register, and the alignment of a block's columns."""

MAX_TOKENS = {"v4": 1024, "v5e": 8192, "v5p": 8192, "v6e": 8192}
"""By generation: the backward kernel keeps a head's whole sequence in VMEM, of which v4 has 16 MB."""

MAX_SPAN = 1024
"""Tokens of a span: what the compiler sees as straight code, which alone it schedules well, is this times as many keys."""

NEGATIVE = -0.7 * 3.4e38
"""Score of a masked key: finite, since -inf minus -inf is not a number."""


@dataclass(frozen=True)
class Heads:
    """What is attended: the static part of the computation, alike for forward and backward.

    Args:
        num_heads: query heads H; head h reads key/value head h // (H / K).
        num_kv_heads: key/value heads K.
        head_dim: E.
        scale: factor on query-key products, before the cap.
        softcap: bound c on the scores, as c * tanh(score / c); none: no bound.
        query_column: first column of the queries in their array; the same for `key_column`, `value_column`. With one
            fused array passed three times, no copy is made of its parts.
        norm_eps: added to the mean square where queries or keys are normalised.
        block: tokens of a score block's sides; `default_block` unless given.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None = None
    query_column: int = 0
    key_column: int = 0
    value_column: int = 0
    norm_eps: float = 1e-6
    block: int | None = None

    @property
    def lanes(self) -> int:
        """W, columns of a block."""
        return max(self.head_dim, LANES)

    @property
    def per_block(self) -> int:
        """N, heads of a block."""
        return self.lanes // self.head_dim

    @property
    def groups(self) -> int:
        """G, query heads of a key/value head; also query blocks of a key/value block."""
        return self.num_heads // self.num_kv_heads

    @property
    def kv_blocks(self) -> int:
        """Key/value blocks across the columns."""
        return self.num_kv_heads // self.per_block

    @property
    def spread(self) -> bool:
        """Whether both query heads of a block read one and the same key/value head, which is half a block."""
        return self.per_block > 1 and self.groups > 1

    def block_for(self, tokens: int) -> int:
        """Side of a score block."""
        return self.block or default_block(tokens)


def default_block(tokens: int) -> int:
    """Side of a score block: 256, or 128 where that does not divide T.

    Bundles (cycles) of one head at T = 1024, E = 128 in libtpu 0.0.21's schedule for v5e, forward and backward, by side:
    128: 4,920 and 8,933; 256: 3,565 and 7,131; 512: 3,869 and 6,971, where the matrix unit alone needs 7,680.
    """
    return 256 if tokens % 256 == 0 else 128


def span_for(heads: Heads, tokens: int) -> int:
    """Tokens whose score blocks are straight code: a multiple of the block that divides T, of at most `MAX_SPAN`."""
    block = heads.block_for(tokens)
    return max(side for side in range(block, max(block, MAX_SPAN) + 1, block) if tokens % side == 0)


def supports(heads: Heads, tokens: int, chip: str = "v5e") -> str | None:
    """Why the kernels cannot do this on a generation of TPUs (v2 … v6e); none: they can."""
    block = heads.block_for(tokens)
    H, K, E = heads.num_heads, heads.num_kv_heads, heads.head_dim
    if E not in (64, 128, 256):
        return f"heads are {E} wide; the kernel takes 64, 128 and 256"
    if H % K:
        return f"{H} query heads do not divide into {K} groups"
    if K % heads.per_block:
        return f"{K} key/value heads of width {E} do not fill {LANES}-lane blocks: their number must be even"
    if heads.spread and heads.groups % 2:
        return f"{heads.groups} query heads of width {E} for each key/value head: the number must be 1 or even"
    if chip in ("v2", "v3"):
        return f"the compiler takes no bf16 kernels for {chip}"
    longest = MAX_TOKENS.get(chip, MAX_TOKENS["v5e"]) * LANES // heads.lanes
    if tokens > longest:
        return f"{tokens} tokens; the backward kernel holds whole sequences, on {chip} of at most {longest}"
    if tokens % block or block % LANES:
        return f"{tokens} tokens are not a multiple of a block of {block}, or the block is not one of {LANES}"
    if any(column % heads.lanes for column in (heads.query_column, heads.key_column, heads.value_column)):
        return f"queries, keys and values must start at multiples of {heads.lanes} columns"
    return None


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
