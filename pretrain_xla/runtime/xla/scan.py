"""`model.loops.Loop` as one XLA while loop: the body is traced once, whatever the number of turns.

The body may hold anything that can be traced, autograd included: it runs eagerly on placeholders, and what it computed is
lowered to a computation of its own, which the loop then calls with each turn's slices. (`torch_xla.experimental.scan` does
the same around AOTAutograd; here the body decides itself what it differentiates and what it keeps.)

Tensors that the body uses without being passed them (tables, numbers) become loop invariants. Weights must be passed: finding
one again in the graph gives its data another owner, and the next step would not update it in place. Random numbers: every
turn gets a seed of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.core.xla_model as xm
from torch import Tensor

from pretrain_xla.model.loops import Body, turns
from pretrain_xla.runtime.xla.local_shards import backward_here, belonging, everywhere


def xla_loop(
    body: Body,
    carried: Sequence[Tensor],
    slices: Sequence[Tensor] = (),
    backwards: Sequence[Tensor] = (),
    before: Sequence[Tensor] = (),
) -> tuple[list[Tensor], list[Tensor]]:
    """See `model.loops.Loop`. What comes out has no gradient history: a body that needs gradients takes them inside."""
    count, sliced = turns(slices, backwards, before), [*slices, *backwards, *before]
    with torch.no_grad():
        fake_carried = [xb.create_placeholder_tensor(tensor.shape, tensor.dtype) for tensor in carried]
        fake_slices = [xb.create_placeholder_tensor(tensor.shape[1:], tensor.dtype) for tensor in sliced]
    # Times 1, because marking a sharding replaces the data of a placeholder in place, and the loop would lose its input;
    # the compiler drops it.
    with _nested(), backward_here():
        new_carried, results = body(
            [_touch(tensor) for tensor in fake_carried], [_touch(tensor) for tensor in fake_slices]
        )
    assert [tensor.shape for tensor in new_carried] == [tensor.shape for tensor in carried]
    assert [tensor.dtype for tensor in new_carried] == [tensor.dtype for tensor in carried]
    outputs = [*new_carried, *results]

    context = torch_xla._XLAC.lowering.LoweringContext("loop_body")
    context.build([output.detach() for output in outputs])
    invariants = dict(context.device_parameter_id_tensor_mapping())
    number_of: list[int] = []
    for fake in (*fake_carried, *fake_slices):
        number_of.append(context.tensor_parameter_id(fake))
        invariants.pop(number_of[-1], None)
    seed = seed_parameter(context, invariants)
    if seed is not None:
        invariants[seed] = torch.randint(0, 2**62, (count,), dtype=torch.int64, device=invariants[seed].device)

    carried = [belonging(tensor) for tensor in carried]
    zeros = [torch.zeros((count, *result.shape), dtype=result.dtype, device=result.device) for result in results]
    stacked = [belonging(tensor) for tensor in zeros]
    inputs = [*carried, *sliced, *stacked, *(_invariant(tensor) for tensor in invariants.values())]
    n_carried, n_slices, n_results = len(carried), len(sliced), len(results)
    # Where each parameter of the body's computation stands among the loop's inputs.
    place = {number: index for index, number in enumerate(number_of) if number != -1}
    place |= {number: n_carried + n_slices + n_results + index for index, number in enumerate(invariants)}
    layout = _Layout(
        count, n_carried, len(slices), len(backwards), len(before), n_results,
        tuple(place[number] for number in range(len(place))), None if seed is None else place[seed],
    )  # fmt: skip
    # The body's hash as a graph, not that of its text: a weight that has been updated in place is transposed anew for each use,
    # and the text of the second step would be another one.
    key = torch_xla._XLAC._get_graph_hash(outputs), layout, tuple((tensor.shape, tensor.dtype) for tensor in inputs)
    if key not in _programs:
        # An XLA computation has a name, and so a hash, of its own: the same loop must be the same object at each step.
        _programs[key] = _build(xb.computation_from_module_proto("loop_body", context.hlo()), layout, inputs)
    program = _programs[key]
    final = torch_xla._XLAC._xla_user_computation("xla::loop", inputs, program)[1:]
    start = n_carried + n_slices
    return list(final[:n_carried]), list(final[start : start + n_results])


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A loop without its tensors. Its inputs: what is carried, the slices, the stacked results, the invariants.

    arguments: for each parameter of the body, its input. seeds: the input that holds a seed for each turn, if any.
    """

    turns: int
    carried: int
    slices: int
    backwards: int
    before: int
    results: int
    arguments: tuple[int, ...]
    seeds: int | None


_programs: dict[Hashable, Any] = {}


def _build(body: Any, layout: _Layout, inputs: Sequence[Tensor]) -> Any:
    builder = xb.create_builder("loop")
    parameters = [xb.mkparam(builder, index, xb.tensor_shape(tensor)) for index, tensor in enumerate(inputs)]
    first = xb.Op.scalar(builder, 0, dtype=xb.Type.S32)

    def going(turn: xb.Op, *_state: xb.Op) -> xb.Op:
        return turn < xb.Op.scalar(turn.builder(), layout.turns, dtype=xb.Type.S32)

    def one_turn(turn: xb.Op, *state: xb.Op) -> tuple[xb.Op, ...]:
        one = xb.Op.scalar(turn.builder(), 1, dtype=xb.Type.S32)
        last = xb.Op.scalar(turn.builder(), layout.turns - 1, dtype=xb.Type.S32)
        indices = [turn] * layout.slices + [last - turn] * layout.backwards
        indices += [(turn < last).select(last - one - turn, last)] * layout.before
        values = list(state)
        for position, index in enumerate(indices, start=layout.carried):
            values[position] = _fresh(element(state[position], index), turn)
        first_result = layout.carried + len(indices)
        if layout.seeds is not None:
            values[layout.seeds] = element(state[layout.seeds], turn)
        result = xb.Op.call(body, [values[place] for place in layout.arguments])
        outputs = [result.get_tuple_element(index) for index in range(layout.carried + layout.results)]
        new_state = list(state)
        for position, value in enumerate(outputs[: layout.carried]):
            new_state[position] = value
        for position, value in enumerate(outputs[layout.carried :], start=first_result):
            new_state[position] = with_element(state[position], value, turn)
        return (turn + one, *new_state)

    return xb.Op.mkwhile([first, *parameters], going, one_turn).build("loop")


def _fresh(value: xb.Op, turn: xb.Op) -> xb.Op:
    """A matrix, times a one of which the compiler does not know that it is one.

    Else it casts the whole stack to the body's type before the loop, a copy that costs a few per cent of a layer and half
    of the weights' memory. So the cast is a part of the product that reads the slice, which costs nothing.
    """
    shape = value.shape()
    if len(shape.sizes) != 2 or shape.dtype != xb.Type.F32:
        return value
    return value * (turn >= xb.Op.scalar(turn.builder(), 0, dtype=xb.Type.S32)).cast(xb.Type.F32)


def xla_fence(tensors: list[Tensor]) -> list[Tensor]:
    """See `model.loops.Fence`."""
    passed = [tensor.clone() for tensor in tensors]
    xm.optimization_barrier_(passed)
    return passed


def _invariant(tensor: Tensor) -> Tensor:
    """A tensor of the graph that the body found by itself, on the device.

    Among parts, a number (a factor, an epsilon) becomes one device's own on its way into the outermost loop; weights the
    body itself has turned into parts.
    """
    tensor = tensor.to(torch_xla.device())
    return everywhere(tensor) if tensor.dim() == 0 and _Depth.loops == 0 else tensor


class _Depth:
    """How many loops' bodies are being traced; of the process, see `xla_parts._Inside`."""

    loops = 0


@contextmanager
def _nested() -> Iterator[None]:
    _Depth.loops += 1
    try:
        yield
    finally:
        _Depth.loops -= 1


def _touch(tensor: Tensor) -> Tensor:
    return tensor * 1 if tensor.dtype.is_floating_point else tensor


def seed_parameter(context: torch_xla._XLAC.lowering.LoweringContext, invariants: Mapping[int, Tensor]) -> int | None:
    """Number of the body's parameter that is the seed of random numbers, if it draws any.

    It is what a number drawn now is computed from. By torch_xla's own id for it, it is found only without SPMD, and only once.
    """
    if not any(tensor.dim() == 0 and tensor.dtype == torch.int64 for tensor in invariants.values()):
        return None
    drawn = torch.rand((), device=torch_xla.device())
    (seed,) = torch_xla._XLAC._get_tensors_xla_device_data_node([drawn])[1]
    number = context.tensor_parameter_id(seed)
    return None if number == -1 else number


def element(tensors: xb.Op, index: xb.Op) -> xb.Op:
    """`tensors[index]`."""
    sizes = list(tensors.shape().sizes)
    starts = [index] + [index.zeros_like() for _ in sizes[1:]]
    return tensors.dynamic_slice(starts, [1, *sizes[1:]]).reshape(sizes[1:])


def with_element(tensors: xb.Op, value: xb.Op, index: xb.Op) -> xb.Op:
    """`tensors` with `value` at `index`."""
    starts = [index] + [index.zeros_like() for _ in tensors.shape().sizes[1:]]
    return tensors.dynamic_update_slice(value.broadcast([1]), starts)
