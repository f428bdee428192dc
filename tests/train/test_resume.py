"""Where a run starts or resumes, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain_xla.config import ModelConfig, RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.interop.load import load_model
from pretrain_xla.model import GPT, initialize
from pretrain_xla.run_folder.checkpoint import MARKER, CheckpointInfo, CheckpointStore
from pretrain_xla.runtime.shards import Read, whole_region
from pretrain_xla.train.loss_scale import LossScale
from pretrain_xla.train.resume import check_same_model, find_start, load_start
from pretrain_xla.train.run import run
from pretrain_xla.train.start import Start

Make = Callable[..., RunConfig]


def save_checkpoints(config: RunConfig, *steps: int, root: str | None = None) -> dict[str, Tensor]:
    """Write checkpoints as a run of this config does; returns the tensors of the last."""
    store = CheckpointStore(root or config.checkpoints_dir, limit=9)
    tensors: dict[str, Tensor] = {}
    for step in steps:
        model = GPT(config.model)
        initialize(model, seed=step)
        tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
        tensors["optimizer.step"] = torch.tensor(step, dtype=torch.int32)
        store.save(tensors, CheckpointInfo(step, float(step), "data", config.model_dump(mode="json")))
    store.close()
    return tensors


def copy_in(tensors: Mapping[str, Tensor], read: Read) -> None:
    """Load tensors as one process does."""
    for name, tensor in tensors.items():
        tensor.copy_(read(name, [whole_region(tensor.shape)])[0])


def load(start: Start, **state: Tensor) -> dict[str, Tensor]:
    """Tensors that a start is loaded into; a name has `__` for a dot."""
    tensors = {name.replace("__", "."): tensor.clone() for name, tensor in state.items()}
    start.load(tensors, copy_in)
    return tensors


def test_a_new_run_starts_from_nothing(make_config: Make, tmp_path: Path) -> None:
    messages: list[str] = []
    start = find_start(make_config(), "data", messages.append)
    assert (start.step, start.tensors, start.own, messages) == (0, {}, False, [])
    assert start.store.root == str(tmp_path / "run" / "checkpoints")
    assert load_start(start, {"model.x": torch.ones(3)}, make_config(), "data", messages.append, copy_in) is start


def test_a_run_continues_from_its_newest(make_config: Make) -> None:
    config = make_config()
    messages: list[str] = []
    tensors = save_checkpoints(config, 3, 5)
    start = find_start(config, "data", messages.append)
    assert (start.step, start.own) == (5, True)
    assert messages == [f"continuing from {start.store.folder(5)}"]
    state = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    assert load_start(start, state, config, "data", messages.append, copy_in) is start
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    start.release()
    assert start.tensors == {}


def flip_a_bit(store: CheckpointStore, step: int, name: str) -> None:
    """Change a tensor's bytes in its file."""
    data = Path(store.folder(step)) / "__0_0.distcp"
    content, values = bytearray(data.read_bytes()), store.load(step)[name].numpy().tobytes()
    content[content.index(values) + len(values) // 2] ^= 2
    data.write_bytes(content)


@pytest.mark.usefixtures("tokens", "runtime")
def test_damaged_tensors_cost_one_interval(make_config: Make, tmp_path: Path) -> None:
    """The run continues from the checkpoint before, and writes the damaged one again; a named one is refused."""
    config = make_config(
        train={"train_steps": 6, "train_batch_size": 4, "valid_steps": 1, "eval_batch_size": 4},
        checkpoint={"save_interval": 2},
    )
    run(config)
    store = CheckpointStore(config.checkpoints_dir, limit=9)
    expected = store.load(6)
    for step in (4, 6):
        flip_a_bit(store, step, "optimizer.second_moment.blocks.1.feed_forward.up.weight")
    messages: list[str] = []
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    start = find_start(config, "", messages.append)
    assert load_start(start, state, config, "", messages.append, copy_in).step == 2
    assert all(torch.equal(state[name], tensor) for name, tensor in store.load(2).items())
    messages = [line for line in messages if "so that checkpoint is skipped" in line]
    what = (
        "is damaged (what is stored of optimizer.second_moment.blocks.1.feed_forward.up.weight is not what was written)"
    )
    assert messages == [
        f"{store.folder(6)} {what}, so that checkpoint is skipped for that of step 4",
        f"{store.folder(4)} {what}, so that checkpoint is skipped for that of step 2",
    ]
    for path in (store.folder(6), str(tmp_path / "run")):
        named = {"train": {"from_checkpoint": path, "train_steps": 9}, "logging": {"run_dir": str(tmp_path / "other")}}
        with pytest.raises(UserError, match="step_00000006 is damaged"):
            load_start(find_start(make_config(**named), "", print), state, config, "", print, copy_in)
    load_model(str(tmp_path / "run"))  # needs the model's tensors, which are whole
    run(config)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in store.load(6).items())
    for step in (2, 4, 6):
        flip_a_bit(store, step, "model.embedding.weight")
    with pytest.raises(UserError, match=r"step_00000002 is damaged .* and there is no other"):
        load_start(find_start(config, "", print), state, config, "", print, copy_in)
    with pytest.raises(UserError, match="step_00000006 is damaged"):
        load_model(str(tmp_path / "run"))


def test_a_run_continues_from_the_newest_intact_checkpoint(make_config: Make) -> None:
    config = make_config()
    save_checkpoints(config, 3, 5)
    marker = Path(config.checkpoints_dir) / "step_00000005" / MARKER
    marker.write_bytes(b"")  # as a kill leaves a marker that is written in place
    messages: list[str] = []
    start = find_start(config, "data", messages.append)
    assert start.step == 3
    assert messages[0].startswith(f"{marker} cannot be read")
    assert messages[1:] == [f"continuing from {start.store.folder(3)}"]
    (Path(config.checkpoints_dir) / "step_00000003" / MARKER).write_bytes(b"")
    with pytest.raises(UserError, match="and there is no other: remove that folder to start over"):
        find_start(config, "data", print)


def save_and_find_start(config: RunConfig, tensors: dict[str, Tensor], step: int) -> Start:
    store = CheckpointStore(config.checkpoints_dir, limit=9)
    store.save(tensors, CheckpointInfo(step, None, "data", config.model_dump(mode="json")))
    store.close()
    return find_start(config, "data", print)


def test_a_missing_tensor_is_not_replaced_by_zeros(make_config: Make) -> None:
    config = make_config()
    weight = torch.ones(3, 2)
    model = {"model.x": weight}
    moment, step = {"optimizer.first_moment.x": weight}, {"optimizer.step": torch.tensor(4, dtype=torch.int32)}
    start = save_and_find_start(config, {**model, **moment, **step}, 4)
    loaded = load(start, model__x=weight * 0, optimizer__first_moment__x=weight * 0)
    assert torch.equal(loaded["model.x"], weight)
    assert torch.equal(loaded["optimizer.first_moment.x"], weight)
    with pytest.raises(
        UserError, match=r"step_00000004 lacks optimizer.second_moment.x, without which update 5 would differ"
    ):
        load(start, model__x=weight, optimizer__second_moment__x=weight)
    with pytest.raises(UserError, match=r"holds optimizer.first_moment.x in another shape"):
        load(start, model__x=weight, optimizer__first_moment__x=weight.T)
    with pytest.raises(UserError, match=r"step_00000005 lacks optimizer.step"):
        load(save_and_find_start(config, model, 5), model__x=weight, optimizer__step=torch.tensor(0))
    start = find_start(config, "data", print)
    for state, words in (
        ({"model__y": weight}, "lacks y"),
        ({"model__x": weight.T}, r"holds x in the shape \(3, 2\)"),
        ({"model__x": weight, "model__blocks__all__y": weight}, "lacks blocks.0.y"),
        ({}, "holds x, which its model does not have"),
    ):
        with pytest.raises(UserError, match=f"step_00000005 {words}.*: name another"):
            load(start, **state)
    evaluated = find_start(make_config(train={"do_test": True}), "data", print)
    assert not load(evaluated, model__x=weight, optimizer__y=weight * 0)["optimizer.y"].any(), "none is needed"


def test_training_continues_with_the_weights_and_all_else_takes_their_mean(make_config: Make) -> None:
    name, mean = "model.final_norm.weight", "optimizer.average.final_norm.weight"
    config = make_config(optim={"average_fraction": 0.5})
    saved = save_checkpoints(config, 4)
    wanted = {f"model.{n}": p.detach() for n, p in GPT(config.model).named_parameters()}
    wanted |= {key.replace("model.", "optimizer.average."): torch.zeros_like(p) for key, p in wanted.items()}
    loaded = load(find_start(config, "data", print), **wanted)
    assert torch.equal(loaded[mean], saved[name]), "a run that did not average before begins with its weights"

    saved |= {key.replace("model.", "optimizer.average."): t + 1.0 for key, t in saved.items() if "model." in key}
    loaded = load(save_and_find_start(config, saved, step=5), **wanted)
    assert torch.equal(loaded[name], saved[name])
    assert torch.equal(loaded[mean], saved[name] + 1.0)
    evaluated = find_start(make_config(optim={"average_fraction": 0.5}, train={"do_test": True}), "data", print)
    assert torch.equal(load(evaluated, **wanted)[name], saved[name] + 1.0)
    assert torch.equal(load_model(config.run_dir).tensors["final_norm.weight"], saved[name] + 1.0)


def test_weights_from_elsewhere_have_no_optimizer(make_config: Make) -> None:
    weight = torch.ones(3, 2)
    start = save_and_find_start(make_config(), {"model.x": weight}, 0)
    assert not load(start, model__x=weight, optimizer__first_moment__x=weight * 0)["optimizer.first_moment.x"].any()


def test_weights_with_nan_are_refused(make_config: Make) -> None:
    start = Start(CheckpointStore(make_config().checkpoints_dir, 1), 1, {"model.x": torch.tensor([math.nan])}, "here")
    with pytest.raises(UserError, match=r"here: model.x holds NaN or infinity in 1 of 1 places"):
        load(start, model__x=torch.zeros(1))


def test_other_data_is_reported(make_config: Make) -> None:
    config = make_config()
    save_checkpoints(config, 3)
    messages: list[str] = []
    assert find_start(config, "other data", messages.append).step == 3
    assert len(messages) == 2
    assert "was trained on other shards" in messages[0]
    assert config.data.train_dir in messages[0]


def test_no_resume_never_overwrites_a_run(make_config: Make) -> None:
    config = make_config(checkpoint={"resume": False})
    assert find_start(config, "data", print).step == 0
    save_checkpoints(config, 3)
    with pytest.raises(
        UserError, match=r"--no-resume, but .*run/checkpoints holds checkpoints up to step 3: name another"
    ):
        find_start(config, "data", print)
    evaluated = make_config(checkpoint={"resume": False}, train={"do_test": True})
    assert find_start(evaluated, "data", print).step == 3


def test_from_another_runs_checkpoint(make_config: Make, tmp_path: Path) -> None:
    other = str(tmp_path / "other" / "checkpoints")
    tensors = save_checkpoints(make_config(), 4, 8, root=other)
    for path in (str(tmp_path / "other"), other, f"{other}/step_00000008"):
        start = find_start(make_config(train={"from_checkpoint": path, "train_steps": 9}), "data", print)
        assert start.step == 8
        assert torch.equal(start.tensors["model.embedding.weight"], tensors["model.embedding.weight"])
        assert start.store.root == str(tmp_path / "run" / "checkpoints"), "it writes to its own"
    with pytest.raises(UserError, match="none: no such file or folder, and no name on the Hub"):
        find_start(make_config(train={"from_checkpoint": str(tmp_path / "none")}), "data", print)


def test_a_runs_own_checkpoint_comes_first_except_in_an_evaluation(make_config: Make, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    save_checkpoints(make_config(), 8, root=other)
    save_checkpoints(make_config(), 3)
    assert find_start(make_config(train={"from_checkpoint": other}), "data", print).step == 3
    assert find_start(make_config(train={"from_checkpoint": other, "do_test": True}), "data", print).step == 8


def test_an_evaluation_without_a_checkpoint_is_reported(make_config: Make) -> None:
    messages: list[str] = []
    assert find_start(make_config(train={"do_test": True}), "data", messages.append).tensors == {}
    assert messages == ["there is no checkpoint: evaluating freshly initialised weights"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("d_model", 32), ("num_layers", 3), ("tie_weights", True), ("vocab_size", 38), ("positions", "rotary")],
)
def test_another_models_checkpoint_is_refused_by_the_key_that_differs(key: str, value: Any, make_config: Make) -> None:
    save_checkpoints(make_config(), 3)
    saved = getattr(make_config().model, key)
    with pytest.raises(UserError) as caught:
        find_start(make_config(model={key: value}), "data", print)
    line = str(caught.value)
    assert "step_00000003 is a checkpoint of another model" in line
    assert f"its {key} is {saved}, this run's is {value}" in line
    assert "\n" not in line


def test_what_does_not_change_the_weights_may_change() -> None:
    info = CheckpointInfo(1, None, "data", {"model": ModelConfig().model_dump(mode="json")})
    check_same_model(info, ModelConfig(), "folder")
    check_same_model(info, ModelConfig(dropout=0.1, attention="reference", init="fan_in"), "folder")
    with pytest.raises(UserError, match="norm_eps"):
        check_same_model(info, ModelConfig(norm_eps=1e-6), "folder")


def test_an_option_newer_than_the_checkpoint_has_its_default() -> None:
    saved = ModelConfig().model_dump(mode="json")
    del saved["qk_norm"]
    info = CheckpointInfo(1, None, "data", {"model": saved})
    check_same_model(info, ModelConfig(), "folder")
    with pytest.raises(UserError, match="its qk_norm is False, this run's is True"):
        check_same_model(info, ModelConfig(qk_norm=True), "folder")


def test_the_loss_scale_continues(make_config: Make) -> None:
    saved = {"loss_scale.scale": torch.tensor(1024.0), "loss_scale.good_steps": torch.tensor(7, dtype=torch.int32)}
    store = CheckpointStore(make_config().checkpoints_dir, 1)
    scale = LossScale(torch.device("cpu"))
    state = {f"loss_scale.{name}": tensor for name, tensor in scale.state.items()}
    Start(store, tensors=saved).load(state, copy_in)
    assert (float(scale.scale), int(scale.good_steps)) == (1024.0, 7)
    fresh = LossScale(torch.device("cpu"))
    Start(store).load({f"loss_scale.{name}": tensor for name, tensor in fresh.state.items()}, copy_in)
    assert float(fresh.scale) == 2.0**16
    Start(store, tensors=saved).load({}, copy_in)
    del saved["loss_scale.good_steps"]
    with pytest.raises(UserError, match=r"here lacks loss_scale.good_steps: name another"):
        Start(store, tensors=saved, where="here").load(state, copy_in)
