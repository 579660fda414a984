"""What folding does to constants, as steps that lead back to the tensors of the file."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
from onnx import NodeProto, OperatorSetIdProto, ValueInfoProto
from onnx.reference import ReferenceEvaluator

from .graph import Array
from .provenance import Affine, Cast, Computed, Dequantized, Moved, Origin, Step
from .qdq import dequantization
from .quantization import Quantization

#: Operators that give numbers other places; all operands of a Concat hold them, else the first.
_MOVING = frozenset(
    {
        *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice"),
        *("SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)


def origins_of(
    node: NodeProto,
    opsets: list[OperatorSetIdProto],
    constants: dict[str, Array],
    known: dict[str, Origin],
) -> dict[str, Origin]:
    """Where the results of a folded node come from.

    Args:
        node: A node of constant operands.
        opsets: Operator sets of the model.
        constants: Operands and results, among others.
        known: Origins of what has been folded before; all else stands in the file.

    Returns:
        Origins by the names of the results.
    """
    names, wanted = [i for i in node.input if i], [o for o in node.output if o]
    if node.op_type == "Constant":
        return {o: Origin(o) for o in wanted}

    def of(step: Step, operands: list[str]) -> Origin:
        return Origin(step=step, sources=tuple(known.get(i, Origin(i)) for i in operands))

    if node.op_type in _MOVING:
        data = list(dict.fromkeys(names)) if node.op_type == "Concat" else names[:1]
        fixed = {i: constants[i] for i in names if i not in data}
        copy = NodeProto()
        copy.CopyFrom(node)  # the node itself would keep all of the model

        def move(index: int, *arrays: Array) -> Array:
            operands = fixed | dict(zip(data, arrays, strict=True))
            return run_node(copy, opsets, operands, wanted)[index]

        return {o: of(Moved(partial(move, i)), data) for i, o in enumerate(wanted)}
    home, step = _arithmetic(node, constants)
    if step is not None:
        made = of(step, [home])
        others = (known.get(i, Origin(i)).tensors for i in names if i != home)
        if made.tensors.isdisjoint(frozenset().union(*others)):  # else they change with it
            return {wanted[0]: made}
    return dict.fromkeys(wanted, of(Computed(f"{node.name} ({node.op_type})"), names))


def _arithmetic(node: NodeProto, constants: dict[str, Array]) -> tuple[str, Step | None]:
    """The operand that takes back what is learned of a node's result, and what is done to it."""
    names, y = list(node.input), constants[next(filter(None, node.output))]
    if node.op_type == "DequantizeLinear":
        return names[0], dequantize(node, constants)[0]
    if y.dtype != np.float32 or node.op_type not in ("Add", "Cast", "Div", "Mul", "Sub"):
        return "", None
    if node.op_type == "Cast":
        return names[0], Cast() if constants[names[0]].dtype.kind == "f" else None
    a, b = (constants[i] for i in names)
    if a.shape == b.shape or y.shape not in (a.shape, b.shape):
        return "", None  # either operand could be the home, or none
    first = a.shape == y.shape
    home, number = (names[0], b) if first else (names[1], a)
    number = number.astype(np.float64)
    if node.op_type == "Add":
        return home, Affine(offset=number)
    if node.op_type == "Mul":
        return home, Affine(number)
    if node.op_type == "Sub":
        return home, Affine(offset=-number) if first else Affine(np.array(-1.0), number)
    return home, Affine(1 / number) if first and number.all() else None


def run_node(
    node: NodeProto,
    opsets: list[OperatorSetIdProto],
    operands: dict[str, Array],
    wanted: list[str],
) -> list[Array]:
    """Results of one node by onnx's reference implementation."""
    if node.op_type == "DequantizeLinear":
        return [dequantize(node, operands)[0].forward(operands[node.input[0]])]
    graph = onnx.helper.make_graph(
        [node],
        "constant",
        [ValueInfoProto(name=i) for i in operands],
        [ValueInfoProto(name=o) for o in wanted],
    )
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    return list(ReferenceEvaluator(model).run(None, dict(operands)))


def dequantize(
    node: NodeProto, operands: dict[str, Array]
) -> tuple[Dequantized, Quantization | None]:
    """How a quantized model stores float weights; the reference lacks older opsets of this.

    Raises:
        QuantizationError: The parameters can't be used; the node stays, and its rule says why.
    """
    attrs = {a.name: a.i for a in node.attribute}
    zero = operands[node.input[2]] if len(node.input) > 2 and node.input[2] else None
    return dequantization(attrs, operands[node.input[0]], operands[node.input[1]], zero)
