"""The TPU kernels, interpreted on the CPU, against attention written out; and compiled by the TPU compiler."""

import os
import subprocess
import sys
from typing import Any

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from pretrain_xla.kernels import flash_limits  # noqa: E402
from pretrain_xla.kernels.flash_backward import backward  # noqa: E402
from pretrain_xla.kernels.flash_forward import forward  # noqa: E402
from pretrain_xla.kernels.flash_kernels import Heads, cost, supports  # noqa: E402
from pretrain_xla.kernels.flash_prepare import Preparation  # noqa: E402

B = 2


def heads(**changes: Any) -> Heads:
    return Heads(**({"num_heads": 2, "num_kv_heads": 2, "head_dim": 64, "scale": 0.2, "block": 128} | changes))


def noise(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def arrays(h: Heads, T: int, dtype: Any = jnp.float32) -> tuple[Any, Any, Any, Any]:
    """Queries, keys, values, and the gradient of the result."""
    query, key = h.num_heads * h.head_dim, h.num_kv_heads * h.head_dim
    return tuple(noise(B, T, width, seed=i, dtype=dtype) for i, width in enumerate((query, key, key, query)))  # type: ignore


def reference(query_BTF: Any, key_BTS: Any, value_BTS: Any, segments_BT: Any, h: Heads) -> Any:
    """Attention as its formula, every score in memory."""
    T = query_BTF.shape[1]
    query, key, value = (
        jnp.asarray(x, jnp.float32).reshape(B, T, -1, h.head_dim) for x in (query_BTF, key_BTS, value_BTS)
    )
    key, value = (jnp.repeat(x, h.groups, axis=2) for x in (key, value))
    scores = jnp.einsum("bthe,bshe->bhts", query, key, precision="highest") * h.scale
    if h.softcap is not None:
        scores = h.softcap * jnp.tanh(scores / h.softcap)
    seen = jnp.tril(jnp.ones((T, T), bool))[None]
    if segments_BT is not None:
        seen = seen & (segments_BT[:, :, None] == segments_BT[:, None, :])
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshe->bthe", weights, value, precision="highest").reshape(B, T, -1)


def documents(T: int) -> Any:
    """Borders off the blocks' edges; the second row's last document is longer than a block."""
    ends = np.array([[7, 130, 140, T - 1], [100, 101, 102, 103]])
    return jnp.asarray((np.arange(T)[None, :, None] >= ends[:, None, :]).sum(-1))


def assert_near(actual: Any, wanted: Any, tolerance: float) -> None:
    actual, wanted = np.asarray(actual, np.float32), np.asarray(wanted, np.float32)
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def fast(function: Any) -> Any:
    """Compiled without optimisation, which would take longer than the computation."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function, compiler_options=options)


def both_ways(h: Heads, segments: Any, *arrays: Any, **prepared: Any) -> list[Any]:
    """The kernels' result and gradients, those of the norms' weights last."""

    @fast
    def run(query: Any, key: Any, value: Any, dout: Any) -> Any:
        rest = (h, Preparation(**prepared))
        out, logsumexp = forward(query, key, value, segments, *rest, interpret=True)
        return out, *backward(query, key, value, segments, out, logsumexp, dout, *rest, interpret=True)

    return [x for x in run(*arrays) if x is not None]


def reference_both_ways(h: Heads, segments: Any, *arrays: Any, **prepared: Any) -> list[Any]:
    """The reference's, in fp32."""
    tables = {name: prepared.pop(name) for name in ("cos", "sin") if name in prepared}

    @fast
    def run(query: Any, key: Any, value: Any, dout: Any) -> Any:
        def attend(query: Any, key: Any, value: Any, weights: Any) -> Any:
            query, key = (
                reference_prepared(x, h, weights.get(name), **tables)
                for x, name in ((query, "query_norm"), (key, "key_norm"))
            )
            return reference(query, key, value, segments, h)

        out, transpose = jax.vjp(attend, query, key, value, prepared)
        *gradients, weights = transpose(dout)
        return out, *gradients, *(weights[name] for name in ("query_norm", "key_norm") if name in weights)

    return list(run(*(x.astype(jnp.float32) for x in arrays)))


def reference_prepared(x_BTF: Any, h: Heads, weight: Any, cos: Any = None, sin: Any = None) -> Any:
    """`norms.RMSNorm` and `positions.rotate`, in JAX."""
    x = x_BTF.reshape(*x_BTF.shape[:2], -1, h.head_dim)
    if weight is not None:
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + h.norm_eps) * weight
    if cos is not None:
        first, second = jnp.split(x, 2, axis=-1)
        cos, sin = cos[:, None], sin[:, None]
        x = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return x.reshape(x_BTF.shape)


def preparation(T: int, E: int, *names: str) -> dict[str, Any]:
    """Some of the tables and weights, none of them a number that would hide a mistake."""
    angles = np.outer(np.arange(T), 1 / 100 ** (np.arange(0, E, 2) / E))
    everything = {
        "cos": jnp.asarray(np.cos(angles), jnp.float32),
        "sin": jnp.asarray(np.sin(angles), jnp.float32),
        "query_norm": 1 + 0.3 * noise(E, seed=7),
        "key_norm": 1 + 0.3 * noise(E, seed=8),
    }
    return {name: everything[name] for name in names}


CASES = {
    "width_64": (heads(), 256, False),
    "width_128": (heads(num_heads=1, num_kv_heads=1, head_dim=128), 384, False),
    "width_256": (heads(num_heads=1, num_kv_heads=1, head_dim=256), 256, False),
    "default_block": (heads(block=None), 512, False),
    "two_spans": (heads(num_heads=1, num_kv_heads=1, head_dim=128), 512, False),
    "three_spans": (heads(block=256), 768, True),
    "groups_128": (heads(num_heads=6, head_dim=128), 128, False),
    "groups_64": (heads(num_heads=8), 128, False),
    "softcap": (heads(softcap=1.5), 256, False),
    "segments_64": (heads(num_heads=4, num_kv_heads=4), 256, True),
    "everything": (heads(num_heads=8, softcap=2.0), 256, True),
}


@pytest.mark.parametrize("case", CASES)
def test_is_attention_and_its_gradient(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_limits, "MAX_SPAN", 256)
    h, T, segmented = CASES[case]
    segments = documents(T) if segmented else None
    given = arrays(h, T)
    for actual, wanted in zip(both_ways(h, segments, *given), reference_both_ways(h, segments, *given), strict=True):
        assert_near(actual, wanted, 1e-5)


def test_skips_spans_with_no_document_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_limits, "MAX_SPAN", 128)
    h, T = heads(num_heads=1, num_kv_heads=1, head_dim=128), 256
    segments = jnp.asarray(np.arange(T)[None] >= np.array([[128], [250]]))
    given = arrays(h, T)
    # No number times zero gets rid of a NaN: what it does not reach was not looked at.
    poisoned = [x.at[0, :128].set(jnp.nan) for x in given]
    wanted = reference_both_ways(h, segments, *given)
    for actual, clean in zip(both_ways(h, segments, *poisoned), wanted, strict=True):
        assert_near(actual[0, 128:], clean[0, 128:], 1e-5)
        assert_near(actual[1], clean[1], 1e-5)


ALL = ("cos", "sin", "query_norm", "key_norm")
PREPARED_CASES = {
    "width_128": (heads(num_heads=1, num_kv_heads=1, head_dim=128), 256, ALL),
    "width_64": (heads(), 128, ALL),
    "groups_128": (heads(num_heads=4, head_dim=128, softcap=2.0), 128, ALL),
    "groups_64": (heads(num_heads=8, norm_eps=0.1), 128, ALL),
    "two_spans": (heads(num_heads=1, num_kv_heads=1, head_dim=128), 512, ALL),
    "rotary": (heads(), 128, ("cos", "sin")),
    "norms": (heads(head_dim=128), 128, ("query_norm", "key_norm")),
    "query_norm": (heads(head_dim=128), 128, ("query_norm",)),
}


@pytest.mark.parametrize("case", PREPARED_CASES)
def test_prepares_queries_and_keys(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_limits, "MAX_SPAN", 256)
    h, T, names = PREPARED_CASES[case]
    given, prepared = arrays(h, T), preparation(T, h.head_dim, *names)
    actual, wanted = both_ways(h, None, *given, **prepared), reference_both_ways(h, None, *given, **prepared)
    assert len(actual) == len(wanted) == 4 + sum("norm" in name for name in names)
    for one, other in zip(actual, wanted, strict=True):
        assert_near(one, other, 1e-5)


def test_in_bfloat16() -> None:
    given = arrays(heads(), 128, jnp.bfloat16)
    for actual, wanted in zip(
        both_ways(heads(), None, *given), reference_both_ways(heads(), None, *given), strict=True
    ):
        assert actual.dtype == jnp.bfloat16
        assert_near(actual, wanted, 0.02)


def test_reads_a_fused_array() -> None:
    parts, fused = heads(num_heads=4), heads(num_heads=4, key_column=256, value_column=384)
    query, key, value, dout = arrays(parts, 128)
    together = jnp.concatenate((query, key, value), axis=-1)
    apart = both_ways(parts, None, query, key, value, dout)
    joint = both_ways(fused, None, together, together, together, dout)
    for one, other in zip(apart, joint, strict=True):
        assert (one == other).all()


def test_future_tokens_change_nothing_before_them() -> None:
    h, T, at = heads(), 384, 200
    run = fast(lambda *qkv: forward(*qkv, None, h, interpret=True)[0])
    inputs = arrays(h, T)[:3]
    out, changed = run(*inputs), run(*(x.at[:, at].add(3.0) for x in inputs))
    assert (out[:, :at] == changed[:, :at]).all()
    assert not np.allclose(out[:, at:], changed[:, at:])


@pytest.mark.parametrize(
    ("changes", "T", "reason"),
    [
        ({}, 256, None),
        ({"num_heads": 25, "num_kv_heads": 25}, 1024, "must be even"),
        ({"num_heads": 6}, 256, "1 or even"),
        ({"num_heads": 3}, 256, "do not divide"),
        ({"head_dim": 80}, 256, "80 wide"),
        ({}, 200, "multiple of a block"),
        ({"block": 64}, 256, "multiple of a block"),
        ({}, 16384, "at most 8192"),
        ({"key_column": 64}, 256, "start at multiples of 128"),
    ],
)
def test_says_what_it_cannot_do(changes: dict[str, Any], T: int, reason: str | None) -> None:
    h = heads(**changes)
    if reason is None:
        assert supports(h, T) is None
        return
    assert reason in (supports(h, T) or "")
    with pytest.raises(ValueError, match=reason):
        forward(*arrays(h, T)[:3], None, h, interpret=True)


def test_refuses_chips_that_cannot() -> None:
    assert "no bf16" in (supports(heads(), 256, "v3") or "")
    assert supports(heads(), 8192, "v6e") is None
    assert "at most 1024" in (supports(heads(), 8192, "v4") or "")


def test_cost_counts_blocks() -> None:
    h = heads(num_heads=4, head_dim=128)
    blocks = B * 4 * 3 * 128**2  # batch, heads, two blocks on the diagonal and one below
    forth, back = (cost(h, B, 256, 2, backward=which) for which in (False, True))
    assert (forth.flops, back.flops) == (2 * 2 * 128 * blocks, 5 * 2 * 128 * blocks)
    assert forth.transcendentals == back.transcendentals == blocks
    assert forth.bytes_accessed == B * 256 * (2 * 2 * 128 * (4 + 2) + 4 * 4)
    assert back.bytes_accessed == B * 256 * (4 * 2 * 128 * (4 + 2) + 4 * 4)


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from pretrain_xla.kernels.flash_backward import backward
from pretrain_xla.kernels.flash_forward import forward
from pretrain_xla.kernels.flash_kernels import Heads, mosaic_version

heads = Heads(num_heads=4, num_kv_heads=2, head_dim=64, scale=0.125, softcap=30.0)
chip = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", "tpu").devices[0])
query, key = (jax.ShapeDtypeStruct((1, 256, width), jnp.bfloat16, sharding=chip) for width in (256, 128))
segments = jax.ShapeDtypeStruct((1, 256), jnp.int32, sharding=chip)

def both(query, key, value, segments, dout):
    out, logsumexp = forward(query, key, value, segments, heads)
    return backward(query, key, value, segments, out, logsumexp, dout, heads)

with mosaic_version():
    traced = jax.jit(both).trace(query, key, key, segments, query)
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
print(text.count('custom_call_target="tpu_custom_call"'))
"""


def test_the_tpu_compiler_takes_it() -> None:
    pytest.importorskip("libtpu")
    # In its own process: this one's JAX has started without these. No chip is used, so that a lock on one is no matter.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["2"]
