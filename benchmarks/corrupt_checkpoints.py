"""Random damage to checkpoints: `python benchmarks/corrupt_checkpoints.py --count 10000`, about ten minutes.

A run's two checkpoints are damaged in one way after the other: bits flipped, files cut off, deleted, filled with zeros,
swapped with those of the other checkpoint, pieces taken out or put in, folders swapped and renamed, in tensor files, index,
metadata and marker, written by one process or by two. After each, a run looks for its start, and the damaged checkpoint is also
loaded by its name. Either it is refused with one line, or an older one is taken whose tensors are bit for bit those that were
saved. Anything else (a trace, other tensors, a damaged checkpoint that loads) ends the program with what was done and its seed.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pretrain_xla.config import RunConfig, build_config  # noqa: E402
from pretrain_xla.errors import UserError  # noqa: E402
from pretrain_xla.model import GPT, initialize  # noqa: E402
from pretrain_xla.run_folder import checkpoint_writing  # noqa: E402
from pretrain_xla.run_folder.checkpoint import CheckpointInfo, CheckpointStore  # noqa: E402
from pretrain_xla.run_folder.checkpoint_open import open_checkpoint  # noqa: E402
from pretrain_xla.runtime import shards  # noqa: E402
from pretrain_xla.runtime.shards import Read, whole_region  # noqa: E402
from pretrain_xla.train.resume import find_start, load_start  # noqa: E402

Random = np.random.Generator
Tensors = dict[str, torch.Tensor]
TINY = {"vocab_size": 37, "seq_length": 8, "d_model": 8, "num_layers": 1, "num_heads": 2, "d_ff": 8}


def make_run(folder: Path, processes: int) -> tuple[RunConfig, dict[int, Tensors]]:
    """Save a tiny run's steps 10 and 20; returns its config and the tensors of each step."""
    tree: dict[str, Any] = {"model": TINY, "logging": {"run_dir": str(folder)}, "parallel": {"runtime": "torch"}}
    config, saved = build_config(tree, "the benchmark"), dict[int, Tensors]()
    stores = [CheckpointStore(config.checkpoints_dir, limit=9) for _ in range(processes)]
    for step in (10, 20):
        model = GPT(config.model)
        initialize(model, seed=step)
        saved[step] = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
        saved[step] |= {f"optimizer.first_moment.{n[6:]}": torch.randn_like(t) for n, t in saved[step].items()}
        saved[step]["optimizer.step"] = torch.tensor(step, dtype=torch.int32)
        for index, store in enumerate(stores):
            store.write_with_others(index, processes)
            own = [
                rows.shard(tensor := saved[step][rows.name], rows.of(tensor))
                for rows in shards.divide_rows(saved[step], index, processes)
            ]
            store.save(own, CheckpointInfo(step, 1.0, "data", config.model_dump(mode="json")))
        for store in stores:
            store.wait()
    return config, saved


def flip_bits(raw: bytes, random: Random, _other: bytes) -> bytes:
    """One to three flipped bits."""
    content = bytearray(raw)
    for place in random.integers(len(content) * 8, size=random.integers(1, 4)):
        content[place // 8] ^= 1 << place % 8
    return bytes(content)


def truncate(raw: bytes, random: Random, _other: bytes) -> bytes:
    """The beginning of a file."""
    return raw[: random.integers(len(raw))]


def zero_tail(raw: bytes, random: Random, _other: bytes) -> bytes:
    """Zeros from somewhere on, as of a file whose last blocks were never written."""
    kept = int(random.integers(len(raw)))
    return raw[:kept] + bytes(len(raw) - kept)


def zero_block(raw: bytes, random: Random, _other: bytes) -> bytes:
    """Zeros in the middle."""
    start = int(random.integers(len(raw)))
    stop = min(start + int(random.integers(1, 4097)), len(raw))
    return raw[:start] + bytes(stop - start) + raw[stop:]


def take_out(raw: bytes, random: Random, _other: bytes) -> bytes:
    """A piece is missing."""
    start = int(random.integers(len(raw)))
    return raw[:start] + raw[start + int(random.integers(1, 65)) :]


def put_in(raw: bytes, random: Random, _other: bytes) -> bytes:
    """Some random bytes are added."""
    start = int(random.integers(len(raw) + 1))
    return raw[:start] + random.bytes(int(random.integers(1, 65))) + raw[start:]


def swap_parts(raw: bytes, random: Random, _other: bytes) -> bytes:
    """Two parts are exchanged."""
    one, two = sorted(random.integers(len(raw) + 1, size=2))
    return raw[one:two] + raw[:one] + raw[two:]


def other_file(_raw: bytes, _random: Random, other: bytes) -> bytes:
    """The same file of the other checkpoint."""
    return other


CHANGES: tuple[Callable[[bytes, Random, bytes], bytes], ...] = (
    flip_bits, truncate, zero_tail, zero_block, take_out, put_in, swap_parts, other_file,
)  # fmt: skip
CHUNK = 500
"""Corruptions with one seed; the next ones have the next seed."""
MOVES = ("delete a file", "swap the folders", "rename the folder", "the other's files, own marker")


def damage(root: Path, random: Random) -> str:
    """Damage the newer checkpoint, or both, at random; returns what was done."""
    newer, older = root / "step_00000020", root / "step_00000010"
    name = str(random.choice(sorted(os.listdir(newer))))
    number = int(random.integers(len(CHANGES) * 2 + len(MOVES)))
    if number < len(CHANGES) * 2:
        change = CHANGES[number % len(CHANGES)]
        raw = (newer / name).read_bytes()
        (newer / name).write_bytes(change(raw, random, (older / name).read_bytes()))
        return change.__name__
    move = MOVES[number - len(CHANGES) * 2]
    if move == "delete a file":
        (newer / name).unlink()
    elif move == "swap the folders":
        newer.rename(root / "aside")
        older.rename(newer)
        (root / "aside").rename(older)
    elif move == "rename the folder":
        newer.rename(root / f"step_{int(random.integers(21, 99)):08d}")
    else:
        for path in older.iterdir():
            if path.name != "checkpoint.json":
                shutil.copy(path, newer / path.name)
    return move


def bytes_of(root: Path) -> dict[str, bytes]:
    """Path → content of all files."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def same(read: Tensors, saved: Tensors) -> bool:
    """Whether two states are equal bit for bit."""
    return read.keys() == saved.keys() and all(torch.equal(read[name], saved[name]) for name in saved)


def copy_in(tensors: Mapping[str, torch.Tensor], read: Read) -> None:
    """Load tensors as one process does."""
    for name, tensor in tensors.items():
        tensor.copy_(read(name, [whole_region(tensor.shape)])[0])


def outcome_of_start(config: RunConfig, saved: dict[int, Tensors], changed: bool) -> str:
    """What a run does: where it starts, or that it refuses.

    Raises:
        AssertionError: something was loaded that is not what was saved.
    """
    said: list[str] = []
    try:
        start = find_start(config, "data", said.append)
        read = {name: torch.zeros_like(tensor) for name, tensor in saved[max(saved)].items()}
        start = load_start(start, read, config, "data", said.append, copy_in)
    except UserError as error:
        return refused(error)
    assert same(read, saved.get(start.step, {})), f"other tensors are loaded as {start.step}"
    if start.step == max(saved):
        assert not changed, "a damaged checkpoint is loaded"
        return "unchanged"
    markers = list(Path(config.checkpoints_dir).glob("step_000000[2-9]*/checkpoint.json"))
    assert not markers or any("is skipped for that of step" in line for line in said), "no line on what was skipped"
    return "older one taken"


def outcome_by_name(root: Path, changed: bool) -> None:
    """Load the damaged checkpoint by its name.

    Raises:
        AssertionError: it loads.
    """
    newer = max(path for path in root.iterdir() if path.name.startswith("step_"))
    try:
        store, step = open_checkpoint(str(newer))
        store.load(step)
    except UserError as error:
        refused(error)
        return
    assert not changed, "a damaged checkpoint is loaded by its name"


def refused(error: UserError) -> str:
    """The outcome of a refusal, which must be one line."""
    if "\n" in str(error):
        raise AssertionError("more than one line")
    return "refused"


def corrupt(count: int, seed: int = 0) -> dict[str, int]:
    """Make `count` corruptions; returns how they ended.

    Raises:
        AssertionError: one did not end as it should.
    """
    shards.SMALLEST_PIECE = 64  # so that tensors this small are shared
    checkpoint_writing.POLL = 0.01
    ended: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as temporary:
        runs = [(*make_run(Path(temporary) / f"of_{n}", n), n) for n in (1, 2)]
        kept = [Path(temporary) / f"kept_{n}" for _, _, n in runs]
        for (config, _, _), copy in zip(runs, kept, strict=True):
            shutil.copytree(config.checkpoints_dir, copy)
        whole = [bytes_of(copy) for copy in kept]
        for number in range(count):
            random = np.random.default_rng([seed, number])
            config, saved, _ = runs[number % 2]
            root = Path(config.checkpoints_dir)
            shutil.rmtree(root)
            shutil.copytree(kept[number % 2], root)
            what = damage(root, random)
            changed = bytes_of(root) != whole[number % 2]
            try:
                outcome_by_name(root, changed)
                ended[outcome_of_start(config, saved, changed)] += 1
            except Exception as error:
                raise AssertionError(f"corruption {number} of seed {seed} ({what}): {error!r}") from error
    return dict(ended)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    ended: collections.Counter[str] = collections.Counter()
    for number, first in enumerate(range(0, flags.count, CHUNK)):
        ended.update(corrupt(min(CHUNK, flags.count - first), flags.seed + number))
        print(", ".join(f"{what}: {count:,}" for what, count in sorted(ended.items())), flush=True)


if __name__ == "__main__":
    main()
