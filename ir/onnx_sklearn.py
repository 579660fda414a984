"""What scikit-learn's converter puts around a network: class names, dictionaries, a scaler.

A classifier's file names the class of a sample, as a string or integer, and packs its
probabilities into dictionaries. Training needs the probabilities alone, so the rest is left out of
the outputs, and told.
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from .graph import unique_name
from .onnx_scopes import value_names

#: Operator set of classical machine learning.
DOMAIN = "ai.onnx.ml"
#: Operators of it that make labels of scores.
_LABELLING = ("ArrayFeatureExtractor", "Binarizer", "LabelEncoder")
#: Operators that hand labels on.
_MOVING = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def plain_outputs(proto: ModelProto) -> tuple[str, ...]:
    """Leave labels and dictionaries out of the outputs; write scalers as ordinary operators.

    A model that would be left without an output stays as it is.

    Args:
        proto: The model; changed in place.

    Returns:
        What has been left out, in words for the report.
    """
    graph = proto.graph
    if not any(n.domain == DOMAIN for n in graph.node):
        return ()
    _write_scalers(graph)
    labels = _labels(graph)
    zips = [n for n in graph.node if _is(n, "ZipMap") and n.input]
    maps = {o: n.input[0] for n in zips for o in n.output}
    kept = [v for v in graph.output if v.name not in labels]
    dropped = [v.name for v in graph.output if v.name in labels]
    packed = [v.name for v in kept if v.name in maps]
    if not kept or not (dropped or packed):
        return ()
    names = dict.fromkeys(maps.get(v.name, v.name) for v in kept)
    plain = {v.name: v for v in kept}
    del graph.output[:]
    for name in names:
        graph.output.append(plain.get(name) or helper.make_empty_tensor_value_info(name))
    notes = []
    if dropped:
        notes.append(f"class labels {', '.join(dropped)} are left out")
    if packed:
        values = ", ".join(maps[name] for name in packed)
        notes.append(f"dictionaries {', '.join(packed)} are given as their numbers {values}")
    return (", ".join(notes),)


def _is(node: NodeProto, *operators: str) -> bool:
    return node.domain == DOMAIN and node.op_type in operators


def _labels(graph: GraphProto) -> set[str]:
    """Values that are names of classes, or flags for them."""
    found: set[str] = set()
    for node in graph.node:
        moved = node.op_type in _MOVING and node.input and node.input[0] in found
        if moved or _is(node, *_LABELLING):
            found.update(node.output)
    return found


def _write_scalers(graph: GraphProto) -> None:
    """``(x - offset) * scale`` of Scaler by Sub and Mul; a single number is for all features."""
    nodes: list[NodeProto] = []
    taken = set(value_names(graph))
    for node in graph.node:
        lists = {a.name: np.array(a.floats, np.float32) for a in node.attribute}
        whole = set(lists) == {"offset", "scale"} and node.input and node.output
        if not _is(node, "Scaler") or not whole:
            nodes.append(node)
            continue
        x, base = node.input[0], node.name or node.output[0]
        for op, key in (("Sub", "offset"), ("Mul", "scale")):
            constant = unique_name(f"{base}/{key}", taken)
            graph.initializer.append(numpy_helper.from_array(lists[key], constant))
            y = node.output[0] if op == "Mul" else unique_name(f"{base}/shifted", taken)
            taken.update((constant, y))
            nodes.append(helper.make_node(op, [x, constant], [y], name=f"{base}/{key}"))
            x = y
    del graph.node[:]
    graph.node.extend(nodes)
