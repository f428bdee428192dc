"""Is this machine fit to train, and how fast is it really? `python -m pretrain_xla doctor`.

In the order of a check-up: `command.py` (the request) → `versions.py` and `storage.py`, in this process → `client.py` → a
process of its own that opens the devices, `worker.py`: `agreement.py` (hosts), `runtime/xla/device_bench.py` or
`torch_bench.py` (matrix product, pass over memory, collectives), `kernels.py`, and then `steps.py` (the trainer's own steps) →
`verdicts.py`, which judges the figures → `render.py`, and `record.py`, which writes them for preflight.

What measures returns plain figures, and what judges them is a pure function of these: a table of chips can be tested without
the chip.
"""
