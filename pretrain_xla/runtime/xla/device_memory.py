"""HBM of this host's TPU devices, asked of libtpu itself.

torch_xla answers only where each device has a process of its own: under SPMD it raises "MemoryInfo not supported for SPMD
virtual device", and it takes no other device's name. libtpu serves its figures on a local port, which `tpu_info` (it comes with
`torch_xla[tpu]`) can read.
"""

from __future__ import annotations

import dataclasses
import os

SECONDS = 1.0
"""Deadline of a request to a server on this host."""

PORT = "8431"
"""libtpu's default; TPU_RUNTIME_METRICS_PORTS names others."""

_USED, _TOTAL = "tpu.runtime.hbm.memory.usage.bytes", "tpu.runtime.hbm.memory.total.bytes"


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device's HBM: allocated now, and in all."""

    used: int
    total: int


def tpu_memory() -> list[DeviceMemory] | None:
    """The HBM of each TPU device of this host, in their order. None means that libtpu does not say: no error of a run."""
    try:
        import grpc
        from tpu_info.proto import tpu_metric_service_pb2 as messages
        from tpu_info.proto import tpu_metric_service_pb2_grpc as services
    except ImportError:
        return None
    port = os.environ.get("TPU_RUNTIME_METRICS_PORTS", PORT).split(",")[0]
    values: dict[str, dict[int, int]] = {}
    # libtpu's server takes clients of its own host only, and no plain ones.
    with grpc.secure_channel(f"localhost:{port}", grpc.local_channel_credentials()) as channel:
        service = services.RuntimeMetricServiceStub(channel)
        try:
            for name in (_USED, _TOTAL):
                answer = service.GetRuntimeMetric(messages.MetricRequest(metric_name=name), timeout=SECONDS)
                values[name] = {one.attribute.value.int_attr: one.gauge.as_int for one in answer.metric.metrics}
        except grpc.RpcError:
            return None
    used, total = values[_USED], values[_TOTAL]
    return [DeviceMemory(used[number], total.get(number, 0)) for number in sorted(used)] or None
