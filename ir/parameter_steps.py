"""What the integers of a parameter mean: the real value of one stored step, per row.

Weights carry their scales in their type. A bias is i32 in steps of ``scale_x * scale_w`` of its
layer, which only the layer knows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .graph import Node, Value
from .opdef import ParamSlot, get_op
from .quantization import Quantization


def steps(node: Node, slot: ParamSlot) -> NDArray[np.float64]:
    """Real value of one stored step of an integer parameter, one per row of axis 0.

    Args:
        node: An integer layer.
        slot: A slot of it that holds a parameter.
    """
    v = _operand(node, slot.index)
    if slot.role == "weight":
        return _quant(v).scales(v.type.shape[0])
    rows = v.type.shape[0]
    (weight,) = (s for s in get_op(node.op).params if s.role == "weight")
    parts = [_operand(node, weight.index)]
    if weight.channel_axis(node) == 0 and weight.cold_index is not None:
        parts += [v for v in node.inputs[weight.cold_index :][:1] if v is not None]
    scales = np.concatenate([_quant(p).scales(p.type.shape[0]) for p in parts])
    assert scales.shape == (rows,), node.name
    return _quant(_operand(node, 0)).scale[0] * scales


def part(quant: Quantization | None, axis: int, begin: int, end: int) -> Quantization | None:
    """The meaning of the indices ``begin..end`` of an axis."""
    if quant is None or quant.axis != axis:
        return quant
    return Quantization(quant.scale[begin:end], quant.zero_point, axis)


def _quant(v: Value) -> Quantization:
    assert v.type.quant is not None, v.name
    return v.type.quant


def _operand(node: Node, index: int) -> Value:
    v = node.inputs[index]
    assert v is not None, (node.name, index)
    return v
