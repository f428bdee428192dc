"""Names of TPU slices as users and as libtpu write them; libtpu itself accepts the resolved names."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pretrain_xla.errors import UserError
from pretrain_xla.preflight.client import ENVIRONMENT
from pretrain_xla.preflight.topology import SHAPES_2D, SHAPES_3D, chosen_topology, resolve_topology
from pretrain_xla.runtime.chips import CHIPS
from pretrain_xla.runtime.rows import rows_of


@pytest.mark.parametrize(
    ("name", "libtpu", "chips", "devices"),
    [
        ("v2-8", "v2:2x2", 4, 8),
        ("v3-8", "v3:2x2", 4, 8),
        ("v3-1", "v3:1x1", 1, 1),
        ("v3-256", "v3:8x16", 128, 256),
        ("v4-8", "v4:2x2x1", 4, 4),
        ("v4-32", "v4:2x2x4", 16, 16),
        ("v4-512", "v4:4x8x8", 256, 256),
        ("v5litepod-1", "v5e:1x1", 1, 1),
        ("v5litepod-16", "v5e:4x4", 16, 16),
        ("V5E-8", "v5e:2x4", 8, 8),
        ("v5e-256", "v5e:16x16", 256, 256),
        ("v5p-8", "v5p:2x2x1", 4, 4),
        ("v5p-128", "v5p:4x4x4", 64, 64),
        ("v6e-8", "v6e:2x4", 8, 8),
        ("v5e:2x4", "v5e:2x4", 8, 8),
        ("v5e:4x2", "v5e:4x2", 8, 8),
        ("v5e:2x2x1", "v5e:2x2", 4, 4),
        ("v3:2x2", "v3:2x2", 4, 8),
        ("v4:2x2x1", "v4:2x2x1", 4, 4),
        ("v5litepod:4x4", "v5e:4x4", 16, 16),
    ],
)
def test_names(name: str, libtpu: str, chips: int, devices: int) -> None:
    topology = resolve_topology(name)
    assert (topology.libtpu_name, topology.chips, topology.devices) == (libtpu, chips, devices)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v9-8", "expected one of v2, v3, v4, v5e, v5p, v6e"),
        ("h100", "unknown TPU"),
        ("", "unknown TPU"),
        ("v5e", "v5litepod-16"),
        ("v5e-6", "v5e-4, v5e-8"),
        ("v4-7", "counts cores"),
        ("v5e-7", "counts chips"),
        ("v5e:3x3", "v5e:2x4"),
        ("v4:2x2", "v4:2x2x1"),
        ("v5e:2x2x2", "no such slice"),
    ],
)
def test_unknown_names_say_what_is_known(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        resolve_topology(name)


def test_without_a_name_it_is_this_hosts_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    assert chosen_topology(None).libtpu_name == "v5e:2x4"
    assert chosen_topology("v3-8").libtpu_name == "v3:2x2"
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE")
    with pytest.raises(UserError, match="--topology: v3-8"):
        chosen_topology(None)


@pytest.mark.parametrize(
    ("name", "chips", "links"),
    [
        ("v5e-1", 1, 0),
        ("v5e-8", 8, 2),
        ("v5e-16", 16, 2),
        ("v5e-256", 256, 4),
        ("v4-8", 4, 2),
        ("v4-64", 32, 3),
        ("v4-128", 64, 6),
        ("v3-8", 4, 2),
        ("v5e-16", 4, 1),  # along one dimension
        ("v5e-16", 8, 2),
        ("v5e-256", 16, 2),  # a ring
        ("v5e-256", 8, 1),  # half of one
        ("v5e-256", 32, 3),
    ],
)
def test_links_of_a_corner(name: str, chips: int, links: int) -> None:
    topology = resolve_topology(name)
    assert topology.links(chips) == links
    assert topology.bandwidth(chips) == pytest.approx(topology.chip.link_bandwidth * links)


def test_the_table_of_chips_has_figures_per_device() -> None:
    assert CHIPS["v3"].peak_flops == 61.5e12
    assert CHIPS["v3"].usable_hbm < CHIPS["v3"].hbm_bytes == 16 * 2**30
    for chip in CHIPS.values():
        assert 0.5 < chip.matmul_fraction < 1
        assert 0.5 < chip.stream_fraction < 1


PROGRAM = """
import json, sys
from jax.experimental import topologies
from pretrain_xla.preflight.topology import resolve_topology
found = {}
for name in json.loads(sys.argv[1]):
    slice = resolve_topology(name)
    devices = topologies.get_topology_desc(slice.libtpu_name, "tpu", **slice.libtpu_options).devices
    found[name] = [(device.id, device.process_index) for device in devices]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def slices() -> dict[str, list[tuple[int, int]]]:
    """The devices of every slice of up to 256 devices, in libtpu's order: the id and the host of each."""
    names = [
        f"{chip.name}:{'x'.join(map(str, shape))}"
        for chip in CHIPS.values()
        for count, shape in (SHAPES_3D if chip.links == 6 else SHAPES_2D).items()
        if count * chip.devices_per_chip <= 256
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(names)],
        env=dict(os.environ) | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "libtpu prints nothing about the missing TPU"
    found: dict[str, list[tuple[int, int]]] = json.loads(done.stdout)
    assert list(found) == names
    return found


def test_libtpu_accepts_every_slice(slices: dict[str, list[tuple[int, int]]]) -> None:
    for name, devices in slices.items():
        assert len(devices) == resolve_topology(name).devices
        # PyTorch/XLA takes a device's place in the mesh for its id. They are equal, so preflight compiles the run's own mesh.
        assert sorted(number for number, _ in devices) == list(range(len(devices)))


@pytest.mark.parametrize("name", ["v5e-16", "v5e-64", "v6e-16", "v3-32", "v4-16", "v5p-16", "v5e-256"])
def test_the_row_that_a_host_feeds_is_the_row_that_it_reads_back(
    name: str, slices: dict[str, list[tuple[int, int]]]
) -> None:
    devices, rows_per_device = slices[resolve_topology(name).libtpu_name], 3
    count, shards = len(devices), {}
    for host in {host for _, host in devices}:
        numbers = [number for number, its_host in devices if its_host == host]
        assert len(numbers) < count
        rows = rows_of(numbers, count, count * rows_per_device)
        # torch_xla gives the rows that a host feeds to its own devices, in their order …
        shards |= dict(zip(numbers, rows.reshape(-1, rows_per_device).tolist(), strict=True))
    # … and the mesh takes the batch as these shards in the order of the device ids.
    assert [row for number in range(count) for row in shards[number]] == list(range(count * rows_per_device))


def test_device_ids_of_a_host_may_be_non_consecutive(slices: dict[str, list[tuple[int, int]]]) -> None:
    assert [number for number, host in slices["v5e:4x4"] if host == 0] == [0, 1, 4, 5]
