"""Updates chosen together with what is made again, where a program of both would be too large.

A program over few cuts of the timeline chooses updates (``planner.choice``); its optimum is a bound
of all plans. Another one says what is made again for these updates (``planner.cuts``), and whether
they fit at all. Where they don't, the cuts that tell so become cuts of the first program, too, as
long as that is solved quickly. What difference is left between both is closed from below: the
choice is asked for less RAM, by bisection.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass, field, replace

from .assemble import ROUNDING
from .at_once import fitting
from .choice import Cut, Make, Unfit, cuts_of
from .core import Tree
from .cut_conflict import MANY
from .decided import Decided, Scheduled
from .milp import FEW, SolveResult
from .objective import Goal
from .problem import Problem
from .progress import Watch
from .remakes import Found
from .residency import Residency
from .solution import Solution
from .stages import CHOICE_SHARE, Stages

#: Where the updates for all RAM don't fit: the part of RAM that is given up first; twice as much
#: more each time until they do.
FIRST_STEP = 1 / 32
#: The part of RAM that the bisection doesn't divide further.
NARROWEST = 1 / 256
#: Parts of the time left: for all of it, and what a solve may take if there are to be more cuts.
SHARE, QUICK_SHARE = 0.75, 0.1
#: Part of that time after which no cuts are added before there is a plan.
LATE_SHARE = 0.4
#: The largest gap of a choice, and the part of what is left between bound and plan that it takes.
COARSE, PART = 0.01, 0.2
#: Part of the gap that a choice may leave that is hardly better than the plan.
FINE = 0.25


@dataclass(frozen=True)
class _Fit:
    """What is known of the updates of a choice.

    Attributes:
        plan: With them.
        missed: Cuts that tell why there may be none.
        unfit: Proven: there is none.
        over: Bytes that checkpoints miss; 0 or less: none.
    """

    plan: Scheduled | None
    missed: frozenset[Cut | Make]
    unfit: bool
    over: int


@dataclass
class Joint:
    """The search for one problem.

    Attributes:
        stages: Solves and schedules.
        problem: What ``Stages.learn_problem`` lays out.
        start: What the problem chooses from.
        last: The stage of the objective behind *learn*.
        gap: Relative, what counts as nothing.
        reached: What the best plan so far learns.
        bound: Proven for all plans.
        cuts: Where the choice counts what is held and made again.
        fewer: Those before the last ones; None: there are to be no more.
        many: More of them, for all RAM only: what tells that choices don't fit where few don't.
        unfit: Choices that were proven not to fit, though no few cuts tell so.
        tree: Of the choice for all RAM.
    """

    stages: Stages
    problem: Problem
    start: Decided
    last: Goal
    gap: float
    reached: float
    bound: float = field(default=float("inf"), init=False)
    cuts: frozenset[Cut | Make] = field(default=frozenset(), init=False)
    fewer: frozenset[Cut | Make] | None = field(default=None, init=False)
    many: frozenset[Cut | Make] = field(default=frozenset(), init=False)
    unfit: list[Unfit] = field(default_factory=list, init=False)
    tree: Tree = field(default_factory=Tree, init=False)

    def run(self) -> Iterator[Scheduled]:
        """Plans, each of which learns more than the one before.

        Raises:
            InfeasibleError: No choice keeps the limits.
            OutOfTimeError: None was found in time.
        """
        left_s, self._planned, self._fitted = self.stages.watch.left_s, False, 0
        self.watch = self.stages.watch.part(SHARE * left_s, lambda _: None)
        self.quick_s, self.places = QUICK_SHARE * left_s, cuts_of(self.problem)
        self.late_s = (1 - LATE_SHARE) * self.watch.left_s
        self.written = {w.name: t.name for t in self.problem.storage.tensors for w in t.writers}
        ram = self.problem.limits.ram_bytes
        if (yield from self._within(ram)):
            return
        low, high, step, known = self._fitted, ram, int(FIRST_STEP * ram), self.cuts
        while high - low > NARROWEST * ram and not self._done():
            asked, step = ((low + high) // 2, step) if low else (high - step, 2 * step)
            if asked <= 0:
                break
            if (yield from self._within(asked)):
                low = asked
            else:
                high = asked
        if self.cuts > known and not self._done():
            yield from self._within(ram)

    def _done(self) -> bool:
        return self.watch.over() is not None or not self._better(self.bound)

    def _better(self, value: float) -> bool:
        return value > self.reached * (1 + self.gap)

    def _within(self, ram_bytes: int, *, once: bool = False) -> Generator[Scheduled, None, bool]:
        """The best choice for so much RAM, with more cuts as long as they tell that it is none.

        False: nothing tells so, but no plan was found for it; or not at ``once``.
        """
        fits, gap = False, COARSE
        while True:
            gap = self._coarse(gap)
            most = self._choice(ram_bytes, gap)
            if most.solution is None:
                return fits or most.status == "infeasible"
            if not self._better(most.bound):
                return True
            slightly = gap <= self.gap and most.value > self.reached * (1 + ROUNDING)
            if not (slightly or self._better(most.value)):
                finer = self.gap if gap > self.gap else FINE * self.gap
                if finer >= gap:
                    return True
                gap = finer
                continue
            whole = ram_bytes == self.problem.limits.ram_bytes
            found = self._fitting(most.solution)
            if found.plan is not None:
                self.reached, self._planned, fits = most.value, True, True
                self._fitted = max(self._fitted, ram_bytes)
                yield found.plan
                if gap <= self.gap or not whole:
                    return True
                continue
            if whole and not self._planned and 0 < found.over < ram_bytes:
                yield from self._within(ram_bytes - found.over, once=True)
            late = not self._planned and self.watch.left_s < self.late_s
            if once or late or self.watch.over():
                return False
            known, hopeless = self.cuts | self.many, len(found.missed) > MANY
            if found.missed <= known or hopeless:
                if not (found.unfit and whole):
                    return False
                if hopeless and len(self.problem.activities) <= FEW:
                    self.many |= found.missed
                if self.many <= known:
                    self.unfit.append(Unfit.of(self.problem, most.solution.active))
            elif self.fewer is None:
                return False
            else:
                self.fewer, self.cuts = self.cuts, self.cuts | found.missed

    def _coarse(self, gap: float) -> float:
        """A gap for the next choice: no finer than what is left between bound and plan asks for."""
        left = self.bound / self.reached - 1 if self.reached > 0 else 1.0
        return min(gap, max(self.gap, PART * left))

    def _choice(self, ram_bytes: int, gap: float) -> SolveResult:
        """Solve; if that takes long, go back to the cuts before, and no further."""
        problem, limits = self.problem, self.problem.limits
        whole = ram_bytes == limits.ram_bytes
        if not whole:
            problem = replace(problem, limits=replace(limits, ram_bytes=ram_bytes))
        # its bounds are of plans, so they hold with the cuts before, too
        tree = self.tree if whole else Tree(self.tree.parts)
        first = whole and self.bound == float("inf")
        many = self.many if whole else frozenset()
        share = CHOICE_SHARE  # while there may be more cuts, no longer than they may take
        if self.fewer is not None and not many:
            share = min(share, self.quick_s / max(self.stages.watch.left_s, self.quick_s))
        most = self.stages.choice(
            problem,
            "learn",
            self.cuts | many,
            self.unfit,
            gap=gap,
            tree=tree,
            share=share,
            fails=first,
        )
        if first:
            self.fewer = self.cuts
        if whole:
            self.bound = min(self.bound, most.bound)
        if self.fewer is not None and not many and most.time_s >= self.quick_s:
            self.cuts, self.fewer = self.fewer, None
        return most

    def _fitting(self, chosen: Solution) -> _Fit:
        """Try the updates of a choice."""
        p, active = self.problem, chosen.active
        updates = tuple(chosen.candidates(p))
        streamed = tuple(b.name for b in p.streams if b.activity in active)
        decided = replace(self.start, updates=updates, streamed=streamed)
        missed, unfit, over = frozenset[Cut | Make](), False, 0

        def miss(r: Residency, best: Found, watch: Watch) -> None:
            nonlocal missed, unfit, over
            over, unfit = 0, best.bound == float("inf")
            if r.checkpoints is not None:
                over = r.checkpoints.over
            cuts, makes = r.conflict(best, self.stages.options, watch)
            if len(makes) > MANY:  # then all that was found, which tells more
                cuts, makes = best.cuts, best.makes
            missed = self._everywhere(r, cuts, makes)
            if cuts and missed <= self.cuts:  # not enough for the choice: all that there was
                missed = self._everywhere(r, best.cuts, best.makes)

        found = fitting(
            self.stages,
            decided.taking(p, chosen),
            self.last,
            loose=bool(p.streams or p.mixed_layers),
            miss=miss,
        )
        return _Fit(found, missed, unfit, over)

    def _everywhere(
        self, r: Residency, cuts: Collection[int], makes: Collection[tuple[int, int]]
    ) -> frozenset[Cut | Make]:
        """Cuts and makings of one choice of updates as those of all."""
        places: set[Cut | Make | None] = {self._place(r, k) for k in cuts}
        for k, i in makes:
            cut, before = self._place(r, k), self._place(r, r.remakes.before(k))
            if cut is None or before is None:
                continue
            # what is in place with these updates may have two buffers with others
            written = {self.written.get(w.name) for w in r.remakes.tensors[i].writers}
            places.update(Make(cut, before, name) for name in written if name is not None)
        return frozenset(p for p in places if p is not None)

    def _place(self, residency: Residency, slot: int) -> Cut | None:
        """The cut at a slot of a problem with fixed updates; none where its node has changed."""
        return self.places.get(residency.plain.slots[slot].node.name)
