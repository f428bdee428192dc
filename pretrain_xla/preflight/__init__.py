"""Does the training step fit, how fast is it, what will the run cost? The TPU's own compiler answers, without a TPU.

In the order of a compilation: `command.py` (the request) → `client.py` → a separate process, `worker.py`, with `trace.py`
(the trainer's step as a graph), `lines.py` (source lines as names in it) and `compiler.py` (libtpu) → `compile_result.py` →
`report.py`, which reads it with `hlo.py`, `traffic.py`, `collectives.py`, `memory.py`, `estimate.py` and `health.py` →
`render.py`. `suggestions.py` and `search.py` try other configurations the same way. What is exact and what is an estimate:
docs/preflight.md.
"""
