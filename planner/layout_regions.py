"""Addresses in several memory regions: which block lies where, and at which offset.

Best fit in decreasing size fills the regions in the order given. Where that leaves blocks over, or
costs more than it might, the choice is split (logic-based Benders decomposition, Hooker and
Ottosson 2003): CP-SAT chooses a region per block, at the least cost, so that live bytes keep every
capacity, ``layout`` places each region, and a region that can't be placed forbids its set of
blocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .blocks import Block, best_fit
from .layout import NODES_PER_SECOND, lay_out
from .layout_exact import DETERMINISTIC_PER_SECOND

#: Share of the limit that one search for the layout of one of several regions may take.
LAYOUT_SHARE = 0.1
#: CP-SAT's deterministic time in a second of the processor where assignments have costs.
COSTED_PER_SECOND = 0.2
#: Assignments that are tried before giving up.
MAX_ASSIGNMENTS = 200


@dataclass(frozen=True)
class Region:
    """Adjacent memory.

    Attributes:
        base: Address of its first byte.
        bytes: Capacity.
    """

    name: str
    base: int
    bytes: int


@dataclass(frozen=True)
class Spot:
    """Where a block lies: index of the region, offset in it in bytes."""

    region: int
    offset: int


@dataclass(frozen=True)
class Placement:
    """What was found.

    Attributes:
        answer: ``fits``, ``impossible`` (proven) or ``not found``.
        spots: Per block if it fits.
    """

    answer: Literal["fits", "impossible", "not found"]
    spots: tuple[Spot, ...] = ()


def place_in_regions(
    blocks: Sequence[Block],
    regions: Sequence[Region],
    allowed: Sequence[Sequence[int]] | None = None,
    costs: Sequence[Sequence[int]] | None = None,
    *,
    seconds: float = 5.0,
    deterministic: bool = True,
    seed: int = 0,
) -> Placement:
    """A region and an offset for every block.

    Args:
        blocks: Sizes, lifetimes, alignments.
        regions: Where blocks may lie, the preferred ones first.
        allowed: Per block the indices of its regions; None: all of them.
        costs: Per block what it costs in each region; the sum is to be small. None: nothing.
        seconds: Limit of the exact search.
        deterministic: The limit is work, else wall clock.
        seed: Seed of the exact searches.

    Raises:
        ValueError: A region does not begin at a multiple of the alignments of its blocks.
    """
    may = [sorted(set(a)) for a in allowed] if allowed else [[*range(len(regions))]] * len(blocks)
    for b, indices in zip(blocks, may, strict=True):
        for r in indices:
            if regions[r].base % b.alignment:
                raise ValueError(
                    f"region {regions[r].name} begins at {regions[r].base:#x}, which is no multiple"
                    f" of {b.alignment}; raise its base"
                )
    found = _filled(blocks, regions, may, costs)
    if found is not None and _cost(found.spots, costs) == _least_cost(may, costs):
        return found
    better = _Assignment(blocks, regions, may, costs, found).solve(seconds, deterministic, seed)
    if found is None or (
        better.answer == "fits" and _cost(better.spots, costs) < _cost(found.spots, costs)
    ):
        return better
    return found


def missing_bytes(blocks: Sequence[Block], regions: Sequence[Region]) -> int:
    """The fewest bytes that one region lacks for best fit to place all blocks; 0 if none lacks any.

    An upper bound: a better layout may need fewer.
    """
    order = _by_size(blocks, [()] * len(blocks))
    least: list[int] = []
    for widened, region in enumerate(regions):
        left = order
        for r, other in enumerate(regions):
            if r != widened:
                offsets = best_fit(blocks, left, other.bytes)
                left = [i for i in left if offsets[i] < 0]
        offsets = best_fit(blocks, left)
        top = max((offsets[i] + blocks[i].bytes for i in left), default=0)
        least.append(max(0, top - region.bytes))
    return min(least)


def _cost(spots: Sequence[Spot], costs: Sequence[Sequence[int]] | None) -> int:
    if costs is None:
        return 0
    return sum(c[s.region] for c, s in zip(costs, spots, strict=True))


def _least_cost(may: Sequence[Sequence[int]], costs: Sequence[Sequence[int]] | None) -> int:
    """Every block in its cheapest region, whether there is room or not."""
    if costs is None:
        return 0
    return sum(min(c[r] for r in indices) for c, indices in zip(costs, may, strict=True))


def _by_size(blocks: Sequence[Block], may: Sequence[Sequence[int]]) -> list[int]:
    """Those with the fewest regions first, then the largest."""
    return sorted(range(len(blocks)), key=lambda i: (len(may[i]), -blocks[i].bytes, i))


def _filled(
    blocks: Sequence[Block],
    regions: Sequence[Region],
    may: Sequence[Sequence[int]],
    costs: Sequence[Sequence[int]] | None,
) -> Placement | None:
    """Best fit, region by region: by size, or by what a byte costs more in a worse region."""
    orders = [_by_size(blocks, may)]
    if costs is not None:
        stake = [
            (max(c) - min(c)) / max(b.bytes * (b.last - b.first + 1), 1)
            for b, c in zip(blocks, costs, strict=True)
        ]
        orders.append(sorted(orders[0], key=lambda i: (len(may[i]), -stake[i])))
    found = []
    for order in orders:
        spots = _fill(blocks, regions, may, order)
        if all(spots):
            found.append(tuple(s for s in spots if s is not None))
    if not found:
        return None
    return Placement("fits", min(found, key=lambda spots: _cost(spots, costs)))


def _fill(
    blocks: Sequence[Block],
    regions: Sequence[Region],
    may: Sequence[Sequence[int]],
    order: Sequence[int],
) -> list[Spot | None]:
    """Best fit in this order, region by region; None for blocks that are left over."""
    spots: list[Spot | None] = [None] * len(blocks)
    for r, region in enumerate(regions):
        offsets = best_fit(
            blocks, [i for i in order if spots[i] is None and r in may[i]], region.bytes
        )
        for i, offset in enumerate(offsets):
            if offset >= 0:
                spots[i] = Spot(r, offset)
    return spots


class _Assignment:
    """The choice of regions: Booleans ``x[i,r]``, live bytes, and sets that can't be placed."""

    def __init__(
        self,
        blocks: Sequence[Block],
        regions: Sequence[Region],
        may: Sequence[Sequence[int]],
        costs: Sequence[Sequence[int]] | None,
        known: Placement | None,
    ) -> None:
        from ortools.sat.python import cp_model

        self.blocks, self.regions = blocks, regions
        self.model = cp_model.CpModel()
        self.x = {
            (i, r): self.model.new_bool_var(f"x{i},{r}")
            for i, indices in enumerate(may)
            for r in indices
            if blocks[i].bytes <= regions[r].bytes
        }
        for i in range(len(blocks)):
            self.model.add_exactly_one(self.x[i, r] for r in may[i] if (i, r) in self.x)
        for step in sorted({b.first for b in blocks}):
            live = [i for i, b in enumerate(blocks) if b.first <= step <= b.last]
            for r, region in enumerate(regions):
                load = sum(blocks[i].bytes * self.x[i, r] for i in live if (i, r) in self.x)
                self.model.add(load <= region.bytes)
        self.per_second = DETERMINISTIC_PER_SECOND if costs is None else COSTED_PER_SECOND
        if costs is not None:
            self.model.minimize(sum(costs[i][r] * x for (i, r), x in self.x.items()))
        if known is not None:
            for (i, r), x in self.x.items():
                self.model.add_hint(x, known.spots[i].region == r)

    def solve(self, seconds: float, deterministic: bool, seed: int) -> Placement:
        """Assign, place, forbid what can't be placed; until all regions are placed."""
        from ortools.sat.python import cp_model

        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = seed
        share = LAYOUT_SHARE if len(self.regions) > 1 else 1.0
        proven = True  # every set was forbidden with a proof
        left, begin = seconds, time.monotonic()
        for _ in range(MAX_ASSIGNMENTS):
            if left <= 0:
                break
            if deterministic:
                solver.parameters.max_deterministic_time = left * self.per_second
            else:
                solver.parameters.max_time_in_seconds = left
            status = solver.solve(self.model)
            if status == cp_model.INFEASIBLE:
                return Placement("impossible" if proven else "not found")
            if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
                break
            left -= solver.response_proto.deterministic_time / self.per_second
            chosen = {i: r for (i, r), x in self.x.items() if solver.boolean_value(x)}
            spots: dict[int, Spot] = {}
            for r, region in enumerate(self.regions):
                inside = [i for i in sorted(chosen) if chosen[i] == r]
                layout = lay_out(
                    [self.blocks[i] for i in inside], region.bytes,
                    seconds=share * seconds, deterministic=deterministic, seed=seed,
                )  # fmt: skip
                left -= 2 * layout.nodes / NODES_PER_SECOND  # CP-SAT has turns as long as these
                if layout.arena_bytes <= region.bytes:
                    spots |= {i: Spot(r, o) for i, o in zip(inside, layout.offsets, strict=True)}
                else:
                    proven &= layout.bound_bytes > region.bytes
                    self.model.add(sum(self.x[i, r] for i in inside) <= len(inside) - 1)
            if len(spots) == len(self.blocks):
                return Placement("fits", tuple(spots[i] for i in range(len(self.blocks))))
            if not deterministic:
                left = seconds - (time.monotonic() - begin)
        return Placement("not found")
