"""Conversion rules of reductions over axes, of ArgMax and ArgMin, and of LogSoftmax."""

from __future__ import annotations

from math import prod

from .graph import Attr, Value
from .onnx_convert import RejectedError, Rule, Site
from .onnx_shapes import positive_axes, positive_axis


def _axes(s: Site, rank: int) -> tuple[int, ...]:
    """The reduced axes; none where the node says so."""
    axes = s.ints_or_attr(1, "axes")
    if axes:
        return positive_axes(axes, rank)
    return () if s.integer("noop_with_empty_axes") else tuple(range(rank))


def _keeps(s: Site) -> bool:
    """Whether reduced axes stay, with size 1.

    Raises:
        RejectedError: The file has a number that onnx gives no meaning; runtimes differ there.
    """
    keep = s.integer("keepdims", 1)
    if keep not in (0, 1):
        raise RejectedError(f"keepdims {keep} is neither 0 nor 1")
    return keep == 1


def _sum(op: str) -> Rule:
    """ReduceMean and ReduceSum: any axes."""

    def rule(s: Site) -> Value:
        x = s.value(0)
        axes = _axes(s, len(x.type.shape))
        if not axes:
            return x
        return s.emit(op, (x,), {"axes": axes, "keepdims": int(_keeps(s))})

    return rule


def _log_sum(s: Site) -> Value:
    """ReduceLogSum: the logarithm of a sum."""
    x = s.value(0)
    axes = _axes(s, len(x.type.shape))
    if axes:
        x = s.emit("ReduceSum", (x,), {"axes": axes, "keepdims": int(_keeps(s))}, "sum")
    return s.emit("Log", (x,))


def _lanes(op: str, *, of_one: bool) -> Rule:
    """Reductions of one axis: reduced axes are merged to one, after a Transpose if they lie apart.

    Args:
        op: The operator.
        of_one: Reducing one number changes it, so that a reduction of no axes is not nothing.
    """

    def rule(s: Site) -> Value:
        x = s.value(0)
        shape, rank = x.type.shape, len(x.type.shape)
        axes = _axes(s, rank)
        kept = tuple(i for i in range(rank) if i not in axes)
        keep = _keeps(s)
        result = tuple(1 if i in axes else d for i, d in enumerate(shape) if keep or i not in axes)
        if not axes and not of_one:
            return x
        if axes and axes != tuple(range(axes[0], axes[-1] + 1)):
            x = s.emit("Transpose", (x,), {"perm": kept + axes}, "lanes")
        begin = axes[0] if axes and axes[-1] - axes[0] < len(axes) else len(kept)
        size, moved = prod(shape[a] for a in axes), x.type.shape
        x = s.reshape(x, (*moved[:begin], size, *moved[begin + len(axes) :]), "merged")
        name = "" if result == x.type.shape[:begin] + x.type.shape[begin + 1 :] else "reduced"
        return s.reshape(s.emit(op, (x,), {"axis": begin}, name), result)

    return rule


def _position(op: str) -> Rule:
    """ArgMax and ArgMin; the result is i32."""

    def rule(s: Site) -> Value:
        x = s.value(0)
        shape = x.type.shape
        axis = positive_axis(s.integer("axis", 0), len(shape))
        attrs: dict[str, Attr] = {"axis": axis, "last": int(s.integer("select_last_index") != 0)}
        if not _keeps(s):
            return s.emit(op, (x,), attrs)
        y = s.emit(op, (x,), attrs, "position")
        return s.reshape(y, (*shape[:axis], 1, *shape[axis + 1 :]))

    return rule


def _log_softmax(s: Site) -> Value:
    x = s.value(0)
    shape = x.type.shape
    axis = positive_axis(s.integer("axis", 1 if s.opset < 13 else -1), len(shape))
    if s.opset >= 13 or axis == len(shape) - 1:
        return s.emit("LogSoftmax", (x,), {"axis": axis})
    rows = s.reshape(x, (prod(shape[:axis]), prod(shape[axis:])), "rows")  # all axes from here on
    return s.reshape(s.emit("LogSoftmax", (rows,), {"axis": 1}, "log_softmax"), shape)


#: ONNX operator of the standard domain -> its rule.
REDUCE_RULES: dict[str, Rule] = {
    "ArgMax": _position("ArgMax"),
    "ArgMin": _position("ArgMin"),
    "LogSoftmax": _log_softmax,
    "ReduceL1": _lanes("ReduceL1", of_one=True),
    "ReduceL2": _lanes("ReduceL2", of_one=True),
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _lanes("ReduceLogSumExp", of_one=False),
    "ReduceMax": _lanes("ReduceMax", of_one=False),
    "ReduceMean": _sum("ReduceMean"),
    "ReduceMin": _lanes("ReduceMin", of_one=False),
    "ReduceProd": _lanes("ReduceProd", of_one=False),
    "ReduceSum": _sum("ReduceSum"),
    "ReduceSumSquare": _lanes("ReduceSumSquare", of_one=True),
}
