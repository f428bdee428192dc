"""Times such as `8h30m`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_TEXT = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_SECONDS = (86400, 3600, 60, 1)


def seconds_of(text: str) -> int:
    """The seconds of a time such as `8h30m`, `45m` or `1d`.

    Raises:
        ValueError: it is not such a time, or none at all.
    """
    found = _TEXT.fullmatch(text)
    seconds = (
        sum(unit * int(number or 0) for unit, number in zip(_SECONDS, found.groups(), strict=True)) if found else 0
    )
    if not 0 < seconds < 2**31:
        raise ValueError("not a time such as 8h30m, 45m or 1d")
    return seconds


def _checked(text: str) -> str:
    try:
        seconds_of(text)
    except ValueError as error:
        raise ValueError(f"stop_after={text!r} is {error}") from None
    return text


Duration = Annotated[str, AfterValidator(_checked)]
