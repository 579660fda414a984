"""Blocks of integer layers that can run row by row, and the graph in which they do.

A **block** is ``[convolution ->] depthwise -> pointwise [-> QAdd with the block's input]`` on one
image, where nobody else reads what is between its layers: a stem with the first separable layer, an
inverted residual. ``ir.ops.streamed`` tells what a streamed block computes, and in which memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .errors import GraphError, UsageError
from .graph import Graph, Node, Value
from .opdef import get_op
from .ops.streamed import block_node


@dataclass(frozen=True)
class Block:
    """A chain of layers that can be streamed.

    Attributes:
        name: Of the node that it becomes.
        nodes: Names of its layers in order.
        source: The value that it reads.
        result: The value that it makes.
    """

    name: str
    nodes: tuple[str, ...]
    source: str
    result: str


def blocks(lowered: Graph) -> tuple[Block, ...]:
    """The blocks of a graph, in order; no layer is in two of them.

    Args:
        lowered: A forward graph with integer operators (``ir.precision.lower``).
    """
    readers = lowered.consumers()
    result: list[Block] = []
    taken: set[Node] = set()
    for node in lowered.nodes:
        chain = _chain(lowered, node, readers)
        if chain is None or not taken.isdisjoint(chain):
            continue
        taken.update(chain)
        source = chain[0].inputs[0]
        assert source is not None, chain[0].name
        names = tuple(n.name for n in chain)
        result.append(Block(f"{names[0]}/streamed", names, source.name, chain[-1].out.name))
    return tuple(result)


def _chain(
    graph: Graph, depthwise: Node, readers: Mapping[Value, list[Node]]
) -> tuple[Node, ...] | None:
    """The longest block around a depthwise layer."""
    if depthwise.op != "QConv" or depthwise.int_attr("group", 1) == 1:
        return None
    project = _only_reader(graph, depthwise.out, readers)
    if project is None or project.op != "QConv":
        return None
    x = depthwise.inputs[0]
    assert x is not None, depthwise.name
    first = x.producer
    starts: list[tuple[Node, ...]] = [(depthwise,)]
    if first is not None and first.op == "QConv" and _only_reader(graph, x, readers) is depthwise:
        starts.insert(0, (first, depthwise))
    for start in starts:
        chain = (*start, project)
        add = _only_reader(graph, project.out, readers)
        ends = [chain]
        if add is not None and add.op == "QAdd" and start[0].inputs[0] in add.inputs:
            ends.insert(0, (*chain, add))
        for end in ends:
            if _streamable(end):
                return end
    return None


def _only_reader(graph: Graph, value: Value, readers: Mapping[Value, list[Node]]) -> Node | None:
    """The node that alone reads a value, once."""
    if value in graph.outputs or len(readers[value]) != 1:
        return None
    reader = readers[value][0]
    return reader if sum(v is value for v in reader.operands()) == 1 else None


def _streamable(chain: tuple[Node, ...]) -> bool:
    try:
        get_op("StreamedBlock").infer(block_node("block", chain))
    except GraphError:
        return False
    return True


def stream(lowered: Graph, names: Collection[str]) -> Graph:
    """The graph that computes the chosen blocks row by row.

    Args:
        lowered: A forward graph with integer operators; not modified.
        names: Blocks of it.

    Returns:
        A new graph with one StreamedBlock in place of each block's layers, at the place of the
        last; all else keeps its name.

    Raises:
        UsageError: A name is not that of a block.
    """
    known = {b.name: b for b in blocks(lowered)}
    for name in names:
        if name not in known:
            raise UsageError(
                f"{lowered.name} has no block {name} that could run by rows; known are:"
                f" {', '.join(known) or 'none'}"
            )
    nodes = {n.name: n for n in lowered.nodes}
    inside = {nodes[n]: b for b in known.values() if b.name in names for n in b.nodes}
    result = Graph(lowered.name)
    twin: dict[Value, Value] = {v: result.add_input(v.name, v.type) for v in lowered.inputs}
    for name, data in lowered.constants.items():
        v = lowered.values[name]
        twin[v] = result.add_constant(name, data, v.type.dtype, v.type.quant)
    for node in lowered.nodes:
        block = inside.get(node)
        if block is not None:
            if node.name != block.nodes[-1]:
                continue
            node = block_node(block.name, tuple(nodes[n] for n in block.nodes), node.outputs)
        inputs = [None if v is None else twin[v] for v in node.inputs]
        wanted = [v.name for v in node.outputs]
        made = result.add_node(node.op, inputs, node.attrs, name=node.name, outputs=wanted)
        twin |= dict(zip(node.outputs, made.outputs, strict=True))
    result.outputs = [twin[v] for v in lowered.outputs]
    result.quantization = {k: q for k, q in lowered.quantization.items() if k in result.values}
    result.verify()
    return result
