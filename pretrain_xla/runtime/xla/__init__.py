"""The runtime on PyTorch/XLA: TPUs, and CPU devices.

`runtime.py` is the runtime. A step is traced by `gradients.py`, with `scan.py` for loops, `local_shards.py` for what each
device does on its own, and `kernels.py` for attention; `compiled.py` compiles it, and `graphs.py` and `compiler_warnings.py`
watch the compiler. `while_loop.py` is the loop of generation. `environment.py` and `launch.py` run before all that.
"""
