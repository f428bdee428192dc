"""Figures as a healthy v5e-8 would give them, which a test then spoils."""

from __future__ import annotations

from typing import Any

from pretrain_xla.preflight.topology import resolve_topology
from pretrain_xla.runtime.chips import CHIPS, GIB

V5E, V5E_8 = CHIPS["v5e"], resolve_topology("v5e-8")


def devices(**changes: Any) -> dict[str, Any]:
    whole = {
        "name": "TPU v5e (v5litepod-8)",
        "kind": "TPU",
        "count": 8,
        "local": 8,
        "processes": 1,
        "hbm_used": [GIB // 8] * 8,
        "hbm_total": [V5E.usable_hbm] * 8,
    }
    return whole | changes


def rates(peak: float, share: float = 0.85, **changes: Any) -> dict[str, Any]:
    """Of a matrix product or a pass."""
    return {
        "rate": share * peak,
        "errors": [0.0] * 8,
        "side": 4096,
        "dtype": "bfloat16",
        "bytes": 8e9,
        "passes": 4,
    } | changes


def collective(**changes: Any) -> dict[str, Any]:
    return {"devices": 8, "bytes": 2**26, "seconds": 1.5e-3, "errors": [0.0]} | changes


def kernels(**changes: float) -> dict[str, Any]:
    errors: dict[str, list[float]] = {name: [1e-3] * 8 for name in ("result", "gradient of queries")}
    return {
        "what": "the kernel for v5e",
        "tolerance": 2e-2,
        "errors": errors | {k: [1e-3, v] for k, v in changes.items()},
    }


def steps(**changes: Any) -> dict[str, Any]:
    whole = {
        "steps": 30,
        "devices": 8,
        "mesh": {"data": 8, "fsdp": 1, "tensor": 1},
        "parameters": 124_000_000,
        "tokens_per_step": 8192,
        "compile_seconds": 40.0,
        "step_seconds": 0.05,
        "tokens_per_second": 163_840.0,
        "mfu": 0.4,
        "memory_bytes": 2**33,
        "losses": [10.8, 10.7],
        "graph_events": [],
    }
    return whole | changes
