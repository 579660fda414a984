"""Layered drawing of a directed acyclic graph (Sugiyama): layers, order, page columns.

Layers are longest paths from the inputs. An edge over several layers passes a narrow point in each
of them, shared by all edges of the same net (one value with all its readers). The order inside the
layers comes from barycentre sweeps. A tall drawing is cut into columns, read like those of a
newspaper, so that it fits a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import networkx as nx

#: Wanted width over height of the whole drawing: a landscape page.
ASPECT = 1.4
SWEEPS = 12


@dataclass(eq=False)
class Item:
    """A box, or the point where a long edge passes a layer.

    Attributes:
        layer: Index of its layer.
        width: Pixels.
        box: Index of the box, None for a pass point.
        leaf: A box without readers, or an input beside others.
        x: Centre.
    """

    layer: int
    width: float
    box: int | None
    leaf: bool = False
    x: float = 0.0


@dataclass(eq=False)
class Net:
    """One value and all its readers.

    Attributes:
        hops: Pairs of items in neighbouring layers, from the source outwards.
        ends: Readers: (edge index, item of the reader).
    """

    source: Item
    hops: list[tuple[Item, Item]] = field(default_factory=list)
    ends: list[tuple[int, Item]] = field(default_factory=list)

    def chain(self, end: Item) -> list[Item]:
        """Items from the source to a reader."""
        before = {b: a for a, b in self.hops}
        result = [end]
        while result[-1] is not self.source:
            result.append(before[result[-1]])
        return result[::-1]


@dataclass(eq=False)
class Layers:
    """The combinatorial part of a drawing.

    Attributes:
        items: One per box, in box order.
        layers: Items by layer, left to right.
        nets: In order of their source.
        columns: Page columns as (first layer, end layer).
    """

    items: list[Item]
    layers: list[list[Item]]
    nets: list[Net]
    columns: list[tuple[int, int]]


def arrange(
    widths: Sequence[float],
    edges: Sequence[tuple[int, int, str]],
    pass_width: float,
    layer_height: float,
) -> Layers:
    """Assign boxes to layers, order them and cut the layers into columns.

    Args:
        widths: Box widths in pixels.
        edges: (source box, target box, net name); at most one edge per target and net name.
        pass_width: Pixels kept free for a passing edge.
        layer_height: Estimated pixels of a layer with its edges, to choose the number of columns.
    """
    depth = _depths(len(widths), edges)
    items = [Item(depth[i], w, i) for i, w in enumerate(widths)]
    inner = {a for a, _, _ in edges}
    fed = {b for _, b, _ in edges}
    for i, item in enumerate(items):
        item.leaf = (i not in inner or i not in fed) and depth[i] > 0
    layers: list[list[Item]] = [[] for _ in range(max(depth) + 1)]
    for item in items:
        layers[item.layer].append(item)
    nets: dict[tuple[int, str], Net] = {}
    for number, (a, b, name) in enumerate(edges):
        net = nets.setdefault((a, name), Net(items[a]))
        net.ends.append((number, items[b]))
    for net in nets.values():
        _thread(net, layers, pass_width)
    result = Layers(items, layers, list(nets.values()), [])
    _order(result)
    widest = max(sum(i.width for i in layer) for layer in layers)
    result.columns = _columns(result, widest, layer_height)
    return result


def _depths(count: int, edges: Sequence[tuple[int, int, str]]) -> list[int]:
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from((a, b) for a, b, _ in edges)
    depth = [0] * count
    for level, members in enumerate(nx.topological_generations(graph)):
        for i in members:
            depth[i] = level
    for i in range(count):  # an input stands right above its first reader (labels: near the loss)
        if graph.in_degree(i) == 0 and graph.out_degree(i) > 0:
            depth[i] = min(depth[b] for b in graph.successors(i)) - 1
    return depth


def _thread(net: Net, layers: list[list[Item]], width: float) -> None:
    deepest = max(end.layer for _, end in net.ends)
    last = net.source
    for level in range(net.source.layer + 1, deepest + 1):
        net.hops += [(last, end) for _, end in net.ends if end.layer == level]
        if level < deepest:
            point = Item(level, width, None)
            layers[level].append(point)
            net.hops.append((last, point))
            last = point


def _order(drawing: Layers) -> None:
    up: dict[Item, list[Item]] = {}
    down: dict[Item, list[Item]] = {}
    for net in drawing.nets:
        for a, b in net.hops:
            down.setdefault(a, []).append(b)
            up.setdefault(b, []).append(a)
    best, fewest = [list(layer) for layer in drawing.layers], _crossings(drawing.layers, down)
    place = {item: float(i) for layer in drawing.layers for i, item in enumerate(layer)}
    for sweep in range(SWEEPS):
        downwards = sweep % 2 == 0
        levels = drawing.layers[1:] if downwards else drawing.layers[-2::-1]
        sides = up if downwards else down
        for layer in levels:

            def centre(item: Item, sides: dict[Item, list[Item]] = sides) -> float:
                others = sides.get(item)
                return sum(place[o] for o in others) / len(others) if others else place[item]

            layer.sort(key=centre)  # stable: ties keep their order
            place.update((item, float(i)) for i, item in enumerate(layer))
        count = _crossings(drawing.layers, down)
        if count < fewest:
            best, fewest = [list(layer) for layer in drawing.layers], count
    drawing.layers[:] = best


def _crossings(layers: Sequence[Sequence[Item]], down: dict[Item, list[Item]]) -> int:
    total = 0
    for upper, lower in pairwise(layers):
        place = {item: i for i, item in enumerate(lower)}
        ends = [sorted(place[b] for b in down.get(a, ())) for a in upper]
        flat = [e for row in ends for e in row]
        seen = [0] * len(lower)
        for e in flat:
            total += sum(seen[e + 1 :])
            seen[e] += 1
    return total


def _columns(drawing: Layers, width: float, layer_height: float) -> list[tuple[int, int]]:
    """Cut where few edges pass, into as many columns as bring the drawing near a page's shape."""
    count = len(drawing.layers)

    def misfit(columns: int) -> float:
        ratio = columns * width / (-(-count // columns) * layer_height)
        return max(ratio / ASPECT, ASPECT / ratio)

    wanted = min(range(1, max(1, count // 4) + 1), key=misfit)
    crossing = [0] * count
    for net in drawing.nets:
        for layer in {a.layer for a, _ in net.hops}:
            crossing[layer] += 1
    cuts = [0]
    for k in range(1, wanted):
        ideal = count * k / wanted
        reach = max(1, round(count / wanted * 0.2))
        near = [
            c
            for c in range(int(ideal) - reach, int(ideal) + reach + 1)
            if cuts[-1] + 1 < c < count - 1
        ]
        if near:
            cuts.append(min(near, key=lambda c: (crossing[c - 1], abs(c - ideal))))
    return list(zip(cuts, [*cuts[1:], count], strict=True))
