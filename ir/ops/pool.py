"""Pooling in one and two dimensions, and its gradients.

A window's taps are taken in order (ky, kx); taps in padding are skipped. Gradients add the windows
that meet an element in order (oy, ox). Max pooling keeps one byte per window for backward: the tap
that holds the first maximum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, operand, register
from .window import Window, planes, window

if TYPE_CHECKING:
    from ..autodiff import GradBuilder

_KEYS = ("kernel_shape", "strides", "pads", "dilations", "ceil_mode", "count_include_pad")


def _geometry(node: Node) -> dict[str, Attr]:
    return {k: node.attrs[k] for k in _KEYS if k in node.attrs}


def _window(node: Node, shape: Sequence[int]) -> Window:
    """Window of a pool or of its gradient; ``shape`` is the forward input's."""
    win = window(node, shape[2:], node.ints_attr("kernel_shape"))
    for axis in (win.y, win.x):
        if axis.counts(padded=False).min() == 0:
            raise GraphError(
                f"a window of {axis.kernel} taps lies wholly in the padding {axis.begin}, {axis.end}"
            )
    return win


def _input_window(node: Node) -> Window:
    return _window(node, operand(node, 0).shape)


def _shape_window(node: Node) -> Window:
    return _window(node, node.ints_attr("shape"))


def _infer(node: Node) -> list[TensorType]:
    x = f32_operand(node, 0)
    return [TensorType((*x.shape[:2], *_input_window(node).out_shape(len(x.shape) - 2)), x.dtype)]


def _infer_grad(node: Node) -> list[TensorType]:
    dy, shape = f32_operand(node, 0), node.ints_attr("shape")
    out = (*shape[:2], *_shape_window(node).out_shape(len(shape) - 2))
    if dy.shape != out:
        raise GraphError(f"gradient {dy} is not of the shape {out} of the result")
    return [TensorType(shape, dy.dtype)]


def _params(win: Window, shape: Sequence[int]) -> dict[str, Attr]:
    return {"planes": shape[0] * shape[1], **win.params()}


def _c_params(node: Node) -> dict[str, Attr]:
    return _params(_input_window(node), operand(node, 0).shape)


def _c_params_grad(node: Node) -> dict[str, Attr]:
    return _params(_shape_window(node), node.ints_attr("shape"))


def _work(node: Node) -> Work:
    """One operation per tap inside the input."""
    n, c = operand(node, 0).shape[:2]
    return Work("pool", n * c * _input_window(node).taps())


# -- MaxPool ---------------------------------------------------------------------------------------


def _maximum(node: Node, x: Array) -> tuple[Array, Array]:
    """Maxima and the taps of the first ones."""
    win, xs = _input_window(node), planes(x)
    best = np.zeros((*x.shape[:2], win.y.out, win.x.out), x.dtype)
    index = np.full(best.shape, -1, np.int16)
    for tap, outs, ins in win.walk():
        better = (index[outs] < 0) | (xs[ins] > best[outs])
        best[outs] = np.where(better, xs[ins], best[outs])
        index[outs] = np.where(better, tap, index[outs])
    return best, index


def _kernel_max(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    return [_maximum(node, array(inputs, 0))[0].reshape(node.out.type.shape)]


def _vjp_max(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    x = node.inputs[0]
    assert x is not None
    if not need[0]:
        return [None]
    geometry = _geometry(node)
    index = b.aux("MaxPoolIndex", (x,), geometry, suffix="index")
    attrs = {**geometry, "shape": x.type.shape}
    return [b.add("MaxPoolGrad", (dy, index), attrs, suffix="grad_input")]


def _infer_index(node: Node) -> list[TensorType]:
    kernel = node.ints_attr("kernel_shape")
    if prod(kernel) > 256:
        raise GraphError(f"a window {kernel} has {prod(kernel)} taps; an index byte names 256")
    return [_infer(node)[0].with_dtype("u8")]


def _kernel_index(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    return [_maximum(node, array(inputs, 0))[1].astype(np.uint8).reshape(node.out.type.shape)]


def _infer_max_grad(node: Node) -> list[TensorType]:
    dy, index = operand(node, 0), operand(node, 1)
    if index != dy.with_dtype("u8"):
        raise GraphError(f"index {index} does not fit the gradient {dy}")
    return _infer_grad(node)


def _kernel_max_grad(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy, index = array(inputs, 0), array(inputs, 1)
    win, shape = _shape_window(node), node.ints_attr("shape")
    dx = np.zeros((*shape[:2], win.y.size, win.x.size), dy.dtype)
    dys, taps = planes(dy), planes(index)
    for tap, outs, ins in win.walk(reverse=True):  # later taps belong to earlier windows
        chosen = taps[outs] == tap
        dx[ins] = np.where(chosen, dx[ins] + dys[outs], dx[ins])
    return [dx.reshape(shape)]


def _work_max_grad(node: Node) -> Work:
    """One operation per element cleared and per element added."""
    return Work("pool", prod(node.ints_attr("shape")) + operand(node, 0).size)


# -- AveragePool -----------------------------------------------------------------------------------


def _counts(node: Node, win: Window, dtype: np.dtype[np.floating]) -> Array:
    """Divisor of each window."""
    padded = bool(node.int_attr("count_include_pad", 0))
    return np.outer(win.y.counts(padded), win.x.counts(padded)).astype(dtype)


def _c_params_average(node: Node) -> dict[str, Attr]:
    return {**_c_params(node), **_pad_limit(node, _input_window(node))}


def _c_params_average_grad(node: Node) -> dict[str, Attr]:
    return {**_c_params_grad(node), **_pad_limit(node, _shape_window(node))}


def _pad_limit(node: Node, win: Window) -> dict[str, Attr]:
    """Padding whose taps count in the divisor, {y begin, y end, x begin, x end}."""
    padded = node.int_attr("count_include_pad", 0)
    sides = (win.y.begin, win.y.end, win.x.begin, win.x.end)
    return {"counted_pad": sides if padded else (0, 0, 0, 0)}


def _kernel_average(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x = array(inputs, 0)
    win, xs = _input_window(node), planes(x)
    y = np.zeros((*x.shape[:2], win.y.out, win.x.out), x.dtype)
    for _, outs, ins in win.walk():
        y[outs] += xs[ins]
    return [(y / _counts(node, win, x.dtype)).reshape(node.out.type.shape)]


def _vjp_average(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    if not need[0]:
        return [None]
    attrs = {**_geometry(node), "shape": operand(node, 0).shape}
    return [b.add("AveragePoolGrad", (dy,), attrs, suffix="grad_input")]


def _kernel_average_grad(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy = array(inputs, 0)
    win, shape = _shape_window(node), node.ints_attr("shape")
    share = planes(dy) / _counts(node, win, dy.dtype)
    dx = np.zeros((*shape[:2], win.y.size, win.x.size), dy.dtype)
    for _, outs, ins in win.walk(reverse=True):
        dx[ins] += share[outs]
    return [dx.reshape(shape)]


def _work_average_grad(node: Node) -> Work:
    """One operation per element cleared and per tap inside the input."""
    shape = node.ints_attr("shape")
    return Work("pool", prod(shape) + shape[0] * shape[1] * _shape_window(node).taps())


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


# -- samples ---------------------------------------------------------------------------------------

_CASES: tuple[tuple[tuple[int, ...], dict[str, Attr]], ...] = (
    ((1, 3, 6, 8), {"kernel_shape": (2, 2), "strides": (2, 2)}),
    ((2, 2, 7, 6), {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}),
    (
        (1, 2, 7, 6),
        {"kernel_shape": (3, 2), "strides": (2, 2), "pads": (0, 1, 1, 0), "ceil_mode": 1},
    ),
    ((1, 2, 7, 8), {"kernel_shape": (2, 3), "dilations": (3, 2)}),
    ((1, 3, 11), {"kernel_shape": (3,), "strides": (2,), "pads": (1, 0)}),
)


def _result(op: str, x: tuple[int, ...], attrs: dict[str, Attr]) -> TensorType:
    win = _window(Node(op, "sample", (), (), attrs), x)
    return TensorType((*x[:2], *win.out_shape(len(x) - 2)))


def _samples_max() -> Iterator[Sample]:
    for x, attrs in _CASES:
        yield Sample((TensorType(x),), attrs, gap=1e-3)


def _samples_max_grad() -> Iterator[Sample]:
    for x, attrs in _CASES:
        dy = _result("MaxPool", x, attrs)
        types = (dy, dy.with_dtype("u8"))
        yield Sample(types, {**attrs, "shape": x}, differentiable=(), low=0.0, high=6.0)


def _average_cases() -> Iterator[tuple[tuple[int, ...], dict[str, Attr]]]:
    for x, attrs in _CASES:
        yield x, attrs
        if "pads" in attrs:
            yield x, {**attrs, "count_include_pad": 1}


def _samples_average() -> Iterator[Sample]:
    for x, attrs in _average_cases():
        yield Sample((TensorType(x),), attrs)


def _samples_average_grad() -> Iterator[Sample]:
    for x, attrs in _average_cases():
        types = (_result("AveragePool", x, attrs),)
        yield Sample(types, {**attrs, "shape": x}, differentiable=())


# -- records ---------------------------------------------------------------------------------------

register(
    OpDef(
        name="MaxPool",
        infer=_infer,
        kernel=_kernel_max,
        work=_work,
        c=CKernel("odtplan_max_pool_f32", "odtplan_pool_t", "odtplan_pool", _c_params),
        samples=_samples_max,
        vjp=_vjp_max,
        onnx="MaxPool",
    )
)
register(
    OpDef(
        name="MaxPoolIndex",
        infer=_infer_index,
        kernel=_kernel_index,
        work=_work,
        c=CKernel("odtplan_max_pool_index_f32", "odtplan_pool_t", "odtplan_pool", _c_params),
        samples=_samples_max,
    )
)
register(
    OpDef(
        name="MaxPoolGrad",
        infer=_infer_max_grad,
        kernel=_kernel_max_grad,
        work=_work_max_grad,
        c=CKernel("odtplan_max_pool_grad_f32", "odtplan_pool_t", "odtplan_pool", _c_params_grad),
        samples=_samples_max_grad,
    )
)
register(
    OpDef(
        name="AveragePool",
        infer=_infer,
        kernel=_kernel_average,
        work=_work,
        c=CKernel(
            "odtplan_average_pool_f32", "odtplan_average_pool_t", "odtplan_pool", _c_params_average
        ),
        samples=_samples_average,
        vjp=_vjp_average,
        onnx="AveragePool",
    )
)
register(
    OpDef(
        name="AveragePoolGrad",
        infer=_infer_grad,
        kernel=_kernel_average_grad,
        work=_work_average_grad,
        c=CKernel(
            "odtplan_average_pool_grad_f32",
            "odtplan_average_pool_t",
            "odtplan_pool",
            _c_params_average_grad,
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
        onnx="GlobalAveragePool",
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
