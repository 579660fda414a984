"""The builder that gradient rules append their nodes with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from .graph import Attr, Graph, Node, Value
from .quantization import HIGH, LOW, Quantization
from .training import Saved


class GradBuilder:
    """Appends the gradient nodes of one forward node.

    Attributes:
        graph: The training graph under construction.
        node: The forward node that is being differentiated.
        channels: Leading input channels of the weight whose gradient is built; None: all.
        saved: How the layer's input is kept for that gradient.
        bptt: Steps that the gradient of a recurrent layer passes; None: all.
        ends: What the loss starts at, as it is stored; no layer comes behind.
    """

    def __init__(
        self,
        graph: Graph,
        node: Node,
        aux: dict[Node, list[Node]],
        quantization: Mapping[str, Quantization] | None = None,
        ends: Collection[Value] = (),
    ) -> None:
        """Used by ``build_training`` only; ``quantization`` is that of the forward graph."""
        self.graph = graph
        self.node = node
        self.channels: int | None = None
        self.saved: Saved = "f32"
        self.bptt: int | None = None
        self.ends = ends
        self._quantization = quantization or {}
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

    def kept_input(self, x: Value, axis: int) -> Value:
        """The input of a float layer as the gradient of its weight is to read it.

        Leading channels in f32 or f16; in i8 all of them, or the leading ones of an i8 value that
        forward has anyway.
        """
        if self.saved == "f16":
            channels = self.channels or x.type.shape[axis]
            attrs: dict[str, Attr] = {"axis": axis, "channels": channels}
            return self.aux("ToHalf", (x,), attrs, suffix=f"half{channels}")
        return self.leading_channels(self._integers(x) if self.saved == "i8" else x, axis)

    def _integers(self, x: Value) -> Value:
        """The i8 form of a value: what it was dequantized from, what others read, or a copy."""
        if x.producer is not None and x.producer.op == "Dequantize":
            (stored,) = x.producer.operands()
            return stored
        quant = self._quantization[x.name]
        attrs: dict[str, Attr] = {
            "out_scale": quant.scale[0],
            "out_zero_point": quant.zero_point,
            "clamp": (LOW, HIGH),
        }
        for node in self.graph.nodes:
            if (node.op, node.inputs, node.attrs) == ("Quantize", (x,), attrs):
                return node.out
        return self.aux("Quantize", (x,), attrs, suffix="quantized")
