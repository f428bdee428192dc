"""A run from its config to its end, in this process or in one process for each device."""

from __future__ import annotations

import contextlib
import functools
import time

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import guarded, out_of_memory
from pretrain_xla.interop import hub
from pretrain_xla.run_folder.files import set_aside, write_run_files
from pretrain_xla.run_folder.folders import local_folders, writable_folders
from pretrain_xla.run_folder.lock import alone_in
from pretrain_xla.run_folder.same_everywhere import check_same_settings, check_shared
from pretrain_xla.runtime import Runtime, join_hosts, load_xla, say, start
from pretrain_xla.train.watchdog import stacks_on_request

MEMORY = (
    "lower --train-batch-size and raise --gradient-accum-step (and --eval-batch-size, if it happens during validation), or add "
    "--rematerialization selective or full, --loss-chunk 1024, or --mesh-fsdp over more devices (xla); "
    "`python -m pretrain_xla preflight` estimates for a TPU what fits"
)


def start_run(config: RunConfig) -> None:
    """Run a config in this process, or in one process for each device if it asks for multiprocessing."""
    if config.parallel.runtime == "xla" and config.parallel.is_multiprocess:
        _, notes = load_xla(config)
        say(notes)
        from pretrain_xla.runtime.xla.launch import launch

        launch(config, functools.partial(_run_replica, config))
        return
    _run_replica(config)


@guarded
def _run_replica(config: RunConfig, _index: int = 0) -> None:
    run(config)


def run(config: RunConfig) -> None:
    """Train, or only evaluate (`--mode evaluate`), on the devices that the config names.

    Raises:
        UserError: the request cannot be met (reported before training, if that can be known by then), or the host or device
            ran out of memory or disk.
    """
    writes, began = config.train.mode != "evaluate", time.time()
    stacks_on_request()
    with contextlib.ExitStack() as stack:
        hosts = join_hosts(config)
        stack.callback(hosts.close)
        stack.enter_context(hosts)
        if hosts.is_first and writes:
            stack.enter_context(writable_folders(config))
            stack.enter_context(alone_in(local_folders(config)))
            if config.checkpoint.hub_repo is not None:
                hub.check_writable(config.checkpoint.hub_repo)
        check_same_settings(config, hosts)
        if writes:
            check_shared(config, hosts)
        with hosts, out_of_memory(MEMORY):
            runtime = start(config, hosts)
            stack.callback(runtime.close)
            _run_on(config, runtime, began)


def _run_on(config: RunConfig, runtime: Runtime, began: float) -> None:
    from pretrain_xla.train.trainer import Trainer

    trainer = Trainer(config, runtime, began)
    if config.train.mode == "evaluate":
        trainer.evaluate()
        return
    if runtime.is_main:
        if not trainer.start.own and (aside := set_aside(config.run_dir)) is not None:
            trainer.console.note(f"{config.run_dir} held the records of an earlier run; they are in {aside} now")
        if trainer.start.step < config.train.train_steps:  # otherwise nothing is done, and the old config stays valid
            write_run_files(config)
    trainer.fit()
