"""Flash attention for TPUs, in Pallas: JAX functions, which `runtime/xla/kernels.py` puts into the traced graph.

`flash_kernels.py` says how the kernels divide their work, and what they cost; `flash_forward.py` and `flash_backward.py` are
the kernels; `flash_prepare.py` is what they do to queries and keys first; `flash_limits.py` says which shapes and chips they
serve.
"""
