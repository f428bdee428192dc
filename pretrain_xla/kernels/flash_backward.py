"""The backward kernel of flash attention: gradients of queries, keys and values in one pass over the scores.

A grid step takes one block of query columns (one head, or two of width 64) with the whole sequence in VMEM, so that each
block of scores is computed again once and serves all three gradients: five matrix products, where a kernel for queries and
one for keys and values would take seven. Scores are transposed, keys by queries: two of the three products that sum over
tokens then read them as they lie, and the normaliser of a query, a row in memory, is a row here.

The three gradients are three arrays. One fused array would need the kernel to copy its blocks to HBM by hand, and the
caller would gain nothing: it multiplies each gradient by its own weight.
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
    each_block,
    first_token,
    fold,
    join,
    only,
    product,
    span_for,
)
from pretrain_xla.kernels.flash_prepare import (
    NOTHING,
    Preparation,
    prepare_backward,
    prepare_keys,
    prepare_rows,
    tables_of,
    weight_of,
    whole,
)


def backward(
    query_BTF: jax.Array,
    key_BTS: jax.Array,
    value_BTS: jax.Array,
    segments_BT: jax.Array | None,
    out_BTF: jax.Array,
    logsumexp_BCNT: jax.Array,
    dout_BTF: jax.Array,
    heads: Heads,
    preparation: Preparation = NOTHING,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Gradients of `forward`.

    Args:
        query_BTF: as given to `forward`; so are those not named here.
        out_BTF: what it returned.
        logsumexp_BCNT: what it returned.
        dout_BTF: gradient of `out_BTF`.

    Returns:
        Gradients (B, T, H * E), (B, T, K * E), (B, T, K * E) in their inputs' types; and of the norms' weights, (E,) in
        fp32, None for a norm that is None.

    Raises:
        ValueError: `supports` gives a reason.
    """
    B, T, _ = query_BTF.shape
    check(heads, T)
    W, N, G = heads.lanes, heads.per_block, heads.groups

    def query_columns(first: int = 0) -> pl.BlockSpec:
        return pl.BlockSpec((1, T, W), lambda b, kv, g: (b, 0, first // W + kv * G + g))

    def key_columns(first: int = 0) -> pl.BlockSpec:
        return pl.BlockSpec((1, T, W), lambda b, kv, g: (b, 0, first // W + kv))

    operands = {
        "query": query_BTF,
        "key": key_BTS,
        "value": value_BTS,
        "out": out_BTF,
        "logsumexp": logsumexp_BCNT,
        "dout": dout_BTF,
    }
    in_specs = [
        query_columns(heads.query_column),
        key_columns(heads.key_column),
        key_columns(heads.value_column),
        query_columns(),
        pl.BlockSpec((1, 1, N, T), lambda b, kv, g: (b, kv * G + g, 0, 0)),
        query_columns(),
    ]
    if segments_BT is not None:
        operands["segments"] = segments_BT.astype(jnp.int32)[:, None]
        in_specs.append(pl.BlockSpec((1, 1, T), lambda b, kv, g: (b, 0, 0)))
    extra = preparation.operands(heads)
    operands |= extra
    in_specs += [whole(array) for array in extra.values()]

    key_width = heads.num_kv_heads * heads.head_dim
    outputs = {
        "dquery": (query_columns(), jax.ShapeDtypeStruct(out_BTF.shape, query_BTF.dtype)),
        "dkey": (key_columns(), jax.ShapeDtypeStruct((B, T, key_width), key_BTS.dtype)),
        "dvalue": (key_columns(), jax.ShapeDtypeStruct((B, T, key_width), value_BTS.dtype)),
    }
    if preparation.query_norm is not None:
        spec = pl.BlockSpec((1, 1, 1, W), lambda b, kv, g: (b, kv * G + g, 0, 0))
        outputs["dquery_norm"] = spec, jax.ShapeDtypeStruct((B, heads.kv_blocks * G, 1, W), jnp.float32)
    if preparation.key_norm is not None:
        spec = pl.BlockSpec((1, 1, 1, W), lambda b, kv, g: (b, kv, 0, 0))
        outputs["dkey_norm"] = spec, jax.ShapeDtypeStruct((B, heads.kv_blocks, 1, W), jnp.float32)

    scratch = {f"d{name}_sum": pltpu.VMEM((T, W), jnp.float32) for name in ("query", "key", "value")}
    scratch["delta"] = pltpu.VMEM((N, T), jnp.float32)
    if preparation.queries:
        scratch["prepared_query"] = pltpu.VMEM((T, W), query_BTF.dtype)
    if preparation.keys or heads.spread:
        scratch["prepared_key"] = pltpu.VMEM((T, W), key_BTS.dtype)
    if heads.spread:
        scratch["prepared_value"] = pltpu.VMEM((T, W), value_BTS.dtype)

    results = pl.pallas_call(
        functools.partial(_kernel, names=(*operands, *outputs, *scratch), heads=heads, tokens=T),
        grid=(B, heads.kv_blocks, G),
        in_specs=in_specs,
        out_specs=[spec for spec, _ in outputs.values()],
        out_shape=[shape for _, shape in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=compiler_params(heads, T, query_BTF.dtype.itemsize, 3, 24 + 4 * preparation.tables),
        cost_estimate=cost(heads, B, T, query_BTF.dtype.itemsize, backward=True),
        interpret=interpret,
        name="flash_attention_backward",
    )(*operands.values())
    named = dict(zip(outputs, results, strict=True))
    dweights = [
        named[name].reshape(-1, heads.head_dim).sum(axis=0) if name in named else None
        for name in ("dquery_norm", "dkey_norm")
    ]
    return named["dquery"], named["dkey"], named["dvalue"], dweights[0], dweights[1]


def _kernel(*given: Any, names: tuple[str, ...], heads: Heads, tokens: int) -> None:
    refs = dict(zip(names, given, strict=True))
    segments_ref = refs["segments"].at[0] if "segments" in refs else None
    raw_query_ref, out_ref, dout_ref = (refs[name].at[0] for name in ("query", "out", "dout"))
    logsumexp_ref, delta_ref = refs["logsumexp"].at[0, 0], refs["delta"]
    dquery_sum, dkey_sum, dvalue_sum = (refs[f"d{name}_sum"] for name in ("query", "key", "value"))
    block, span = heads.block_for(tokens), span_for(heads, tokens)
    group = pl.program_id(2)
    half = group // (heads.groups // 2) if heads.spread else None

    @pl.when(group == 0)
    def _() -> None:
        dkey_sum[...] = jnp.zeros_like(dkey_sum)
        dvalue_sum[...] = jnp.zeros_like(dvalue_sum)

    dquery_sum[...] = jnp.zeros_like(dquery_sum)
    key_ref, value_ref = prepare_keys(refs, heads, tokens, group)
    query_ref = refs.get("prepared_query", raw_query_ref)

    def before(first: Any) -> None:
        """delta, a query's sum of dout * out, turned into a row for each head of the block; and the queries."""
        rows = pl.ds(first, block)
        both = dout_ref[rows].astype(jnp.float32) * out_ref[rows].astype(jnp.float32)
        for n in range(heads.per_block):
            delta_ref[n : n + 1, rows] = as_row(only(both, n, heads).sum(axis=1, keepdims=True))
        if "prepared_query" in refs:
            query_ref[rows] = prepare_rows(refs, "query", raw_query_ref[rows], rows, heads)

    each_block(tokens, heads, before)

    def pair(first_query: Any, first_key: Any, key: Any, value: Any, key_segment: Any, diagonal: bool, n: int) -> Any:
        rows = pl.ds(first_query, block)
        query, dout = query_ref[rows], dout_ref[rows]
        scores, bent = capped(product(key, query, (1, 1)), heads)
        mask = None
        if diagonal:
            mask = lax.broadcasted_iota(jnp.int32, (block, block), 0) <= lax.broadcasted_iota(
                jnp.int32, (block, block), 1
            )
        if segments_ref is not None:
            same = key_segment == segments_ref[:, rows]
            mask = same if mask is None else mask & same
        if mask is not None:
            scores = jnp.where(mask, scores, NEGATIVE)
        weights = jnp.exp(scores - logsumexp_ref[n : n + 1, rows])
        dvalue = product(weights.astype(dout.dtype), dout, (1, 0))
        dscores = weights * (product(value, dout, (1, 1)) - delta_ref[n : n + 1, rows])
        if bent is not None:
            dscores = dscores * (1.0 - bent * bent)
        dscores = dscores.astype(query.dtype)
        dquery_sum[rows] += product(dscores, key, (0, 0))
        return product(dscores, query, (1, 0)), dvalue

    def spans(query_span: Any, key_span: Any, diagonal: bool) -> None:
        for column in range(0, span, block):
            first_key = pl.multiple_of(key_span + column, block)
            rows = pl.ds(first_key, block)
            key_segment = None if segments_ref is None else as_column(segments_ref[:, rows])
            dkeys, dvalues = [], []
            for n in range(heads.per_block):
                key, value = only(key_ref[rows], n, heads), only(value_ref[rows], n, heads)
                dkey = dvalue = jnp.zeros((block, heads.lanes), jnp.float32)
                for row in range(column if diagonal else 0, span, block):
                    first_query = pl.multiple_of(query_span + row, block)
                    more = pair(first_query, first_key, key, value, key_segment, diagonal and row == column, n)
                    dkey, dvalue = dkey + more[0], dvalue + more[1]
                dkeys.append(dkey)
                dvalues.append(dvalue)
            dkey_sum[rows] += fold(join(dkeys, heads), half, heads)
            dvalue_sum[rows] += fold(join(dvalues, heads), half, heads)

    if span == tokens:
        spans(0, 0, diagonal=True)
    else:

        def key_span(j: Any, _: Any) -> Any:
            spans(j * span, j * span, diagonal=True)
            end: Any = tokens // span
            if segments_ref is not None:
                # Later spans hold nothing for this one after the document of its last token has ended.
                last = pl.ds(pl.multiple_of((j + 1) * span - LANES, LANES), LANES)
                end = pl.cdiv(first_token(segments_ref[...], segments_ref[:, last][:, -1:] + 1), span)
            lax.fori_loop(j + 1, end, lambda i, _: spans(i * span, j * span, diagonal=False), None)

        lax.fori_loop(0, tokens // span, key_span, None)

    _finish(refs, "query", heads, tokens)

    @pl.when(group == heads.groups - 1)
    def _() -> None:
        _finish(refs, "key", heads, tokens)
        refs["dvalue"][0] = dvalue_sum[...].astype(refs["dvalue"].dtype)


def _finish(refs: dict[str, Any], name: str, heads: Heads, tokens: int) -> None:
    """From the summed gradient of queries or keys to that of their projection and of their norm's weight."""
    dweight_ref = refs[f"d{name}_norm"].at[0, 0] if f"d{name}_norm" in refs else None
    if dweight_ref is not None:
        dweight_ref[...] = jnp.zeros_like(dweight_ref)

    def one_block(first: Any) -> None:
        rows = pl.ds(first, heads.block_for(tokens))
        dx, x = refs[f"d{name}_sum"][rows] * heads.scale, refs[name][0, rows]
        dx, dweight = prepare_backward(dx, x, weight_of(refs, name), tables_of(refs, rows), heads)
        refs[f"d{name}"][0, rows] = dx.astype(refs[f"d{name}"].dtype)
        if dweight_ref is not None:
            dweight_ref[...] += dweight

    each_block(tokens, heads, one_block)
