"""Activations kept for backward in half precision, and the gradients of weights that read them.

``ToHalf(x f32; axis, channels) -> f16`` rounds the leading channels to nearest, ties to even, and
saturates at the largest finite half; NaN stays NaN. ``HConvGradWeight(x f16, dy)`` and
``HGemmGradWeight(x f16, dy)`` are ``ConvGradWeight`` and ``GemmGradWeight`` of the widened x, bit
for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, operand, register
from . import conv_work
from .conv_grad import (
    check_grad_weight,
    grad_weight_params,
    grad_weight_samples,
    grad_weight_window,
    rows_grad_weight,
    runs_of_rows,
)
from .gemm import (
    grad_weight_product_params,
    grad_weight_product_samples,
    grad_weight_rows,
    grad_weight_type,
)

#: Largest finite half.
_LARGEST = 65504.0
_SOURCE = "odtplan_half"
#: Largest widened copy: of lines of the input, if more than one line fits, and of a plane.
_COPIED = 4096


def _half_operand(node: Node) -> TensorType:
    x = operand(node, 0)
    if x.dtype != "f16":
        raise GraphError(f"operand 0 is {x}; only f16 is supported here")
    return x


# -- ToHalf ----------------------------------------------------------------------------------------


def _infer(node: Node) -> list[TensorType]:
    shape, axis = list(f32_operand(node, 0).shape), node.int_attr("axis")
    channels = node.int_attr("channels")
    if not 0 <= axis < len(shape) or not 0 < channels <= shape[axis]:
        raise GraphError(f"{channels} channels on axis {axis} of {shape}")
    shape[axis] = channels
    return [TensorType(tuple(shape), "f16")]


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    leading = [slice(None)] * node.int_attr("axis") + [slice(node.int_attr("channels"))]
    x = array(inputs, 0)[tuple(leading)].astype(np.float32)
    nan = np.isnan(x)
    half = np.where(nan, np.float32(0), np.clip(x, -_LARGEST, _LARGEST)).astype(np.float16)
    return [np.where(nan, np.float16("nan"), half)]


def _c_params(node: Node) -> dict[str, Attr]:
    shape, axis = operand(node, 0).shape, node.int_attr("axis")
    inner = prod(shape[axis + 1 :])
    kept, whole = node.int_attr("channels") * inner, shape[axis] * inner
    return {"outer": prod(shape[:axis]), "kept": kept, "all": whole}


def _samples() -> Iterator[Sample]:
    for shape, axis, channels in (
        ((2, 5, 3, 3), 1, 5),
        ((2, 5, 3, 3), 1, 2),
        ((1, 4, 7), 1, 4),
        ((3, 2, 6), 2, 3),
        ((2, 9), 1, 1),
    ):
        attrs: dict[str, Attr] = {"axis": axis, "channels": channels}
        for bound in (8.0, 1e-4, 1e6):
            yield Sample((TensorType(shape),), attrs, (), low=-bound, high=bound)


register(
    OpDef(
        name="ToHalf",
        infer=_infer,
        kernel=_kernel,
        work=lambda node: Work("elementwise", node.out.type.size),
        c=CKernel("odtplan_to_half", "odtplan_to_half_t", _SOURCE, _c_params),
        samples=_samples,
    )
)


# -- gradient of the weight of a convolution -------------------------------------------------------


def _infer_conv(node: Node) -> list[TensorType]:
    x, dy = _half_operand(node), f32_operand(node, 1)
    return [TensorType(check_grad_weight(node, x, dy), dy.dtype)]


def _rows_conv(node: Node, inputs: Sequence[Array | None], begin: int, end: int) -> Array:
    dy = array(inputs, 1)
    return rows_grad_weight(node, (array(inputs, 0).astype(dy.dtype), dy), begin, end)


def _copy(node: Node) -> tuple[int, int]:
    """Lines and their length of the copy of a plane of a depthwise layer; 0, 0: none is made."""
    dy, depth = operand(node, 1), node.ints_attr("weight_shape")[1]
    win, group = grad_weight_window(node), node.int_attr("group", 1)
    if depth != 1 or dy.shape[1] != group or win.x.dilation != 1:
        return 0, 0
    lines, length = win.y.padded(), win.x.padded()
    return (lines, length) if lines * length * 4 <= _COPIED else (0, 0)


def _strip(node: Node) -> tuple[int, int]:
    """Lines of the result whose inputs are widened together, and the bytes of these inputs."""
    win = grad_weight_window(node)
    y, columns = win.y, conv_work.columns_of(node.ints_attr("weight_shape")[1])
    reach, line = (y.kernel - 1) * y.dilation + 1, columns * win.x.size * 4
    lines = max(1, min(y.out, (_COPIED // line - reach) // y.stride + 1))
    return lines, line * min(y.size, (lines - 1) * y.stride + reach)


def _workspace(node: Node) -> int:
    lines, length = _copy(node)
    return lines * length * 4 if lines else _strip(node)[1]


def _work_conv(node: Node, tile_rows: int = 0) -> tuple[Work, ...]:
    """Work of the gradient, in tiles of so many rows (0: all)."""
    shape, win = node.ints_attr("weight_shape"), grad_weight_window(node)
    batch, (lines, length) = operand(node, 0).shape[0], _copy(node)
    if lines:
        calls = -(-shape[0] // (tile_rows or shape[0]))
        return conv_work.depthwise_grad_weight(win, batch, shape[0], calls, lines * length)
    runs = runs_of_rows(node, tile_rows)
    return conv_work.grad_weight_strips(win, batch, runs, shape[1], _strip(node)[0])


def _c_params_conv(node: Node) -> dict[str, Attr]:
    geometry = {f"conv.{k}": v for k, v in grad_weight_params(node).items()}
    return {**geometry, "lines": _strip(node)[0], "copy": _copy(node)}


def _samples_conv() -> Iterator[Sample]:
    padded: dict[str, Attr] = {"pads": (1, 1, 1, 1)}
    in_strips: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Attr]], ...] = (
        ((2, 6, 20, 40), (5, 6, 3, 3), padded),
        ((1, 4, 33, 34), (5, 4, 3, 3), {**padded, "strides": (2, 2)}),
        ((1, 2, 34, 33), (2, 1, 3, 3), {**padded, "group": 2}),
        ((1, 5, 18, 60), (9, 5, 1, 1), {}),
    )
    yield from map(_halved, grad_weight_samples([(x, w, w, a) for x, w, a in in_strips]))


def _halved(sample: Sample) -> Sample:
    x, dy = sample.types
    assert x is not None
    return Sample((x.with_dtype("f16"), dy), sample.attrs, (), low=-0.1, high=0.1)


register(
    OpDef(
        name="HConvGradWeight",
        infer=_infer_conv,
        kernel=lambda node, inputs: [_rows_conv(node, inputs, 0, node.out.type.shape[0])],
        rows_kernel=_rows_conv,
        work=_work_conv,
        tiled_work=_work_conv,
        c=CKernel("odtplan_half_conv_grad_weight", "odtplan_half_conv_t", _SOURCE, _c_params_conv),
        samples=_samples_conv,
        workspace=_workspace,
    )
)


# -- gradient of a two-dimensional weight ----------------------------------------------------------


def _rows_gemm(node: Node, inputs: Sequence[Array | None], begin: int, end: int) -> Array:
    dy = array(inputs, 1)
    return grad_weight_rows(node, (array(inputs, 0).astype(dy.dtype), dy), begin, end)


def _work_gemm(node: Node) -> Work:
    """A row of the input is widened for every row of the result, or only an element of it."""
    (rows, outs), m = node.out.type.shape, prod(operand(node, 0).shape[:-1])
    widened = rows * m * (outs if node.int_attr("trans_b", 0) else 1)
    return Work("gemm_grad_weight", rows * outs * m, loops=rows * m, passes=widened)


register(
    OpDef(
        name="HGemmGradWeight",
        infer=lambda node: (grad_weight_type(node, _half_operand(node), f32_operand(node, 1)),),
        kernel=lambda node, inputs: (_rows_gemm(node, inputs, 0, node.out.type.shape[0]),),
        rows_kernel=_rows_gemm,
        work=_work_gemm,
        c=CKernel(
            "odtplan_half_gemm_grad_weight",
            "odtplan_gemm_t",
            _SOURCE,
            grad_weight_product_params,
        ),
        samples=lambda: map(_halved, grad_weight_product_samples()),
    )
)
