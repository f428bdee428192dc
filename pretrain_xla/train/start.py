"""The state that a run starts from: what it takes from a checkpoint or from weights, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from torch import Tensor

from pretrain_xla.errors import UserError
from pretrain_xla.model.xla.stacked import unstacked_shapes
from pretrain_xla.optim.averaging import AVERAGE
from pretrain_xla.run_folder.checkpoint import CheckpointInfo, CheckpointStore
from pretrain_xla.run_folder.checkpoint_open import weights_prefix
from pretrain_xla.run_folder.checkpoint_reading import StoredTensors
from pretrain_xla.run_folder.state_source import read_regions, shape_of
from pretrain_xla.run_folder.tensor_checks import check_finite, check_shapes
from pretrain_xla.runtime.shards import Read, Region

MODEL, OPTIMIZER = "model.", "optimizer."
"""What the names of a state's tensors begin with."""


@dataclass
class Start:
    """The state that a run starts from.

    store: the run's checkpoints. step: number of updates so far. tensors: name → host tensor, empty for a new run; those of a
    checkpoint are read when they are asked for. where: what they are from. own: it is this run's own checkpoint. evaluates:
    only the weights are used (mode `evaluate`). info: the checkpoint's marker, if it is one of ours. replaceable: it is in
    `store`, so that an older one there can take its place.
    """

    store: CheckpointStore
    step: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    where: str = ""
    own: bool = False
    evaluates: bool = False
    info: CheckpointInfo | None = None
    replaceable: bool = False

    def load(self, state: Mapping[str, Tensor], load_shards: Callable[[Mapping[str, Tensor], Read], None]) -> None:
        """Give a run's tensors the saved values. What is not saved, and need not be, is left as it is in a new run.

        Args:
            state: name → tensor, as `TrainStep.named_state`.
            load_shards: the runtime's.

        Raises:
            UserError: one is missing or of another shape, holds NaN, or cannot be read; `DamagedCheckpoint` if it is damaged.
        """
        wanted = self._model(state) | self._optimizer(state) | self._loss_scale(state)
        for name, tensor in state.items():
            if name.startswith("guard.") and not self.evaluates and self._shape(name) == tuple(tensor.shape):
                wanted[name] = name  # otherwise there is none, or one for other settings

        def read(name: str, regions: Sequence[Region]) -> list[Tensor]:
            found = read_regions(self.tensors, wanted[name], regions)
            for block in found:
                check_finite({name: block}, self.where)
            return found

        load_shards({name: state[name] for name in wanted}, read)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        return shape_of(self.tensors, name)

    def _model(self, state: Mapping[str, Tensor]) -> dict[str, str]:
        """The model's parameters, which must all be there, and nothing else of a model: name → name of what is saved.

        An evaluation takes their mean, if there is one.
        """
        prefix = weights_prefix(self.tensors) if self.evaluates else MODEL
        wanted = {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith(MODEL)}
        needed = unstacked_shapes({name.removeprefix(MODEL): shape for name, shape in wanted.items()})
        there = {name.removeprefix(prefix): self._shape(name) for name in self.tensors if name.startswith(prefix)}
        check_shapes(there, needed, self.where)
        return {name: prefix + name.removeprefix(MODEL) for name in wanted}

    def _optimizer(self, state: Mapping[str, Tensor]) -> dict[str, str]:
        """The optimizer's state; none for imported weights and for an evaluation."""
        if self.evaluates or (self.step == 0 and not any(name.startswith(OPTIMIZER) for name in self.tensors)):
            return {}
        wanted = {name: name for name in state if name.startswith(OPTIMIZER)}
        averaged = OPTIMIZER + AVERAGE
        for name in wanted:
            if name.startswith(averaged) and self._shape(name) is None:  # the run did not average before
                wanted[name] = MODEL + name.removeprefix(averaged)
            shape = self._shape(wanted[name])
            if shape != tuple(state[name].shape):
                wrong = f"lacks {name}" if shape is None else f"holds {name} in another shape"
                raise UserError(
                    f"{self.where} {wrong}, without which update {self.step + 1} would differ: remove that folder to continue "
                    "from an older checkpoint"
                )
        return wanted

    def _loss_scale(self, state: Mapping[str, Tensor]) -> dict[str, str]:
        """The loss scale, if there is one here and there; then it must be complete."""
        prefix = "loss_scale."
        wanted = {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith(prefix)}
        there = {name: self._shape(name) for name in self.tensors if name.startswith(prefix)}
        if not wanted or not there or self.evaluates:
            return {}
        check_shapes(there, wanted, self.where)
        return {name: name for name in wanted}

    def digest(self) -> str:
        """The same on two hosts that found the same checkpoint."""
        known = None if self.info is None else asdict(self.info)
        return hashlib.sha256(json.dumps([known, sorted(self.tensors)]).encode()).hexdigest()

    def release(self) -> None:
        """Free the host copies, or close the checkpoint, once the devices have the state."""
        if isinstance(self.tensors, StoredTensors):
            self.tensors.close()
        self.tensors = {}
