"""The fastest configuration that fits, found by compiling: micro-batch, mesh, rematerialisation, loss chunk.

The number of sequences in a step does not change: a smaller micro-batch means more accumulation, so the training result is the
same. The search answers one question after another, each with the best answers so far: which mesh; how large a micro-batch
(doubled while it gets faster; one that does not fit would not fit larger); then whether saved memory allows an even larger one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain_xla.config import RunConfig
from pretrain_xla.preflight.suggestions import CHUNK
from pretrain_xla.preflight.trials import Compiler, Trial

FIRST_ROWS = 8
"""Sequences per device at the start of the search: enough to fill the matrix unit at GPT-2's sizes."""


class Search:
    """State of one search. tried: every trial so far, in order."""

    def __init__(self, config: RunConfig, compiler: Compiler, max_compiles: int) -> None:
        self.config = config
        self.compiler = compiler
        self.max_compiles = max_compiles
        self.tried: list[Trial] = []
        compiler.expect(max_compiles)

    @property
    def best(self) -> Trial | None:
        """The fastest trial that fits, by the conservative estimate. None means that none fits."""
        return max((trial for trial in self.tried if trial.fits), key=lambda t: t.tokens_per_second, default=None)

    def run(self) -> None:
        """Search until every question is answered or the compilations are used up."""
        try:
            mesh = self._best_mesh()
            rows = self._grow(mesh, {}, self._first_rows(mesh))
            for spare in ({"rematerialization": "selective"}, {"loss_chunk": CHUNK}, {"rematerialization": "full"}):
                # Worth its time only for a micro-batch that does not fit, or is not faster, without it.
                self._grow(mesh, spare, rows * 2)
        except _Spent:
            pass

    def _best_mesh(self) -> dict[str, Any]:
        meshes = list(self._meshes())
        if len(meshes) == 1:
            return meshes[0]
        trials = [self._try(mesh, {}, self._first_rows(mesh)) for mesh in meshes]
        fitting = [trial for trial in trials if trial is not None and trial.fits]
        if not fitting:
            return meshes[-1]  # needs the least memory
        best = max(fitting, key=lambda trial: trial.tokens_per_second)
        return {leaf: best.changes[leaf] for leaf in ("mesh_data", "mesh_fsdp")}

    def _meshes(self) -> Iterator[dict[str, Any]]:
        devices = self.compiler.topology.devices // self.config.parallel.mesh_tensor
        yield {"mesh_data": devices, "mesh_fsdp": 1}
        if devices >= 16:
            yield {"mesh_data": devices // 8, "mesh_fsdp": 8}
        if devices > 1:
            yield {"mesh_data": 1, "mesh_fsdp": devices}

    def _first_rows(self, mesh: dict[str, Any]) -> int:
        rows = FIRST_ROWS
        while rows > 1 and self._changes(mesh, {}, rows) is None:
            rows //= 2
        return rows

    def _grow(self, mesh: dict[str, Any], others: dict[str, Any], rows: int) -> int:
        """Double the micro-batch while it gets faster; halve it until it fits. Returns the rows of the fastest."""
        best, best_rate = rows, self.best.tokens_per_second if others and self.best else 0.0
        first = self._try(mesh, others, rows)
        if first is None:
            return rows
        if not first.fits:
            if others:
                return rows
            while rows > 1:
                rows //= 2
                smaller = self._try(mesh, others, rows)
                if smaller is not None and smaller.fits:
                    break
            return rows
        while True:
            trial = self._try(mesh, others, rows)
            if trial is None or not trial.fits or trial.tokens_per_second <= best_rate:
                return best
            best, best_rate = rows, trial.tokens_per_second
            rows *= 2

    def _changes(self, mesh: dict[str, Any], others: dict[str, Any], rows: int) -> dict[str, Any] | None:
        """Changes to settings for `rows` sequences per device. None means that the step's sequences do not divide so."""
        batch = rows * mesh["mesh_data"] * mesh["mesh_fsdp"]
        if self.config.sequences_per_step % batch:
            return None
        accumulation = self.config.sequences_per_step // batch
        return mesh | {"train_batch_size": batch, "gradient_accum_step": accumulation} | others

    def _try(self, mesh: dict[str, Any], others: dict[str, Any], rows: int) -> Trial | None:
        changes = self._changes(mesh, others, rows)
        if changes is None:
            return None
        known = next((trial for trial in self.tried if trial.changes == changes), None)
        if known is not None:
            return known
        if len(self.tried) >= self.max_compiles:
            raise _Spent
        trial = self.compiler.attempt(self.config, changes)
        self.tried.append(trial)
        self.compiler.expect(self.max_compiles - len(self.tried))
        return trial


class _Spent(Exception):
    """All compilations are used up."""
