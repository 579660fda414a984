"""Average pooling in one and two dimensions, global too, and its gradients; see ``pool``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ..axes import first_axes
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, operand, register
from .pool import (
    CASES,
    infer,
    infer_grad,
    input_window,
    pool_attrs,
    result_type,
    shape_window,
    struct_of_input,
    struct_of_shape,
    work,
)
from .window import Window, planes

if TYPE_CHECKING:
    from ..autodiff import GradBuilder

# -- AveragePool -----------------------------------------------------------------------------------


def _counts(node: Node, win: Window, dtype: np.dtype[np.floating]) -> Array:
    """Divisor of each window."""
    padded = bool(node.int_attr("count_include_pad", 0))
    return np.outer(win.y.counts(padded), win.x.counts(padded)).astype(dtype)


def _kernel_average(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x = array(inputs, 0)
    win, xs = input_window(node), planes(x)
    y = np.zeros((*x.shape[:2], win.y.out, win.x.out), x.dtype)
    for _, outs, ins in win.walk():
        y[outs] += xs[ins]
    return [(y / _counts(node, win, x.dtype)).reshape(node.out.type.shape)]


def _vjp_average(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    if not need[0]:
        return [None]
    attrs = {**pool_attrs(node), "shape": operand(node, 0).shape}
    return [b.add("AveragePoolGrad", (dy,), attrs, suffix="grad_input")]


def _kernel_average_grad(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy = array(inputs, 0)
    win, shape = shape_window(node), node.ints_attr("shape")
    share = planes(dy) / _counts(node, win, dy.dtype)
    dx = np.zeros((*shape[:2], win.y.size, win.x.size), dy.dtype)
    for _, outs, ins in win.walk(reverse=True):
        dx[ins] += share[outs]
    return [dx.reshape(shape)]


def _work_average_grad(node: Node) -> tuple[Work, ...]:
    """One operation per tap inside the input; the result is cleared before."""
    shape, win = node.ints_attr("shape"), shape_window(node)
    taps, lines = (shape[0] * shape[1] * n for n in (win.taps(), win.lines()))
    added = Work("pool", taps, loops=lines, outputs=operand(node, 0).size)
    return added, Work("copy", 4 * prod(shape), outputs=0)


# -- GlobalAveragePool -----------------------------------------------------------------------------


def _infer_global(node: Node) -> list[TensorType]:
    x = f32_operand(node, 0)
    if len(x.shape) < 3:
        raise GraphError(f"input {x} has no spatial axis")
    return [TensorType((*x.shape[:2], *(1,) * (len(x.shape) - 2)), x.dtype)]


def _kernel_global(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x = array(inputs, 0)
    flat = x.reshape(x.shape[0] * x.shape[1], -1)
    sums = np.add.accumulate(flat, axis=1)[:, -1]
    return [(sums / x.dtype.type(flat.shape[1])).reshape(node.out.type.shape)]


def _vjp_global(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    if not need[0]:
        return [None]
    attrs: dict[str, Attr] = {"shape": operand(node, 0).shape}
    return [b.add("GlobalAveragePoolGrad", (dy,), attrs, suffix="grad_input")]


def _infer_global_grad(node: Node) -> list[TensorType]:
    dy, shape = f32_operand(node, 0), node.ints_attr("shape")
    if dy.shape != (*shape[:2], *(1,) * (len(shape) - 2)):
        raise GraphError(f"gradient {dy} does not belong to an input {shape}")
    return [TensorType(shape, dy.dtype)]


def _kernel_global_grad(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy, shape = array(inputs, 0), node.ints_attr("shape")
    return [np.broadcast_to(dy / dy.dtype.type(prod(shape[2:])), shape).copy()]


def _global_params(shape: Sequence[int]) -> dict[str, Attr]:
    return {"planes": shape[0] * shape[1], "spatial": prod(shape[2:])}


def _average_cases() -> Iterator[tuple[tuple[int, ...], dict[str, Attr]]]:
    for x, attrs in CASES:
        yield x, attrs
        if "pads" in attrs:
            yield x, {**attrs, "count_include_pad": 1}


def _samples_average() -> Iterator[Sample]:
    for x, attrs in _average_cases():
        yield Sample((TensorType(x),), attrs)


def _samples_average_grad() -> Iterator[Sample]:
    for x, attrs in _average_cases():
        types = (result_type("AveragePool", x, attrs),)
        yield Sample(types, {**attrs, "shape": x}, differentiable=())


register(
    OpDef(
        name="AveragePool",
        infer=infer,
        kernel=_kernel_average,
        work=work,
        c=CKernel("odtplan_average_pool_f32", "odtplan_pool_t", "odtplan_pool", struct_of_input),
        samples=_samples_average,
        vjp=_vjp_average,
        axes=first_axes,
    )
)
register(
    OpDef(
        name="AveragePoolGrad",
        infer=infer_grad,
        kernel=_kernel_average_grad,
        work=_work_average_grad,
        c=CKernel(
            "odtplan_average_pool_grad_f32",
            "odtplan_pool_t",
            "odtplan_pool",
            struct_of_shape,
        ),
        samples=_samples_average_grad,
    )
)
register(
    OpDef(
        name="GlobalAveragePool",
        infer=_infer_global,
        kernel=_kernel_global,
        work=lambda node: Work("pool", operand(node, 0).size),
        c=CKernel(
            "odtplan_global_average_pool_f32",
            "odtplan_global_pool_t",
            "odtplan_pool",
            lambda node: _global_params(operand(node, 0).shape),
        ),
        samples=lambda: iter(
            [Sample((TensorType((2, 3, 4, 5)),)), Sample((TensorType((1, 4, 7)),))]
        ),
        vjp=_vjp_global,
        axes=first_axes,
    )
)
register(
    OpDef(
        name="GlobalAveragePoolGrad",
        infer=_infer_global_grad,
        kernel=_kernel_global_grad,
        work=lambda node: Work("pool", prod(node.ints_attr("shape"))),
        c=CKernel(
            "odtplan_global_average_pool_grad_f32",
            "odtplan_global_pool_t",
            "odtplan_pool",
            lambda node: _global_params(node.ints_attr("shape")),
        ),
        samples=lambda: iter(
            [
                Sample((TensorType((2, 3, 1, 1)),), {"shape": (2, 3, 4, 5)}, differentiable=()),
                Sample((TensorType((1, 4, 1)),), {"shape": (1, 4, 7)}, differentiable=()),
            ]
        ),
    )
)
