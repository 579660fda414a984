"""Operators that keep the lanes of one axis: LogSoftmax, CumSum; and Trilu."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, operand, register
from .elementary import exp32, log32
from .lanes import LANES, SOURCE, lane_axis, lane_sum, operand_params

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

T = TensorType


def _infer(node: Node) -> list[TensorType]:
    x = f32_operand(node, 0)
    lane_axis(node, x.shape)
    return [x]


# --- LogSoftmax ----------------------------------------------------------------------------------


def _log_softmax(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x = array(inputs, 0)
    axis = lane_axis(node, x.shape)
    with np.errstate(all="ignore"):
        d = x - x.max(axis=axis, keepdims=True)
        return [d - log32(lane_sum(exp32(d), axis))]


def _log_softmax_vjp(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    if not need[0]:
        return [None]
    attrs: dict[str, Attr] = {"axis": lane_axis(node, dy.type.shape)}
    return [builder.add("LogSoftmaxGrad", (node.out, dy), attrs, suffix="grad")]


def _log_softmax_samples() -> Iterator[Sample]:
    for shape, axis in LANES:
        yield Sample((T(shape),), {"axis": axis}, low=-4.0, high=4.0)


register(
    OpDef(
        name="LogSoftmax",
        infer=_infer,
        kernel=_log_softmax,
        work=lambda node: Work("transcendental", node.out.type.size),
        c=CKernel("odtplan_log_softmax_f32", "odtplan_lanes_t", SOURCE, operand_params),
        samples=_log_softmax_samples,
        vjp=_log_softmax_vjp,
        inplace=(0,),
    )
)


def _infer_log_softmax_grad(node: Node) -> list[TensorType]:
    if operand(node, 0) != operand(node, 1):
        raise GraphError(f"result {operand(node, 0)} and gradient {operand(node, 1)} differ")
    return _infer(node)


def _log_softmax_grad(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    y, dy = array(inputs, 0), array(inputs, 1)
    with np.errstate(all="ignore"):
        return [dy - exp32(y) * lane_sum(dy, lane_axis(node, y.shape))]


def _log_softmax_grad_samples() -> Iterator[Sample]:
    for shape, axis in LANES:
        yield Sample((T(shape), T(shape)), {"axis": axis}, low=-3.0, high=1.0)


register(
    OpDef(
        name="LogSoftmaxGrad",
        infer=_infer_log_softmax_grad,
        kernel=_log_softmax_grad,
        work=lambda node: Work("transcendental", node.out.type.size),
        c=CKernel("odtplan_log_softmax_grad_f32", "odtplan_lanes_t", SOURCE, operand_params),
        samples=_log_softmax_grad_samples,
        inplace=(0, 1),
    )
)


# --- CumSum --------------------------------------------------------------------------------------


def _cumsum(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x = array(inputs, 0)
    axis = lane_axis(node, x.shape)
    reverse, exclusive = node.int_attr("reverse", 0), node.int_attr("exclusive", 0)
    x = np.flip(x, axis) if reverse else x
    y = np.add.accumulate(x, axis=axis)
    if exclusive:
        first = np.zeros_like(y.take([0], axis=axis))
        y = np.concatenate([first, y.take(range(x.shape[axis] - 1), axis=axis)], axis=axis)
    return [np.ascontiguousarray(np.flip(y, axis) if reverse else y)]


def _cumsum_vjp(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    if not need[0]:
        return [None]
    attrs = node.attrs | {"reverse": 1 - node.int_attr("reverse", 0)}
    return [builder.add("CumSum", (dy,), attrs, suffix="grad")]


def _cumsum_samples() -> Iterator[Sample]:
    for i, (shape, axis) in enumerate(LANES):
        yield Sample((T(shape),), {"axis": axis, "exclusive": i % 2, "reverse": i // 2 % 2})


register(
    OpDef(
        name="CumSum",
        infer=_infer,
        kernel=_cumsum,
        work=lambda node: Work("elementwise", node.out.type.size),
        c=CKernel(
            "odtplan_cumsum_f32",
            "odtplan_cumsum_t",
            SOURCE,
            lambda node: (
                operand_params(node) | {k: node.int_attr(k, 0) for k in ("exclusive", "reverse")}
            ),
        ),
        samples=_cumsum_samples,
        vjp=_cumsum_vjp,
        inplace=(0,),
    )
)


# --- Trilu ---------------------------------------------------------------------------------------


def _infer_trilu(node: Node) -> list[TensorType]:
    x = f32_operand(node, 0)
    if len(x.shape) < 2:
        raise GraphError(f"{x} holds no matrices")
    return [x]


def _trilu(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    part = np.triu if node.int_attr("upper", 1) else np.tril
    return [part(array(inputs, 0), node.int_attr("k", 0))]


def _trilu_params(node: Node) -> dict[str, Attr]:
    *batch, rows, columns = operand(node, 0).shape
    k = min(max(node.int_attr("k", 0), -rows), columns)  # beyond, nothing changes any more
    upper = node.int_attr("upper", 1)
    return {"batch": prod(batch), "rows": rows, "columns": columns, "k": k, "upper": upper}


def _trilu_samples() -> Iterator[Sample]:
    yield Sample((T((4, 5)),), {"upper": 1, "k": 0})
    yield Sample((T((2, 3, 3)),), {"upper": 0, "k": -1})
    yield Sample((T((2, 1, 4, 3)),), {"upper": 1, "k": -2})
    yield Sample((T((3, 4)),), {"upper": 0, "k": 9})


register(
    OpDef(
        name="Trilu",
        infer=_infer_trilu,
        kernel=_trilu,
        work=lambda node: Work("copy", node.out.type.nbytes),
        c=CKernel("odtplan_trilu_f32", "odtplan_trilu_t", SOURCE, _trilu_params),
        samples=_trilu_samples,
        vjp=lambda builder, node, dy, need: [
            builder.add("Trilu", (dy,), node.attrs, suffix="grad") if need[0] else None
        ],
        inplace=(0,),
    )
)
