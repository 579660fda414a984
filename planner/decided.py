"""What stages of planning hand on: decisions so far, their schedule, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..ir.errors import InfeasibleError
from ..ir.precision import Precision
from ..ir.training import Candidate, TrainingGraph
from .problem import Limits, Problem
from .schedule import Schedule
from .solution import Solution

#: Solve again with a tighter RAM limit at most this often when live bytes fit but no layout does.
LAYOUT_TRIES = 6
#: The part of the arena by which there is to be less RAM at least in a further try.
SLACK = 256
MIXED: Precision = "mixed"


class ProvenInfeasibleError(InfeasibleError):
    """The solver has proven that no plan keeps the limits that were asked for."""


@dataclass(frozen=True)
class Excess:
    """What a schedule takes beyond the limits that its decisions keep.

    The layout may need more than the live bytes, and buffers in slow regions take more cycles.

    Attributes:
        ram_bytes: Of RAM; of one region, where there are several.
        cycles: Of a training step.
        energy_j: Of a training step.
        unused_bytes: What the live bytes leave of the RAM budget, where several regions can't hold
            them all the same.
    """

    ram_bytes: int = 0
    cycles: int = 0
    energy_j: float = 0.0
    unused_bytes: int = 0

    @classmethod
    def of(cls, schedule: Schedule, problem: Problem, limits: Limits) -> Excess:
        """Of a schedule of the problem, beyond limits that may be wider than the problem's."""
        energy = problem.cost.energy_j(schedule.cycles, schedule.transfer_cycles)
        live = max(schedule.live) + schedule.state_bytes
        unused = problem.limits.ram_bytes - live if schedule.missing_bytes else 0
        return cls(
            max(0, schedule.over_bytes(limits)),
            0 if limits.cycles is None else max(0, schedule.cycles - limits.cycles),
            0.0 if limits.energy_j is None else max(0.0, energy - limits.energy_j),
            max(0, unused),
        )

    def __bool__(self) -> bool:
        """Something is exceeded."""
        return bool(self.ram_bytes or self.cycles or self.energy_j)

    def __str__(self) -> str:
        """In words."""
        if self.ram_bytes:
            return f"live bytes fit, the layout is {self.ram_bytes:,} B over"
        return f"buffers in slow RAM take {self.cycles:,} cycles, {self.energy_j:.3g} J too many"

    def off(self, limits: Limits, least_bytes: int = 0) -> Limits:
        """Limits that are tighter by it; by so many bytes at least where RAM is exceeded."""
        ram = max(self.ram_bytes, least_bytes) if self.ram_bytes else 0
        return replace(
            limits,
            ram_bytes=limits.ram_bytes - self.unused_bytes - ram,
            cycles=None if limits.cycles is None else limits.cycles - self.cycles,
            energy_j=None if limits.energy_j is None else limits.energy_j - self.energy_j,
        )


class LayoutError(InfeasibleError):
    """The decisions keep the limits, but no layout was found that does.

    Attributes:
        excess: What the best layout takes beyond the limits.
    """

    def __init__(self, limits: Limits, excess: Excess) -> None:
        """Say what to add."""
        where, there = f"{limits.ram_bytes:,} B of RAM", ""
        if limits.regions:
            where = ", ".join(f"{r.bytes:,} B of {r.name}" for r in limits.regions)
            there = " in one of them"
        more = f"{excess.ram_bytes:,} B more{there} with --ram"
        if not excess.ram_bytes:
            more = "a longer --latency" if excess.cycles else "a larger --energy"
        super().__init__(
            f"live bytes fit into {where}, but no layout was found in {LAYOUT_TRIES} tries;"
            f" allow {more}"
        )
        self.limits, self.excess = limits, excess

    def __reduce__(self) -> tuple[type[LayoutError], tuple[Limits, Excess]]:
        """Cross to another process by what it is made of."""
        return LayoutError, (self.limits, self.excess)


class LateError(InfeasibleError):
    """The model keeps the limits of time, but its schedule hides too little of page transfers.

    Attributes:
        bound: Proven bound of the objective.
    """

    def __init__(self, latency_s: float, bound: float) -> None:
        """Say what the schedule takes."""
        super().__init__(
            "the limits of time can be kept only if computing hides more of the page transfers than"
            f" any schedule that was found; it takes {latency_s:.6g} s: raise --latency, --energy"
            " or the RAM"
        )
        self.latency_s, self.bound = latency_s, bound

    def __reduce__(self) -> tuple[type[LateError], tuple[float, float]]:
        """Cross to another process by what it is made of."""
        return LateError, (self.latency_s, self.bound)


class OutOfTimeError(InfeasibleError):
    """The run ended before a stage found any solution, or proved that there is none."""


@dataclass(frozen=True)
class Decided:
    """What stages have fixed so far.

    Attributes:
        updates: The update set.
        precision: Of each layer and input of an annotated graph.
        chosen: Layers whose precision was the solver's choice.
        streamed: Blocks that run by rows.
    """

    updates: tuple[Candidate, ...]
    precision: Mapping[str, Precision]
    chosen: frozenset[str] = frozenset()
    streamed: tuple[str, ...] = ()

    def same_graph(self, other: Decided) -> bool:
        """Updates and precisions are those of the other."""
        return (self.updates, self.precision) == (other.updates, other.precision)

    def taking(self, problem: Problem, solution: Solution) -> Decided:
        """With the precisions of a solution."""
        free = {m.name: m.activity in solution.active for m in problem.mixed_layers}
        mixed: dict[str, Precision] = {n: MIXED for n, yes in free.items() if yes}
        return replace(
            self, precision={**self.precision, **mixed}, chosen=self.chosen | free.keys()
        )


@dataclass(frozen=True)
class Scheduled:
    """The outcome of all stages.

    Attributes:
        decided: Decisions.
        training: The training graph that the schedule's steps name.
        schedule: Placed.
        bound: Proven bound of the last stage's objective, for the budget that was asked for.
        loose: A much better bound costs little, see ``at_once.tightened``.
    """

    decided: Decided
    training: TrainingGraph
    schedule: Schedule
    bound: float
    loose: bool = False
