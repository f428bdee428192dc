"""Calls that wait for a GPU, by source line: PyTorch warns of each in its debug mode, and the warnings are caught here."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from pretrain_xla.runtime.source_line import source_line

WAITS = "called a synchronizing CUDA operation"
"""Text of the warnings of `torch.cuda.set_sync_debug_mode("warn")`."""


@contextlib.contextmanager
def watch_waits(record: Callable[[str], None]) -> Iterator[None]:
    """While it is open, `record` gets the line of each call that PyTorch warns of; other warnings are shown as usual."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=WAITS)
        show_others = warnings.showwarning

        def show(message: Any, *rest: Any, **keywords: Any) -> None:
            if WAITS in str(message):
                record(source_line())
            else:
                show_others(message, *rest, **keywords)

        warnings.showwarning = show
        yield
