"""Every pause and time limit of a launch, in seconds.

`PRETRAIN_XLA_LAUNCH_TIMING=poll=0.1,zone_wait=2` in the environment changes some of them: for rehearsals with a program that
stands in for gcloud, whose slices come within seconds.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from pretrain_xla.errors import UserError

VARIABLE = "PRETRAIN_XLA_LAUNCH_TIMING"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each pause and limit."""

    poll: float = 30.0
    """Between two looks at a slice that is being created or deleted."""
    zone_wait: float = 1800.0
    """How long one zone may take to give a slice before the next is asked, where several are named."""
    only_zone_wait: float = 6 * 3600.0
    """The same where one is named; then the request is made again."""
    first_backoff: float = 60.0
    """After all zones had none; doubles with each round."""
    longest_backoff: float = 900.0
    """The longest pause between two rounds over the zones."""
    retry: float = 5.0
    """After a call failed for a reason that passes by itself; doubles up to a minute, five tries in all."""
    call: float = 300.0
    """How long a call of gcloud may take; creating and deleting: three times as long."""
    setup: float = 1800.0
    """How long the set-up of a worker may take."""
    ready: float = 900.0
    """How long the node of an active request may take until all its workers answer."""
    follow: float = 240.0
    """How long one connection follows the log; then the node's state is looked at, and another is opened."""
    heartbeat: float = 5.0
    """Between two lines of `follow.py`."""
    silence: float = 60.0
    """Without any line on a connection that follows, it is given up and another is opened."""
    unreachable: float = 300.0
    """Without an answer of a worker, it counts as gone."""
    stop: float = 120.0
    """How long a run that is asked to stop may take to save."""
    progress: float = 60.0
    """Between two lines of progress."""
    abandoned: float = 1800.0
    """After the end of a run, until its first worker deletes the slice because no launcher has."""
    lease: float = 180.0
    """A launcher that has not written the state for so long is gone, and another may take over."""


def timing(environment: Mapping[str, str] = os.environ) -> Timing:
    """The times, with the changes that the environment asks for.

    Raises:
        UserError: there is no such time, or its value is not a number of seconds.
    """
    found = Timing()
    known = {field.name for field in dataclasses.fields(Timing)}
    for part in filter(None, environment.get(VARIABLE, "").split(",")):
        name, _, value = part.partition("=")
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if name not in known or not seconds >= 0:
            raise UserError(f"{VARIABLE}: {part!r} is not one of {', '.join(sorted(known))} with a number of seconds")
        found = dataclasses.replace(found, **{name: seconds})
    return found
