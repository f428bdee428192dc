"""Versions that do not fit, as real distributions on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pretrain_xla.doctor.versions import check_versions, software

GOOD = {
    "python": "3.11.9",
    "torch": "2.9.0+cpu",
    "torch_xla": "2.9.0",
    "libtpu": "0.0.21",
    "jax": "0.7.1",
    "jaxlib": "0.7.1",
}


def test_the_known_versions_fit() -> None:
    assert check_versions(GOOD, "xla").status == "ok"
    assert check_versions({"python": "3.12.1", "torch": "2.10.1"}, "torch").status == "ok"
    without = check_versions({key: GOOD[key] for key in ("python", "torch", "torch_xla")}, "xla")
    assert without.status == "ok"
    assert "without libtpu: no TPU" in without.found
    assert "was seen to compile, and not to run" in check_versions(GOOD | {"libtpu": "0.0.50"}, "xla").found


@pytest.mark.parametrize(
    ("package", "version", "found"),
    [
        ("torch", "2.13.0", "torch_xla 2.9.0 needs torch 2.9 and not 2.13.0 (torch_xla is built against one torch"),
        ("torch", "2.90.0", "needs torch 2.9 and not 2.90.0"),
        ("torch_xla", "2.7.0", "torch_xla 2.7.0 is not 2.9.0"),
        ("libtpu", "0.0.11", "needs libtpu 0.0.21 and not 0.0.11"),
        ("jax", "0.9.0", "needs jax 0.7.1 and not 0.9.0"),
        ("jaxlib", "0.7.0", "jax 0.7.1 with jaxlib 0.7.0"),
        ("torch_tpu", "0.2.0", "torch_tpu 0.2.0 is installed, too"),
    ],
)
def test_a_version_that_does_not_fit(
    package: str, version: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in {**GOOD, package: version}.items():
        if name != "python":
            folder = tmp_path / f"{name}-{number}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert sys.path[0] == str(tmp_path)
    check = check_versions(software(), "xla")
    assert check.status == "failed"
    assert found in check.found
    assert "pip install -r requirements-xla_tpu.txt" in check.fix


def test_a_python_or_a_package_that_is_missing() -> None:
    old = check_versions(GOOD | {"python": "3.10.12"}, "xla")
    assert old.status == "failed"
    assert "uv venv --python 3.11" in old.fix
    assert check_versions({"python": "3.11.0"}, "xla").found.endswith(
        "torch is not installed; torch_xla is not installed"
    )
    assert check_versions({"python": "3.11.0", "torch": "2.8.0"}, "torch").status == "failed"
