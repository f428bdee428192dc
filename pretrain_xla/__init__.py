"""Pretrain a modern GPT-2 on TPUs, GPUs and CPUs from one PyTorch model.

`import pretrain_xla` is cheap and needs neither torch_xla nor a device. `pretrain_xla.config` defines the configuration of a
run, and `pretrain_xla.cli` starts one.
"""

import sys

__version__ = "0.1.0"

if sys.version_info < (3, 11):  # noqa: UP036 - this check must run on older versions
    # Checked first, because the packages imported next cannot be installed there. TPU VM images ship 3.10.
    print(
        f"error: this is Python {sys.version_info[0]}.{sys.version_info[1]}, but pretrain_xla needs 3.11 to 3.13: "
        "pip install uv && uv venv --python 3.11 && . .venv/bin/activate && "
        "uv pip install --torch-backend=cpu -r requirements-xla_tpu.txt",
        file=sys.stderr,
    )
    raise SystemExit(2)
