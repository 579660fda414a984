"""Chains of nodes between one value and another, told by what they compute.

Exporters write one function as up to a dozen nodes, in many orders. A chain is found around a node
that every form of the function has, evaluated at points in double precision, and compared with the
function; how its nodes are arranged doesn't matter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .graph import Array, Attr, Graph, Node, Value
from .opdef import get_op, operand
from .surgery import drop_unread

#: Operators of a mean over axes.
MEANS = ("GlobalAveragePool", "ReduceMean")
#: Most values before the node in the middle that a chain is sought to begin at.
_BEFORE = 24


@dataclass(frozen=True, eq=False)
class Chain:
    """Nodes that compute ``y`` from ``x`` and constants, and that nothing else reads into.

    Attributes:
        x: Where it begins.
        nodes: In order; the last one makes ``y``.
        constants: Data of what it reads beside ``x``, as f64.
    """

    x: Value
    nodes: tuple[Node, ...]
    constants: Mapping[Value, Array]

    @property
    def y(self) -> Value:
        """Where it ends."""
        return self.nodes[-1].out

    def values(self, points: Array) -> Array:
        """What it computes from f64 points, which broadcast against ``x``."""
        known: dict[Value, Array] = {self.x: points, **self.constants}
        with np.errstate(all="ignore"):
            for node in self.nodes:
                known[node.out] = _result(node, [known[v] for v in node.operands()])
        return known[self.y]

    def become(
        self, graph: Graph, op: str, attrs: Mapping[str, Attr], rest: Collection[Value | None] = ()
    ) -> None:
        """Replace it by one node of ``x`` and the operands ``rest``, in the place of its last."""
        last = self.nodes[-1]
        last.op, last.attrs, last.inputs = op, dict(attrs), (self.x, *rest)
        for node in reversed(self.nodes[:-1]):
            drop_unread(graph, node)


def chains(graph: Graph, middle: Node, ops: Collection[str], reach: int) -> Iterator[Chain]:
    """Chains of some operators with a node in them, the longest first.

    Args:
        graph: A forward graph.
        middle: A node.
        ops: Operators of the nodes of a chain.
        reach: Most nodes one after the other behind the middle.
    """
    readers = graph.consumers()
    place = {n: i for i, n in enumerate(graph.nodes)}
    ends = [middle]
    level = [middle]
    for _ in range(reach):
        level = [n for m in level for n in readers[m.out] if n.op in ops]
        ends += (n for n in level if n not in ends)
    starts = _before(graph, middle, ops)[::-1]
    for end in sorted(ends, key=place.__getitem__, reverse=True):
        for x in starts:
            if x.type != end.out.type:
                continue
            nodes = _between(graph, x, end, ops)
            if nodes is None or middle not in nodes:
                continue
            inner = [n.out for n in nodes if n is not end]
            closed = all(v not in graph.outputs and nodes.issuperset(readers[v]) for v in inner)
            if not closed or any(v.name in graph.quantization for v in inner):
                continue
            constants = {
                v: graph.constants[v.name].astype(np.float64)
                for n in nodes
                for v in n.operands()
                if v.name in graph.constants and v is not x
            }
            yield Chain(x, tuple(sorted(nodes, key=place.__getitem__)), constants)


def _before(graph: Graph, node: Node, ops: Collection[str]) -> list[Value]:
    """Values that a node is computed from by such operators, nearest first."""
    result: list[Value] = []
    waiting = [node]
    while waiting and len(result) < _BEFORE:
        for v in waiting.pop(0).operands():
            if v.name in graph.constants or v in result:
                continue
            result.append(v)
            if v.producer is not None and v.producer.op in ops:
                waiting.append(v.producer)
    return result


def _between(graph: Graph, x: Value, end: Node, ops: Collection[str]) -> set[Node] | None:
    """The nodes that compute a result from x and constants; None if more is needed."""
    found = {end}
    waiting = list(end.operands())
    while waiting:
        v = waiting.pop()
        if v is x or v.name in graph.constants:
            continue
        if v.producer is None or v.producer.op not in ops:
            return None
        if v.producer not in found:
            found.add(v.producer)
            waiting += v.producer.operands()
    return found


def mean_axes(node: Node) -> tuple[int, ...]:
    """Axes of a ReduceMean or GlobalAveragePool."""
    rank = len(operand(node, 0).shape)
    if node.op == "GlobalAveragePool":
        return tuple(range(2, rank))
    return tuple(sorted(a % rank for a in node.ints_attr("axes", tuple(range(rank)))))


def _result(node: Node, inputs: list[Array]) -> Any:
    if node.op in MEANS:  # of fewer rows than the node's
        return inputs[0].mean(mean_axes(node), keepdims=bool(node.int_attr("keepdims", 1)))
    return get_op(node.op).kernel(node, inputs)[0]
