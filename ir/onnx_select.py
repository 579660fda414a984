"""Conversion rules of operators that find entries or mark positions: OneHot, Hardmax, TopK."""

from __future__ import annotations

import numpy as np

from .graph import Array, Attr, Value
from .onnx_convert import RejectedError, Rule, Site
from .onnx_index import constant_only
from .onnx_shapes import positive_axis
from .ops.integers import EXACT


def _one_hot(s: Site) -> Value:
    """OneHot of indices that depend on the data of a sample."""
    if s.data(0) is not None:
        return constant_only(s)
    data = s.data(2)
    depth = tuple(s.fixed(1, "depth").reshape(-1).tolist()) if s.present(1) else None
    if depth is None or len(depth) != 1 or not 1 <= depth[0] <= EXACT:
        raise RejectedError(f"depth is {depth}, not a number from 1 to {EXACT}")
    count = int(depth[0])  # onnx lets it be a real number, whose fraction is cut
    if data is None or data.size != 2:
        raise RejectedError("the values are not two constants")
    if data.dtype != np.float32 and data.dtype.kind not in "iu":
        raise RejectedError(f"the values are {data.dtype}; float32 and integers are supported")
    off, on = map(float, data.reshape(-1))
    x = s.value(0)
    if x.type.dtype == "i32":
        x = s.integers_as_real(0)
    elif s.node.inputs[0] not in s.conversion.spans:  # real numbers, of which the fraction is cut
        index = s.emit("ToIndex", (x,), {"size": EXACT}, "index")
        x = s.emit("ToReal", (index,), {"limit": EXACT}, "whole")
    rank = len(x.type.shape)
    axis = positive_axis(s.integer("axis", -1), rank + 1)
    zero, size = (_constant(s, f"{n}", np.array(n, np.float32)) for n in (0, count))
    negative = s.emit("Greater", (zero, x), None, "negative")
    from_end = s.emit("Add", (x, size), None, "from_end")
    at = s.emit("Where", (negative, from_end, x), None, "at")
    return _marked(s, at, count, axis, on, off)


def _hardmax(s: Site) -> Value:
    """Hardmax: 1 at the first maximum, else 0; before opset 13 of all axes from one on."""
    x = s.value(0)
    shape, rank = x.type.shape, len(x.type.shape)
    axis = positive_axis(s.integer("axis", 1 if s.opset < 13 else -1), rank)
    if s.opset < 13:
        shape = (int(np.prod(shape[:axis])), int(np.prod(shape[axis:])))
        rows, axis = s.reshape(x, shape, "rows"), 1
    else:
        rows = x
    first = s.emit("ArgMax", (rows,), {"axis": axis, "last": 0}, "first")
    at = s.emit("ToReal", (first,), {"limit": shape[axis]}, "at")
    return s.reshape(_marked(s, at, shape[axis], axis, 1.0, 0.0), x.type.shape)


def _top_k(s: Site) -> tuple[Value | None, ...]:
    """TopK of a constant k: positions, and the entries that are there."""
    x, given = s.value(0), (s.integer("k"),) if s.has("k") else s.ints(1, "k")
    if s.node.inputs[0] in s.conversion.spans:
        raise RejectedError(f"operand {s.node.inputs[0]} holds computed integers, no real numbers")
    axis = positive_axis(s.integer("axis", -1), len(x.type.shape))
    if given is None or len(given) != 1:
        raise RejectedError(f"k is {given}, not a number")
    attrs: dict[str, Attr] = {"axis": axis, "k": given[0], "largest": s.integer("largest", 1)}
    index = s.emit("ArgTopK", (x,), attrs, "positions")
    return s.emit("TakeLanes", (x, index), {"axis": axis}, "values"), index


def _marked(s: Site, at: Value, size: int, axis: int, on: float, off: float) -> Value:
    """``on`` at the positions ``at`` of a new axis, ``off`` elsewhere."""
    shape = at.type.shape
    at = s.reshape(at, (*shape[:axis], 1, *shape[axis:]), "positions")
    every = np.arange(size, dtype=np.float32).reshape(size, *(1 for _ in shape[axis:]))
    there = s.emit("Equal", (at, _constant(s, "every", every)), None, "there")
    values: dict[str, Attr] = {"on": on, "off": off}
    return s.emit("Where", (there, None, None), values, "marks")


def _constant(s: Site, what: str, data: Array) -> Value:
    return s.conversion.constant(f"{s.node.name}/{what}", data)


#: ONNX operator of the standard domain -> its rule.
SELECT_RULES: dict[str, Rule] = {"Hardmax": _hardmax, "OneHot": _one_hot, "TopK": _top_k}
