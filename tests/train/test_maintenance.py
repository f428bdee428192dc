"""Notices of maintenance and preemption, from a server in the place of the metadata server."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain_xla.runtime import Hosts
from pretrain_xla.train.maintenance import asking, is_announced

BASE = "/computeMetadata/v1/instance/"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What the metadata server answers, by name; it does not know other names."""
    known: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix(BASE)
            asked = self.headers["Metadata-Flavor"] == "Google" and self.path.startswith(BASE)
            known["asked"] = str(int(known.get("asked", "0")) + asked)
            self.send_response(200 if asked and name in known else 404)
            self.send_header("Metadata-Flavor", "Google")
            self.end_headers()
            self.wfile.write(known.get(name, "no such name").encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # it has nothing to do with it
    yield known
    server.shutdown()
    server.server_close()
    thread.join()


def wait_until_asked(answers: dict[str, str], times: int) -> None:
    seen, deadline = int(answers.get("asked", "0")), time.monotonic() + 30
    while int(answers.get("asked", "0")) < seen + times:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("name", "answer", "what"),
    [
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", "maintenance of the host"),
        ("preempted", "TRUE", "preemption"),
    ],
)
def test_a_notice_stops_the_run_as_a_signal_does(
    name: str, answer: str, what: str, answers: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    hosts = Hosts()
    with asking(hosts, interval=0.01):
        wait_until_asked(answers, 4)  # a server that knows no such names
        answers |= {"maintenance-event": "NONE", "preempted": "FALSE"}
        wait_until_asked(answers, 4)
        answers["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
        wait_until_asked(answers, 4)
        assert not hosts.stops_here()
        answers[name] = answer
        deadline = time.monotonic() + 30
        while not hosts.stops_here():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert hosts.stopped_by == signal.SIGTERM
    assert capfd.readouterr().err == (
        f"the cloud announces {what} ({name}: {answer}): the run saves and stops as after SIGTERM\n"
    )


def test_without_a_server_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    hosts = Hosts()
    with asking(hosts, interval=0.01):
        time.sleep(0.1)
    assert not hosts.stops_here()


def test_only_a_tpu_vm_is_asked() -> None:
    xla: Any = SimpleNamespace(name="xla")
    torch: Any = SimpleNamespace(name="torch")
    assert is_announced(xla, {"PJRT_DEVICE": "TPU"})
    assert is_announced(xla, {"PJRT_DEVICE": "TPU", "TPU_SKIP_MDS_QUERY": "0"})
    assert not is_announced(xla, {"PJRT_DEVICE": "TPU", "TPU_SKIP_MDS_QUERY": "1"})
    assert not is_announced(xla, {"PJRT_DEVICE": "CPU"})
    assert not is_announced(xla, {})
    assert not is_announced(torch, {"PJRT_DEVICE": "TPU"})
