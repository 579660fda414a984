"""Blocks that run by rows, chosen together with what is made again: two programs over few cuts.

As *learn* is solved (``planner.joint``), for what else an objective puts a price on. The first
program chooses blocks, and precisions that are left; every plan is a solution of it, so its optimum
is a bound of all plans. The second one (``planner.cuts``) finds what is made again with these
blocks, and a bound of all plans that have just them. Its cuts become cuts of the first one, which
is then asked for another choice, as long as there may be a better one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

from ..ir.autodiff import build_training
from .bounds import cheapest
from .choice import ChoiceByCuts, Cut, Make, cuts_of
from .decided import Decided
from .linear import INF
from .objective import Goal
from .problem import ALWAYS, Limits, Problem
from .remakes import Found
from .residency import Kept, Residency
from .solution import Solution
from .stages import Stages

#: The part of the gap that one solve may leave, and of the time left that it may take.
PART, SHARE = 0.5, 0.3
#: What is chosen: activities of blocks and of mixed layers that hold.
Chosen = frozenset[int]


class BlocksByCuts(ChoiceByCuts):
    """The first program, with updates fixed.

    What is made again is counted at the least that it takes in any form: as mixed or i8 layer, in a
    block that runs by rows or not. An auxiliary tensor counts from its second making on; its slots
    count the first.
    """

    def __init__(
        self,
        problem: Problem,
        where: Collection[Cut | Make],
        goal: Goal,
        tried: Collection[Chosen] = (),
    ) -> None:
        """Build variables and constraints.

        Args:
            problem: What to decide.
            where: See ``ChoiceByCuts``.
            goal: The only objective that will be asked for.
            tried: Choices that are left out.
        """
        super().__init__(problem, where, goal)
        for chosen in tried:
            others = [(self.a[a], -1.0 if a in chosen else 1.0) for a in choosable(problem)]
            self.c.row(others, lower=1.0 - len(chosen))

    def _cut_columns(self) -> None:
        super()._cut_columns()
        held = self.forward
        self.more: dict[int, int] = {}
        for i in self.used:
            again = [v for (_, j), v in self.again.items() if j == i]
            if held.tensors[i] not in held.auxiliary or not again:
                continue
            first = self.begin[i]
            early = any(a == ALWAYS and k <= self.cuts[first].last for k, a in held.reads[i])
            made = self.one if early else self.live[first, i]
            more = self.more[i] = self.c.column(integer=False, upper=float(len(again)))
            made_again = [(v, -1.0) for v in again]
            self.c.row([(more, 1.0), *made_again, (made, -1.0)], lower=-1.0)

    def _remade_cycles(self) -> list[tuple[int, float]]:
        p, held = self.problem, self.forward
        cycles = {s.node: cheapest(s) for s in p.slots if s.update is None}
        least = [float(sum(cycles[w] for w in t.writers)) for t in held.tensors]
        for b in p.streams:
            saved = sum(cheapest(p.slots[k]) for k in b.slots) - b.cycles
            for t in p.slots[b.slots[-1]].writes:
                if t in held.at:
                    least[held.at[t]] = max(0.0, least[held.at[t]] - max(0, saved))
        terms = [(v, least[i]) for (_, i), v in self.again.items() if i not in self.more]
        return [*terms, *((v, least[i]) for i, v in self.more.items()), *self.unread]


def choosable(problem: Problem) -> list[int]:
    """Activities of blocks that may run by rows, and of layers that may be mixed."""
    blocks = [b.activity for b in problem.streams]
    return blocks + [m.activity for m in problem.mixed_layers]


def with_blocks(start: Decided, problem: Problem, solution: Solution) -> Decided:
    """The decisions with the blocks and precisions of a solution."""
    active = solution.active
    streamed = tuple(b.name for b in problem.streams if b.activity in active)
    return replace(start, streamed=streamed).taking(problem, solution)


@dataclass
class BlockSearch:
    """The search for one problem.

    Attributes:
        stages: Solves and lays problems out.
        start: The update set, and precisions as far as they are given.
        problem: Without rebuilt activations; blocks and precisions are to be chosen.
        goal: The objective.
        limits: Budgets.
        bound: Proven for all plans; infinite: there is none.
        best: The best decisions, and what is kept with them.
    """

    stages: Stages
    start: Decided
    problem: Problem
    goal: Goal
    limits: Limits
    bound: float = field(default=0.0, init=False)
    best: tuple[Decided, Kept] | None = field(default=None, init=False)

    def run(self) -> None:
        """Search until the best decisions are within the gap of the bound, or time is over."""
        stages, tried = self.stages, dict[Chosen, float]()
        self.names = {cut: name for name, cut in cuts_of(self.problem).items()}
        self.cuts: set[Cut | Make] = set()
        while not (stages.watch.over() or self._settled()):
            program = BlocksByCuts(self.problem, self.cuts, self.goal, tried)
            most = stages.solved(program, self.goal, SHARE, gap=PART * stages.options.gap)
            others = INF if most.status == "infeasible" else most.bound
            self.bound = max(self.bound, min(others, *tried.values(), INF))
            if most.solution is None or self._settled() or self._beaten(others):
                break
            chosen = most.solution.active.intersection(choosable(self.problem))
            tried[chosen] = self._tried(with_blocks(self.start, self.problem, most.solution))
        if self.best is not None:
            self.bound = min(self.bound, self.best[1].result.value)

    def _settled(self) -> bool:
        return self.bound == INF if self.best is None else self._beaten(self.bound)

    def _beaten(self, bound: float) -> bool:
        """Nothing with this bound is better than the best."""
        best = INF if self.best is None else self.best[1].result.value
        return best < INF and best <= bound * (1 + self.stages.options.gap)

    def _tried(self, decided: Decided) -> float:
        """Find what is kept with these blocks; returns a bound of all plans that have them."""
        stages = self.stages
        training = build_training(stages.lowered(decided), stages.spec, decided.updates)
        residency = stages.residency(training, self.goal, self.limits)
        kept = stages.by_cuts(residency, SHARE, self._begin(residency))
        value = INF if self.best is None else self.best[1].result.value
        if kept.result.solution is not None and kept.result.value < value:
            self.best = decided, kept
        assert kept.found is not None
        self.cuts.update(self._placed(residency, kept.found))
        return kept.result.bound

    def _begin(self, residency: Residency) -> Found | None:
        """The cuts so far, in a problem with some blocks."""
        if not self.cuts:
            return None
        slots = {s.node.name: s.index for s in residency.plain.slots if not s.rebuild}
        tensors = {t.name: i for i, t in enumerate(residency.remakes.tensors)}
        cuts = {slots[n] for c in self.cuts if isinstance(c, Cut) and (n := self.names[c]) in slots}
        makes = {
            (k, tensors[m.tensor])
            for m in self.cuts
            if isinstance(m, Make) and m.tensor in tensors
            if {k := slots.get(self.names[m.cut], -1), slots.get(self.names[m.before])} <= cuts
        }
        return Found(None, INF, 0.0, tuple(sorted(cuts)), tuple(sorted(makes)))

    def _placed(self, residency: Residency, found: Found) -> Iterator[Cut | Make]:
        """The cuts of a problem with some blocks, in that in which they are chosen."""
        order = sorted(self.names)
        at = {name: n for n, name in enumerate(map(self.names.__getitem__, order))}

        def place(slot: int) -> int:
            return at.get(residency.plain.slots[slot].node.name, -1)

        yield from (order[n] for n in map(place, found.cuts) if n >= 0)
        for slot, i in found.makes:
            if (n := place(slot)) > 0:
                yield Make(order[n], order[n - 1], residency.remakes.tensors[i].name)
