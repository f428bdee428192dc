"""The line of our code, or of the user's, that called an operation which waits for the device."""

from __future__ import annotations

import sys
from typing import Any

_HIDDEN = (
    *("/torch/", "/torch_xla/", "/contextlib.py", "/warnings.py"),
    *("/runtime/source_line.py", "/runtime/xla/graphs.py", "/runtime/torch_waits.py"),
)


def source_line(depth: int = 1) -> str:
    """`file:line in function` of the nearest caller outside torch and the graph guard's own modules."""
    frame: Any = sys._getframe(depth)
    while frame is not None and any(part in frame.f_code.co_filename for part in _HIDDEN):
        frame = frame.f_back
    if frame is None:
        return "unknown"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
