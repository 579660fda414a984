"""Edits of a forward graph that the passes are made of; each leaves a graph that verifies."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .graph import Graph, Node, Value, unique_name
from .opdef import get_op
from .provenance import Moved, Step


def rename(graph: Graph, value: Value, name: str) -> None:
    """Give a value another name that is free."""
    assert name not in graph.values, name
    del graph.values[value.name]
    if value.name in graph.constants:
        graph.constants[name] = graph.constants.pop(value.name)
    if value.name in graph.quantization:
        graph.quantization[name] = graph.quantization.pop(value.name)
    if value.name in graph.origins:
        graph.origins[name] = graph.origins.pop(value.name)
    value.name = name
    graph.values[name] = value


def forget(graph: Graph, value: Value) -> None:
    """Take a value that nothing reads any more out of the tables."""
    del graph.values[value.name]
    graph.quantization.pop(value.name, None)
    graph.origins.pop(value.name, None)


def drop_dead(graph: Graph) -> None:
    """Remove nodes that no output depends on, and constants that nobody reads."""
    live = set(graph.outputs)
    for node in reversed(graph.nodes):
        if live.intersection(node.outputs):
            live.update(node.operands())
    graph.nodes = [n for n in graph.nodes if live.intersection(n.outputs)]
    live.update(v for n in graph.nodes for v in n.outputs)
    live.update(graph.inputs)
    graph.values = {k: v for k, v in graph.values.items() if v in live}
    graph.constants = {k: a for k, a in graph.constants.items() if k in graph.values}
    graph.quantization = {k: q for k, q in graph.quantization.items() if k in graph.values}
    graph.origins = {k: o for k, o in graph.origins.items() if k in graph.values}


def nodes_of(graph: Graph, op: str) -> list[Node]:
    """A snapshot of the nodes of one operator, in order."""
    return [n for n in graph.nodes if n.op == op]


def operand_of(node: Node, index: int) -> Value:
    """A required operand."""
    v = node.inputs[index]
    assert v is not None, (node.name, index)
    return v


def only_reader(graph: Graph, value: Value, reader: Node) -> bool:
    """``reader`` is all that reads the value, once."""
    reads = sum(v is value for n in graph.nodes for v in n.operands())
    return reads == 1 and value not in graph.outputs and value in reader.inputs


def sole_reader(graph: Graph, value: Value) -> Node | None:
    """The node that is all that reads a value, once."""
    readers = [n for n in graph.nodes if value in n.inputs]
    return readers[0] if len(readers) == 1 and only_reader(graph, value, readers[0]) else None


def without_axis(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """A shape that has an axis less."""
    return (*shape[:axis], *shape[axis + 1 :])


def stored_differently(graph: Graph, x: Value, y: Value) -> bool:
    """``y`` holds elements of ``x``, but is annotated with another quantization: a rounding."""
    quant = graph.quantization.get(y.name)
    return quant is not None and graph.quantization.get(x.name) != quant


def owned_constant(graph: Graph, value: Value) -> bool:
    """A constant that is read exactly once."""
    return value.name in graph.constants and (
        sum(v is value for n in graph.nodes for v in n.operands()) == 1
    )


def replaced_constant(
    graph: Graph, like: Value, step: Step, *users: Node, home: Value | None = None
) -> Value:
    """A constant that replaces ``like`` in ``users``; keeps its name if nobody else reads it.

    Args:
        graph: Holds it.
        like: What is replaced.
        step: Makes it, of the constant that takes back what is learned.
        users: Nodes that read it from now on.
        home: That constant, if it is not ``like``.
    """
    source = like if home is None else home
    data = step.forward(graph.constants[source.name])
    array = np.ascontiguousarray(data).reshape(data.shape)
    origin = graph.origins.get(source.name)
    origin = None if origin is None else origin.then(step)
    name = like.name
    if any(like in n.inputs for n in graph.nodes if n not in users) or like in graph.outputs:
        name = unique_name(f"{name}/{users[0].name}", graph.values)
    else:
        forget(graph, like)  # and how the old data were stored as integers
        del graph.constants[name]
    return graph.add_constant(name, array, origin=origin)


def reshaped_constant(graph: Graph, value: Value, shape: tuple[int, ...], *users: Node) -> Value:
    """A constant in another shape, for ``users``; the same one if it has it already.

    Whoever asks for this shape gets the same constant: what nodes of a file share is one parameter.
    """
    if value.type.shape == shape:
        return value
    name = f"{value.name}/{'x'.join(map(str, shape))}"
    twin = graph.values.get(name)
    if twin is None or not _of_one_tensor(graph, twin, value):
        made = replaced_constant(graph, value, Moved(lambda data: data.reshape(shape)), *users)
        if made.name != value.name and twin is None:
            rename(graph, made, name)
        return made
    if not any(value in n.inputs for n in graph.nodes if n not in users):
        forget(graph, value)
        del graph.constants[value.name]
        rename(graph, twin, value.name)
    return twin


def _of_one_tensor(graph: Graph, a: Value, b: Value) -> bool:
    """Two constants hold the same numbers, of the same place in the file."""
    if a.name not in graph.constants or a.type.size != b.type.size:
        return False
    origins = [graph.origins[v.name].tensors for v in (a, b) if v.name in graph.origins]
    same = np.array_equal(graph.constants[a.name].ravel(), graph.constants[b.name].ravel())
    return same and len(origins) == 2 and origins[0] == origins[1]


def infer_again(nodes: Iterable[Node]) -> None:
    """Give the results of nodes the types that follow from those of their operands.

    Raises:
        GraphError: Their operands do not fit together.
    """
    for node in nodes:
        for value, type_ in zip(node.outputs, get_op(node.op).infer(node), strict=True):
            value.type = type_


def drop_unread(graph: Graph, node: Node) -> None:
    """Remove a node if nothing reads its results any more."""
    if any(v in graph.outputs for v in node.outputs):
        return
    if any(v in node.outputs for n in graph.nodes for v in n.operands()):
        return
    graph.nodes.remove(node)
    for v in node.outputs:
        forget(graph, v)


def take_out(graph: Graph, node: Node) -> bool:
    """Remove a node whose result equals its first operand; False if both names must stay."""
    x, y = operand_of(node, 0), node.out
    if y in graph.outputs:
        if x.producer is None or x in graph.outputs:
            return False
        graph.outputs = [x if v is y else v for v in graph.outputs]
    for n in graph.nodes:
        n.inputs = tuple(x if v is y else v for v in n.inputs)
    graph.nodes.remove(node)
    forget(graph, y)
    if x in graph.outputs:
        rename(graph, x, y.name)
    return True


def absorb(graph: Graph, layer: Node, follower: Node) -> None:
    """``layer`` computes what ``follower`` computed: it takes over the result and goes there."""
    old = layer.out
    layer.outputs = follower.outputs
    layer.out.producer = layer
    forget(graph, old)
    graph.nodes.remove(follower)
