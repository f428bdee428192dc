"""A module as the body of one compiled while loop that is traced once, for generation: the host does nothing between tokens.

`XlaScan` is part of a step and is traced with it, each time. Here the loop is the whole program, everything that it reads is an
argument, and a call costs the host one operation, whatever the size of the model. The carry is updated in place: its buffers
are donated, and a key/value cache is never copied. Random numbers are arguments, too: the body draws none.

`torch_xla.experimental.fori_loop.while_loop` and `torch_xla.experimental.scan` trace their bodies again at each call, which
takes the host longer than a small model takes for a token (`benchmarks/generate.py` measures this one).
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pretrain_xla.runtime.xla.scan import element, seed_parameter, with_element


class _MatrixFirst(TorchFunctionMode):
    """Linear layers as matrix x column instead of row x transposed matrix.

    For one token, XLA's CPU compiler copies the transposed matrix at every iteration if a bias follows: four times the time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        input, weight, bias = (*args, None)[:3]
        output = (weight @ input.flatten(0, -2).T).T.reshape(*input.shape[:-1], -1)
        return output if bias is None else output + bias


class RepeatedModule:
    """See `base.Runtime.repeat`."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._programs: dict[Hashable, tuple[Any, list[Tensor]]] = {}

    def __call__(
        self, iterations: Tensor, carried: Sequence[Tensor], slices: Sequence[Tensor], fixed: Sequence[Tensor]
    ) -> list[Tensor]:
        """See `base.Repeat`."""
        weights = [parameter.detach() for parameter in self._module.parameters()]
        given = [*carried, *slices, *fixed, *weights]
        key = tuple((tensor.shape, tensor.dtype) for tensor in given), len(carried), len(slices)
        if key not in self._programs:
            self._programs[key] = self._trace(carried, slices, fixed, iterations)
        program, found = self._programs[key]
        outputs = torch_xla._XLAC._xla_user_computation("xla::repeat", [iterations, *given, *found], program)
        for old, new in zip(carried, outputs, strict=False):
            old.copy_(new)
        results: list[Tensor] = outputs[len(carried) :]
        return results

    def _trace(
        self, carried: Sequence[Tensor], slices: Sequence[Tensor], fixed: Sequence[Tensor], iterations: Tensor
    ) -> tuple[Any, list[Tensor]]:
        """The loop's program, and the tensors that its body captured (tables, numbers), which are its last arguments."""
        names = [name for name, _ in self._module.named_parameters()]
        weights = [parameter.detach() for parameter in self._module.parameters()]
        shapes = [*carried, *(tensor[0] for tensor in slices), *fixed, *weights]
        fakes = [xb.create_placeholder_tensor(tensor.shape, tensor.dtype) for tensor in shapes]
        ends = (len(carried), len(carried) + len(slices), len(fakes) - len(weights))
        # Copies, because the body may update the carry in place, and marking a sharding would replace a placeholder.
        inner = [tensor * 1 if tensor.dtype != torch.bool else tensor | False for tensor in fakes]
        with torch.no_grad(), _MatrixFirst() if xr.device_type() == "CPU" else contextlib.nullcontext():
            state, results, going = torch.func.functional_call(
                self._module,
                dict(zip(names, inner[ends[2] :], strict=True)),
                (inner[: ends[0]], inner[ends[0] : ends[1]], inner[ends[1] : ends[2]]),
            )
        for before, after in zip(carried, state, strict=True):
            assert (before.shape, before.dtype) == (after.shape, after.dtype)
        context = torch_xla._XLAC.lowering.LoweringContext("repeat_body")
        context.build([*state, *results, going])
        found = dict(context.device_parameter_id_tensor_mapping())
        numbers = [context.tensor_parameter_id(fake) for fake in fakes]
        for number in numbers:
            found.pop(number, None)
        assert seed_parameter(context, found) is None, (
            "every iteration of every call would draw the same random numbers"
        )
        invariants = [tensor.to(torch_xla.device()) for tensor in found.values()]
        place = {number: index for index, number in enumerate(numbers) if number != -1}
        place |= {number: len(fakes) + index for index, number in enumerate(found)}
        body = xb.computation_from_module_proto("repeat_body", context.hlo())
        arguments = [place[number] for number in range(len(place))]
        inputs = [iterations, *carried, *slices, *fixed, *weights, *invariants]
        return _build(body, arguments, inputs, results, len(carried), len(slices)), invariants


def _build(
    body: Any,
    arguments: Sequence[int],
    inputs: Sequence[Tensor],
    results: Sequence[Tensor],
    n_carried: int,
    n_slices: int,
) -> Any:
    """The body while it is going, for at most `inputs[0]` iterations. It returns the carry and the stacked results."""
    length = inputs[1 + n_carried].shape[0]
    builder = xb.create_builder("repeat")
    iterations, *given = (xb.mkparam(builder, index, xb.tensor_shape(tensor)) for index, tensor in enumerate(inputs))
    zero, one = (xb.Op.scalar(builder, value, dtype=xb.Type.S32) for value in (0, 1))
    stacked = [
        xb.Op.scalar(builder, 0, dtype=xb.tensor_shape(result).dtype).broadcast([length, *result.shape])
        for result in results
    ]
    start = 3 + len(given)

    def going(iteration: xb.Op, going: xb.Op, iterations: xb.Op, *_state: xb.Op) -> xb.Op:
        return (iteration < iterations) & going

    def one_iteration(iteration: xb.Op, _going: xb.Op, iterations: xb.Op, *state: xb.Op) -> tuple[xb.Op, ...]:
        values = list(state)
        for position in range(n_carried, n_carried + n_slices):
            values[position] = element(state[position], iteration)
        result = xb.Op.call(body, [values[place] for place in arguments])
        new_state = list(state)
        for position in range(n_carried):
            new_state[position] = result.get_tuple_element(position)
        for position in range(len(results)):
            target = len(given) + position
            new_state[target] = with_element(state[target], result.get_tuple_element(n_carried + position), iteration)
        going = result.get_tuple_element(n_carried + len(results))
        return (iteration + xb.Op.scalar(iteration.builder(), 1, dtype=xb.Type.S32), going, iterations, *new_state)

    final = xb.Op.mkwhile([zero, one > zero, iterations, *given, *stacked], going, one_iteration)
    kept = [*range(3, 3 + n_carried), *range(start, start + len(results))]
    return xb.Op.tuple([final.get_tuple_element(index) for index in kept]).build("repeat")
