"""`optimize_for_xla`: a built model, module for module, as the version that is fast on a TPU.

| of the model      | becomes             | in               | which                                                          |
|-------------------|---------------------|------------------|----------------------------------------------------------------|
| `GPT`             | `XlaGPT`            | `linear_loss.py` | computes loss and gradients together, by chunks if asked       |
| `Blocks`          | `ScannedBlocks`     | `layer_scan.py`  | is one compiled loop (`scan_layers`)                           |
|                   | `RecomputedBlocks`  | `layer_scan.py`  | saves little for the backward pass (`rematerialization`)       |
| `Block`           | `XlaBlock`          | `block.py`       | leaves RMSNorm's division until after query/key/value products |
| its first norm    | `FactoredRMSNorm`   | `norms.py`       | can leave its division to the block                            |
|                   | `CopyLayerNorm`     | `norms.py`       | can read mean and variance from what its input is a copy of    |
| `Attention`       | `XlaAttention`      | `attention.py`   | uses a kernel, and saves products for the backward pass        |
| query, key, value | `ProductBiasLinear` | `linear.py`      | sums the bias's gradient in the matrix unit                    |
| `FeedForward`     | `XlaFeedForward`    | `attention.py`   | saves products for the backward pass                           |

Each computes what it replaces computes, forward and backward, up to rounding: `tests/model/test_xla_modules.py`.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from pretrain_xla.model.attention import Attention
from pretrain_xla.model.execution import Execution
from pretrain_xla.model.gpt import GPT, Block, Blocks
from pretrain_xla.model.layers import LayerNorm, RMSNorm
from pretrain_xla.model.rewriting import rewritten
from pretrain_xla.model.xla.attention import XlaAttention, XlaFeedForward
from pretrain_xla.model.xla.block import XlaBlock
from pretrain_xla.model.xla.context import XlaContext
from pretrain_xla.model.xla.layer_scan import RecomputedBlocks, ScannedBlocks
from pretrain_xla.model.xla.linear import ProductBiasLinear
from pretrain_xla.model.xla.linear_loss import LinearLossGPT
from pretrain_xla.model.xla.norms import CopyLayerNorm, FactoredRMSNorm


class XlaGPT(LinearLossGPT):
    """`GPT` as `optimize_for_xla` leaves it. execution: the way in which it is run."""

    execution: Execution


def optimize_for_xla(model: GPT, execution: Execution, context: XlaContext) -> XlaGPT:
    """The TPU's version of a model.

    Args:
        model: with its values or without, on any device. Do not use it afterwards: with `scan_layers` its blocks lose their
            parameters.
        execution: what is computed again, and what in one loop.
        context: where the new model is traced.
    """
    blocks = [_block(cast(Block, block), context) for block in cast(Blocks, model.blocks)]
    policy = execution.rematerialization
    new_blocks: nn.Module = Blocks(blocks)
    if execution.scan_layers:
        new_blocks = ScannedBlocks(blocks, keeps=policy == "selective", context=context)
    elif policy != "none":
        new_blocks = RecomputedBlocks(blocks, keeps=policy == "selective", context=context)
    chunk, scan, layout = execution.loss_chunk, context.scan, context.layout
    new_blocks.train(model.training)
    return rewritten(model, XlaGPT, blocks=new_blocks, execution=execution, chunk=chunk, scan=scan, layout=layout)


def _block(block: Block, context: XlaContext) -> XlaBlock:
    norm = block.attention_norm
    version = CopyLayerNorm if isinstance(norm, LayerNorm) else FactoredRMSNorm
    return rewritten(
        block,
        XlaBlock,
        attention_norm=rewritten(cast("LayerNorm | RMSNorm", norm), version),
        attention=_attention(block.attention, context),
        feed_forward=rewritten(block.feed_forward, XlaFeedForward),
    )


def _attention(attention: Attention, context: XlaContext) -> XlaAttention:
    projections = {name: getattr(attention, name) for name in ("query", "key", "value")}
    linears = {name: rewritten(projection, ProductBiasLinear) for name, projection in projections.items()}
    return rewritten(attention, XlaAttention, kernel=context.kernel, **linears)
