"""`python -m pretrain_xla trace`: the architecture of a config as a tree."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import rich.console
from rich.table import Table

from pretrain_xla.flags import parse_flags
from pretrain_xla.interop.from_checkpoint import resolve_architecture
from pretrain_xla.model.trace import Node, Shape, folded, trace_model

PROGRAM = "python -m pretrain_xla trace"
DESCRIPTION = """Print the model as a tree: each module with its input and output shapes, parameters, and flops per token in the
forward pass. Accepts all flags of `train`, and --json to print JSON."""

WIDTH = 160
"""Columns of a deep tree."""


def trace_command(arguments: Sequence[str]) -> None:
    """Trace the model and print the tree.

    Raises:
        UserError: a setting is invalid.
    """
    own = [argument for argument in arguments if argument == "--json"]
    rest = [argument for argument in arguments if argument != "--json"]
    config = parse_flags(rest, program=PROGRAM, description=DESCRIPTION, build=resolve_architecture).config.model
    tree = folded(trace_model(config))
    if own:
        print(json.dumps({"seq_length": config.seq_length, "model": dataclasses.asdict(tree)}, indent=2))
        return
    # Lines are never truncated: a narrow terminal wraps them.
    console = rich.console.Console(width=max(rich.console.Console().width, WIDTH), highlight=False)
    console.print(render(tree))
    console.print(
        f"{tree.parameters:,} parameters; {tree.flops / 1e6:,.1f} Mflop per token forward in a sequence of "
        f"{config.seq_length:,}, {3 * tree.flops / 1e6:,.1f} with backward"
    )
    if config.padded_vocab_size != config.vocab_size:
        console.print(
            f"Training pads the vocabulary of {config.vocab_size:,} to {config.padded_vocab_size:,}, which is not counted here."
        )


def render(tree: Node) -> Table:
    """The tree as a table, indented by depth. Shares are of the whole model."""
    table = Table(box=None, pad_edge=False)
    table.add_column("module", no_wrap=True)
    table.add_column("kind", no_wrap=True, style="cyan")
    table.add_column("in → out", no_wrap=True)
    for name in ("parameters", "share", "flop per token", "share"):
        table.add_column(name, justify="right", no_wrap=True)

    def add(node: Node, prefix: str, below: str, times: int) -> None:
        times *= node.times
        label = "(itself)" if node.name == "*" else node.name
        label += f"  ×{node.times}" if node.times > 1 else ""
        table.add_row(
            prefix + label,
            node.kind,
            _passage(node),
            f"{node.parameters:,}" if node.parameters else "",
            _share(node.parameters * times, tree.parameters),
            f"{node.flops:,}" if node.flops else "",
            _share(node.flops * times, tree.flops),
        )
        for index, child in enumerate(node.children):
            is_last = index == len(node.children) - 1
            add(child, below + ("└ " if is_last else "├ "), below + ("  " if is_last else "│ "), times)

    add(tree, "", "", 1)
    return table


def _passage(node: Node) -> str:
    if not node.outputs:
        return ""
    inputs, outputs = (", ".join(map(_written, shapes)) for shapes in (node.inputs, node.outputs))
    return outputs if inputs == outputs else f"{inputs} → {outputs}"


def _written(shape: Shape) -> str:
    return "×".join(str(size) for size in shape)


def _share(part: int, total: int) -> str:
    return f"{part / total:.1%}" if part else ""
