"""Pretrain a modern GPT-2 on TPUs, GPUs and CPUs from one PyTorch model.

`import pretrain_xla` is cheap and needs neither torch_xla nor a device; see `pretrain_xla.config` for what a run is and
`pretrain_xla.cli` for how one is started.
"""

__version__ = "0.1.0"
