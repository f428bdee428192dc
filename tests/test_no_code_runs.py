"""No untrusted file runs code: each entry point is tried with a payload. `torch.distributed.checkpoint`'s is tried in
`interop/test_untrusted_checkpoint.py`, YAML's in `test_untrusted.py`.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pretrain_xla.data.dataset import open_dataset
from pretrain_xla.errors import UserError
from pretrain_xla.evaluate.lm_eval_command import _names_a_model
from pretrain_xla.interop.command import export_command, import_command
from pretrain_xla.interop.load import load_model
from pretrain_xla.prepare.inspect import inspect
from pretrain_xla.text.documents import read_documents
from pretrain_xla.text.sources import open_source
from pretrain_xla.tokenizers.load import load_tokenizer

from .payload import Payload

GPT2 = {"model_type": "gpt2", "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 8}
SCRIPT = "import os\nos.mkdir({made!r})\n"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return tmp_path / "made"


def refused(action: Callable[[], Any], expected: str, made: Path) -> None:
    with pytest.raises(UserError, match=expected) as error:
        action()
    assert "\n" not in str(error.value)
    assert not made.exists()


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("place", ["all", "config", "tensor"])
@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.ckpt", "pytorch_model.bin", "model.safetensors"])
def test_files_of_weights(name: str, place: str, is_zip: bool, tmp_path: Path, made: Path) -> None:
    payload = Payload(made)
    saved = {
        "all": payload,
        "config": {"model": {}, "config": argparse.Namespace(n_head=2, other=payload)},
        "tensor": {"model": {"transformer.wte.weight": payload}},
    }[place]
    torch.save(saved, tmp_path / name, _use_new_zipfile_serialization=is_zip)
    for action in (
        lambda: load_model(str(tmp_path / name)),
        lambda: import_command([str(tmp_path / name), str(tmp_path / "run")]),
        lambda: export_command([str(tmp_path / name), str(tmp_path / "out")]),
    ):
        refused(action, "would run code|cannot be read", made)
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    refused(load_model_of(tmp_path), "would run code|cannot be read|no weights", made)
    torch.load(tmp_path / name, weights_only=False, map_location="cpu")
    assert made.exists(), "the payload would have worked"


def load_model_of(path: Path) -> Callable[[], Any]:
    return lambda: load_model(str(path))


def test_shards_of_weights(tmp_path: Path, made: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "a.bin"}}))
    torch.save({"a": Payload(made)}, tmp_path / "a.bin")
    refused(load_model_of(tmp_path), r"a.bin: holds more than tensors \(.*mkdir\), and reading it would run code", made)


def test_a_class_of_settings_is_never_imported(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module would run code on import; an object that says it is built by a call of the class calls nothing."""
    (tmp_path / "untrusted_module.py").write_text("class GPTConfig:\n    def __init__(self, *a): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__("untrusted_module")

    class Called:
        def __reduce__(self) -> tuple[Any, ...]:
            return module.GPTConfig, (str(made),), {"n_head": 2}

    torch.save({"model": {}, "config": Called()}, tmp_path / "x.pt")
    del sys.modules["untrusted_module"]
    (tmp_path / "untrusted_module.py").write_text(SCRIPT.format(made=str(made)))
    refused(load_model_of(tmp_path / "x.pt"), "not those of a GPT-2 or nanoGPT", made)
    assert "untrusted_module" not in sys.modules


def test_code_in_a_models_folder_is_not_read(tmp_path: Path, made: Path) -> None:
    tree = GPT2 | {"auto_map": {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"}}
    template = "{{ cycler.__init__.__globals__.os.mkdir('" + str(made) + "') }}"
    (tmp_path / "config.json").write_text(json.dumps(tree))
    (tmp_path / "modeling.py").write_text(SCRIPT.format(made=str(made)))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "auto_map": tree["auto_map"]})
    )
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(Payload(made)))
    refused(load_model_of(tmp_path), "no weights there", made)
    refused(lambda: load_tokenizer(str(tmp_path)), "the folder has no", made)
    refused(lambda: load_tokenizer(str(tmp_path / "tokenizer.pkl")), "cannot be read", made)


def test_shards_of_tokens_and_text(tmp_path: Path, made: Path) -> None:
    np.save(tmp_path / "0.npy", np.array([Payload(made)] * 3, dtype=object), allow_pickle=True)
    for action in (lambda: open_dataset(str(tmp_path), 8, 61), lambda: inspect(str(tmp_path), None)):
        refused(action, r"holds object\[3\]", made)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Payload(made)))
    refused(lambda: list(read_documents(str(tmp_path / "x.pkl"))), "not UTF-8 text|no text", made)


@pytest.mark.parametrize("name", ["arrow.py_extension_type", "arrow.r.vctrs", "pandas.period"])
def test_arrow_types_that_hold_a_pickle(name: str, tmp_path: Path, made: Path) -> None:
    marks = {"ARROW:extension:name": name, "ARROW:extension:metadata": pickle.dumps(Payload(made))}
    schema = pa.schema([pa.field("text", pa.string()).with_metadata(marks)])
    table = pa.table([pa.array(["a", "b"])], schema=schema)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(table)
    for file in ("a.parquet", "b.arrow"):
        assert [document.text for document in read_documents(str(tmp_path / file))] == ["a", "b"]
    assert not made.exists()


def test_scripts_of_datasets(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "untrusted"
    folder.mkdir()
    (folder / "untrusted.py").write_text(SCRIPT.format(made=str(made)))
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Payload(made)))
    for name in ("hf:./untrusted", "hf:untrusted/untrusted.py", "hf:pandas"):
        with pytest.raises(UserError):
            list(open_source(name, cache_dir=str(tmp_path / "cache")).documents())
        assert not made.exists()


def test_yaml_of_lm_eval(tmp_path: Path, made: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{made}']")
    assert not _names_a_model(["--config", str(tmp_path / "c.yaml")])
    assert not made.exists()
