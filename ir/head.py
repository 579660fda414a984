"""Head surgery: the last layer of a classifier replaced by a fresh one for other classes."""

from __future__ import annotations

from math import prod, sqrt

import numpy as np

from .errors import UnsupportedModelError
from .graph import Array, Graph, Node, TensorType, Value
from .lowered_layers import out_axis
from .surgery import infer_again, operand_of, owned_constant

#: Layers that a head may be.
_LAYERS = ("Conv", "Gemm", "MatMul")
#: What may stand behind it: operators that take any number of classes, shapes kept.
_BEHIND = ("LogSoftmax", "Relu", "Sigmoid", "Softmax", "Tanh")
#: Of the generator of fresh weights: the same head for the same model and classes.
_SEED = 0


def replace_head(graph: Graph, classes: int) -> None:
    """Give the last layer of a graph fresh weights for another number of classes, in place.

    Weights are drawn from a normal distribution of the deviation ``1 / sqrt(inputs per class)``
    (LeCun et al., "Efficient BackProp", 1998), always the same ones; the bias is 0. Names stay.

    Args:
        graph: A cleaned forward graph with one output.
        classes: How many there shall be.

    Raises:
        UnsupportedModelError: The output is not made by a layer with constant weights, an
            activation or Softmax behind it at most, or other nodes read what the layer makes.
    """
    layer, behind = _head(graph)
    weight, axis = operand_of(layer, 1), out_axis(layer)
    shape = list(weight.type.shape)
    shape[axis], old = classes, shape[axis]
    scale = 1 / sqrt(prod(weight.type.shape) // old)
    rng = np.random.default_rng(_SEED)
    _become(graph, weight, (rng.standard_normal(shape) * scale).astype(np.float32))
    if len(layer.inputs) > 2 and (bias := layer.inputs[2]) is not None:
        lengths = tuple(classes if n == old else n for n in bias.type.shape)
        _become(graph, bias, np.zeros(lengths, np.float32))
    infer_again((layer, *behind))
    for node in (layer, *behind):
        graph.quantization.pop(node.out.name, None)
    graph.verify()


def _head(graph: Graph) -> tuple[Node, list[Node]]:
    """The layer that makes the output, and the nodes behind it."""
    behind: list[Node] = []
    value = graph.outputs[0]
    node = value.producer
    consumers = graph.consumers()
    while node is not None and node.op in _BEHIND:
        value = operand_of(node, 0)
        if len(consumers[value]) > 1:
            break
        behind.insert(0, node)
        node = value.producer
    if len(graph.outputs) != 1 or node is None or not _replaceable(graph, node):
        what = "nothing" if node is None else f"{node.name} ({node.op})"
        raise UnsupportedModelError(
            f"{graph.name}: --head needs one output made by a Gemm, MatMul or Conv with constant"
            f" weights of its own, with at most {', '.join(_BEHIND)} behind; here it is {what}"
        )
    return node, behind


def _replaceable(graph: Graph, node: Node) -> bool:
    if node.op not in _LAYERS or node.int_attr("group", 1) != 1:
        return False
    own = [v for v in node.inputs[1:] if v is not None]
    return all(owned_constant(graph, v) for v in own)


def _become(graph: Graph, value: Value, data: Array) -> None:
    """Other data under the same name; how the old ones were stored is forgotten."""
    value.type = TensorType(data.shape)
    graph.constants[value.name] = data
    graph.quantization.pop(value.name, None)
