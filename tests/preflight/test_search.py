"""Search and suggestions, with known results in place of the compiler's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pretrain_xla.config import RunConfig
from pretrain_xla.preflight.search import Search
from pretrain_xla.preflight.suggestions import remedies
from pretrain_xla.preflight.topology import Topology, resolve_topology
from pretrain_xla.preflight.trials import Trial, changed, flag
from tests.preflight.conftest import make_config


class KnownTrial(Trial):
    """A trial with a rate instead of a report."""

    def __init__(self, changes: dict[str, Any], rate: float) -> None:
        super().__init__(changes, None)
        object.__setattr__(self, "rate", rate)

    @property
    def fits(self) -> bool:
        return self.rate > 0  # type: ignore[attr-defined, no-any-return]

    @property
    def tokens_per_second(self) -> float:
        return self.rate  # type: ignore[attr-defined, no-any-return]


class KnownCompiler:
    """Fits `room` sequences a device (twice as many with selective rematerialisation); faster with each, up to 32."""

    def __init__(self, name: str, room: int) -> None:
        self.topology: Topology = resolve_topology(name)
        self.room = room
        self.attempted: list[dict[str, Any]] = []

    def expect(self, more: int) -> None:
        pass

    def attempt(self, base: RunConfig, changes: Mapping[str, Any]) -> Trial:
        changed(base, changes)
        self.attempted.append(dict(changes))
        rows = changes["train_batch_size"] // (changes["mesh_data"] * changes["mesh_fsdp"])
        remat = changes.get("rematerialization", "none")
        room = self.room * {"none": 1, "selective": 2, "full": 4}[remat]
        rate = min(rows, 32) * 100 - rows - (changes["mesh_fsdp"] > 1) * 10 - (remat != "none") * 50
        return KnownTrial(dict(changes), rate if rows <= room else 0)


def search(compiler: KnownCompiler, config: RunConfig, max_compiles: int = 30) -> Search:
    found = Search(config, compiler, max_compiles)  # type: ignore[arg-type]
    found.run()
    return found


def test_grows_the_batch_while_it_fits_and_gets_faster() -> None:
    config = make_config(train={"train_batch_size": 512, "gradient_accum_step": 1})
    found = search(KnownCompiler("v5e-1", room=1000), config)
    assert found.best is not None
    assert found.best.changes == {
        "mesh_data": 1,
        "mesh_fsdp": 1,
        "train_batch_size": 32,
        "gradient_accum_step": 16,
    }
    for trial in found.tried:
        assert trial.changes["train_batch_size"] * trial.changes["gradient_accum_step"] == 512, "sequences of a step"
    assert max(t.changes["train_batch_size"] for t in found.tried if "rematerialization" not in t.changes) == 64


def test_shrinks_the_batch_until_it_fits_and_then_saves_memory() -> None:
    config = make_config(train={"train_batch_size": 512})
    found = search(KnownCompiler("v5e-1", room=4), config)
    assert found.best is not None
    # Here rematerialization costs less than the larger batch gains.
    assert found.best.changes["rematerialization"] in ("selective", "full")
    assert found.best.changes["train_batch_size"] >= 8


def test_meshes_are_tried_on_several_devices() -> None:
    compiler = KnownCompiler("v5e-16", room=8)
    found = search(compiler, make_config(train={"train_batch_size": 512}))
    assert {(c["mesh_data"], c["mesh_fsdp"]) for c in compiler.attempted} == {(16, 1), (2, 8), (1, 16)}
    assert found.best is not None
    assert found.best.changes["mesh_data"] == 16


def test_never_compiles_more_than_allowed_nor_anything_twice() -> None:
    compiler = KnownCompiler("v5e-8", room=16)
    search(compiler, make_config(train={"train_batch_size": 1024}), max_compiles=5)
    assert len(compiler.attempted) == 5
    compiler = KnownCompiler("v5e-8", room=16)
    search(compiler, make_config(train={"train_batch_size": 1024}), max_compiles=100)
    assert len(compiler.attempted) == len({str(sorted(changes.items())) for changes in compiler.attempted})


def test_nothing_fits() -> None:
    assert search(KnownCompiler("v5e-1", room=0), make_config(train={"train_batch_size": 8})).best is None


def test_remedies_keep_the_sequences_of_a_step() -> None:
    class Result:
        mesh = {"data": 8, "fsdp": 1, "tensor": 1}  # noqa: RUF012

    config = make_config(model={"seq_length": 1024}, train={"train_batch_size": 256})
    found = list(remedies(config, Result()))  # type: ignore[arg-type]
    assert {"train_batch_size": 128, "gradient_accum_step": 2} in found
    assert {"rematerialization": "full"} in found
    assert {"loss_chunk": 2048} in found
    assert {"mesh_data": 1, "mesh_fsdp": 8} in found
    for change in found:
        assert changed(config, change).sequences_per_step == 256
    for length, chunk, helps in ((1000, None, True), (1000, 2048, False), (64, None, False), (64, 4096, False)):
        config = make_config(model={"seq_length": length}, train={"train_batch_size": 256, "loss_chunk": chunk})
        assert ({"loss_chunk": 2048} in remedies(config, Result())) == helps, (length, chunk)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("leaf", "value", "expected"),
    [
        ("loss_chunk", 2048, "--loss-chunk 2048"),
        ("scan_layers", True, "--scan-layers"),
        ("scan_layers", False, "--no-scan-layers"),
    ],
)
def test_flags(leaf: str, value: object, expected: str) -> None:
    assert flag(leaf, value) == expected
