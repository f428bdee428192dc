"""A program that stands in for Google Cloud's `gcloud`, as far as launching on TPU VMs uses it.

It keeps its state in a folder: zones with capacity and quota, queued resources and TPU VMs with their states, buckets, and who
is logged in. What runs on a worker is real: `ssh` starts real processes, in a folder that is the worker's home, and they end
when the VM is deleted or preempted. A list of events says what goes wrong, and when.

`main.py` reads a command line by the tables of `syntax.py`, and calls what `commands.py` lists: `queued.py`, `nodes.py`,
`remote.py` (ssh and scp), `account.py`, `storage.py`. `state.py` keeps the state, `clock.py` lets time pass, `events.py` does
what the list of events says, `machines.py` runs and kills processes, and `texts.py` has the errors, each with who published it.
`world.py` is for tests: it makes the folder and the program, and lets time pass between calls.

It imports only the standard library and is run without site packages, so that a call takes a twentieth of a second.
"""
