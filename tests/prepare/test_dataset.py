from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_xla.data.dataset import open_dataset, verify_checksums
from pretrain_xla.errors import UserError
from pretrain_xla.prepare import workers
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.text.documents import Document, read_documents
from pretrain_xla.text.sources import Source, open_source, source_of
from pretrain_xla.text.split import LONG_DOCUMENT, split_document
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.train import train_tokenizer
from tests.servers import Refusing

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [f"Document {number} says <|endoftext|> and naïve things. " * (number % 7 + 1) for number in range(400)]


def source(documents=DOCUMENTS, version="1"):
    return source_of("test", version, lambda: documents)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def documents_of(folder, split, tokenizer):
    """The documents that are in a split's shards, decoded."""
    tokens = np.concatenate([np.load(path) for path in sorted(Path(folder, split).iterdir())])
    assert tokens[-1] == tokenizer.end_of_text
    return [tokenizer.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.end_of_text) + 1)]


def test_every_document_is_there_once_and_ends_in_end_of_text(tmp_path):
    info = prepare(source(), str(tmp_path), "bytes", valid_fraction=0.1, shard_size=5000)
    tokenizer = load_tokenizer(info.tokenizer_name)
    train, valid = (documents_of(tmp_path, split, tokenizer)[:-1] for split in ("train", "valid"))
    assert sorted(train + valid) == sorted(document + "<|endoftext|>" for document in DOCUMENTS)
    assert (info.splits["train"].documents, info.splits["valid"].documents) == (len(train), len(valid))
    assert 10 < len(valid) < 80
    assert (info.vocab_size, info.end_of_text, info.dtype) == (257, 256, "uint16")
    sizes = [shard.tokens for shard in info.splits["train"].shards]
    assert len(sizes) > 5
    assert set(sizes[:-1]) == {5000}
    assert 500 <= sizes[-1] <= 5500
    assert sum(sizes) == info.splits["train"].tokens == open_dataset(f"{tmp_path}/train", 64, 257).tokens
    verify_checksums(str(tmp_path))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of seven documents, and processes from the second one on."""
    monkeypatch.setattr(workers, "_CHUNK_DOCUMENTS", 7)
    monkeypatch.setattr(workers, "_ALONE", 1)


def test_bytes_depend_on_the_recipe_alone(tmp_path, small_chunks, monkeypatch):
    recipe = {"train_vocab_size": 300, "shard_size": 3000}
    prepare(source(), str(tmp_path / "three"), num_workers=3, **recipe)
    prepare(source(), str(tmp_path / "one"), num_workers=1, **recipe)
    monkeypatch.undo()
    prepare(source(), str(tmp_path / "whole"), **recipe)
    assert tree(tmp_path / "one") == tree(tmp_path / "three") == tree(tmp_path / "whole")
    assert len(tree(tmp_path / "one")) > 5


def test_seed_holds_out_other_documents(tmp_path):
    valid = {}
    for seed in (0, 1):
        prepare(source(), str(tmp_path / str(seed)), "bytes", seed=seed)
        valid[seed] = set(documents_of(tmp_path / str(seed), "valid", load_tokenizer("bytes")))
    assert valid[0] != valid[1]


def test_dataset_with_a_trained_tokenizer_can_be_moved(tmp_path):
    info = prepare(source(), str(tmp_path / "a"), train_vocab_size=300, valid_fraction=0.2)
    before = open_dataset(f"{tmp_path}/a/valid", 16, 300)
    (tmp_path / "a").rename(tmp_path / "moved")
    after = open_dataset(f"{tmp_path}/moved/valid", 16, 300)
    assert before.fingerprint == after.fingerprint
    tokenizer = load_tokenizer(after.info.tokenizer_name)
    assert tokenizer.vocab_size == info.vocab_size == 300
    assert set(documents_of(tmp_path / "moved", "valid", tokenizer)[:-1]) < {d + "<|endoftext|>" for d in DOCUMENTS}


def test_tokenizer_file_is_copied_and_known_by_content(tmp_path):
    first = prepare(source(), str(tmp_path / "a"), train_vocab_size=300)
    second = prepare(source(), str(tmp_path / "b"), first.tokenizer_name)
    assert second.tokenizer_name == f"{tmp_path}/b/tokenizer/tokenizer.json"
    (tmp_path / "a").rename(tmp_path / "c")
    assert prepare(source(), str(tmp_path / "b"), str(tmp_path / "c" / "tokenizer")) == second
    assert second.splits == first.splits


def test_split_never_moves_when_documents_are_added_or_reordered(tmp_path):
    def valid(documents, name):
        prepare(source(documents), str(tmp_path / name), "bytes", valid_fraction=0.1)
        return set(documents_of(tmp_path / name, "valid", load_tokenizer("bytes"))[:-1])

    some, more = valid(DOCUMENTS[:200], "some"), valid(DOCUMENTS[::-1], "more")
    assert some < more
    assert not {document.removesuffix("<|endoftext|>") for document in more - some} & set(DOCUMENTS[:200])


def test_split_is_fixed_for_ever():
    """Golden values: should they change, what was held out would be trained on when a dataset is made again."""
    held_out = [number for number in range(100) if next(split_document(f"document {number}", 0.1))[0] == "valid"]
    assert held_out == [40, 44, 59, 70, 81]


@given(st.lists(st.integers(0, 30_000), max_size=12), st.floats(0.01, 0.99))
def test_long_document_loses_nothing(lengths, fraction):
    document = "\n\n".join(f"{number}" + "x y " * (length // 4) for number, length in enumerate(lengths))
    parts = list(split_document(document, fraction))
    assert "".join(text for _, text in parts) == document
    assert len(parts) == 1 or len(document) > LONG_DOCUMENT
    assert all(left[0] != right[0] for left, right in itertools.pairwise(parts))


def test_one_big_file_can_be_held_out_from(tmp_path, shared):
    info = prepare(str(shared("text/en/tinyshakespeare.txt")), str(tmp_path), "bytes", valid_fraction=0.1)
    share = info.splits["valid"].tokens / sum(split.tokens for split in info.splits.values())
    assert 0.04 < share < 0.2
    assert sum(split.tokens - split.documents for split in info.splits.values()) == pytest.approx(1_115_394, abs=4)


def test_same_recipe_returns_what_is_there(tmp_path):
    first = prepare(source(), str(tmp_path), "bytes")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    unread = source_of("another name", "1", lambda: pytest.fail("the source was read again"))
    assert prepare(unread, str(tmp_path), "bytes") == first
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_another_recipe_is_refused_and_overwrites_when_told(tmp_path):
    prepare(source(), str(tmp_path), "bytes", shard_size=3000)
    before = tree(tmp_path)
    for arguments, message in [
        ({"source": source(version="2")}, "source_version '1' → '2'"),
        ({"shard_size": 9000}, "shard_size 3000 → 9000"),
        ({"valid_fraction": 0.5}, "valid_fraction 0.05 → 0.5"),
        ({"tokenizer": None, "train_vocab_size": 300}, "tokenizer 'bytes' → 'bpe of 300 ids'"),
    ]:
        with pytest.raises(UserError) as error:
            prepare(
                **{
                    "source": source(),
                    "output_dir": str(tmp_path),
                    "tokenizer": "bytes",
                    "shard_size": 3000,
                    **arguments,
                }
            )
        assert message in str(error.value)
        assert "--overwrite" in str(error.value)
    assert tree(tmp_path) == before
    prepare(source(), str(tmp_path), "bytes", shard_size=9000, overwrite=True)
    prepare(source(), str(tmp_path / "fresh"), "bytes", shard_size=9000)
    assert {k: v for k, v in tree(tmp_path).items() if "fresh" not in k} == tree(tmp_path / "fresh")


def test_damaged_dataset_of_the_same_recipe_is_made_again(tmp_path):
    prepare(source(), str(tmp_path), "bytes")
    before = tree(tmp_path)
    os.truncate(tmp_path / "train" / "000000.npy", 500)
    prepare(source(), str(tmp_path), "bytes")
    assert tree(tmp_path) == before


def test_shards_of_others_are_not_touched(tmp_path):
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "mine.npy", np.arange(9, dtype=np.uint16))
    with pytest.raises(UserError, match=r"train/mine.npy: not written by `prepare`"):
        prepare(source(), str(tmp_path), "bytes")
    assert list(tree(tmp_path)) == ["train/mine.npy"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("given", ["mine/tokenizer", "mine/tokenizer/tokenizer.json", "link"])
def test_tokenizer_in_the_place_of_the_copy_is_refused_and_stays(tmp_path, given, overwrite):
    train_tokenizer(DOCUMENTS, 300, str(tmp_path / "mine" / "tokenizer"))
    (tmp_path / "link").symlink_to(tmp_path / "mine" / "tokenizer")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"(lies where the dataset keeps its own copy|not written by `prepare`)"):
        prepare(source(["one document"]), str(tmp_path / "mine"), str(tmp_path / given), overwrite=overwrite)
    assert tree(tmp_path) == before


def test_tokenizer_of_others_is_not_touched(tmp_path):
    train_tokenizer(DOCUMENTS, 300, str(tmp_path / "tokenizer"))
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer/tokenizer.json: not written by `prepare`"):
        prepare(source(["one document"]), str(tmp_path), "bytes")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"valid_fraction": 0.0}, "valid_fraction=0.0"),
        ({"valid_fraction": 1.0}, "valid_fraction=1.0"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"num_workers": 0}, "num_workers=0"),
        ({"train_vocab_size": 300}, "give one of them"),
        ({"tokenizer": "gtp2"}, "did you mean gpt2"),
        ({"tokenizer": None, "train_vocab_size": 100}, "too small"),
        ({"source": "no/such/file"}, "no such file"),
        (
            {"source": source(["one document"])},
            "a single document, of which nothing fell to valid: one of over 100,000",
        ),
        ({"source": source(["one document"]), "valid_fraction": 0.999999}, "nothing fell to train"),
        ({"source": source(["one", "two"]), "valid_fraction": 0.000001}, "leaves nothing for valid out of 2 documents"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_shard(tmp_path, arguments, message):
    with pytest.raises(UserError) as error:
        prepare(**{"source": source(), "output_dir": str(tmp_path), "tokenizer": "bytes", **arguments})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out.*cannot be written"):
        prepare(source(), str(tmp_path / "file" / "out"), "bytes")


@pytest.mark.parametrize("status", [400, 403, 412])
def test_bucket_that_refuses_a_write_is_one_line(tmp_path, monkeypatch, status):
    with Refusing(status) as server:
        monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon", "endpoint_url": server.address})
        with pytest.raises(UserError) as error:
            prepare(source(), f"gs://refusing-{status}/out", "bytes")
    assert f"gs://refusing-{status}/out/dataset.json.partial: cannot be written" in str(error.value)
    assert "check the credentials" in str(error.value)
    assert "space" not in str(error.value)
    assert "\n" not in str(error.value)


def test_worker_that_is_killed_leaves_whole_shards_to_go_on_from(tmp_path, small_chunks):
    def texts(kill):
        for document in DOCUMENTS * 20:
            if kill and (tmp_path / "a" / "train" / "000002.npy").exists():
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
                kill = False
            yield document

    recipe = {"tokenizer": "bytes", "shard_size": 50_000}
    with pytest.raises(UserError, match=r"a worker process was killed .* the same command again to go on"):
        prepare(source_of("test", "1", lambda: texts(True)), str(tmp_path / "a"), num_workers=2, **recipe)
    assert [np.load(path).size for path in sorted((tmp_path / "a" / "train").glob("*"))][:3] == [50_000] * 3
    with pytest.raises(UserError, match="interrupted"):
        open_dataset(str(tmp_path / "a" / "train"), 16, 257)
    prepare(source_of("test", "1", lambda: texts(False)), str(tmp_path / "a"), num_workers=1, **recipe)
    prepare(source_of("test", "1", lambda: texts(False)), str(tmp_path / "b"), num_workers=1, **recipe)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_going_on_reads_only_what_is_left(tmp_path, small_chunks):
    """And nothing is encoded twice but the chunk that was under way."""
    begun = []

    def read(place, broken):
        begun.append(place)
        for number in range(place or 0, len(DOCUMENTS)):
            if broken and number == 200:
                raise UserError("the network is gone")
            yield Document(DOCUMENTS[number], number + 1)

    recipe = {"tokenizer": "bytes", "shard_size": 3000, "num_workers": 1}
    with pytest.raises(UserError, match="the network is gone"):
        prepare(Source("test", "1", lambda place: read(place, True)), str(tmp_path / "a"), **recipe)
    left = json.loads((tmp_path / "a" / "dataset.json.partial").read_text())
    assert 150 < left["place"] < 200
    prepare(Source("test", "1", lambda place: read(place, False)), str(tmp_path / "a"), **recipe)
    assert begun == [None, left["place"]]
    prepare(source(), str(tmp_path / "b"), **recipe)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.usefixtures("small_chunks")
def test_skipped_documents_are_counted_once_however_often_it_is_broken_off(tmp_path):
    """A bad document that ended it is skipped when the same is asked for with that word; each is counted, once."""
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    for number in (399, 300, 150, 5, 5):
        lines.insert(number, "{oops")
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{oops"]))
    recipe = {"shard_size": 3000, "num_workers": 1}

    def opened(broken_at=None, skips=True):
        found = open_source(str(tmp_path / "a.jsonl"), skip_bad_documents=skips)

        def read(place):
            for number, document in enumerate(found.read(place)):
                if number == broken_at:
                    raise UserError("the power is gone")
                yield document

        return replace(found, read=read)

    with pytest.raises(UserError, match=r"a\.jsonl:6: not JSON"):
        prepare(opened(skips=False), str(tmp_path / "a"), train_vocab_size=300, **recipe)
    prepare(opened(), str(tmp_path / "whole"), train_vocab_size=300, **recipe)
    with pytest.raises(UserError, match="power"):
        prepare(opened(broken_at=200), str(tmp_path / "a"), "bytes", **recipe)
    with pytest.raises(UserError, match=r"a\.jsonl:304: not JSON"):
        prepare(opened(skips=False), str(tmp_path / "a"), "bytes", **recipe)
    info = prepare(opened(), str(tmp_path / "a"), "bytes", **recipe)
    prepare(opened(), str(tmp_path / "b"), "bytes", **recipe)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert (
        info.skipped_documents
        == json.loads((tmp_path / "whole" / "dataset.json").read_text())["skipped_documents"]
        == 6
    )
    assert sum(split.documents for split in info.splits.values()) == len(DOCUMENTS)


def broken_off(tmp_path):
    """A folder with an unfinished dataset."""

    def read(place):
        yield from (Document(text, number) for number, text in enumerate(DOCUMENTS[:200], start=1))
        raise UserError("the network is gone")

    with pytest.raises(UserError, match="network"):
        prepare(Source("test", "1", read), str(tmp_path), "bytes", shard_size=3000, num_workers=1)


@pytest.mark.usefixtures("small_chunks")
def test_unfinished_dataset_of_another_recipe_is_refused(tmp_path):
    broken_off(tmp_path / "a")
    before = tree(tmp_path / "a")
    with pytest.raises(UserError, match=r"unfinished dataset \(shard_size 3000 → 9000\).*--overwrite"):
        prepare(source(), str(tmp_path / "a"), "bytes", shard_size=9000, num_workers=1)
    assert tree(tmp_path / "a") == before
    prepare(source(), str(tmp_path / "a"), "bytes", shard_size=9000, num_workers=1, overwrite=True)
    prepare(source(), str(tmp_path / "b"), "bytes", shard_size=9000, num_workers=1)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("damage", ["train/000001.npy", "unfinished", "dataset.json.partial"])
@pytest.mark.usefixtures("small_chunks")
def test_damaged_remains_are_made_again(tmp_path, damage):
    broken_off(tmp_path / "a")
    victim = tmp_path / "a" / damage
    victim = sorted(victim.iterdir())[0] if victim.is_dir() else victim
    os.truncate(victim, victim.stat().st_size - 2)
    prepare(source(), str(tmp_path / "a"), "bytes", shard_size=3000, num_workers=1)
    prepare(source(), str(tmp_path / "b"), "bytes", shard_size=3000, num_workers=1)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_disk_full_is_one_line_and_leaves_whole_shards_only(tmp_path):
    """The system itself refuses a write halfway through the third shard, as a full disk does."""
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS))
    code = (
        "import resource, sys; from pretrain_xla.data import shards; from pretrain_xla.errors import UserError\n"
        "from pretrain_xla.prepare import dataset, workers\n"
        "real, count = shards.write_shard, [0]\n"
        "def limited(*arguments):\n"
        "    count[0] += 1\n"
        "    if count[0] == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "    return real(*arguments)\n"
        "shards.write_shard = limited\n"
        "workers._CHUNK_DOCUMENTS = 7\n"
        "try: dataset.prepare(sys.argv[1], sys.argv[2], 'bytes', shard_size=5000, num_workers=1)\n"
        "except UserError as error: sys.exit(str(error))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt"), str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 1
    *notes, said = ended.stderr.splitlines()
    assert all("<|endoftext|> within a line" in note for note in notes)
    assert "000002.npy: cannot be written: File too large; free some space" in said
    assert sorted(path.name for path in (tmp_path / "out" / "train").iterdir()) == ["000000.npy", "000001.npy"]
    prepare(str(tmp_path / "a.txt"), str(tmp_path / "out"), "bytes", shard_size=5000)
    prepare(str(tmp_path / "a.txt"), str(tmp_path / "fresh"), "bytes", shard_size=5000)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_killed_at_random_points_it_ends_with_the_bytes_of_a_clean_run(tmp_path):
    """SIGKILL for the process that reads; its workers end by themselves. PREPARE_KILLS=10 for more of them."""
    rng = random.Random(os.environ.get("PREPARE_SEED", time.time_ns()))
    with open(tmp_path / "a.jsonl", "w") as file:
        for number in range(12_000):
            file.write(json.dumps({"text": f"{number} " + DOCUMENTS[number % 400] * 6}) + "\n")
    words = ["--tokenizer", "bytes", "--shard-size", "150000", "--num-workers", "2"]
    command = [sys.executable, "-m", "pretrain_xla", "prepare", str(tmp_path / "a.jsonl")]
    subprocess.run([*command, str(tmp_path / "clean"), *words], cwd=ROOT, check=True, capture_output=True)
    out = tmp_path / "killed"
    for _ in range(int(os.environ.get("PREPARE_KILLS", "3"))):
        wanted = count_shards(out) + rng.randrange(1, 6)
        process = subprocess.Popen([*command, str(out), *words], cwd=ROOT, stdout=subprocess.DEVNULL)
        while count_shards(out) < wanted and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (out / "dataset.json").exists()
        with pytest.raises(UserError, match="interrupted"):
            open_dataset(str(out / "train"), 16, 257)
    subprocess.run([*command, str(out), *words], cwd=ROOT, check=True, capture_output=True)
    assert tree(out) == tree(tmp_path / "clean")


def count_shards(folder):
    return len(list(folder.glob("train/*.npy")))


def is_gone(group):
    for _ in range(500):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_control_c_is_one_line_and_its_workers_are_gone(tmp_path):
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background starts deaf
        "import itertools, sys; from pretrain_xla.cli import guarded\n"
        "from pretrain_xla.prepare.dataset import prepare; from pretrain_xla.text.sources import source_of\n"
        "endless = source_of('test', '1', lambda: (f'document {number} ' * 900 for number in itertools.count()))\n"
        "if __name__ == '__main__':\n"
        "    guarded(prepare)(endless, sys.argv[1], 'bytes', shard_size=2_000_000, num_workers=2)\n"
    )
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    limit = time.monotonic() + 60
    while not (tmp_path / "out" / "train" / "000005.npy").exists() and time.monotonic() < limit:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes of the group
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted: the same command will go on from the last whole shard\n")
    assert is_gone(process.pid)


def test_two_preparations_in_one_folder_are_refused(tmp_path):
    def texts():
        with pytest.raises(UserError, match="another process prepares a dataset there"):
            prepare(source(), str(tmp_path / "out"), "bytes")
        yield from DOCUMENTS

    info = prepare(source_of("test", "1", texts), str(tmp_path / "out"), "bytes", num_workers=1)
    assert prepare(source(), str(tmp_path / "out"), "bytes") == info
    with pytest.raises(UserError, match="no such file"):
        prepare(source_of("test", "1", lambda: read_documents(f"{tmp_path}/x")), str(tmp_path / "none"), "bytes")
    assert not (tmp_path / "none").exists()


def test_progress_without_a_terminal_is_a_line_a_minute(tmp_path, monkeypatch, capsys, small_chunks):
    monkeypatch.setattr("pretrain_xla.prepare.progress.LINE_SECONDS", 0.0)
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS))
    prepare(source(), str(tmp_path / "a"), "bytes", num_workers=1, progress=False)
    assert capsys.readouterr().err == ""
    prepare(str(tmp_path / "a.txt"), str(tmp_path / "b"), "bytes", num_workers=1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 58
    assert lines[-1].startswith("400 documents, ")
    assert lines[-1].endswith("M tokens/s, 100.0%")
    monkeypatch.undo()
    prepare(source(), str(tmp_path / "c"), "bytes", num_workers=1)
    assert capsys.readouterr().err == ""


def test_any_fsspec_url():
    info = prepare(source(), "memory://prepared", train_vocab_size=300, valid_fraction=0.2)
    assert info.tokenizer_name.startswith("memory://")
    assert load_tokenizer(info.tokenizer_name).vocab_size == 300
    assert prepare(source(), "memory://prepared", train_vocab_size=300, valid_fraction=0.2) == info
    assert open_dataset("memory://prepared/train", 16, 300).tokens == info.splits["train"].tokens
    verify_checksums("memory://prepared")
    assert not fsspec.filesystem("memory").exists("/prepared/dataset.json.partial")


@pytest.mark.usefixtures("gpt2_cache")
def test_gpt2_is_the_default_and_wide_vocabularies_take_four_bytes(tmp_path):
    gpt2 = prepare(source(), str(tmp_path / "gpt2"))
    assert (gpt2.tokenizer_name, gpt2.vocab_size, gpt2.dtype) == ("gpt2", 50257, "uint16")
    wide = prepare(source(), str(tmp_path / "wide"), "cl100k_base")
    assert (wide.dtype, np.load(tmp_path / "wide" / "train" / "000000.npy").dtype) == ("uint32", np.uint32)
    assert json.loads((tmp_path / "wide" / "dataset.json").read_text())["tokenizer"] == "cl100k_base"
