"""A hostile pickle that does something harmless which a test can see."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, made: Path | str) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)
