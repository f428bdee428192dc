"""For all tests: threads that wait do so asleep, and the files that take longest come first.

Torch's OpenMP threads spin while they wait for each other, which is quick on an idle machine and takes four times the CPU
time where several processes of tests share a few cores. Set here, before anything loads torch, and inherited by the
processes that tests start.
"""

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

LONGEST = ("end_to_end", "preflight", "model")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders that take longest, so that no worker waits for another's long file at the end.

    pytest-xdist keeps this order with `--no-loadscope-reorder`; by itself it puts the files with the most tests first.
    """
    rank = {folder: number for number, folder in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(rank)))
