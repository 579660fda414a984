"""From updates to a placed schedule: all else is decided until the layout, too, keeps the limits.

What is streamed by rows, kept, rebuilt and paged is chosen (``planner.kept``), carried out and
placed. Where the layout takes more than live bytes, it is chosen again with that much less RAM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..ir.autodiff import build_training
from ..ir.errors import InfeasibleError
from .decided import (
    LAYOUT_TRIES,
    SLACK,
    Decided,
    Excess,
    LateError,
    LayoutError,
    OutOfTimeError,
    Scheduled,
)
from .kept import Keeping
from .milp import Milp, SolveResult, is_timed
from .objective import Goal, wants
from .problem import Limits, Problem
from .residency import Kept
from .schedule import Schedule, realize
from .stages import PLAIN_SHARE, Stages

#: Tries to take more RAM again, once a layout was found, and the part of it that is not tried for.
NEARER, NEAR = 4, 4096


def schedule(
    stages: Stages,
    start: Decided,
    goal: Goal,
    free: Sequence[str],
    proves: Callable[[float], None] = lambda _: None,
) -> Scheduled:
    """Decide all but the updates until the layout, too, keeps the RAM budget.

    The bound is that of the first solve: it holds for the budget that was asked for, later ones
    hold for tighter budgets only. The model may hide more of the page transfers than a schedule
    can. Where that leaves a gap, or breaks a limit, what is best with transfers that are waited
    for is scheduled as well: it takes no longer than its model says.

    Args:
        stages: Of the model and its limits.
        start: The update set, and precisions as far as they are given.
        goal: What to optimize.
        free: Layers whose precision is to be chosen.
        proves: Told bounds on the goal for these updates as soon as they are proven: they hold
            even where no schedule is found.

    Raises:
        InfeasibleError: No choice keeps the limits.
        LayoutError: One does, but no layout was found.
        LateError: One does, but not with what its transfers really hide.
        OutOfTimeError: None was found in time.
    """
    return _Scheduling(stages, start, goal, free, proves).run()


@dataclass
class _Scheduling:
    stages: Stages
    start: Decided
    goal: Goal
    free: Sequence[str]
    proves: Callable[[float], None]

    def run(self) -> Scheduled:
        stages, goal, limits = self.stages, self.goal, self.stages.limits
        if not stages.cost.overlaps or not is_timed(goal, limits):
            return self._scheduled(limits)
        waiting = replace(limits, wait_for_transfers=True)
        try:
            first = self._scheduled(limits)
        except LateError as late:
            try:
                return replace(self._scheduled(waiting), bound=late.bound)
            except OutOfTimeError:
                raise
            except InfeasibleError:
                raise late from None
        reached = stages.reached(first, goal)
        timed = wants(goal, "latency", "energy") and first.schedule.transfer_cycles > 0
        if not timed or reached <= first.bound * (1 + stages.options.gap):
            return first
        try:
            second = self._scheduled(waiting)
        except InfeasibleError:
            return first
        best = min((first, second), key=lambda s: stages.reached(s, goal))
        return replace(best, bound=first.bound)

    def _scheduled(self, limits: Limits) -> Scheduled:
        """A schedule under one way to count transfers."""
        stages, goal = self.stages, self.goal
        if stages.watch.over():
            raise stages.out_of_time()
        excess, keeping = Excess(), Keeping(stages, goal)
        decided, proven, kept = keeping.blocks(self.start, self.free, limits)
        self._tell(proven, limits)
        over = limits
        for tried in range(LAYOUT_TRIES):
            if tried and stages.watch.over():
                raise stages.out_of_time()
            training = build_training(stages.lowered(decided), stages.spec, decided.updates)
            kept = keeping.keep(training, limits, proven, kept)
            if proven is None:
                proven = kept.result.bound
                self._tell(proven, limits)
            if kept.result.solution is not None:
                schedule, excess = self._placed(kept, quick=stages.watch.over() is not None)
                hides = schedule.transfer_cycles and not limits.wait_for_transfers
                if excess and not excess.ram_bytes and stages.cost.overlaps and hides:
                    raise LateError(stages.cost.latency_s(schedule.cycles), proven)
                if not excess:
                    done = Scheduled(decided, training, schedule, proven)
                    return self._nearer(done, keeping, kept, over) if tried else done
                stages.tell(f"{excess}: tightening", goal)
                over, limits = limits, excess.off(limits, tried * schedule.arena_bytes // SLACK)
            else:  # tightened below what these blocks need
                try:
                    other, _, kept = keeping.blocks(self.start, self.free, limits)
                except OutOfTimeError:
                    raise
                except InfeasibleError:
                    break
                if other == decided:
                    break
                decided = other
        raise LayoutError(stages.limits, excess)

    def _tell(self, proven: float | None, limits: Limits) -> None:
        """A bound of all plans; those that wait for transfers are not all."""
        if proven is not None and limits is self.stages.limits:
            self.proves(proven)

    def _placed(self, kept: Kept, *, quick: bool) -> tuple[Schedule, Excess]:
        """The schedule of decisions, and by how much it exceeds the limits that were asked for."""
        stages, result = self.stages, self._moving_less(kept.problem, kept.result)
        assert result.solution is not None
        enough = None if wants(self.goal, "ram") else stages.limits.ram_bytes
        schedule = realize(
            kept.problem,
            result.solution,
            seed=stages.options.seed,
            enough_bytes=enough,
            quick=quick,
            hide_within=None if enough is None else stages.limits,
        )
        return schedule, Excess.of(schedule, kept.problem, stages.limits)

    def _nearer(self, done: Scheduled, keeping: Keeping, kept: Kept, over: Limits) -> Scheduled:
        """Of limits between those that had no layout and those that have, by bisection, the best.

        A plan that takes more RAM may have a layout all the same.
        """
        stages, goal, fits = self.stages, self.goal, kept.problem.limits
        for _ in range(NEARER):
            reached = stages.reached(done, goal)
            near = over.ram_bytes - fits.ram_bytes <= fits.ram_bytes // NEAR
            if near or wants(goal, "ram") or stages.watch.over():
                break
            if reached <= done.bound * (1 + stages.options.gap):
                break
            between = replace(fits, ram_bytes=(fits.ram_bytes + over.ram_bytes) // 2)
            try:
                kept = keeping.keep(done.training, between, done.bound, kept)
            except OutOfTimeError:
                break
            if kept.result.solution is None:
                break
            schedule, excess = self._placed(kept, quick=True)
            if excess:
                over = between
                continue
            fits, other = between, replace(done, schedule=schedule)
            done = min(done, other, key=lambda s: stages.reached(s, goal))
        return done

    def _moving_less(self, problem: Problem, found: SolveResult) -> SolveResult:
        """Of solutions that are as good, one with few transfers, which a schedule can hide."""
        assert found.solution is not None
        stages, limits = self.stages, problem.limits
        modelled = stages.cost.overlaps and not limits.wait_for_transfers
        modelled = modelled and is_timed(self.goal, limits)
        if not modelled or not found.solution.loads or stages.watch.over():
            return found
        shy = Milp(problem, self.goal, shy=True)
        other = stages.solved(shy, self.goal, PLAIN_SHARE, found.solution)
        return found if other.solution is None else other
