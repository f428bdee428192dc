"""The forward kernel of flash attention: softmax(cap(query · key * scale)) · value, scores never leaving VMEM.

A grid step takes one block of query columns (one head, or two of width 64) and a span of its tokens, with the keys and
values of the whole sequence. The span's score blocks are written out as straight code, because the compiler overlaps the
matrix unit with the vector unit only within it; only keys of earlier spans are looped over. Blocks above the diagonal are
never computed. The running maximum, normaliser and sum are those of Milakov & Gimelshein 2018 and Dao et al. 2022.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pretrain_xla.kernels.flash_kernels import (
    LANES,
    NEGATIVE,
    Heads,
    as_column,
    as_row,
    capped,
    check,
    compiler_params,
    cost,
    first_token,
    join,
    only,
    product,
    span_for,
)
from pretrain_xla.kernels.flash_prepare import NOTHING, Preparation, prepare_keys, prepare_rows, whole

State = list[tuple[jax.Array, jax.Array, jax.Array]]
"""For each head of the block: running maximum (T, 1), normaliser (T, 1), unnormalised sum of values (T, W)."""


def forward(
    query_BTF: jax.Array,
    key_BTS: jax.Array,
    value_BTS: jax.Array,
    segments_BT: jax.Array | None,
    heads: Heads,
    preparation: Preparation = NOTHING,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention.

    Args:
        query_BTF: queries, or an array that holds them from column `heads.query_column` on.
        key_BTS: keys, likewise.
        value_BTS: values, likewise.
        segments_BT: number of each token's document, never falling along a row; tokens attend within theirs, and spans of
            tokens with no document in common are skipped. None means all is one document.
        heads: the static part.
        preparation: norms and rotary positions of queries and keys, done in the kernel.
        interpret: run without a TPU.

    Returns:
        out_BTF in the queries' type, and the scores' logsumexp_BCNT in fp32 for `backward`, as (B, H / N, N, T).

    Raises:
        ValueError: `supports` gives a reason.
    """
    B, T, _ = query_BTF.shape
    check(heads, T)
    W, N, G = heads.lanes, heads.per_block, heads.groups
    span = span_for(heads, T)

    def query_columns(first: int = 0) -> pl.BlockSpec:
        return pl.BlockSpec((1, span, W), lambda b, kv, g, s: (b, s, first // W + kv * G + g))

    def key_columns(first: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, T, W), lambda b, kv, g, s: (b, 0, first // W + kv))

    operands = {"query": query_BTF, "key": key_BTS, "value": value_BTS}
    in_specs = [query_columns(heads.query_column), key_columns(heads.key_column), key_columns(heads.value_column)]
    if segments_BT is not None:
        operands["segments"] = segments_BT.astype(jnp.int32)[:, None]
        in_specs.append(pl.BlockSpec((1, 1, T), lambda b, kv, g, s: (b, 0, 0)))
    extra = preparation.operands(heads)
    operands |= extra
    in_specs += [whole(array) for array in extra.values()]
    scratch = {}
    if preparation.keys or heads.spread:
        scratch["prepared_key"] = pltpu.VMEM((T, W), key_BTS.dtype)
    if heads.spread:
        scratch["prepared_value"] = pltpu.VMEM((T, W), value_BTS.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, names=(*operands, "out", "logsumexp", *scratch), heads=heads, tokens=T),
        grid=(B, heads.kv_blocks, G, T // span),
        in_specs=in_specs,
        out_specs=[query_columns(), pl.BlockSpec((1, 1, N, span), lambda b, kv, g, s: (b, kv * G + g, 0, s))],
        out_shape=[
            jax.ShapeDtypeStruct((B, T, heads.num_heads * heads.head_dim), query_BTF.dtype),
            jax.ShapeDtypeStruct((B, heads.num_heads // N, N, T), jnp.float32),
        ],
        scratch_shapes=list(scratch.values()),
        compiler_params=compiler_params(heads, T, query_BTF.dtype.itemsize, 4, 10 + 4 * preparation.tables),
        cost_estimate=cost(heads, B, T, query_BTF.dtype.itemsize, backward=False),
        interpret=interpret,
        name="flash_attention_forward",
    )(*operands.values())


def _kernel(*given: Any, names: tuple[str, ...], heads: Heads, tokens: int) -> None:
    refs = dict(zip(names, given, strict=True))
    segments_ref = refs["segments"].at[0] if "segments" in refs else None
    block, span = heads.block_for(tokens), span_for(heads, tokens)
    group, span_index = pl.program_id(2), pl.program_id(3)
    before = span_index * span
    first_span: Any = 0
    if segments_ref is not None and span < tokens:
        # Earlier spans hold nothing for this one before the document of its first token begins.
        own = segments_ref[:, pl.ds(pl.multiple_of(before, LANES), LANES)][:, :1]
        first_span = first_token(segments_ref[...], own) // span
    key_ref, value_ref = prepare_keys(refs, heads, tokens, group, span_index)

    for row in range(0, span, block):
        rows = pl.ds(pl.multiple_of(before + row, block), block)
        query = prepare_rows(refs, "query", refs["query"][0, pl.ds(row, block)], rows, heads)
        queries = [only(query, n, heads) for n in range(heads.per_block)]
        segment = None if segments_ref is None else as_column(segments_ref[:, rows])

        def step(
            first: Any, state: State, diagonal: bool = False, queries: Any = queries, segment: Any = segment
        ) -> State:
            columns = pl.ds(pl.multiple_of(first, block), block)
            mask = None
            if diagonal:
                mask = lax.broadcasted_iota(jnp.int32, (block, block), 0) >= (
                    lax.broadcasted_iota(jnp.int32, (block, block), 1)
                )
            if segments_ref is not None:
                same = segment == segments_ref[:, columns]
                mask = same if mask is None else mask & same
            key, value = key_ref[columns], value_ref[columns]
            return [_absorb(query, key, value, mask, one, heads) for query, one in zip(queries, state, strict=True)]

        def earlier(j: Any, state: State, step: Any = step) -> State:
            for column in range(0, span, block):
                state = step(j * span + column, state)
            return state

        # The diagonal first: every token sees itself, so that no later maximum is that of masked scores alone.
        state = step(before + row, _empty(heads, block), diagonal=True)
        for column in range(0, row, block):
            state = step(before + column, state)
        if span < tokens:
            state = lax.fori_loop(first_span, span_index, earlier, state)
        out = join([total / normaliser for _, normaliser, total in state], heads)
        refs["out"][0, pl.ds(row, block)] = out.astype(refs["out"].dtype)
        for n, (maximum, normaliser, _) in enumerate(state):
            refs["logsumexp"][0, 0, n : n + 1, pl.ds(row, block)] = as_row(maximum + jnp.log(normaliser))


def _empty(heads: Heads, block: int) -> State:
    column = functools.partial(jnp.full, (block, 1), dtype=jnp.float32)
    return [
        (column(NEGATIVE), column(0.0), jnp.zeros((block, heads.lanes), jnp.float32)) for _ in range(heads.per_block)
    ]


def _absorb(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    state: tuple[jax.Array, jax.Array, jax.Array],
    heads: Heads,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The state of one head after one more block of keys."""
    maximum, normaliser, total = state
    scores, _ = capped(product(query, key, (1, 1)), heads)
    if mask is not None:
        scores = jnp.where(mask, scores, NEGATIVE)
    new_maximum = jnp.maximum(maximum, scores.max(axis=1, keepdims=True))
    weights = jnp.exp(scores - new_maximum)
    fade = jnp.exp(maximum - new_maximum)
    return (
        new_maximum,
        normaliser * fade + weights.sum(axis=1, keepdims=True),
        total * fade + product(weights.astype(value.dtype), value, (1, 0)),
    )
