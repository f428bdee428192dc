"""For all tests: threads that wait do so asleep.

Torch's OpenMP threads spin while they wait for each other, which is quick on an idle machine and takes four times the CPU
time where several processes of tests share a few cores. Set here, before anything loads torch, and inherited by the
processes that tests start.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
