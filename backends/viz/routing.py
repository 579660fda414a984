"""Coordinates of a layered drawing: x by least squares, orthogonal edges on tracks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .layers import Item, Layers, Net

GAP = 26.0  # between neighbours of a layer
GUTTER = 34.0  # free space beside a column
TRACK = 9.0  # between parallel edges
STUB = 13.0  # edge without bends below and above a box
LABEL = 15.0  # height above a box that is free for edge labels
PORT_GAP = 58.0  # between the heads of edges into one box, so that their labels fit
PASSES = 8

Point = tuple[float, float]


@dataclass(eq=False)
class Drawing:
    """Final coordinates.

    Attributes:
        x: Left edge per box.
        y: Upper edge per box.
        routes: Corner points per edge, from the source's lower to the target's upper edge.
        width: Pixels, without margins.
        height: Pixels, without margins.
    """

    x: list[float]
    y: list[float]
    routes: list[list[Point]]
    width: float
    height: float


@dataclass(eq=False)
class _Wire:
    """The part of a net in one channel: pins at the upper and lower side, joined on one track."""

    tops: list[float] = field(default_factory=list)
    bottoms: list[float] = field(default_factory=list)
    track: int = 0

    @property
    def straight(self) -> bool:
        pins = [*self.tops, *self.bottoms]
        return max(pins) - min(pins) < 0.5

    @property
    def span(self) -> tuple[float, float]:
        pins = [*self.tops, *self.bottoms]
        return min(pins), max(pins)


def place(layers: Layers, box_height: float) -> Drawing:
    """Compute coordinates for an arranged graph whose boxes are all ``box_height`` pixels tall."""
    return _Placer(layers, box_height).run()


def spread(wanted: Sequence[float], room: Sequence[float], weight: Sequence[float]) -> list[float]:
    """Positions nearest to ``wanted`` (weighted least squares) at least ``room[i]`` after the last.

    ``room[0]`` is ignored. Pool adjacent violators.
    """
    offset, total = [], 0.0
    for i, r in enumerate(room):
        total += r if i else 0.0
        offset.append(total)
    blocks: list[tuple[float, float, int]] = []  # mean, weight, count
    for w, o, g in zip(wanted, offset, weight, strict=True):
        mean, mass, count = w - o, g, 1
        while blocks and blocks[-1][0] > mean:
            m, b, c = blocks.pop()
            mean, mass, count = (m * b + mean * mass) / (b + mass), b + mass, c + count
        blocks.append((mean, mass, count))
    flat = [m for m, _, c in blocks for _ in range(c)]
    return [f + o for f, o in zip(flat, offset, strict=True)]


class _Placer:
    def __init__(self, layers: Layers, box_height: float) -> None:
        self.layers, self.box_height = layers, box_height
        self.column_of = {
            level: c for c, (a, b) in enumerate(layers.columns) for level in range(a, b)
        }
        self.in_port: dict[tuple[Net, Item], float] = {}
        self.out_port: dict[Net, float] = {}
        self.gutters: dict[Net, dict[int, float]] = {}  #: x in the gutter after a column
        self.tracks: dict[tuple[Net, int, bool], float] = {}  #: y by layer above, entering a column

    def run(self) -> Drawing:
        self._horizontal()
        self._ports()
        top, heights = self._vertical()
        routes = self._routes(top)
        boxes = self.layers.items
        right = max(i.x + i.width / 2 for row in self.layers.layers for i in row)
        right = max([right, *(x for r in routes for x, _ in r)])
        return Drawing(
            [i.x - i.width / 2 for i in boxes],
            [top[i.layer] for i in boxes],
            routes,
            right,
            max(heights),
        )

    def _horizontal(self) -> None:
        """Centres of all items, and the x of each net in the gutter after each column."""
        up: dict[Item, list[Item]] = {}
        down: dict[Item, list[Item]] = {}
        for net in self.layers.nets:
            for a, b in net.hops:
                if self.column_of[a.layer] == self.column_of[b.layer]:
                    down.setdefault(a, []).append(b)
                    up.setdefault(b, []).append(a)
        left = 0.0
        for number, (first, end) in enumerate(self.layers.columns):
            rows = self.layers.layers[first:end]
            for row in rows:
                self._settle(row, [0.0] * len(row))
            for turn in range(PASSES):
                for row in rows if turn % 2 == 0 else rows[::-1]:
                    sides = up if turn % 2 == 0 else down
                    wanted = []
                    for item in row:
                        others = sides.get(item) or up.get(item) or down.get(item) or [item]
                        pull = max(map(_weight, others))
                        others = [o for o in others if _weight(o) == pull]
                        wanted.append(sum(o.x for o in others) / len(others))
                    self._settle(row, wanted)
            low = min(i.x - i.width / 2 for row in rows for i in row)
            high = max(i.x + i.width / 2 for row in rows for i in row)
            for row in rows:
                for item in row:
                    item.x += left - low
            crossing = [
                n
                for n in self.layers.nets
                if any(a.layer == end - 1 for a, _ in n.hops) and end < len(self.layers.layers)
            ]
            edge = left + high - low + GUTTER / 2
            for k, net in enumerate(crossing):
                self.gutters.setdefault(net, {})[number] = edge + k * TRACK
            left = edge + len(crossing) * TRACK + GUTTER / 2

    @staticmethod
    def _settle(row: list[Item], wanted: list[float]) -> None:
        room = [0.0]
        room += [(a.width + b.width) / 2 + GAP for a, b in pairwise(row)]
        weight = [_weight(item) for item in row]
        for item, x in zip(row, spread(wanted, room, weight), strict=True):
            item.x = x

    def _ports(self) -> None:
        into: dict[Item, list[tuple[Net, Item]]] = {}
        out: dict[Item, list[Net]] = {}
        for net in self.layers.nets:
            out.setdefault(net.source, []).append(net)
            for a, b in net.hops:
                into.setdefault(b, []).append((net, a))
        for source, nets in out.items():
            step = source.width / (len(nets) + 1)
            for k, net in enumerate(nets):
                self.out_port[net] = source.x - source.width / 2 + step * (k + 1)
        for item, pairs in into.items():
            if item.box is None:
                self.in_port[pairs[0][0], item] = item.x
                continue
            same = self.column_of[item.layer]
            wanted = [
                (self._leave(net, a) if self.column_of[a.layer] == same else item.x, k)
                for k, (net, a) in enumerate(pairs)
            ]
            wanted.sort()
            gap = min(PORT_GAP, (item.width - 24) / max(1, len(pairs) - 1))
            reach = item.width / 2 - 12
            free = spread([w for w, _ in wanted], [gap] * len(wanted), [1.0] * len(wanted))
            for r, ((_, k), x) in enumerate(zip(wanted, free, strict=True)):
                low = item.x - reach + gap * r
                high = item.x + reach - gap * (len(wanted) - 1 - r)
                self.in_port[pairs[k][0], item] = min(max(x, low), high)

    def _leave(self, net: Net, item: Item) -> float:
        return self.out_port[net] if item is net.source else item.x

    def _vertical(self) -> tuple[list[float], list[float]]:
        """Upper edge of each layer and height of each column; assigns the tracks."""
        top = [0.0] * len(self.layers.layers)
        heights = []
        for first, end in self.layers.columns:
            y = self._channel(first - 1, 0.0, entering=True) if first else 0.0
            for level in range(first, end):
                top[level] = y
                y += self.box_height
                if level + 1 < len(top):
                    y += self._channel(level, y, entering=False)
            heights.append(y)
        return top, heights

    def _channel(self, level: int, y: float, *, entering: bool) -> float:
        """Tracks of the edges that leave layer ``level`` (or enter the next column); its height."""
        column = self.column_of[level]
        cut = self.column_of[level + 1] != column
        wires: dict[Net, _Wire] = {}
        for net in self.layers.nets:
            for a, b in net.hops:
                if a.layer != level:
                    continue
                wire = wires.setdefault(net, _Wire())
                wire.tops.append(self.gutters[net][column] if entering else self._leave(net, a))
                leaving = cut and not entering
                wire.bottoms.append(self.gutters[net][column] if leaving else self.in_port[net, b])
        count = _assign_tracks([w for w in wires.values() if not w.straight])
        for net, wire in wires.items():
            self.tracks[net, level, entering] = y + STUB + wire.track * TRACK
        return STUB + count * TRACK + (0.0 if cut and not entering else LABEL)

    def _routes(self, top: list[float]) -> list[list[Point]]:
        routes: dict[int, list[Point]] = {}
        for net in self.layers.nets:
            for number, end in net.ends:
                chain = net.chain(end)
                points = [(self.out_port[net], top[net.source.layer] + self.box_height)]
                for a, b in pairwise(chain):
                    x, y = self.in_port[net, b], self.tracks[net, a.layer, False]
                    if (
                        abs(x - points[-1][0]) < 1
                        and self.column_of[a.layer] == self.column_of[b.layer]
                    ):
                        x = points[-1][0]  # straight on: what rounding leaves would show as a kink
                    points.append((points[-1][0], y))
                    if self.column_of[a.layer] != self.column_of[b.layer]:
                        gutter = self.gutters[net][self.column_of[a.layer]]
                        points.append((gutter, y))
                        y = self.tracks[net, a.layer, True]
                        points.append((gutter, y))
                    points += [(x, y), (x, top[b.layer])]
                routes[number] = _simplified(points)
        return [routes[i] for i in range(len(routes))]


def _weight(item: Item) -> float:
    """How firmly an item keeps its place: the main chain stays straight, everything else yields."""
    if item.box is None:
        return 1e-6
    return 1e-4 if item.leaf else 1.0


def _assign_tracks(wires: list[_Wire]) -> int:
    """Give each wire a track, none shared where they overlap; returns the number of tracks.

    A wire that comes down where another one goes down from its own track must bend above it. Such
    demands can form a circle; then the first wire in order goes first, and the two lines touch.
    """
    left = sorted(wires, key=lambda w: w.span)
    rows: list[list[_Wire]] = []

    def above(a: _Wire, b: _Wire) -> bool:
        return any(abs(p - q) < TRACK / 2 for p in a.tops for q in b.bottoms)

    placed: list[_Wire] = []
    while left:
        wire = next((w for w in left if not any(above(o, w) for o in left if o is not w)), left[0])
        left.remove(wire)
        track = max((o.track + 1 for o in placed if above(o, wire)), default=0)
        low, high = wire.span
        while track < len(rows) and any(
            o.span[0] < high + TRACK and low - TRACK < o.span[1] for o in rows[track]
        ):
            track += 1
        while len(rows) <= track:
            rows.append([])
        wire.track = track
        rows[track].append(wire)
        placed.append(wire)
    return len(rows)


def _simplified(points: list[Point]) -> list[Point]:
    """Drop repeated points and points on a straight line."""
    result: list[Point] = []
    for p in points:
        if result and max(abs(p[0] - result[-1][0]), abs(p[1] - result[-1][1])) < 0.05:
            continue
        while len(result) > 1 and any(
            abs(p[k] - result[-1][k]) < 0.05 and abs(result[-1][k] - result[-2][k]) < 0.05
            for k in (0, 1)
        ):
            result.pop()
        result.append(p)
    return result
