"""The living definition of a graph: run every node once, in order, with its NumPy kernel.

No plan, no arena, no reuse of memory. What a plan computes must equal this bit for bit in fp32;
gradient checks run it on float64 arrays.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .errors import GraphError
from .graph import Array, Graph, Node
from .opdef import get_op


def run(
    graph: Graph, feeds: Mapping[str, Array], kept: Collection[str] | None = None
) -> dict[str, Array]:
    """Execute a graph.

    Args:
        graph: A graph in topological order.
        feeds: Arrays in storage form (``bits`` packed) for the inputs and the state; entries for
            constants replace their data. Not modified.
        kept: Values that are wanted: only what they need is computed, and let go after its last
            reader. None: all are wanted.

    Returns:
        Every wanted value's array by name: feeds, constants and results.

    Raises:
        GraphError: A feed is unknown or has a wrong shape, a needed value is missing, or a kernel's
            result is not what inference says.
    """
    env: dict[str, Array] = dict(graph.constants)
    for name, array in feeds.items():
        if name not in graph.values:
            raise GraphError(f"feed {name}: {graph.name} has no value of that name")
        value = graph.values[name]
        if value.producer is not None:
            raise GraphError(f"feed {name}: node {value.producer.name} computes it")
        if array.shape != value.type.storage_shape:
            raise GraphError(f"feed {name}: shape {array.shape} is not that of {value.type}")
        env[name] = array
    nodes = graph.nodes if kept is None else _needed(graph, kept)
    last: dict[str, Node] = {}
    if kept is not None:
        last = {v.name: n for n in nodes for v in (*n.outputs, *n.operands())}
        env = {name: a for name, a in env.items() if name in last or name in kept}
    for node in nodes:
        for v in node.operands():
            if v.name not in env:
                raise GraphError(f"node {node.name} needs {v.name}; feed it")
        results = get_op(node.op).kernel(
            node, [None if v is None else env[v.name] for v in node.inputs]
        )
        for v, result in zip(node.outputs, results, strict=True):
            if result.shape != v.type.storage_shape:
                raise GraphError(f"node {node.name}: result {result.shape} is not {v.type}")
            env[v.name] = result
        if kept is not None:
            for name in {v.name for v in (*node.outputs, *node.operands())}:
                if last[name] is node and name not in kept:
                    del env[name]
    return env


def _needed(graph: Graph, kept: Collection[str]) -> list[Node]:
    """The nodes that these values depend on."""
    wanted, found = set(kept), []
    for node in reversed(graph.nodes):
        if wanted.intersection(v.name for v in node.outputs):
            found.append(node)
            wanted.update(v.name for v in node.operands())
    return found[::-1]
