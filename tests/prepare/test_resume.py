"""`prepare` when it is interrupted in any way, and started again."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pretrain_xla.data.dataset import open_dataset
from pretrain_xla.errors import UserError
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.text.documents import Document, read_documents
from pretrain_xla.text.source import Source
from pretrain_xla.text.sources import open_source, source_of
from tests.prepare.corpus import DOCUMENTS, source, tree

ROOT = Path(__file__).resolve().parents[2]


def test_killed_worker_leaves_complete_shards_to_resume_from(tmp_path, small_chunks):
    def texts(kill):
        for document in DOCUMENTS * 20:
            if kill and (tmp_path / "a" / "train" / "000002.npy").exists():
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
                kill = False
            yield document

    recipe = {"tokenizer": "bytes", "shard_size": 50_000}
    with pytest.raises(UserError, match=r"a worker process was killed .* the same command again to resume"):
        prepare(source_of("test", "1", lambda: texts(True)), str(tmp_path / "a"), num_workers=2, **recipe)
    assert [np.load(path).size for path in sorted((tmp_path / "a" / "train").glob("*"))][:3] == [50_000] * 3
    with pytest.raises(UserError, match="interrupted"):
        open_dataset(str(tmp_path / "a" / "train"), 16, 257)
    prepare(source_of("test", "1", lambda: texts(False)), str(tmp_path / "a"), num_workers=1, **recipe)
    prepare(source_of("test", "1", lambda: texts(False)), str(tmp_path / "b"), num_workers=1, **recipe)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_resuming_reads_only_what_is_left(tmp_path, small_chunks):
    """And nothing is encoded twice except the chunk in flight."""
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
def test_skipped_documents_are_counted_once_however_often_it_is_interrupted(tmp_path):
    """A bad document that stopped it is skipped when the command is repeated with that flag; each is counted once."""
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    for number in (399, 300, 150, 5, 5):
        lines.insert(number, "{oops")
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{oops"]))
    recipe = {"shard_size": 3000, "num_workers": 1}

    def opened(stops_at=None, skips=True):
        found = open_source(str(tmp_path / "a.jsonl"), skip_bad_documents=skips)

        def read(place):
            for number, document in enumerate(found.read(place)):
                if number == stops_at:
                    raise UserError("the power is gone")
                yield document

        return replace(found, read=read)

    with pytest.raises(UserError, match=r"a\.jsonl:6: not JSON"):
        prepare(opened(skips=False), str(tmp_path / "a"), train_vocab_size=300, **recipe)
    prepare(opened(), str(tmp_path / "whole"), train_vocab_size=300, **recipe)
    with pytest.raises(UserError, match="power"):
        prepare(opened(stops_at=200), str(tmp_path / "a"), "bytes", **recipe)
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


def interrupt(tmp_path):
    """A folder with an unfinished dataset."""

    def read(place):
        yield from (Document(text, number) for number, text in enumerate(DOCUMENTS[:200], start=1))
        raise UserError("the network is gone")

    with pytest.raises(UserError, match="network"):
        prepare(Source("test", "1", read), str(tmp_path), "bytes", shard_size=3000, num_workers=1)


@pytest.mark.usefixtures("small_chunks")
def test_unfinished_dataset_of_another_recipe_is_refused(tmp_path):
    interrupt(tmp_path / "a")
    before = tree(tmp_path / "a")
    with pytest.raises(UserError, match=r"unfinished dataset \(shard_size 3000 → 9000\).*--overwrite"):
        prepare(source(), str(tmp_path / "a"), "bytes", shard_size=9000, num_workers=1)
    assert tree(tmp_path / "a") == before
    prepare(source(), str(tmp_path / "a"), "bytes", shard_size=9000, num_workers=1, overwrite=True)
    prepare(source(), str(tmp_path / "b"), "bytes", shard_size=9000, num_workers=1)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("damage", ["train/000001.npy", "unfinished", "dataset.json.partial"])
@pytest.mark.usefixtures("small_chunks")
def test_damaged_files_are_made_again(tmp_path, damage):
    interrupt(tmp_path / "a")
    victim = tmp_path / "a" / damage
    victim = sorted(victim.iterdir())[0] if victim.is_dir() else victim
    os.truncate(victim, victim.stat().st_size - 2)
    prepare(source(), str(tmp_path / "a"), "bytes", shard_size=3000, num_workers=1)
    prepare(source(), str(tmp_path / "b"), "bytes", shard_size=3000, num_workers=1)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.usefixtures("small_chunks")
def test_a_flipped_bit_in_what_was_left_is_not_taken_over(tmp_path):
    """Neither in the tokens that wait for the next shard nor in the place where to go on."""
    prepare(source(), str(tmp_path / "b"), "bytes", shard_size=3000, num_workers=1)
    for number, change in enumerate(("unfinished", "dataset.json.partial")):
        interrupt(folder := tmp_path / str(number))
        path = folder / change
        if path.is_dir():
            path = max(path.iterdir(), key=lambda part: part.stat().st_size)
            raw = bytearray(path.read_bytes())
            raw[-2] ^= 1
            path.write_bytes(raw)
        else:
            path.write_text(re.sub(r'"place": (\d+)', lambda match: f'"place": {int(match[1]) - 1}', path.read_text()))
        prepare(source(), str(folder), "bytes", shard_size=3000, num_workers=1)
        assert tree(folder) == tree(tmp_path / "b")


def test_full_disk_is_one_line_and_leaves_only_complete_shards(tmp_path):
    """The operating system refuses a write halfway through the third shard, as with a full disk."""
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
    """SIGKILL to the reading process; its workers end by themselves. PREPARE_KILLS=10 for more kills."""
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
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs ignore it
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
    os.killpg(process.pid, signal.SIGINT)  # to all processes of the group, as a terminal does
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (
        130,
        "interrupted: the same command will resume after the last complete shard\n",
    )
    assert is_gone(process.pid)


def test_two_preparations_in_one_folder_are_refused(tmp_path):
    def texts():
        with pytest.raises(UserError, match="another process is preparing a dataset there"):
            prepare(source(), str(tmp_path / "out"), "bytes")
        yield from DOCUMENTS

    info = prepare(source_of("test", "1", texts), str(tmp_path / "out"), "bytes", num_workers=1)
    assert prepare(source(), str(tmp_path / "out"), "bytes") == info
    with pytest.raises(UserError, match="no such file"):
        prepare(source_of("test", "1", lambda: read_documents(f"{tmp_path}/x")), str(tmp_path / "none"), "bytes")
    assert not (tmp_path / "none").exists()
