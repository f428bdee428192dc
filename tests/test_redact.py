"""Passwords and tokens in URLs are used, and shown nowhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pretrain_xla import cli
from pretrain_xla.config import build_config
from pretrain_xla.config_file import to_yaml
from pretrain_xla.data.manifest import dataset_info
from pretrain_xla.errors import UserError, guarded
from pretrain_xla.flags import parse_flags
from pretrain_xla.interop.command import export_command
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.redact import redacted, redacted_tree
from pretrain_xla.run_folder.checkpoint import CheckpointStore
from pretrain_xla.storage.files import filesystem
from tests.servers import WebServer

SECRETS = [
    ("s3://KEY:SE/CRET+x@bucket/path", "s3://***@bucket/path"),
    ("https://user:SECRET@host/f?token=SECRET&download=1", "https://***@host/f?token=***&download=1"),
    ("https://ghp_SECRET@github.com/a", "https://***@github.com/a"),
    ("https://:SECRET@host/x", "https://***@host/x"),
    ("https://u:SE@CRET@host/x", "https://***@host/x"),
    ("sftp://me:SECRET@host/x", "sftp://***@host/x"),
    ("simplecache::s3://KEY:SECRET@bucket/x", "simplecache::s3://***@bucket/x"),
    ("zip://a.csv::https://u:SECRET@h/x.zip", "zip://a.csv::https://***@h/x.zip"),
    (
        "https://h/x?X-Amz-Credential=SECRET&X-Amz-Signature=SECRET",
        "https://h/x?X-Amz-Credential=***&X-Amz-Signature=***",
    ),
    ("https://h/x?sv=2024&sig=SECRET", "https://h/x?sv=2024&sig=***"),
    ("https://h/x?id=a0a1a2a3a4a5a6a7a8", "https://h/x?id=***"),
    ("https://h/x#access_token=SECRET", "https://h/x#access_token=***"),
    ("cannot read https://a:SECRET@h/x: 'https://b:SECRET@h'", "cannot read https://***@h/x: 'https://***@h'"),
]
PLAIN = [
    "https://host:8080/a@b",
    "https://[::1]:80/x@y",
    "github://org:repo@main/x",
    "abfs://container@account.dfs.core.windows.net/p",
    "hf://datasets/owner/name@revision/file",
    "gs://bucket/part-0000?.jsonl",
    "https://host/file?download=true&versionId=1",
    "a: b@c, and no URL",
]


@pytest.mark.parametrize(("text", "shown"), SECRETS)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown
    assert redacted_tree({"a": [text, 1], "b": (text, None)}) == {"a": [shown, 1], "b": [shown, None]}


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_not_a_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_messages_and_saved_configs_hide_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @guarded
    def fail() -> None:
        raise UserError("https://u:SECRET@h/x: no such file")

    with pytest.raises(SystemExit):
        fail()
    assert capsys.readouterr().err == "error: https://***@h/x: no such file\n"
    tree = {"data": {"train_dir": "s3://KEY:SECRET@b/x"}, "evaluation": {"eval_tasks": ["text=https://u:SECRET@h"]}}
    config, path = build_config(tree, "test"), str(tmp_path / "config.yaml")
    Path(path).write_text(to_yaml(config))
    assert "SECRET" not in Path(path).read_text()
    with pytest.raises(
        UserError, match=r"train_dir=s3://\*\*\*@b/x: its password or token was removed .* with --train-dir"
    ):
        parse_flags(["--config", path], program="x", description="x")
    again = ["--train-dir", "s3://KEY:SECRET@b/x", "--eval-tasks", "text=https://u:SECRET@h"]
    assert parse_flags(["--config", path, *again], program="x", description="x").config == config


def test_a_run_from_a_server_that_asks_for_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Prepare and train over HTTP, export: the server gets the password, and no file or line of output holds it."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    web = tmp_path / "web"
    web.mkdir()
    (web / "text.jsonl").write_text("".join(f'{{"text": "some text {n} and more"}}\n' for n in range(400)))
    for split in ("train", "valid"):
        np.save(web / f"{split}.npy", (np.arange(3000) * 7 % 61).astype(np.uint16))
    with WebServer(web) as server:
        url = server.address.replace("http://", "http://me:SECRET@") + "/"
        prepare(url + "text.jsonl", "dataset", tokenizer="bytes", num_workers=1, valid_fraction=0.2)
        info = dataset_info("dataset")
        assert info is not None
        assert info.recipe.source == redacted(url) + "text.jsonl"
        folders = (
            f"--train-dir {url}train.npy --valid-dir {url}valid.npy --run-dir run --train-steps 2 --no-tensorboard"
        )
        small = (
            "--vocab-size 61 --seq-length 12 --d-model 16 --num-layers 1 --num-heads 2 --d-ff 32 --train-batch-size 2"
        )
        rest = "--eval-batch-size 2 --valid-steps 1 --warmup-steps 1 --decay-steps 20 --cache-dir cache"
        flags = f"{folders} {small} {rest}".split()
        cli.pretrain(flags, program="run_pretrain.py", fixed={"runtime": "torch", "device": "cpu"})
        assert server.authorizations == {"Basic bWU6U0VDUkVU"}  # me:SECRET
        export_command(["run", "out"])
    files = [path for folder in ("dataset", "run", "out") for path in Path(folder).rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"dataset.json", "config.yaml", "checkpoint.json", "README.md"}
    assert [str(path) for path in files if b"SECRET" in path.read_bytes()] == []
    out, err = capfd.readouterr()
    assert "SECRET" not in out + err


@pytest.mark.parametrize(
    "url", ["s3://KEY:HUSHED@bucket/x", "gs://u:HUSHED@bucket/x", "simplecache::s3://KEY:HU/SHED@bucket/x"]
)
def test_a_buckets_url_holds_no_credentials(url: str) -> None:
    """Its library would look for a bucket of that name, and print it."""
    for action in (lambda: filesystem(url), lambda: CheckpointStore(url, limit=1)):
        with pytest.raises(
            UserError, match="a bucket's URL cannot hold credentials: put them into AWS_ACCESS_KEY_ID"
        ) as error:
            action()
        assert "HUSHED" not in str(error.value)
        assert "SHED" not in str(error.value)
    assert filesystem("https://me:SECRET@host/x")[1] == "https://me:SECRET@host/x"
