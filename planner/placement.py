"""Where buffers lie if there are several RAM regions, and what slow ones cost.

The blocks of the arena and the tensors of the state are placed together, hot ones preferably in
fast regions. Within a region the state is then moved to the front: it lives all the time, so what
lies above it only slides down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

from .blocks import Block
from .layout_regions import Region, missing_bytes, place_in_regions
from .plan import RegionClaim, Step
from .problem import RamRegion
from .stays import Share

#: Costs of placements are integers, in this part of a cycle.
_CYCLE = 1024


@dataclass(frozen=True)
class Placed:
    """Offsets in arena and state, each of which has a part per region.

    Attributes:
        arena: Per block.
        state: Per tensor.
        where: Index of the region per block, then per tensor.
        regions: What each region holds.
    """

    arena: tuple[int, ...]
    state: tuple[int, ...]
    where: tuple[int, ...]
    regions: tuple[RegionClaim, ...]


def place_all(
    arena: Sequence[Block],
    state: Sequence[Block],
    traffic: Sequence[int],
    regions: Sequence[RamRegion],
    *,
    seconds: float,
    seed: int,
) -> Placed | int:
    """Place all blocks; if that fails, the bytes that one region lacks (an estimate, above 0).

    Args:
        arena: Blocks of the arena.
        state: Tensors that live all the time.
        traffic: Bytes that the steps of a training step touch, per block of arena, then of state.
        regions: Preferred ones first.
        seconds: Work of the exact search.
        seed: Of the exact search.
    """
    blocks = [*arena, *state]
    spaces = [Region(r.name, 0, r.bytes) for r in regions]
    costs = None
    if len({r.extra_cycles_per_byte for r in regions}) > 1:
        costs = [[round(_CYCLE * r.extra_cycles_per_byte * n) for r in regions] for n in traffic]
    found = place_in_regions(blocks, spaces, costs=costs, seconds=seconds, seed=seed)
    if found.answer != "fits":
        return max(missing_bytes(blocks, spaces), min(b.bytes for b in blocks if b.bytes))
    where = [s.region for s in found.spots]
    n = len(arena)
    parts = [0] * len(regions)
    kept = [0] * len(regions)
    offsets = [0] * n
    for r in range(len(regions)):
        front = sorted((found.spots[i].offset, i) for i in range(n, len(blocks)) if where[i] == r)
        kept[r] = sum(blocks[i].bytes for _, i in front)
        for i in range(n):
            if where[i] == r:
                at = found.spots[i].offset
                offsets[i] = at - sum(blocks[k].bytes for below, k in front if below < at)
                parts[r] = max(parts[r], offsets[i] + blocks[i].bytes)
    begins = [0, *accumulate(parts)]
    tops = [0, *accumulate(kept)]
    places = []
    for i in range(n, len(blocks)):
        places.append(tops[where[i]])
        tops[where[i]] += blocks[i].bytes
    return Placed(
        tuple(begins[r] + o for r, o in zip(where[:n], offsets, strict=True)),
        tuple(places),
        tuple(where),
        tuple(
            RegionClaim(name=r.name, budget=r.bytes, arena=a, state=s)
            for r, a, s in zip(regions, parts, kept, strict=True)
        ),
    )


def touches(step: Step, shares: Mapping[str, Share]) -> list[Share]:
    """What of arena and state a step touches."""
    named = (*step.reads, *step.writes, step.workspace, step.tile)
    return [shares[b] for b in named if b is not None and b in shares]


def traffic(touched: Sequence[Sequence[Share]], times: Sequence[int], blocks: int) -> list[int]:
    """Bytes of each block that the steps of a training step touch, each so many times."""
    result = [0] * blocks
    for shares, n in zip(touched, times, strict=True):
        for s in shares:
            result[s.block] += s.bytes * n
    return result


def extra_cycles(touched: Sequence[Share], where: Sequence[RamRegion]) -> int:
    """Cycles that a step takes more, with the region of every block."""
    more = sum(s.bytes * where[s.block].extra_cycles_per_byte for s in touched)
    # A millionth is the rounding of sums in another order, not a cycle.
    return ceil(round(more, 6))
