"""What is streamed by rows, kept, rebuilt and paged, with updates fixed.

Where all of it has a price, programs over few cuts of the timeline decide (``planner.streamed``,
``planner.cuts``). The whole model decides where they leave a gap, and for all other objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..ir.autodiff import build_training
from ..ir.training import TrainingGraph
from .bounds import bound
from .decided import Decided, OutOfTimeError
from .footprint import measure
from .linear import INF
from .milp import Milp, SolveResult
from .objective import Goal
from .problem import Limits, Problem
from .residency import Kept, Residency
from .stages import PLAIN_SHARE, Stages
from .streamed import BlockSearch, with_blocks
from .timeline import Rebuilds

#: Parts of the time left that go into choosing what is streamed, and into one search by cuts.
STREAMING_SHARE, CUTS_SHARE = 0.6, 0.6
#: Slots without rebuilds beyond which the whole model is left out where cuts have found a plan (it
#: has five to ten times as many), and the part of the time left that goes into cuts there.
LARGE_SLOTS, LARGE_SHARE = 300, 0.75


@dataclass(frozen=True)
class Keeping:
    """Decides for one objective.

    Attributes:
        stages: Lays problems out, solves, keeps the time.
        goal: The objective.
    """

    stages: Stages
    goal: Goal

    def blocks(
        self, start: Decided, free: Sequence[str], limits: Limits
    ) -> tuple[Decided, float | None, Kept | None]:
        """Choose what is streamed, and precisions that are left; nothing in a float graph.

        Args:
            start: The update set, and precisions as far as they are given.
            free: Layers whose precision is to be chosen.
            limits: Budgets.

        Returns:
            The decisions, a bound on all plans, and what is kept with it; None if not known.

        Raises:
            InfeasibleError: No choice keeps the limits.
            OutOfTimeError: None was found in time.
        """
        stages = self.stages
        choices = stages.streaming_choices(start, free)
        if choices is None:
            return start, None, None
        training = build_training(stages.lowered(start), stages.spec, start.updates)

        def build(rebuild: bool | Rebuilds) -> Problem:
            return stages.problem(
                training, fixed=True, limits=limits, choices=choices, rebuild=rebuild
            )

        plain, proven = build(False), None
        if not (plain.streams or plain.mixed_layers):
            return start, None, None
        if Residency(plain, build, self.goal).has_prices:
            search = BlockSearch(stages, start, plain, self.goal, limits)
            search.run()
            if search.best is not None:
                decided, kept = search.best
                return decided, search.bound, kept
            if search.bound == INF:
                raise stages.no_plan(limits)
            proven = search.bound
        what = "choosing what is streamed by rows"
        kept = self._decide(build, what, share=STREAMING_SHARE)
        problem, result = kept.problem, kept.result
        assert result.solution is not None
        decided = with_blocks(start, problem, result.solution)
        return decided, max(result.bound, proven or 0.0), None

    def keep(
        self, training: TrainingGraph, limits: Limits, proven: float | None, known: Kept | None
    ) -> Kept:
        """Choose what is kept, rebuilt and paged.

        Args:
            training: With updates and blocks fixed.
            limits: Budgets.
            proven: A bound on all plans that is known.
            known: What cuts have told, under these limits or wider ones.

        Raises:
            InfeasibleError: No choice keeps the limits, and no bound is known.
            OutOfTimeError: None was found in time.
        """
        residency, kept = self.stages.residency(training, self.goal, limits), known
        if not residency.priced:
            return self._less_ram(residency, self._whole(residency, proven))
        if kept is None or kept.problem.limits != limits:
            share = LARGE_SHARE if _large(residency) else CUTS_SHARE
            kept = self.stages.by_cuts(residency, share, None if kept is None else kept.found)
        if kept.result.status == "infeasible" and proven is None:
            raise self.stages.no_plan(limits)
        if kept.result.status == "infeasible" or self._within_gap(kept.result):
            return kept
        return self._closer(residency, kept, proven)

    def _closer(self, residency: Residency, kept: Kept, proven: float | None) -> Kept:
        """What cuts have decided, or what the whole model decides better."""
        result, stages = kept.result, self.stages
        if result.solution is not None and _large(residency):
            stages.cut_short = True
            return kept
        try:
            whole = self._whole(residency, proven)
        except OutOfTimeError:
            if result.solution is None:
                raise
            stages.cut_short = True
            return kept
        bound = max(whole.result.bound, result.bound)
        if not (result.value <= whole.result.value or whole.result.solution is None):
            kept = whole
        return replace(kept, result=replace(kept.result, bound=bound))

    def _whole(self, residency: Residency, proven: float | None) -> Kept:
        return self._decide(residency.build, "choosing what is kept", proven)

    def _less_ram(self, residency: Residency, kept: Kept) -> Kept:
        """What is kept with less RAM than the whole model finds, and a bound on it."""
        result, stages = kept.result, self.stages
        enough = result.solution is None or self._within_gap(result)
        if self.goal != "ram" or enough or stages.watch.over():
            return kept
        watch = stages.watch.part(CUTS_SHARE * stages.watch.left_s, lambda _: None)
        low, less = residency.least_ram(round(result.value), stages.options, watch)
        result = replace(result, bound=max(float(low), result.bound))
        if less is None:
            return replace(kept, result=result)
        ram = measure(*less).ram_bytes
        return Kept(less[0], replace(result, value=float(ram), solution=less[1]))

    def _decide(
        self,
        build: Callable[[bool], Problem],
        what: str,
        proven: float | None = None,
        share: float = 1.0,
    ) -> Kept:
        """Solve a problem, built with rebuilding or without; only with a bound may it fail.

        The much smaller problem without rebuilding comes first: if its value is within the gap of
        the bound, rebuilding has nothing to add. It is also what counts if the time is over then.
        """
        stages, goal, plain = self.stages, self.goal, build(False)
        stages.tell(f"{what}, nothing rebuilt: {len(plain.slots)} slots", goal)
        first = self._without_rebuilds(plain, proven)
        if first is not None and self._within_gap(first):
            return Kept(plain, first)
        problem = build(True)
        stages.tell(f"{what}: {len(problem.slots)} slots", goal)
        try:
            result = (stages.solve if proven is None else stages.attempt)(problem, goal, share)
        except OutOfTimeError:
            if first is None:
                raise
            stages.cut_short = True
            return Kept(plain, first)
        if problem.left_out is not None:
            of_all = bound(plain, goal) if first is None else first.bound
            result = replace(result, bound=of_all)
        if first is not None and not result.value < first.value:  # nan: no solution
            return Kept(plain, replace(first, bound=max(first.bound, result.bound)))
        return Kept(problem, result)

    def _without_rebuilds(self, problem: Problem, proven: float | None) -> SolveResult | None:
        """Decide without rebuilding activations, with a bound that holds for any rebuilding.

        Unless a bound is known, it is that of the problem in which rebuilding takes nothing.
        """
        stages, goal = self.stages, self.goal
        result = stages.solved(Milp(problem, goal), goal, PLAIN_SHARE)
        if result.solution is None:
            return None
        if proven is None:
            proven = 0.0
            if not stages.watch.over():
                relaxed = Milp(problem, goal, relaxed=True)
                proven = stages.solved(relaxed, goal, PLAIN_SHARE).bound
        return replace(result, bound=proven)

    def _within_gap(self, result: SolveResult) -> bool:
        return result.value <= result.bound * (1 + self.stages.options.gap)


def _large(residency: Residency) -> bool:
    return len(residency.plain.slots) > LARGE_SLOTS
