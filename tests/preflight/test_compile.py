"""The real TPU compiler: the preflight command compiles a small step for TPUs that this host does not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end.conftest import Result, run

SMALL = (
    "--d-model 128 --num-layers 2 --num-heads 1 --d-ff 512 --vocab-size 512 --seq-length 128 --mixed-precision bf16 "
    "--train-batch-size 16 --tie-weights --max-grad-norm 1 --weight-decay 0.1"
).split()
LONG = (
    "--d-model 128 --num-layers 1 --num-heads 1 --d-ff 128 --vocab-size 512 --seq-length 1024 --mixed-precision bf16 "
    "--tie-weights --attention reference"
).split()


def preflight(*arguments: str) -> Result:
    """Run `pretrain_xla preflight` in its own process."""
    return run("-m", "pretrain_xla", "preflight", *arguments)


def report(*arguments: str) -> dict[str, Any]:
    """Run preflight and read its report as JSON."""
    result = preflight(*arguments, "--json")
    assert result.status in (0, 1), result.errors
    tree: dict[str, Any] = json.loads(result.output)
    return tree


@pytest.mark.parametrize("topology", ["v3-1", "v5e-1", "v6e-1"])
def test_a_small_step_compiles_for(topology: str, tmp_path: Path) -> None:
    tree = report("--topology", topology, *SMALL, "--save-hlo", str(tmp_path / "hlo"))
    assert (tmp_path / "hlo" / "input.hlo").read_text().startswith("HloModule")
    assert "estimated_cycles" in (tmp_path / "hlo" / "optimised.hlo").read_text()
    options = json.loads((tmp_path / "hlo" / "options.json").read_text())
    assert options["topology"] == topology.replace("-1", ":1x1")
    assert tree["fits"]
    memory, estimate = tree["memory"], tree["estimate"]
    state = 4 * (512 * 128 + 128 * 128 + 2 * (12 * 128 * 128 + 4 * 128 + 512 + 5 * 128) + 2 * 128)
    assert memory["parameters"] == pytest.approx(state, rel=0.02)
    assert memory["optimizer"] == 2 * memory["parameters"] + 4
    assert not memory["not_donated"], "every parameter and moment is updated in place"
    # `model_flops` follows PaLM's convention, without what a kernel recomputes; kernels and padding add to it.
    assert 0.95 < estimate["flops"] / estimate["model_flops"] < 2.5
    assert 0 < estimate["optimistic"]["seconds"] <= estimate["conservative"]["seconds"] < 0.01
    assert estimate["hbm_bytes"] >= 2 * (memory["parameters"] + memory["optimizer"]) * 0.9
    where = " ".join(row["where"] for row in estimate["operations"])
    for line in ("blocks.*.feed_forward.down~ model/", "blocks.*.attention", "optim/"):
        assert line in where
    assert not [f for f in tree["findings"] if f["level"] == "warning"], tree["findings"]


def test_data_parallel_over_eight_chips() -> None:
    tree = report("--topology", "v5e:2x4", *SMALL)
    assert tree["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    (reduction,) = [row for row in tree["collectives"] if row["kind"] == "all-reduce"]
    assert reduction["group"] == 8
    # Every gradient once, in bf16 or fp32.
    assert 0.45 * tree["memory"]["parameters"] < reduction["bytes"] < 1.1 * tree["memory"]["parameters"]
    assert tree["estimate"]["communication_seconds"] > 0
    # Each chip computes an eighth of the batch, and `model_flops` counts one device.
    assert tree["estimate"]["flops"] < 2.5 * tree["estimate"]["model_flops"]
    assert tree["memory"]["batch"] == 2 * 129 * 4


def test_the_batch_size_decides_whether_it_fits() -> None:
    few = report("--topology", "v2-1", *LONG, "--train-batch-size", "64")
    many = preflight("--topology", "v2-1", *LONG, "--train-batch-size", "1536", "--no-suggestions")
    assert few["fits"]
    assert many.status == 1, many.errors
    assert "DOES NOT FIT: needs at least" in many.output
    assert "blocks.*.attention" in many.output
    assert "Traceback" not in many.output + many.errors


def test_the_training_script_prints_a_report() -> None:
    documents = ("--separate-documents", "--loss-ignore-tokens", "0", "7")
    # --overlap-gradients too: the compiler refuses options that it does not know.
    flags = (*SMALL, "--num-layers", "1", *documents, "--overlap-gradients")
    result = run("run_pretrain_xla.py", "--preflight-only", "--topology", "v5e-1", *flags)
    assert result.status == 0, result.errors
    for part in (
        "FITS:",
        "parameters",
        "optimizer state",
        "optimistic",
        "conservative",
        "most expensive lines",
        "libtpu 0.",
    ):
        assert part in result.output
    assert "\x1b" not in result.output


def test_search_writes_a_config_that_loads(tmp_path: Path) -> None:
    best = tmp_path / "best.yaml"
    one_layer = (*SMALL, "--num-layers", "1", "--topology", "v5e-1")
    result = preflight(*one_layer, "--search", "--max-compiles", "1", "--output", str(best))
    assert result.status == 0, result.errors
    assert "best" in result.output
    tree = yaml.safe_load(best.read_text())
    assert tree["train"]["train_batch_size"] * tree["train"]["gradient_accum_step"] == 16
    shown = run("-m", "pretrain_xla", "train", "--config", str(best), "--print-config")
    assert yaml.safe_load(shown.output) == tree


def test_an_impossible_configuration_gives_one_line() -> None:
    result = preflight("--topology", "v5e-8", *SMALL, "--train-batch-size", "12")
    assert result.status == 2
    assert result.last_error.startswith("error: a batch of 12 sequences does not divide")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--topology", "v9-8"), "expected one of v2, v3"),
        (("--topology", "v5e-8", "--price-per-chip-hour", "-1"), "--price-per-chip-hour -1.0: must not be negative"),
        (("--topology", "v5e-8", "--max-compiles", "0"), "at least 1"),
        (("--topology", "v5e-8", "--compiler-option", "x"), "NAME=VALUE"),
        (("--topology", "v5e-8", "--tpology", "x"), "did you mean --topology"),
        ((), "name the TPU to compile for"),
    ],
)
def test_wrong_requests_give_one_line(arguments: tuple[str, ...], expected: str) -> None:
    result = preflight(*arguments)
    assert result.status == 2
    assert len(result.errors.splitlines()) == 1
    assert expected in result.errors
    assert result.output == ""
