"""TensorBoard and Weights & Biases: restarts do not repeat rows, and a failure does not end the run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.run_folder.metrics import MetricLog, read_metrics
from pretrain_xla.run_folder.trackers import WandB
from pretrain_xla.train.run import run

Make = Callable[..., RunConfig]
# wandb's own classes and messages (wandb/errors/errors.py, wandb/sdk/wandb_login.py); it is not installed here.
WANDB = """
class Error(Exception): pass
class CommError(Error): pass
class UsageError(Error): pass

sent, ended, fails, runs, axes, started = [], [], {}, {}, {}, []

class Run:
    def __init__(self, id):
        self.id, (self.step, self.summary) = id, runs.get(id, (0, {}))
    def define_metric(self, name, step_metric):
        axes[name] = step_metric
    def log(self, row, step):
        if fails.get("log") == step:
            raise CommError("Error communicating with W&B servers:\\nthe service process is not running")
        if step < self.step:
            return  # with a warning
        self.step = step
        self.summary.update(row)
        runs[self.id] = (step, self.summary)
        sent.append((step, row))
    def finish(self):
        ended.append(True)

def init(**settings):
    if "init" in fails:
        raise UsageError(fails["init"])
    started.append((settings["id"], settings["resume"]))
    return Run(settings["id"] or f"new{len(started)}")
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that raises as wandb does."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    sys.modules.pop("wandb")


def small(make_config: Make, steps: int = 5, **logging: Any) -> RunConfig:
    return make_config(
        train={"train_steps": steps, "valid_steps": 1, "train_batch_size": 2, "eval_batch_size": 2},
        logging={"log_interval": 1, **logging},
    )


@pytest.mark.usefixtures("tokens", "runtime")
def test_a_missing_login_is_an_error_before_training(wandb: Any, make_config: Make, tmp_path: Path) -> None:
    wandb.fails["init"] = "api_key not configured (no-tty). call wandb.login(key=[your_api_key])"
    with pytest.raises(UserError) as caught:
        run(small(make_config, wandb_logging=True))
    text = str(caught.value)
    assert text.startswith("Weights & Biases does not start (api_key not configured (no-tty). call wandb.login")
    assert "run `wandb login` or set WANDB_API_KEY, set WANDB_MODE=offline" in text
    assert text.endswith("or leave out --wandb-logging")
    assert not (tmp_path / "run").exists(), "the run has not started"


@pytest.mark.usefixtures("tokens", "runtime")
def test_a_failure_during_training_does_not_stop_the_run(
    wandb: Any, make_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.fails["log"] = 3
    run(small(make_config, wandb_logging=True, wandb_logging_interval=1))
    rows = [row["step"] for row in read_metrics(str(tmp_path / "run" / "metrics.jsonl")) if "loss" in row]
    assert rows == [1, 2, 3, 4, 5]
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: Weights & Biases failed (Error communicating with W&B servers:): the run continues without it; "
        "metrics.jsonl has all rows"
    ]


@pytest.mark.usefixtures("tokens", "runtime")
@pytest.mark.parametrize(("interval", "steps"), [(500, [5]), (2, [2, 4, 5]), (5, [5])])
def test_the_last_step_is_always_sent(interval: int, steps: list[int], wandb: Any, make_config: Make) -> None:
    run(small(make_config, wandb_logging=True, wandb_logging_interval=interval))
    assert [step for step, row in wandb.sent if "train/loss" in row] == steps
    assert wandb.ended == [True]
    assert [step for step, _ in wandb.sent] == sorted(step for step, _ in wandb.sent), "wandb drops earlier steps"


def test_a_resumed_run_continues_its_wandb_run_without_gap_or_double(
    wandb: Any, make_config: Make, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    config = make_config(logging={"wandb_logging": True, "wandb_logging_interval": 1})

    def train(*steps: int) -> list[dict[str, Any]]:
        return [{"step": step, "loss": float(step)} for step in steps]

    first = WandB(config, 0, pytest.fail)
    assert not (tmp_path / "run" / "wandb_id").exists(), "a run that does not begin leaves nothing"
    first.rows(train(1, 2, 3), "train")
    first.rows([{"step": 2, "valid_loss": 9.0}], "validation")
    # Killed. The newest checkpoint is that of step 2, whose evaluation was cut short, and is made up for.
    again = WandB(config, 2, pytest.fail)
    again.rows([{"step": 2, "shards/loss": 8.0}], "evaluation")
    again.rows(train(3, 4), "train")
    again.rows([{"step": 2, "valid_loss": 9.0}, {"step": 4, "valid_loss": 7.0}], "validation")
    again.close()
    assert wandb.started == [(None, None), ("new1", "allow")]
    found = [(kind, row[f"{kind}/step"]) for _, row in wandb.sent for kind in ("train", "validation", "evaluation")
             if f"{kind}/step" in row]  # fmt: skip
    assert found == [("train", 1), ("train", 2), ("train", 3), ("validation", 2), ("evaluation", 2), ("train", 4),
                     ("validation", 4)]  # fmt: skip
    assert wandb.axes["validation/*"] == "validation/step"
    # A new run in the folder, and one that the user names.
    WandB(config, 0, pytest.fail)
    WandB(make_config(logging={"wandb_logging": True, "wandb_resume_id": "mine"}), 2, pytest.fail)
    assert wandb.started[2:] == [(None, None), ("mine", "must")]


def test_tensorboard_shows_a_restarted_run_once(make_config: Make, tmp_path: Path) -> None:
    accumulator: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tmp_path / "run").mkdir()
    for value in (9.0, 8.0):
        log = MetricLog(make_config(logging={"tensorboard": True}), 0)
        log.write([{"step": 0, "valid_loss": value}], kind="validation")
        log.write([{"step": 1, "loss": value}], kind="train")
        log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    for name, step in (("validation/valid_loss", 0), ("train/loss", 1)):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [(step, 8.0)]


def test_samples_of_repeated_steps_are_dropped(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "samples.txt"
    texts = {2: "one\n--- step 9\ntwo", 4: "three", 6: "four"}

    def write(resumed: int, steps: list[int]) -> str:
        log = MetricLog(make_config(), resumed)
        for step in steps:
            log.write_sample(step, texts[step])
        log.close()
        return path.read_text()

    complete = write(0, [2, 4, 6])
    assert complete == "--- step 2\none\n --- step 9\ntwo\n--- step 4\nthree\n--- step 6\nfour\n"
    assert write(4, []) == complete[: complete.index("--- step 6")]
    assert write(3, [4, 6]) == complete
    assert write(0, [2, 4, 6]) == complete
