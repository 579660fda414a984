"""Parameters by their names in the model: updated ones in RAM, frozen ones and parts in flash."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from ...ir.errors import UsageError
from ...ir.graph import Array, TensorType, Value
from ...ir.opdef import get_op
from ...ir.training import TrainingGraph, Update
from .data import fitted


def merged(training: TrainingGraph, resident: Mapping[str, Array]) -> dict[str, Array]:
    """Every parameter whole.

    Args:
        training: The training graph.
        resident: Updated tensors by value name.

    Returns:
        Copies by the name in the model, in forward order.
    """
    constants = training.graph.constants
    updated: dict[str, tuple[str, Array]] = {}
    for u in training.updates:
        data = resident[u.value.name].copy()
        cold = _cold(u)
        if cold is not None:
            data = np.concatenate([data, constants[cold[1].name]], cold[0])
        updated[u.value.name] = (u.candidate.param, data)
    result: dict[str, Array] = {}
    for node in training.graph.nodes:
        for slot in get_op(node.op).params:
            v = node.inputs[slot.index] if slot.index < len(node.inputs) else None
            if v is not None and v.name in constants:
                name, data = updated.get(v.name) or (v.name, constants[v.name].copy())
                result[name] = data
    return result


def split(training: TrainingGraph, values: Mapping[str, ArrayLike]) -> dict[str, Array]:
    """Updated tensors by value name, from whole parameters by model name.

    Raises:
        UsageError: Unknown name, wrong shape, or another value for what is frozen.
    """
    constants = training.graph.constants
    initial = merged(training, {u.value.name: constants[u.value.name] for u in training.updates})
    updates = {u.candidate.param: u for u in training.updates}
    result: dict[str, Array] = {}
    for name, given in values.items():
        if name not in initial:
            raise UsageError(f"the model has no parameter {name}")
        old = initial[name]
        new = fitted(given, TensorType(old.shape), f"parameter {name}")
        u = updates.get(name)
        cold = None if u is None else _cold(u)
        if u is not None and cold is None:
            result[u.value.name] = new
            continue
        if u is not None and cold is not None:
            hot = u.value.type.shape[cold[0]]
            result[u.value.name], new = np.split(new, [hot], cold[0])
            old = constants[cold[1].name]
        if not np.array_equal(new, old):
            raise UsageError(
                f"parameter {name}: the plan keeps {'part of it' if u else 'it'} frozen in flash,"
                " so other values can't be loaded; plan with --train all"
            )
    return result


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
