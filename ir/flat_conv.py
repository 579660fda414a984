"""Convolutions along one axis that exporters write in two dimensions.

TensorFlow has no other 1-D convolution than the 2-D one of a tensor with an axis of length 1, so a
file holds Unsqueeze, Conv, Squeeze. The views cost nothing, but they part the convolution from its
bias, its BatchNormalization and the Transposes around it, which look for their neighbour.
"""

from __future__ import annotations

from .graph import Graph, Node, TensorType
from .layout import ELEMENTWISE
from .surgery import (
    drop_unread,
    infer_again,
    nodes_of,
    only_reader,
    operand_of,
    owned_constant,
    reshaped_constant,
    stored_differently,
    take_out,
)

#: Attributes that have a number per spatial axis, or one per end of each.
_PER_AXIS = ("dilations", "kernel_shape", "pads", "strides")


def flatten_convolutions(graph: Graph) -> bool:
    """A convolution between a view that adds an axis and one that takes it off is one without it.

    Activations may stand before the second view. The values are the same, and so are the bits.
    """
    changed = False
    for conv in nodes_of(graph, "Conv"):
        x, w = operand_of(conv, 0), operand_of(conv, 1)
        before = x.producer
        if before is None or before.op != "Reshape" or len(x.type.shape) != 4:
            continue
        source = operand_of(before, 0)
        axis = next((a for a in (2, 3) if _is_added(conv, a, source.type)), None)
        if axis is None or stored_differently(graph, source, x):
            continue
        if w.name in graph.quantization or not owned_constant(graph, w):
            continue
        behind = _behind(graph, conv, axis)
        if behind is None:
            continue
        inner, view = behind
        weight = reshaped_constant(graph, w, _without(w.type.shape, axis), conv)
        conv.inputs = (source, weight, *conv.inputs[2:])
        for key in set(_PER_AXIS).intersection(conv.attrs):
            numbers = conv.ints_attr(key)
            conv.attrs = conv.attrs | {
                key: tuple(n for i, n in enumerate(numbers) if i % 2 != axis - 2)
            }
        drop_unread(graph, before)
        infer_again((conv, *inner))
        take_out(graph, view)
        changed = True
    return changed


def _is_added(conv: Node, axis: int, source: TensorType) -> bool:
    """A spatial axis is 1 long, was not there before, and the convolution leaves it alone."""
    shape, taps = operand_of(conv, 0).type.shape, operand_of(conv, 1).type.shape
    pads = conv.ints_attr("pads", (0,) * 4)
    return (
        _without(shape, axis) == source.shape
        and shape[axis] == taps[axis] == 1
        and pads[axis - 2] == pads[axis] == 0
    )


def _behind(graph: Graph, conv: Node, axis: int) -> tuple[list[Node], Node] | None:
    """What computes element by element behind a convolution, and the view without the axis."""
    inner: list[Node] = []
    node = conv
    while True:
        y = node.out
        readers = [n for n in graph.nodes if y in n.inputs]
        if len(readers) != 1 or not only_reader(graph, y, readers[0]):
            return None
        node = readers[0]
        if node.op == "Reshape":
            fits = node.out.type.shape == _without(y.type.shape, axis)
            return (inner, node) if fits and not stored_differently(graph, y, node.out) else None
        if node.op not in ELEMENTWISE:
            return None
        inner.append(node)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])
