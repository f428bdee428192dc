"""Real servers on loopback: a Google Cloud Storage emulator and web servers, and a proxy that injects faults."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

BUCKET = "tokens"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def process(*command: str, port: int, path: str = "/") -> Iterator[str]:
    """A server in its own process; yields its address once it answers."""
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(address + path, timeout=5).read()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                assert server.poll() is None, f"{command} ended by itself"
                assert time.monotonic() < limit, f"{command} does not answer"
                time.sleep(0.05)
        yield address
    finally:
        server.kill()
        server.wait()


def gcs_emulator() -> contextlib.AbstractContextManager[str]:
    """The emulator, with one bucket, `BUCKET`."""
    port = free_port()
    command = ("-m", "gcp_storage_emulator", "start", "--port", str(port), "--host", "127.0.0.1", "--in-memory")
    return process(*command, "--default-bucket", BUCKET, port=port, path=f"/storage/v1/b/{BUCKET}")


class _Threaded(ThreadingHTTPServer):
    daemon_threads = True
    owner: Any


class Server:
    """A threaded HTTP server, and its requests: (path, first byte, byte after the last) of each GET of content."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.requests: list[tuple[str, int | None, int | None]] = []
        self._server = _Threaded(("127.0.0.1", 0), handler)
        self._server.owner = self
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def note(self, handler: BaseHTTPRequestHandler) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range") or "")
        span = (int(found[1]), int(found[2]) + 1) if found else (None, None)
        self.requests.append((handler.path, *span))

    @property
    def bytes_requested(self) -> int:
        """Total length of the ranges requested."""
        return sum(end - begin for _, begin, end in self.requests if begin is not None and end is not None)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class FaultyProxy(Server):
    """Forwards requests, with a fault where `fault` names one: a status, "stall", "broken" (the connection ends midway),
    "short" (a complete answer with half the body), "flipped" (one bit of the body is wrong)."""

    def __init__(self, upstream: str, fault: Callable[[str, str | None], str | None] = lambda path, span: None) -> None:
        super().__init__(_Proxied)
        self.upstream, self.fault = upstream, fault
        self.faulty = {"GET"}
        """Methods of requests that have faults."""
        self.stalled = threading.Event()


class _Proxied(BaseHTTPRequestHandler):
    server: _Threaded
    protocol_version = "HTTP/1.1"
    _length: str | None = None  # of what a HEAD does not send

    def _pass_on(self) -> None:
        owner, self._length = self.server.owner, None
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "GET":
            owner.note(self)
        fault = owner.fault(self.path, self.headers.get("Range")) if self.command in owner.faulty else None
        if fault == "stall":
            owner.stalled.wait(60)
            self.close_connection = True
            return
        if fault and fault.isdigit():
            self._answer(int(fault), {}, b"not now")
            return
        host = owner.upstream.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=60)
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if self.command == "HEAD":
            self._length = answer.getheader("Content-Length")
        dropped = ("transfer-encoding", "content-length", "connection")
        kept = {key: value for key, value in answer.getheaders() if key.lower() not in dropped}
        if fault == "short":
            content = content[: len(content) // 2]
        if fault == "flipped":
            content = content[:-1] + bytes([content[-1] ^ 1])
        # The emulator does not implement renaming (501), which gcsfs would try six times in half a minute.
        self._answer(405 if answer.status == 501 else answer.status, kept, content, broken=fault == "broken")

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the other side gave up waiting
            super().handle()

    def _answer(self, status: int, headers: dict[str, str], content: bytes, broken: bool = False) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", self._length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if broken else content)
        if broken:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _pass_on

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Refusing(Server):
    """An empty bucket that answers each write with the same status."""

    def __init__(self, status: int) -> None:
        super().__init__(_Refused)
        self.status = status


class _Refused(BaseHTTPRequestHandler):
    server: _Threaded
    protocol_version = "HTTP/1.1"

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status = 404 if self.command == "GET" else self.server.owner.status
        content = b'{"error": {"message": "no"}}'
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = _refuse

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class WebServer(Server):
    """A folder over HTTP, with or without ranges."""

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        super().__init__(_File)
        self.folder, self.ranges = folder, ranges
        self.authorizations: set[str | None] = set()


class _File(BaseHTTPRequestHandler):
    server: _Threaded
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        owner = self.server.owner
        owner.authorizations.add(self.headers.get("Authorization"))
        path = owner.folder / self.path.strip("/")
        if path.is_dir():
            names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
            return self._send(200, "".join(f'<a href="{name}">{name}</a>' for name in names).encode(), "text/html")
        if not path.is_file():
            return self._send(404, b"", "text/plain")
        if self.command == "GET":
            owner.note(self)
        content, span = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if span and owner.ranges:
            begin, end = int(span[1]), min(int(span[2]) + 1, len(content))
            return self._send(
                206, content[begin:end], "application/octet-stream", f"bytes {begin}-{end - 1}/{len(content)}"
            )
        self._send(200, content, "application/octet-stream")

    do_HEAD = do_GET

    def _send(self, status: int, content: bytes, kind: str, span: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        path = self.server.owner.folder / self.path.strip("/")
        if path.is_file():
            self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        if self.server.owner.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def upload(address: str, folder: Path, prefix: str) -> str:
    """Upload a folder's files to the emulator's bucket by the JSON API; returns their gs:// folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = f"{prefix}/{path.relative_to(folder)}".replace("/", "%2F")
            request = urllib.request.Request(
                f"{address}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}",
                path.read_bytes(),
                {"Content-Type": "application/octet-stream"},
                method="POST",
            )
            urllib.request.urlopen(request, timeout=60).read()
    return f"gs://{BUCKET}/{prefix}"


def gcs_environment(address: str) -> dict[str, str]:
    """Variables that make gcsfs in a subprocess use an emulator."""
    return {
        "STORAGE_EMULATOR_HOST": address,
        "FSSPEC_GCS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # before anything imports gcsfs
