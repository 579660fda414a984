"""The builder that gradient rules append their nodes with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .graph import Attr, Graph, Node, Value


class GradBuilder:
    """Appends the gradient nodes of one forward node.

    Attributes:
        graph: The training graph under construction.
        node: The forward node that is being differentiated.
        channels: Leading input channels of the weight whose gradient is built; None: all.
    """

    def __init__(self, graph: Graph, node: Node, aux: dict[Node, list[Node]]) -> None:
        """Used by ``build_training`` only."""
        self.graph = graph
        self.node = node
        self.channels: int | None = None
        self._aux = aux
        self._made: list[Node] = []

    def add(
        self,
        op: str,
        inputs: Iterable[Value | None],
        attrs: Mapping[str, Attr] | None = None,
        *,
        suffix: str,
    ) -> Value:
        """Append a backward node named ``<forward node>/<suffix>`` and return its first result.

        An equal node that a rule appended before for the same forward node is used again: rules are
        asked for the gradients of parameters and operand one by one, and share what comes first.
        """
        operands, wanted = tuple(inputs), dict(attrs or {})
        for old in self._made:
            if (old.op, old.inputs, old.attrs) == (op, operands, wanted):
                return old.out
        name = f"{self.node.name}/{suffix}"
        node = self.graph.add_node(op, operands, wanted, name=name, phase="backward")
        self._made.append(node)
        return node.out

    def forget(self, node: Node) -> None:
        """Don't use this node's result again."""
        self._made.remove(node)

    def aux(
        self,
        op: str,
        inputs: Sequence[Value],
        attrs: Mapping[str, Attr] | None = None,
        *,
        suffix: str,
    ) -> Value:
        """A node that runs in the forward phase, right after the node being differentiated.

        It condenses what backward needs (a sign mask, an argmax index, leading channels). An equal
        node that was made for this or another node is used again: two layers that read the same
        tensor save its leading channels once.
        """
        for old in (n for nodes in self._aux.values() for n in nodes):
            if old.op == op and old.inputs == tuple(inputs) and old.attrs == dict(attrs or {}):
                return old.out
        name = f"{self.node.name}/{suffix}"
        node = self.graph.add_node(op, inputs, attrs, name=name, phase="forward")
        self._aux.setdefault(self.node, []).append(node)
        return node.out

    def leading_channels(self, x: Value, axis: int) -> Value:
        """The channels of ``x`` that the partial weight gradient needs; ``x`` itself for all."""
        k = self.channels
        if k is None or k == x.type.shape[axis]:
            return x
        rank = len(x.type.shape)
        attrs: dict[str, Attr] = {
            "starts": (0,) * rank,
            "sizes": tuple(k if i == axis else d for i, d in enumerate(x.type.shape)),
            "steps": (1,) * rank,
        }
        return self.aux("Slice", (x,), attrs, suffix=f"channels{k}")
