"""Pushing a run's checkpoints to the Hub while it trains.

One thread, and never more than one checkpoint waiting: when the network is slower than the run, the newest waits and those in
between are skipped. A network error is a warning, and the upload is retried with the next checkpoint; it never stops the run,
whose checkpoints are complete on disk. The newest one that an earlier start of the run did not push, because it was killed
before, is pushed at the next start.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.interop.hub import push_checkpoint, steps
from pretrain_xla.run_folder.checkpoint import CheckpointStore
from pretrain_xla.run_folder.files import CONFIG_FILE, TOKENIZER_FOLDER


@contextlib.contextmanager
def pushing(config: RunConfig, store: CheckpointStore, warn: Callable[[str], None]) -> Iterator[None]:
    """While it is open, each checkpoint of a run is pushed, if the config asks for it; leaving it waits for the last one."""
    repository = config.checkpoint.hub_repo
    if repository is None:
        yield
        return
    uploader = Uploader(repository, config.run_dir, store, warn)
    uploader.make_up()
    try:
        yield
    finally:
        try:
            store.wait()  # before the uploader closes, which needs the last checkpoint
        finally:
            uploader.close()


class Uploader:
    """Pushes checkpoints of one run in the background.

    Args:
        repository: `owner/name`.
        run_dir: the run's folder, whose config.yaml and tokenizer are pushed, too.
        store: its local checkpoints; those written from now on are pushed.
        warn: prints a warning.
    """

    def __init__(self, repository: str, run_dir: str, store: CheckpointStore, warn: Callable[[str], None]) -> None:
        self.repository = repository
        self._run_dir, self._store, self._warn = run_dir, store, warn
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub")
        self._lock = threading.Lock()
        self._waiting: int | None = None
        self._running: int | None = None
        self._task: Future[None] | None = None
        store.written, store.in_use = self.push, self.busy

    def make_up(self) -> None:
        """Push the newest checkpoint if the repository lacks it."""
        if (newest := self._store.newest()) is not None:
            self._task = self._thread.submit(self._push_missing, newest)

    def _push_missing(self, newest: int) -> None:
        try:
            if newest in steps(self.repository):
                return
        except UserError as error:
            self._warn(str(error))
            return
        with self._lock:
            if self._running is not None:
                return  # a newer one is about to be pushed
            self._running = self._waiting = newest
        self._run()

    def push(self, step: int) -> None:
        """Upload the checkpoint of a step after the current upload."""
        with self._lock:
            self._waiting = step
            if self._running is None:
                self._running = step
                self._task = self._thread.submit(self._run)

    def busy(self) -> set[int]:
        """Steps whose folders must stay until they are uploaded."""
        with self._lock:
            return {step for step in (self._waiting, self._running) if step is not None}

    def close(self) -> None:
        """Finish the current and the waiting upload; then remove older checkpoints.

        Of those that are kept, the ones skipped during training are pushed now: the best may be among them.
        """
        self._thread.shutdown(wait=True)
        self._store.prune()
        if self._task is not None:
            self._task.result()  # re-raises errors that are not network errors
            self._push_left_out()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._running, self._waiting = self._waiting, None
                step = self._running
            if step is None:
                return
            self._push(step)

    def _push(self, step: int) -> bool:
        try:
            push_checkpoint(self.repository, self._store, step, self._files())
        except UserError as error:
            self._warn(f"the checkpoint of step {step} was not pushed: {error}")
            return False
        return True

    def _push_left_out(self) -> None:
        try:
            missing = self._store.kept() - set(steps(self.repository))
        except UserError as error:
            self._warn(str(error))
            return
        for step in sorted(missing):
            if not self._push(step):
                return  # the network is down: the others would fail as well

    def _files(self) -> dict[str, str]:
        names = [CONFIG_FILE]
        if os.path.isdir(os.path.join(self._run_dir, TOKENIZER_FOLDER)):
            names += [
                f"{TOKENIZER_FOLDER}/{name}" for name in os.listdir(os.path.join(self._run_dir, TOKENIZER_FOLDER))
            ]
        return {name: os.path.join(self._run_dir, name) for name in names}
