"""Transposed convolution in one and two dimensions.

It is the gradient of a convolution's input (Dumoulin and Visin 2016, section 4): ``y`` has the
shape of that convolution's input, ``x`` that of its result, and the weight ``[channels of x,
channels of y / group, kernel...]`` is its weight as it stands. So the gradient of ``x`` is the
convolution of ``dy``, and the weight's gradient is the convolution's with ``dy`` as the input.

Each result is one fp32 chain: the bias (or 0), then the taps in order (channel of x, ky, kx).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..axes import Tie
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, ParamSlot, Sample, Work, array, f32_operand, operand, register
from . import conv_work
from .conv import is_depthwise, struct
from .conv_grad import spread
from .window import Window, window

if TYPE_CHECKING:
    from ..autodiff import GradBuilder

T = TensorType


def _convolution(node: Node) -> dict[str, Attr]:
    """Attributes of the convolution whose input's gradient this is.

    Of its pads only those in front place the taps. Those behind are chosen such that it has as
    many windows as ``x`` has elements: output padding is input that its windows do not reach.
    """
    x, kernel = operand(node, 0).shape[2:], operand(node, 1).shape[2:]
    rank = len(x)
    strides = node.ints_attr("strides", (1,) * rank)
    pads = node.ints_attr("pads", (0,) * (2 * rank))
    extra = node.ints_attr("output_padding", (0,) * rank)
    if not len(kernel) == len(strides) == len(pads) // 2 == len(extra) == rank:
        raise GraphError(
            f"kernel {kernel}, strides {strides}, pads {pads}, output_padding {extra}"
            f" do not fit {rank} spatial axes"
        )
    if min(extra, default=0) < 0:
        raise GraphError(f"output_padding {extra} is negative")
    ends = tuple(max(0, e - o) for e, o in zip(pads[rank:], extra, strict=True))
    keys = ("strides", "dilations", "group")
    attrs: dict[str, Attr] = {k: node.attrs[k] for k in keys if k in node.attrs}
    return {**attrs, "pads": (*pads[:rank], *ends)}


def result_shape(node: Node) -> tuple[int, ...]:
    """Shape of the result.

    Raises:
        GraphError: Operands and attributes do not fit, or the result is empty.
    """
    x, weight, group = operand(node, 0).shape, operand(node, 1).shape, node.int_attr("group", 1)
    if len(x) != len(weight) or group < 1 or x[1] != weight[0] or x[1] % group:
        raise GraphError(f"input {x} and weight {weight} in {group} groups do not fit")
    rank = len(x) - 2
    strides = node.ints_attr("strides", (1,) * rank)
    dilations = node.ints_attr("dilations", (1,) * rank)
    pads = node.ints_attr("pads", (0,) * (2 * rank))
    extra = node.ints_attr("output_padding", (0,) * rank)
    _convolution(node)
    if len(dilations) != rank:
        raise GraphError(f"dilations {dilations} do not fit {rank} spatial axes")
    spatial = tuple(
        strides[i] * (x[2 + i] - 1)
        + dilations[i] * (weight[2 + i] - 1)
        + 1
        + extra[i]
        - pads[i]
        - pads[rank + i]
        for i in range(rank)
    )
    if min(spatial, default=1) < 1:
        raise GraphError(f"pads {pads} leave nothing of the result")
    return (x[0], weight[1] * group, *spatial)


def _window(node: Node) -> Window:
    """Window of the convolution."""
    shape = result_shape(node)
    conv = Node("Conv", node.name, (), (), _convolution(node))
    win = window(conv, shape[2:], operand(node, 1).shape[2:])
    if win.out_shape(len(shape) - 2) != operand(node, 0).shape[2:]:
        raise GraphError(
            f"output_padding {node.ints_attr('output_padding', ())} is not smaller than the stride"
        )
    return win


def _infer(node: Node) -> list[TensorType]:
    x, _ = f32_operand(node, 0), f32_operand(node, 1)
    shape = result_shape(node)
    _window(node)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = f32_operand(node, 2)
        if bias.shape != shape[1:2]:
            raise GraphError(f"bias {bias} does not fit {shape[1]} channels")
    return [T(shape, x.dtype)]


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x, w, bias = array(inputs, 0), array(inputs, 1), inputs[2] if len(inputs) > 2 else None
    return [spread(_window(node), node.int_attr("group", 1), x, w, node.out.type.shape, bias)]


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    x, w = node.inputs[:2]
    assert x is not None
    assert w is not None
    attrs = _convolution(node)
    grads: list[Value | None] = [None] * len(node.inputs)
    if need[0]:
        grads[0] = b.add("Conv", (dy, w), attrs, suffix="grad_input")
    if need[1]:
        shape: dict[str, Attr] = {"weight_shape": w.type.shape}
        grads[1] = b.add("ConvGradWeight", (dy, x), {**attrs, **shape}, suffix="grad_weight")
    if len(need) > 2 and need[2]:
        grads[2] = b.add("ConvGradBias", (dy,), suffix="grad_bias")
    return grads


def _work(node: Node) -> tuple[Work, ...]:
    """As the gradient of a convolution's input, whose C kernel does it."""
    return tuple(replace(w, operator="ConvGradInput") for w in _parts(node))


def _parts(node: Node) -> tuple[Work, ...]:
    shape, weight, win = node.out.type.shape, operand(node, 1).shape, _window(node)
    group = node.int_attr("group", 1)
    if is_depthwise(node, shape[1], weight[0]):
        return conv_work.depthwise(win, True, shape[0] * weight[0])
    filters = weight[0] // group
    return conv_work.convolve(win, True, (weight[1],), (filters,), shape[0] * group)


def _params(node: Node) -> dict[str, Attr]:
    shape, weight = node.out.type.shape, operand(node, 1).shape
    return struct(node, _window(node), shape[0], shape[1], weight, weight[1])


#: x, weight, attributes: doubled (kernel 2 and 4), padded output, dilated, grouped, depthwise,
#: windows that leave gaps, 1-D.
CASES: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Attr]], ...] = (
    ((1, 5, 3, 4), (5, 6, 2, 2), {"strides": (2, 2)}),
    ((2, 3, 4, 3), (3, 5, 4, 4), {"strides": (2, 2), "pads": (1, 1, 1, 1)}),
    (
        (1, 4, 4, 5),
        (4, 4, 3, 3),
        {"strides": (2, 3), "pads": (1, 0, 1, 2), "output_padding": (1, 2)},
    ),
    ((1, 2, 5, 4), (2, 3, 3, 2), {"dilations": (2, 3), "pads": (2, 1, 0, 1)}),
    ((1, 4, 3, 4), (4, 3, 3, 3), {"group": 2, "strides": (2, 1), "pads": (1, 1, 1, 1)}),
    ((1, 5, 4, 6), (5, 1, 3, 3), {"group": 5, "strides": (2, 2), "pads": (1, 1, 0, 0)}),
    ((1, 3, 3, 2), (3, 4, 1, 2), {"strides": (3, 3)}),
    ((2, 6, 3, 3), (6, 9, 1, 1), {}),
    ((2, 4, 7), (4, 3, 5), {"strides": (2,), "pads": (2, 1), "output_padding": (1,)}),
)


def _samples() -> Iterator[Sample]:
    for i, (x, w, attrs) in enumerate(CASES):
        group = attrs.get("group", 1)
        assert isinstance(group, int)
        bias = T((w[1] * group,)) if i % 2 == 0 else None
        yield Sample((T(x), T(w), bias), attrs)


def _axes(node: Node) -> Iterator[Tie]:
    x, w, *bias = node.operands()
    made = ((node.out, 1), *((b, 0) for b in bias))
    yield (x, 0), (node.out, 0)
    if node.int_attr("group", 1) == 1:
        yield (x, 1), (w, 0)
        yield *made, (w, 1)
    elif x.type.shape[1] == node.out.type.shape[1] == node.int_attr("group"):
        yield (x, 1), (w, 0), *made


register(
    OpDef(
        name="ConvTranspose",
        infer=_infer,
        kernel=_kernel,
        work=_work,
        c=CKernel("odtplan_conv_transpose_f32", "odtplan_conv_t", "odtplan_conv", _params),
        samples=_samples,
        vjp=_vjp,
        params=(ParamSlot(1, "weight"), ParamSlot(2, "bias")),
        axes=_axes,
    )
)
