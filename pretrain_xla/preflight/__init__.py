"""Does the training step fit, how fast is it, what will the run cost: answered by the TPU's own compiler, without a TPU.

In the order of a compilation: `command.py` (what was asked) → `client.py` → a process of its own, `worker.py`, with `trace.py`
(the trainer's step as a graph), `lines.py` (our lines as names in it) and `compiler.py` (libtpu) → `compile_result.py` →
`report.py`, which reads it with `hlo.py`, `traffic.py`, `collectives.py`, `memory.py`, `estimate.py` and `health.py` →
`render.py`. `suggestions.py` and `search.py` try other configurations the same way. What is exact and what is an estimate:
docs/preflight.md.
"""
