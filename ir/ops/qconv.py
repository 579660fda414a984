"""Integer convolution; its gradients are in ``qconv_grad``.

``QConv(x i8, w i8, bias i32 | None, multiplier i32[O], shift i32[O], cold i8 | None)``:
accumulators are exact int32 sums of ``(x - zero point) * w`` and the bias; padding means real zero.
Multiplier and shift of filter o hold ``scale_x * scale_w[o] / scale_y``
(``ir.quantization.fixed_points``). A partly updated weight comes in two operands as in ``conv``:
hot leading channels ``w``, frozen rest ``cold``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, ParamSlot, Sample, Work, array, operand, register
from ..quantization import rescale
from . import conv_work
from .conv import CASES, PARTIAL, check_group, is_depthwise, join, joined_shape, struct
from .qclip import through_clamp
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
    weight,
)
from .window import Window, planes, window

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

#: Pixels whose taps the C kernel gathers at a time.
BLOCK = 4
#: ODTPLAN_MAX_LINES of backends/c/kernels/odtplan_types.h.
MAX_LINES = 32
#: Operand that takes the frozen rest of a partly updated weight.
COLD = 5


def _window(node: Node) -> Window:
    return window(node, operand(node, 0).shape[2:], operand(node, 1).shape[2:])


def whole_weight(node: Node, w: int, cold: int) -> tuple[int, ...]:
    """Shape of the weight (operand ``w``) joined with its frozen rest (operand ``cold``).

    Raises:
        GraphError: One of them is no quantized weight, or they do not fit together.
    """
    shape = weight(node, w)[0].shape
    if cold < len(node.inputs) and node.inputs[cold] is not None:
        weight(node, cold)
    return joined_shape(node, shape, cold)


def _geometry(node: Node) -> dict[str, Attr]:
    keys = ("strides", "pads", "dilations", "group")
    return {k: node.attrs[k] for k in keys if k in node.attrs}


# -- QConv -----------------------------------------------------------------------------------------


def _infer(node: Node) -> list[TensorType]:
    (x, _), w = activation(node, 0), whole_weight(node, 1, COLD)
    if len(x.shape) != len(w):
        raise GraphError(f"input {x} and weight {w} differ in rank")
    check_group(node, x.shape[1], w)
    check_depth(prod(w[1:]))
    check_factors(node, 3, w[0])
    if w[1] == 1 and len(w) == 4 and w[2] > MAX_LINES:
        raise GraphError(f"a depthwise window of {w[2]} lines; at most {MAX_LINES}")
    out = _window(node).out_shape(len(w) - 2)
    return [result(node, (x.shape[0], w[0], *out))]


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
    cold, bias = inputs[COLD] if len(inputs) > COLD else None, inputs[2]
    w = join(node, array(inputs, 1), cold)
    acc = _accumulate(x, w, _window(node), node.int_attr("group", 1)).astype(np.int64)
    if bias is not None:
        acc += bias.astype(np.int64).reshape(-1, 1, 1)
    check_accumulators(node, acc)
    multiplier, shift = (array(inputs, i).reshape(-1, 1, 1) for i in (3, 4))
    return [clamped(node, rescale(acc, multiplier, shift)).reshape(node.out.type.shape)]


def _channel_axis(node: Node) -> int | None:
    if node.int_attr("group", 1) == 1:
        return 1
    filters = whole_weight(node, 1, COLD)[0]
    return 0 if is_depthwise(node, operand(node, 0).shape[1], filters) else None


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    x, w = node.inputs[:2]
    assert x is not None
    assert w is not None
    cold = node.inputs[COLD] if len(node.inputs) > COLD else None
    grads: list[Value | None] = [None] * len(node.inputs)
    if not any(need):
        return grads
    geometry, inner = _geometry(node), through_clamp(b, node, dy)
    if need[0]:
        scales = scales_constant(b.graph, w, None if node.int_attr("group", 1) == 1 else cold)
        attrs = {**geometry, "shape": x.type.shape}
        grads[0] = b.add("QConvGradInput", (inner, w, scales, cold), attrs, suffix="grad_input")
    if need[1]:
        shape, axis = list(w.type.shape), _channel_axis(node)
        if b.channels is not None and axis is not None:
            shape[axis] = b.channels
        attrs = {**geometry, "weight_shape": tuple(shape)}
        leading = b.leading_channels(x, 1)
        grads[1] = b.add("QConvGradWeight", (leading, inner), attrs, suffix="grad_weight")
    if len(need) > 2 and need[2]:
        grads[2] = b.add("ConvGradBias", (inner,), suffix="grad_bias")
    return grads


def _work(node: Node) -> tuple[Work, ...]:
    x, w, group = operand(node, 0).shape, whole_weight(node, 1, COLD), node.int_attr("group", 1)
    if w[1] == 1:
        return conv_work.integer_depthwise(_window(node), x[0] * w[0])
    return conv_work.integer(_window(node), w[0] // group, w[1], x[0] * group)


def _c_params(node: Node) -> dict[str, Attr]:
    x, zero = operand(node, 0).shape, activation(node, 0)[1].zero_point
    hot = operand(node, 1).shape[1 if node.int_attr("group", 1) == 1 else 0]
    geometry = struct(node, _window(node), x[0], x[1], whole_weight(node, 1, COLD), hot)
    return {**geometry, "x_zero": zero, **out_fields(node)}


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def line_bytes(win: Window) -> int:
    """Bytes of a padded line of the depthwise kernel: the taps of whole blocks, and loads of 4."""
    x = win.x
    last = (_up(x.out, BLOCK) - 1) * x.stride + (x.kernel - 1) * x.dilation
    return _up(max(last, x.begin + x.size - 1) + 8, 4)


def _line_by_line(node: Node) -> bool:
    """A depthwise layer whose lines are copied before the result's line is written there."""
    channels, filters = operand(node, 0).shape[1], whole_weight(node, 1, COLD)[0]
    return is_depthwise(node, channels, filters) and _window(node).keeps_size()


def _workspace(node: Node) -> int:
    """Depthwise: padded lines and the filter as int16; else taps of four pixels and of one."""
    w, win = whole_weight(node, 1, COLD), _window(node)
    if w[1] == 1:
        return win.y.kernel * (line_bytes(win) + _up(win.x.kernel, 4) * 2)
    return (BLOCK * 2 + 1) * _up(w[1] * win.y.kernel * win.x.kernel, 4)


# -- samples ---------------------------------------------------------------------------------------

#: A first layer with odd sizes, wide kernels along rows, pointwise with enough channels for blocks,
#: depthwise of sizes 3, 5 and 7 with strides 1 and 2, lines shorter than a block.
MORE: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Attr]], ...] = (
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
#: Hot and cold parts: those of ``conv``; pointwise, split at odd channels and at multiples of 4.
QPARTIAL: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...] = (
    *PARTIAL,
    (10, (9, 12, 1, 1), (9, 36, 1, 1)),
    (10, (9, 5, 1, 1), (9, 43, 1, 1)),
    (12, (6, 1, 1, 1), (6, 12, 1, 1)),
    (7, (9, 3, 1, 1), (9, 3, 1, 1)),
    (19, (1, 1, 9), (3, 1, 9)),
)
#: Result zero point, clamp, input zero point.
_RANGES: tuple[tuple[int, tuple[int, int], int], ...] = (
    (-5, (-128, 127), 3),
    (-128, (-128, 127), -128),
    (-100, (-100, 90), 60),
    (0, (-128, 127), 127),
)


def _samples() -> Iterator[Sample]:
    for i, (x, w, attrs) in enumerate((*CASES, *MORE)):
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
    for i, hot, cold in QPARTIAL:
        x, w, attrs = (*CASES, *MORE)[i]
        zero, clamp, x_zero = _RANGES[i % len(_RANGES)]
        outs = TensorType(w[:1], "i32")
        shift = 38 + int(np.log2(np.prod(w[1:])) / 2)
        yield Sample(
            (i8(x, 0.05, x_zero), i8(hot, 0.02), outs, outs, outs, i8(cold, 0.02)),
            {**attrs, "out_scale": 0.1, "out_zero_point": zero, "clamp": clamp},
            differentiable=(),
            ranges={2: (-3000, 3000), 3: (2**30, 2**31 - 1), 4: (shift - 1, shift + 2)},
        )


register(
    OpDef(
        name="QConv",
        infer=_infer,
        kernel=_kernel,
        work=_work,
        c=CKernel("odtplan_qconv", "odtplan_qconv_t", "odtplan_qconv", _c_params, operands=6),
        samples=_samples,
        vjp=_vjp,
        workspace=_workspace,
        inplace=(0,),
        can_be_inplace=_line_by_line,
        params=(
            ParamSlot(1, "weight", channel_axis=_channel_axis, cold_index=COLD),
            ParamSlot(2, "bias"),
        ),
    )
)
