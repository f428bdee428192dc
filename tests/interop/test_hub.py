"""The Hub: fetched from, pushed to and continued from, over real HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants

from pretrain_xla import cli
from pretrain_xla.config import build_config
from pretrain_xla.errors import UserError
from pretrain_xla.interop.command import export_command, import_command
from pretrain_xla.interop.hub import check_writable, download_checkpoint
from pretrain_xla.interop.load import load_model
from pretrain_xla.interop.upload import Uploader
from pretrain_xla.run_folder.checkpoint import CheckpointInfo, CheckpointStore
from pretrain_xla.storage.checked_json import with_checksum
from pretrain_xla.train.resume import find_start

from .conftest import assert_same_tensors, noise
from .hub_server import Hub, serve
from .test_load import TINY, save_run

SMALL = "--vocab-size 61 --seq-length 12 --d-model 16 --num-layers 2 --num-heads 2 --d-ff 32".split()


Pretrain = Callable[..., str]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def online(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server as the Hub of this process."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    return hub


@pytest.fixture
def pretrain(
    online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Pretrain:
    """`run_pretrain.py` with the server as its Hub; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for split in ("train", "valid"):
        (tmp_path / "data" / split).mkdir(parents=True)
        walk = np.cumsum(np.random.default_rng(0).integers(0, 3, 4000)) % 61
        np.save(tmp_path / "data" / split / "0.npy", walk.astype(np.uint16))
    data = "--train-dir data/train --valid-dir data/valid --valid-steps 2 --valid-interval 100 --no-tensorboard".split()
    loop = "--train-batch-size 4 --eval-batch-size 4 --save-interval 2 --warmup-steps 1 --decay-steps 20".split()

    def run(*words: str) -> str:
        capsys.readouterr()
        cli.pretrain([*data, *loop, *words], program="run_pretrain.py", fixed={"runtime": "torch", "device": "cpu"})
        return capsys.readouterr().out

    return run


def test_gpt2_by_its_name_prints_loss_and_perplexity(
    pretrain: Pretrain, online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small model stands in for OpenAI's: its architecture is taken from its config.json, and its loss is transformers'."""
    torch.manual_seed(0)
    shape = transformers.GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=4)
    theirs = noise(transformers.GPT2LMHeadModel(shape))
    theirs.save_pretrained(tmp_path / "model")
    online.put("openai-community/gpt2", files_of(tmp_path / "model"))
    words = ("--do-test", "--from-checkpoint", "gpt2", "--seq-length", "12")
    output = pretrain(*words)
    assert "note: the model is that of openai-community/gpt2" in output
    data = torch.from_numpy(np.load(tmp_path / "data" / "valid" / "0.npy").astype(np.int64))
    rows = data.unfold(0, 13, 12)[:8]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(theirs(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
    title, *figures = output.splitlines()[-3:]
    assert title == "** Testing results **"
    assert [line.split(": ")[0] for line in figures] == ["Loss", "Perplexity"]
    assert [float(line.split(": ")[1]) for line in figures] == pytest.approx([float(loss), float(loss.exp())], rel=1e-5)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pretrain(*words).splitlines()[-2:] == figures, "from the cache alone"


def test_with_neither_network_nor_cache_the_error_says_what_to_do(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"openai-community/gpt2 on .*: it cannot be downloaded, and is not in the cache"
    ):
        load_model("gpt2")


def test_a_run_is_pushed_while_it_trains_and_continued_elsewhere(
    pretrain: Pretrain, online: Hub, tmp_path: Path
) -> None:
    words = [*SMALL, "--hub-repo", "alice/run", "--saved-checkpoint-limit", "1", "--log-interval", "1"]
    pretrain(*words, "--train-steps", "6", "--run-dir", "here")
    assert online.private == {"alice/run": True}
    pushed = files_of(tmp_path / "here" / "checkpoints")
    held = {
        n.removeprefix("checkpoints/"): d for n, d in online.files("alice/run").items() if n.startswith("checkpoints/")
    }
    assert held == pushed, "those that are kept here, and no other"
    assert online.files("alice/run")["config.yaml"] == (tmp_path / "here" / "config.yaml").read_bytes()
    for files in online.commits["alice/run"]:
        folders = {path.split("/")[1] for path in files if path.startswith("checkpoints/")}
        assert all(f"checkpoints/{folder}/checkpoint.json" in files for folder in folders), "never half of one"
    output = pretrain(*words, "--train-steps", "8", "--run-dir", "there")
    assert "step_00000006" in output
    assert '"step": 7' in (tmp_path / "there" / "metrics.jsonl").read_text()
    assert '"step": 6,' not in (tmp_path / "there" / "metrics.jsonl").read_text()


def test_no_resume_never_writes_over_a_run_on_the_hub(online: Hub, tmp_path: Path) -> None:
    online.put("alice/run", {"checkpoints/step_00000008/checkpoint.json": b"{}", "checkpoints/step_00000009/x": b""})
    tree = {"checkpoint": {"hub_repo": "alice/run", "resume": False, "checkpoints_dir": str(tmp_path / "c")}}
    with pytest.raises(UserError, match="--no-resume, but alice/run on the Hub holds checkpoints up to step 8"):
        find_start(build_config(tree, "test"), "data", print)


def test_training_does_not_begin_where_it_cannot_push(
    pretrain: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit, match="2"):
        pretrain(*SMALL, "--train-steps", "2", "--run-dir", "run", "--hub-repo", "alice/run")
    assert capsys.readouterr().err == (
        "error: alice/run on the Hugging Face Hub: you are not logged in: run `hf auth login`, or set HF_TOKEN, with a token "
        "that may write to it\n"
    )
    assert not list((tmp_path / "run").rglob("step_*"))


@pytest.mark.parametrize(
    ("token", "repository", "line"),
    [
        ("hf_read", "alice/run", r"the Hub refuses \(403: no such repository, or not yours\): run `hf auth login`"),
        ("hf_write", "bob/run", r"the Hub refuses \(403"),
        ("hf_wrong", "alice/run", r"the Hub refuses \(401"),
        ("hf_write", "run", "'run' is not a repository of the Hugging Face Hub: name it owner/name"),
    ],
)
def test_permission_is_checked(
    token: str, repository: str, line: str, online: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    online.put("bob/run", {})
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=line) as caught:
        check_writable(repository)
    assert "\n" not in str(caught.value)


def test_it_is_one_or_the_other() -> None:
    tree = {
        "checkpoint": {"hub_repo": "alice/run", "checkpoints_dir": "gs://bucket/run"},
        "logging": {"run_dir": "run"},
    }
    with pytest.raises(UserError, match="hub_repo=alice/run needs a local checkpoints_dir"):
        build_config(tree, "test")


@pytest.mark.parametrize(("which", "step"), [("newest", 5), ("best", 3)])
def test_a_pushed_run_is_a_model(which: str, step: int, online: Hub, tmp_path: Path) -> None:
    config = build_config({"model": TINY | {"d_ff": 32}, "data": {"tokenizer": "bytes"}}, "test")
    models = save_run(tmp_path, config, {3: 1.0, 5: 2.0})
    online.put("alice/run", files_of(tmp_path))
    loaded = load_model("alice/run", which)
    assert loaded.where.endswith(f"step_{step:08d}")
    assert torch.equal(loaded.tensors["final_norm.weight"], models[step].final_norm.weight)


def test_an_export_is_pushed_and_imported(
    online: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = build_config({"model": TINY | {"d_ff": 32}, "data": {"tokenizer": "bytes"}}, "test")
    models = save_run(tmp_path / "run", config, {3: 1.0})
    export_command(["run", "out", "--push-to", "alice/mine"])
    assert f"pushed to {online.url}/alice/mine" in capsys.readouterr().out
    held = online.files("alice/mine")
    assert {n: d for n, d in held.items() if n != ".gitattributes"} == files_of(tmp_path / "out")
    assert b'from_pretrained("alice/mine")' in held["README.md"]
    import_command(["alice/mine", "back"])
    assert "alice/mine -> back" in capsys.readouterr().out
    loaded = load_model("back")
    assert loaded.config == config.model
    assert_same_tensors(loaded.tensors, models[3])
    with pytest.raises(UserError, match=r"alice/none on the Hugging Face Hub: .*404"):
        import_command(["alice/none", "nothing"])


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def pushing(online: Hub, tmp_path: Path) -> tuple[Uploader, CheckpointStore, list[str]]:
    """An uploader in this process, with its store, and what it said."""
    online.put("alice/run", {})
    (tmp_path / "config.yaml").write_text("model: {}\n")
    store, said = CheckpointStore(str(tmp_path / "checkpoints"), limit=1), list[str]()
    return Uploader("alice/run", str(tmp_path), store, said.append), store, said


def save(store: CheckpointStore, step: int, loss: float | None = None) -> None:
    store.save({"model.weight": torch.full((1000,), float(step))}, CheckpointInfo(step, loss, "", {}))
    store.wait()


def steps_on(hub: Hub) -> set[int]:
    folders = {path.split("/")[1] for path in hub.files("alice/run") if path.startswith("checkpoints/")}
    return {int(folder.removeprefix("step_")) for folder in folders}


def test_training_never_waits_and_checkpoints_being_uploaded_are_kept(
    online: Hub, pushing: tuple[Uploader, CheckpointStore, list[str]]
) -> None:
    uploader, store, said = pushing
    online.slow.clear()
    for step in (1, 2, 3, 4):
        save(store, step)  # returns, though the first is not through
    assert uploader.busy() == {1, 4}
    assert store.steps() == [1, 3, 4], "the one under way, the one that waited when 4 was written, and 4"
    online.slow.set()
    uploader.close()
    store.close()
    assert said == []
    assert online.messages["alice/run"][1:] == ["Checkpoint of step 1", "Checkpoint of step 4"]
    assert steps_on(online) == {4}
    assert store.steps() == [4], "nothing holds the others any more"


def test_what_an_earlier_start_did_not_push_is_made_up_for(
    online: Hub, pushing: tuple[Uploader, CheckpointStore, list[str]]
) -> None:
    uploader, store, said = pushing
    uploader.make_up()  # there is none yet
    uploader.close()
    for step in (1, 2):
        save(CheckpointStore(store.root, limit=1), step)
    for _ in range(2):
        again = Uploader("alice/run", uploader._run_dir, store, said.append)
        again.make_up()
        again.close()
    store.close()
    assert said == []
    assert online.messages["alice/run"][1:] == ["Checkpoint of step 2"], "once"
    assert steps_on(online) == {2}


def test_what_was_pushed_elsewhere_is_kept_by_the_same_rule(
    online: Hub, pushing: tuple[Uploader, CheckpointStore, list[str]]
) -> None:
    uploader, store, said = pushing
    markers = {step: CheckpointInfo(step, loss, "", {}) for step, loss in {6: 1.0, 9: 2.0, 10: 3.0}.items()}
    path = "checkpoints/step_{:08d}/checkpoint.json"
    written = {step: with_checksum(asdict(replace(info, index=0))) for step, info in markers.items()}
    online.put("alice/run", {path.format(step): content for step, content in written.items()})
    save(store, 12, loss=1.5)
    uploader.close()
    store.close()
    assert said == []
    assert steps_on(online) == {6, 12}, "the best, which only the Hub has, and the newest"


def test_a_damaged_marker_on_the_hub_harms_no_other(
    online: Hub, pushing: tuple[Uploader, CheckpointStore, list[str]]
) -> None:
    uploader, store, said = pushing
    for step in (7, 8):
        save(store, step, loss=1.0)
    uploader.close()
    online.put("alice/run", online.files("alice/run") | {"checkpoints/step_00000010/checkpoint.json": b'{"step'})
    again = Uploader("alice/run", uploader._run_dir, store, said.append)
    assert download_checkpoint("alice/run").endswith("step_00000008")
    assert download_checkpoint("alice/run", "best").endswith("step_00000007"), "of equals the first"
    save(store, 9)
    again.close()
    store.close()
    assert said == []
    assert steps_on(online) == {7, 9, 10}, "what cannot be understood is left alone"


def test_the_best_checkpoint_is_pushed_at_the_end_if_it_was_skipped(
    online: Hub, pushing: tuple[Uploader, CheckpointStore, list[str]]
) -> None:
    uploader, store, said = pushing
    online.slow.clear()
    for step, loss in {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0}.items():
        save(store, step, loss)
    online.slow.set()
    uploader.close()
    store.close()
    assert said == []
    assert steps_on(online) == set(store.steps()) == {2, 4}


def test_a_run_that_the_hub_is_ahead_of_is_not_pushed_there(online: Hub, tmp_path: Path) -> None:
    online.put("alice/run", {"checkpoints/step_00000008/checkpoint.json": b"{}"})
    store = CheckpointStore(str(tmp_path / "c"), limit=1)
    save(store, 7)
    store.close()
    config = build_config({"checkpoint": {"hub_repo": "alice/run", "checkpoints_dir": str(tmp_path / "c")}}, "test")
    with pytest.raises(
        UserError, match=r"holds checkpoints up to step 8, and .*/c only up to 7: name another --hub-repo"
    ):
        find_start(config, "data", print)


def test_a_network_error_is_a_warning_and_retried(
    online: Hub, pushing: tuple[Uploader, CheckpointStore, list[str]]
) -> None:
    uploader, store, said = pushing
    online.failing = True
    save(store, 1)
    wait_until(lambda: not uploader.busy())
    assert len(said) == 1
    assert said[0].startswith("the checkpoint of step 1 was not pushed: alice/run on the Hugging Face Hub: ")
    online.failing = False
    save(store, 2)
    uploader.close()
    store.close()
    assert online.messages["alice/run"][1:] == ["Checkpoint of step 2"]
