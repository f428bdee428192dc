"""One process of a run, from a config to its end."""

from __future__ import annotations

import os

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.runtime import start
from pretrain_xla.train.files import write_run_files


def run(config: RunConfig) -> None:
    """Train, or only evaluate (`do_test`), on the devices that the config names.

    Raises:
        UserError: anything about the request that cannot be met, before training starts where that can be known.
    """
    main_process = os.environ.get("RANK", "0") == "0"
    if not config.train.do_test and main_process:
        check_writable(config)
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
