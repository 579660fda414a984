"""Boundaries between fp32 and i8, and elementwise integer operators: QAdd, Requantize.

``Quantize`` rounds ``x / scale`` to nearest, ties to even, in fp32 and saturates, as ONNX does; NaN
becomes the lower bound. Elementwise results are ``clamp(((sum of (x - zero point) * multiplier) +
2**(shift - 1)) >> shift) + zero point)`` with multipliers below 2**21, so that int32 holds the sum;
the multipliers follow from the scales in the types.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import frexp
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, operand, register
from ..quantization import HIGH, LOW
from .qclip import through_clamp
from .qtypes import SOURCE, activation, clamp_of, clamped, i8, out_fields, result

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

_BITS = 21
_SHAPES: tuple[tuple[int, ...], ...] = ((2, 3, 3, 3), (11,), (1, 8), ())


def short_factors(*reals: float) -> tuple[tuple[int, ...], int]:
    """Factors as ``multiplier / 2**shift`` with one shift and multipliers of at most 21 bits.

    Times the 9 bits of a stored value less its zero point, two of them fit int32; the error of a
    result is below 2**-12 steps.

    Raises:
        GraphError: A factor is 2**20 or more.
    """
    shift = min(30, _BITS - frexp(max(reals))[1])
    if shift < 1:
        raise GraphError(f"factor {max(reals):.6g} between scales is 2**20 or more")
    return tuple(min(round(r * 2**shift), 2**_BITS - 1) for r in reals), shift


# -- Quantize, Dequantize --------------------------------------------------------------------------


def _kernel_quantize(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x = array(inputs, 0).astype(np.float32)
    low, high = (np.float32(v - node.int_attr("out_zero_point")) for v in clamp_of(node))
    with np.errstate(all="ignore"):
        steps = x / np.float32(node.float_attr("out_scale"))
    steps = np.where(steps > low, steps, low)  # NaN is not above
    steps = np.rint(np.where(steps < high, steps, high))
    return [clamped(node, steps.astype(np.int32))]


def _straight(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    return [through_clamp(b, node, dy) if need[0] else None]


def _quantize_params(node: Node) -> dict[str, Attr]:
    scale = node.float_attr("out_scale")
    return {"count": operand(node, 0).size, "scale": scale, **out_fields(node)}


def _samples_quantize() -> Iterator[Sample]:
    for shape in _SHAPES:
        for zero, clamp in ((-128, (-128, 127)), (3, (-128, 127)), (0, (-50, 60))):
            attrs: dict[str, Attr] = {"out_scale": 0.05, "out_zero_point": zero, "clamp": clamp}
            yield Sample((TensorType(shape),), attrs, differentiable=(), low=-8.0, high=8.0)


register(
    OpDef(
        name="Quantize",
        infer=lambda node: [result(node, f32_operand(node, 0).shape)],
        kernel=_kernel_quantize,
        work=lambda node: Work("elementwise", operand(node, 0).size, dtype="i8"),
        c=CKernel("odtplan_quantize", "odtplan_quantize_t", SOURCE, _quantize_params),
        samples=_samples_quantize,
        vjp=_straight,
    )
)


def _kernel_dequantize(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    _, quant = activation(node, 0)
    steps = array(inputs, 0).astype(np.float32) - np.float32(quant.zero_point)
    return [steps * np.float32(quant.scale[0])]


def _dequantize_params(node: Node) -> dict[str, Attr]:
    x, quant = activation(node, 0)
    return {"count": x.size, "x_zero": quant.zero_point, "scale": quant.scale[0]}


register(
    OpDef(
        name="Dequantize",
        infer=lambda node: [activation(node, 0)[0].with_dtype("f32")],
        kernel=_kernel_dequantize,
        work=lambda node: Work("elementwise", operand(node, 0).size, dtype="i8"),
        c=CKernel("odtplan_dequantize", "odtplan_dequantize_t", SOURCE, _dequantize_params),
        samples=lambda: iter([Sample((i8(s, 0.013, z),)) for s in _SHAPES for z in (-128, 5)]),
        vjp=lambda _b, _node, dy, need: [dy if need[0] else None],
    )
)


# -- Requantize, QAdd ------------------------------------------------------------------------------


def _factors(node: Node, count: int) -> tuple[tuple[int, ...], int]:
    scales = [activation(node, i)[1].scale[0] for i in range(count)]
    return short_factors(*(s / node.float_attr("out_scale") for s in scales))


def _infer_elementwise(node: Node) -> list[TensorType]:
    shapes = {activation(node, i)[0].shape for i in range(len(node.inputs))}
    if len(shapes) != 1:
        raise GraphError(f"operands of the shapes {sorted(shapes)} must be of one shape")
    _factors(node, len(node.inputs))
    return [result(node, shapes.pop())]


def _kernel_elementwise(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    multipliers, shift = _factors(node, len(inputs))
    acc = np.asarray(np.int64(1) << (shift - 1))
    for i, m in enumerate(multipliers):
        acc = acc + (array(inputs, i).astype(np.int64) - activation(node, i)[1].zero_point) * m
    return [clamped(node, np.asarray(acc >> shift))]


def _elementwise_params(node: Node) -> dict[str, Attr]:
    fields: dict[str, Attr] = {"count": node.out.type.size}
    multipliers, shift = _factors(node, len(node.inputs))
    for i, (name, m) in enumerate(zip("ab", multipliers, strict=False)):
        fields |= {f"{name}_zero": activation(node, i)[1].zero_point, f"{name}_multiplier": m}
    return {**fields, "shift": shift, **out_fields(node)}


def _vjp_elementwise(
    b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    if not any(need):
        return [None] * len(node.inputs)
    masked = through_clamp(b, node, dy)
    return [masked if n else None for n in need]


def _samples_requantize() -> Iterator[Sample]:
    for shape in _SHAPES:
        for scale, out, zero, clamp in (
            (0.05, 0.08, 4, (-128, 127)),
            (0.05, 0.01, -128, (-100, 100)),
            (0.05, 0.05, 3, (-20, 20)),
            (1e-9, 1.0, 0, (LOW, HIGH)),
        ):
            attrs: dict[str, Attr] = {"out_scale": out, "out_zero_point": zero, "clamp": clamp}
            yield Sample((i8(shape, scale, 3),), attrs)


def _samples_add() -> Iterator[Sample]:
    for shape in _SHAPES:
        for a, b, out, clamp in (
            (0.05, 0.04, 0.07, (-128, 127)),
            (0.5, 0.0001, 0.1, (-128, 50)),
            (3e-8, 0.02, 0.02, (-90, 50)),
        ):
            attrs: dict[str, Attr] = {"out_scale": out, "out_zero_point": -9, "clamp": clamp}
            yield Sample((i8(shape, a, 3), i8(shape, b, -128)), attrs)


register(
    OpDef(
        name="Requantize",
        infer=_infer_elementwise,
        kernel=_kernel_elementwise,
        work=lambda node: Work("elementwise", node.out.type.size, dtype="i8"),
        c=CKernel("odtplan_requantize", "odtplan_requantize_t", SOURCE, _elementwise_params),
        samples=_samples_requantize,
        vjp=_vjp_elementwise,
        inplace=(0,),
    )
)
register(
    OpDef(
        name="QAdd",
        infer=_infer_elementwise,
        kernel=_kernel_elementwise,
        work=lambda node: Work("elementwise", node.out.type.size, dtype="i8"),
        c=CKernel("odtplan_qadd", "odtplan_qadd_t", SOURCE, _elementwise_params),
        samples=_samples_add,
        vjp=_vjp_elementwise,
        inplace=(0, 1),
    )
)
