"""A run, from a config to its end: in this process, or in one for each device."""

from __future__ import annotations

import functools
import os

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError, guarded
from pretrain_xla.interop import hub
from pretrain_xla.runtime import start
from pretrain_xla.train.files import write_run_files


def start_run(config: RunConfig) -> None:
    """Run a config in this process, or once for each device where it asks for multiprocessing."""
    if config.parallel.runtime == "xla":
        try:
            from pretrain_xla.runtime import xla
        except ModuleNotFoundError:
            pass  # `runtime.start` says what to install
        else:
            if xla.is_multiprocess(config):
                xla.launch(config, functools.partial(_run_replica, config))
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
        probe = os.path.join(folder, ".writable")
        try:
            os.makedirs(folder, exist_ok=True)
            with open(probe, "w", encoding="utf-8"):
                pass
            os.remove(probe)
        except OSError as error:
            raise UserError(f"{key}={folder} cannot be written ({error.strerror}): name another folder") from None
