"""Which TPU this host has, by a PCI bus made of files and a local server that answers as Google's metadata server does."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain_xla.errors import UserError
from pretrain_xla.preflight.topology import chosen_topology
from pretrain_xla.runtime import metadata_server, tpu_chip
from pretrain_xla.runtime.chips import CHIPS, generation
from pretrain_xla.runtime.tpu_chip import accelerator_type, check_description, find_chip, pci_chips

ROOT = Path(__file__).parents[2]
VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_SKIP_MDS_QUERY", "GCE_METADATA_HOST")
DEVICE_IDS = {
    "network card": "0x0042",
    "v3": "0x0027",
    "v4": "0x005e",
    "v5p": "0x0062",
    "v5e": "0x0063",
    "v6e": "0x006f",
    "v7x": "0x0076",
}
TPU_ENV = """\
ACCELERATOR_TYPE: '{type}'
CHIPS_PER_HOST_BOUNDS: '2,4,1'
HOST_BOUNDS: '1,1,1'
TPU_CHIPS_PER_PROCESS_BOUNDS: '2,4,1'
TPU_PROCESS_BOUNDS: '1,1,1'
WORKER_ID: '0'
ZONE: 'us-west4-a'
"""
Bus = Callable[..., None]


@pytest.fixture(autouse=True)
def bus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bus:
    """Plugs chips of a generation into a PCI bus, in an environment without variables of TPUs."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "pci"
    monkeypatch.setattr(tpu_chip, "PCI_DEVICES", folder)

    def plug_in(chip: str, count: int = 8) -> None:
        for index in range(count):
            card = folder / f"{chip}.{index}"
            card.mkdir(parents=True)
            (card / "vendor").write_text("0x1ae0\n")
            (card / "device").write_text(DEVICE_IDS[chip] + "\n")

    plug_in("network card", 1)
    (folder / "just unplugged").mkdir()
    return plug_in


class Server(http.server.ThreadingHTTPServer):
    """Google's metadata server: attributes by name, for requests with its header."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Metadata)
        self.attributes: dict[str, str] = {}
        self.requests: list[str] = []
        self.flavor = "Google"


class Metadata(http.server.BaseHTTPRequestHandler):
    """Its handler of one request."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        path = self.path.removeprefix("http://metadata.google.internal")  # a proxy gets the whole URL
        name = path.removeprefix("/computeMetadata/v1/instance/attributes/")
        server.requests.append(name)
        text = server.attributes.get(name)
        status = 403 if self.headers.get("Metadata-Flavor") != "Google" else 200 if text is not None else 404
        self.send_response(status)
        self.send_header("Metadata-Flavor", server.flavor)
        self.end_headers()
        if status == 200:
            self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy must not be used
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("v2-8", "v2"),
        ("v3-8", "v3"),
        ("TPU v3", "v3"),
        ("v4-32", "v4"),
        ("TPU v4", "v4"),
        ("tpu-v4-podslice", "v4"),
        ("v5litepod-8", "v5e"),
        ("v5litepod", "v5e"),
        ("v5lite-8", "v5e"),
        ("v5e-1", "v5e"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5 Lite", "v5e"),
        ("TPU v5lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("V5LITE_POD", "v5e"),
        ("tpu-v5-lite-podslice", "v5e"),
        ("v5e:2x4", "v5e"),
        ("v5p-128", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("tpu-v5p-slice", "v5p"),
        ("v6e-8", "v6e"),
        ("TPU v6 lite", "v6e"),
        ("TPU v6e", "v6e"),
        ("tpu-v6e-slice", "v6e"),
        ("V6E", "v6e"),
    ],
)
def test_every_spelling_of_a_generation(name: str, chip: str) -> None:
    assert generation(name) == chip
    assert chip in CHIPS


@pytest.mark.parametrize("name", ["TPU v4 lite", "TPU7x", "tpu7x-8", "v6", "v5x", "v51e", "cpu", "5", ""])
def test_unknown_names_are_not_taken_for_a_known_generation(name: str) -> None:
    assert generation(name) not in CHIPS


@pytest.mark.parametrize("chip", ["v4", "v5p", "v5e", "v6e"])
def test_without_a_variable_the_bus_gives_the_chip(chip: str, bus: Bus) -> None:
    bus(chip, 4)
    assert pci_chips() == [chip] * 4
    found = find_chip()
    assert (found.chip, found.name, found.warnings) == (chip, f"TPU {chip}", ())


@pytest.mark.parametrize("value", ["v5litepod-16", "v5lite-8", "v5e-8"])
def test_the_variable_gives_the_name(value: str, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    bus("v5e")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", value)
    found = find_chip()
    assert (found.chip, found.name, found.warnings) == ("v5e", f"TPU v5e ({value})", ())


def test_a_variable_that_contradicts_the_bus_is_ignored(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    bus("v6e")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    found = find_chip()
    assert found.chip == "v6e"
    assert found.warnings == ("TPU_ACCELERATOR_TYPE=v5litepod-8, but the chips of this host are v6e: v6e is used",)


@pytest.mark.parametrize("value", ["v2-8", "v3-32"])
def test_v2_and_v3_are_told_apart_by_the_metadata_server(value: str, bus: Bus, metadata: Server) -> None:
    bus("v3", 4)
    metadata.attributes["tpu-env"] = TPU_ENV.format(type=value)
    found = find_chip()
    assert (found.chip, found.name, found.warnings) == (value[:2], f"TPU {value[:2]} ({value})", ())


def test_an_unknown_chip_is_a_warning(bus: Bus, metadata: Server) -> None:
    bus("v7x")
    found = find_chip()
    assert (found.chip, found.name) == (None, "TPU v7x")
    (line,) = found.warnings
    assert line.startswith("the TPU v7x is not in the table of chips: attention runs without the kernels")


def test_a_chip_without_a_name_is_a_warning(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    bus("v3", 4)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    (line,) = find_chip().warnings
    assert "set TPU_ACCELERATOR_TYPE, for example to v5litepod-8" in line
    assert find_chip("TPU v3").chip == "v3", "by the name that the device gives itself"


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"tpu-env": TPU_ENV.format(type="v5litepod-16")}, "v5litepod-16"),
        ({"accelerator-type": "v6e-8\n"}, "v6e-8"),
        ({"tpu-env": "TYPE: V6E\n", "accelerator-type": "v6e-8"}, "v6e-8"),
        ({"tpu-env": "{[", "accelerator-type": "v4-32"}, "v4-32"),
        ({"tpu-env": "just text"}, None),
        ({}, None),
    ],
)
def test_what_the_metadata_server_says(
    attributes: dict[str, str], expected: str | None, bus: Bus, metadata: Server
) -> None:
    assert accelerator_type() is None, "no TPU on the bus"
    assert metadata.requests == [], "and no request was made"
    bus("v5e")
    metadata.attributes = attributes
    assert accelerator_type() == expected


def test_only_googles_server_counts(bus: Bus, metadata: Server) -> None:
    bus("v5e")
    metadata.attributes, metadata.flavor = {"accelerator-type": "v5litepod-8"}, "other"
    assert accelerator_type() is None


def test_a_variable_or_the_skip_variable_avoids_the_request(
    bus: Bus, metadata: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus("v5e")
    metadata.attributes["accelerator-type"] = "v5litepod-256"
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert accelerator_type() is None
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5e-8")
    assert accelerator_type() == "v5e-8"
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    assert accelerator_type() == "v5e-8"
    assert metadata.requests == []


def test_a_server_that_never_answers_times_out(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    bus("v5e")
    monkeypatch.setattr(metadata_server, "SECONDS", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        assert accelerator_type() is None
        assert "TPU_SKIP_MDS_QUERY=1" in (check_description() or "")
        assert time.monotonic() - began < 2


def test_a_tpu_without_a_description_is_refused(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert check_description() is None, "no TPU here"
    bus("v5e")
    with pytest.raises(UserError, match="set TPU_ACCELERATOR_TYPE, for example to v5litepod-8"):
        check_description()
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    assert check_description() is None


def test_preflight_compiles_for_this_hosts_slice(bus: Bus, metadata: Server) -> None:
    with pytest.raises(UserError, match=r"name the TPU to compile for with --topology: [^(]*\(or v5e-16\)[^(]*$"):
        chosen_topology(None)
    bus("v5e", 4)
    with pytest.raises(
        UserError, match="this host has 4 v5e chips, but does not report the slice that they are part of"
    ):
        chosen_topology(None)
    metadata.attributes["tpu-env"] = TPU_ENV.format(type="v5litepod-16")
    assert chosen_topology(None).libtpu_name == "v5e:4x4"
    assert chosen_topology("v3-8").libtpu_name == "v3:2x2"


# torch_xla itself, imported as on a TPU VM: its `glob` finds the test's PCI bus, and a proxy of the test gets its request.
IMPORT = """
import glob, sys
from pathlib import Path
from pretrain_xla.runtime import tpu_chip
bus, plain = sys.argv[1], glob.glob
tpu_chip.PCI_DEVICES = Path(bus)
glob.glob = lambda pattern, *a, **k: plain(pattern.replace("/sys/bus/pci/devices", bus), *a, **k)
from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.runtime import load_xla
try:
    load_xla(RunConfig())
except UserError as error:
    print("refused:", error)
else:
    from torch_xla._internal import tpu
    print(tpu.num_available_chips(), tpu.get_tpu_env()["ACCELERATOR_TYPE"], tpu_chip.find_chip().name)
"""


def test_torch_xla_finds_the_same_chip(bus: Bus, metadata: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bus("v5e")
    metadata.attributes["tpu-env"] = TPU_ENV.format(type="v5litepod-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PJRT_DEVICE": "CPU"}
    environment |= {"http_proxy": f"http://127.0.0.1:{metadata.server_port}", "no_proxy": ""}
    command = [sys.executable, "-c", IMPORT, str(tpu_chip.PCI_DEVICES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[0] == "8 v5litepod-8 TPU v5e", done.stderr
    assert "warning" not in done.stderr
    metadata.attributes.clear()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("refused: PyTorch/XLA cannot determine which TPU this is"), done.stderr
    assert "TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-8" in done.stdout
    assert done.stderr.startswith("warning: this TPU's metadata server does not answer")
