"""Text from web servers that fail: retried if the server supports ranges, else an error in one line."""

from __future__ import annotations

import itertools
import json
import os
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pretrain_xla.errors import UserError
from pretrain_xla.storage import retries
from pretrain_xla.text import open_file
from pretrain_xla.text.sources import open_source
from tests.servers import FaultyProxy, WebServer

TEXTS = [f"text {number} " + "and more " * (number % 5) for number in range(2500)]
KINDS = ["503", "429", "broken", "short"]


@pytest.fixture(autouse=True)
def short_retries(monkeypatch):
    monkeypatch.setattr(retries, "RETRY_LIMITS", retries.RetryLimits(1.0, 2.5, 0.05, 0.2, 0.3))
    monkeypatch.setattr(open_file, "BLOCK_BYTES", 2**13)


@pytest.fixture
def folder(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(lines, 1))
    (tmp_path / "c.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "d.parquet", row_group_size=300)
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.zst", "c.txt", "d.parquet"])
def test_text_is_complete_although_each_block_fails_once(folder, name):
    kinds, met = itertools.cycle(KINDS), {}

    def fault(path, span):
        return None if span in met else met.setdefault(span, next(kinds))

    with WebServer(folder) as server, FaultyProxy(server.address, fault) as proxy:
        assert list(open_source(f"{proxy.address}/{name}").documents()) == TEXTS
    assert len(met) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a.jsonl", "c.txt"])
def test_interrupted_server_without_ranges_is_one_line(folder, name, kind):
    count = itertools.count()
    with WebServer(folder, ranges=False) as server, FaultyProxy(server.address) as proxy:
        assert list(open_source(f"{proxy.address}/{name}").documents()) == TEXTS
        source = open_source(f"{proxy.address}/{name}")
        proxy.fault = lambda path, span: kind if next(count) >= 1 else None  # first it is asked for a range
        with pytest.raises(UserError) as error:
            list(source.documents())
    assert f"{name}: reading was interrupted (" in str(error.value)
    assert "run the same command again" in str(error.value)
    assert "\n" not in str(error.value)


def test_zip_on_a_server_without_ranges_is_one_line(folder):
    with zipfile.ZipFile(folder / "e.zip", "w") as archive:
        archive.write(folder / "a.jsonl", "a.jsonl")
    for ranges in (True, False):
        with WebServer(folder, ranges=ranges) as server:
            source = open_source(f"{server.address}/e.zip")
            if ranges:
                assert list(source.documents()) == TEXTS
                continue
            with pytest.raises(
                UserError, match=r"e\.zip: the index of a \.zip is at its end, .*: copy it to a disk first"
            ):
                list(source.documents())


def test_version_follows_an_edit_that_keeps_the_size(folder):
    with WebServer(folder) as server:
        before = open_source(f"{server.address}/c.txt").version
        assert open_source(f"{server.address}/c.txt").version == before
        os.utime(folder / "c.txt", (0, 0))
        assert open_source(f"{server.address}/c.txt").version != before


def test_retries_end(folder):
    with WebServer(folder) as server, FaultyProxy(server.address) as proxy:
        source = open_source(f"{proxy.address}/a.jsonl")
        proxy.fault = lambda path, span: "503"
        with pytest.raises(UserError, match=r"a\.jsonl: cannot be read: .*gave up after"):
            list(source.documents())
