"""Samples of a run-time input that is i8: how real numbers become its stored values."""

from __future__ import annotations

from .graph import Attr, Graph, Node, TensorType
from .quantization import HIGH, LOW


def quantizer(t: TensorType) -> Node | None:
    """The Quantize node from real samples to an input's type: nearest, ties to even, saturated.

    NumPy runs its kernel and C calls it, so both make the same samples.

    Args:
        t: Type of a run-time input.

    Returns:
        A node of a graph of its own; None: the input is not a quantized i8 tensor.
    """
    if t.dtype != "i8" or t.quant is None:
        return None
    graph = Graph("sample")
    x = graph.add_input("x", TensorType(t.shape))
    scale, zero = t.quant.scale[0], t.quant.zero_point
    attrs: dict[str, Attr] = {"out_scale": scale, "out_zero_point": zero, "clamp": (LOW, HIGH)}
    return graph.add_node("Quantize", (x,), attrs, name="quantize_sample", outputs=["stored"])
