"""Writers of other people's shards, each from the description of its format and in a few lines, sharing nothing with
the package: what the package reads must be what these write."""

from __future__ import annotations

import struct
from pathlib import Path

import datasets


def llm_c(path: Path, ids: list[int]) -> None:
    """llm.c and modded-nanogpt: 256 int32 (magic, version, count, zeros), then uint16."""
    path.write_bytes(struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) + struct.pack(f"<{len(ids)}H", *ids))


def llm_c_llama(path: Path, ids: list[int]) -> None:
    """llm.c for Llama 3: another magic and version, and uint32."""
    path.write_bytes(struct.pack("<256i", 20240801, 7, len(ids), *[0] * 253) + struct.pack(f"<{len(ids)}I", *ids))


def nano_gpt(path: Path, ids: list[int]) -> None:
    """nanoGPT: uint16 and nothing else."""
    path.write_bytes(struct.pack(f"<{len(ids)}H", *ids))


def build_nano_gpt(path: Path, ids: list[int]) -> None:
    """build-nanogpt: what `np.save` writes of a uint16 row: magic, version 1.0, length of the header, a dict, the ids."""
    text = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({len(ids)},), }}"
    text += " " * (-(10 + len(text) + 1) % 64) + "\n"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
    path.write_bytes(head + struct.pack(f"<{len(ids)}H", *ids))


def blocks(path: Path, ids: list[int], size: int = 64) -> None:
    """Blocks of one length in a column `input_ids`, as `datasets` writes them; the rest makes a shorter last row."""
    rows = [ids[start : start + size] for start in range(0, len(ids), size)]
    datasets.Dataset.from_dict({"input_ids": rows, "number": list(range(len(rows)))}).to_parquet(path)


WRITERS = {
    "llm_c.bin": llm_c,
    "llama.bin": llm_c_llama,
    "nano_gpt.bin": nano_gpt,
    "build_nano_gpt.npy": build_nano_gpt,
    "blocks.parquet": blocks,
}
