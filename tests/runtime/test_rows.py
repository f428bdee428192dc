"""The row that a host feeds is the row that it reads back, also where its device ids are not consecutive."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_xla.runtime.rows import device_numbers, rows_of


@given(numbers=st.permutations(range(8)), hosts=st.sampled_from([1, 2, 4, 8]), rows_per_device=st.integers(1, 3))
def test_every_row_goes_once_to_its_own_device(numbers: list[int], hosts: int, rows_per_device: int) -> None:
    found: dict[int, list[int]] = {}
    for devices in np.split(np.array(numbers), hosts):
        rows = rows_of(devices.tolist(), 8, 8 * rows_per_device)
        found |= dict(zip(devices.tolist(), rows.reshape(-1, rows_per_device).tolist(), strict=True))
    assert found == {
        number: list(range(number * rows_per_device, (number + 1) * rows_per_device)) for number in range(8)
    }


def test_device_numbers() -> None:
    assert device_numbers(["TPU:0", "TPU:1", "TPU:14"]) == [0, 1, 14]


SCRIPT = """
from unittest import mock
import numpy as np, torch, torch_xla
import torch_xla.runtime as xr
from pretrain_xla.config import build_config
from pretrain_xla.runtime.hosts import Hosts
from pretrain_xla.runtime.xla.runtime import XlaRuntime

xr.use_spmd()
HOSTS = (["CPU:0", "CPU:2"], ["CPU:3", "CPU:1"])

def on_host(index, **mesh):
    config = build_config({"parallel": mesh}, "test")
    hosts = Hosts()
    hosts.index, hosts.count = index, 2
    with (
        mock.patch("torch_xla.real_devices", return_value=HOSTS[index]),
        mock.patch.object(xr, "process_index", return_value=index),
        mock.patch.object(xr, "process_count", return_value=2),
    ):
        return XlaRuntime(config, hosts)

tokens_R2T = np.arange(8 * 2 * 3, dtype=np.int32).reshape(8, 2, 3)
for mesh in ({"mesh_data": 4}, {"mesh_data": 2, "mesh_fsdp": 2}, {"mesh_fsdp": 4}):
    shards = {}
    for index, names in enumerate(HOSTS):
        runtime = on_host(index, **mesh)
        fed = tokens_R2T[runtime.rows(8)]
        shards |= dict(zip(names, np.split(fed, len(names)), strict=True))
    # What torch_xla does on each host, here for both: one shard for each of its devices, in their order.
    batch = runtime.place_batch(np.concatenate([shards[name] for name in torch_xla.real_devices()]))
    assert batch.shape == tokens_R2T.shape
    step = runtime.compile(lambda batch: runtime.all_rows(batch[:, 1].float()), "read", state=tuple)
    assert torch.equal(runtime.fetch(step(batch)).result(), torch.from_numpy(tokens_R2T[:, 1]).float()), mesh

# Hosts that each hold a shard of every row feed the global batch.
for index in range(2):
    runtime = on_host(index, mesh_data=2, mesh_tensor=2)
    assert runtime.rows(8).tolist() == list(range(8))
    batch = runtime.place_batch(tokens_R2T)
    assert torch.equal(batch.cpu(), torch.from_numpy(tokens_R2T))
"""


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")
def test_rows_of_two_hosts_come_back_in_order() -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4", "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
