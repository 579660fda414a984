"""What the integer operators share: types with a quantization, factors, clamping.

Activations are i8 with one scale and a zero point, weights i8 with zero point 0, biases and
accumulators i32. A result is ``clamp(((acc * multiplier + 2**(shift - 1)) >> shift) + zero point)``
with a 64-bit product (``ir.quantization.rescale``). Gradients are straight-through: fp32, with
respect to the real values; ``qclip`` tells what becomes of them at the clamp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Graph, Node, TensorType, Value
from ..opdef import operand
from ..quantization import HIGH, LOW, Quantization

SOURCE = "odtplan_q"
#: Largest product of a stored activation less its zero point and a weight.
LARGEST_PRODUCT = 255 * 128
INT32 = range(-(2**31), 2**31)


def quantization_of(t: TensorType, index: int) -> Quantization:
    """Quantization of an operand's type.

    Raises:
        GraphError: It has none.
    """
    if t.dtype != "i8" or t.quant is None:
        raise GraphError(f"operand {index} is {t}; a quantized i8 tensor is needed here")
    return t.quant


def activation(node: Node, index: int) -> tuple[TensorType, Quantization]:
    """Type and quantization of an operand that is a quantized activation.

    Raises:
        GraphError: It is missing, not i8, or has several scales.
    """
    t = operand(node, index)
    quant = quantization_of(t, index)
    if quant.axis is not None:
        raise GraphError(f"operand {index} has {quant}; an activation has one scale")
    return t, quant


def weight(node: Node, index: int) -> tuple[TensorType, Quantization]:
    """Type and quantization of an operand that is a quantized weight, output channels first.

    Raises:
        GraphError: It is missing, not i8, not symmetric, or its scales run along another axis.
    """
    t = operand(node, index)
    quant = quantization_of(t, index)
    if quant.zero_point != 0 or quant.axis not in (None, 0):
        raise GraphError(
            f"weight (operand {index}) has {quant}; it needs the zero point 0 and scales on axis 0"
        )
    return t, quant


def check_factors(node: Node, first: int, channels: int) -> None:
    """Raise GraphError unless operands first - 1 .. first + 1 are bias, multipliers and shifts."""
    for i, name in ((first - 1, "bias"), (first, "multipliers"), (first + 1, "shifts")):
        v = node.inputs[i] if i < len(node.inputs) else None
        if v is None and name == "bias":
            continue
        t = operand(node, i)
        if t.dtype != "i32" or t.shape != (channels,):
            raise GraphError(f"{name} (operand {i}) {t} must be i32[{channels}]")


def check_depth(terms: int) -> None:
    """Raise GraphError if a sum of that many products could leave int32, bias aside."""
    if terms * LARGEST_PRODUCT > 2**30:
        raise GraphError(f"{terms} products per result can overflow the int32 accumulator")


def result(node: Node, shape: Sequence[int]) -> TensorType:
    """Type of a result with attributes ``out_scale``, ``out_zero_point`` and ``clamp``.

    Raises:
        GraphError: The clamp bounds are not inside i8 or in the wrong order.
    """
    low, high = clamp_of(node)
    if not LOW <= low <= high <= HIGH:
        raise GraphError(f"clamp bounds {low}, {high} are not an interval of {LOW}..{HIGH}")
    quant = Quantization((node.float_attr("out_scale"),), node.int_attr("out_zero_point"))
    return TensorType(tuple(shape), "i8", quant)


def clamp_of(node: Node) -> tuple[int, int]:
    """Clamp bounds of the stored result."""
    low, high = node.ints_attr("clamp", (LOW, HIGH))
    return low, high


def clamped(node: Node, y: Array) -> Array:
    """Add the result's zero point, clamp, store."""
    low, high = clamp_of(node)
    return np.asarray(np.clip(y + node.int_attr("out_zero_point"), low, high), np.int8)


def out_fields(node: Node) -> dict[str, Attr]:
    """The fields of the result that the C structs share."""
    low, high = clamp_of(node)
    return {"y_zero": node.int_attr("out_zero_point"), "low": low, "high": high}


def check_accumulators(node: Node, acc: Array) -> None:
    """Raise GraphError where an accumulator does not fit int32: the bias is too large."""
    if acc.size and (acc.min() < INT32[0] or acc.max() > INT32[-1]):
        raise GraphError(f"node {node.name}: accumulators overflow int32; its bias is too large")


def exact_dtype(terms: int) -> np.dtype[Any]:
    """The float dtype in which a sum of that many products is exact, so that BLAS can do it."""
    return np.dtype(np.float32 if terms * LARGEST_PRODUCT < 2**24 else np.float64)


def scales_constant(graph: Graph, w: Value, rest: Value | None = None) -> Value:
    """A weight's scales, one per row, as an fp32 constant of the training graph, made once.

    Args:
        graph: The training graph.
        w: Weight, output channels first.
        rest: More output channels, which come behind those of ``w``.
    """
    parts = [w] if rest is None else [w, rest]
    name = f"{'+'.join(v.name for v in parts)}/scale"
    if name in graph.values:
        return graph.values[name]
    scales = [quantization_of(v.type, 1).scales(v.type.shape[0]) for v in parts]
    return graph.add_constant(name, np.concatenate(scales).astype(np.float32))


def i8(
    shape: Sequence[int], scale: float | Sequence[float] = 0.05, zero_point: int = 0
) -> TensorType:
    """A quantized type, for samples; several scales run along axis 0."""
    if isinstance(scale, float):
        return TensorType(tuple(shape), "i8", Quantization((scale,), zero_point))
    return TensorType(tuple(shape), "i8", Quantization(tuple(scale), 0, 0))
