"""The search for the best plan: a checked plan at once, then better ones until all is proven.

Whatever ends the search early, the time limit or Ctrl-C, it returns the best plan that has passed
the checker, with the bounds that are proven until then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..ir.adapters import adapters_by_param
from ..ir.autodiff import build_training
from ..ir.errors import InfeasibleError
from ..ir.training import Candidate
from .adapters import uncounted_bytes
from .assemble import ROUNDING
from .at_once import at_once, bound_of_all, tightened
from .check import CheckReport
from .compaction import compacted
from .decided import Decided, LateError, LayoutError, OutOfTimeError, Scheduled
from .joint import Joint
from .known import Known, KnownPlan
from .objective import Goal, Weighted, wants
from .plan import Plan, Stopped
from .progress import Watch
from .scheduling import schedule
from .stages import Stages

#: Rounds of choosing updates again, with less RAM, where no layout was found for them.
ROUNDS = 3
#: The part of the time that plans without adapters take at most, where adapters may be chosen.
BARE_SHARE = 0.5
#: A stage of the objective and the bound on it.
Bounds = Sequence[tuple[Goal, float]]


class StoppedEarlyError(KeyboardInterrupt):
    """The run was asked to end before there was any plan."""


@dataclass(frozen=True)
class Found:
    """A plan that passed the checker.

    Attributes:
        scheduled: What it was made from.
        plan: The plan.
        report: Of the checker.
    """

    scheduled: Scheduled
    plan: Plan
    report: CheckReport

    @property
    def merit(self) -> tuple[float, ...]:
        """Larger is better, stage by stage."""
        return tuple(o.value if o.name == "learn" else -o.value for o in self.plan.objective)

    @property
    def known(self) -> KnownPlan:
        """What a search under looser limits may begin with."""
        return KnownPlan(self.scheduled.decided, self.scheduled.schedule)


@dataclass(frozen=True)
class Start:
    """What is known before anything is chosen.

    Attributes:
        decided: All candidates, or the update set that is given; precisions as far as given.
        every: All candidates.
        free: Layers whose precision is to be chosen.
        fixed: The update set is given.
        goals: Stages of the objective: one, or learn and what comes next.
        known: What other searches have found.
    """

    decided: Decided
    every: tuple[Candidate, ...]
    free: tuple[str, ...]
    fixed: bool
    goals: tuple[Goal, ...]
    known: Known = field(default_factory=Known)

    @property
    def first(self) -> tuple[Decided, ...]:
        """What heuristics begin with: of a given update set each form of its state, for all."""
        states = dict.fromkeys(c.state for c in self.decided.updates)
        every = self.decided.updates
        return tuple(
            replace(self.decided, updates=tuple(c for c in every if c.state == state))
            for state in states
        )

    @property
    def learns(self) -> bool:
        """The first stage chooses updates, or precisions that learning depends on."""
        first = self.goals[0]
        weighs = isinstance(first, Weighted) and "learn" in first.weights
        return not self.fixed or bool(self.free and (first == "learn" or weighs))


@dataclass
class Search:
    """One search.

    Attributes:
        stages: Solves and schedules.
        start: What is known.
        gap: Relative gap that counts as proven.
        watch: Says when to end.
        checked: Makes a plan of a schedule and has it checked.
        best: Best plan so far.
    """

    stages: Stages
    start: Start
    gap: float
    watch: Watch
    checked: Callable[[Scheduled, Bounds, Stopped | None], Found]
    best: Found | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Start from bounds that hold without any solver."""
        start, first = self.start, self.start.goals[0]
        maximized = first == "learn"
        self._sign, self._tighter = (1, min) if maximized else (-1, max)
        self._inherited = start.known.bound
        self._decided: tuple[Decided, ...] = ()  # of first plans, the best one first
        self._bound = math.nan  # of the first stage, if that chooses updates or precisions
        if first == "learn":
            self._bound = self.stages.most_gain(start.free)
        elif start.learns:
            self._bound = bound_of_all(self.stages, start.decided, first, start.free)

    def run(self) -> Found:
        """Search until everything is proven or the run has to end.

        Raises:
            InfeasibleError: No plan keeps the limits, or none was found in time.
            StoppedEarlyError: Interrupted before there was any plan.
        """
        start, last = self.start, self.start.goals[-1]
        known = start.known.plan
        self._at_once(last)
        self._without_adapters()
        if self.best is not None:
            self._decided = (self.best.scheduled.decided, *self._decided)
        if known is not None and (self.best is None or self._is_better(start.known.value)):
            self._offer(self._again(known))
            self._decided = (known.decided, *self._decided)
        if self.best is not None and self._proven(self.best, but_last=True):
            self._tighten_last(self.best)
        if self.best is None or not self._proven(self.best):
            try:
                self._improve()
            except InfeasibleError:
                if self.best is None:
                    if self.watch.interrupted:
                        raise StoppedEarlyError from None
                    raise
        assert self.best is not None
        self._tighten_last(self.best)
        return self._check(self._compacted(self.best.scheduled))  # with the bounds as they are now

    def _compacted(self, done: Scheduled) -> Scheduled:
        if self.watch.over():
            return done
        return replace(done, schedule=compacted(done.schedule, self.stages.options.seed))

    def _at_once(self, last: Goal) -> None:
        """The plan that takes no solver."""
        start, free = self.start, self.start.free
        if not self.stages.all_updated:
            self._offer(at_once(self.stages, start.decided, last, fixed=start.fixed, free=free))
            return
        for decided in start.first:
            self._offer(at_once(self.stages, decided, last, fixed=True, free=free))
            if self.best is not None:
                break

    def _without_adapters(self) -> None:
        """The best plan of no adapter, where some may be chosen: one with them is to be better.

        The choice does not count all bytes that they take, and is larger with them.
        """
        start, watch = self.start, self.watch.part(BARE_SHARE * self.watch.left_s)
        own = adapters_by_param(self.stages.forward)
        bare = tuple(c for c in start.decided.updates if c.param not in own)
        if start.fixed or len(bare) in (0, len(start.decided.updates)):
            return
        start = replace(start, decided=replace(start.decided, updates=bare), known=Known())
        stages = replace(self.stages, watch=watch)
        try:
            found = Search(stages, start, self.gap, watch, self.checked).run()
        except (InfeasibleError, StoppedEarlyError):
            return
        finally:
            self.stages.time_s += stages.time_s
        self._offer(found.scheduled)
        self._decided = (found.scheduled.decided,)

    def settled(self) -> bool:
        """The plan reaches bounds that take no solver and hold for any order of operators."""
        goals, best = self.start.goals, self.best
        if best is None or any(wants(g, "ram") for g in goals):
            return False
        free = () if self.start.learns else self.start.free
        tight = tightened(self.stages, best.scheduled, goals[-1], free).bound
        if self.start.learns and len(goals) == 1:
            tight = self._bound
        return self._proven(best, but_last=True) and self._meets(best, tight)

    def _meets(self, found: Found, bound: float) -> bool:
        """The value of the last stage is as good as a bound says that any is."""
        value = found.plan.objective[-1].value
        return abs(value - bound) <= max(self.gap, ROUNDING) * max(abs(value), 1.0)

    def _improve(self) -> None:
        """All stages; an update set that fits but for its layout is chosen again with less RAM."""
        start, last, stages = self.start, self.start.goals[-1], self.stages
        if not start.learns:
            self._schedule(start.decided, start.free)
            return
        if self._only_last_left() or self._jointly():
            self._schedule_best()
            return
        joint = self._bound if self.best is not None and start.goals[0] == "learn" else None
        limits = stages.limits
        for is_last in (*[False] * (ROUNDS - 1), True):
            decided, proven = stages.learn(
                start.decided,
                fixed=start.fixed,
                free=start.free,
                limits=limits,
                goal=start.goals[0],
                known=self._decided,
                proven=joint,
            )
            if limits is stages.limits:
                self._tighten(proven)
            try:
                if self._may_be_best(decided):
                    self._schedule(decided)
                if not self._is_best(decided):
                    assert self.best is not None
                    self.best = self._check(self.best.scheduled)  # with the bounds as they are now
                    self._schedule_best()
                return
            except OutOfTimeError:
                if not self._is_best(decided):
                    self._offer(at_once(stages, decided, last, fixed=True))
                raise
            except LateError:
                if is_last:
                    raise
                self.watch.stage("transfers hide too little: choosing updates again")
                limits = replace(limits, wait_for_transfers=True)
            except LayoutError as e:
                if is_last:
                    raise
                self.watch.stage(f"no layout, {e.excess}: choosing updates again")
                limits = e.excess.off(limits)
            except InfeasibleError:
                training = build_training(stages.lowered(decided), stages.spec, decided.updates)
                more = uncounted_bytes(training)
                if not more:
                    raise
                if is_last:
                    raise InfeasibleError(
                        "no plan was found for any choice of adapters that was made; allow"
                        f" {more:,} B more with --ram"
                    ) from None
                self.watch.stage(f"adapters take up to {more:,} B more: choosing updates again")
                limits = replace(limits, ram_bytes=limits.ram_bytes - more)

    def _jointly(self) -> bool:
        """Choose updates together with what is made again, in a large model.

        False: there is more to try, as the whole program may choose better than what was found.
        """
        start, stages, best = self.start, self.stages, self.best
        if start.goals[0] != "learn" or start.fixed:
            return False
        problem = stages.learn_problem(start.decided, fixed=False, free=start.free)
        if problem.left_out is None:
            return False
        reached = 0.0 if best is None else best.plan.objective[0].value
        joint = Joint(stages, problem, start.decided, start.goals[-1], self.gap, reached)
        try:
            for found in joint.run():
                self._tighten(joint.bound)
                self._offer(found)
        finally:
            self._tighten(joint.bound)
        if self.best is None:
            return False
        self.best = self._check(self.best.scheduled)  # with the bounds as they are now
        if self._proven(self.best, but_last=True):
            return True
        reached = self.best.plan.objective[0].value
        return not stages.may_reach(problem, reached * (1 + self.gap))

    def _only_last_left(self) -> bool:
        """There is a plan, and its last stage of several is all that is not proven."""
        if self.best is None or len(self.start.goals) == 1 or self._proven(self.best):
            return False
        return self._proven(self.best, but_last=True)

    def _is_best(self, decided: Decided) -> bool:
        """The best plan has these updates and precisions."""
        return self.best is not None and decided.same_graph(self.best.scheduled.decided)

    def _may_be_best(self, decided: Decided) -> bool:
        """These updates learn as much as those of the best plan."""
        if self.best is None or self.start.goals[0] != "learn":
            return True
        stages = self.stages
        training = build_training(stages.lowered(decided), stages.spec, decided.updates)
        worth = sum(stages.achieved(training).values()) + stages.noise_avoided(decided)
        return worth >= self.best.plan.objective[0].value * (1 - ROUNDING)

    def _schedule_best(self) -> None:
        """Decide anew what is streamed, kept, rebuilt and paged for the updates of the best."""
        assert self.best is not None
        self._schedule(replace(self.best.scheduled.decided, streamed=()))

    def _schedule(self, decided: Decided, free: Sequence[str] = ()) -> None:
        """Offer the best schedule for these updates; what is proven of them holds in any case."""

        def proves(bound: float) -> None:
            if self.best is not None and (not self.start.learns or self._is_best(decided)):
                before = self.best.scheduled
                known = replace(before, bound=max(bound, before.bound), loose=False)
                self.best = replace(self.best, scheduled=known)

        self._offer(schedule(self.stages, decided, self.start.goals[-1], free, proves))

    def _again(self, known: KnownPlan) -> Scheduled:
        """A plan that is known, as a schedule of this search; nothing is proven of it."""
        training = build_training(
            self.stages.lowered(known.decided), self.stages.spec, known.decided.updates
        )
        return Scheduled(known.decided, training, known.schedule, 0.0, loose=True)

    def _is_better(self, value: float) -> bool:
        """Than the first stage of the best plan."""
        assert self.best is not None
        return self._sign * (value - self.best.plan.objective[0].value) > 0

    def _tighten(self, proven: float) -> None:
        self._bound = self._tighter(self._bound, proven)

    def _offer(self, scheduled: Scheduled | None) -> None:
        """Keep a schedule if its plan is better than the best so far."""
        if scheduled is None:
            return
        if self.best is not None:
            before = self.best.scheduled
            if not self.start.learns or scheduled.decided.same_graph(before.decided):
                tightest = max(before.bound, scheduled.bound)
                scheduled = replace(scheduled, bound=tightest)
                loose = before.loose and scheduled.loose
                self.best = replace(
                    self.best, scheduled=replace(before, bound=tightest, loose=loose)
                )
        if self._inherited is not None:
            reached = self.stages.reached(scheduled, self.start.goals[0])
            if self._sign * (reached - self._inherited) > ROUNDING * abs(reached):
                self._inherited = None  # of a model that is stricter than schedules are
        found = self._check(scheduled)
        if self.best is None or found.merit > self.best.merit:
            self.best = found
        self.watch.has_plan = True

    def _check(self, scheduled: Scheduled) -> Found:
        first = self._bound if self.start.learns else scheduled.bound
        if self._inherited is not None:
            first = self._tighter(first, self._inherited)
        bounds: list[tuple[Goal, float]] = [(self.start.goals[0], first)]
        if self.start.learns and len(self.start.goals) > 1:
            bounds.append((self.start.goals[-1], scheduled.bound))
        stopped: Stopped | None = "time limit" if self.stages.cut_short else None
        return self.checked(scheduled, bounds, self.watch.over() or stopped)

    def _proven(self, found: Found, *, but_last: bool = False) -> bool:
        """All stages are, or all but the last."""
        stages = found.plan.objective[: -1 if but_last else None]
        return all(o.gap <= max(self.gap, ROUNDING) for o in stages)

    def _tighten_last(self, found: Found) -> None:
        if found.scheduled.loose and not (self.start.learns and len(self.start.goals) == 1):
            free = () if self.start.learns else self.start.free
            tight = tightened(self.stages, found.scheduled, self.start.goals[-1], free)
            self.best = self._check(tight)
