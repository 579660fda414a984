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

from ..axes import first_axes
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, operand, register
from .window import Window, planes, window

if TYPE_CHECKING:
    from ..autodiff import GradBuilder

_KEYS = ("kernel_shape", "strides", "pads", "dilations", "ceil_mode", "count_include_pad")


def pool_attrs(node: Node) -> dict[str, Attr]:
    """Attributes that a pool shares with its gradient."""
    return {k: node.attrs[k] for k in _KEYS if k in node.attrs}


def _window(node: Node, shape: Sequence[int]) -> Window:
    """Window of a pool or of its gradient; ``shape`` is the forward input's."""
    win = window(node, shape[2:], node.ints_attr("kernel_shape"))
    for axis in (win.y, win.x):
        if axis.counts(padded=False).min() == 0:
            raise GraphError(
                f"a window of {axis.kernel} taps lies wholly in the padding"
                f" {axis.begin}, {axis.end}"
            )
    return win


def input_window(node: Node) -> Window:
    """Window of a pool."""
    return _window(node, operand(node, 0).shape)


def shape_window(node: Node) -> Window:
    """Window of a pool's gradient; the input's shape is an attribute."""
    return _window(node, node.ints_attr("shape"))


def infer(node: Node) -> list[TensorType]:
    """Type of a pool's result."""
    x = f32_operand(node, 0)
    return [TensorType((*x.shape[:2], *input_window(node).out_shape(len(x.shape) - 2)), x.dtype)]


def infer_grad(node: Node) -> list[TensorType]:
    """Type of the gradient of a pool's input."""
    dy, shape = f32_operand(node, 0), node.ints_attr("shape")
    out = (*shape[:2], *shape_window(node).out_shape(len(shape) - 2))
    if dy.shape != out:
        raise GraphError(f"gradient {dy} is not of the shape {out} of the result")
    return [TensorType(shape, dy.dtype)]


def _struct(node: Node, win: Window, shape: Sequence[int]) -> dict[str, Attr]:
    """Fields of ``odtplan_pool_t``."""
    padded = node.int_attr("count_include_pad", 0)
    sides = (win.y.begin, win.y.end, win.x.begin, win.x.end)
    counted = sides if padded else (0, 0, 0, 0)
    return {"planes": shape[0] * shape[1], **win.params(), "counted_pad": counted}


def struct_of_input(node: Node) -> dict[str, Attr]:
    """Fields of ``odtplan_pool_t`` of a pool."""
    return _struct(node, input_window(node), operand(node, 0).shape)


def struct_of_shape(node: Node) -> dict[str, Attr]:
    """Fields of ``odtplan_pool_t`` of a pool's gradient."""
    return _struct(node, shape_window(node), node.ints_attr("shape"))


def work(node: Node) -> Work:
    """One operation per tap inside the input."""
    (n, c), win = operand(node, 0).shape[:2], input_window(node)
    return Work("pool", n * c * win.taps(), loops=n * c * win.lines())


# -- MaxPool ---------------------------------------------------------------------------------------


def maximum(node: Node, x: Array) -> tuple[Array, Array]:
    """Maxima and the taps of the first ones."""
    win, xs = input_window(node), planes(x)
    best = np.zeros((*x.shape[:2], win.y.out, win.x.out), x.dtype)
    index = np.full(best.shape, -1, np.int16)
    for tap, outs, ins in win.walk():
        better = (index[outs] < 0) | (xs[ins] > best[outs])
        best[outs] = np.where(better, xs[ins], best[outs])
        index[outs] = np.where(better, tap, index[outs])
    return best, index


def _kernel_max(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    return [maximum(node, array(inputs, 0))[0].reshape(node.out.type.shape)]


def _vjp_max(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    x = node.inputs[0]
    assert x is not None
    if not need[0]:
        return [None]
    attrs = pool_attrs(node)
    index = b.aux("MaxPoolIndex", (x,), attrs, suffix="index")
    grad_attrs = {**attrs, "shape": x.type.shape}
    return [b.add("MaxPoolGrad", (dy, index), grad_attrs, suffix="grad_input")]


def _infer_index(node: Node) -> list[TensorType]:
    kernel = node.ints_attr("kernel_shape")
    if prod(kernel) > 256:
        raise GraphError(f"a window {kernel} has {prod(kernel)} taps; an index byte names 256")
    return [infer(node)[0].with_dtype("u8")]


def _kernel_index(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    return [maximum(node, array(inputs, 0))[1].astype(np.uint8).reshape(node.out.type.shape)]


def _infer_max_grad(node: Node) -> list[TensorType]:
    dy, index = operand(node, 0), operand(node, 1)
    if index != dy.with_dtype("u8"):
        raise GraphError(f"index {index} does not fit the gradient {dy}")
    return infer_grad(node)


def _kernel_max_grad(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy, index = array(inputs, 0), array(inputs, 1)
    win, shape = shape_window(node), node.ints_attr("shape")
    dx = np.zeros((*shape[:2], win.y.size, win.x.size), dy.dtype)
    dys, taps = planes(dy), planes(index)
    for tap, outs, ins in win.walk(reverse=True):  # later taps belong to earlier windows
        chosen = taps[outs] == tap
        dx[ins] = np.where(chosen, dx[ins] + dys[outs], dx[ins])
    return [dx.reshape(shape)]


def _work_max_grad(node: Node) -> tuple[Work, ...]:
    """One operation per element added; the result is cleared before."""
    cleared = Work("copy", 4 * prod(node.ints_attr("shape")), outputs=0)
    return Work("pool", operand(node, 0).size, outputs=0), cleared


# -- samples ---------------------------------------------------------------------------------------

CASES: tuple[tuple[tuple[int, ...], dict[str, Attr]], ...] = (
    ((1, 3, 6, 8), {"kernel_shape": (2, 2), "strides": (2, 2)}),
    ((2, 2, 7, 6), {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}),
    (
        (1, 2, 7, 6),
        {"kernel_shape": (3, 2), "strides": (2, 2), "pads": (0, 1, 1, 0), "ceil_mode": 1},
    ),
    ((1, 2, 7, 8), {"kernel_shape": (2, 3), "dilations": (3, 2)}),
    ((1, 3, 11), {"kernel_shape": (3,), "strides": (2,), "pads": (1, 0)}),
)


def result_type(op: str, x: tuple[int, ...], attrs: dict[str, Attr]) -> TensorType:
    """Type of the pool of a case."""
    win = _window(Node(op, "sample", (), (), attrs), x)
    return TensorType((*x[:2], *win.out_shape(len(x) - 2)))


def _samples_max() -> Iterator[Sample]:
    for x, attrs in CASES:
        yield Sample((TensorType(x),), attrs, gap=1e-3)


def _samples_max_grad() -> Iterator[Sample]:
    for x, attrs in CASES:
        dy = result_type("MaxPool", x, attrs)
        types = (dy, dy.with_dtype("u8"))
        yield Sample(types, {**attrs, "shape": x}, differentiable=(), low=0.0, high=6.0)


# -- records ---------------------------------------------------------------------------------------

register(
    OpDef(
        name="MaxPool",
        infer=infer,
        kernel=_kernel_max,
        work=work,
        c=CKernel("odtplan_max_pool_f32", "odtplan_pool_t", "odtplan_pool", struct_of_input),
        samples=_samples_max,
        vjp=_vjp_max,
        axes=first_axes,
    )
)
register(
    OpDef(
        name="MaxPoolIndex",
        infer=_infer_index,
        kernel=_kernel_index,
        work=work,
        c=CKernel("odtplan_max_pool_index_f32", "odtplan_pool_t", "odtplan_pool", struct_of_input),
        samples=_samples_max,
    )
)
register(
    OpDef(
        name="MaxPoolGrad",
        infer=_infer_max_grad,
        kernel=_kernel_max_grad,
        work=_work_max_grad,
        c=CKernel("odtplan_max_pool_grad_f32", "odtplan_pool_t", "odtplan_pool", struct_of_shape),
        samples=_samples_max_grad,
    )
)
