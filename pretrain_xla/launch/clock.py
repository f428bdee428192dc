"""The time, as one object that tests can replace."""

from __future__ import annotations

import time


class Clock:
    """Seconds since 1970, which another machine shares."""

    def now(self) -> float:
        """The time."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)
