"""The runtime and the device mesh."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pretrain_xla.config.section import Positive, Section


class ParallelConfig(Section):
    """The runtime and the device mesh."""

    runtime: Literal["xla", "torch"] = "xla"
    """xla: TPU or CPU through PyTorch/XLA (PJRT_DEVICE). torch: GPU or CPU, in one process or under torchrun."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """torch: device. auto means CUDA if there is a GPU, else the CPU."""
    mesh_data: Annotated[int, Field(ge=-1)] = -1
    """xla: size of the data axis of the mesh (data parallelism). -1 means all remaining devices."""
    mesh_fsdp: Positive = 1
    """xla: size of the fsdp axis: devices over which parameters, optimizer state and the batch are sharded."""
    mesh_tensor: Positive = 1
    """xla: size of the tensor axis: devices over which each matrix product is split (tensor parallelism)."""
    topology: str | None = None
    """preflight: the TPU to compile for, such as v5e:2x4, v5litepod-8 or v3-8. None means the TPU of this host."""
    overlap_gradients: bool = False
    """TPU, data parallelism: reduce gradients during the backward pass, instead of all together after it. Helps if a step
    has only one micro-batch. The compiler options for it have not been run on a TPU yet."""
    compile_cache: str | None = None
    """TPU: local folder for compiled programs, so that a restart does not compile them again. None means no cache. (XLA's CPU
    client writes programs to it, but cannot load them.)"""
    mp_start_method: Literal["fork", "spawn"] | None = None
    """xla: run one process and one replica per device (PJRT multiprocessing), started this way. None means SPMD.
    A signal that asks to stop then ends the run at once, without a save: up to save_interval steps are made again."""
    ddp_backend: Literal["nccl", "gloo"] | None = None
    """torch under torchrun: backend of torch.distributed. None means nccl on CUDA, gloo on the CPU."""

    host_timeout: Annotated[float, Field(ge=1)] = 40.0
    """Several processes: seconds without a sign of life after which one counts as lost, and the others end with an error."""

    @property
    def is_multiprocess(self) -> bool:
        """Whether the xla runtime runs one process per device."""
        return self.mp_start_method is not None
