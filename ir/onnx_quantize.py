"""Conversion of quantized models: 8-bit integers of the file become annotated real values.

The forward graph computes with real numbers. A QuantizeLinear annotates the value that it reads,
DequantizeLinear gives it back, and what moves integers between them moves real numbers. Where the
quantization itself is a function of the network (it cuts off at 0, or a value is quantized twice
with different parameters) a Clip is written.
"""

from __future__ import annotations

from collections import deque
from math import inf

import numpy as np

from .graph import Graph, TensorType, Value
from .lowered_layers import KEEPING, keeps
from .obstacles import Obstacle
from .onnx_convert import Conversion, RejectedError, Site
from .onnx_file import INPUT_KINDS, FileNode, ModelFile
from .qdq import (
    STORED,
    QuantizationError,
    Stored,
    check_stored,
    dequantization,
    read_quantization,
)
from .quantization import LOW, Quantization

#: Operators of the file that work on 8-bit integers as they do on the real numbers.
MOVES = frozenset(
    {
        "Concat",
        "DepthToSpace",
        "Flatten",
        "Identity",
        "MaxPool",
        "Pad",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
#: Operators with integer operands and results, and the scales of all of them as operands.
QLINEAR = ("QLinearConv", "QLinearMatMul")
_FILE_DTYPES = {"i8": "int8", "u8": "uint8"}
_POSITIVE = ("Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt")
_AVERAGING = ("AveragePool", "GlobalAveragePool", "ReduceMean")


def add_input(conversion: Conversion, name: str, type_: TensorType) -> None:
    """Declare a run-time input; an 8-bit one is followed by its conversion to real numbers.

    A uint8 input becomes i8: 128 less than the file's.
    """
    graph = conversion.graph
    if type_.dtype in ("f32", "i32"):
        conversion.values[name] = graph.add_input(name, type_)
        return
    try:
        stored = _meaning_of_input(conversion.file, name, type_)
        if stored is None:
            raise QuantizationError(f"is {_FILE_DTYPES[type_.dtype]}; {INPUT_KINDS}")
    except QuantizationError as e:
        conversion.obstacles.append(Obstacle(name, "input", str(e)))
        conversion.values[name] = None  # what follows is judged by inferred types
        return
    x = graph.add_input(name, TensorType(type_.shape, "i8", stored.quant))
    node = graph.add_node("Dequantize", (x,), name=f"{name}/real", outputs=[f"{name}/real"])
    graph.quantization[node.out.name] = stored.quant
    conversion.order.append(node.name)
    conversion.values[name] = node.out
    conversion.stored[name] = stored


def _meaning_of_input(file: ModelFile, name: str, type_: TensorType) -> Stored | None:
    """Parameters of the first node that gives an 8-bit input a meaning."""
    todo, seen = deque([name]), {name}
    while todo:
        value = todo.popleft()
        for node in file.nodes:
            if value not in node.inputs:
                continue
            if node.op in ("DequantizeLinear", *QLINEAR) and node.inputs[0] == value:
                return _parameters(file, node, _FILE_DTYPES[type_.dtype], type_.shape)
            if node.op in MOVES and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                todo.append(node.outputs[0])
    return None


def _parameters(
    file: ModelFile, node: FileNode, dtype: str, shape: tuple[int, ...], first: int = 1
) -> Stored:
    """Parameters of an activation; ``first`` is the operand that holds its scale.

    Raises:
        QuantizationError: They are computed, run along an axis, or can't be used.
    """
    if len(node.inputs) <= first or not node.inputs[first]:
        raise QuantizationError("its scale is missing")
    zero_name = node.inputs[first + 1] if len(node.inputs) > first + 1 else ""
    scale, zero = file.constants.get(node.inputs[first]), file.constants.get(zero_name)
    if scale is None or (zero_name and zero is None):
        raise QuantizationError("its scale or zero point is computed at run time; export it fixed")
    attrs = node.attrs if node.op not in QLINEAR else {}
    quant, _, _ = read_quantization(attrs, dtype, shape, scale, zero)
    if quant is None or quant.axis is not None:
        what = "int32" if dtype == "int32" else f"{scale.size} scales"
        raise QuantizationError(f"{what} for a value that is computed; use int8 with one scale")
    return Stored(quant, STORED[dtype])


# -- rules -----------------------------------------------------------------------------------------


def quantize_linear(s: Site) -> Value:
    """QuantizeLinear: annotates its operand."""
    x, file = s.value(0), s.conversion.file
    zero = s.data(2)
    dtype = s.node.attrs.get("output_dtype")
    if dtype and zero is None:
        name = {2: "uint8", 3: "int8"}.get(int(dtype) if isinstance(dtype, int) else 0, "not int8")
    else:
        name = "uint8" if zero is None else zero.dtype.name
    try:
        check_stored(name, "the result")
        stored = _parameters(file, s.node, name, x.type.shape)
    except QuantizationError as e:
        raise RejectedError(str(e)) from None
    s.conversion.stored[s.node.outputs[0]] = stored
    return _annotated(s, x, stored.quant)


def dequantize_linear(s: Site) -> Value:
    """DequantizeLinear: gives the annotated value back."""
    name, file = next(iter(s.node.inputs), ""), s.conversion.file
    stored = s.conversion.stored.get(name)
    data = s.data(0)
    try:
        if data is not None:  # folding has left it because something is wrong
            dtype = check_stored(data.dtype, f"tensor {name}")
            scale, zero = s.data(1), s.data(2)
            if scale is None:
                raise QuantizationError("its scale is computed at run time; export it fixed")
            read_quantization(s.node.attrs, dtype, data.shape, scale, zero)
            raise QuantizationError(f"tensor {name} can't be dequantized")
        x = s.value(0)
        if stored is None:
            raise QuantizationError(f"{name} is not made of 8-bit integers by QuantizeLinear")
        dtype = "uint8" if stored.shift else "int8"
        mine = _parameters(file, s.node, dtype, x.type.shape)
    except QuantizationError as e:
        raise RejectedError(str(e)) from None
    if mine.quant != stored.quant:
        raise RejectedError(
            f"its parameters {mine.quant} are not those that {name} was quantized with"
            f" ({stored.quant}); such a reinterpretation is not supported"
        )
    return x


def qlinear_operands(s: Site, axis: int) -> tuple[Value, Value, Value | None]:
    """Real operand, weight and bias of a node (x, xs, xz, w, ws, wz, ys, yz, b) of ``QLINEAR``.

    Args:
        s: The node.
        axis: Axis of the weight's output channels.
    """
    file, names = s.conversion.file, s.node.inputs
    x, stored = s.value(0), s.conversion.stored.get(names[0])
    w, scale, zero = s.data(3), s.data(4), s.data(5)
    try:
        if stored is None:
            raise QuantizationError(f"{names[0]} is not made of 8-bit integers by QuantizeLinear")
        if w is None or scale is None or zero is None:
            raise QuantizationError("its weight or a scale is computed; export it fixed")
        mine = _parameters(file, s.node, "uint8" if stored.shift else "int8", x.type.shape)
        if mine != stored:
            raise QuantizationError(
                f"its parameters {mine.quant} are not those of {names[0]} ({stored.quant})"
            )
        real, quant = dequantization({"axis": axis}, w, scale, zero)
        bias, real_bias = s.data(8), None
        if bias is not None:
            steps = (stored.quant.scale[0] * scale.astype(np.float64)).astype(np.float32)
            real_bias = dequantization({"axis": 0}, bias, steps, None)[0]
    except QuantizationError as e:
        raise RejectedError(str(e)) from None
    weight = s.derived(3, s.node.name, real)
    if quant is not None:
        s.conversion.graph.quantization[weight.name] = quant
    return x, weight, None if real_bias is None else s.derived(8, s.node.name, real_bias)


def qlinear_result(s: Site, y: Value) -> Value:
    """Annotate the result of QLinearConv or QLinearMatMul."""
    zero = s.data(7)
    try:
        name = check_stored("uint8" if zero is None else zero.dtype, "the result")
        stored = _parameters(s.conversion.file, s.node, name, y.type.shape, 6)
    except QuantizationError as e:
        raise RejectedError(str(e)) from None
    s.conversion.stored[s.node.outputs[0]] = stored
    return _annotated(s, y, stored.quant)


def _annotated(s: Site, x: Value, quant: Quantization) -> Value:
    """The value, or its quantized twin, that carries the annotation."""
    graph = s.conversion.graph
    known = graph.quantization.get(x.name)
    if known == quant:
        return x
    low, high = quant.bounds()
    if known is not None or (s.node.op not in QLINEAR and not _read_here_only(s)):
        low, high = _as_f32(low), _as_f32(high)
        x = s.emit("Clip", (x,), {"min": low, "max": high})
    elif quant.zero_point == LOW and x not in graph.inputs and not never_negative(graph, x):
        x = s.emit("Clip", (x,), {"min": 0.0, "max": _as_f32(high)})
    graph.quantization[x.name] = quant
    return x


def _as_f32(bound: float) -> float:
    return float(f"{bound:.9g}")


def _read_here_only(s: Site) -> bool:
    """All readers of the operand quantize it with these parameters."""
    file, name = s.conversion.file, s.node.inputs[0]

    def parameters(node: FileNode) -> list[object]:
        arrays = [file.constants.get(i) for i in node.inputs[1:]]
        return [None if a is None else (a.dtype.name, a.tobytes()) for a in arrays]

    readers = [n for n in file.nodes if name in n.inputs]
    return name not in file.outputs and all(
        n.op == s.node.op and parameters(n) == parameters(s.node) for n in readers
    )


def never_negative(graph: Graph, x: Value) -> bool:
    """The value is known to be at least 0."""
    quant = graph.quantization.get(x.name)
    if quant is not None and quant.bounds()[0] >= 0.0:
        return True
    node = x.producer
    if node is None:
        return False
    if node.op in _POSITIVE:
        return True
    if node.op == "Clip":
        return node.float_attr("min", -inf) >= 0.0
    if node.op == "Pad" and node.float_attr("value", 0.0) < 0.0:
        return False
    if node.op in (*KEEPING, "Pad") or node.op in _AVERAGING or node.op in ("Add", "Concat"):
        return all(never_negative(graph, v) for v in node.operands())
    return False


# -- what moves integers ---------------------------------------------------------------------------


def integers_kept(conversion: Conversion, node: FileNode) -> Stored | None:
    """Meaning of the result of a node that works on 8-bit integers; None if it has none.

    Raises:
        RejectedError: The operator computes with 8-bit integers.
    """
    if node.op in ("DequantizeLinear", "QuantizeLinear", *QLINEAR):
        return None
    found = [conversion.stored[i] for i in node.inputs if i in conversion.stored]
    if not found:
        return None
    if node.op not in MOVES:
        raise RejectedError("works on 8-bit integers; put a DequantizeLinear before it")
    if any(f != found[0] for f in found):
        raise RejectedError("joins 8-bit integers of different scales")
    return found[0]


def spread(graph: Graph) -> None:
    """Annotate what moves annotated values: both sides of a move hold the same numbers.

    Forward always; backward if the move is the only reader, so that the layer before it writes the
    integers at once.
    """
    for node in graph.nodes:
        first = node.inputs[0] if node.inputs else None
        quant = None if first is None else graph.quantization.get(first.name)
        if quant is not None and keeps(node, quant):
            graph.quantization.setdefault(node.out.name, quant)
    readers = graph.consumers()
    for node in reversed(graph.nodes):
        x = node.inputs[0] if node.inputs else None
        quant = graph.quantization.get(node.out.name)
        if quant is None or x is None or x.producer is None or x.name in graph.quantization:
            continue
        clips = node.op in ("Relu", "Clip") and x.producer.op in KEEPING
        if (clips or keeps(node, quant)) and readers[x] == [node] and x not in graph.outputs:
            graph.quantization[x.name] = quant
