"""Parameters by their names in the model: updated ones in RAM, frozen ones and parts in flash.

Outside they are real numbers, f32, with channels as the model file orders them; those of integer
layers are stored as i8 weights and i32 biases, and a plan may have channels in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ...ir.channels import in_file_order, permuted
from ...ir.errors import UsageError
from ...ir.graph import Array, Node, TensorType, Value
from ...ir.opdef import ParamSlot, get_op, parameter_slots
from ...ir.ops.qoptimizer import BOUNDS
from ...ir.parameter_steps import steps
from ...ir.training import TrainingGraph, Update
from .data import fitted


@dataclass(frozen=True)
class _Parameter:
    """A parameter where a layer uses it; ``cold`` is the frozen rest and its axis."""

    name: str
    node: Node
    slot: ParamSlot
    value: Value
    update: Update | None
    cold: tuple[int, Value] | None

    def real(self, value: Value, stored: Array) -> Array:
        """The numbers that a stored tensor means."""
        if value.type.dtype == "f32":
            return stored.copy()
        if value.type.quant is not None:
            return value.type.quant.dequantize(stored)
        return np.asarray(stored * steps(self.node, self.slot), np.float32)

    def stored(self, value: Value, real: Array, old: Array) -> Array:
        """Real numbers as they are stored; what ``old`` means already stays as it is.

        Raises:
            UsageError: A NaN or infinite value, which no integer means.
        """
        if value.type.dtype == "f32":
            return real
        if not np.isfinite(real).all():
            raise UsageError(f"parameter {self.name} is stored in integers and must be finite")
        if value.type.quant is not None:
            new: Array = value.type.quant.quantize(real)
        else:
            wanted = np.rint(real / steps(self.node, self.slot))
            new = np.clip(wanted, *BOUNDS["i32"]).astype(np.int32)
        return np.where(real == self.real(value, old), old, new)


def merged(training: TrainingGraph, resident: Mapping[str, Array]) -> dict[str, Array]:
    """Every parameter whole, in real numbers.

    Args:
        training: The training graph.
        resident: Updated tensors by value name, as they are stored.

    Returns:
        Copies by the name in the model, f32, in forward order.
    """
    constants = training.graph.constants
    result: dict[str, Array] = {}
    for p in _parameters(training):
        held = constants if p.update is None else resident
        data = p.real(p.value, held[p.value.name])
        if p.cold is not None:
            axis, rest = p.cold
            data = np.concatenate([data, p.real(rest, constants[rest.name])], axis)
        result[p.name] = in_file_order(data, training.graph.orders.get(p.name, ()))
    return result


def changes(training: TrainingGraph, resident: Mapping[str, Array]) -> dict[str, Array]:
    """What updated tensors have become less what they were at first, in real numbers.

    Args:
        training: The training graph.
        resident: Updated tensors by value name, as they are stored.

    Returns:
        f32 by value name, shaped like the tensor; of integers the difference, rounded to f32, times
        the step of its row.
    """
    result: dict[str, Array] = {}
    for u in training.updates:
        name, now = u.value.name, resident[u.value.name]
        old = training.graph.constants[name]
        if u.value.type.dtype == "f32":
            result[name] = now - old
            continue
        scale = u.apply_node.inputs[-1]
        assert scale is not None, name
        by_row = training.graph.constants[scale.name].reshape(-1, *(1,) * (now.ndim - 1))
        result[name] = (now.astype(np.int64) - old).astype(np.float32) * by_row
    return result


def by_parameter(training: TrainingGraph, changed: Mapping[str, Array]) -> dict[str, Array]:
    """Changes of updated tensors as those of whole parameters: 0 where they are frozen.

    Args:
        training: The training graph.
        changed: f32 by value name, as ``changes`` returns them.

    Returns:
        f32 by the name in the model, shaped as ``merged`` has them.
    """
    result: dict[str, Array] = {}
    for p in _parameters(training):
        if p.update is not None:
            data = changed[p.value.name]
            if p.cold is not None:
                axis, rest = p.cold
                data = np.concatenate([data, np.zeros(rest.type.shape, np.float32)], axis)
            result[p.name] = in_file_order(data, training.graph.orders.get(p.name, ()))
    return result


def split(
    training: TrainingGraph, resident: Mapping[str, Array], values: Mapping[str, ArrayLike]
) -> dict[str, Array]:
    """Updated tensors by value name, as they are stored, from whole real parameters by model name.

    Integers are those nearest to the real numbers, saturated.

    Args:
        training: The training graph.
        resident: Updated tensors by value name, as they are stored now.
        values: Parameters by the name in the model.

    Raises:
        UsageError: Unknown name, wrong shape, a value that integers can't have, or another value
            for what is frozen.
    """
    constants = training.graph.constants
    whole = merged(training, resident)
    parameters = {p.name: p for p in _parameters(training)}
    result: dict[str, Array] = {}
    for name, given in values.items():
        if name not in parameters:
            raise UsageError(f"the model has no parameter {name}")
        p = parameters[name]
        new = fitted(given, TensorType(whole[name].shape), f"parameter {name}")
        new = permuted(new, training.graph.orders.get(name, ()))
        frozen = [(p.value, new)] if p.update is None else []
        if p.update is not None:
            if p.cold is not None:
                axis, rest = p.cold
                new, remainder = np.split(new, [p.value.type.shape[axis]], axis)
                frozen.append((rest, remainder))
            result[p.value.name] = p.stored(p.value, new, resident[p.value.name])
        for v, data in frozen:
            if not np.array_equal(p.stored(v, data, constants[v.name]), constants[v.name]):
                raise UsageError(
                    f"parameter {name}: the plan keeps"
                    f" {'part of it' if p.update else 'it'} frozen in flash, so other values can't"
                    " be loaded; plan with --train all"
                )
    return result


def _parameters(training: TrainingGraph) -> Iterator[_Parameter]:
    """All parameters in forward order; a shared one wherever it is used."""
    updates = {u.value.name: u for u in training.updates}
    for node in training.graph.nodes:
        for slot in parameter_slots(node):
            v = node.inputs[slot.index]
            if v is not None and v.name in training.graph.constants:
                u = updates.get(v.name)
                name = v.name if u is None else u.candidate.param
                yield _Parameter(name, node, slot, v, u, None if u is None else _cold(u))


def _cold(update: Update) -> tuple[int, Value] | None:
    """Channel axis and frozen remainder of a partly updated weight."""
    if update.candidate.channels is None:
        return None
    for slot in get_op(update.owner.op).params:
        if update.owner.inputs[slot.index] is update.value and slot.cold_index is not None:
            axis, rest = slot.channel_axis(update.owner), update.owner.inputs[slot.cold_index]
            assert axis is not None, update.value.name
            assert rest is not None, update.value.name
            return axis, rest
    raise AssertionError(f"{update.value.name} has no frozen remainder")
