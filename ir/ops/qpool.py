"""Integer pooling. Averages are ``sum of (x - zero point) * (multiplier / count)``, rounded once.

Averages of stored values end on half a step often (one of 16 over a 4x4 window without a change of
scale), so they round ties to even, as QuantizeLinear does; elsewhere a tie hardly ever happens.
The multiplier of ``scale_x / scale_y`` is divided by the number of elements of each window in
integers, rounded; its error stays below 2**-10 steps for windows up to 1024 elements. A maximum
keeps the quantization of its operand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, array, operand, register
from ..quantization import fixed_point
from .pool import CASES, input_window, maximum, pool_attrs, struct_of_input
from .qclip import through_clamp
from .qtypes import activation, clamped, i8, out_fields, result
from .window import planes

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

_SOURCE = "odtplan_qpool"


def _work(node: Node) -> Work:
    (n, c), win = operand(node, 0).shape[:2], input_window(node)
    return Work("pool", n * c * win.taps(), loops=n * c * win.lines(), dtype="i8")


def _shape(node: Node) -> tuple[int, ...]:
    x = operand(node, 0)
    return (*x.shape[:2], *input_window(node).out_shape(len(x.shape) - 2))


# -- QAveragePool ----------------------------------------------------------------------------------


def _factor(node: Node, count: int = 1) -> tuple[int, int]:
    return fixed_point(activation(node, 0)[1].scale[0] / (node.float_attr("out_scale") * count))


def _rounded(acc: Array, multiplier: Array, shift: int) -> Array:
    """``acc * multiplier / 2**shift`` to nearest, ties to even.

    A tie is what lies so near to half a step that the error of the multiplier decides.
    """
    half = acc * multiplier + (np.int64(1) << np.int64(shift - 1))
    low, high = ((half + d) >> np.int64(shift) for d in (-np.abs(acc), np.abs(acc)))
    return np.asarray(low + (low & (high - low)))


def _infer_average(node: Node) -> list[TensorType]:
    activation(node, 0)
    return [result(node, _shape(node))]


def _kernel_average(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    win = input_window(node)
    x = planes(array(inputs, 0)).astype(np.int64) - activation(node, 0)[1].zero_point
    acc = np.zeros((*x.shape[:2], win.y.out, win.x.out), np.int64)
    for _, outs, ins in win.walk():
        acc[outs] += x[ins]
    padded = bool(node.int_attr("count_include_pad", 0))
    counts = np.outer(win.y.counts(padded), win.x.counts(padded))
    multiplier, shift = _factor(node)
    shares = (multiplier + counts // 2) // counts
    return [clamped(node, _rounded(acc, shares, shift)).reshape(node.out.type.shape)]


def _vjp_average(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    if not need[0]:
        return [None]
    attrs = {**pool_attrs(node), "shape": operand(node, 0).shape}
    return [b.add("AveragePoolGrad", (through_clamp(b, node, dy),), attrs, suffix="grad_input")]


def _average_params(node: Node) -> dict[str, Attr]:
    multiplier, shift = _factor(node)
    return {
        **struct_of_input(node),
        "x_zero": activation(node, 0)[1].zero_point,
        "multiplier": multiplier,
        "shift": shift,
        **out_fields(node),
    }


# -- QGlobalAveragePool ----------------------------------------------------------------------------


def _infer_global(node: Node) -> list[TensorType]:
    x, _ = activation(node, 0)
    if len(x.shape) < 3:
        raise GraphError(f"input {x} has no spatial axis")
    if prod(x.shape[2:]) > 1 << 22:
        raise GraphError(f"input {x} has more than 2**22 elements per channel")
    return [result(node, (*x.shape[:2], *(1,) * (len(x.shape) - 2)))]


def _kernel_global(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x = array(inputs, 0)
    flat = x.reshape(x.shape[0] * x.shape[1], -1).astype(np.int64)
    acc = flat.sum(axis=1) - flat.shape[1] * activation(node, 0)[1].zero_point
    multiplier, shift = _factor(node, flat.shape[1])
    y = _rounded(acc, np.array(multiplier), shift)
    return [clamped(node, y).reshape(node.out.type.shape)]


def _vjp_global(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    if not need[0]:
        return [None]
    attrs: dict[str, Attr] = {"shape": operand(node, 0).shape}
    inputs = (through_clamp(b, node, dy),)
    return [b.add("GlobalAveragePoolGrad", inputs, attrs, suffix="grad_input")]


def _global_params(node: Node) -> dict[str, Attr]:
    x, quant = activation(node, 0)
    spatial = prod(x.shape[2:])
    multiplier, shift = _factor(node, spatial)
    return {
        "planes": x.shape[0] * x.shape[1],
        "spatial": spatial,
        "x_zero": quant.zero_point,
        "multiplier": multiplier,
        "shift": shift,
        **out_fields(node),
    }


# -- QMaxPool --------------------------------------------------------------------------------------


def _infer_max(node: Node) -> list[TensorType]:
    return [TensorType(_shape(node), "i8", activation(node, 0)[1])]


def _infer_index(node: Node) -> list[TensorType]:
    kernel = node.ints_attr("kernel_shape")
    if prod(kernel) > 256:
        raise GraphError(f"a window {kernel} has {prod(kernel)} taps; an index byte names 256")
    return [_infer_max(node)[0].with_dtype("u8")]


def _kernel_max(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    return [maximum(node, array(inputs, 0))[0].reshape(node.out.type.shape)]


def _kernel_index(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    return [maximum(node, array(inputs, 0))[1].astype(np.uint8).reshape(node.out.type.shape)]


def _vjp_max(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    x = node.inputs[0]
    assert x is not None
    if not need[0]:
        return [None]
    attrs = pool_attrs(node)
    index = b.aux("QMaxPoolIndex", (x,), attrs, suffix="index")
    grad_attrs = {**attrs, "shape": x.type.shape}
    return [b.add("MaxPoolGrad", (dy, index), grad_attrs, suffix="grad_input")]


# -- samples and records ---------------------------------------------------------------------------


def _samples_average() -> Iterator[Sample]:
    for x, attrs in CASES:
        for padded in (0, 1) if "pads" in attrs else (0,):
            out: dict[str, Attr] = {
                "out_scale": 0.03,
                "out_zero_point": -7,
                "clamp": (-100, 100) if padded else (-128, 127),
                "count_include_pad": padded,
            }
            yield Sample((i8(x, 0.05, 9),), {**attrs, **out})


def _samples_global() -> Iterator[Sample]:
    for shape in ((2, 3, 4, 5), (1, 4, 7), (1, 2, 1, 1)):
        for out in (0.05, 0.003, 2.0):
            yield Sample((i8(shape, 0.05, -3),), {"out_scale": out, "out_zero_point": 2})


def _samples_max() -> Iterator[Sample]:
    for x, attrs in CASES:
        yield Sample((i8(x, 0.05, 9),), attrs)


register(
    OpDef(
        name="QAveragePool",
        infer=_infer_average,
        kernel=_kernel_average,
        work=_work,
        c=CKernel("odtplan_qaverage_pool", "odtplan_qaverage_pool_t", _SOURCE, _average_params),
        samples=_samples_average,
        vjp=_vjp_average,
    )
)
register(
    OpDef(
        name="QGlobalAveragePool",
        infer=_infer_global,
        kernel=_kernel_global,
        work=lambda node: Work("pool", operand(node, 0).size, dtype="i8"),
        c=CKernel(
            "odtplan_qglobal_average_pool", "odtplan_qglobal_pool_t", _SOURCE, _global_params
        ),
        samples=_samples_global,
        vjp=_vjp_global,
    )
)
register(
    OpDef(
        name="QMaxPool",
        infer=_infer_max,
        kernel=_kernel_max,
        work=_work,
        c=CKernel("odtplan_qmax_pool", "odtplan_qmax_pool_t", _SOURCE, struct_of_input),
        samples=_samples_max,
        vjp=_vjp_max,
    )
)
register(
    OpDef(
        name="QMaxPoolIndex",
        infer=_infer_index,
        kernel=_kernel_index,
        work=_work,
        c=CKernel("odtplan_qmax_pool_index", "odtplan_qmax_pool_t", _SOURCE, struct_of_input),
        samples=_samples_max,
    )
)
