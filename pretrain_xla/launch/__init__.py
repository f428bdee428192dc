"""Starts a run on a TPU slice of Google Cloud, keeps it alive to its end, and leaves nothing behind that costs money.

In the order of a launch: `command.py` (the request) → `slices.py` (what a topology means there: type, hosts, image, zones,
price) → `checks.py` (what can be known before) → `acquire.py` (a slice, over zones) → `workers.py` (the code and its
environment on every worker) → `watch.py` (follow, notice, decide) → `finish.py` (copy back, delete, sweep). `launcher.py` ties
them together and keeps `state.py`. All calls of gcloud are built by `calls.py` and run by `gcloud.py`; `timing.py` has every
pause. The programs in `on_worker/` run on the workers.
"""
