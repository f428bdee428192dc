"""`python -m pretrain_xla verify RUN`: are a run's numbers those that its checkpoint, data and settings give?

Some steps are made again from a checkpoint, by the trainer's own step, and their losses and gradient norms compared, bit for
bit, with those that the run has logged. They differ if anything that the steps depend on has changed or was never pinned: the
data, the code, a library, the devices, an operation that is not deterministic. Nothing is written.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain_xla.command_line import Parser
from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.flags import parse_flags
from pretrain_xla.run_folder.checkpoint import CheckpointStore
from pretrain_xla.run_folder.files import CONFIG_FILE
from pretrain_xla.run_folder.metrics import Row, metrics_path, read_metrics
from pretrain_xla.run_folder.report import read_summary
from pretrain_xla.runtime import start
from pretrain_xla.train.deferred_metrics import DeferredMetrics
from pretrain_xla.train.trainer import Trainer

PROGRAM = "python -m pretrain_xla verify"
COMPARED = ("loss", "grad_norm")


def verify_command(arguments: Sequence[str]) -> int:
    """Replay some steps of a run; returns the exit status: 0 if all are bit for bit as logged, 1 if not.

    Raises:
        UserError: there is nothing to compare, or the run cannot be replayed here.
    """
    parser = Parser(
        PROGRAM,
        description="Make steps of a run again from one of its checkpoints, and compare their losses and gradient norms bit "
        "for bit with metrics.jsonl. Exit status 0: equal, 1: they differ, 2: cannot be compared. Use the devices of the run. "
        "Takes all flags of `train` as well, to name data that have moved.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--steps", type=int, default=20, metavar="K", help="how many steps (20)")
    parser.add_argument(
        "--from-step", type=int, metavar="S", help="step of the checkpoint; 0: the new weights of the run's seed. Default: the "
        "newest that K logged steps follow, or else the one that most follow"
    )  # fmt: skip
    own, rest = parser.parse_known_args(list(arguments))
    if own.steps < 1:
        raise UserError(f"--steps {own.steps}: give at least 1")
    config = _config_of(own.run, rest)
    logged = _logged(metrics_path(own.run))
    first = _first(config, logged, own.from_step, own.steps)
    count = _followed_by(logged, first, own.steps)
    with tempfile.TemporaryDirectory(prefix="verify") as empty:
        rows = _replay(_starting_at(config, first, count, empty), count, read_summary(own.run))
    return _compare(rows, logged, own.run)


def _config_of(run_dir: str, flags: Sequence[str]) -> RunConfig:
    """The settings of a run, which may have been moved, with more flags."""
    file = os.path.join(run_dir, CONFIG_FILE)
    if not os.path.exists(file):
        raise UserError(f"{run_dir}: no {CONFIG_FILE} there: name the folder of a run")
    config = parse_flags(["--config", file, *flags], program=PROGRAM, description="").config
    if config.logging.run_dir is not None:
        return _changed(config, logging={"run_dir": run_dir})
    return _changed(config, checkpoint={"checkpoints_dir": run_dir})


def _changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=changes) for name, changes in sections.items()}
    )


def _logged(path: str) -> dict[int, Row]:
    """Step → its row of metrics."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file, so there is nothing to compare with")
    return {row["step"]: row for row in read_metrics(path) if "loss" in row}


def _followed_by(logged: Mapping[int, Row], first: int, most: int) -> int:
    """How many steps after step `first` are logged without a gap, up to `most`."""
    return next((count for count in range(most) if first + count + 1 not in logged), most)


def _first(config: RunConfig, logged: Mapping[int, Row], wanted: int | None, most: int) -> int:
    """The step to begin with."""
    root = config.checkpoints_dir
    steps = sorted({0, *CheckpointStore(root, limit=1).steps()})
    if wanted is not None and wanted not in steps:
        known = ", ".join(map(str, steps))
        raise UserError(f"--from-step {wanted}: {root} has no complete checkpoint of that step: choose among {known}")
    candidates = steps if wanted is None else [wanted]
    first = max(candidates, key=lambda step: (_followed_by(logged, step, most), step))
    if not _followed_by(logged, first, most):
        where = "any checkpoint" if wanted is None else f"step {wanted}"
        raise UserError(f"{metrics_path(config.run_dir)} has no step that follows {where}: there is nothing to compare")
    return first


def _starting_at(config: RunConfig, first: int, count: int, empty: str) -> RunConfig:
    """The config of a run from a checkpoint of this one, with no checkpoints of its own, that only trains."""
    source = f"{config.checkpoints_dir}/step_{first:08d}" if first else config.train.from_checkpoint
    weights_only = config.train.weights_only and not first
    return _changed(
        config,
        train={"from_checkpoint": source, "weights_only": weights_only, "train_steps": first + count, "mode": "train"},
        checkpoint={"checkpoints_dir": empty, "hub_repo": None, "resume": True},
        evaluation={"eval_tasks": ()},
        logging={"run_dir": empty, "sample_interval": None, "tensorboard": False},
        wandb={"wandb_logging": False},
    )


def _replay(config: RunConfig, count: int, summary: Mapping[str, Any]) -> list[Row]:
    """The metrics of the first `count` steps of a run; `summary` is what it has said of its devices."""
    if config.parallel.runtime == "xla" and config.parallel.is_multiprocess:
        raise UserError("verify runs one process a host, and this run had one a device: give --mp-start-method None")
    rows: list[Row] = []
    with contextlib.closing(start(config)) as runtime:
        trainer = Trainer(config, runtime)
        here = {"runtime": runtime.name, "device": runtime.device_name, "mesh": runtime.mesh}
        for what, one in here.items():
            if summary.get(what, one) != one:
                trainer.console.note(
                    f"the run's {what} was {summary[what]}, and here it is {one}: its numbers may differ"
                )
        first, interval, history_NM = trainer.start.step, config.logging.log_interval, trainer.new_history()
        metrics = DeferredMetrics(
            config, runtime, first, record=rows.extend, check=lambda _rows: None, tokens=lambda _step: 0
        )
        with trainer.batches_ahead(first + count) as batches:
            for done, tokens in enumerate(batches, start=first + 1):
                history_NM = trainer.update(done, tokens, history_NM)
                if (done - first) % interval == 0 or done == first + count:
                    metrics.request(history_NM, done)
        metrics.collect()
    return rows


def _compare(rows: Sequence[Row], logged: Mapping[int, Row], run_dir: str) -> int:
    """Print the result; returns the exit status."""
    what = f"{run_dir}: steps {rows[0]['step']} to {rows[-1]['step']}"
    parted = [(row["step"], name) for row in rows for name in COMPARED if not _same(row, logged[row["step"]], name)]
    if not parted:
        print(f"{what}: losses and gradient norms are bit for bit those that were logged")
        return 0
    step, name = parted[0]
    had, has = logged[step].get(name), rows[step - rows[0]["step"]][name]
    steps = len({step for step, _ in parted})
    word = name.replace("grad_norm", "gradient norm")
    print(
        f"{what}: they part at step {step}, whose {word} was {had!r} and is {has!r} now; {steps} of {len(rows)} steps differ"
    )
    return 1


def _same(row: Row, logged: Row, name: str) -> bool:
    one, other = row[name], logged.get(name)
    if other is None or not math.isfinite(other):  # the file has null for NaN and infinity
        return other is not None and not math.isfinite(one)
    return bool(one == other)
