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
from .opdef import get_op, operand
from .ops.streamed import block_node

#: Most rows of a result at a time: more gain little.
MOST_ROWS = 4
#: One part in so many of the bytes that streaming saves may go into more rows at a time.
SHARE = 8


@dataclass(frozen=True)
class Block:
    """A chain of layers that can be streamed.

    Attributes:
        name: Of the node that it becomes.
        nodes: Names of its layers in order.
        source: The value that it reads.
        result: The value that it makes.
        rows: Rows of the result that are computed at a time.
    """

    name: str
    nodes: tuple[str, ...]
    source: str
    result: str
    rows: int


def blocks(lowered: Graph) -> tuple[Block, ...]:
    """The blocks of a graph, in order; no layer is in two of them.

    Args:
        lowered: A forward graph with integer operators (``ir.precision.lower``).
    """
    readers = lowered.consumers()
    result: list[Block] = []
    taken: set[Node] = set()
    for node in lowered.nodes:
        chain = _chain(lowered, node, readers, taken)
        if chain is None:
            continue
        taken.update(chain)
        source = chain[0].inputs[0]
        assert source is not None, chain[0].name
        names = tuple(n.name for n in chain)
        block = Block(f"{names[0]}/streamed", names, source.name, chain[-1].out.name, _rows(chain))
        result.append(block)
    return tuple(result)


def _rows(chain: tuple[Node, ...]) -> int:
    """How many rows at a time: as many as leave most of what streaming saves.

    More rows start kernels less often and need more memory.
    """
    x = chain[0].inputs[0]
    assert x is not None, chain[0].name
    y = chain[-1].out.type
    around = x.type.nbytes + (y.nbytes if y.shape != x.type.shape else 0)
    pairs = [operand(n, 0).nbytes + n.out.type.nbytes for n in chain]
    if chain[-1].op == "QAdd":  # x stays until then
        pairs[1:-1] = [n + x.type.nbytes for n in pairs[1:-1]]
    separate = max(pairs)

    def need(rows: int) -> int:
        return around + get_op("StreamedBlock").workspace(block_node("block", chain, rows))

    one = need(1)
    most = min(MOST_ROWS, y.shape[2])
    allowed = one + (separate - one) // SHARE
    return max(r for r in range(1, most + 1) if r == 1 or need(r) <= allowed)


def _chain(
    graph: Graph, depthwise: Node, readers: Mapping[Value, list[Node]], taken: set[Node]
) -> tuple[Node, ...] | None:
    """The longest block around a depthwise layer, of layers that are in none yet."""
    if depthwise.op != "QConv" or depthwise.int_attr("group", 1) == 1:
        return None
    project = _only_reader(graph, depthwise.out, readers)
    x = depthwise.inputs[0]
    if project is None or x is None:
        return None
    starts: list[tuple[Node, ...]] = [(depthwise, project)]
    first = x.producer
    if first is not None and first not in taken and _only_reader(graph, x, readers) is depthwise:
        starts.insert(0, (first, depthwise, project))
    add = _only_reader(graph, project.out, readers)
    for start in starts:
        if any(n.op != "QConv" or any(n.inputs[5:]) for n in start):
            continue  # also if a part of the weight is updated: then it is in two operands
        chains = [start]
        if add is not None and add.op == "QAdd" and start[0].inputs[0] in add.inputs:
            chains.insert(0, (*start, add))
        for chain in chains:
            if _streamable(chain):
                return chain
    return None


def _only_reader(graph: Graph, value: Value, readers: Mapping[Value, list[Node]]) -> Node | None:
    """The node that alone reads a value, once."""
    if value in graph.outputs or len(readers[value]) != 1:
        return None
    reader = readers[value][0]
    return reader if sum(v is value for v in reader.operands()) == 1 else None


def _streamable(chain: tuple[Node, ...]) -> bool:
    try:
        get_op("StreamedBlock").infer(block_node("block", chain, 1))
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
        twin[v] = result.add_constant(
            name,
            data,
            v.type.dtype,
            v.type.quant,
            shape=v.type.shape,
            origin=lowered.origins.get(name),
        )
    for node in lowered.nodes:
        block = inside.get(node)
        if block is not None:
            if node.name != block.nodes[-1]:
                continue
            node = block_node(
                block.name, tuple(nodes[n] for n in block.nodes), block.rows, node.outputs
            )
        inputs = [None if v is None else twin[v] for v in node.inputs]
        wanted = [v.name for v in node.outputs]
        made = result.add_node(node.op, inputs, node.attrs, name=node.name, outputs=wanted)
        twin |= dict(zip(node.outputs, made.outputs, strict=True))
    result.outputs = [twin[v] for v in lowered.outputs]
    result.quantization = {k: q for k, q in lowered.quantization.items() if k in result.values}
    result.unchanged, result.merged = lowered.unchanged, lowered.merged
    result.loss, result.adapters = lowered.loss, lowered.adapters
    result.orders = lowered.orders
    result.verify()
    return result
