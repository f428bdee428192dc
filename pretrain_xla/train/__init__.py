"""Training: the compiled step, the loop around it, and what happens between two steps.

Read `run.py` (a run from its config to its end), then `trainer.py` (the loop) and `step.py` (what is compiled). The loop uses
`resume.py` (where a run starts), `deferred_metrics.py` (metrics from the device, without waiting for it), `evaluations.py` and
`samples.py` (validation, tasks and generated text), `graph_guard.py`, `stop_signal.py`, and `loss_scale.py` for fp16. An update
of NaN or of a spike is skipped by `update_guard.py`, in the step, and reported by `skipped_updates.py`. `watchdog.py` ends a
run that hangs.
"""
