"""Convolution in one and two dimensions; its gradients are in ``conv_grad``.

Each result is one fp32 chain: the bias (or 0), then the taps in order (c, ky, kx). Taps in padding
are skipped. A partly updated weight comes in two operands, its hot leading channels ``w`` and the
frozen rest ``cold``: input channels where group is 1, whole filters where depthwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..axes import Tie
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import (
    CKernel,
    OpDef,
    ParamSlot,
    Sample,
    Work,
    array,
    f32_operand,
    operand,
    register,
)
from . import conv_work
from .window import Window, planes, window

if TYPE_CHECKING:
    from ..autodiff import GradBuilder


def _optional(node: Node, index: int) -> TensorType | None:
    v = node.inputs[index] if index < len(node.inputs) else None
    return None if v is None else v.type


def is_depthwise(node: Node, channels: int, filters: int) -> bool:
    """Whether every channel has one filter of its own."""
    group = node.int_attr("group", 1)
    return group > 1 and group == channels == filters


def full_weight(node: Node, w: int, cold: int) -> tuple[int, ...]:
    """Shape of the weight (operand ``w``) joined with its frozen rest (operand ``cold``).

    Raises:
        GraphError: The two do not fit together.
    """
    return joined_shape(node, f32_operand(node, w).shape, cold)


def joined_shape(node: Node, shape: tuple[int, ...], cold: int) -> tuple[int, ...]:
    """Shape of a weight of that shape joined with its frozen rest (operand ``cold``).

    Raises:
        GraphError: The two do not fit together.
    """
    rest = _optional(node, cold)
    if rest is None:
        return shape
    axis = 1 if node.int_attr("group", 1) == 1 else 0
    if len(shape) != len(rest.shape) or any(
        a != b for i, (a, b) in enumerate(zip(shape, rest.shape, strict=True)) if i != axis
    ):
        raise GraphError(f"weight {shape} and its frozen rest {rest.shape} do not fit together")
    return tuple(d + rest.shape[i] if i == axis else d for i, d in enumerate(shape))


def join(node: Node, w: Array, cold: Array | None) -> Array:
    """The whole weight."""
    if cold is None:
        return w
    return np.concatenate([w, cold], axis=1 if node.int_attr("group", 1) == 1 else 0)


def check_group(node: Node, channels: int, weight: Sequence[int]) -> None:
    """Raise GraphError unless the whole weight fits the input channels and the groups."""
    group = node.int_attr("group", 1)
    if group < 1 or weight[1] * group != channels or weight[0] % group:
        raise GraphError(
            f"weight {tuple(weight)} in {group} groups does not fit {channels} channels"
        )


def _geometry(node: Node) -> dict[str, Attr]:
    keys = ("strides", "pads", "dilations", "group")
    return {k: node.attrs[k] for k in keys if k in node.attrs}


def struct(
    node: Node, win: Window, batch: int, channels: int, weight: Sequence[int], hot: int
) -> dict[str, Attr]:
    """Fields of ``odtplan_conv_t``; see odtplan_conv.h."""
    return {
        "batch": batch,
        "channels": channels,
        "filters": weight[0],
        "group": node.int_attr("group", 1),
        "group_channels": weight[1],
        "hot": hot,
        **win.params(),
    }


# -- Conv ------------------------------------------------------------------------------------------


def _window(node: Node) -> Window:
    return window(node, operand(node, 0).shape[2:], operand(node, 1).shape[2:])


def _infer(node: Node) -> list[TensorType]:
    x, weight = f32_operand(node, 0), full_weight(node, 1, 3)
    if len(x.shape) != len(weight):
        raise GraphError(f"input {x} and weight {weight} differ in rank")
    check_group(node, x.shape[1], weight)
    bias = _optional(node, 2)
    if bias is not None and bias.shape != weight[:1]:
        raise GraphError(f"bias {bias} does not fit {weight[0]} filters")
    out = _window(node).out_shape(len(weight) - 2)
    return [TensorType((x.shape[0], weight[0], *out), x.dtype)]


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x, (b, cold) = array(inputs, 0), (*inputs[2:], None, None)[:2]
    weight, win, group = (
        join(node, array(inputs, 1), cold),
        _window(node),
        node.int_attr("group", 1),
    )
    filters, depth = weight.shape[0] // group, weight.shape[1]
    # axes: n, group, channel | filter of the group, y, x
    xs = planes(x).reshape(x.shape[0], group, depth, win.y.size, win.x.size)
    taps = weight.reshape(group, filters, depth, -1, 1, 1)
    y = np.zeros((x.shape[0], group, filters, win.y.out, win.x.out), x.dtype)
    if b is not None:
        y += b.reshape(group, filters, 1, 1)
    walk = [(tap, y[outs], xs[ins]) for tap, outs, ins in win.walk()]
    for c in range(depth):
        for tap, met, given in walk:
            met += given[:, :, c : c + 1] * taps[:, :, c, tap]
    return [y.reshape(node.out.type.shape)]


def _channel_axis(node: Node) -> int | None:
    if node.int_attr("group", 1) == 1:
        return 1
    filters = full_weight(node, 1, 3)[0]
    return 0 if is_depthwise(node, operand(node, 0).shape[1], filters) else None


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    x, w = node.inputs[:2]
    assert x is not None
    assert w is not None
    cold = node.inputs[3] if len(node.inputs) > 3 else None
    grads: list[Value | None] = [None] * len(node.inputs)
    geometry = _geometry(node)
    if need[0]:
        attrs = {**geometry, "shape": x.type.shape}
        grads[0] = b.add("ConvGradInput", (dy, w, cold), attrs, suffix="grad_input")
    if need[1]:
        shape, axis = list(w.type.shape), _channel_axis(node)
        if b.channels is not None and axis is not None:
            shape[axis] = b.channels
        attrs = {**geometry, "weight_shape": tuple(shape)}
        kept = b.kept_input(x, 1)
        op = {"f16": "HConvGradWeight", "i8": "QConvGradWeight"}.get(kept.type.dtype)
        grads[1] = b.add(op or "ConvGradWeight", (kept, dy), attrs, suffix="grad_weight")
    if len(need) > 2 and need[2]:
        grads[2] = b.add("ConvGradBias", (dy,), suffix="grad_bias")
    return grads


def _work(node: Node) -> tuple[Work, ...]:
    x, weight, hot = operand(node, 0).shape, full_weight(node, 1, 3), operand(node, 1).shape[1]
    win, group, depth = _window(node), node.int_attr("group", 1), weight[1]
    if is_depthwise(node, x[1], weight[0]):
        return conv_work.depthwise(win, False, x[0] * weight[0])
    depths = (hot, depth - hot) if 0 < hot < depth else (depth,)
    return conv_work.convolve(win, False, (weight[0] // group,), depths, x[0] * group)


def _c_params(node: Node) -> dict[str, Attr]:
    x, weight = operand(node, 0).shape, full_weight(node, 1, 3)
    hot = operand(node, 1).shape[1 if node.int_attr("group", 1) == 1 else 0]
    return struct(node, _window(node), x[0], x[1], weight, hot)


def _axes(node: Node) -> Iterator[Tie]:
    x, w, *bias = node.operands()
    made: Tie = ((node.out, 1), (w, 0), *((b, 0) for b in bias))
    yield (x, 0), (node.out, 0)
    if node.int_attr("group", 1) == 1:
        yield (x, 1), (w, 1)
        yield made
    elif x.type.shape[1] == w.type.shape[0] == node.int_attr("group"):
        yield (x, 1), *made


# -- samples ---------------------------------------------------------------------------------------

#: x, weight, attributes: plain, strided with uneven pads, dilated, grouped, depthwise, depthwise
#: strided, depth multiplier 2, pointwise, 1-D.
CASES: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Attr]], ...] = (
    ((1, 5, 6, 9), (6, 5, 3, 3), {"pads": (1, 1, 1, 1)}),
    ((2, 3, 7, 8), (5, 3, 3, 2), {"strides": (2, 2), "pads": (0, 1, 1, 2)}),
    ((1, 2, 9, 8), (4, 2, 3, 3), {"dilations": (2, 3), "pads": (2, 3, 2, 3)}),
    ((1, 4, 5, 5), (6, 2, 3, 3), {"group": 2, "strides": (2, 1)}),
    ((1, 5, 7, 8), (5, 1, 3, 3), {"group": 5, "pads": (1, 1, 1, 1)}),
    ((1, 3, 8, 9), (3, 1, 3, 3), {"group": 3, "strides": (2, 2), "pads": (0, 0, 1, 1)}),
    ((1, 2, 5, 6), (4, 1, 3, 3), {"group": 2}),
    ((2, 6, 3, 3), (9, 6, 1, 1), {}),
    ((2, 3, 12), (4, 3, 5), {"strides": (2,), "pads": (2, 1)}),
)
#: Hot and cold parts of the weights of a plain and of a depthwise case: 2 + 3 and 3 + 2 channels.
PARTIAL: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...] = (
    (0, (6, 2, 3, 3), (6, 3, 3, 3)),
    (4, (3, 1, 3, 3), (2, 1, 3, 3)),
)


def result_type(x: tuple[int, ...], w: tuple[int, ...], attrs: dict[str, Attr]) -> TensorType:
    """Type of the convolution of a case."""
    out = window(Node("Conv", "sample", (), (), attrs), x[2:], w[2:]).out_shape(len(x) - 2)
    return TensorType((x[0], w[0], *out))


def _samples() -> Iterator[Sample]:
    for i, (x, w, attrs) in enumerate(CASES):
        bias = TensorType(w[:1]) if i % 2 == 0 else None
        yield Sample((TensorType(x), TensorType(w), bias), attrs)
    for i, hot, cold in PARTIAL:
        x, w, attrs = CASES[i]
        types = (TensorType(x), TensorType(hot), TensorType(w[:1]), TensorType(cold))
        yield Sample(types, attrs, differentiable=(0, 1, 2))


register(
    OpDef(
        name="Conv",
        infer=_infer,
        kernel=_kernel,
        work=_work,
        c=CKernel("odtplan_conv_f32", "odtplan_conv_t", "odtplan_conv", _c_params, operands=4),
        samples=_samples,
        vjp=_vjp,
        params=(
            ParamSlot(1, "weight", _channel_axis, cold_index=3, compressible=True),
            ParamSlot(2, "bias"),
        ),
        axes=_axes,
    )
)
