"""Addresses: offsets of blocks with fixed lifetimes in one arena.

Best fit by several orders first, which meets the live-byte bound nearly always; then a tree search
for the bound (``layout_search``) and CP-SAT (``layout_exact``) by turns, each fast where the other
is not. Where both fail, lesser aims by bisection and a last word by CP-SAT. Groups of blocks that
are apart in time are placed one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .blocks import Block, arena_bytes, best_fit, components, peak_bytes, unit_bytes
from .layout_exact import solve_exactly
from .layout_search import search

#: Nodes of the tree search that count as one second where the limit is work.
NODES_PER_SECOND = 5000
#: Shares of the limit: tree search and CP-SAT for the aim, a short turn each and a long one; a step
#: of bisection; the last word.
AIM_TURNS = ((0.05, 0.05), (0.4, 0.35))
BISECT, LAST = 0.025, 0.05
BISECT_STEPS = 4

_ORDERS: tuple[Callable[[Block], tuple[int, ...]], ...] = (
    lambda b: (-b.bytes, b.first),
    lambda b: (-b.bytes * (b.last - b.first + 1), b.first),
    lambda b: (b.first - b.last, -b.bytes),
    lambda b: (b.first, -b.bytes),
)


@dataclass(frozen=True)
class Layout:
    """Offsets of all blocks, and what is known of the arena.

    Attributes:
        offsets: In bytes, per block.
        arena_bytes: Size of the arena that holds them.
        bound_bytes: Proven: no layout has a smaller arena.
        nodes: Partial layouts that the tree search visited.
    """

    offsets: tuple[int, ...]
    arena_bytes: int
    bound_bytes: int
    nodes: int = 0


def place(
    blocks: Sequence[Block],
    steps: int,
    *,
    enough_bytes: int | None = None,
    exact_time_s: float = 5.0,
    seed: int = 0,
) -> list[int]:
    """Offsets of all blocks, aiming at an arena of exactly the live-byte peak.

    Args:
        blocks: Sizes, lifetimes and alignments.
        steps: Number of steps.
        enough_bytes: Arena at which the search may end; see ``capacity`` of ``lay_out``.
        exact_time_s: Limit of the exact searches, as work: the same layout on every machine.
        seed: Seed of CP-SAT.

    Returns:
        Offset per block. The arena is ``arena_bytes(blocks, offsets)``.
    """
    assert all(0 <= b.first <= b.last < steps for b in blocks)
    return list(lay_out(blocks, enough_bytes, seconds=exact_time_s, seed=seed).offsets)


def lay_out(
    blocks: Sequence[Block],
    capacity: int | None = None,
    *,
    seconds: float,
    deterministic: bool = True,
    seed: int = 0,
) -> Layout:
    """The smallest arena, or one that keeps a capacity.

    Args:
        blocks: Sizes, lifetimes and alignments.
        capacity: Bytes that suffice; the search ends there. None: as few as possible.
        seconds: Limit of the exact searches.
        deterministic: The limit is work, else wall clock.
        seed: Seed of CP-SAT.

    Returns:
        The best layout found. It fits if ``arena_bytes <= capacity``; nothing does if
        ``bound_bytes > capacity``.
    """
    bound = peak_bytes(blocks)
    offsets = [0] * len(blocks)
    some = [i for i, b in enumerate(blocks) if b.bytes]
    aim = bound if capacity is None else capacity
    if aim < bound:
        seconds = 0.0  # best fit shows a capacity that works
    nodes, begin = 0, time.monotonic()
    for part in components([blocks[i] for i in some]):
        indices = [some[k] for k in part]
        left = seconds if deterministic else max(seconds - (time.monotonic() - begin), 0.0)
        group = _Group([blocks[i] for i in indices], left, deterministic, seed)
        group.solve(max(aim, bound))
        bound = max(bound, group.bound)
        nodes += group.nodes
        for i, offset in zip(indices, group.offsets, strict=True):
            offsets[i] = offset
    return Layout(tuple(offsets), arena_bytes(blocks, offsets), bound, nodes)


class _Group:
    """Blocks that hang together in time, with the best layout so far."""

    def __init__(
        self, blocks: Sequence[Block], seconds: float, deterministic: bool, seed: int
    ) -> None:
        self.blocks, self.unit = blocks, unit_bytes(blocks)
        self._seconds, self._deterministic, self._seed = seconds, deterministic, seed
        self.bound, self.nodes = peak_bytes(blocks), 0
        indices = range(len(blocks))
        layouts = [
            best_fit(blocks, sorted(indices, key=lambda i: (key(blocks[i]), i))) for key in _ORDERS
        ]
        self.offsets = min(layouts, key=lambda offsets: arena_bytes(blocks, offsets))

    @property
    def arena(self) -> int:
        """Bytes of the best layout so far."""
        return arena_bytes(self.blocks, self.offsets)

    def solve(self, aim: int) -> None:
        """Look for an arena of at most ``aim`` bytes, else for a small one."""
        for search_share, exact_share in AIM_TURNS:
            if self.arena > aim >= self.bound and self._search(aim, search_share) == "stopped":
                self._exact(aim, exact_share, improve=False)
        low = aim + self.unit  # nothing below is worth trying again
        for _ in range(BISECT_STEPS):
            if low >= self.arena:
                break
            goal = (low + self.arena) // 2 // self.unit * self.unit
            if self._search(goal, BISECT) != "fits":
                low = goal + self.unit
        if self.arena > max(aim, self.bound):
            self._exact(self.arena, LAST, improve=True)

    def _search(self, goal: int, share: float) -> str:
        stop = _stop(share * self._seconds, self._deterministic)
        found = search(self.blocks, goal, stop=stop)
        self.nodes += found.nodes
        if found.offsets is not None:
            self.offsets = found.offsets.tolist()
        elif found.answer == "impossible":
            self.bound = max(self.bound, goal + self.unit)
        return found.answer

    def _exact(self, at_most: int, share: float, improve: bool) -> None:
        offsets, self.bound = solve_exactly(
            self.blocks, self.bound, at_most, self.offsets if improve else None,
            seconds=share * self._seconds, deterministic=self._deterministic, seed=self._seed,
        )  # fmt: skip
        self.offsets = offsets or self.offsets


def _stop(seconds: float, deterministic: bool) -> Callable[[int], bool]:
    """Whether a search of so many nodes shall stop."""
    if deterministic:
        limit = int(seconds * NODES_PER_SECOND)
        return lambda nodes: nodes >= limit
    end = time.monotonic() + seconds
    return lambda nodes: time.monotonic() >= end
