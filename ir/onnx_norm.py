"""ONNX operators of normalization, in IR nodes."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from math import inf, prod

import numpy as np

from .graph import Array, Attr, Value
from .onnx_convert import RejectedError, Rule, Site
from .onnx_shapes import positive_axes, positive_axis
from .provenance import Moved


def _batchnorm(s: Site) -> Value | tuple[Value | None, ...]:
    if s.integer("spatial", 1) != 1:
        raise RejectedError("spatial=0 is not supported")
    operands = [s.value(i) for i in range(5)]
    attrs: dict[str, Attr] = {"epsilon": s.real("epsilon", 1e-5)}
    # before opset 14 a file tells training mode by the results that it names
    wanted = [i for i in range(1, len(s.node.outputs)) if s.wanted(i)]
    if not (s.integer("training_mode") or (s.opset < 14 and wanted)):
        if wanted:
            raise RejectedError("only its first result exists with frozen statistics")
        return s.emit("BatchNormalization", operands, attrs)
    if any(i > 2 for i in wanted):
        raise RejectedError("the saved statistics of its training mode are not supported")
    attrs["momentum"] = s.real("momentum", 0.9)
    y = s.emit("BatchNormTraining", operands, attrs)
    if not wanted:
        return y
    running = []
    for statistic, observed in zip(operands[3:], ("BatchMean", "BatchVariance"), strict=True):
        seen = s.emit(observed, operands[:1], None, observed)
        rate = {"momentum": attrs["momentum"]}
        running.append(s.emit("RunningAverage", (statistic, seen), rate, f"running{observed}"))
    return (y, *running)


def _layernorm(s: Site) -> Value:
    if s.wanted(1) or s.wanted(2):
        names = ", ".join(n for n in s.node.outputs[1:] if n)
        raise RejectedError(f"the results Mean and InvStdDev ({names}) are not supported")
    return _normalized_rows(s, "LayerNormalization")


def _normalized_rows(s: Site, op: str) -> Value:
    _check_stash_type(s)
    x = s.value(0)
    axis = positive_axis(s.integer("axis", -1), len(x.type.shape))
    row = x.type.shape[axis:]
    attrs: dict[str, Attr] = {"epsilon": s.real("epsilon", 1e-5)}
    scale = s.data(1) if op == "RMSNormalization" else None
    if scale is not None and scale.size > prod(row) and (scale == 1).all():
        # PyTorch writes a layer without a scale so
        axes = tuple(range(axis, len(x.type.shape)))
        return _rows(s, x, axes, "GroupNormalization", {**attrs, "centred": 0})
    operands: list[Value | None] = [x, _of_shape(s, 1, row)]
    if op == "LayerNormalization":
        operands.append(_of_shape(s, 2, row) if s.present(2) else None)
    return s.emit(op, operands, {**attrs, "axis": -len(row)})


def _check_stash_type(s: Site) -> None:
    if s.integer("stash_type", 1) != 1:
        raise RejectedError("stash_type must be 1: mean and deviation are float32")


def _of_shape(s: Site, index: int, shape: tuple[int, ...]) -> Value:
    """An operand that must broadcast to ``shape``; a constant is written out."""
    v, data = s.value(index), s.data(index)
    if v.type.shape == shape:
        return v
    lead = len(v.type.shape) - len(shape)
    if data is not None and set(data.shape[: max(lead, 0)]) <= {1}:
        with suppress(ValueError):  # it does not broadcast
            return s.derived(index, "row", Moved(partial(_as_row, shape)))
    raise RejectedError(f"operand {index}, {v.type}, is not of the normalized shape {list(shape)}")


def _as_row(shape: tuple[int, ...], data: Array) -> Array:
    return np.broadcast_to(data.reshape(data.shape[max(data.ndim - len(shape), 0) :]), shape)


def _groups(s: Site) -> Value:
    """GroupNormalization; before opset 21 with a scale per group, which is trained as one."""
    _check_stash_type(s)
    x, groups = s.value(0), s.integer("num_groups")
    channels = _channels(x)
    return _group_norm(s, x, groups, groups if s.opset < 21 else channels)


def _instances(s: Site) -> Value:
    x = s.value(0)
    channels = _channels(x)
    return _group_norm(s, x, channels, channels)


def _channels(x: Value) -> int:
    if len(x.type.shape) < 3:
        raise RejectedError(f"input {x.type} has no spatial axis")
    return x.type.shape[1]


def _group_norm(s: Site, x: Value, groups: int, scales: int) -> Value:
    operands = [x, _of_shape(s, 1, (scales,)), _of_shape(s, 2, (scales,))]
    attrs: dict[str, Attr] = {"num_groups": groups, "epsilon": s.real("epsilon", 1e-5)}
    return s.emit("GroupNormalization", operands, attrs)


#: Squared bounds of norms: those of ``torch.nn.functional.normalize`` and of onnx's definition of
#: MeanVarianceNormalization, which adds the root to the deviation.
_LEAST_NORM, _LEAST_VARIANCE = 1e-24, 1e-18


def _lp(s: Site) -> Value:
    p, x = s.integer("p", 2), s.value(0)
    axis = positive_axis(s.integer("axis", -1), len(x.type.shape))
    if p == 2:
        return _rows(s, x, (axis,), "LpNormalization", {"epsilon": _LEAST_NORM})
    if p != 1:
        raise RejectedError(f"p is {p}; 1 and 2 are defined")
    absolute = s.emit("Abs", (x,), None, "absolute")
    mean = s.emit("ReduceMean", (absolute,), {"axes": (axis,), "keepdims": 1}, "mean")
    size = s.conversion.constant(f"{s.node.name}/size", np.array(x.type.shape[axis], np.float32))
    norm = s.emit("Mul", (mean, size), None, "norm")
    least: dict[str, Attr] = {"min": float(np.sqrt(_LEAST_NORM)), "max": inf}
    return s.emit("Div", (x, s.emit("Clip", (norm,), least, "at_least")))


def _mean_variance(s: Site) -> Value:
    x = s.value(0)
    axes = positive_axes(s.integers("axes", (0, 2, 3)), len(x.type.shape))
    return _rows(s, x, axes, "GroupNormalization", {"epsilon": _LEAST_VARIANCE})


def _rows(s: Site, x: Value, axes: tuple[int, ...], op: str, attrs: dict[str, Attr]) -> Value:
    """A normalization without scales, over all of these axes at once."""
    shape = x.type.shape
    perm = (*(i for i in range(len(shape)) if i not in axes), *sorted(axes))
    moved = perm != tuple(range(len(shape)))
    y = s.emit("Transpose", (x,), {"perm": perm}, "axes_last") if moved else x
    rows = (prod(shape[i] for i in perm if i not in axes), prod(shape[i] for i in axes))
    last = y.type.shape
    y = s.reshape(y, rows, "rows")
    y = s.reshape(s.emit(op, (y,), attrs, "normalized"), last, "whole")
    back = tuple(perm.index(i) for i in range(len(shape)))
    return s.emit("Transpose", (y,), {"perm": back}) if moved else y


NORM_RULES: dict[str, Rule] = {
    "BatchNormalization": _batchnorm,
    "GroupNormalization": _groups,
    "InstanceNormalization": _instances,
    "LayerNormalization": _layernorm,
    "LpNormalization": _lp,
    "MeanVarianceNormalization": _mean_variance,
    "RMSNormalization": lambda s: _normalized_rows(s, "RMSNormalization"),
}
