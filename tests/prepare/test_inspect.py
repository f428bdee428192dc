from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from pretrain_xla.cli import main
from pretrain_xla.errors import UserError
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.prepare.inspect import inspect
from pretrain_xla.prepare.inspect_command import inspect_command, length_histogram
from pretrain_xla.tokenizers.load import load_tokenizer
from tests.shard_writers import llm_c

TEXTS = [f"Document {number}. " + "word " * number for number in range(300)]


@pytest.fixture
def prepared(tmp_path):
    """A dataset of bytes for each format of ours."""

    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))

    def make(format):
        target = tmp_path / format
        return prepare(
            str(tmp_path / "text.jsonl"), str(target), "bytes", shard_size=50_000, valid_fraction=0.2, format=format
        ), target

    return make


@pytest.mark.parametrize("format", ["npy", "bin", "parquet"])
def test_what_was_prepared_is_found_again(prepared, format, tmp_path):
    info, folder = prepared(format)
    assert prepared(format)[0] == info  # at once, being there
    for split, made in info.splits.items():
        found = inspect(f"{folder}/{split}", verify=True)
        assert found.faults == []
        assert (found.tokens, len(found.document_lengths)) == (made.tokens, made.documents)
        assert found.document_lengths.sum() == made.tokens - made.documents
        assert found.counts[256] == made.documents
        assert found.counts.sum() == made.tokens
        assert found.tokenizer == "bytes"
        assert {shard["format"] for shard in found.shards} == {format}
        starts = {text[:20] for text in TEXTS}
        assert len(found.documents) == 3
        assert all(text[:20] in starts for text in found.documents)


def test_end_of_text_may_open_a_document(tmp_path):
    """As build-nanogpt writes, and with the last one cut off."""
    tokenizer = load_tokenizer("bytes")
    ids = [token for text in TEXTS[:5] for token in [256, *tokenizer.encode(text)]]
    np.save(tmp_path / "0.npy", np.array(ids, np.uint16))
    found = inspect(str(tmp_path), "bytes")
    assert found.document_lengths.tolist() == [len(text) for text in TEXTS[:5]]
    assert found.documents == TEXTS[:3]


class Opened:
    """What must not happen when a pickle is looked at."""

    def __reduce__(self):
        return (print, ("opened",))


def test_characters_of_nano_gpt(tmp_path, capsys):
    """Its meta.pkl shows the text, and is never opened where it would run something."""
    characters = sorted(set("".join(TEXTS)))
    ids = np.array([characters.index(sign) for sign in "".join(TEXTS)], np.uint16)
    ids.tofile(tmp_path / "train.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": {}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert inspect_command([f"{tmp_path}/train.bin"]) == 0
    assert "Document 0. Document 1. word" in capsys.readouterr().out
    meta["itos"].pop(max(meta["itos"]))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert f"but meta.pkl has {len(characters) - 1}" in inspect(str(tmp_path)).faults[0]
    for raw in (pickle.dumps(Opened()), b"junk", pickle.dumps(meta)[:-9]):
        (tmp_path / "meta.pkl").write_bytes(raw)
        assert "meta.pkl: not a plain pickle (" in inspect(str(tmp_path)).faults[0]
    assert "opened" not in capsys.readouterr().out


def test_faults_are_named_and_all_shown(prepared, tmp_path, capsys):
    _, folder = prepared("npy")
    path = sorted((folder / "train").iterdir())[0]
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(bytes(raw))
    assert inspect_command([f"{folder}/train"]) == 1
    assert "fault:" in (shown := capsys.readouterr().out)
    assert "differs from its checksum" in shown
    llm_c(tmp_path / "a.bin", [1, 2, 3, 300] * 100)
    assert inspect_command([f"{tmp_path}/a.bin", "--tokenizer", "bytes", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["faults"] == [
        "a.bin: has id 300, but bytes has 257",
        "no end-of-text (256) in it: documents are not separated, or this is not their tokenizer",
    ]
    assert report["most_frequent_ids"] == [[1, 100], [2, 100], [3, 100], [300, 100]]
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"a\.bin: truncated"):
        inspect_command([f"{tmp_path}/a.bin"])


def test_dataset_is_read_split_by_split(prepared, tmp_path, capsys):
    info, folder = prepared("npy")
    assert inspect_command([str(folder), "--verify", "--plot", str(tmp_path / "p.png")]) == 0
    shown = capsys.readouterr().out
    assert shown.index(" train ") < shown.index(" valid ")
    assert shown.count("none failed") == 2
    assert {path.name for path in tmp_path.glob("p.*")} == {"p.train.png", "p.valid.png"}
    assert inspect_command([f"{folder}/", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {split: found["tokens"] for split, found in report.items()} == {
        split: made.tokens for split, made in info.splits.items()
    }
    (folder / "valid" / "000000.npy").rename(folder / "valid" / "000001.npy")
    assert inspect_command([str(folder)]) == 1


def test_missing_shard_is_a_fault(prepared, capsys):
    _, folder = prepared("npy")
    (folder / "valid" / "000000.npy").rename(folder / "valid" / "000001.npy")
    assert inspect_command([f"{folder}/valid"]) == 1
    assert "valid/000000.npy: missing, though dataset.json lists it" in capsys.readouterr().out


def test_command_shows_and_plots(prepared, tmp_path, capsys):
    _, folder = prepared("bin")
    main(["inspect", f"{folder}/train", "--plot", str(tmp_path / "plot.png")])
    shown = capsys.readouterr().out
    assert "none failed" in shown
    assert "tokens: documents" in shown
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot be written"):
        inspect_command([f"{tmp_path}/not_even_read", "--plot", str(tmp_path / "none" / "plot.png")])
    with pytest.raises(UserError, match=r"plot.foo: give a name that ends with .*\.png"):
        inspect_command([f"{tmp_path}/not_even_read", "--plot", str(tmp_path / "plot.foo")])


def test_histogram_takes_in_every_document():
    for lengths in ([0], [0, 1, 5], [4], [7, 8, 900], [1, 1023, 1024]):
        edges, counts = length_histogram(np.array(lengths))
        assert counts.sum() == len(lengths)
        assert counts[0] > 0
        assert counts[-1] > 0
        assert edges[0] <= min(lengths) < max(lengths) + 1 <= edges[-1]


def test_real_shard(shared, gpt2_cache):
    found = inspect(str(shared("text/en/openwebtext_val_gpt2_uint16.bin")))
    assert found.faults == []
    assert (found.tokens, len(found.document_lengths), found.tokenizer) == (1_203_184, 1000, "gpt2")
    assert found.documents[0].startswith("Dunedin police are calling for action")
