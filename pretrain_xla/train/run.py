"""A run, from a config to its end: in this process, or in one for each device."""

from __future__ import annotations

import functools
import os
import tempfile

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError, guarded
from pretrain_xla.interop import hub
from pretrain_xla.runtime import load_xla, say, start
from pretrain_xla.train.files import set_aside, write_run_files


def start_run(config: RunConfig) -> None:
    """Run a config in this process, or once for each device where it asks for multiprocessing."""
    if config.parallel.runtime == "xla" and config.parallel.is_multiprocess:
        _, notes = load_xla(config)
        say(notes)
        from pretrain_xla.runtime.xla_launch import launch

        launch(config, functools.partial(_run_replica, config))
        return
    _run_replica(config)


@guarded
def _run_replica(config: RunConfig, _index: int = 0) -> None:
    run(config)


def run(config: RunConfig) -> None:
    """Train, or only evaluate (`do_test`), on the devices that the config names.

    Raises:
        UserError: anything about the request that cannot be met, before training starts where that can be known.
    """
    main_process = os.environ.get("RANK", "0") == "0"
    if not config.train.do_test and main_process:
        check_writable(config)
        if config.checkpoint.hub_repo is not None:
            hub.check_writable(config.checkpoint.hub_repo)
    runtime = start(config)
    from pretrain_xla.train.trainer import Trainer

    try:
        trainer = Trainer(config, runtime)
        if config.train.do_test:
            trainer.evaluate()
            return
        if runtime.is_main:
            if not trainer.start.own and (aside := set_aside(config.run_dir)) is not None:
                trainer.console.note(f"{config.run_dir} held the records of an earlier run; they are in {aside} now")
            if trainer.start.step < config.train.train_steps:  # else nothing is done, and the old one stays true
                write_run_files(config)
        trainer.fit()
    finally:
        runtime.close()


def check_writable(config: RunConfig) -> None:
    """Make the run's folders and write to them once, before any device is touched.

    Raises:
        UserError: a folder cannot be made or written.
    """
    for key, folder in (("run_dir", config.run_dir), ("checkpoints_dir", config.checkpoints_dir)):
        if "://" in folder:
            continue  # a bucket is tried by its own client when the run looks for checkpoints
        try:
            os.makedirs(folder, exist_ok=True)
            # A file of its own for each process: they all try at the same time.
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"{key}={folder} cannot be written ({error.strerror}): name another folder") from None
