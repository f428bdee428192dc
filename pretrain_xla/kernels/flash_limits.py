"""What the flash attention kernels can do: their heads, lengths and chips. Needs no jax, which the kernels themselves do.

Shapes: as in `flash_kernels.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain_xla.config import ModelConfig

LANES = 128
"""Width of a TPU vector register, and the alignment of a block's columns."""

MAX_TOKENS = {"v4": 1024, "v5e": 8192, "v5p": 8192, "v6e": 8192}
"""By generation: the backward kernel keeps a head's whole sequence in VMEM, of which v4 has 16 MB."""

WITHOUT_KERNELS = ("v2", "v3")
"""Generations of TPUs whose compiler takes no bf16 kernels."""

MAX_SPAN = 1024
"""Tokens of a span: what the compiler sees as straight code, which alone it schedules well, is this times as many keys."""


@dataclass(frozen=True)
class Heads:
    """What is attended: the static part of the computation, alike for forward and backward.

    Args:
        num_heads: query heads H; head h reads key/value head h // (H / K).
        num_kv_heads: key/value heads K.
        head_dim: E.
        scale: factor on query-key products, before the cap.
        softcap: bound c on the scores, as c * tanh(score / c). None means no bound.
        query_column: first column of the queries in their array; the same for `key_column`, `value_column`. With one
            fused array passed three times, no copy is made of its parts.
        norm_eps: added to the mean square where queries or keys are normalised.
        block: tokens of a score block's sides; `default_block` unless given.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None = None
    query_column: int = 0
    key_column: int = 0
    value_column: int = 0
    norm_eps: float = 1e-6
    block: int | None = None

    @property
    def lanes(self) -> int:
        """W, columns of a block."""
        return max(self.head_dim, LANES)

    @property
    def per_block(self) -> int:
        """N, heads of a block."""
        return self.lanes // self.head_dim

    @property
    def groups(self) -> int:
        """G, query heads of a key/value head; also query blocks of a key/value block."""
        return self.num_heads // self.num_kv_heads

    @property
    def kv_blocks(self) -> int:
        """Key/value blocks across the columns."""
        return self.num_kv_heads // self.per_block

    @property
    def spread(self) -> bool:
        """Whether both query heads of a block read one and the same key/value head, which is half a block."""
        return self.per_block > 1 and self.groups > 1

    def block_for(self, tokens: int) -> int:
        """Side of a score block."""
        return self.block or default_block(tokens)


def default_block(tokens: int) -> int:
    """Side of a score block: 256, or 128 where that does not divide T.

    Bundles (cycles) of one head at T = 1024, E = 128 in libtpu 0.0.21's schedule for v5e, forward and backward, by side:
    128: 4,920 and 8,933; 256: 3,565 and 7,131; 512: 3,869 and 6,971, where the matrix unit alone needs 7,680.
    """
    return 256 if tokens % 256 == 0 else 128


def span_for(heads: Heads, tokens: int) -> int:
    """Tokens whose score blocks are straight code: a multiple of the block that divides T, of at most `MAX_SPAN`."""
    block = heads.block_for(tokens)
    return max(side for side in range(block, max(block, MAX_SPAN) + 1, block) if tokens % side == 0)


def supports(heads: Heads, tokens: int, chip: str = "v5e") -> str | None:
    """Why the kernels cannot do this on a generation of TPUs (v2 … v6e). None means they can."""
    block = heads.block_for(tokens)
    H, K, E = heads.num_heads, heads.num_kv_heads, heads.head_dim
    if E not in (64, 128, 256):
        return f"heads are {E} wide; the kernel takes 64, 128 and 256"
    if H % K:
        return f"{H} query heads do not divide into {K} groups"
    if K % heads.per_block:
        return f"{K} key/value heads of width {E} do not fill {LANES}-lane blocks: their number must be even"
    if heads.spread and heads.groups % 2:
        return f"{heads.groups} query heads of width {E} for each key/value head: the number must be 1 or even"
    if chip in WITHOUT_KERNELS:
        return f"the compiler takes no bf16 kernels for {chip}"
    longest = MAX_TOKENS.get(chip, MAX_TOKENS["v5e"]) * LANES // heads.lanes
    if tokens > longest:
        return f"{tokens} tokens; the backward kernel holds whole sequences, on {chip} of at most {longest}"
    if tokens % block or block % LANES:
        return f"{tokens} tokens are not a multiple of a block of {block}, or the block is not one of {LANES}"
    if any(column % heads.lanes for column in (heads.query_column, heads.key_column, heads.value_column)):
        return f"queries, keys and values must start at multiples of {heads.lanes} columns"
    return None


def why_plain(model: ModelConfig, chip: str | None, tensor: int) -> str | None:
    """Why the training step of a model attends without the kernels. None means it runs them.

    Args:
        model: its heads and its length.
        chip: generation of TPUs. None means no TPU, or one that is not known.
        tensor: devices that share the heads.
    """
    if model.attention == "reference":
        return "--attention reference"
    if chip is None:
        return "the kernels are for TPUs (v4, v5e, v5p, v6e)"
    if model.dropout:
        return f"the kernels draw no dropout (--dropout {model.dropout:g})"
    return supports(
        Heads(model.num_heads // tensor, model.kv_heads // tensor, model.heads_dim, 1.0), model.seq_length, chip
    )
