"""The first step of a recurrent layer that an exporter has written out and folded.

A cell that runs in a loop from a state of zeros has a layer of zeros in its first step, of which
exporters leave a tensor that repeats the bias. In training the bias would learn from the other
steps alone, and the tensor become a parameter of its own. So the layer is put back.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from .graph import Array, unique_name
from .onnx_scopes import STANDARD_DOMAINS, all_graphs, value_names
from .provenance import Origin, Repeated


def put_back_first_steps(
    proto: ModelProto, constants: MutableMapping[str, Array]
) -> dict[str, Origin]:
    """Write tensors that repeat the bias of a layer as this layer of zeros.

    Args:
        proto: A model; nodes and initializers are changed in place.
        constants: Its initializers; changed as those are.

    Returns:
        Where the biases of these layers come from: what they learn goes into the tensors as well.
    """
    graph = proto.graph
    taken = {v.name for v in (*graph.input, *graph.output)}
    names = dict.fromkeys((*value_names(graph), *(n.name for n in graph.node)))
    repeats: dict[str, list[str]] = {}
    first: list[NodeProto] = []
    for layer in _layers(proto, constants):
        weight, bias = layer.input[1:]
        cells = constants[weight].shape[any(a.name == "transB" and a.i for a in layer.attribute)]
        for name in [k for k, a in constants.items() if _repeats(constants[bias], a)]:
            if name in taken:
                continue
            zeros = unique_name(f"{name}/zeros", names)
            names[zeros] = None
            node = NodeProto()
            node.CopyFrom(layer)
            node.name = unique_name(f"{name}/layer", names)
            names[node.name] = None
            node.input[0], node.output[0] = zeros, name
            first.append(node)
            repeats.setdefault(bias, []).append(name)
            constants[zeros] = np.zeros((len(constants.pop(name)), cells), np.float32)
            graph.initializer.append(numpy_helper.from_array(constants[zeros], zeros))
    if not first:
        return {}
    gone = {name for repeated in repeats.values() for name in repeated}
    kept = [t for t in graph.initializer if t.name not in gone]
    nodes = [*first, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    return {
        bias: Origin(step=Repeated(), sources=tuple(map(Origin, (bias, *repeated))))
        for bias, repeated in repeats.items()
    }


def _layers(proto: ModelProto, constants: MutableMapping[str, Array]) -> Iterator[NodeProto]:
    """One Gemm of a computed value for each weight and bias."""
    found: set[tuple[str, str]] = set()
    for node in (n for g in all_graphs(proto.graph) for n in g.node):
        if node.op_type != "Gemm" or node.domain not in STANDARD_DOMAINS or len(node.input) != 3:
            continue
        x, weight, bias = node.input
        if x in constants or (weight, bias) in found or bias not in constants:
            continue
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = not attrs.get("transA") and attrs.get("beta", 1.0) == 1.0
        if plain and weight in constants and constants[weight].ndim == 2:
            found.add((weight, bias))
            yield node


def _repeats(bias: Array, rows: Array) -> bool:
    """Each row is the bias; numbers that are all the same may be so by chance."""
    return (
        bias.ndim == 1
        and rows.ndim == 2
        and rows.dtype == bias.dtype == np.float32
        and rows.shape[1:] == bias.shape
        and len(rows) > 0
        and bool((bias != bias[:1]).any())
        and bool((rows == bias).all())
    )
