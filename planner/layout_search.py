"""Tree search for a layout that keeps a capacity: complete, so it also proves that there is none.

The search of MiniMalloc (Moffitt 2023, ASPLOS): blocks are placed from low to high offsets, each
resting on what was placed below it (*canonical* layouts), so that a partial layout bounds every
later offset from below. Wherever the unplaced blocks fall apart in time, the parts are searched one
by one. Beyond the paper, a block that was passed over (an *orphan*) must be lifted by an unplaced
one: that bounds its offset, and ends the branch where nothing can lift it, or where it could drop
into its place without touching any other block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .blocks import Block, components, unit_bytes

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
#: Widths (lifetimes), sizes and crowds (live bytes around it) of blocks -> their indices in order.
Priority = Callable[[Ints, Ints, Ints], Ints]
#: Beyond every offset.
NEVER = np.int64(1) << 60
#: Nodes of the first round of orders, each, and how many times those of the round before it each
#: later round has. Tuned on the public instances.
FIRST_NODES, NODE_GROWTH = 4000, 4
#: Who goes first of blocks that lie equally low: decreasing crowd, width, area; as in the paper.
ORDERS = ("CWA", "CAW", "WAC")


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        answer: ``fits``, ``impossible`` (proven) or ``stopped`` (limit reached).
        offsets: Offset per block if it fits.
        nodes: Partial layouts that were visited.
    """

    answer: Literal["fits", "impossible", "stopped"]
    offsets: Ints | None
    nodes: int


@dataclass(frozen=True)
class _Problem:
    lower: Ints
    upper: Ints
    size: Ints
    align: Ints
    capacity: int


class _Part:
    """Unplaced blocks that hang together in time, with what the search reads of them.

    Attributes:
        ids: Their indices in the whole problem.
        begin, end: First section and the one after the last; sections are the times between events.
        meets: [n,n], lifetimes overlap.
        members: Blocks of the sections, one section after the other; ``starts``: where each starts.
        total: Bytes of each section.
        rank: Place in the order.
        twin: Block of the same lifetime and size that goes before, or -1.
    """

    def __init__(self, ids: Ints, problem: _Problem, floor: Ints, priority: Priority) -> None:
        self.ids, self.floor = ids, floor
        lower, upper = problem.lower[ids], problem.upper[ids]
        self.size, self.align = problem.size[ids], problem.align[ids]
        times = np.unique(np.concatenate([lower, upper]))
        self.begin, self.end = np.searchsorted(times, lower), np.searchsorted(times, upper)
        section = np.arange(len(times) - 1)[:, None]
        self.meets = (lower[:, None] < upper) & (lower < upper[:, None])
        np.fill_diagonal(self.meets, False)
        rows, self.members = np.nonzero((self.begin <= section) & (section < self.end))
        self.starts = np.searchsorted(rows, section[:, 0])
        self.total = np.add.reduceat(self.size[self.members], self.starts)
        spans = np.stack([self.begin, self.end], axis=1).ravel()
        crowd = np.maximum.reduceat(np.append(self.total, 0), spans)[::2]
        ranked = priority(upper - lower, self.size, crowd)
        self.rank = np.empty(len(ids), np.int64)
        self.rank[ranked] = np.arange(len(ids))
        self.twin = np.full(len(ids), -1)
        seen: dict[tuple[int, ...], int] = {}
        for i in ranked.tolist():
            same = (self.begin[i], self.end[i], self.size[i], self.align[i], floor[i])
            self.twin[i] = seen.get(same, -1)
            seen[same] = i

    def start(self, level: int) -> _State:
        """None of it is placed yet; what others placed ended at offset ``level``."""
        return _State(np.ones(len(self.ids), bool), self.floor, self.total, level, -1)


@dataclass(frozen=True)
class _State:
    """A partial layout of a part.

    Attributes:
        free: Not placed yet.
        floor: Least offset of a free block above what is placed.
        left: Bytes of free blocks, per section.
        level, last: Offset and rank of the block placed last.
    """

    free: Bools
    floor: Ints
    left: Ints
    level: int
    last: int


def _children(part: _Part, state: _State) -> Ints:
    """Free blocks that may be placed next, lowest first."""
    free, floor = state.free, state.floor
    lowest_top = np.where(free, floor + part.size, NEVER).min()
    may = free & (floor < lowest_top)
    may &= (floor > state.level) | ((floor == state.level) & (part.rank > state.last))
    may &= (part.twin < 0) | ~free[part.twin]
    found = np.nonzero(may)[0]
    return found[np.lexsort((part.rank[found], floor[found]))]


def _placed(part: _Part, state: _State, i: int, capacity: int) -> _State | None:
    """The state with block ``i`` on its floor; None if no layout can follow."""
    offset = int(state.floor[i])
    top = offset + int(part.size[i])
    free = state.free.copy()
    free[i] = False
    over = part.meets[i] & free
    floor = np.where(over, np.maximum(state.floor, top), state.floor)
    floor += -floor % part.align
    left = state.left.copy()
    left[part.begin[i] : part.end[i]] -= part.size[i]
    least = np.where(free, floor, NEVER)
    before = (floor < offset) | ((floor == offset) & (part.rank < part.rank[i]))
    orphan = np.nonzero(free & before)[0]
    if len(orphan):
        above = part.meets[orphan] & free
        start = np.maximum(least, offset)
        lowest = np.where(above, start, NEVER).min(1)
        if (lowest >= floor[orphan] + part.size[orphan]).any():  # nothing lifts it, or it drops in
            return None
        least[orphan] = np.where(above, start + part.size, NEVER).min(1)
    ground = np.maximum(np.minimum.reduceat(least[part.members], part.starts), offset)
    if ((ground + left > capacity) & (left > 0)).any():
        return None
    return _State(free, floor, left, offset, int(part.rank[i]))


class _Choice:
    """A node of the tree: a state and the blocks still to be tried next."""

    def __init__(self, part: _Part, state: _State) -> None:
        self.part, self.state = part, state
        self.untried = iter(_children(part, state).tolist())


class _Split:
    """A node whose parts are independent: one after the other."""

    def __init__(self, parts: list[_Part], level: int) -> None:
        self.waiting = iter([_Choice(p, p.start(level)) for p in parts])


def search(blocks: Sequence[Block], capacity: int, *, stop: Callable[[int], bool]) -> Search:
    """Look for a layout in a capacity.

    The orders take turns, with a node limit that grows from round to round, because the time that
    one order needs varies by orders of magnitude. Without a stop the search ends with an answer.

    Args:
        blocks: Sizes, lifetimes, alignments; their live-byte peak keeps the capacity.
        capacity: Bytes of the arena.
        stop: Tells after how many nodes to give up.
    """
    unit = unit_bytes(blocks)
    problem = _Problem(
        np.array([b.first for b in blocks], np.int64),
        np.array([b.last + 1 for b in blocks], np.int64),
        np.array([b.bytes // unit for b in blocks], np.int64),
        np.array([max(b.alignment // unit, 1) for b in blocks], np.int64),
        capacity // unit,
    )
    groups = [np.array(group, np.int64) for group in components(blocks)]
    nodes = 0
    for limit in (FIRST_NODES * NODE_GROWTH**k for k in count()):
        for priority in map(_by, ORDERS):
            found = _descend(problem, groups, priority, nodes, nodes + limit, stop)
            nodes = found.nodes
            if found.offsets is not None:
                return Search(found.answer, found.offsets * unit, nodes)
            if found.answer == "impossible" or stop(nodes):
                return found
    raise AssertionError("the rounds never end")


def _by(order: str) -> Priority:
    def ranked(width: Ints, size: Ints, crowd: Ints) -> Ints:
        keys = {"C": crowd, "W": width, "A": width * size.astype(np.float64)}
        return np.lexsort([-keys[k] for k in reversed(order)])

    return ranked


def _descend(
    problem: _Problem,
    groups: Sequence[Ints],
    priority: Priority,
    nodes: int,
    limit: int,
    stop: Callable[[int], bool],
) -> Search:
    """Depth first by one order, until ``nodes`` reaches the limit."""
    offsets = np.zeros(len(problem.size), np.int64)
    parts = [_Part(ids, problem, np.zeros(len(ids), np.int64), priority) for ids in groups]
    stack: list[_Choice | _Split] = [_Split(parts, 0)]
    solved = True  # the part on top, or nothing is wrong yet; else go back
    while stack:
        node = stack[-1]
        if isinstance(node, _Split):
            choice = next(node.waiting, None) if solved else None
            if choice is not None:
                stack.append(choice)
                solved = False
                continue
            stack.pop()
            while solved and stack and isinstance(stack[-1], _Choice):
                stack.pop()  # the choices that led here stand
            continue
        nodes += 1
        if nodes >= limit or (nodes % 64 == 1 and stop(nodes)):
            return Search("stopped", None, nodes)
        i = next(node.untried, None)
        if i is None:
            stack.pop()
            continue
        state = _placed(node.part, node.state, i, problem.capacity)
        if state is not None:
            offsets[node.part.ids[i]] = node.state.floor[i]
            stack.append(_follow(problem, node.part, state, priority))
            solved = isinstance(stack[-1], _Split)
    return Search("fits", offsets, nodes) if solved else Search("impossible", None, nodes)


def _follow(problem: _Problem, part: _Part, state: _State, priority: Priority) -> _Choice | _Split:
    """Go on with the free blocks as one part, or as several where none of them spans a time."""
    free = np.nonzero(state.free)[0]
    order = free[np.argsort(part.begin[free], kind="stable")]
    reach = np.maximum.accumulate(part.end[order])
    cuts = np.nonzero(part.begin[order][1:] >= reach[:-1])[0] + 1
    if len(free) and not len(cuts):
        return _Choice(part, state)
    groups = np.split(order, cuts) if len(free) else []
    parts = [_Part(part.ids[g], problem, state.floor[g], priority) for g in groups]
    return _Split(parts, state.level)
