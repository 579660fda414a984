"""Convolutions along one axis that exporters write in two dimensions.

TensorFlow has no other 1-D convolution than the 2-D one of a tensor with an axis of length 1, so a
file holds Unsqueeze, Conv, Squeeze. The views cost nothing, but they part the convolution from its
bias, its BatchNormalization and the Transposes around it, which look for their neighbour.
"""

from __future__ import annotations

from .graph import Graph, Node
from .layout import ELEMENTWISE
from .surgery import (
    drop_unread,
    infer_again,
    operand_of,
    owned_constant,
    reshaped_constant,
    sole_reader,
    stored_differently,
    take_out,
    without_axis,
)

#: Attributes that have a number per spatial axis, or one per end of each.
_PER_AXIS = ("dilations", "kernel_shape", "output_padding", "pads", "strides")
_CONVOLUTIONS = ("Conv", "ConvTranspose")


def flatten_convolutions(graph: Graph) -> bool:
    """Convolutions between a view that adds an axis and one that takes it off are without it.

    Activations may stand between them. The values are the same, and so are the bits.
    """
    changed = False
    for first in [n for n in graph.nodes if n.op in _CONVOLUTIONS]:
        x = operand_of(first, 0)
        before = x.producer
        if before is None or before.op != "Reshape" or len(x.type.shape) != 4:
            continue
        source = operand_of(before, 0)
        added = (a for a in (2, 3) if without_axis(x.type.shape, a) == source.type.shape)
        axis = next((a for a in added if _ignores(graph, first, a)), None)
        if axis is None or stored_differently(graph, source, x):
            continue
        between = _between(graph, first, axis)
        if between is None:
            continue
        nodes, view = between
        first.inputs = (source, *first.inputs[1:])
        for conv in (n for n in nodes if n.op in _CONVOLUTIONS):
            w = operand_of(conv, 1)
            weight = reshaped_constant(graph, w, without_axis(w.type.shape, axis), conv)
            conv.inputs = (conv.inputs[0], weight, *conv.inputs[2:])
            for key in set(_PER_AXIS).intersection(conv.attrs):
                numbers = conv.ints_attr(key)
                conv.attrs = conv.attrs | {
                    key: tuple(n for i, n in enumerate(numbers) if i % 2 != axis - 2)
                }
        drop_unread(graph, before)
        infer_again(nodes)
        take_out(graph, view)
        changed = True
    return changed


def _ignores(graph: Graph, conv: Node, axis: int) -> bool:
    """A spatial axis is 1 long, and the convolution, whose weight is its own, leaves it so."""
    x, w = operand_of(conv, 0), operand_of(conv, 1)
    pads = conv.ints_attr("pads", (0,) * 4)
    return (
        x.type.shape[axis] == w.type.shape[axis] == conv.out.type.shape[axis] == 1
        and pads[axis - 2] == pads[axis] == 0
        and w.name not in graph.quantization
        and owned_constant(graph, w)
    )


def _between(graph: Graph, first: Node, axis: int) -> tuple[list[Node], Node] | None:
    """A convolution, others and activations behind it, and the view without the axis."""
    nodes = [first]
    while True:
        y = nodes[-1].out
        node = sole_reader(graph, y)
        if node is None:
            return None
        if node.op == "Reshape":
            fits = node.out.type.shape == without_axis(y.type.shape, axis)
            return (nodes, node) if fits and not stored_differently(graph, y, node.out) else None
        convolves = node.op in _CONVOLUTIONS and node.inputs[0] is y
        if not (convolves and _ignores(graph, node, axis)) and node.op not in ELEMENTWISE:
            return None
        nodes.append(node)
