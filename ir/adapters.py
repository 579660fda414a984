"""Adapters: small layers beside frozen ones, which compute nothing before they have learned.

They are nodes of the imported graph: ordinary layers, and an ordinary sum that takes over the
result, and the name, of what they stand beside. So gradients, kernels and precisions are those of
any other node. ``ir.lora`` and ``ir.lite_residual`` put them there; of which nothing is updated is
taken out of the graph again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass

from .graph import Graph, Value
from .surgery import operand_of


@dataclass(frozen=True)
class Adapter(ABC):
    """The names of what stands beside a layer, or beside a block of them.

    Attributes:
        layer: The layer; of a block the last one.
        weight: Its weight.
        down: The first weight, which is random at first.
        up: The last weight, which is zero at first.
        nodes: The adapter's, in order; the last one is the sum.
    """

    layer: str
    weight: str
    down: str
    up: str
    nodes: tuple[str, ...]

    @property
    @abstractmethod
    def params(self) -> tuple[str, ...]:
        """What is updated together."""

    @property
    @abstractmethod
    def way(self) -> tuple[str, ...]:
        """Nodes that only the gradient of the adapter's input passes on its way from ``down``."""

    @property
    @abstractmethod
    def choice(self) -> str:
        """The parameter under whose name it is chosen: at most one choice of a name is taken."""


def adapters_by_param(graph: Graph) -> dict[str, Adapter]:
    """Each parameter of an adapter -> the adapter."""
    return {p: a for a in graph.adapters for p in a.params}


def without_unused(graph: Graph, params: Collection[str]) -> Graph:
    """A forward graph without the adapters that none of these parameters belongs to.

    Their last weight is zero, so it computes the same; what is left has the names that it would
    have without them.

    Args:
        graph: It is not modified; the same one if there is nothing to leave out.
        params: What is to be updated.
    """
    wanted = set(params)
    unused = [a for a in graph.adapters if not wanted.intersection(a.params)]
    if not unused:
        return graph
    gone = {name for a in unused for name in a.nodes}
    sums = {a.nodes[-1] for a in unused}
    names = {operand_of(n, 0): n.out.name for n in graph.nodes if n.name in sums}
    read = {v for n in graph.nodes if n.name not in gone for v in n.operands()}
    read |= set(graph.outputs)
    result = Graph(graph.name)
    twin: dict[Value, Value] = {v: result.add_input(v.name, v.type) for v in graph.inputs}
    for name, data in graph.constants.items():
        v = graph.values[name]
        if v in read:
            t, origin = v.type, graph.origins.get(name)
            twin[v] = result.add_constant(
                name, data, t.dtype, t.quant, shape=t.shape, origin=origin
            )
    for node in graph.nodes:
        if node.name in gone:
            twin[node.out] = twin[operand_of(node, 0)]  # of the sum: what it is added to
            continue
        inputs = [None if v is None else twin[v] for v in node.inputs]
        wanted_names = [names.get(v, v.name) for v in node.outputs]
        made = result.add_node(node.op, inputs, node.attrs, name=node.name, outputs=wanted_names)
        twin |= dict(zip(node.outputs, made.outputs, strict=True))
    result.outputs = [twin[v] for v in graph.outputs]
    result.quantization = {k: q for k, q in graph.quantization.items() if k in result.values}
    result.unchanged, result.merged = graph.unchanged, graph.merged
    result.loss, result.notes = graph.loss, graph.notes
    result.orders = {k: o for k, o in graph.orders.items() if k in result.constants}
    result.adapters = tuple(a for a in graph.adapters if a not in unused)
    result.verify()
    return result
