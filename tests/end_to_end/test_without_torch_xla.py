"""The package and its torch runtime work where torch_xla is not installed: a subprocess in which importing it fails."""

from collections.abc import Callable
from pathlib import Path

from .conftest import losses, run

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch_xla", "jax", "libtpu"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
sys.argv = ["run_pretrain.py", *sys.argv[1:]]
import pretrain_xla
from pretrain_xla.cli import run_pretrain
"""


def test_torch_runtime_trains(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    done = run(
        "-c", BLOCK + "run_pretrain('torch')\nassert 'torch_xla' not in sys.modules", *flags(tmp_path), fresh=True
    )
    assert done.status == 0, done.errors
    assert len(losses(tmp_path)) == 20


def test_xla_runtime_says_what_to_install(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    done = run("-c", BLOCK + "run_pretrain('xla')", *flags(tmp_path), fresh=True)
    assert done.status == 2
    assert done.last_error.startswith("error: runtime=xla needs torch_xla: pip install -r requirements-xla_tpu.txt")


def test_importing_the_package_is_cheap() -> None:
    done = run("-c", "import sys, pretrain_xla, pretrain_xla.cli; print('torch' in sys.modules)", fresh=True)
    assert done.output.strip() == "False"
