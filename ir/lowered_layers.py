"""Which layers have a twin on i8 activations, and the integer constants of those that do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from .errors import GraphError, UsageError
from .graph import Attr, Graph, Node, Value
from .quantization import HIGH, LOW, Quantization, fixed_points

#: Float operator -> integer operator.
INTEGER: dict[str, str] = {
    "Add": "QAdd",
    "AveragePool": "QAveragePool",
    "Clip": "Requantize",
    "Conv": "QConv",
    "Gemm": "QGemm",
    "GlobalAveragePool": "QGlobalAveragePool",
    "MatMul": "QGemm",
    "MaxPool": "QMaxPool",
    "ReduceMean": "QAveragePool",
    "Relu": "Requantize",
}
#: Operator with weights -> the same between i8 activations, weights and arithmetic in f32.
MIXED: dict[str, str] = {"Conv": "MixedConv", "Gemm": "MixedGemm", "MatMul": "MixedGemm"}
#: Layers that can take the Relu or Clip behind them.
FUSING = ("Add", "AveragePool", "Conv", "Gemm", "GlobalAveragePool", "MatMul", "ReduceMean")
#: Operators whose result holds nothing that was not in operand 0.
KEEPING = ("MaxPool", "Reshape", "Slice", "Transpose")
_ACC_MAX = 2**31 - 1
#: Largest number of products of a sum that leaves half of the accumulator to the bias.
MAX_TERMS = 2**30 // (255 * 128)
#: Steps of the result that the saturation of a bias may change.
_BIAS_TOLERANCE = 0.01


@dataclass(frozen=True, eq=False)
class IntegerConstants:
    """Constants of an integer convolution or matrix product.

    Attributes:
        weight: i8, output channels first.
        quant: Its meaning.
        bias: i32 per output channel, in steps of the accumulator.
        multiplier: i32 per output channel.
        shift: i32 per output channel.
    """

    weight: NDArray[np.int8]
    quant: Quantization
    bias: NDArray[np.int32]
    multiplier: NDArray[np.int32]
    shift: NDArray[np.int32]


def keeps(node: Node, quant: Quantization) -> bool:
    """The result holds only what operand 0 holds, or what this quantization stores exactly."""
    if node.op == "Pad":
        value = np.array(node.float_attr("value", 0.0), np.float32)
        return bool(quant.dequantize(quant.quantize(value)) == value)
    return node.op in KEEPING


def follower_of(graph: Graph, node: Node, readers: Mapping[Value, list[Node]]) -> Node | None:
    """The Relu or Clip that becomes the clamp of a layer."""
    y = node.out
    if node.op not in FUSING or y.name in graph.quantization or y in graph.outputs:
        return None
    if len(readers[y]) != 1 or readers[y][0].op not in ("Relu", "Clip"):
        return None
    return readers[y][0]


def clamp_of(node: Node, quant: Quantization) -> tuple[int, int]:
    """Bounds of the stored result: those of a Relu or Clip, else the whole range."""
    low, high = -inf, inf
    if node.op == "Relu":
        low = 0.0
    elif node.op == "Clip":
        low, high = node.float_attr("min", -inf), node.float_attr("max", inf)
    bounds = quant.quantize(np.array([low, high], np.float64))
    return int(bounds[0]), int(bounds[1])


def out_axis(node: Node) -> int:
    """Axis of the weight that runs over output channels."""
    return 0 if node.op == "Conv" or node.int_attr("trans_b", 0) else 1


def obstacle(graph: Graph, node: Node, follower: Node | None) -> str | None:
    """Why a layer can't be computed with integers; None if it can."""
    last = node if follower is None else follower
    product = node.op in MIXED
    operands = list(node.operands())[: 1 if product else None]
    unknown = _range_obstacle(graph, operands, last)
    if unknown is not None:
        return unknown
    if product:
        return _operand_obstacle(graph, node) or _product_obstacle(graph, node, last)
    if node.op == "Add" and len({v.type.shape for v in (*operands, node.out)}) != 1:
        return "it broadcasts an operand"
    before, after = graph.quantization[operands[0].name], graph.quantization[last.out.name]
    if node.op == "MaxPool" and before != after:
        return "its operand and result differ in scale, which a maximum keeps"
    if node.op == "ReduceMean":
        rank, axes = len(operands[0].type.shape), node.ints_attr("axes")
        if rank not in (3, 4) or axes not in {tuple(range(i, rank)) for i in range(2, rank)}:
            return f"a mean over the axes {list(axes)} of {operands[0].type} is not a pool"
    return None


def mixed_obstacle(graph: Graph, node: Node, follower: Node | None) -> str | None:
    """Why a layer with weights can't be computed in f32 between i8 activations; None if it can."""
    last = node if follower is None else follower
    operands = list(node.operands())[:1]
    return _range_obstacle(graph, operands, last) or _operand_obstacle(graph, node)


def _range_obstacle(graph: Graph, operands: Sequence[Value], last: Node) -> str | None:
    """Why these operands and the result of a layer can't be stored as i8."""
    for v, what in [*((v, "operand") for v in operands), (last.out, "result")]:
        quant = graph.quantization.get(v.name)
        if quant is None:
            return f"the range of its {what} {v.name} is not known"
        if quant.axis is not None:
            return f"its {what} {v.name} has {quant}, an activation needs one"
    return None


def _operand_obstacle(graph: Graph, node: Node) -> str | None:
    """Why a product is none of an activation by constants."""
    x, w = node.inputs[0], node.inputs[1]
    assert x is not None
    assert w is not None
    if w.name not in graph.constants:
        return f"its weight {w.name} is computed"
    if node.op != "Conv" and (len(x.type.shape) != 2 or len(w.type.shape) != 2):
        return f"its operands {x.type} and {w.type} are not matrices"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and (bias.name not in graph.constants or len(bias.type.shape) != 1):
        return f"its bias {bias.name} is computed or not one number per channel"
    return None


def _product_obstacle(graph: Graph, node: Node, last: Node) -> str | None:
    """Why the constants of a product have no integer form."""
    w = node.inputs[1]
    assert w is not None
    quant, axis = graph.quantization.get(w.name), out_axis(node)
    if quant is None:
        return f"its weight {w.name} has no scales"
    if quant.zero_point != 0:
        return f"its weight {w.name} has the zero point {quant.zero_point}; i8 weights need 0"
    if quant.axis not in (None, axis):
        return f"the scales of its weight {w.name} run along axis {quant.axis}, not {axis}"
    terms = w.type.size // w.type.shape[axis]
    if terms > MAX_TERMS:
        return f"{terms} products per result can overflow the accumulator"
    result = graph.quantization[last.out.name]
    attrs: dict[str, Attr] = {"out_scale": result.scale[0], "out_zero_point": result.zero_point}
    try:
        bias_and_factors(graph, node, attrs)
    except (GraphError, UsageError) as e:
        return str(e)
    return None


def bias_and_factors(graph: Graph, node: Node, attrs: Mapping[str, Attr]) -> IntegerConstants:
    """Integer constants of an annotated Conv, Gemm or MatMul.

    Args:
        graph: The annotated graph.
        node: A layer whose operand and weight are annotated.
        attrs: ``out_scale``, ``out_zero_point`` and, where known, ``clamp`` of the result.

    Raises:
        UsageError: The accumulator can't hold the bias, and cutting it would change results.
    """
    x, w = node.inputs[0], node.inputs[1]
    assert x is not None
    assert w is not None
    x_quant, w_quant, axis = graph.quantization[x.name], graph.quantization[w.name], out_axis(node)
    stored = np.moveaxis(w_quant.quantize(graph.constants[w.name]), axis, 0)
    channels = stored.shape[0]
    quant = Quantization(w_quant.scale, 0, None if w_quant.axis is None else 0)
    steps = x_quant.scale[0] * quant.scales(channels)
    out_scale = attrs["out_scale"]
    assert isinstance(out_scale, float)
    factors = steps / out_scale
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    wanted = np.zeros(channels)
    if bias_value is not None:
        data = graph.constants[bias_value.name].astype(np.float64)
        wanted = np.rint(np.broadcast_to(data, (channels,)) / steps)
    largest = max(HIGH - x_quant.zero_point, x_quant.zero_point - LOW)
    reach = np.abs(stored.reshape(channels, -1).astype(np.int64)).sum(axis=1) * largest
    widest = stored.size // channels * -LOW * largest  # of any weights that training may come to
    bias = np.clip(wanted, widest - 2**31, _ACC_MAX - widest)
    _check_cut(bias, wanted, reach, factors, attrs, node)
    multiplier, shift = fixed_points(factors)
    return IntegerConstants(
        np.ascontiguousarray(stored), quant, bias.astype(np.int32), multiplier, shift
    )


def _check_cut(
    bias: NDArray[np.float64],
    wanted: NDArray[np.float64],
    reach: NDArray[np.int64],
    factors: NDArray[np.float64],
    attrs: Mapping[str, Attr],
    node: Node,
) -> None:
    """Refuse a bias that int32 can't hold, unless the result is at its bounds either way."""
    zero = attrs["out_zero_point"]
    assert isinstance(zero, int)
    low, high = (LOW - zero, HIGH - zero)
    moved = np.abs(bias - wanted) * factors > _BIAS_TOLERANCE
    below = np.maximum(bias, wanted) + reach
    above = np.minimum(bias, wanted) - reach
    free = moved & (below * factors > low) & (above * factors < high)
    if free.any():
        c = int(np.flatnonzero(free)[0])
        raise UsageError(
            f"its bias of channel {c} is {wanted[c]:.4g} steps of the accumulator, more than int32"
            f" holds beside the products ({node.name})"
        )
