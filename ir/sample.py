"""Samples of the run-time inputs: their arrays, and how real numbers become stored i8 values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from .errors import UsageError
from .graph import Array, Attr, Graph, Node, TensorType, Value
from .quantization import HIGH, LOW

#: Arrays by name, or that of the only input.
Samples = ArrayLike | Mapping[str, Array]


def array_names(inputs: Sequence[Value]) -> tuple[str, ...]:
    """What arrays of samples are called: ``x``; by the names of the inputs where there are more."""
    return tuple(v.name for v in inputs) if len(inputs) > 1 else ("x",)


def by_input(inputs: Sequence[Value], x: Samples) -> list[tuple[str, Value, ArrayLike]]:
    """What each input gets, with the name of its array.

    Args:
        inputs: Those of a graph.
        x: Arrays by name; one array is that of the only input.

    Raises:
        UsageError: An array is missing, or belongs to no input.
    """
    return by_name(array_names(inputs), inputs, x, ("x", "samples", "the inputs"))


def by_name(
    names: Sequence[str], values: Sequence[Value], given: Samples, words: tuple[str, str, str]
) -> list[tuple[str, Value, ArrayLike]]:
    """What each of some run-time inputs gets, with the name of its array.

    Args:
        names: Of their arrays.
        values: The inputs.
        given: Arrays by name; one array is that of the only input.
        words: What one array is called; what arrays and inputs are called in messages.

    Raises:
        UsageError: An array is missing, or belongs to no input.
    """
    alone, what, whose = words
    arrays = given if isinstance(given, Mapping) else {alone: given}
    if set(arrays) != set(names):
        raise UsageError(
            f"{what} are given for {', '.join(arrays) or 'nothing'}, but {whose} are"
            f" {', '.join(names)}"
        )
    return [(name, v, arrays[name]) for name, v in zip(names, values, strict=True)]


def numbers_of(graph: Graph, value: Value, given: ArrayLike) -> Array:
    """An array for a run-time input; bool as 0 and 1 where the input is a mask.

    A mask is read by comparisons alone, see ``ir.onnx_flags``. Bool for anything else stays what it
    is, and is refused where numbers are wanted.
    """
    array = np.asarray(given)
    if array.dtype.kind != "b":
        return array
    readers = [n for n in graph.nodes if value in n.inputs]
    mask = bool(readers) and all(n.op == "Equal" for n in readers)
    return array.astype(np.uint8) if mask else array


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
