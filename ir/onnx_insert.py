"""Nodes of a graph put into a model file: what stands beside layers and can't go into weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .graph import Array, Node, unique_name
from .onnx_scopes import STANDARD_DOMAINS
from .provenance import ProvenanceError
from .surgery import operand_of

#: Attributes that operators have in the file as they do in the graph.
_KEPT = {
    "Add": (),
    "AveragePool": ("kernel_shape", "strides"),
    "Conv": ("dilations", "group", "pads", "strides"),
    "Relu": (),
}
#: The first opset whose Resize can go by the centres of pixels.
_BY_CENTRES = 11
#: The first one whose Resize needs no region.
_ROI_OPTIONAL = 13


def insert(proto: ModelProto, nodes: Sequence[Node], constants: Mapping[str, Array]) -> int:
    """Put an adapter's nodes into the main graph, behind the node that their sum is added to.

    Args:
        proto: Changed in place. It must have the values that the first node reads and the last one
            makes; whatever reads the latter reads the sum from now on.
        nodes: Of an adapter, in order; bilinear interpolation goes by the centres of pixels.
        constants: By name, those that they read.

    Returns:
        The position of the first new node; the others follow it.

    Raises:
        ProvenanceError: It does not have these values.
    """
    graph, end = proto.graph, nodes[-1].out.name
    x = operand_of(nodes[0], 0).name
    makers = {o: i for i, n in enumerate(graph.node) for o in n.output}
    for name in (x, end):
        if name not in makers and name not in {v.name for v in graph.input}:
            raise ProvenanceError(f"the file has no value {name}, importing makes it")
    at = makers[end] + 1
    names = _Names(graph)
    frozen = names.fresh(operand_of(nodes[-1], 0).name)
    maker = graph.node[at - 1]
    maker.output[list(maker.output).index(end)] = frozen
    known = {x: x, operand_of(nodes[-1], 0).name: frozen}
    versions = [o.version for o in proto.opset_import if o.domain in STANDARD_DOMAINS]
    made: list[NodeProto] = []
    for node in nodes:
        operands = [known[operand_of(node, 0).name]]
        result = end if node is nodes[-1] else names.fresh(node.out.name)
        known[node.out.name] = result
        if node.op == "Resize":
            resized = _resized(proto, node, operands[0], result, names, max(versions, default=1))
            made += resized
            continue
        for v in node.inputs[1:]:
            assert v is not None, node.name
            if v.name not in known:
                known[v.name] = _constant(proto, names.fresh(v.name), constants[v.name])
            operands.append(known[v.name])
        attrs: dict[str, Any] = {k: node.attrs[k] for k in _KEPT[node.op]}
        made.append(helper.make_node(node.op, operands, [result], names.node(node.name), **attrs))
    behind = list(graph.node[at:])
    del graph.node[at:]
    graph.node.extend([*made, *behind])
    return at


class _Names:
    """Names that a graph has not yet."""

    def __init__(self, graph: GraphProto) -> None:
        values = {name for n in graph.node for name in (*n.input, *n.output)}
        lists = (graph.initializer, graph.input, graph.output, graph.value_info)
        self._values = values | {v.name for found in lists for v in found}
        self._nodes = {n.name for n in graph.node}

    def fresh(self, name: str) -> str:
        """Of a value."""
        self._values.add(new := unique_name(name, self._values))
        return new

    def node(self, name: str) -> str:
        """Of a node."""
        self._nodes.add(new := unique_name(name, self._nodes))
        return new


def _constant(proto: ModelProto, name: str, data: Array) -> str:
    """An initializer; in old files it is an input, too."""
    proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(data), name))
    if proto.ir_version < 4:
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, data.shape)
        proto.graph.input.append(info)
    return name


def _resized(
    proto: ModelProto, node: Node, x: str, result: str, names: _Names, opset: int
) -> Iterator[NodeProto]:
    """A Resize; before it could go by centres, a product with a matrix for each axis."""
    before, after = operand_of(node, 0).type.shape[2:], node.ints_attr("sizes")
    pairs = list(zip(before, after, strict=True))
    if opset >= _BY_CENTRES:
        scales = np.array([1, 1, *(_scale(n, m) for n, m in pairs)], np.float32)
        none = "" if opset >= _ROI_OPTIONAL else _constant(
            proto, names.fresh(f"{node.name}/roi"), np.zeros(0, np.float32)
        )
        operands = [x, none, _constant(proto, names.fresh(f"{node.name}/scales"), scales)]
        attrs = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        yield helper.make_node("Resize", operands, [result], names.node(node.name), **attrs)
        return
    rows, columns = (_matrix(n, m) for n, m in pairs)
    left = _constant(proto, names.fresh(f"{node.name}/rows"), rows)
    right = _constant(proto, names.fresh(f"{node.name}/columns"), columns.T)
    half = names.fresh(f"{node.name}/by_rows")
    yield helper.make_node("MatMul", [left, x], [half], names.node(f"{node.name}/by_rows"))
    yield helper.make_node("MatMul", [half, right], [result], names.node(node.name))


def _scale(size: int, wanted: int) -> np.float32:
    """A scale by which runtimes find the wanted size, which is rounded down."""
    scale = np.float32(wanted / size)
    return scale if float(scale) * size >= wanted else np.nextafter(scale, np.float32(np.inf))


def _matrix(size: int, wanted: int) -> Array:
    """``[wanted, size]``: each pixel's shares of its two neighbours."""
    at = np.clip((np.arange(wanted) + 0.5) * (size / wanted) - 0.5, 0, size - 1)
    shares: Array = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size)))
    return shares.astype(np.float32)
