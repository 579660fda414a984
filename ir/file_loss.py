"""The loss that a model file ends in, parted from the forward graph that is trained by it."""

from __future__ import annotations

from collections.abc import Iterable

from .candidates import param_slots
from .errors import GraphError, UnsupportedModelError
from .freezing import stops
from .graph import Attr, Graph, Node, Value
from .opdef import get_op, parameter_slots
from .surgery import drop_dead, infer_again

_WAY_OUT = "so it can't be trained by; leave it out of the file and name one with --loss"


def part_loss(graph: Graph) -> None:
    """Move the file's loss into ``graph.loss``, a graph of prediction and target.

    A file ends in its loss if one output is a scalar, and depends on one input that the prediction
    does not depend on: the target. The prediction is the other output; where there is none, the
    target is the input that passes no layer with weights, and the prediction the last value that
    all which meets it is computed from. Every other graph stays as it is.

    Args:
        graph: A forward graph; its inputs then are samples, its output the prediction.

    Raises:
        UnsupportedModelError: The loss can't be parted: it reads more than prediction, target and
            constants of its own, or no gradient passes it.
    """
    scalars = [v for v in graph.outputs if not v.type.shape]
    others = [v for v in graph.outputs if v.type.shape]
    if len(scalars) != 1 or len(others) > 1 or len(graph.inputs) < 2:
        return
    (loss,) = scalars
    needed = _needed(graph, loss)
    if others:
        apart = needed - _needed(graph, others[0])
        targets = [v for v in graph.inputs if v in apart]
    else:
        targets = [v for v in graph.inputs if v in needed and not _passes_weights(graph, v)]
    if len(targets) != 1:
        return
    (target,) = targets
    prediction = others[0] if others else _met(graph, target, loss)
    kept = _needed(graph, prediction)
    parameters = {
        node.inputs[slot.index]
        for node in graph.nodes
        if node.out in kept
        for slot in parameter_slots(node)
    }
    nodes = [n for n in graph.nodes if needed.intersection(n.outputs) and n.out not in kept]
    read = {v for n in nodes for v in n.operands()}
    made = {v for n in nodes for v in n.outputs}
    own = {v for v in read if v.name in graph.constants} - parameters
    if more := read - made - own - {prediction, target}:
        names = ", ".join(sorted(v.name for v in more))
        raise UnsupportedModelError(
            f"{graph.name}: the loss {loss.name} reads {names} beside prediction"
            f" {prediction.name} and target {target.name}, {_WAY_OUT}"
        )
    moved = _moved(graph, nodes, (prediction, target), own, loss)
    if (by := stops(moved).get(moved.inputs[0])) is not None:
        raise UnsupportedModelError(
            f"{graph.name}: in the loss {loss.name} no gradient passes {by}, {_WAY_OUT}"
        )
    graph.loss = moved
    graph.inputs = [v for v in graph.inputs if v is not target]
    graph.outputs = [prediction]
    del graph.values[target.name]
    drop_dead(graph)
    graph.verify()
    graph.notes += (
        f"trained by the loss of the file, {loss.name}, with the target {target.name}; the"
        f" prediction is {prediction.name}",
    )


def take_head(graph: Graph) -> None:
    """Let the loss of a graph read its prediction, which has another number of classes now.

    Raises:
        UnsupportedModelError: It takes the old number only.
    """
    if graph.loss is None:
        return
    (prediction,) = graph.outputs
    graph.loss.inputs[0].type = prediction.type
    try:
        infer_again(graph.loss.nodes)
        graph.loss.verify()
    except GraphError as e:
        raise UnsupportedModelError(
            f"{graph.name}: the loss {graph.loss.outputs[0].name} is not one of the fresh head's"
            f" {prediction.name}, {prediction.type} ({e}), {_WAY_OUT}"
        ) from None


def _needed(graph: Graph, value: Value) -> set[Value]:
    """A value and all that it is computed from."""
    return _needed_but_for(graph, {value}, None)


def _needed_but_for(graph: Graph, values: set[Value], known: Value | None) -> set[Value]:
    """Values and all that they are computed from, but for what ``known`` is computed from."""
    found = values - {known}
    for node in reversed(graph.nodes):
        if found.intersection(node.outputs):
            found.update(node.outputs)
            found.update(v for v in node.operands() if v is not known)
    return found


def _behind(graph: Graph, value: Value) -> list[Node]:
    """Nodes that depend on a value, in order."""
    known, found = {value}, []
    for node in graph.nodes:
        if any(v in known for v in node.operands()):
            known.update(node.outputs)
            found.append(node)
    return found


def _passes_weights(graph: Graph, value: Value) -> bool:
    uses = (use for uses in param_slots(graph).values() for use in uses)
    layers = {node for node, slot in uses if slot.role == "weight"}
    return not layers.isdisjoint(_behind(graph, value))


def _met(graph: Graph, target: Value, loss: Value) -> Value:
    """The last value that all which meets the target is computed from."""
    behind, needed = _behind(graph, target), _needed(graph, loss)
    made = {v for n in behind for v in n.outputs} | {target}
    read = {v for n in behind if n.out in needed for v in n.operands()}
    met = {v for v in read - made if v.name not in graph.constants}
    before = [v for n in graph.nodes for v in n.outputs if v not in made]
    for v in reversed(before):
        if all(x not in _needed_but_for(graph, met, v) for x in graph.inputs):
            return v
    names = ", ".join(sorted(v.name for v in met)) or "nothing"
    raise UnsupportedModelError(
        f"{graph.name}: in the loss {loss.name} the target {target.name} meets {names}, of no one"
        " value, so the prediction is not clear; export it as a second output"
    )


def _moved(
    graph: Graph, nodes: Iterable[Node], inputs: tuple[Value, Value], own: set[Value], loss: Value
) -> Graph:
    """A graph of copies. Views of the target get a copy to show: the target is the caller's."""
    result = Graph(graph.name)
    twin = {v: result.add_input(v.name, v.type) for v in inputs}
    for v in sorted(own, key=lambda v: v.name):
        data = graph.constants[v.name]
        name = f"{v.name}/loss"  # the graph may read it, too
        twin[v] = result.add_constant(name, data, v.type.dtype, shape=v.type.shape)
    target, copy = twin[inputs[1]], None
    for node in nodes:
        operands = [None if v is None else twin[v] for v in node.inputs]
        if get_op(node.op).view and operands[0] is target:
            if copy is None:
                shape: dict[str, Attr] = {"shape": target.type.shape}
                copy = result.add_node("Expand", (target,), shape, name=f"{target.name}/copy").out
            operands[0] = copy
        made = result.add_node(
            node.op, operands, node.attrs, name=node.name, outputs=[v.name for v in node.outputs]
        )
        twin |= zip(node.outputs, made.outputs, strict=True)
    result.outputs = [twin[loss]]
    result.verify()
    return result
