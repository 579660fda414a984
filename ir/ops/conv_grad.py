"""Gradients of convolution with respect to input, weight and bias.

Accumulation orders: ``ConvGradInput`` sums taps (o, ky, kx); ``ConvGradWeight`` and
``ConvGradBias`` sum over (n, oy, ox). Taps in padding are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, operand, register
from . import conv_work
from .conv import CASES, PARTIAL, check_group, full_weight, is_depthwise, join, result_type, struct
from .window import Window, planes, window

#: Elements of a block of products in the weight gradient; keeps it inside the processor's cache.
_BLOCK = 1 << 17
#: Results from which on adding pixel by pixel is faster than running sums.
_MANY = 1024


# -- gradient of the input -------------------------------------------------------------------------


#: ODTPLAN_MARGIN_ROOM of backends/c/kernels/odtplan_margin.h.
MARGIN_ROOM = 352


def grad_input_window(node: Node) -> Window:
    """Window of the gradient of a convolution's input."""
    return window(node, node.ints_attr("shape")[2:], operand(node, 1).shape[2:])


def _infer_grad_input(node: Node) -> list[TensorType]:
    dy, shape, weight = f32_operand(node, 0), node.ints_attr("shape"), full_weight(node, 1, 2)
    check_group(node, shape[1], weight)
    out = (shape[0], weight[0], *grad_input_window(node).out_shape(len(shape) - 2))
    if dy.shape != out:
        raise GraphError(f"gradient {dy} is not of the shape {out} of the result")
    return [TensorType(shape, dy.dtype)]


def spread(
    win: Window, group: int, dy: Array, weight: Array, shape: Sequence[int], bias: Array | None
) -> Array:
    """What a convolution's input gets from its result: bias (or 0), then taps (o, ky, kx).

    Args:
        win: Window of the convolution.
        group: Groups.
        dy: ``[N, filters, spatial...]`` as the result of the convolution.
        weight: ``[filters, channels / group, kernel...]``.
        shape: Of the convolution's input, ``[N, channels, spatial...]``.
        bias: ``[channels]``.
    """
    filters, depth = weight.shape[0] // group, weight.shape[1]
    dys = planes(dy).reshape(shape[0], group, filters, win.y.out, win.x.out)
    taps = weight.reshape(group, filters, depth, -1, 1, 1)
    dx = np.zeros((shape[0], group, depth, win.y.size, win.x.size), dy.dtype)
    if bias is not None:
        dx += bias.reshape(group, depth, 1, 1)
    walk = [(tap, dx[ins], dys[outs]) for tap, outs, ins in win.walk()]
    for o in range(filters):
        for tap, met, given in walk:
            met += given[:, :, o : o + 1] * taps[:, o, :, tap]
    return dx.reshape(tuple(shape))


def grad_input(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    """Gradient from dy, weight and the frozen rest of the weight."""
    dy, cold = array(inputs, 0), inputs[2] if len(inputs) > 2 else None
    weight, group = join(node, array(inputs, 1), cold), node.int_attr("group", 1)
    return [spread(grad_input_window(node), group, dy, weight, node.ints_attr("shape"), None)]


def _work_grad_input(node: Node) -> tuple[Work, ...]:
    shape, weight, hot = node.ints_attr("shape"), full_weight(node, 1, 2), operand(node, 1).shape[1]
    win, group, depth = grad_input_window(node), node.int_attr("group", 1), weight[1]
    if is_depthwise(node, shape[1], weight[0]):
        return conv_work.depthwise(win, True, shape[0] * weight[0])
    channels = (hot, depth - hot) if 0 < hot < depth else (depth,)
    return conv_work.convolve(win, True, channels, (weight[0] // group,), shape[0] * group)


def keeps_copies(node: Node, channels: int, filters: int) -> bool:
    """The C kernel copies each plane of dy before it writes that of dx: a small depthwise layer."""
    win = grad_input_window(node)
    if not is_depthwise(node, channels, filters) or not win.keeps_size() or win.is_pointwise():
        return False
    return win.y.size * (win.x.size + win.x.kernel - 1) <= MARGIN_ROOM


def _c_params_grad_input(node: Node) -> dict[str, Attr]:
    shape, weight = node.ints_attr("shape"), full_weight(node, 1, 2)
    hot = operand(node, 1).shape[1 if node.int_attr("group", 1) == 1 else 0]
    return struct(node, grad_input_window(node), shape[0], shape[1], weight, hot)


# -- gradient of the weight ------------------------------------------------------------------------


def grad_weight_window(node: Node) -> Window:
    """Window of the gradient of a convolution's weight."""
    return window(node, operand(node, 0).shape[2:], node.ints_attr("weight_shape")[2:])


def check_grad_weight(node: Node, x: TensorType, dy: TensorType) -> tuple[int, ...]:
    """Shape of the gradient of the weight.

    Raises:
        GraphError: Input, gradient of the result and weight do not belong together.
    """
    shape, group = node.ints_attr("weight_shape"), node.int_attr("group", 1)
    out = grad_weight_window(node).out_shape(len(shape) - 2)
    if dy.shape != (x.shape[0], dy.shape[1], *out):
        raise GraphError(f"gradient {dy} does not belong to a convolution of {x} by {shape}")
    filters = dy.shape[1] // group
    # a partial update uses leading channels only: of x where group is 1, of both where depthwise
    if dy.shape[1] % group or shape[0] > dy.shape[1] or (group == 1 and shape[0] != dy.shape[1]):
        raise GraphError(f"gradient {dy} in {group} groups does not fit the weight {shape}")
    if (shape[0] - 1) // filters * shape[1] + shape[1] > x.shape[1]:
        raise GraphError(f"input {x} has too few channels for the weight {shape}")
    return shape


def _infer_grad_weight(node: Node) -> list[TensorType]:
    x, dy = f32_operand(node, 0), f32_operand(node, 1)
    return [TensorType(check_grad_weight(node, x, dy), x.dtype)]


def _products(a: Array, b: Array) -> Array:
    """Sums of ``a[i] * b[i, j]`` over the last axis, strictly in its order; b may broadcast.

    Both ways give the same bits: one pixel after the other where a pixel has many results, else
    running sums along the pixels.
    """
    rows, depth = a.shape[0], b.shape[1]
    if b.shape[0] == 1 and rows * depth >= _MANY:
        total = np.zeros((rows, depth), a.dtype)
        product = np.empty_like(total)
        for p, q in zip(a.T.copy(), b[0].T.copy(), strict=True):
            total += np.multiply(p[:, None], q, out=product)
        return total
    total = np.empty((rows, depth), a.dtype)
    step = max(1, _BLOCK // (a.shape[1] * depth))
    for i in range(0, rows, step):
        products = a[i : i + step, None] * (b if b.shape[0] == 1 else b[i : i + step])
        np.add.accumulate(products, axis=2, out=products)
        total[i : i + step] = products[:, :, -1]
    return total


def rows_grad_weight(node: Node, inputs: Sequence[Array | None], begin: int, end: int) -> Array:
    """Rows of the gradient of the weight, from x and dy."""
    x, dy = array(inputs, 0), array(inputs, 1)
    shape, win = node.ints_attr("weight_shape"), grad_weight_window(node)
    filters = dy.shape[1] // node.int_attr("group", 1)
    xs, dys = np.swapaxes(planes(x), 0, 1), np.swapaxes(planes(dy)[:, begin:end], 0, 1)
    groups = np.arange(begin, end) // filters
    first = int(groups[0]) * shape[1]
    channels = groups[:, None] * shape[1] + np.arange(shape[1])  # of x, by row of the weight
    dw = np.zeros((end - begin, shape[1], win.y.kernel * win.x.kernel), x.dtype)
    for tap, outs, ins in win.walk():
        a = dys[outs].reshape(end - begin, -1)
        if a.shape[1] == 0:
            continue
        if groups[0] == groups[-1]:  # all rows have the same channels
            b = xs[first : first + shape[1]][ins].reshape(1, shape[1], -1)
        else:
            b = xs[ins].reshape(x.shape[1], -1)[channels]
        dw[:, :, tap] = _products(a, b)
    return dw.reshape(end - begin, *shape[1:])


def _kernel_grad_weight(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    return [rows_grad_weight(node, inputs, 0, node.ints_attr("weight_shape")[0])]


def _depthwise_grad_weight(node: Node) -> bool:
    group = node.int_attr("group", 1)
    return (
        group > 1 and operand(node, 1).shape[1] == group and node.ints_attr("weight_shape")[1] == 1
    )


def runs_of_rows(node: Node, tile_rows: int) -> list[int]:
    """Rows of the gradient of the weight that are of one tile (0: a single one) and one group."""
    rows, filters = node.ints_attr("weight_shape")[0], operand(node, 1).shape[1]
    tiles = range(0, rows, tile_rows or rows)
    groups = range(0, rows, filters // node.int_attr("group", 1))
    return [b - a for a, b in pairwise(sorted({*tiles, *groups, rows}))]


def _work_grad_weight(node: Node, tile_rows: int = 0) -> tuple[Work, ...]:
    shape, win = node.ints_attr("weight_shape"), grad_weight_window(node)
    batch = operand(node, 0).shape[0]
    if _depthwise_grad_weight(node):
        calls = -(-shape[0] // (tile_rows or shape[0]))
        return conv_work.depthwise_grad_weight(win, batch, shape[0], calls)
    return conv_work.grad_weight(win, batch, runs_of_rows(node, tile_rows), shape[1])


def grad_weight_params(node: Node) -> dict[str, Attr]:
    """Fields of ``odtplan_conv_t`` for the gradient of the weight; see odtplan_gather.h."""
    x, dy, shape = operand(node, 0).shape, operand(node, 1).shape, node.ints_attr("weight_shape")
    weight = (dy[1], *shape[1:])  # rows come by row_begin..row_end
    return struct(node, grad_weight_window(node), x[0], x[1], weight, shape[0])


# -- gradient of the bias --------------------------------------------------------------------------


def _infer_grad_bias(node: Node) -> list[TensorType]:
    dy = f32_operand(node, 0)
    if len(dy.shape) < 2:
        raise GraphError(f"gradient {dy} has no channel axis")
    return [TensorType(dy.shape[1:2], dy.dtype)]


def _rows_grad_bias(node: Node, inputs: Sequence[Array | None], begin: int, end: int) -> Array:
    dy = array(inputs, 0)
    terms = np.swapaxes(dy[:, begin:end], 0, 1).reshape(end - begin, -1)
    return np.ascontiguousarray(np.add.accumulate(terms, axis=1)[:, -1])


def _c_params_grad_bias(node: Node) -> dict[str, Attr]:
    dy = operand(node, 0)
    n, c = dy.shape[:2]
    return {"batch": n, "channels": c, "spatial": dy.size // (n * c)}


def _samples_grad_input() -> Iterator[Sample]:
    for x, w, attrs in CASES:
        types = (result_type(x, w, attrs), TensorType(w))
        yield Sample(types, {**attrs, "shape": x}, differentiable=())
    for i, hot, cold in PARTIAL:
        x, w, attrs = CASES[i]
        types3 = (result_type(x, w, attrs), TensorType(hot), TensorType(cold))
        yield Sample(types3, {**attrs, "shape": x}, differentiable=())


def grad_weight_samples(
    more: Sequence[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, Attr]]] = (),
) -> Iterator[Sample]:
    """Whole and partial gradients of the weight.

    Args:
        more: Further cases: x, weight, updated part of the weight, attributes.
    """
    cases = [(x, w, w, attrs) for x, w, attrs in CASES]
    (x0, w0, a0), (_x4, w4, a4) = CASES[0], CASES[4]
    cases += [(x0, w0, (6, 3, 3, 3), a0), ((1, 2, 7, 8), w4, (2, 1, 3, 3), a4)]
    for x, w, part, attrs in (*cases, *more):
        types = (TensorType(x), result_type(x, w, attrs))
        yield Sample(types, {**attrs, "weight_shape": part}, differentiable=())


register(
    OpDef(
        name="ConvGradInput",
        infer=_infer_grad_input,
        kernel=grad_input,
        work=_work_grad_input,
        c=CKernel(
            "odtplan_conv_grad_input_f32",
            "odtplan_conv_t",
            "odtplan_conv",
            _c_params_grad_input,
            operands=3,
        ),
        samples=_samples_grad_input,
        inplace=(0,),
        can_be_inplace=lambda node: keeps_copies(
            node, node.ints_attr("shape")[1], full_weight(node, 1, 2)[0]
        ),
    )
)
register(
    OpDef(
        name="ConvGradWeight",
        infer=_infer_grad_weight,
        kernel=_kernel_grad_weight,
        rows_kernel=rows_grad_weight,
        work=_work_grad_weight,
        tiled_work=_work_grad_weight,
        c=CKernel(
            "odtplan_conv_grad_weight_f32",
            "odtplan_conv_t",
            "odtplan_conv_grad",
            grad_weight_params,
        ),
        samples=grad_weight_samples,
    )
)
register(
    OpDef(
        name="ConvGradBias",
        infer=_infer_grad_bias,
        kernel=lambda node, inputs: [_rows_grad_bias(node, inputs, 0, node.out.type.shape[0])],
        rows_kernel=_rows_grad_bias,
        work=lambda node: Work("elementwise", operand(node, 0).size),
        c=CKernel(
            "odtplan_conv_grad_bias_f32",
            "odtplan_conv_grad_bias_t",
            "odtplan_conv_grad",
            _c_params_grad_bias,
        ),
        samples=lambda: iter(
            [Sample((TensorType((2, 5, 3, 4)),)), Sample((TensorType((1, 3, 7)),))]
        ),
    )
)
