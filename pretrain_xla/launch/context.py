"""One launch while it goes on: its state, and the means by which everything is done and told."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pretrain_xla.errors import UserError
from pretrain_xla.launch import state as states
from pretrain_xla.launch.bucket import Bucket
from pretrain_xla.launch.calls import Calls
from pretrain_xla.launch.clock import Clock
from pretrain_xla.launch.gcloud import Gcloud
from pretrain_xla.launch.state import State
from pretrain_xla.launch.timing import Timing
from pretrain_xla.redact import HIDDEN, redacted


class Lost(Exception):
    """The slice is gone or of no use. preempted: Google took it back, so that this says nothing about the run."""

    def __init__(self, why: str, preempted: bool = False) -> None:
        super().__init__(why)
        self.preempted = preempted


class Failed(Exception):
    """The launch cannot go on; the text says why, in one line."""


class Spent(Exception):
    """--max-dollars or --max-hours is spent; the text says which."""


@dataclass
class Launch:
    """See the module. secrets: variable → value. say: prints a line."""

    state: State
    calls: Calls
    gcloud: Gcloud
    bucket: Bucket
    clock: Clock
    timing: Timing
    secrets: dict[str, str]
    print: Callable[[str], None]
    local: str = ""
    """Local folder of the run's records."""
    steps: int = 0
    tokens_per_step: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set while threads that act on workers are to end."""
    _saving: threading.Lock = field(default_factory=threading.Lock)

    def say(self, line: str) -> None:
        """A line about the launch itself."""
        clock = time.strftime("%H:%M:%S", time.localtime(self.clock.now()))
        self.print(f"[{clock}] {self.masked(line)}")

    def masked(self, text: str) -> str:
        """The text without the values of secrets and without passwords in URLs."""
        for value in self.secrets.values():
            if value:
                text = text.replace(value, HIDDEN)
        return redacted(text)

    def enter(self, phase: str, message: str = "") -> None:
        """Go on to another phase, and write that down."""
        self.state.phase, self.state.message = phase, self.masked(message)
        self.save()

    def save(self) -> None:
        """Write the state to this machine and to the bucket; that the bucket does not answer ends nothing."""
        with self._saving:
            self.state.holder, self.state.holder_seen = states.holder(), self.clock.now()
            states.write_local(self.state)
            try:
                self.bucket.write(states.FILE, self.state.to_json())
            except UserError as error:
                self.say(f"warning: {error}; the state is in {states.local_path(self.state.name)}")

    @contextlib.contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Write the state again and again, so that launchers elsewhere know that this one is there."""
        left = threading.Event()

        def beat() -> None:
            while not left.wait(self.timing.progress):
                with contextlib.suppress(
                    RuntimeError
                ):  # the state was changed while it was written: the next beat writes it
                    self.save()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join()

    def check_budget(self) -> None:
        """Check that there is time and money left to go on, and to save and stop after that.

        Raises:
            Spent: there is not.
        """
        state = self.state
        later = self.clock.now() + (self.timing.stop if state.zone else 0.0)
        if state.max_dollars is not None and state.dollars(later) >= state.max_dollars:
            raise Spent(f"--max-dollars {state.max_dollars:g} is spent")
        if state.max_hours is not None and state.hours(later) >= state.max_hours:
            raise Spent(f"--max-hours {state.max_hours:g} is spent")

    def sleep(self, seconds: float) -> None:
        """Wait, as far as the budget goes."""
        self.check_budget()
        self.clock.sleep(seconds)
