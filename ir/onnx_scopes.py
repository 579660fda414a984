"""Subgraphs of nodes, and the names of outer scopes that they read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from .graph import unique_name

#: Names of the standard operator set.
STANDARD_DOMAINS = ("", "ai.onnx")


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs among a node's attributes."""
    for a in node.attribute:
        if a.type == AttributeProto.GRAPH:
            yield a.g
        yield from a.graphs


def inner_graphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs among a node's attributes and those of their nodes, at any depth."""
    for inner in subgraphs(node):
        yield from all_graphs(inner)


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and those of its nodes, at any depth."""
    yield graph
    for node in graph.node:
        yield from inner_graphs(node)


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph and of those of its nodes, at any depth."""
    for g in all_graphs(graph):
        yield from g.node


def reads(node: NodeProto) -> Iterator[str]:
    """Values that a node reads: its operands, and what its subgraphs read of outer scopes."""
    yield from filter(None, node.input)
    for inner in subgraphs(node):
        defined = {v.name for v in inner.input} | {t.name for t in inner.initializer}
        for n in inner.node:
            yield from (i for i in reads(n) if i not in defined)
            defined.update(n.output)
        yield from (v.name for v in inner.output if v.name not in defined)


def rename_reads(node: NodeProto, names: Mapping[str, str]) -> None:
    """Let a node and its subgraphs read values under other names, but those that hide them."""
    node.input[:] = [names.get(i, i) for i in node.input]
    for inner in subgraphs(node):
        hidden = {v.name for v in inner.input} | {t.name for t in inner.initializer}
        visible = {k: v for k, v in names.items() if k not in hidden}
        for n in inner.node:
            rename_reads(n, visible)
            for o in n.output:
                visible.pop(o, None)
        for v in inner.output:
            v.name = visible.get(v.name, v.name)


def value_names(graph: GraphProto) -> Iterator[str]:
    """Each definition of a value in a graph and in those of its nodes."""
    for g in all_graphs(graph):
        declared = {v.name for v in g.input}
        yield from declared
        yield from (t.name for t in g.initializer if t.name not in declared)
        yield from (o for n in g.node for o in n.output if o)


def hoist_constants(proto: ModelProto) -> None:
    """Move the constants of subgraphs into the graph of the model, as initializers.

    So each is one parameter, however often a loop reads it, and all constants are read and guarded
    in one place.
    """
    taken = Counter(value_names(proto.graph))
    for node in proto.graph.node:
        for inner in subgraphs(node):
            _hoist(inner, proto.graph, taken)


def inner_constants(graph: GraphProto) -> Iterator[TensorProto]:
    """Constants of subgraphs, in the order in which ``hoist_constants`` takes them out."""
    for node in graph.node:
        for inner in subgraphs(node):
            yield from (t for _, t in _own_constants(inner))
            yield from inner_constants(inner)


def _own_constants(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Initializers of a subgraph and tensors of its Constant nodes, by name."""
    formal = {v.name for v in graph.input}
    yield from ((t.name, t) for t in graph.initializer if t.name not in formal)
    for node in graph.node:
        if (t := constant_tensor(node)) is not None:
            yield node.output[0], t


def constant_tensor(node: NodeProto) -> TensorProto | None:
    """The tensor of a Constant; None for other nodes, and for one that has its numbers elsewise."""
    if node.op_type != "Constant" or node.domain not in STANDARD_DOMAINS or len(node.output) != 1:
        return None
    return next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)


def copies(graph: GraphProto) -> dict[str, NodeProto]:
    """Identity nodes of a graph that hand a tensor of it on, by the names of their results.

    PyTorch writes them where parameters are equal by chance. Each has its own numbers in training.
    """
    tensors = {t.name for t in graph.initializer}
    tensors.update(n.output[0] for n in graph.node if n.op_type == "Constant" and n.output)
    found: dict[str, NodeProto] = {}
    for node in graph.node:
        identity = node.op_type == "Identity" and node.domain in STANDARD_DOMAINS
        if identity and len(node.input) == len(node.output) == 1 and node.input[0] in tensors:
            tensors.add(node.output[0])
            found[node.output[0]] = node
    return found


def _hoist(graph: GraphProto, top: GraphProto, taken: Counter[str]) -> None:
    names: dict[str, str] = {}
    for name, t in _own_constants(graph):
        if name not in names:  # else it is defined twice, which is said where they are read
            names[name] = name if taken[name] == 1 else unique_name(name, taken)
            taken[names[name]] += 1
        top.initializer.add().CopyFrom(t)
        top.initializer[-1].name = names[name]
    del graph.initializer[:]
    rest = [n for n in graph.node if constant_tensor(n) is None]
    del graph.node[:]
    graph.node.extend(rest)
    for node in graph.node:
        rename_reads(node, names)
        for inner in subgraphs(node):
            _hoist(inner, top, taken)
    for v in graph.output:
        v.name = names.get(v.name, v.name)
