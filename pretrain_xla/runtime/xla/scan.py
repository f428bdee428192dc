"""`Scan` as one XLA while loop: the body is traced once, whatever the number of iterations.

The body may contain anything that can be traced, including autograd: it is traced on placeholders and lowered to a computation
of its own, which the loop calls with each iteration's slices. `torch_xla.experimental.scan` does the same around AOTAutograd,
which differentiates the body as a whole; here the body decides what it differentiates and saves (figures: docs/LOG.md).

Tensors that the body captures (tables, numbers) become loop invariants. Weights must be passed: a captured weight would get a
second owner of its data, and the next step would not update it in place. Every iteration gets its own random seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
from torch import Tensor

from pretrain_xla.model.xla.context import Body, scan_length
from pretrain_xla.runtime.xla.local_shards import backward_in_this_thread, local_shard, mark_manual


class XlaScan:
    """See `model.xla.context.Scan`. Results have no gradient history: a body that needs gradients computes them inside.

    mesh: the traced code computes on the local shards of this mesh's devices. None means it computes on global tensors.
    """

    def __init__(self, mesh: xs.Mesh | None = None) -> None:
        self._mesh = mesh
        self._depth = 0  # nested scans whose bodies are being traced

    def __call__(
        self,
        body: Body,
        carry: Sequence[Tensor],
        slices: Sequence[Tensor] = (),
        backwards: Sequence[Tensor] = (),
        before: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See `model.xla.context.Scan`."""
        count, sliced = scan_length(slices, backwards, before), [*slices, *backwards, *before]
        with torch.no_grad():
            fake_carry = [xb.create_placeholder_tensor(tensor.shape, tensor.dtype) for tensor in carry]
            fake_slices = [xb.create_placeholder_tensor(tensor.shape[1:], tensor.dtype) for tensor in sliced]
        outputs, n_results = self._trace(body, fake_carry, fake_slices)
        n_carried, n_slices = len(carry), len(sliced)
        assert [tensor.shape for tensor in outputs[:n_carried]] == [tensor.shape for tensor in carry]
        assert [tensor.dtype for tensor in outputs[:n_carried]] == [tensor.dtype for tensor in carry]

        context = torch_xla._XLAC.lowering.LoweringContext("loop_body")
        context.build([output.detach() for output in outputs])
        invariants = dict(context.device_parameter_id_tensor_mapping())
        number_of: list[int] = []
        for fake in (*fake_carry, *fake_slices):
            number_of.append(context.tensor_parameter_id(fake))
            invariants.pop(number_of[-1], None)
        seed = seed_parameter(context, invariants)
        if seed is not None:
            invariants[seed] = torch.randint(0, 2**62, (count,), dtype=torch.int64, device=invariants[seed].device)

        carry = [self._own(tensor) for tensor in carry]
        results = outputs[n_carried:]
        zeros = [torch.zeros((count, *result.shape), dtype=result.dtype, device=result.device) for result in results]
        stacked = [self._own(tensor) for tensor in zeros]
        inputs = [*carry, *sliced, *stacked, *(self._invariant(tensor) for tensor in invariants.values())]
        # Index of each parameter of the body's computation among the loop's inputs.
        place = {number: index for index, number in enumerate(number_of) if number != -1}
        place |= {number: n_carried + n_slices + n_results + index for index, number in enumerate(invariants)}
        layout = _Layout(
            count, n_carried, len(slices), len(backwards), len(before), n_results,
            tuple(place[number] for number in range(len(place))), None if seed is None else place[seed],
        )  # fmt: skip
        # The hash of the body's graph, not of its text: a weight that has been updated in place is transposed again for each
        # use, so the text of the second step would differ.
        key = torch_xla._XLAC._get_graph_hash(outputs), layout, tuple((t.shape, t.dtype) for t in inputs)
        if key not in _programs:
            # Each XLA computation has its own name and so its own hash: the same loop must be the same object at each step.
            _programs[key] = _build(xb.computation_from_module_proto("loop_body", context.hlo()), layout, inputs)
        final = torch_xla._XLAC._xla_user_computation("xla::loop", inputs, _programs[key])[1:]
        start = n_carried + n_slices
        return list(final[:n_carried]), list(final[start : start + n_results])

    def _trace(self, body: Body, carry: list[Tensor], slices: list[Tensor]) -> tuple[list[Tensor], int]:
        """The body on placeholders: the new carry and the results, and how many results there are."""
        # Times 1, because marking a sharding replaces the data of a placeholder in place, and the loop would lose its input.
        # The compiler removes the product.
        self._depth += 1
        try:
            with backward_in_this_thread():
                new_carry, results = body([_touch(tensor) for tensor in carry], [_touch(tensor) for tensor in slices])
        finally:
            self._depth -= 1
        return [*new_carry, *results], len(results)

    def _own(self, tensor: Tensor) -> Tensor:
        """A tensor that enters a loop; with local shards, it is marked as one.

        The partitioner infers that for operands of operations, but not for inputs of a loop.
        """
        return tensor if self._mesh is None else mark_manual(tensor.clone())

    def _invariant(self, tensor: Tensor) -> Tensor:
        """A tensor that the body captured, on the device.

        With local shards, a number (a factor, an epsilon) is marked as one where it enters the outermost loop. Of weights the
        body itself has taken local shards.
        """
        tensor = tensor.to(torch_xla.device())
        if self._mesh is None or tensor.dim() or self._depth:
            return tensor
        return local_shard(tensor, (), self._mesh)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A loop without its tensors. Its inputs are the carry, the slices, the stacked results and the invariants.

    arguments: for each parameter of the body, its input. seeds: the input that holds a seed for each iteration, if any.
    """

    iterations: int
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

    def going(iteration: xb.Op, *_state: xb.Op) -> xb.Op:
        return iteration < xb.Op.scalar(iteration.builder(), layout.iterations, dtype=xb.Type.S32)

    def one_iteration(iteration: xb.Op, *state: xb.Op) -> tuple[xb.Op, ...]:
        one = xb.Op.scalar(iteration.builder(), 1, dtype=xb.Type.S32)
        last = xb.Op.scalar(iteration.builder(), layout.iterations - 1, dtype=xb.Type.S32)
        indices = [iteration] * layout.slices + [last - iteration] * layout.backwards
        indices += [(iteration < last).select(last - one - iteration, last)] * layout.before
        values = list(state)
        for position, index in enumerate(indices, start=layout.carried):
            values[position] = _fresh(element(state[position], index), iteration)
        first_result = layout.carried + len(indices)
        if layout.seeds is not None:
            values[layout.seeds] = element(state[layout.seeds], iteration)
        result = xb.Op.call(body, [values[place] for place in layout.arguments])
        outputs = [result.get_tuple_element(index) for index in range(layout.carried + layout.results)]
        new_state = list(state)
        for position, value in enumerate(outputs[: layout.carried]):
            new_state[position] = value
        for position, value in enumerate(outputs[layout.carried :], start=first_result):
            new_state[position] = with_element(state[position], value, iteration)
        return (iteration + one, *new_state)

    return xb.Op.mkwhile([first, *parameters], going, one_iteration).build("loop")


def _fresh(value: xb.Op, iteration: xb.Op) -> xb.Op:
    """A matrix, times a one that the compiler does not recognise as such.

    Otherwise it casts the stacked layers to the body's type before the loop, a copy that takes time and half of the weights'
    memory. With it, the cast is fused into the product that reads the slice, and costs nothing.
    """
    shape = value.shape()
    if len(shape.sizes) != 2 or shape.dtype != xb.Type.F32:
        return value
    return value * (iteration >= xb.Op.scalar(iteration.builder(), 0, dtype=xb.Type.S32)).cast(xb.Type.F32)


def xla_barrier(tensors: list[Tensor]) -> list[Tensor]:
    """See `model.xla.context.Barrier`."""
    passed = [tensor.clone() for tensor in tensors]
    xm.optimization_barrier_(passed)
    return passed


def _touch(tensor: Tensor) -> Tensor:
    return tensor * 1 if tensor.dtype.is_floating_point else tensor


def seed_parameter(context: torch_xla._XLAC.lowering.LoweringContext, invariants: Mapping[int, Tensor]) -> int | None:
    """Number of the body's parameter that is the random seed. None means that it draws no random numbers.

    It is found by drawing a number and looking at its inputs. torch_xla's own id of it works only without SPMD, and only once.
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
