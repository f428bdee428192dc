"""A compilation that fails, and a host without the compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pretrain_xla.errors import UserError
from pretrain_xla.preflight import client
from pretrain_xla.preflight.client import Request, compile_request
from pretrain_xla.preflight.topology import resolve_topology
from pretrain_xla.runtime.xla.environment import OVERLAP
from tests.preflight.conftest import make_config

REQUEST = Request(make_config(), resolve_topology("v5e-1"))


def test_the_compiler_gets_the_options_of_the_run_and_of_the_user() -> None:
    assert REQUEST.all_options == {}
    config = make_config(parallel={"overlap_gradients": True})
    changed = next(iter(OVERLAP))
    request = Request(config, REQUEST.topology, {changed: "1", "other": "2"})
    assert request.all_options == OVERLAP | {changed: "1", "other": "2"}


def test_a_process_that_dies_is_one_error_with_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho 'F0000 check failed: it went wrong' >&2\nkill -6 $$\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(client.sys, "executable", str(interpreter))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="ended with status -6: F0000 check failed: it went wrong"):
        compile_request(REQUEST)


def test_without_libtpu_the_error_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import importlib.metadata as m, sys\n"
        "original = m.version\n"
        "def version(name):\n"
        "    if name == 'libtpu': raise m.PackageNotFoundError(name)\n"
        "    return original(name)\n"
        "m.version = version\n"
        "from pretrain_xla.preflight.compiler import libtpu_version\n"
        "from pretrain_xla.errors import UserError\n"
        "try: libtpu_version()\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "libtpu is not installed" in done.stdout, done.stderr
    assert "pip install -r requirements-xla_tpu.txt" in done.stdout


def test_reporting_loads_neither_torch_xla_nor_jax() -> None:
    program = (
        "import sys, pretrain_xla.preflight.command\n"
        "assert not {'torch_xla', 'jax', 'jaxlib'} & set(sys.modules), 'too much is loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    request = Request(make_config(), resolve_topology("v5e-1"), save=tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"--save-hlo .* name another folder"):
        client._save(tmp_path, request, None)  # type: ignore[arg-type]
