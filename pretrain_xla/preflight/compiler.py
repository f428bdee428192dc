"""Google's TPU compiler (libtpu) without a TPU: a traced step in, an executable's figures out.

JAX's ahead-of-time compilation describes a slice of devices that need not exist; its client compiles for them. The step is as
the trainer traces it, for the whole batch and without a mesh. Here its arguments and results get shardings and donation, and
XLA's partitioner does the rest, as in a run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from pretrain_xla.errors import UserError
from pretrain_xla.preflight.compile_result import Compiled, Input, Shortage
from pretrain_xla.preflight.hlo import aliased_parameters
from pretrain_xla.preflight.out_of_memory import is_out_of_memory, read_shortage
from pretrain_xla.preflight.topology import Topology
from pretrain_xla.preflight.trace import TracedStep
from pretrain_xla.runtime.sharding import Axis, ways

INSTALL = "preflight needs jax and libtpu: pip install -r requirements-xla_tpu.txt"


def libtpu_version() -> str:
    """The installed compiler's version.

    Raises:
        UserError: libtpu or jax is not installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("jax")
        return version("libtpu")
    except PackageNotFoundError as error:
        raise UserError(f"{error.name} is not installed; {INSTALL}") from None


def slice_devices(topology: Topology) -> list[Any]:
    """JAX's descriptions of a slice's devices.

    Raises:
        UserError: this libtpu does not know the slice.
    """
    try:
        from jax.experimental import topologies

        description = topologies.get_topology_desc(topology.libtpu_name, "tpu", **topology.libtpu_options)
    except ImportError as error:
        raise UserError(f"{error}; {INSTALL}") from None
    except Exception as error:
        raise UserError(
            f"topology={topology.name!r}: libtpu does not describe {topology.libtpu_name}: {error}"
        ) from None
    return list(description.devices)[: topology.devices]


def sharding_text(axes: tuple[Axis, ...], mesh: Mapping[str, int]) -> str:
    """A tensor's sharding in HLO's notation, e.g. `{devices=[8,1]<=[8]}`.

    Args:
        axes: mesh axes of each dimension of the tensor.
        mesh: axis name → devices along it, the outermost first.
    """
    names = list(mesh)
    tiles: list[int] = []
    used: list[int] = []
    for axis in axes:
        dims = (axis,) if isinstance(axis, str) else axis or ()
        tiles.append(ways(axis, mesh))
        used += [names.index(name) for name in dims]
    total, shards = math.prod(mesh.values()), math.prod(tiles)
    if shards == 1:
        return "{replicated}"
    order = used + [index for index in range(len(names)) if index not in used]
    suffix = ""
    if shards < total:
        tiles.append(total // shards)
        suffix = " last_tile_dim_replicate"
    transposed = f"T({','.join(map(str, order))})" if order != sorted(order) else ""
    return f"{{devices=[{','.join(map(str, tiles))}]<=[{','.join(map(str, mesh.values()))}]{transposed}{suffix}}}"


def compile_step(step: TracedStep, topology: Topology, options: Mapping[str, str] | None = None) -> Compiled | Shortage:
    """Compile a step for the devices of a slice.

    Args:
        step: the trainer's, traced.
        topology: a slice with at least as many devices as the step's mesh.
        options: compiler options by their names without dashes, e.g. `xla_tpu_enable_latency_hiding_scheduler: true`.

    Returns:
        The compiler's figures or, if the step does not fit into HBM, its report on that.

    Raises:
        UserError: the compiler is not installed, or refuses the step for another reason.
    """
    total = math.prod(step.mesh.values())
    devices = slice_devices(topology)[:total]
    bytecode = _module(step)
    from jax._src.lib import xla_client

    began = time.perf_counter()
    try:
        device_list = xla_client.DeviceList(tuple(devices))
        executable = devices[0].client.compile(bytecode, device_list, _options(total, options or {}))
    except Exception as error:
        message = str(error)
        if is_out_of_memory(message):
            return read_shortage(message, topology.chip.usable_hbm)
        raise UserError(f"the TPU compiler refused the step: {' '.join(message.split())[:500]}") from error
    seconds = time.perf_counter() - began
    text = executable.hlo_modules()[0].to_string()
    return read_figures(text, executable.get_compiled_memory_stats(), executable.cost_analysis(), seconds)


def read_figures(hlo_text: str, memory: Any, cost: Any, seconds: float) -> Compiled:
    """The compiler's figures, from an executable's optimised module, memory statistics and cost analysis."""
    cost = cost[0] if isinstance(cost, list) else cost
    return Compiled(
        hlo_text,
        cost["flops"],
        cost["bytes accessed"],
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        seconds,
    )


def describe_inputs(step: TracedStep, compiled: Compiled | Shortage) -> tuple[Input, ...]:
    """The step's inputs in the order of their numbers; `aliased` by the compiled module (without one unknown, so true)."""
    aliased = aliased_parameters(compiled.hlo_text) if isinstance(compiled, Compiled) else set(step.arguments)
    return tuple(
        Input(
            argument.name,
            argument.kind,
            str(argument.dtype).removeprefix("torch."),
            argument.shape,
            argument.device_bytes(step.mesh),
            any(ways(axis, step.mesh) > 1 for axis in argument.axes),
            index in aliased,
        )
        for index, argument in sorted(step.arguments.items())
    )


def input_text(step: TracedStep) -> str:
    """The step's HLO before compilation, as text."""
    from jax._src.lib import xla_client

    text: str = xla_client._xla.HloModule.from_serialized_hlo_module_proto(step.hlo).to_string()
    return text


def _module(step: TracedStep) -> bytes:
    """The step as MLIR bytecode, its arguments and results marked with sharding and donation."""
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jaxlib.mlir import ir

    text = xla_client._xla.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(step.hlo))
    with mlir.make_ir_context() as context:
        module = ir.Module.parse(text, context=context)
        operations: list[Any] = list(module.body.operations)
        main = next(op for op in operations if op.operation.attributes["sym_name"].value == "main")
        donated = {argument: result for result, (argument, _) in enumerate(step.results) if argument is not None}
        arguments = []
        for index in range(len(main.type.inputs)):
            argument = step.arguments.get(index)
            axes = () if argument is None else argument.axes
            values: dict[str, Any] = {"mhlo.sharding": ir.StringAttr.get(sharding_text(axes, step.mesh))}
            if index in donated:
                values["tf.aliasing_output"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), donated[index])
            arguments.append(ir.DictAttr.get(values))
        results = [
            ir.DictAttr.get({"mhlo.sharding": ir.StringAttr.get(sharding_text(axes, step.mesh))})
            for _, axes in step.results
        ]
        main.attributes["arg_attrs"] = ir.ArrayAttr.get(arguments)
        main.attributes["res_attrs"] = ir.ArrayAttr.get(results)
        bytecode: bytes = mlir.module_to_bytecode(module)
    return bytecode


def _options(total: int, overrides: Mapping[str, str]) -> Any:
    import numpy as np
    from jax._src.lib import xla_client

    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = 1, total
    build = options.executable_build_options
    build.num_replicas, build.num_partitions = 1, total
    build.use_spmd_partitioning = total > 1
    build.device_assignment = xla_client.DeviceAssignment.create(np.arange(total).reshape(1, total))
    if overrides:
        options.env_option_overrides = list(overrides.items())
    return options
