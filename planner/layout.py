"""Addresses: offsets of blocks with fixed lifetimes in one arena.

Best fit by decreasing size first (it meets the live-byte bound nearly always), then squeaky wheel
optimization (Joslin and Clements 1999: what ends too high is placed earlier the next time), then
CP-SAT with ``NoOverlap2D`` over time x address, each only if the bound is not met.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

#: Rounds of squeaky wheel optimization per start, and starts from the two best orders in turn.
SQUEAKY_ROUNDS = 80
SQUEAKY_STARTS = 12


@dataclass(frozen=True)
class Block:
    """Bytes that are occupied from step ``first`` to step ``last``, both inclusive."""

    bytes: int
    first: int
    last: int

    def meets(self, other: Block) -> bool:
        """Lifetimes overlap."""
        return self.first <= other.last and other.first <= self.last


def live_bytes(blocks: Sequence[Block], steps: int) -> list[int]:
    """Sum of the bytes that live at each step: the lower bound of any layout is its maximum."""
    change = [0] * (steps + 1)
    for b in blocks:
        change[b.first] += b.bytes
        change[b.last + 1] -= b.bytes
    total, result = 0, []
    for d in change[:steps]:
        total += d
        result.append(total)
    return result


def place(
    blocks: Sequence[Block],
    steps: int,
    *,
    enough_bytes: int = 0,
    starts: int = SQUEAKY_STARTS,
    exact_time_s: float = 5.0,
    seed: int = 0,
) -> list[int]:
    """Offsets of all blocks, aiming at an arena of exactly the live-byte peak.

    Args:
        blocks: Sizes (multiples of the alignment) and lifetimes.
        steps: Number of steps.
        enough_bytes: An arena up to this is good enough.
        starts: Of squeaky wheel optimization.
        exact_time_s: Time limit of the exact search, which starts where best fit misses the bound;
            0: there is none.
        seed: Seed of the exact search.

    Returns:
        Offset per block. The arena is ``arena_bytes(blocks, offsets)``.
    """
    bound = max(live_bytes(blocks, steps), default=0)
    orders: tuple[Callable[[Block], tuple[int, ...]], ...] = (
        lambda b: (-b.bytes, b.first),
        lambda b: (-b.bytes * (b.last - b.first + 1), b.first),
        lambda b: (-(b.last - b.first), -b.bytes),
        lambda b: (b.first, -b.bytes),
    )
    meeting = [
        [j for j, o in enumerate(blocks) if j != i and o.meets(b)] for i, b in enumerate(blocks)
    ]
    found: list[tuple[int, list[int], list[int]]] = []
    for key in orders:
        order = sorted(range(len(blocks)), key=lambda i: (key(blocks[i]), i))
        offsets = _best_fit(blocks, order, meeting)
        found.append((arena_bytes(blocks, offsets), order, offsets))
        if found[-1][0] <= bound:
            return offsets
    found.sort(key=lambda f: f[0])
    best = found[0][2]
    bound = max(bound, enough_bytes)
    if found[0][0] <= bound:
        return best
    random = Random(seed)
    for start in range(starts):
        order = found[start % 2][1]
        offsets = _squeaky_wheel(blocks, order, meeting, bound, random)
        if arena_bytes(blocks, offsets) < arena_bytes(blocks, best):
            best = offsets
        if arena_bytes(blocks, best) <= bound:
            return best
    return best if exact_time_s <= 0 else _exact(blocks, bound, best, exact_time_s, seed)


def arena_bytes(blocks: Sequence[Block], offsets: Sequence[int]) -> int:
    """Size of the arena that holds all blocks."""
    return max((o + b.bytes for b, o in zip(blocks, offsets, strict=True)), default=0)


def _best_fit(
    blocks: Sequence[Block], order: Sequence[int], meeting: Sequence[Sequence[int]]
) -> list[int]:
    """Place in this order, each block into the smallest gap that takes it, else on top."""
    offsets = [-1] * len(blocks)
    for i in order:
        size = blocks[i].bytes
        taken = sorted(
            (offsets[j], offsets[j] + blocks[j].bytes) for j in meeting[i] if offsets[j] >= 0
        )
        best_gap, spot, top = None, 0, 0
        for begin, end in taken:
            gap = begin - top
            if gap >= size and (best_gap is None or gap < best_gap):
                best_gap, spot = gap, top
            top = max(top, end)
        offsets[i] = spot if best_gap is not None else top
    return offsets


def _squeaky_wheel(
    blocks: Sequence[Block],
    order: Sequence[int],
    meeting: Sequence[Sequence[int]],
    bound: int,
    random: Random,
) -> list[int]:
    """Best layout of some rounds; blocks that end above the bound move forward in the order."""
    rank = {i: float(k) for k, i in enumerate(order)}
    best: list[int] = []
    for _ in range(SQUEAKY_ROUNDS):
        offsets = _best_fit(blocks, sorted(rank, key=lambda i: (rank[i], i)), meeting)
        if not best or arena_bytes(blocks, offsets) < arena_bytes(blocks, best):
            best = offsets
        if arena_bytes(blocks, best) <= bound:
            break
        for i, b in enumerate(blocks):
            if offsets[i] + b.bytes > bound:
                rank[i] -= len(blocks) * random.uniform(0.05, 0.4)
    return best


def _exact(
    blocks: Sequence[Block], bound: int, start: list[int], time_s: float, seed: int
) -> list[int]:
    """CP-SAT: smallest arena, warm-started; returns ``start`` where nothing better is found."""
    from ortools.sat.python import cp_model

    limit = arena_bytes(blocks, start)
    unit = _common_unit(blocks)
    model = cp_model.CpModel()
    top = model.new_int_var(bound // unit, limit // unit, "top")
    at, across, along = [], [], []
    for i, b in enumerate(blocks):
        size = b.bytes // unit
        v = model.new_int_var(0, limit // unit - size, f"at{i}")
        at.append(v)
        along.append(model.new_fixed_size_interval_var(b.first, b.last - b.first + 1, f"t{i}"))
        across.append(model.new_fixed_size_interval_var(v, size, f"a{i}"))
        model.add(v + size <= top)
        model.add_hint(v, start[i] // unit)
    model.add_no_overlap_2d(along, across)
    model.minimize(top)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_s
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return start
    return [solver.value(v) * unit for v in at]


def _common_unit(blocks: Sequence[Block]) -> int:
    from math import gcd

    unit = 0
    for b in blocks:
        unit = gcd(unit, b.bytes)
    return max(unit, 1)
