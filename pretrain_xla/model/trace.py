"""A model as a tree of its modules: what goes in and out of each, its parameters, and the operations that a token costs there.

Nothing is computed: the model is built on the meta device, which knows only shapes, one sequence passes through it, and hooks
and PyTorch's own counter write down what they see. So the picture follows whatever is changed in the architecture. It counts as
`flops.py` does (matrix products only, the real vocabulary); the tests hold the two to the same totals.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain_xla.config import ModelConfig
from pretrain_xla.model.gpt import GPT

Shape = tuple[int | str, ...]
"""Sizes of a tensor; the batch is written `B`."""


@dataclass(frozen=True)
class Node:
    """A module and what is below it.

    Attributes:
        name: its name in the parent; `*` is what a module does besides calling the modules in it.
        kind: its class; of `*`, PyTorch's names of the products that it makes.
        inputs: shapes of the tensors that it is called with.
        outputs: shapes of what it gives.
        parameters: number of them, with those below; a tied table counts where it lives.
        flops: operations of the forward pass for one token of a full sequence, with those below.
        children: modules in it, in order of registration.
        times: how many like this one follow each other (blocks); `parameters` and `flops` are of one.
    """

    name: str
    kind: str
    inputs: tuple[Shape, ...] = ()
    outputs: tuple[Shape, ...] = ()
    parameters: int = 0
    flops: int = 0
    children: tuple[Node, ...] = field(default=())
    times: int = 1


def trace_model(config: ModelConfig) -> Node:
    """The tree of a model, every block by itself; `folded` makes it short."""
    # Padding belongs to the hardware, and plain matrix products can be counted.
    config = ModelConfig(**(config.model_dump() | {"vocab_multiple": 1, "attention": "reference", "dropout": 0.0}))
    shapes: dict[nn.Module, tuple[tuple[Shape, ...], tuple[Shape, ...]]] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        shapes[module] = (tuple(_shapes(inputs)), tuple(_shapes(output)))

    with torch.device("meta"), torch.no_grad():
        model = GPT(config).eval()
        for module in model.modules():
            module.register_forward_hook(note)
        tokens_BT = torch.zeros(1, config.seq_length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(tokens_BT)
    counts: dict[str, dict[Any, int]] = defaultdict(dict, counter.get_flop_counts())

    def called_below(module: nn.Module, path: str) -> Iterator[str]:
        for name, child in module.named_children():
            if child in shapes:
                yield f"{path}.{name}"
            else:  # a list of modules is never called itself
                yield from called_below(child, f"{path}.{name}")

    def build(module: nn.Module, name: str, path: str) -> Node:
        children = [build(child, child_name, f"{path}.{child_name}") for child_name, child in module.named_children()]
        own = Counter(counts[path]) if module in shapes else Counter()
        for below in called_below(module, path):
            own.subtract(counts[below] if module in shapes else {})
        made = {str(operation).removeprefix("aten."): flops for operation, flops in own.items() if flops}
        flops = sum(made.values()) // config.seq_length
        if children and made:
            children.append(Node("*", ", ".join(made), flops=flops))
        flops = sum(child.flops for child in children) if children else flops
        inputs, outputs = shapes.get(module, ((), ()))
        parameters = sum(parameter.numel() for parameter in module.parameters())
        return Node(name, type(module).__name__, inputs, outputs, parameters, flops, tuple(children))

    return build(model, "model", type(model).__name__)


def folded(node: Node) -> Node:
    """The tree with numbered neighbours that are alike in everything else as one, `0 … 11` and `times`."""
    groups: list[list[Node]] = []
    for child in map(folded, node.children):
        if groups and child.name.isdigit() and replace(child, name="") == replace(groups[-1][0], name=""):
            groups[-1].append(child)
        else:
            groups.append([child])
    children = [
        group[0] if len(group) == 1 else replace(group[0], name=f"{group[0].name} … {group[-1].name}", times=len(group))
        for group in groups
    ]
    return replace(node, children=tuple(children))


def _shapes(value: Any) -> Iterator[Shape]:
    """Shapes of the tensors with a batch in a call's arguments or result: tables and closures are left out."""
    if isinstance(value, Tensor):
        yield ("B", *value.shape[1:])
    elif isinstance(value, tuple | list):
        for element in value:
            if isinstance(element, Tensor):
                yield from _shapes(element)
