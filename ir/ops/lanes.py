"""Reductions of the lanes along one axis to one number each, and their gradients.

The importer sees to it that the reduced axes are one. Sums and products of a lane are one chain
over ascending positions; a maximum is NaN if anything in its lane is. The gradient of a maximum
keeps its position, not the operand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, CostClass, OpDef, Sample, Work, array, f32_operand, operand, register
from .elementary import exp32, log32, sqrt32

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

SOURCE = "odtplan_lanes"
#: The operand's lanes and how samples of them are drawn: shape, axis.
LANES: tuple[tuple[tuple[int, ...], int], ...] = (
    ((3, 5), -1),
    ((2, 4, 3), 1),
    ((4, 2), 0),
    ((6,), 0),
    ((2, 1, 3), 1),
)

T = TensorType


def lane_axis(node: Node, shape: Sequence[int]) -> int:
    """The attribute ``axis``, counted from the front.

    Raises:
        GraphError: A tensor of ``shape`` has no such axis.
    """
    axis = node.int_attr("axis")
    if not -len(shape) <= axis < len(shape):
        raise GraphError(f"axis {axis} of a tensor with {len(shape)} axes")
    return axis % len(shape)


def lane_params(shape: tuple[int, ...], axis: int) -> dict[str, Attr]:
    """Fields of ``odtplan_lanes_t``: a tensor seen as [outer, size, inner]."""
    return {"outer": prod(shape[:axis]), "size": shape[axis], "inner": prod(shape[axis + 1 :])}


def lane_sum(x: Array, axis: int) -> Array:
    """Sum of each lane as one chain; the axis is kept with size 1."""
    return np.add.accumulate(x, axis=axis).take([-1], axis=axis)


def operand_params(node: Node) -> dict[str, Attr]:
    """``lane_params`` of operand 0."""
    shape = operand(node, 0).shape
    return lane_params(shape, lane_axis(node, shape))


def _reduced(node: Node) -> TensorType:
    x = f32_operand(node, 0)
    axis = lane_axis(node, x.shape)
    return T(x.shape[:axis] + x.shape[axis + 1 :])


# --- reductions ----------------------------------------------------------------------------------


def _maximum(x: Array, axis: int) -> Array:
    return np.asarray(x.max(axis=axis, keepdims=True))


def _minimum(x: Array, axis: int) -> Array:
    return np.asarray(x.min(axis=axis, keepdims=True))


def _l1(x: Array, axis: int) -> Array:
    return lane_sum(np.abs(x), axis)


def _l2(x: Array, axis: int) -> Array:
    return sqrt32(lane_sum(x * x, axis))


def _square_sum(x: Array, axis: int) -> Array:
    return lane_sum(x * x, axis)


def _log_sum_exp(x: Array, axis: int) -> Array:
    largest = _maximum(x, axis)
    largest = np.where(np.isinf(largest), x.dtype.type(0), largest)
    return log32(lane_sum(exp32(x - largest), axis)) + largest


def _product(x: Array, axis: int) -> Array:
    return np.multiply.accumulate(x, axis=axis).take([-1], axis=axis)


def _extreme_vjp(arg: str) -> Callable[..., list[Value | None]]:
    """The gradient goes to the first extreme; its position is all that is kept."""

    def vjp(
        builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
    ) -> list[Value | None]:
        x = node.inputs[0]
        assert x is not None
        if not need[0]:
            return [None]
        axis = lane_axis(node, x.type.shape)
        index = builder.aux(arg, (x,), {"axis": axis, "last": 0}, suffix="index")
        attrs: dict[str, Attr] = {"axis": axis, "size": x.type.shape[axis]}
        return [builder.add("LaneAtGrad", (dy, index), attrs, suffix="grad")]

    return vjp


def _lane_vjp(grad: str, *, result: bool) -> Callable[..., list[Value | None]]:
    """A gradient kernel that reads the operand, with ``result`` the result, and the gradient."""

    def vjp(
        builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
    ) -> list[Value | None]:
        x = node.inputs[0]
        assert x is not None
        if not need[0]:
            return [None]
        operands = (x, node.out, dy) if result else (x, dy)
        attrs: dict[str, Attr] = {"axis": lane_axis(node, x.type.shape)}
        return [builder.add(grad, operands, attrs, suffix="grad")]

    return vjp


def _register_reduction(
    name: str,
    function: Callable[[Array, int], Array],
    symbol: str,
    vjp: Callable[..., list[Value | None]],
    cost_class: CostClass = "elementwise",
    gap: float = 0.0,
    kinks: tuple[float, ...] = (),
) -> None:
    """``gap`` and ``kinks`` are those of the samples."""

    def kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
        x = array(inputs, 0)
        with np.errstate(all="ignore"):
            y = function(x, lane_axis(node, x.shape))
        return [y.reshape(node.out.type.shape)]

    register(
        OpDef(
            name=name,
            infer=lambda node: [_reduced(node)],
            kernel=kernel,
            work=lambda node: Work(cost_class, operand(node, 0).size, loops=node.out.type.size),
            c=CKernel(f"odtplan_lane_{symbol}_f32", "odtplan_lanes_t", SOURCE, operand_params),
            samples=lambda: iter(
                Sample((T(shape),), {"axis": axis}, gap=gap, kinks=kinks) for shape, axis in LANES
            ),
            vjp=vjp,
        )
    )


_register_reduction("ReduceMax", _maximum, "max", _extreme_vjp("ArgMax"), gap=1e-3)
_register_reduction("ReduceMin", _minimum, "min", _extreme_vjp("ArgMin"), gap=1e-3)
_register_reduction(
    "ReduceL1", _l1, "l1", _lane_vjp("ReduceL1Grad", result=False), gap=1e-3, kinks=(0.0,)
)
_register_reduction("ReduceL2", _l2, "l2", _lane_vjp("ReduceL2Grad", result=True))
_register_reduction(
    "ReduceSumSquare", _square_sum, "square_sum", _lane_vjp("ReduceSumSquareGrad", result=False)
)
_register_reduction(
    "ReduceLogSumExp",
    _log_sum_exp,
    "log_sum_exp",
    _lane_vjp("ReduceLogSumExpGrad", result=True),
    "transcendental",
)
_register_reduction("ReduceProd", _product, "product", _lane_vjp("ReduceProdGrad", result=False))


# --- gradients that read the operand --------------------------------------------------------------


def _l1_grad(x: Array, _: Array, dy: Array, axis: int) -> Array:
    zero = x.dtype.type(0)
    return np.where(x > 0, dy, np.where(x < 0, -dy, zero))


def _l2_grad(x: Array, y: Array, dy: Array, axis: int) -> Array:
    return np.where(y == 0, x.dtype.type(0), x * (dy / y))


def _square_sum_grad(x: Array, _: Array, dy: Array, axis: int) -> Array:
    return np.asarray(x * (dy + dy))


def _log_sum_exp_grad(x: Array, y: Array, dy: Array, axis: int) -> Array:
    return dy * exp32(x - y)


def _product_grad(x: Array, _: Array, dy: Array, axis: int) -> Array:
    """Right beside zeros too: where one element is 0, it alone has a gradient."""
    one, zero = x.dtype.type(1), x.dtype.type(0)
    zeros = (x == 0).sum(axis=axis, keepdims=True)
    rest = _product(np.where(x == 0, one, x), axis)
    beside = np.where((zeros == 1) & (x == 0), dy * rest, zero)
    return np.where(zeros == 0, dy * (rest / x), beside)


def _register_gradient(
    name: str,
    function: Callable[[Array, Array, Array, int], Array],
    symbol: str,
    *,
    result: bool,
    cost_class: CostClass = "elementwise",
) -> None:
    def infer(node: Node) -> list[TensorType]:
        x, lanes = f32_operand(node, 0), _reduced(node)
        for i in range(1, 3 if result else 2):
            if operand(node, i) != lanes:
                raise GraphError(f"operand {i} is {operand(node, i)}, not of the lanes' {lanes}")
        return [x]

    def kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
        x = array(inputs, 0)
        axis = lane_axis(node, x.shape)
        y, dy = (np.expand_dims(array(inputs, i), axis) for i in (1, 2 if result else 1))
        with np.errstate(all="ignore"):
            return [function(x, y, dy, axis)]

    def samples() -> Iterator[Sample]:
        for shape, axis in LANES:
            lanes = T(tuple(d for i, d in enumerate(shape) if i != axis % len(shape)))
            yield Sample((T(shape), *[lanes] * (2 if result else 1)), {"axis": axis})

    register(
        OpDef(
            name=name,
            infer=infer,
            kernel=kernel,
            work=lambda node: Work(cost_class, node.out.type.size, loops=operand(node, 1).size),
            c=CKernel(f"odtplan_lane_{symbol}_grad_f32", "odtplan_lanes_t", SOURCE, operand_params),
            samples=samples,
            inplace=(0,),
        )
    )


_register_gradient("ReduceL1Grad", _l1_grad, "l1", result=False)
_register_gradient("ReduceL2Grad", _l2_grad, "l2", result=True)
_register_gradient("ReduceSumSquareGrad", _square_sum_grad, "square_sum", result=False)
_register_gradient(
    "ReduceLogSumExpGrad",
    _log_sum_exp_grad,
    "log_sum_exp",
    result=True,
    cost_class="transcendental",
)
_register_gradient("ReduceProdGrad", _product_grad, "product", result=False)


# --- positions -----------------------------------------------------------------------------------


def _register_position(name: str, function: Callable[..., Array]) -> None:
    """``ArgMax`` and ``ArgMin``: the first extreme, or with the attribute ``last`` the last one."""

    def kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
        x = array(inputs, 0)
        axis = lane_axis(node, x.shape)
        if node.int_attr("last", 0):
            index = x.shape[axis] - 1 - function(np.flip(x, axis), axis=axis)
        else:
            index = function(x, axis=axis)
        return [np.asarray(index, np.int32)]

    def params(node: Node) -> dict[str, Attr]:
        return operand_params(node) | {"last": node.int_attr("last", 0)}

    def samples() -> Iterator[Sample]:
        for i, (shape, axis) in enumerate(LANES):
            yield Sample((T(shape),), {"axis": axis, "last": i % 2}, gap=1e-3)

    register(
        OpDef(
            name=name,
            infer=lambda node: [_reduced(node).with_dtype("i32")],
            kernel=kernel,
            work=lambda node: Work("elementwise", operand(node, 0).size, loops=node.out.type.size),
            c=CKernel(f"odtplan_lane_{name.lower()}_f32", "odtplan_lane_arg_t", SOURCE, params),
            samples=samples,
        )
    )


_register_position("ArgMax", np.argmax)
_register_position("ArgMin", np.argmin)


def _at_shape(node: Node) -> tuple[tuple[int, ...], int]:
    """Shape and axis of the operand of a reduction, from its result's."""
    lanes = f32_operand(node, 0).shape
    axis = node.int_attr("axis")
    if not 0 <= axis <= len(lanes):
        raise GraphError(f"axis {axis} of a tensor with {len(lanes) + 1} axes")
    return (*lanes[:axis], node.int_attr("size"), *lanes[axis:]), axis


def _infer_at(node: Node) -> list[TensorType]:
    if operand(node, 1) != f32_operand(node, 0).with_dtype("i32"):
        raise GraphError(f"positions {operand(node, 1)} do not fit the gradient {operand(node, 0)}")
    return [T(_at_shape(node)[0])]


def _kernel_at(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy, index = array(inputs, 0), array(inputs, 1)
    shape, axis = _at_shape(node)
    dx = np.zeros(shape, dy.dtype)
    np.put_along_axis(dx, np.expand_dims(index, axis), np.expand_dims(dy, axis), axis)
    return [dx]


def _samples_at() -> Iterator[Sample]:
    for shape, axis in LANES:
        at = axis % len(shape)
        lanes = T(shape[:at] + shape[at + 1 :])
        attrs: dict[str, Attr] = {"axis": at, "size": shape[at]}
        yield Sample((lanes, lanes.with_dtype("i32")), attrs, ranges={1: (0, shape[at] - 1)})


register(
    OpDef(
        name="LaneAtGrad",
        infer=_infer_at,
        kernel=_kernel_at,
        work=lambda node: Work("copy", node.out.type.nbytes, loops=operand(node, 0).size),
        c=CKernel(
            "odtplan_lane_at_grad_f32",
            "odtplan_lanes_t",
            SOURCE,
            lambda node: lane_params(*_at_shape(node)),
        ),
        samples=_samples_at,
    )
)
