"""Writers of other projects' shards, each a few lines after its format's description. They share no code with the package,
which must read what they write."""

from __future__ import annotations

import json
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
    """Blocks of one length in a column `input_ids`, as `datasets` writes them; the remainder is a shorter last row."""
    rows = [ids[start : start + size] for start in range(0, len(ids), size)]
    datasets.Dataset.from_dict({"input_ids": rows, "number": list(range(len(rows)))}).to_parquet(path)


def datatrove(path: Path, ids: list[int]) -> None:
    """datatrove's DocumentTokenizer: uint16 and nothing else, with the ends of documents and a summary in two more files."""
    nano_gpt(path, ids)
    path.with_suffix(".ds.index").write_bytes(struct.pack("<2Q", 9, len(ids)))
    path.with_suffix(".ds.metadata").write_text(f"gpt2|2\n{len(ids)}\n{len(ids)} T")


def litdata(path: Path, ids: list[int], types: str = "no_header_tensor:16", code: str = "i") -> None:
    """litdata's writer: number of items and their offsets as uint32, then the items; here, as litgpt writes them, int32."""
    items = [ids[start : start + 30] for start in range(0, len(ids), 30)]
    packed = [struct.pack(f"<{len(item)}{code}", *item) for item in items]
    offsets = [4 * (len(items) + 2)]
    for item in packed:
        offsets.append(offsets[-1] + len(item))
    path.write_bytes(struct.pack(f"<{len(offsets) + 1}I", len(items), *offsets) + b"".join(packed))
    config = {"compression": None, "data_format": [types], "encryption": None, "item_loader": "TokensLoader"}
    index = path.parent / "index.json"
    chunks = json.loads(index.read_text())["chunks"] if index.exists() else []
    chunks = [chunk for chunk in chunks if chunk["filename"] != path.name]
    chunks.append({"chunk_bytes": offsets[-1], "chunk_size": len(items), "dim": len(ids), "filename": path.name})
    index.write_text(json.dumps({"chunks": chunks, "config": config}))


def megatron(path: Path, ids: list[int]) -> None:
    """Megatron-LM: int32 or uint16 and nothing else; magic, version, type, counts and more in an .idx file."""
    path.write_bytes(struct.pack(f"<{len(ids)}i", *ids))
    path.with_suffix(".idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 1, 2) + bytes(28))


WRITERS = {
    "llm_c.bin": llm_c,
    "llama.bin": llm_c_llama,
    "nano_gpt.bin": nano_gpt,
    "build_nano_gpt.npy": build_nano_gpt,
    "blocks.parquet": blocks,
    "datatrove.ds": datatrove,
    "chunk-0-0.bin": litdata,
    "megatron.bin": megatron,
}
