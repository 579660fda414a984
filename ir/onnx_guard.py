"""What onnx's type inference must not get: on such models it never ends, or ends the process."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from .graph import MAX_ELEMENTS, Array, TensorType
from .onnx_external import attribute_tensors
from .onnx_read import tensor_array
from .onnx_scopes import all_nodes, subgraphs

#: Larger constants can't be shapes, axes or limits: inference gets their types alone.
MAX_INFERRED_ELEMENTS = 2**10


def leave_readable(proto: ModelProto, constants: Mapping[str, Array]) -> None:
    """Leave the data of small sound tensors; all other initializers become inputs of their type.

    Inference reads as many elements as a tensor declares, whether it has them or not. Tensors in
    attributes that can't be read are as good as missing.
    """
    graph = proto.graph
    kept: list[TensorProto] = []
    for t in graph.initializer:
        if t.name in constants and constants[t.name].size <= MAX_INFERRED_ELEMENTS:
            kept.append(t)
        else:
            shape = t.dims if is_sound(t.dims) else None
            graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, shape))
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node, attribute, tensor in attribute_tensors(graph):
        try:
            tensor_array(tensor)
        except ValueError:
            if tensor.data_type != TensorProto.STRING and attribute in node.attribute:
                node.attribute.remove(attribute)


def is_sound(dims: Collection[int]) -> bool:
    """No dimension is negative, and the elements could be a tensor here."""
    return all(d >= 0 for d in dims) and prod(dims) <= MAX_ELEMENTS


def without_unsafe_slices(proto: ModelProto, types: Mapping[str, TensorType]) -> ModelProto:
    """The model without the Slice nodes whose operand may have a negative dimension.

    Inference makes such dimensions of kernels that are larger than their input, and of other
    inconsistent nodes; then it ends the process at a Slice behind them (``std::clamp`` with an
    upper bound below the lower one, onnx 1.23). A Slice is safe as soon as the operand's type is
    known: a chain of them is uncovered one by one.
    """
    hidden = [n for n in proto.graph.node if _slices(n) and not _is_safe(n, types)]
    if not hidden:
        return proto
    result = ModelProto()
    result.CopyFrom(proto)
    rest = [n for n in result.graph.node if n not in hidden]
    del result.graph.node[:]
    result.graph.node.extend(rest)
    return result


def _slices(node: NodeProto) -> bool:
    """It is a Slice, or has one in a subgraph."""
    inner = (n for g in subgraphs(node) for n in all_nodes(g))
    return node.op_type == "Slice" or any(n.op_type == "Slice" for n in inner)


def _is_safe(node: NodeProto, types: Mapping[str, TensorType]) -> bool:
    return node.op_type == "Slice" and bool(node.input) and node.input[0] in types
