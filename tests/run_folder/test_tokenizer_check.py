"""A run and its data must have the same tokenizer, by whatever name or path."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain_xla.cli import pretrain
from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.evaluate.tasks import Reader, Settings, prepare_task
from pretrain_xla.flags import parse_flags
from pretrain_xla.interop.export import export_model
from pretrain_xla.interop.from_checkpoint import resolve_architecture
from pretrain_xla.interop.load import load_model
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.run_folder.tokenizer_check import tokenizer_of_run
from pretrain_xla.storage.checked_json import with_checksum
from pretrain_xla.tokenizers.fingerprint import TokenizerId, fingerprint
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.train import train_tokenizer
from pretrain_xla.train import run as runs
from pretrain_xla.train.resume import find_start

Make = Callable[..., RunConfig]
ONE, OTHER = "the cat sat on the mat, {} times", "we all live in a yellow submarine, {} of us"
SIZE = 280


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `again` by one tokenizer, `other` by another of the same size."""
    root = tmp_path_factory.mktemp("datasets")
    for name, text in (("one", ONE), ("other", OTHER)):
        train_tokenizer([text.format(n) for n in range(90)], SIZE, str(root / f"{name}_tokenizer"))
    os.rename(root / "one_tokenizer", root / "moved")
    for name, text, tokenizer in (
        ("one", ONE, "moved"),
        ("again", OTHER, "moved"),
        ("other", OTHER, "other_tokenizer"),
    ):
        (root / f"{name}.txt").write_text("\n<|endoftext|>\n".join(text.format(n) for n in range(90)))
        prepare(str(root / f"{name}.txt"), str(root / name), str(root / tokenizer), num_workers=1, progress=False)
    return root


@pytest.fixture
def config_of(datasets: Path, make_config: Make) -> Make:
    def make(name: str, valid: str | None = None, **changes: Any) -> RunConfig:
        folders = {"train_dir": f"{datasets / name}/train", "valid_dir": f"{datasets / (valid or name)}/valid"}
        changes["data"] = folders | changes.get("data", {})
        return make_config(**{"model": {"vocab_size": SIZE}, **changes})

    return make


def remove_keys(path: Path, *keys: str) -> None:
    """Rewrite a JSON file as it was before these keys existed."""
    tree = json.loads(path.read_text())
    checked = tree.pop("checksum", None) is not None
    left = {key: value for key, value in tree.items() if key not in keys}
    path.write_bytes(with_checksum(left) if checked else json.dumps(left).encode())


def test_other_shards_are_accepted_and_another_tokenizer_is_refused(
    config_of: Make, tmp_path: Path, datasets: Path
) -> None:
    config = config_of("one")
    runs.run(config)
    own = (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes()
    marker = next((tmp_path / "run" / "checkpoints").glob("step_*/checkpoint.json"))
    assert json.loads(marker.read_text())["tokenizer"] == fingerprint(load_tokenizer(str(datasets / "moved")))
    from_it = {
        "train": {"from_checkpoint": str(tmp_path / "run"), "train_steps": 4},
        "logging": {"run_dir": str(tmp_path / "new")},
    }
    for _ in ("now", "by checkpoints and datasets from before there were fingerprints"):
        messages: list[str] = []
        assert find_start(config_of("again"), "another", messages.append).step == 2
        assert "was trained on other shards" in messages[0]
        for changes in ({}, {"train": {"do_test": True}}, from_it):
            with pytest.raises(UserError, match=r"trained with another tokenizer than .*other/") as refusal:
                find_start(config_of("other", **changes), "another", messages.append)
        assert f"prepare --tokenizer {tmp_path}/run/tokenizer" in str(refusal.value)
        remove_keys(marker, "tokenizer", "checksum")
        for name in ("one", "again", "other"):
            remove_keys(datasets / name / "dataset.json", "tokenizer_fingerprint", "checksum")
    elsewhere = from_it | {"train": {"from_checkpoint": str(tmp_path / "export")}}
    export_model(load_model(str(tmp_path / "run")), elsewhere["train"]["from_checkpoint"])
    assert find_start(config_of("again", **elsewhere), "another", messages.append).step == 0
    with pytest.raises(UserError, match="export was trained with another tokenizer"):
        find_start(config_of("other", **elsewhere), "another", messages.append)
    with pytest.raises(UserError, match="trained with another tokenizer"):
        runs.run(config_of("other"))
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes() == own

    model = load_model(str(tmp_path / "run"))
    assert model.tokenizer is not None
    reader = Reader(lambda: load_tokenizer(str(model.tokenizer)), 8, SIZE, (1,))
    assert prepare_task(f"shards={datasets}/again/valid", Settings(), reader).items > 0
    with pytest.raises(UserError, match="other/valid: was made with another tokenizer than the model's"):
        prepare_task(f"shards={datasets}/other/valid", Settings(), reader)


def test_training_validation_and_text_have_one_tokenizer(config_of: Make, datasets: Path) -> None:
    assert tokenizer_of_run(config_of("one", "again")).name == str(datasets / "one" / "tokenizer" / "tokenizer.json")
    with pytest.raises(UserError, match=r"one/train was made with another tokenizer than .*other/valid"):
        tokenizer_of_run(config_of("one", "other"))
    tokenizer_of_run(config_of("one", data={"tokenizer": str(datasets / "moved")}))
    with pytest.raises(UserError, match=r"one/train was made with another tokenizer than tokenizer=bytes"):
        tokenizer_of_run(config_of("one", data={"tokenizer": "bytes"}))


def test_unknown_tokenizers_do_not_differ(datasets: Path) -> None:
    known = TokenizerId("0123456789abcdef")
    assert known.differs(TokenizerId("fedcba9876543210"))
    assert not known.differs(TokenizerId())
    assert not known.differs(TokenizerId(name="nowhere/tokenizer.json"))
    assert known.differs(TokenizerId(name="bytes"))
    assert not TokenizerId(name="gpt2").differs(TokenizerId(name="gpt2")), "and nothing is downloaded for it"


def test_the_vocabulary_size_is_that_of_the_data_unless_given(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def size(*more: str) -> tuple[str, str]:
        folders = [
            "--train-dir",
            f"{datasets}/one/train",
            "--valid-dir",
            f"{datasets}/one/valid",
            "--run-dir",
            f"{tmp_path}/r",
        ]
        small = (
            "--seq-length 8 --d-model 16 --num-layers 1 --num-heads 2 --d-ff 16 --train-steps 1 --train-batch-size 2"
        )
        arguments = [
            *folders,
            *small.split(),
            *"--eval-batch-size 2 --valid-steps 1 --warmup-steps 0 --no-tensorboard".split(),
            *more,
        ]
        pretrain(arguments, program="test", fixed={"runtime": "torch", "device": "cpu"})
        out = capsys.readouterr().out
        return next((line.split()[-1] for line in out.splitlines() if "vocab_size:" in line), ""), out

    assert size("--print-config")[0] == "280"
    arguments = ["--train-dir", f"{datasets}/one/train"]
    planned = parse_flags(arguments, program="preflight", description="", build=resolve_architecture)
    assert planned.config.model.vocab_size == 280, "preflight compiles what is trained"
    assert size("--print-config", "--vocab-size", "300")[0] == "300"
    assert "vocab_size 280 is that of" not in size("--vocab-size", "300")[1]  # as a run from before this default
    output = size("--train-steps", "2")[1]
    assert "vocab_size 300 is that of the run's checkpoint" in output
    assert "continuing from" in output
    assert "note: vocab_size 280 is that of" in size("--run-dir", f"{tmp_path}/other")[1]
