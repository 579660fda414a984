"""The blocks of a convolutional network: what a designer would call one, found in the graph.

Where a single value is all that goes on, the network can be cut. Between two neighbouring cuts lies
one node, or a part with branches: a residual block, an Inception module, a gate. A block is

- a part with branches that holds a convolution wider than one pixel; or
- of the nodes in a row between such parts, a sequence that holds one. Pools and whatever else is
  no convolution and changes the shape stand between sequences, and a new one begins before a
  convolution with a stride. Where a 1x1 convolution or a sum is read without an activation, the
  sequences are linear bottlenecks instead (Sandler et al., "MobileNetV2", CVPR 2018): such values
  part them, and strides do not.

The first convolution of the model, its stem, is in no block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from .graph import Graph, Node, Value

#: Operators whose result a block may end in, before an activation.
_ENDS = ("Add", "BatchNormalization", "Concat", "Conv")


@dataclass(frozen=True)
class ConvBlock:
    """A block of layers.

    Attributes:
        start: What it reads, ``[N, C, H, W]``.
        end: What it makes, before the activation that may follow, in as many axes.
        layer: Its last convolution.
    """

    start: Value
    end: Value
    layer: Node


@dataclass(frozen=True)
class _Part:
    """What lies between two neighbouring cuts.

    Attributes:
        start: The value at the first.
        end: The value at the second.
        nodes: Those that make the second one, in order.
    """

    start: Value
    end: Value
    nodes: tuple[Node, ...]

    @property
    def is_conv(self) -> bool:
        """One convolution."""
        return len(self.nodes) == 1 and self.nodes[0].op == "Conv"

    @property
    def wide(self) -> bool:
        """A convolution in it sees more than one pixel."""
        return any(n.op == "Conv" and prod(_window(n)) > 1 for n in self.nodes)

    @property
    def main(self) -> bool:
        """It has convolutions, and is no gate, whose ones see one pixel."""
        return self.is_conv or self.wide

    @property
    def same(self) -> bool:
        """The shape stays: an activation, a normalization, a gate."""
        return self.start.type.shape == self.end.type.shape

    @property
    def strided(self) -> bool:
        """Its convolution skips pixels."""
        return max(self.nodes[0].ints_attr("strides", (1,))) > 1


def conv_blocks(graph: Graph) -> list[ConvBlock]:
    """All blocks of a forward graph that begin and end in maps of pixels, in order.

    Args:
        graph: A cleaned forward graph of real numbers.
    """
    parts = list(_parts(graph))
    stem = next((i for i, p in enumerate(parts) if p.main), len(parts))
    found: list[ConvBlock | None] = []
    row: list[_Part] = []
    for part in parts[stem + 1 :]:
        if len(part.nodes) > 1 and part.wide:
            found += [*_sequences(row), _block([part])]
            row = []
        elif part.is_conv or part.same:
            row.append(part)
        else:
            found += _sequences(row)
            row = []
    return [b for b in (*found, *_sequences(row)) if b is not None]


def _parts(graph: Graph) -> Iterator[_Part]:
    """What lies between cuts at maps of pixels; what is before the first cut has no start."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    last = {v: max(map(order.__getitem__, c)) for v, c in graph.consumers().items() if c}
    live: set[Value] = set()
    start: Value | None = None
    begin = 0
    for i, node in enumerate(graph.nodes):
        live = {v for v in live if last[v] > i} | {v for v in node.outputs if v in last}
        t = node.out.type
        if live != {node.out} or len(t.shape) != 4 or t.dtype != "f32":
            continue
        made = graph.nodes[begin : i + 1]
        yield _Part(start or node.out, node.out, _makers(node.out, made))
        start, begin = node.out, i + 1


def _makers(value: Value, nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Those of the nodes that a value depends on."""
    wanted, found = {value}, []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(node.operands())
            found.append(node)
    return tuple(reversed(found))


def _sequences(row: Sequence[_Part]) -> Iterator[ConvBlock | None]:
    """The blocks among parts in a row."""
    current: list[_Part] = []
    for part in row:
        if part.is_conv and any(p.is_conv for p in current):
            first = next(p for p in current if p.is_conv)
            if _linear(part.start) or (part.strided and not _linear(first.start)):
                yield _block(current)
                current = []
        current.append(part)
    yield _block(current)


def _linear(value: Value) -> bool:
    """A sum or the result of a 1x1 convolution, maybe normalized, without an activation."""
    node = value.producer
    while node is not None and node.op == "BatchNormalization":
        node = next(node.operands()).producer
    return node is not None and (
        node.op == "Add" or (node.op == "Conv" and prod(_window(node)) == 1)
    )


def _window(conv: Node) -> tuple[int, ...]:
    """Lengths of the axes of a convolution's window."""
    weight = conv.inputs[1]
    assert weight is not None, conv.name
    return weight.type.shape[2:]


def _block(parts: Sequence[_Part]) -> ConvBlock | None:
    """From the first convolution to the last one, and the normalization behind it."""
    if not any(p.wide for p in parts):
        return None
    main = [i for i, p in enumerate(parts) if p.main]
    end = parts[main[-1]]
    for part in parts[main[-1] + 1 :]:
        if part.nodes[-1].op != "BatchNormalization":
            break
        end = part
    if end.nodes[-1].op not in _ENDS:
        return None
    layer = [n for n in parts[main[-1]].nodes if n.op == "Conv"][-1]
    return ConvBlock(parts[main[0]].start, end.end, layer)
