"""Malicious files: names outside their folder, unbounded depths and sizes. Each is refused at once, in one line."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pretrain_xla.config import build_config
from pretrain_xla.config_file import load_yaml
from pretrain_xla.data.checksums import verify_checksums
from pretrain_xla.data.dataset import open_dataset
from pretrain_xla.data.formats import layout
from pretrain_xla.data.manifest import dataset_info
from pretrain_xla.errors import UserError
from pretrain_xla.evaluate import task_data
from pretrain_xla.interop.config_json import read_config
from pretrain_xla.interop.load import load_model
from pretrain_xla.prepare.journal import read_progress
from pretrain_xla.storage.files import filesystem
from pretrain_xla.text import open_file
from pretrain_xla.text.documents import read_documents
from pretrain_xla.text.readers import delimited, json_records, plain_text
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.train import train_tokenizer
from pretrain_xla.untrusted import is_inside, parse_json

DEEP = "[" * 100_000
DIGITS = "9" * 9999
GPT2 = {"model_type": "gpt2", "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 8}


def refused(action: Callable[[], Any], expected: str, seconds: float = 30.0) -> None:
    """It ends in one line that says so, within the time given."""
    start = time.monotonic()
    with pytest.raises(UserError, match=expected) as error:
        action()
    assert time.monotonic() - start < seconds
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


OUTSIDE = ["../x", "a/../../x", "/etc/x", "C:\\x", "..\\x", "a//b", "https://h/x", "~/x", "memory::x", "a\0", ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_outside_the_folder(name: str) -> None:
    assert not is_inside(name)


@pytest.mark.parametrize("name", ["x.safetensors", "a/b.json", "model-00001-of-00002.safetensors", "..x", "gpt2"])
def test_names_inside_the_folder(name: str) -> None:
    assert is_inside(name)


@pytest.mark.parametrize("name", ["../outside.safetensors", "{outside}"])
def test_an_index_of_shards_names_no_other_folder(name: str, tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside.safetensors"
    folder.mkdir()
    outside.write_bytes(b"")
    (folder / "config.json").write_text(json.dumps(GPT2))
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        names = {"transformer.wte.weight": name.format(outside=outside)}
        (folder / index).write_text(json.dumps({"weight_map": names}))
        refused(lambda: load_model(str(folder)), "which is not a file below its folder")
        (folder / index).unlink()


def manifest(folder: Path, **changes: Any) -> Path:
    """A dataset of one shard."""
    (folder / "train").mkdir(parents=True)
    np.save(folder / "train" / "0.npy", np.arange(64, dtype=np.uint16))
    shard = {"name": "0.npy", "tokens": 64, "max_id": 63, "sha256": "0"} | changes.pop("shard", {})
    split = {"documents": 1, "tokens": 64, "shards": [shard]}
    recipe = {"source": "x", "source_version": "x", "tokenizer": "x", "shard_size": 64, "valid_fraction": 0.5}
    tree = {"tokenizer": "bytes", "vocab_size": 257, "end_of_text": 256, "dtype": "uint16", "recipe": recipe}
    tree |= {"splits": {changes.pop("split", "train"): split}} | changes
    (folder / "dataset.json").write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"shard": {"name": "../../secret.npy"}},
        {"shard": {"name": "/etc/passwd"}},
        {"split": "../elsewhere"},
        {"tokenizer": "../../other/tokenizer.json"},
        {"tokenizer": "/other/tokenizer.json"},
    ],
)
def test_a_manifest_names_no_other_folder(changes: dict[str, Any], tmp_path: Path) -> None:
    assert dataset_info(str(manifest(tmp_path / "good"))) is not None
    folder = manifest(tmp_path / "bad", **changes)
    for action in (
        lambda: dataset_info(str(folder)),
        lambda: verify_checksums(str(folder)),
        lambda: open_dataset(str(folder / "train"), 8, 257),
    ):
        refused(action, r"dataset.json: damaged \(.*(leads out of the dataset's folder|not a name of a file)")
    tree = json.loads((folder / "dataset.json").read_text())
    waiting = {"written": next(iter(tree["splits"].values())), "parts": ["../../x.npy"], "waiting": 1}
    (folder / "dataset.json.partial").write_text(json.dumps({"recipe": tree["recipe"], "splits": {"train": waiting}}))
    assert read_progress(*filesystem(str(folder))) is None


@pytest.mark.parametrize("base", ["../tokenizer.json", "/etc/x.json", "a/b.json", "https://h/t.json", "memory::x"])
def test_a_bitbpe_file_names_no_other_folder(base: str, tmp_path: Path) -> None:
    (tmp_path / "bitbpe.json").write_text(json.dumps({"base": base, "num_prefix_tokens": 64}))
    refused(lambda: load_tokenizer(str(tmp_path)), "which is not a file in its folder")


def test_deep_json_and_long_numbers_are_one_line_everywhere(tmp_path: Path) -> None:
    for text in (DEEP, '{"a":' * 100_000, f'{{"a": {DIGITS}}}', "{"):
        refused(lambda text=text: parse_json(text, "x.json"), "x.json: cannot be read")
        for file, action in (
            ("config.json", lambda: load_model(str(tmp_path))),
            ("tokenizer.json", lambda: load_tokenizer(str(tmp_path / "tokenizer.json"))),
            ("bitbpe.json", lambda: load_tokenizer(str(tmp_path / "bitbpe.json"))),
            ("dataset.json", lambda: dataset_info(str(tmp_path))),
            ("a.jsonl", lambda: list(task_data.read_records(str(tmp_path / "a.jsonl")))),
            ("b.jsonl", lambda: list(read_documents(str(tmp_path / "b.jsonl")))),
        ):
            (tmp_path / file).write_text(text)
            refused(action, "cannot be read|damaged|not JSON")
            (tmp_path / file).unlink()
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    (tmp_path / "model.safetensors.index.json").write_text(DEEP)
    refused(lambda: load_model(str(tmp_path)), "is not an index of shards")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"model: {'[' * 5000}", "nested too deep|not valid YAML"),
        ("model: {d_model: 2001-99-99}", "invalid value: "),
        (f"model: {{d_model: {DIGITS}}}", "invalid value: "),
        ("model: {[1, 2]: 3}", "not valid YAML"),
        ("model: !!python/object/apply:os.system [touch made]", "not valid YAML"),
        (f"model: {{d_model: 0x{'f' * 9999}}}", "model.d_model="),
        ("data: {cache_dir: &a [*a]}", "not valid YAML|data.cache_dir"),
    ],
)
def test_malicious_yaml(text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    refused(lambda: build_config(load_yaml("c.yaml"), "c.yaml"), expected)
    assert not (tmp_path / "made").exists()


def test_a_list_of_billions_by_aliases_is_shortened_in_the_error(tmp_path: Path) -> None:
    lists = ", ".join(
        f"&{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
    )
    (tmp_path / "c.yaml").write_text(f"data: {{train_dir: [&a [x], {lists}]}}")
    refused(lambda: build_config(load_yaml(str(tmp_path / "c.yaml")), "x"), "data.train_dir=")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"num_layers": 10**7}, "model.num_layers=10000000"),
        ({"num_layers": 1000, "d_model": 2**20, "num_heads": 8}, "more than any device can hold"),
        ({"vocab_size": 10**12}, "model.vocab_size"),
        ({"d_model": 10**30, "num_heads": 1}, "model.d_model"),
    ],
)
def test_unbounded_sizes(sizes: dict[str, int], expected: str) -> None:
    refused(lambda: build_config({"model": sizes}, "x"), expected)


def test_a_config_json_of_ten_million_layers_is_one_line() -> None:
    refused(lambda: read_config(GPT2 | {"n_layer": 10**7}, "config.json"), "num_layers=10000000")
    gemma = {"model_type": "gemma3_text", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "head_dim": 4}
    gemma |= {
        "num_hidden_layers": 10**15,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8,
    }
    gemma |= {"rope_local_base_freq": 1e4, "query_pre_attn_scalar": 4}
    for pattern in (6, 1, 10**16):
        refused(lambda p=pattern: read_config(gemma | {"sliding_window_pattern": p}, "config.json"), "config.json: ")


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_decompression_bomb_is_read_only_to_the_limit(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (open_file, delimited, json_records):
        monkeypatch.setattr(module, "LONGEST_LINE", 2**16)
    monkeypatch.setattr(plain_text, "LONGEST_DOCUMENT", 2**17)
    monkeypatch.setattr(task_data, "LONGEST_DOCUMENT", 2**17)
    size = 2**20
    for name, text, action, expected in (
        ("a.jsonl", b"x" * size, lambda path: list(read_documents(path)), "a line of more than 65,536 characters"),
        ("b.txt", b"x" * size, lambda path: list(read_documents(path)), "a line of more than 65,536 characters"),
        ("c.txt", b"x\n" * (size // 2), lambda path: list(read_documents(path)), "a document of more than 131,072"),
        ("c.json", b'[{"text": "' + b"x" * size * 3, lambda path: list(read_documents(path)), "ends within a value"),
        ("c.csv", b'text\n"' + b"x\n" * (size // 2), lambda path: list(read_documents(path)), "field larger than"),
        ("d.jsonl", b"x" * size, lambda path: list(task_data.read_records(path)), "a line of more than"),
        ("e.txt", b"x\n" * (size // 2), lambda path: [None for _ in task_data.read_lines(path)], "more than 131,072"),
    ):
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(COMPRESSORS[suffix](text))
        refused(lambda action=action, path=path: action(str(path)), expected)


def test_texts_that_parquet_stores_once(tmp_path: Path) -> None:
    """A thousand texts of a megabyte in a kilobyte are read a few at a time."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1000, np.int32)), pa.array(["x" * 10**6]))
    for number, kind in enumerate((column, column.cast(pa.large_string()))):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"text": kind}), path, compression="zstd")
        del kind
        before = pa.total_allocated_bytes()
        for text in itertools.islice(read_documents(str(path)), 100):
            assert len(text.text) == 10**6
            assert pa.total_allocated_bytes() - before < 10**8


def test_ids_that_parquet_stores_once(tmp_path: Path) -> None:
    count = 10**7
    rows = pa.ListArray.from_arrays(pa.array([0, count // 2, count]), pa.array(np.zeros(count, np.int16)))
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 1000
    refused(lambda: open_dataset(str(tmp_path), 8, 257), "bytes hold 10,000,000 ids, which no text does")


def test_a_long_window_is_decompressed_in_chunks() -> None:
    """A hand-made frame of 8 KB: a window of 256 MB, and 2,048 blocks, each one byte repeated 131,072 times."""
    block = (2**17 << 3 | 1 << 1).to_bytes(3, "little") + b"x"
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, 18 << 3]) + block * 2047 + bytes([block[0] | 1]) + block[1:]
    stream = open_file.unpacked(io.BytesIO(frame), "a.zst")
    assert stream.read(10) == b"x" * 10
    assert 0 < len(stream.raw._waiting) <= 2**27
    assert sum(iter(lambda: len(stream.read(2**22)), 0)) == 2048 * 2**17 - 10


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"config": {}}, "does not say which model"),
        ({"config": {"model": [], "data": {}}}, "does not say which model"),
        ({"config": {"model": {"num_layers": 10**7}, "data": {}}}, "num_layers=10000000"),
        ({"version": []}, "no complete checkpoint|cannot be read"),
        ({"step": []}, "no complete checkpoint|cannot be read"),
    ],
)
def test_a_checkpoint_json_with_other_content(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    tree = {
        "step": 1,
        "valid_loss": None,
        "data": "",
        "config": {"model": {}, "data": {}},
        "version": 1,
        "checksums": {},
    }
    (folder / "checkpoint.json").write_text(json.dumps(tree | change))
    refused(lambda: load_model(str(tmp_path)), expected)


@pytest.mark.parametrize("eos", [1, [1], {"a": 1}, {"content": []}, True])
def test_invalid_settings_of_a_tokenizer(eos: Any, tmp_path: Path) -> None:
    train_tokenizer(["abc " * 9], 260, str(tmp_path), min_frequency=1)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": eos}))
    assert load_tokenizer(str(tmp_path)).encode("abc")  # its end of text is found by its usual names


@pytest.mark.parametrize(
    "text", ["-" * 3000 + "1", "(" * 3000, "[" * 3000, "{'descr':'<u2','fortran_order':False,'shape':(-5,)}"]
)
def test_a_malicious_npy_header(text: str) -> None:
    raw = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    refused(lambda: layout("x.npy", len(raw), raw), "x.npy: ")
