"""A TPU's memory under SPMD. libtpu's server needs a TPU, so another one answers with its messages."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

grpc: Any = pytest.importorskip("grpc")
messages: Any = pytest.importorskip("tpu_info.proto.tpu_metric_service_pb2")
services: Any = pytest.importorskip("tpu_info.proto.tpu_metric_service_pb2_grpc")

from pretrain_xla.runtime.xla.device_memory import DeviceMemory, tpu_memory  # noqa: E402

FIGURES = {"tpu.runtime.hbm.memory.usage.bytes": {1: 7, 0: 5}, "tpu.runtime.hbm.memory.total.bytes": {0: 16, 1: 16}}


class Libtpu(services.RuntimeMetricServiceServicer):
    def GetRuntimeMetric(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = messages.MetricResponse()
        for device, value in FIGURES.get(request.metric_name, {}).items():
            one = answer.metric.metrics.add()
            one.attribute.value.int_attr, one.gauge.as_int = device, value
        return answer


@pytest.fixture
def port() -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(1))
    services.add_RuntimeMetricServiceServicer_to_server(Libtpu(), server)
    port = server.add_secure_port("localhost:0", grpc.local_server_credentials())
    server.start()
    yield port
    server.stop(None)


def test_memory_of_each_device(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_RUNTIME_METRICS_PORTS", f"{port},{port + 1}")
    assert tpu_memory() == [DeviceMemory(5, 16), DeviceMemory(7, 16)]
    monkeypatch.setenv("TPU_RUNTIME_METRICS_PORTS", "1")  # nobody listens there
    assert tpu_memory() is None
