"""Addresses: offsets of blocks with fixed lifetimes in one arena.

Best fit by several orders first, which meets the live-byte bound nearly always; then a tree search
for the bound (``layout_search``); then, where it was not met, lesser aims by bisection, and CP-SAT
(``layout_exact``). Groups of blocks that are apart in time are placed one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .blocks import Block, arena_bytes, best_fit, components, peak_bytes, unit_bytes
from .layout_exact import smallest_arena
from .layout_search import search

#: Nodes of the tree search that count as one second where the limit is work.
NODES_PER_SECOND = 5000
#: Shares of the limit: the search for the aim, each step of bisection, CP-SAT.
AIM_SHARE, BISECT_SHARE, EXACT_SHARE = 0.6, 0.05, 0.2
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
    blocks: Sequence[Block], steps: int, *, exact_time_s: float = 5.0, seed: int = 0
) -> list[int]:
    """Offsets of all blocks, aiming at an arena of exactly the live-byte peak.

    Args:
        blocks: Sizes, lifetimes and alignments.
        steps: Number of steps.
        exact_time_s: Limit of the exact searches, as work: the same layout on every machine.
        seed: Seed of the exact searches.

    Returns:
        Offset per block. The arena is ``arena_bytes(blocks, offsets)``.
    """
    assert all(0 <= b.first <= b.last < steps for b in blocks)
    return list(lay_out(blocks, seconds=exact_time_s, seed=seed).offsets)


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
        seed: Seed of the exact searches.

    Returns:
        The best layout found. It fits if ``arena_bytes <= capacity``; nothing does if
        ``bound_bytes > capacity``.
    """
    bound = peak_bytes(blocks)
    offsets = [0] * len(blocks)
    some = [i for i, b in enumerate(blocks) if b.bytes]
    aim = bound if capacity is None else capacity
    nodes, begin = 0, time.monotonic()
    for part in components([blocks[i] for i in some]):
        group = [some[k] for k in part]
        left = seconds if deterministic else max(seconds - (time.monotonic() - begin), 0.0)
        found = _component(
            [blocks[i] for i in group], max(aim, bound), left, deterministic, seed
        )
        bound = max(bound, found.bound_bytes)
        nodes += found.nodes
        for i, offset in zip(group, found.offsets, strict=True):
            offsets[i] = offset
    return Layout(tuple(offsets), arena_bytes(blocks, offsets), bound, nodes)


def _component(
    blocks: Sequence[Block], aim: int, seconds: float, deterministic: bool, seed: int
) -> Layout:
    """Blocks that hang together in time: an arena of at most ``aim`` bytes if there is one."""
    bound, unit = peak_bytes(blocks), unit_bytes(blocks)
    offsets: list[int] = []
    for key in _ORDERS:
        found = best_fit(blocks, sorted(range(len(blocks)), key=lambda i: (key(blocks[i]), i)))
        if not offsets or arena_bytes(blocks, found) < arena_bytes(blocks, offsets):
            offsets = found
    nodes = 0
    low, goal = bound, aim  # nothing below ``low`` is worth trying
    for step in range(BISECT_STEPS + 1):
        best = arena_bytes(blocks, offsets)
        if best <= aim or goal >= best:
            break
        share = (BISECT_SHARE if step else AIM_SHARE) * seconds
        result = search(blocks, goal, stop=_stop(share, deterministic), seed=seed)
        nodes += result.nodes
        if result.offsets is not None:
            offsets = result.offsets.tolist()
        else:
            low = goal + unit
            if result.answer == "impossible":
                bound = low
        goal = (low + arena_bytes(blocks, offsets)) // 2 // unit * unit
    if bound < arena_bytes(blocks, offsets) and arena_bytes(blocks, offsets) > aim >= bound:
        offsets, bound = smallest_arena(
            blocks, bound, offsets,
            seconds=EXACT_SHARE * seconds, deterministic=deterministic, seed=seed,
        )  # fmt: skip
    return Layout(tuple(offsets), arena_bytes(blocks, offsets), bound, nodes)


def _stop(seconds: float, deterministic: bool) -> Callable[[int], bool]:
    """Whether a search of so many nodes shall stop."""
    if deterministic:
        limit = int(seconds * NODES_PER_SECOND)
        return lambda nodes: nodes >= limit
    end = time.monotonic() + seconds
    return lambda nodes: time.monotonic() >= end
