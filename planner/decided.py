"""What stages of planning hand on: decisions so far, their schedule, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..ir.errors import InfeasibleError
from ..ir.precision import Precision
from ..ir.training import Candidate, TrainingGraph
from .problem import Problem
from .schedule import Schedule
from .solution import Solution

#: Solve again with a tighter RAM limit at most this often when live bytes fit but no layout does.
LAYOUT_TRIES = 6
MIXED: Precision = "mixed"


class ProvenInfeasibleError(InfeasibleError):
    """The solver has proven that no plan keeps the limits that were asked for."""


class LayoutError(InfeasibleError):
    """Live bytes fit into the RAM budget, but no layout was found.

    Attributes:
        over_bytes: What the best layout needs beyond the budget.
    """

    def __init__(self, ram_bytes: int, over_bytes: int) -> None:
        """Say how much RAM to add."""
        super().__init__(
            f"live bytes fit into {ram_bytes:,} B of RAM, but no layout was found in {LAYOUT_TRIES}"
            f" tries; allow {over_bytes:,} B more with --ram"
        )
        self.over_bytes = over_bytes


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
        self.bound = bound


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
