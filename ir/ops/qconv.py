"""Integer convolution and the fp32 gradient of its input.

``QConv(x i8, w i8, bias i32 | None, multiplier i32[O], shift i32[O])``: accumulators are exact
int32 sums of ``(x - zero point) * w`` and the bias; padding means real zero. Multiplier and shift
of filter o hold ``scale_x * scale_w[o] / scale_y`` (``ir.quantization.fixed_points``). The gradient
of the input uses the stored weight directly, each element times its scale (rounded to fp32).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, CostClass, OpDef, Sample, Work, array, f32_operand, operand, register
from ..quantization import rescale
from .conv import CASES, check_group, is_depthwise, result_type
from .conv_grad import grad_input, grad_input_window
from .qtypes import (
    activation,
    check_accumulators,
    check_depth,
    check_factors,
    clamped,
    exact_dtype,
    i8,
    out_fields,
    result,
    scales_constant,
    through_clamp,
    weight,
)
from .window import Window, planes, window

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

#: Pixels whose taps the C kernel gathers at a time.
BLOCK = 4
#: ODTPLAN_MAX_LINES of backends/c/kernels/odtplan_types.h.
MAX_LINES = 32
#: Bytes of converted weights that the C kernel of the gradient holds at a time, if four channels
#: of the input fit.
_CONVERTED = 4096


def _window(node: Node) -> Window:
    return window(node, operand(node, 0).shape[2:], operand(node, 1).shape[2:])


def _geometry(node: Node) -> dict[str, Attr]:
    keys = ("strides", "pads", "dilations", "group")
    return {k: node.attrs[k] for k in keys if k in node.attrs}


# -- QConv -----------------------------------------------------------------------------------------


def _infer(node: Node) -> list[TensorType]:
    (x, _), (w, _) = activation(node, 0), weight(node, 1)
    if len(x.shape) != len(w.shape):
        raise GraphError(f"input {x} and weight {w} differ in rank")
    check_group(node, x.shape[1], w.shape)
    check_depth(w.size // w.shape[0])
    check_factors(node, 3, w.shape[0])
    if w.shape[1] == 1 and len(w.shape) == 4 and w.shape[2] > MAX_LINES:
        raise GraphError(f"a depthwise window of {w.shape[2]} lines; at most {MAX_LINES}")
    out = _window(node).out_shape(len(w.shape) - 2)
    return [result(node, (x.shape[0], w.shape[0], *out))]


def _accumulate(x: Array, w: Array, win: Window, group: int) -> Array:
    """Exact sums of products, ``[n, filters, y, x]``; x is less its zero point."""
    filters, depth, taps = w.shape[0] // group, w.shape[1], win.y.kernel * win.x.kernel
    xs = planes(x).reshape(x.shape[0], group, depth, win.y.size, win.x.size)
    ws = w.reshape(group, filters, depth, taps)
    shape = (x.shape[0], group, filters, win.y.out, win.x.out)
    if depth == 1:
        acc = np.zeros(shape, np.int32)
        for tap, outs, ins in win.walk():
            acc[outs] += xs[ins].astype(np.int32) * ws[:, :, 0, tap, None, None].astype(np.int32)
        return acc.reshape(x.shape[0], -1, win.y.out, win.x.out)
    columns = np.zeros(
        (x.shape[0], group, depth, taps, win.y.out, win.x.out), exact_dtype(depth * taps)
    )
    for tap, outs, ins in win.walk():
        columns[:, :, :, tap][outs] = xs[ins]
    columns = columns.reshape(x.shape[0], group, depth * taps, -1)
    sums = ws.reshape(group, filters, -1).astype(columns.dtype) @ columns
    return sums.astype(np.int64).reshape(x.shape[0], -1, win.y.out, win.x.out)


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    _, quant = activation(node, 0)
    x = array(inputs, 0).astype(np.int16) - np.int16(quant.zero_point)
    w, bias = array(inputs, 1), inputs[2]
    acc = _accumulate(x, w, _window(node), node.int_attr("group", 1)).astype(np.int64)
    if bias is not None:
        acc += bias.astype(np.int64).reshape(-1, 1, 1)
    check_accumulators(node, acc)
    multiplier, shift = (array(inputs, i).reshape(-1, 1, 1) for i in (3, 4))
    return [clamped(node, rescale(acc, multiplier, shift)).reshape(node.out.type.shape)]


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    x, w = node.inputs[:2]
    assert x is not None
    assert w is not None
    grads: list[Value | None] = [None] * len(node.inputs)
    if any(need[1:]):
        raise GraphError(f"node {node.name}: a quantized layer is frozen; make it f32 to train it")
    if need[0]:
        scales = scales_constant(b, w, w.type.shape[0])
        attrs = {**_geometry(node), "shape": x.type.shape}
        inputs = (through_clamp(b, node, dy), w, scales)
        grads[0] = b.add("QConvGradInput", inputs, attrs, suffix="grad_input")
    return grads


def _work(node: Node) -> Work:
    """Multiply-accumulates of the taps that are inside the input."""
    x, w = operand(node, 0).shape, operand(node, 1).shape
    win, planes = _window(node), x[0] * w[0] * w[1]
    cost_class: CostClass = "depthwise" if is_depthwise(node, x[1], w[0]) else "conv"
    return Work(cost_class, planes * win.taps(), planes * win.runs(), "i8")


def _struct(node: Node, win: Window, shape: Sequence[int]) -> dict[str, Attr]:
    """Geometry fields; ``shape`` is that of the input of the convolution."""
    w = operand(node, 1).shape
    return {
        "batch": shape[0],
        "channels": shape[1],
        "filters": w[0],
        "group": node.int_attr("group", 1),
        "group_channels": w[1],
        **win.params(),
    }


def _c_params(node: Node) -> dict[str, Attr]:
    geometry = _struct(node, _window(node), operand(node, 0).shape)
    zero = activation(node, 0)[1].zero_point
    return {**geometry, "x_zero": zero, **out_fields(node)}


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def line_bytes(win: Window) -> int:
    """Bytes of a padded line of the depthwise kernel: the taps of whole blocks, and loads of 4."""
    x = win.x
    last = (_up(x.out, BLOCK) - 1) * x.stride + (x.kernel - 1) * x.dilation
    return _up(max(last, x.begin + x.size - 1) + 8, 4)


def _workspace(node: Node) -> int:
    """Depthwise: padded lines and the filter as int16; else taps of four pixels and of one."""
    w, win = operand(node, 1).shape, _window(node)
    if w[1] == 1:
        return win.y.kernel * (line_bytes(win) + _up(win.x.kernel, 4) * 2)
    return (BLOCK * 2 + 1) * _up(w[1] * win.y.kernel * win.x.kernel, 4)


# -- gradient of the input -------------------------------------------------------------------------


def _infer_grad(node: Node) -> list[TensorType]:
    dy, shape, (w, _) = f32_operand(node, 0), node.ints_attr("shape"), weight(node, 1)
    scale = f32_operand(node, 2)
    check_group(node, shape[1], w.shape)
    if scale.shape != w.shape[:1]:
        raise GraphError(f"scales {scale} do not fit {w.shape[0]} filters")
    out = (shape[0], w.shape[0], *grad_input_window(node).out_shape(len(shape) - 2))
    if dy.shape != out:
        raise GraphError(f"gradient {dy} is not of the shape {out} of the result")
    return [TensorType(shape, dy.dtype)]


def dequantized(w: Array, scale: Array, like: Array) -> Array:
    """Weight times the scale of its output channel, one product each in the dtype of ``like``."""
    factor = scale.astype(like.dtype).reshape(-1, *(1,) * (w.ndim - 1))
    return np.asarray(w.astype(like.dtype) * factor)


def _kernel_grad(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy = array(inputs, 0)
    return grad_input(node, (dy, dequantized(array(inputs, 1), array(inputs, 2), dy), None))


def _work_grad(node: Node) -> Work:
    shape, w = node.ints_attr("shape"), operand(node, 1).shape
    depthwise = is_depthwise(node, shape[1], w[0])
    win, planes = grad_input_window(node), shape[0] * w[0] * w[1]
    cost_class: CostClass = "depthwise_grad_input" if depthwise else "conv_grad_input"
    return Work(cost_class, planes * win.taps(), planes * win.runs())


def channels_at_once(node: Node) -> int:
    """Channels of the input whose weights the C kernel converts at a time: 4, else 1."""
    w = operand(node, 1).shape
    per_channel = w[0] // node.int_attr("group", 1) * int(np.prod(w[2:])) * 4
    return 4 if w[1] >= 4 and 4 * per_channel <= _CONVERTED else 1


def _workspace_grad(node: Node) -> int:
    """Converted weights of those channels."""
    w = operand(node, 1).shape
    return w[0] // node.int_attr("group", 1) * int(np.prod(w[2:])) * 4 * channels_at_once(node)


def _c_params_grad(node: Node) -> dict[str, Attr]:
    geometry = _struct(node, grad_input_window(node), node.ints_attr("shape"))
    return {**geometry, "at_once": channels_at_once(node)}


# -- samples ---------------------------------------------------------------------------------------

#: A first layer with odd sizes, wide kernels along rows, pointwise with enough channels for blocks,
#: depthwise of sizes 3, 5 and 7 with strides 1 and 2, lines shorter than a block.
_MORE: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Attr]], ...] = (
    ((1, 3, 9, 11), (5, 3, 3, 3), {"strides": (2, 2), "pads": (1, 1, 1, 1)}),
    ((1, 48, 4, 5), (9, 48, 1, 1), {}),
    ((1, 18, 5, 7), (7, 18, 1, 1), {"strides": (2, 2)}),
    ((1, 13, 1, 1), (6, 13, 1, 1), {}),
    ((2, 3, 10, 13), (3, 1, 5, 5), {"group": 3, "pads": (2, 2, 2, 2)}),
    ((1, 3, 11, 14), (3, 1, 5, 5), {"group": 3, "pads": (2, 2, 2, 2), "strides": (2, 2)}),
    ((1, 2, 9, 16), (2, 1, 7, 7), {"group": 2, "pads": (3, 3, 3, 3)}),
    ((1, 2, 10, 10), (2, 1, 7, 7), {"group": 2, "pads": (2, 2, 3, 3), "strides": (2, 2)}),
    ((1, 3, 3, 3), (3, 1, 3, 3), {"group": 3, "pads": (1, 1, 1, 1)}),
    ((1, 2, 9, 12), (2, 1, 3, 3), {"group": 2, "pads": (2, 2, 2, 2), "dilations": (2, 2)}),
    ((1, 4, 20), (4, 1, 9), {"group": 4, "pads": (4, 4)}),
    ((1, 2, 25, 5), (8, 2, 10, 4), {"strides": (2, 2), "pads": (4, 1, 5, 1)}),
)
#: Result zero point, clamp, input zero point.
_RANGES: tuple[tuple[int, tuple[int, int], int], ...] = (
    (-5, (-128, 127), 3),
    (-128, (-128, 127), -128),
    (-100, (-100, 90), 60),
    (0, (-128, 127), 127),
)


def _samples() -> Iterator[Sample]:
    for i, (x, w, attrs) in enumerate((*CASES, *_MORE)):
        zero, clamp, x_zero = _RANGES[i % len(_RANGES)]
        outs = TensorType(w[:1], "i32")
        scale = [0.01 * (j + 1) for j in range(w[0])] if i % 2 else 0.02
        terms = int(np.prod(w[1:]))
        shift = 38 + int(np.log2(terms) / 2)  # sums of so many products, spread over i8
        short = i % 5 == 4  # shifts of a word and less
        ranges: dict[int, tuple[int, int]] = {
            2: (-3000, 3000),
            3: (2**19, 2**22) if short else (2**30, 2**31 - 1),
            4: (28, 33) if short else (shift - 1, shift + 2),
        }
        yield Sample(
            (i8(x, 0.05, x_zero), i8(w, scale), outs if i % 3 else None, outs, outs),
            {**attrs, "out_scale": 0.1, "out_zero_point": zero, "clamp": clamp},
            differentiable=(),
            ranges=ranges,
        )


def _samples_grad() -> Iterator[Sample]:
    for x, w, attrs in (*CASES, *_MORE):
        scale = [0.01 * (j + 1) for j in range(w[0])]
        types = (result_type(x, w, attrs), i8(w, scale), TensorType(w[:1]))
        yield Sample(types, {**attrs, "shape": x}, differentiable=(), low=-0.1, high=0.1)


register(
    OpDef(
        name="QConv",
        infer=_infer,
        kernel=_kernel,
        work=_work,
        c=CKernel("odtplan_qconv", "odtplan_qconv_t", "odtplan_qconv", _c_params, operands=5),
        samples=_samples,
        vjp=_vjp,
        workspace=_workspace,
    )
)
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
        ),
        samples=_samples_grad,
        workspace=_workspace_grad,
    )
)
