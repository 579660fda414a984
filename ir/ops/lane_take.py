"""Entries of lanes by their positions, and the positions of the largest: TakeLanes and ArgTopK.

``TakeLanes(x, index; axis)`` takes from each lane along ``axis`` the entries that the lane of
``index`` names, as GatherElements of ONNX does. A position counts from the end where it is
negative. Positions that lie outside raise an error here; the C kernels give NaN for them, and no
gradient. ``ArgTopK(x; axis, k, largest) -> i32`` are the positions of the ``k`` largest or smallest
entries of each lane, in that order; of equal ones the first comes first, and NaN before all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, operand, register
from .index import positions
from .lanes import LANES, SOURCE, lane_axis, lane_params

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

T = TensorType


def _resized(shape: Sequence[int], axis: int, count: int) -> tuple[int, ...]:
    return (*shape[:axis], count, *shape[axis + 1 :])


def _fields(shape: tuple[int, ...], axis: int, count: int) -> dict[str, Attr]:
    """Fields of ``odtplan_lane_take_t``."""
    return lane_params(shape, axis) | {"count": count}


# --- TakeLanes ------------------------------------------------------------------------------------


def _check_index(node: Node, shape: tuple[int, ...]) -> int:
    """The axis; the indices must be i32 and of the shape of the lanes.

    Raises:
        GraphError: They are not.
    """
    axis, index = lane_axis(node, shape), operand(node, 1)
    fits = len(index.shape) == len(shape)
    if not fits or index.dtype != "i32" or _resized(shape, axis, index.shape[axis]) != index.shape:
        raise GraphError(f"indices {index} do not fit lanes along axis {axis} of {shape}")
    return axis


def _infer(node: Node) -> list[TensorType]:
    _check_index(node, f32_operand(node, 0).shape)
    return [T(operand(node, 1).shape)]


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x, index = array(inputs, 0), array(inputs, 1)
    axis = lane_axis(node, x.shape)
    at = positions(node, index, x.shape[axis]).reshape(index.shape)
    return [np.take_along_axis(x, at, axis)]


def _vjp(builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    if not need[0]:
        return [None, None]
    shape = operand(node, 0).shape
    axis = lane_axis(node, shape)
    attrs: dict[str, Attr] = {"axis": axis, "size": shape[axis]}
    return [builder.add("TakeLanesGrad", (dy, node.inputs[1]), attrs, suffix="grad"), None]


def _params(node: Node) -> dict[str, Attr]:
    shape = operand(node, 0).shape
    axis = lane_axis(node, shape)
    return _fields(shape, axis, node.out.type.shape[axis])


def _cases() -> Iterator[tuple[TensorType, TensorType, int]]:
    """Tensors, indices, and the axis of the lanes."""
    for i, (shape, axis) in enumerate(LANES):
        yield T(shape), T(_resized(shape, axis % len(shape), 1 + 2 * i), "i32"), axis


def _ranges(size: int) -> dict[int, tuple[int, int]]:
    return {1: (-size, size - 1)}


def _samples() -> Iterator[Sample]:
    for x, index, axis in _cases():
        yield Sample((x, index), {"axis": axis}, ranges=_ranges(x.shape[axis]))


register(
    OpDef(
        name="TakeLanes",
        infer=_infer,
        kernel=_kernel,
        work=lambda node: Work("copy", node.out.type.nbytes, loops=node.out.type.size),
        c=CKernel("odtplan_lane_take_f32", "odtplan_lane_take_t", SOURCE, _params),
        samples=_samples,
        vjp=_vjp,
    )
)


# --- TakeLanesGrad --------------------------------------------------------------------------------


def _taken_from(node: Node) -> tuple[tuple[int, ...], int]:
    """Shape of what the entries were taken from, and the axis."""
    shape = f32_operand(node, 0).shape
    axis = lane_axis(node, shape)
    return _resized(shape, axis, node.int_attr("size")), axis


def _infer_grad(node: Node) -> list[TensorType]:
    shape, _ = _taken_from(node)
    _check_index(node, shape)
    if operand(node, 1).shape != operand(node, 0).shape:
        raise GraphError(f"indices {operand(node, 1)} do not fit the gradient {operand(node, 0)}")
    return [T(shape)]


def _kernel_grad(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy, index = array(inputs, 0), array(inputs, 1)
    shape, axis = _taken_from(node)
    at: list[Array] = list(np.indices(index.shape, sparse=True))
    at[axis] = positions(node, index, shape[axis]).reshape(index.shape)
    dx = np.zeros(shape, dy.dtype)
    np.add.at(dx, tuple(at), dy)  # entries that are taken twice, in ascending order
    return [dx]


def _params_grad(node: Node) -> dict[str, Attr]:
    shape, axis = _taken_from(node)
    return _fields(shape, axis, operand(node, 0).shape[axis])


def _samples_grad() -> Iterator[Sample]:
    for x, index, axis in _cases():
        size = x.shape[axis]
        attrs: dict[str, Attr] = {"axis": axis, "size": size}
        yield Sample((T(index.shape), index), attrs, ranges=_ranges(size))


register(
    OpDef(
        name="TakeLanesGrad",
        infer=_infer_grad,
        kernel=_kernel_grad,
        work=lambda node: (
            Work("copy", node.out.type.nbytes, outputs=0),
            Work("elementwise", operand(node, 0).size, outputs=0),
        ),
        c=CKernel("odtplan_lane_take_grad_f32", "odtplan_lane_take_t", SOURCE, _params_grad),
        samples=_samples_grad,
    )
)


# --- ArgTopK --------------------------------------------------------------------------------------


def _infer_top(node: Node) -> list[TensorType]:
    shape, k = f32_operand(node, 0).shape, node.int_attr("k")
    axis = lane_axis(node, shape)
    if not 1 <= k <= shape[axis]:
        raise GraphError(f"k = {k}; lanes along axis {axis} of {shape} have 1 to {shape[axis]}")
    return [T(_resized(shape, axis, k), "i32")]


def _kernel_top(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x = array(inputs, 0)
    axis = lane_axis(node, x.shape)
    key = -x if node.int_attr("largest") else x
    order = np.argsort(key, axis, kind="stable")
    real = np.take_along_axis(~np.isnan(x), order, axis)
    order = np.take_along_axis(order, np.argsort(real, axis, kind="stable"), axis)
    return [order.take(range(node.int_attr("k")), axis).astype(np.int32)]


def _params_top(node: Node) -> dict[str, Attr]:
    shape = operand(node, 0).shape
    fields = _fields(shape, lane_axis(node, shape), node.int_attr("k"))
    return fields | {"largest": node.int_attr("largest")}


def _samples_top() -> Iterator[Sample]:
    for i, (shape, axis) in enumerate(LANES):
        for largest in (0, 1):
            k = min(1 + i, shape[axis])
            yield Sample((T(shape),), {"axis": axis, "k": k, "largest": largest}, gap=1e-3)


register(
    OpDef(
        name="ArgTopK",
        infer=_infer_top,
        kernel=_kernel_top,
        work=lambda node: Work(
            "elementwise", operand(node, 0).size * node.int_attr("k"), loops=node.out.type.size
        ),
        c=CKernel("odtplan_lane_top_f32", "odtplan_lane_top_t", SOURCE, _params_top),
        samples=_samples_top,
    )
)
