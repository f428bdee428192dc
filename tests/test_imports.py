"""The order of imports (the contracts in pyproject.toml), and how long a file may be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REFERENCE = ("gpt.py", "attention.py", "layers.py", "loss.py")
VIOLATIONS = {
    "an upward import": ("optim/schedules.py", "from pretrain_xla.train import step\n", "points down this list"),
    "an upward import in a function": (
        "data/batches.py",
        "def f():\n    import pretrain_xla.runtime.base\n",
        "points down",
    ),
    "a circular import": ("storage/files.py", "from pretrain_xla.storage import cache\n", "No circles"),
    "a module without a layer": ("elsewhere.py", "", "not listed as layers"),
    "the TPU's version in the reference": (
        "model/layers.py",
        "def f():\n    from pretrain_xla.model import xla\n",
        "knows nothing of the TPU's version",
    ),
    "torch_xla in the model": ("model/gpt.py", "import torch_xla\n", "know torch_xla"),
    "jax in the trainer": ("train/trainer.py", "import jax.numpy\n", "know jax"),
}


def contracts(root: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of the package in this folder."""
    code = "import sys; from importlinter.cli import lint_imports_command as run; sys.path.insert(0, '.'); run()"
    return subprocess.run([sys.executable, "-c", code, "--no-cache"], cwd=root, capture_output=True, text=True)


def test_imports_run_one_way() -> None:
    found = contracts(ROOT)
    assert found.returncode == 0, found.stdout[-3000:]
    assert "5 kept, 0 broken" in found.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with every violation in it."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "pretrain_xla", folder / "pretrain_xla", ignore=shutil.ignore_patterns("__pycache__"))
    for name, line, _ in VIOLATIONS.values():
        with (folder / "pretrain_xla" / name).open("a", encoding="utf-8") as file:
            file.write(line)
    return folder


def test_a_violation_is_found(copy: Path) -> None:
    found = contracts(copy)
    assert found.returncode == 1
    broken = found.stdout.partition("Broken contracts")[2]
    for name, line, contract in VIOLATIONS.values():
        assert contract in broken, line
        assert name.removesuffix(".py").replace("/", ".").rpartition(".")[2] in broken, line
    assert "0 kept, 5 broken" in found.stdout


def test_no_file_is_long() -> None:
    files = [path for room in ("pretrain_xla", "benchmarks", "scripts") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 200
    long = {str(path.relative_to(ROOT)): count for path in files if (count := len(path.read_text().splitlines())) > 400}
    assert not long, "split them: no file is over 400 lines"


def test_the_reference_model_is_short() -> None:
    """It can be read in one sitting: what makes it fast on a TPU is in `model/xla`."""
    texts = [(ROOT / "pretrain_xla" / "model" / name).read_text() for name in REFERENCE]
    assert sum(len(text.splitlines()) for text in texts) <= 400
    for text in texts:
        assert "model.xla" not in text, "the TPU's version is inserted from outside"
        assert "device.type" not in text, "and the reference depends on no device"
