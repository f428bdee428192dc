"""Follows the run, and notices what ends it: done, failed, preempted, a worker that is gone, no step for too long, the budget.

One connection at a time follows worker 0's log; when it drops, the next goes on from the byte that arrived last. Between two,
and whenever something is odd, the slice's own state is looked at.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

from pretrain_xla.launch.context import Failed, Launch, Lost
from pretrain_xla.launch.gcloud import GcloudError
from pretrain_xla.launch.progress import progress_line
from pretrain_xla.launch.workers import check_there, follow_call, start

ASKED_TO_STOP = (128 + 2, 128 + 10, 128 + 15)
LOST_OTHERS = 75
STARTS = 5
"""Starts without a step between them until another slice is tried."""


@dataclass
class Watch:
    """One slice while its run goes on."""

    launch: Launch
    _changed: float = field(default=0.0)
    _heard: float = field(default=0.0)
    _shown: float = field(default=0.0)
    _step: int = -1
    _told: int = -1
    _ended: bool = False
    _again: bool = False
    _exit: int | None = None
    _last_words: str = ""
    _restarted: bool = False
    _starts: int = 0
    _started_at: int = -2

    def until_done(self) -> None:
        """Return when the run is done.

        Raises:
            Lost: the slice is gone, or of no use.
            Failed: the run ended with an error.
            Spent: the budget is spent.
        """
        clock = self.launch.clock
        self._changed = self._heard = clock.now()
        while True:
            self._connection()
            if self._exit == 0:
                return
            self.launch.check_budget()
            check_there(self.launch)
            self._judge()

    def _connection(self) -> None:
        """Follow over one connection, to its end for whatever reason."""
        launch, self._again = self.launch, False
        call = follow_call(launch, 0, launch.state.offset, launch.timing.follow)
        lines = launch.gcloud.lines(call, launch.timing.silence)
        try:
            for line in lines:
                self._take(line)
                if self._restarted or self._ended or self._again:
                    return
        except GcloudError as error:
            silent = launch.clock.now() - self._heard
            if silent > launch.timing.unreachable:
                check_there(launch)
                raise Lost(f"worker 0 has not answered for {silent:.0f} s: {error.text}") from None
            launch.sleep(min(launch.timing.poll, 5.0))
        finally:
            lines.close()  # type: ignore[attr-defined]

    def _take(self, line: bytes) -> None:
        """One line from `follow.py`; others, of the connection or the shell, are left out."""
        try:
            tree = json.loads(line)
        except ValueError:
            return
        if not isinstance(tree, dict):
            return
        self._heard = self.launch.clock.now()
        if "log" in tree:
            # gcloud runs a command again when its connection drops; then what was shown would come again.
            self._again = tree["begin"] != self.launch.state.offset
            if not self._again:
                self.launch.state.offset = tree["offset"]
                self._log(str(tree["log"]))
        if "status" in tree:
            self._status(tree["status"])

    def _log(self, text: str) -> None:
        text = self.launch.masked(text)
        append(os.path.join(self.launch.local, "launch", f"log_{self.launch.state.attempt}.txt"), text)
        for line in text.splitlines():
            self.launch.print(line)
            if line.startswith("supervise: "):
                self._last_words = line.removeprefix("supervise: ")
                self._restarted = self._restarted or "starts again in" in line

    def _status(self, status: dict[str, Any]) -> None:
        launch, now = self.launch, self.launch.clock.now()
        row = status.get("row")
        if isinstance(row, dict) and row.get("step") != self._step:
            self._step, self._changed = row["step"], now
            more = {"steps": launch.steps, "tokens_per_step": launch.tokens_per_step, "seen": now}
            launch.state.progress = {**row, **more}
        if now - self._shown >= launch.timing.progress and self._step not in (-1, self._told):
            self._shown, self._told = now, self._step
            launch.say(progress_line(launch.state, launch.tokens_per_step, now))
        self._exit = status.get("exit")
        if not status.get("running"):
            self._ended = True  # looked at by `_judge`
            return
        launch.check_budget()
        minutes = (now - self._changed) / 60
        if minutes > launch.state.stall_minutes:
            raise Lost(f"no step for {minutes:.3g} minutes")

    def _judge(self) -> None:
        """After a connection has ended and the slice is there: what its end means."""
        launch = self.launch
        ended, self._ended = self._ended, False
        restarted, self._restarted = self._restarted, False
        if ended and self._exit is not None and self._exit not in (*ASKED_TO_STOP, LOST_OTHERS):
            raise Failed(f"the run ended with status {self._exit}: {self._last_words or 'see its log'}")
        if ended and self._exit in ASKED_TO_STOP:
            launch.say(f"the run was asked to stop on its machine (status {self._exit}), perhaps for maintenance")
            launch.sleep(launch.timing.poll)
            check_there(launch)
        if ended or restarted:  # a process was killed, or a worker was: the run is started where it is missing
            self._starts = self._starts + 1 if self._step == self._started_at else 1
            self._started_at = self._step
            if self._starts > STARTS:
                raise Lost(f"the run was started {STARTS} times without a step: {self._last_words or 'see its log'}")
            start(launch, launch.timing.unreachable)
            self._exit = None


def append(path: str, text: str) -> None:
    """Append to a local file."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
