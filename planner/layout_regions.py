"""Addresses in several memory regions: which block lies where, and at which offset.

Best fit in decreasing size fills the regions in the order given. Where that leaves blocks over, the
choice is split (logic-based Benders decomposition, Hooker and Ottosson 2003): CP-SAT chooses a
region per block so that live bytes keep every capacity, ``layout`` places each region, and a region
that can't be placed forbids its set of blocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .blocks import Block, best_fit
from .layout import lay_out
from .layout_exact import DETERMINISTIC_PER_SECOND

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
        seconds: Limit of each exact search (see ``layout.lay_out``).
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
    spots = _fill(blocks, regions, may)
    if all(spots):
        return Placement("fits", tuple(s for s in spots if s is not None))
    return _Assignment(blocks, regions, may).solve(seconds, deterministic, seed)


def _fill(
    blocks: Sequence[Block], regions: Sequence[Region], may: Sequence[Sequence[int]]
) -> list[Spot | None]:
    """Best fit in decreasing size, region by region; None for blocks that are left over."""
    spots: list[Spot | None] = [None] * len(blocks)
    order = sorted(range(len(blocks)), key=lambda i: (len(may[i]), -blocks[i].bytes, i))
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
        self, blocks: Sequence[Block], regions: Sequence[Region], may: Sequence[Sequence[int]]
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

    def solve(self, seconds: float, deterministic: bool, seed: int) -> Placement:
        """Assign, place, forbid what can't be placed; until all regions are placed."""
        from ortools.sat.python import cp_model

        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = seed
        if deterministic:
            solver.parameters.max_deterministic_time = seconds * DETERMINISTIC_PER_SECOND
        else:
            solver.parameters.max_time_in_seconds = seconds
        proven = True  # every set was forbidden with a proof
        end = time.monotonic() + seconds
        for _ in range(MAX_ASSIGNMENTS):
            status = solver.solve(self.model)
            if status == cp_model.INFEASIBLE:
                return Placement("impossible" if proven else "not found")
            if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
                break
            chosen = {i: r for (i, r), x in self.x.items() if solver.boolean_value(x)}
            spots: dict[int, Spot] = {}
            for r, region in enumerate(self.regions):
                inside = [i for i in sorted(chosen) if chosen[i] == r]
                layout = lay_out(
                    [self.blocks[i] for i in inside], region.bytes,
                    seconds=seconds, deterministic=deterministic, seed=seed,
                )  # fmt: skip
                if layout.arena_bytes <= region.bytes:
                    spots |= {i: Spot(r, o) for i, o in zip(inside, layout.offsets, strict=True)}
                else:
                    proven &= layout.bound_bytes > region.bytes
                    self.model.add(sum(self.x[i, r] for i in inside) <= len(inside) - 1)
            if len(spots) == len(self.blocks):
                return Placement("fits", tuple(spots[i] for i in range(len(self.blocks))))
            if not deterministic and time.monotonic() > end:
                break
        return Placement("not found")
