"""What runs on a worker: started there by ssh, as files and not as modules, with bash and Python's standard library alone.

`setup.sh` (and `installed.py`) make the environment, `start.py` starts the run, `follow.py` shows its log and how it is,
`stop.py` stops it, `stacks.py` tells what it hangs in. All but `installed.py` take the run's name first: its folder in the
home directory.
"""
