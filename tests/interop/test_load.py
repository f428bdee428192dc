"""Every kind of model name or path, loaded as our config and our tensors."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain_xla.config import RunConfig, build_config
from pretrain_xla.errors import UserError
from pretrain_xla.interop.load import load_model
from pretrain_xla.model import GPT, initialize
from pretrain_xla.run_folder.checkpoint import CheckpointInfo, CheckpointStore

TINY = {"vocab_size": 257, "vocab_multiple": 8, "seq_length": 12, "d_model": 16, "num_layers": 2, "num_heads": 2}


def save_run(folder: Path, config: RunConfig, losses: dict[int, float]) -> dict[int, GPT]:
    """A run with a checkpoint for each step; the models that were saved."""
    store, models = CheckpointStore(str(folder / "checkpoints"), limit=9), {}
    for step, loss in losses.items():
        models[step] = GPT(config.model)
        initialize(models[step], seed=step)
        tensors = {f"model.{name}": value.detach() for name, value in models[step].named_parameters()}
        tensors["optimizer.step"] = torch.tensor(step)
        store.save(tensors, CheckpointInfo(step, loss, "data", config.model_dump(mode="json")))
    store.close()
    return models


@pytest.mark.parametrize(
    ("inside", "which", "step"), [("", "newest", 2), ("", "best", 1), ("checkpoints", "newest", 2)]
)
def test_a_run_of_ours(inside: str, which: str, step: int, tmp_path: Path) -> None:
    config = build_config({"model": TINY | {"d_ff": 32}, "data": {"tokenizer": "bytes"}}, "test")
    models = save_run(tmp_path, config, {1: 1.0, 2: 2.0})
    loaded = load_model(str(tmp_path / inside), which)
    assert (loaded.config, loaded.tokenizer) == (config.model, "bytes")
    assert loaded.where.endswith(f"step_{step:08d}")
    model = GPT(loaded.config)
    model.load_state_dict(loaded.tensors, strict=True)
    for name, value in models[step].named_parameters():
        assert torch.equal(model.get_parameter(name), value)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tensors, config: config.clear(), "does not say which model it is of"),
        (lambda tensors, config: config.update(data=[]), "or its data: name another"),
        (
            lambda tensors, config: tensors.pop("model.final_norm.bias"),
            "step_00000003 lacks final_norm.bias: name another",
        ),
        (lambda tensors, config: tensors.update({"model.x": torch.ones(1)}), "holds x, which its model does not have"),
        (
            lambda tensors, config: tensors.update({"model.final_norm.bias": torch.ones(3)}),
            r"final_norm.bias in the shape \(3,\), and its model has \(16,\)",
        ),
    ],
)
def test_an_incomplete_run(edit: Callable[..., object], words: str, tmp_path: Path) -> None:
    config = build_config({"model": TINY | {"d_ff": 32}, "data": {"tokenizer": "bytes"}}, "test")
    save_run(tmp_path, config, {2: 1.0})
    store = CheckpointStore(str(tmp_path / "checkpoints"), limit=9)
    tensors, tree = store.load(2), config.model_dump(mode="json")
    edit(tensors, tree)
    store.save(tensors, CheckpointInfo(3, None, "data", tree))
    store.close()
    with pytest.raises(UserError, match=words) as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_misspelt_folder_is_not_only_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    with pytest.raises(UserError, match="runs/quickstrat: no such folder here; did you mean runs/quickstart"):
        load_model("runs/quickstrat")
    with pytest.raises(UserError) as caught:
        load_model("runs/somebody")
    assert str(caught.value).startswith(
        "runs/somebody: no such folder here, and runs/somebody on the Hugging Face Hub: "
    )
