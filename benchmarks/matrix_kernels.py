"""Kernels of convolutions by matrix products: the meaning of the operators, several times faster.

The operators' own kernels add in a fixed order, so that C can do the same bit for bit. Long
trainings on a PC don't need that: here BLAS sums, in an order of its own, and results differ by
fp32 rounding. Layers in ``i8`` stay exact, because their sums are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np

from odt_plan.ir.graph import Array, Graph, Node
from odt_plan.ir.opdef import array, get_op, operand
from odt_plan.ir.ops import lstm, recurrent
from odt_plan.ir.ops.conv import join
from odt_plan.ir.ops.qconv_grad import dequantized, real_steps
from odt_plan.ir.ops.qtypes import activation
from odt_plan.ir.ops.window import Window, planes, window

Kernel = Callable[[Node, Sequence[Array | None]], Sequence[Array]]


def execute(graph: Graph, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What ``interpreter.run`` computes, with these kernels where there are some."""
    env = {**graph.constants, **feeds}
    for node in graph.nodes:
        kernel = KERNELS.get(node.op) or get_op(node.op).kernel
        results = kernel(node, [None if v is None else env[v.name] for v in node.inputs])
        for v, result in zip(node.outputs, results, strict=True):
            env[v.name] = result
    return env


@contextmanager
def plain_recurrence() -> Iterator[None]:
    """Recurrent layers by BLAS and NumPy's functions in this process, wherever a graph runs."""

    def sum_of(start: Array, left: Array, right: Array) -> Array:
        return start + left @ right

    def sigmoid(x: Array) -> Array:
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-x))

    own = [(m, n, getattr(m, n)) for m, n in ((lstm, "chain"), (recurrent, "chain"))]
    own += [(lstm, "sigmoid32", lstm.sigmoid32), (lstm, "tanh32", lstm.tanh32)]
    try:
        for (module, name, _), f in zip(own, (sum_of, sum_of, sigmoid, np.tanh), strict=True):
            setattr(module, name, f)
        yield
    finally:
        for module, name, f in own:
            setattr(module, name, f)


@lru_cache(maxsize=1024)
def _window(node: Node, spatial: tuple[int, ...], kernel: tuple[int, ...]) -> Window:
    return window(node, spatial, kernel)


@lru_cache(maxsize=1024)
def _taps(win: Window) -> list[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
    return list(win.walk())


def _columns(x: Array, win: Window, group: int) -> Array:
    """The taps of every window: ``[n, group, channels of the group * taps, windows]``."""
    n, depth = x.shape[0], x.shape[1] // group
    xs = planes(x).reshape(n, group, depth, win.y.size, win.x.size)
    if win.is_pointwise():
        return xs.reshape(n, group, depth, -1)
    taps = win.y.kernel * win.x.kernel
    columns = np.zeros((n, group, depth, taps, win.y.out, win.x.out), x.dtype)
    for tap, outs, ins in _taps(win):
        columns[:, :, :, tap][outs] = xs[ins]
    return columns.reshape(n, group, depth * taps, -1)


def _optional(inputs: Sequence[Array | None], index: int) -> Array | None:
    return inputs[index] if index < len(inputs) else None


def _convolve(node: Node, x: Array, w: Array, b: Array | None, shape: tuple[int, ...]) -> Array:
    group = node.int_attr("group", 1)
    columns = _columns(x, _window(node, x.shape[2:], w.shape[2:]), group)
    y = (w.reshape(group, w.shape[0] // group, -1) @ columns).reshape(shape)
    if b is not None:
        y += b.reshape(-1, *(1,) * (len(shape) - 2))
    return y


def _conv(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    w = join(node, array(inputs, 1), _optional(inputs, 3))
    return [_convolve(node, array(inputs, 0), w, _optional(inputs, 2), node.out.type.shape)]


def _mixed_conv(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    _, quant = activation(node, 0)
    w = join(node, array(inputs, 1), _optional(inputs, 3))
    x, shape = quant.dequantize(array(inputs, 0)), node.out.type.shape
    y = _convolve(node, x, w, _optional(inputs, 2), shape)
    stored = np.rint(y / np.float32(node.float_attr("out_scale")))
    low, high = node.ints_attr("clamp", (-128, 127))
    return [np.clip(stored + node.int_attr("out_zero_point"), low, high).astype(np.int8)]


def _grad_input(node: Node, dy: Array, w: Array) -> Sequence[Array]:
    shape, group = node.ints_attr("shape"), node.int_attr("group", 1)
    win = _window(node, shape[2:], w.shape[2:])
    n, filters, depth = shape[0], w.shape[0] // group, w.shape[1]
    weights = w.reshape(group, filters, -1).transpose(0, 2, 1)
    columns = weights @ dy.reshape(n, group, filters, -1)
    if win.is_pointwise():
        return [columns.reshape(shape)]
    columns = columns.reshape(n, group, depth, -1, win.y.out, win.x.out)
    dx = np.zeros((n, group, depth, win.y.size, win.x.size), dy.dtype)
    for tap, outs, ins in _taps(win):
        dx[ins] += columns[:, :, :, tap][outs]
    return [dx.reshape(shape)]


def _conv_grad_input(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    w = join(node, array(inputs, 1), _optional(inputs, 2))
    return _grad_input(node, array(inputs, 0), w)


def _qconv_grad_input(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    dy, w = array(inputs, 0), join(node, array(inputs, 1), _optional(inputs, 3))
    return _grad_input(node, dy, dequantized(w, array(inputs, 2), dy))


def _grad_weight(node: Node, x: Array, dy: Array) -> Array:
    """All windows of all samples are one axis of the product."""
    shape, group = node.ints_attr("weight_shape"), node.int_attr("group", 1)
    win = _window(node, x.shape[2:], shape[2:])
    group = group * shape[0] // dy.shape[1]  # a partial update has leading channels only
    x, dy = x[:, : group * shape[1]], dy[:, : shape[0]]
    columns = np.moveaxis(_columns(x, win, group), 0, -1)
    terms = dy.reshape(len(dy), group, shape[0] // group, -1)
    rows = np.moveaxis(terms, 0, -1).reshape(group, shape[0] // group, -1)
    return (rows @ columns.reshape(*columns.shape[:2], -1).swapaxes(1, 2)).reshape(shape)


def _conv_grad_weight(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    return [_grad_weight(node, array(inputs, 0), array(inputs, 1))]


def _qconv_grad_weight(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    (_, quant), dy = activation(node, 0), array(inputs, 1)
    x = real_steps(array(inputs, 0), quant, dy)
    return [_grad_weight(node, x, dy) * dy.dtype.type(quant.scale[0])]


def _bias_gradient(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    dy = array(inputs, 0)
    return [dy.sum(axis=(0, *range(2, dy.ndim)), dtype=operand(node, 0).np_dtype)]


KERNELS: Mapping[str, Kernel] = {
    "Conv": _conv,
    "ConvGradInput": _conv_grad_input,
    "ConvGradWeight": _conv_grad_weight,
    "ConvGradBias": _bias_gradient,
    "MixedConv": _mixed_conv,
    "QConvGradInput": _qconv_grad_input,
    "QConvGradWeight": _qconv_grad_weight,
}
