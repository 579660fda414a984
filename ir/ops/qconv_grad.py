"""Gradients of integer convolutions with respect to input and weight, straight through rounding.

They are fp32 and with respect to the real values. ``QConvGradInput(dy, w i8, scale f32[O], cold i8
| None)`` uses the stored weight directly, each element times its scale (rounded to fp32).
``QConvGradWeight(x i8, dy)`` sums ``dy * (x - zero point)`` in the order of ``ConvGradWeight`` and
multiplies the sum by the scale of x. The gradient of the bias is ``ConvGradBias``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, operand, register
from ..quantization import Quantization
from . import conv_work
from .conv import CASES, check_group, is_depthwise, join, result_type, struct
from .conv_grad import (
    check_grad_weight,
    grad_input,
    grad_input_window,
    grad_weight_params,
    grad_weight_window,
    keeps_copies,
    rows_grad_weight,
    runs_of_rows,
)
from .qconv import MORE, QPARTIAL, whole_weight
from .qtypes import activation, i8

#: Bytes of converted weights that the C kernel holds at a time where it has the choice ...
_CONVERTED = 1024
#: ... and at most for four channels of a convolution with taps: 64 filters of 3 x 3.
_CONVERTED_TAPS = 9216
#: Largest copy of a plane in fp32.
_COPIED = 8192
#: Operand that takes the frozen rest of a partly updated weight.
_COLD = 3


# -- gradient of the input -------------------------------------------------------------------------


def _infer_grad(node: Node) -> list[TensorType]:
    dy, shape, w = f32_operand(node, 0), node.ints_attr("shape"), whole_weight(node, 1, _COLD)
    scale = f32_operand(node, 2)
    check_group(node, shape[1], w)
    if scale.shape != w[:1]:
        raise GraphError(f"scales {scale} do not fit {w[0]} filters")
    out = (shape[0], w[0], *grad_input_window(node).out_shape(len(shape) - 2))
    if dy.shape != out:
        raise GraphError(f"gradient {dy} is not of the shape {out} of the result")
    return [TensorType(shape, dy.dtype)]


def dequantized(w: Array, scale: Array, like: Array) -> Array:
    """Weight times the scale of its output channel, one product each in the dtype of ``like``."""
    factor = scale.astype(like.dtype).reshape(-1, *(1,) * (w.ndim - 1))
    return np.asarray(w.astype(like.dtype) * factor)


def _kernel_grad(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy, cold = array(inputs, 0), inputs[_COLD] if len(inputs) > _COLD else None
    w = join(node, array(inputs, 1), cold)
    return grad_input(node, (dy, dequantized(w, array(inputs, 2), dy), None))


def _work_grad(node: Node) -> tuple[Work, ...]:
    """The fp32 gradient, by runs of the channels whose weights are converted together."""
    shape, w = node.ints_attr("shape"), whole_weight(node, 1, _COLD)
    group = node.int_attr("group", 1)
    (channels, filters), win, taps = _at_once(node), grad_input_window(node), prod(w[2:])
    rows, runs = w[0] // group, -(-w[1] // channels)
    if is_depthwise(node, shape[1], w[0]):
        calls = shape[0] * -(-w[0] // channels)
        converted = Work("elementwise", shape[0] * prod(w), calls, outputs=0)
        return (*conv_work.depthwise(win, True, shape[0] * w[0], calls), converted)
    depths = [filters] * (rows // filters) + [rows % filters] * (rows % filters > 0)
    times = shape[0] * group
    total = times * runs * rows
    converted = Work("elementwise", total * channels * taps, total, outputs=0)
    return (*conv_work.convolve(win, True, [channels] * runs, depths, times), converted)


def _at_once(node: Node) -> tuple[int, int]:
    """Channels of the input and filters of a group whose weights the C kernel converts at a time.

    Depthwise: some channels. Else four channels (one, if four don't fit), and fewer than all
    filters only where pixels come in blocks of four, to which the rest can be added.
    """
    shape, w = node.ints_attr("shape"), whole_weight(node, 1, _COLD)
    taps, filters = prod(w[2:]), w[0] // node.int_attr("group", 1)
    if is_depthwise(node, shape[1], w[0]):
        return max(1, min(w[0], _CONVERTED // (4 * taps))), 1
    win = grad_input_window(node)
    channels = 4 if w[1] >= 4 else 1
    if channels == 4 and win.is_pointwise() and prod(shape[2:]) % 4 == 0:
        return 4, min(filters, _CONVERTED // 16)
    return (channels if channels * filters * taps * 4 <= _CONVERTED_TAPS else 1), filters


def _workspace_grad(node: Node) -> int:
    """These weights in fp32."""
    channels, filters = _at_once(node)
    return channels * filters * prod(whole_weight(node, 1, _COLD)[2:]) * 4


def _c_params_grad(node: Node) -> dict[str, Attr]:
    shape, w = node.ints_attr("shape"), whole_weight(node, 1, _COLD)
    hot = operand(node, 1).shape[1 if node.int_attr("group", 1) == 1 else 0]
    geometry = struct(node, grad_input_window(node), shape[0], shape[1], w, hot)
    channels, filters = _at_once(node)
    return {**geometry, "at_once": channels, "part": filters}


# -- gradient of the weight ------------------------------------------------------------------------


def real_steps(x: Array, quant: Quantization, like: Array) -> Array:
    """Stored values less the zero point, exact in the dtype of ``like``."""
    return np.asarray(x.astype(like.dtype) - like.dtype.type(quant.zero_point))


def _infer_weight(node: Node) -> list[TensorType]:
    x, _ = activation(node, 0)
    return [TensorType(check_grad_weight(node, x, f32_operand(node, 1)))]


def _rows_weight(node: Node, inputs: Sequence[Array | None], begin: int, end: int) -> Array:
    (_, quant), dy = activation(node, 0), array(inputs, 1)
    sums = rows_grad_weight(node, (real_steps(array(inputs, 0), quant, dy), dy), begin, end)
    return np.asarray(sums * sums.dtype.type(np.float32(quant.scale[0])))


def _copy(node: Node) -> tuple[int, int]:
    """Lines and their length of the fp32 copy of a plane that the C kernel makes; 0, 0: none.

    The layer is depthwise with one filter per channel, and the copy is small; it holds the padding.
    """
    dy, (_, depth, *_) = operand(node, 1), node.ints_attr("weight_shape")
    win, group = grad_weight_window(node), node.int_attr("group", 1)
    if depth != 1 or dy.shape[1] != group or win.x.dilation != 1:
        return 0, 0
    lines, length = win.y.padded(), win.x.padded()
    return (lines, length) if lines * length * 4 <= _COPIED else (0, 0)


def _work_weight(node: Node, tile_rows: int = 0) -> tuple[Work, ...]:
    """Work of the gradient of the weight, in tiles of so many rows (0: all)."""
    shape, win, batch = (
        node.ints_attr("weight_shape"),
        grad_weight_window(node),
        operand(node, 0).shape[0],
    )
    lines, length = _copy(node)
    if lines:
        calls = -(-shape[0] // (tile_rows or shape[0]))
        return conv_work.depthwise_grad_weight(win, batch, shape[0], calls, lines * length)
    runs = runs_of_rows(node, tile_rows)
    return conv_work.grad_weight(win, batch, runs, shape[1], converted=True)


def _workspace_weight(node: Node) -> int:
    lines, length = _copy(node)
    return lines * length * 4


def _c_params_weight(node: Node) -> dict[str, Attr]:
    _, quant = activation(node, 0)
    return {
        **{f"conv.{k}": v for k, v in grad_weight_params(node).items()},
        "x_zero": quant.zero_point,
        "x_scale": quant.scale[0],
        "copy": _copy(node),
    }


# -- samples ---------------------------------------------------------------------------------------


def _samples_grad() -> Iterator[Sample]:
    for x, w, attrs in (*CASES, *MORE):
        scale = [0.01 * (j + 1) for j in range(w[0])]
        types = (result_type(x, w, attrs), i8(w, scale), TensorType(w[:1]))
        yield Sample(types, {**attrs, "shape": x}, differentiable=(), low=-0.1, high=0.1)
    for i, hot, cold in QPARTIAL:
        x, w, attrs = (*CASES, *MORE)[i]
        parts = (i8(hot, 0.02), TensorType(w[:1]), i8(cold, 0.02))
        types4 = (result_type(x, w, attrs), *parts)
        yield Sample(types4, {**attrs, "shape": x}, differentiable=(), low=-0.1, high=0.1)


def _samples_weight() -> Iterator[Sample]:
    cases = [(x, w, w, attrs) for x, w, attrs in (*CASES, *MORE)]
    for i, hot, _ in QPARTIAL:  # of x the leading channels only
        x, w, attrs = (*CASES, *MORE)[i]
        leading = hot[1] if attrs.get("group", 1) == 1 else hot[0]
        cases.append(((x[0], leading, *x[2:]), w, hot, attrs))
        cases.append((x, w, hot, attrs))
    for i, (x, w, part, attrs) in enumerate(cases):
        types = (i8(x, 0.05, (3, -128, 60, 127, 0)[i % 5]), result_type(x, w, attrs))
        yield Sample(types, {**attrs, "weight_shape": part}, (), low=-0.01, high=0.01)


register(
    OpDef(
        name="QConvGradInput",
        infer=_infer_grad,
        kernel=_kernel_grad,
        work=_work_grad,
        c=CKernel(
            "odtplan_qconv_grad_input",
            "odtplan_qconv_grad_t",
            "odtplan_qconv_grad",
            _c_params_grad,
            operands=4,
        ),
        samples=_samples_grad,
        workspace=_workspace_grad,
        inplace=(0,),
        can_be_inplace=lambda node: keeps_copies(
            node, node.ints_attr("shape")[1], whole_weight(node, 1, _COLD)[0]
        ),
    )
)
register(
    OpDef(
        name="QConvGradWeight",
        infer=_infer_weight,
        kernel=lambda node, inputs: [
            _rows_weight(node, inputs, 0, node.ints_attr("weight_shape")[0])
        ],
        rows_kernel=_rows_weight,
        work=_work_weight,
        tiled_work=_work_weight,
        c=CKernel(
            "odtplan_qconv_grad_weight",
            "odtplan_qconv_grad_weight_t",
            "odtplan_qconv_grad_weight",
            _c_params_weight,
        ),
        samples=_samples_weight,
        workspace=_workspace_weight,
    )
)
