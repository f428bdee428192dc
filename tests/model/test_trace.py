"""The tree of a model agrees with what is counted by formula, and shows what passes through."""

import dataclasses
import json
import time

import pytest

from pretrain_xla.cli import main
from pretrain_xla.config import ModelConfig
from pretrain_xla.config_file import load_yaml
from pretrain_xla.model import forward_flops_per_token, parameter_count
from pretrain_xla.model.trace import folded, trace_model


def total(node, count):
    """Sum over the leaves of a tree."""
    return node.times * (sum(total(child, count) for child in node.children) if node.children else count(node))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gated": True, "activation": "silu", "tie_weights": True, "attention": "reference"},
        {"num_kv_heads": 1, "head_dim": 10, "positions": "rotary", "bias": False},
        {"num_kv_heads": 2, "qk_norm": True, "post_norm": True, "norm": "rmsnorm", "attention_softcap": 5.0},
        {"positions": "none", "logit_softcap": 3.0, "num_layers": 1},
    ],
    ids=str,
)
def test_totals_are_those_of_the_formulas(tiny, changes):
    config = tiny(**changes)
    for tree in (trace_model(config), folded(trace_model(config))):
        assert tree.parameters == parameter_count(config)
        assert tree.flops == total(tree, lambda node: node.flops) == forward_flops_per_token(config)
        assert total(tree, lambda node: node.parameters) == parameter_count(config)


def test_what_one_sees(tiny):
    config = tiny(num_kv_heads=2, num_layers=3, tie_weights=True)
    tree = folded(trace_model(config))
    assert (tree.inputs, tree.outputs) == ((("B", 12),), (("B", 12, 61),))
    blocks = next(child for child in tree.children if child.name == "blocks")
    (block,) = blocks.children
    assert (block.name, block.kind, block.times) == ("0 … 2", "Block", 3)
    attention = next(child for child in block.children if child.name == "attention")
    key = next(child for child in attention.children if child.name == "key")
    assert (key.inputs, key.outputs, key.parameters) == ((("B", 12, 24),), (("B", 12, 12),), 24 * 12 + 12)
    # What modules do besides calling others: scores and weighted sum, and the logits of a tied table.
    assert [(child.name, child.flops) for child in attention.children if child.name == "*"] == [("*", 4 * 24 * 12)]
    assert [(child.kind, child.flops) for child in tree.children if child.name == "*"] == [("mm", 2 * 24 * 61)]


def test_blocks_that_differ_are_not_folded(tiny):
    tree = trace_model(tiny(num_layers=3))
    blocks = next(child for child in tree.children if child.name == "blocks")
    changed = dataclasses.replace(blocks.children[1], parameters=1)
    mixed = dataclasses.replace(blocks, children=(blocks.children[0], changed, blocks.children[2]))
    assert [child.name for child in folded(mixed).children] == ["0", "1", "2"]


def test_a_large_model_takes_a_moment():
    config = ModelConfig(**load_yaml("configs/gpt2_1558m.yaml")["model"])
    begin = time.process_time()
    tree = trace_model(config)
    assert time.process_time() - begin < 10
    assert tree.parameters == 1_557_611_200


def test_the_command(capsys):
    main(["trace", "--config", "configs/modern_124m.yaml", "--num-layers", "3"])
    shown = capsys.readouterr().out
    assert "0 … 2  ×3" in shown
    assert "B×1024×768 → B×1024×2048" in shown
    assert "…tive" not in shown
    main(["trace", "--config", "configs/modern_124m.yaml", "--json"])
    tree = json.loads(capsys.readouterr().out)["model"]
    assert tree["parameters"] == 162_152_448
    with pytest.raises(SystemExit):
        main(["trace", "--num-heads", "5"])
    assert "d_model" in capsys.readouterr().err
