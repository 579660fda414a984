"""Conversion rules of the operators that move data without computing."""

from __future__ import annotations

from math import prod
from typing import Literal

import numpy as np

from .graph import MAX_ELEMENTS, Attr, Value
from .onnx_convert import RejectedError, Site
from .ops.shape import MAX_CONCAT

#: Modes of Pad that take elements of the tensor.
_TAKING: tuple[Literal["edge", "reflect", "wrap"], ...] = ("edge", "reflect", "wrap")


def positive_axis(axis: int, rank: int) -> int:
    """The axis counted from the front.

    Raises:
        RejectedError: There is no such axis.
    """
    if not -rank <= axis < rank:
        raise RejectedError(f"axis {axis} does not exist in a tensor of rank {rank}")
    return axis % rank


def positive_axes(axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Axes counted from the front, ascending.

    Raises:
        RejectedError: An axis does not exist or occurs twice.
    """
    result = tuple(sorted(positive_axis(a, rank) for a in axes))
    if len(set(result)) != len(result):
        raise RejectedError(f"axes {list(axes)} name an axis twice")
    return result


def flatten(s: Site) -> Value:
    """Flatten: a reshape to two axes."""
    x = s.value(0)
    shape, axis = x.type.shape, s.integer("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    if not 0 <= axis <= len(shape):
        raise RejectedError(f"axis {axis} does not exist in a tensor of rank {len(shape)}")
    return s.reshape(x, (prod(shape[:axis]), prod(shape[axis:])))


def reshape(s: Site) -> Value:
    """Reshape with a constant target; 0 copies a dimension, -1 fills the rest."""
    x = s.value(0)
    wanted = s.ints_or_attr(1, "shape")
    if wanted is None:
        raise RejectedError("the target shape is missing")
    old = x.type.shape
    hint = f"; a batch of 1 is baked in, use --batch 1, not {s.batch}" if s.batch != 1 else ""
    mixes = s.batch != 1 and old[:1] == (s.batch,) and wanted[:1] == (1,)
    shape = list(wanted)
    for i, d in enumerate(shape):
        if d == 0 and not s.integer("allowzero") and i < len(old):
            shape[i] = old[i]
    if shape.count(-1) == 1:
        rest = -prod(shape)
        if rest > 0 and x.type.size % rest == 0:
            shape[shape.index(-1)] = x.type.size // rest
    if mixes or any(d < 1 for d in shape) or prod(shape) != x.type.size:
        raise RejectedError(f"{x.type} does not fit the shape {list(wanted)}{hint}")
    return s.reshape(x, tuple(shape))


def squeeze(s: Site) -> Value:
    """Squeeze: a reshape."""
    x = s.value(0)
    shape = x.type.shape
    axes = s.ints_or_attr(1, "axes")
    if axes is None:
        return s.reshape(x, tuple(d for d in shape if d != 1))
    drop = positive_axes(axes, len(shape))
    if any(shape[a] != 1 for a in drop):
        raise RejectedError(f"axes {list(axes)} of {x.type} are not all of length 1")
    return s.reshape(x, tuple(d for i, d in enumerate(shape) if i not in drop))


def unsqueeze(s: Site) -> Value:
    """Unsqueeze: a reshape."""
    x = s.value(0)
    axes = s.ints_or_attr(1, "axes")
    if axes is None:
        raise RejectedError("axes are missing")
    shape = list(x.type.shape)
    for a in positive_axes(axes, len(shape) + len(axes)):
        shape.insert(a, 1)
    return s.reshape(x, tuple(shape))


def transpose(s: Site) -> Value:
    """Transpose; the default reverses all axes."""
    x = s.value(0)
    perm = s.integers("perm", tuple(range(len(x.type.shape)))[::-1])
    if perm == tuple(range(len(perm))):
        return x
    return s.emit("Transpose", (x,), {"perm": perm})


def concat(s: Site) -> Value:
    """Concat along one axis; of more operands than a node takes, runs of them are joined first."""
    operands = enumerate(s.node.inputs)
    parts = [s.value(i) for i, name in operands if name not in s.conversion.empty]
    if not parts:
        raise RejectedError("no operand has elements")
    if len(parts) == 1:
        return parts[0]
    axis = positive_axis(s.integer("axis", 1), len(parts[0].type.shape))
    runs = 0
    while len(parts) > MAX_CONCAT:
        done: list[Value] = []
        while parts:  # no more than must be, since what is joined here is copied again
            surplus = len(done) + len(parts) - MAX_CONCAT
            count = max(1, min(MAX_CONCAT, len(parts), surplus + 1))
            run, parts = parts[:count], parts[count:]
            if count > 1:
                run = [s.emit("Concat", run, {"axis": axis}, f"run{runs}")]
                runs += 1
            done += run
        parts = done
    return s.emit("Concat", parts, {"axis": axis})


def slice_(s: Site) -> Value:
    """Slice with constant bounds; an axis that is walked backwards is a Gather."""
    x = s.value(0)
    shape, rank = x.type.shape, len(x.type.shape)
    starts, ends = s.ints_or_attr(1, "starts"), s.ints_or_attr(2, "ends")
    if starts is None or ends is None:
        raise RejectedError("starts or ends are missing")
    axes = s.ints_or_attr(3, "axes")
    axes = (
        tuple(range(len(starts))) if axes is None else tuple(positive_axis(a, rank) for a in axes)
    )
    steps = s.ints(4, "steps") or (1,) * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps) or len(set(axes)) != len(axes):
        raise RejectedError("starts, ends, axes and steps differ in length")
    first, sizes, strides = [0] * rank, list(shape), [1] * rank
    for begin, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step == 0:
            raise RejectedError(f"step 0 on axis {axis}")
        taken = range(*slice(begin, end, step).indices(shape[axis]))
        if not taken:
            raise RejectedError(f"the slice of axis {axis} of {x.type} is empty")
        if step < 0:
            x = s.emit("Gather", (x, s.indices(np.array(taken))), {"axis": axis}, f"axis{axis}")
            sizes[axis] = len(taken)
        else:
            first[axis], strides[axis], sizes[axis] = taken.start, step, len(taken)
    if tuple(sizes) == x.type.shape:
        return x
    attrs: dict[str, Attr] = {
        "starts": tuple(first),
        "sizes": tuple(sizes),
        "steps": tuple(strides),
    }
    return s.emit("Slice", (x,), attrs)


def pad(s: Site) -> Value:
    """Pad with a constant, or with elements of the tensor, which a Gather takes."""
    x = s.value(0)
    rank = len(x.type.shape)
    mode = s.text("mode", "constant")
    pads = s.ints_or_attr(1, "pads")
    if pads is None:
        raise RejectedError("pads are missing")
    value = s.real("value", 0.0) if s.opset < 11 else s.scalar(2, "pad value", 0.0)
    axes = tuple(positive_axis(a, rank) for a in s.ints(3, "axes") or range(rank))
    if len(pads) != 2 * len(axes):
        raise RejectedError(f"{len(pads)} pads do not fit {len(axes)} axes")
    if min(pads, default=0) < 0:
        raise RejectedError(f"negative pads {list(pads)} are not supported; use Slice")
    begins, ends = [0] * rank, [0] * rank
    for i, a in enumerate(axes):
        begins[a], ends[a] = pads[i], pads[i + len(axes)]
    if not any(pads):
        return x
    size = prod(d + b + e for d, b, e in zip(x.type.shape, begins, ends, strict=True))
    if size > MAX_ELEMENTS:
        raise RejectedError(f"the result has more than {MAX_ELEMENTS} elements")
    taken = next((m for m in _TAKING if m == mode), None)
    if taken is not None:
        for a, (size, begin, end) in enumerate(zip(x.type.shape, begins, ends, strict=True)):
            if begin or end:
                places = np.pad(np.arange(size), (begin, end), taken)
                x = s.emit("Gather", (x, s.indices(places)), {"axis": a}, f"axis{a}")
        return x
    if mode != "constant":
        raise RejectedError(f"mode {mode} is not known; pad with constant, edge, reflect or wrap")
    value = s.real_number(0, value)
    return s.emit("Pad", (x,), {"begins": tuple(begins), "ends": tuple(ends), "value": value})
