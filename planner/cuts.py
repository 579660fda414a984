"""What is kept, rebuilt and paged, with updates fixed: a program over few cuts of the timeline.

A *cut* is a slot. Between neighbouring cuts a tensor is made again or loaded at most once, and what
is made again needs what it is made from: live at the cut before, or made or loaded in between, too.
Live bytes must fit at the cuts. Whatever is done in a plan is a solution, so the optimum is a bound
for all plans; with all slots as cuts it would be the whole model. But few cuts matter, often a
single one: they are added where the solution, carried out, takes too much memory. So the program
has a few columns per tensor and cut, not per tensor and step.

Where it is not a step that takes too much, but making a tensor again before it, the slot before
becomes a cut as well. What is live at both of them is there in between, beside that tensor and what
it is made from: that must fit, too.

Its LP is tighter than that of the whole model, too, where halves of a tensor can be made at two
times, each from the same half of an operand.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from .evicting import guided
from .linear import INF, WITHIN, Effort, LinearProgram, SolverName, SolverOptions
from .progress import Watch
from .remakes import NEVER, Found, Ints, Needs, Prices, Remade, Remakes

#: Cuts and tighter limits that are tried at most.
ROUNDS = 40
#: Cuts that are added at once, and tensors that are made again before them.
PEAKS, MAKES = 4, 8
#: A gap with which any plan will do.
ANY = 10.0
#: Rounds after which all steps become cuts, if so few columns do.
PATIENCE, ALL = 6, 4000
#: The part of the gap that one solve may leave.
PART = 0.5


class Program:
    """The program for some cuts.

    Attributes:
        held: Cut, tensor -> column of being live at it; -1: not made yet.
        again: Interval (that which ends at this cut), tensor -> column of being made again.
        loaded: Interval, tensor -> column of being loaded.
        stored: Tensor -> column of being paged out.
        making: Row that says that making a tensor again fits -> the cut behind it, and the tensor.
    """

    def __init__(
        self,
        remakes: Remakes,
        cuts: Sequence[int],
        rooms: Sequence[int],
        prices: Prices,
        makes: Collection[tuple[int, int]] = (),
    ) -> None:
        """Build all rows; ``makes`` are cuts behind neighbouring ones, and tensors made there."""
        self.r, self.cuts, self.prices = remakes, list(cuts), prices
        self.c = LinearProgram()
        self.one = self.c.column(integer=False, lower=1.0)
        n, m = len(remakes.tensors), len(cuts)
        self.first = np.searchsorted(np.asarray(cuts), remakes.made, side="right")
        self.held = np.full((m, n), -1)
        self.again = np.full((m + 1, n), -1)
        self.loaded = np.full((m + 1, n), -1)
        self.stored = np.full(n, -1)
        self.objective: list[tuple[int, float]] = []
        self.used = self._used()
        for i in self.used:
            self._columns(i)
        for i in self.used:
            self._rows(i)
        for s, room in enumerate(rooms):
            live = [(int(h), float(remakes.size[i])) for i, h in enumerate(self.held[s]) if h >= 0]
            live += [
                (int(self.held[self.first[i], i]), float(remakes.size[i]))
                for i in self.used
                if self._early(i) and remakes.made[i] == cuts[s]
            ]
            self.c.row(live, upper=float(room))
        self.users: list[list[int]] = [[] for _ in remakes.tensors]
        for a, operands in enumerate(remakes.operands):
            for j in operands:
                self.users[j].append(a)
        self.making: dict[int, tuple[int, int]] = {}
        self.there: dict[tuple[object, ...], int] = {}
        for k, i in sorted(makes):
            self._make(self.cuts.index(k), i)
        if remakes.pages:
            limits, cost = remakes.problem.limits, remakes.problem.cost
            pages = [(int(o), int(remakes.size[i])) for i, o in enumerate(self.stored) if o >= 0]
            taken = [(o, float(cost.stored_bytes(b))) for o, b in pages]
            state = remakes.problem.always_paged
            self.c.row(taken, upper=float(limits.storage_bytes - state.stored_bytes))
            if limits.worn_bytes is not None:
                worn = [(o, float(cost.worn_bytes(b))) for o, b in pages]
                most = limits.worn_bytes - state.worn_bytes
                self.c.row(worn, upper=most / remakes.problem.micro_batches)

    def _early(self, i: int) -> bool:
        """Held at its first cut, an auxiliary tensor has been made in forward."""
        f = int(self.first[i])
        return bool(self.r.auxiliary[i] and f < len(self.cuts) and self.cuts[f] < self.r.backward)

    def _used(self) -> list[int]:
        """What backward reads, and what that is made from."""
        r = self.r
        found = {i for i, reads in enumerate(r.reads) if reads}
        stack = list(found)
        while stack:
            i = stack.pop()
            if r.can[i]:
                more = set(r.operands[i]) - found
                found |= more
                stack += more
        return sorted(i for i in found if self.first[i] < len(self.cuts))

    def _columns(self, i: int) -> None:
        r, m, f = self.r, len(self.cuts), int(self.first[i])
        reads = set(r.reads[i])
        for s in range(f, m):
            read = self.cuts[s] in reads
            self.held[s, i] = self.c.column(integer=True, lower=float(read))
        for s in range(f + 1, m + 1):
            if s < m and self.cuts[s] < r.backward:
                continue  # nothing is made again, or loaded, before forward has ended
            if r.can[i] and r.until[i] > self.cuts[s - 1]:
                self.again[s, i] = self.c.column(integer=True)
            if r.pages:
                self.loaded[s, i] = self.c.column(integer=True)
        if r.pages:
            self.stored[i] = self.c.column(integer=True)

    def _make(self, s: int, i: int) -> None:
        """A tensor can be made again right before a cut: beside what is live across."""
        again, r = int(self.again[s, i]), self.r
        if s == 0 or again < 0:
            return
        room = r.problem.limits.ram_bytes - r.state - r.between[self.cuts[s]]
        there = cache(partial(self._there, s, i))
        for k, (scratch, read) in enumerate(r.parts[i]):
            # what its later nodes read is there already, unless it is loaded in between
            beside = {i, *read} if r.pages else {i, *(j for _, js in r.parts[i][k:] for j in js)}
            own = float(scratch + sum(r.size[j] for j in beside))
            live = [(there(j), float(r.size[j])) for j in self.used if j not in beside]
            self.making[len(self.c.row_lower)] = self.cuts[s], i
            self.c.row([(again, own), *((v, x) for v, x in live if v >= 0)], upper=float(room))

    def _there(self, s: int, i: int, j: int) -> int:
        """1 where a tensor is there when another one is made before a cut; -1: it never has to be.

        It is if the cut, or what is made later, needs it, and it was made before or is still live
        from the cut before. Things are made in forward's order.
        """
        r, before = self.r, self.r.order[j] < self.r.order[i]
        if self.held[s - 1, j] < 0:
            return -1
        later = [a for a in self.users[j] if r.order[a] > r.order[i] and self.again[s, a] >= 0]
        needs = [int(v) for v in (self.held[s, j], *self.again[s, later]) if v >= 0]
        anew = [self.loaded[s, j]] if before else [self.loaded[s, j], self.again[s, j]]
        absent = [(int(v), 1.0) for v in anew if v >= 0]
        if before and not absent and len(needs) == 1:
            return needs[0]
        key = s, j, before, tuple(needs)  # few tensors differ in what is made behind them
        if key in self.there:
            return self.there[key]
        v = self.there[key] = self.c.column(integer=False)
        for n in needs:
            if before:
                self.c.row([(v, 1.0), *absent, (n, -1.0)], lower=0.0)
            else:
                held = (int(self.held[s - 1, j]), -1.0)
                self.c.row([(v, 1.0), *absent, held, (n, -1.0)], lower=-1.0)
        return v

    def _ways(self, s: int, i: int) -> list[tuple[int, float]]:
        """Columns that say that a tensor is there in interval ``s``."""
        found = (self.held[s - 1, i], self.again[s, i], self.loaded[s, i])
        return [(int(v), 1.0) for v in found if v >= 0]

    def _rows(self, i: int) -> None:
        r, m, f, row = self.r, len(self.cuts), int(self.first[i]), self.c.row
        again = [int(a) for a in self.again[:, i] if a >= 0]
        loads = [int(p) for p in self.loaded[:, i] if p >= 0]
        price = self.prices.again[i]
        self.objective += [(a, price) for a in again]
        if r.auxiliary[i] and not any(k <= self.cuts[f] for k in r.reads[i]):
            # it is made for the first time in forward, or again only
            early = int(self.held[f, i])
            if loads:
                early = self.c.column(integer=False)
                row([(early, 1.0), (int(self.held[f, i]), -1.0)], lower=0.0)
                row([(early, 1.0), (int(self.stored[i]), -1.0)], lower=0.0)
            self.objective += [(early, price), (self.one, -price)]
        if self._early(i):
            for s, j in product(range(f), r.operands[i]):  # read where it is made, in forward
                if self.held[s, j] >= 0:
                    row([(int(self.held[s, j]), 1.0), (int(self.held[f, i]), -1.0)], lower=0.0)
        if loads:
            out = int(self.stored[i])
            self.objective += [(p, self.prices.load[i]) for p in loads]
            self.objective.append((out, self.prices.store[i]))
            for p in loads:
                row([(out, 1.0), (p, -1.0)], lower=0.0)
        for s in range(f + 1, m + 1):
            ways = self._ways(s, i)
            end = self.cuts[s] if s < m else NEVER
            if any(self.cuts[s - 1] < k < end for k in r.reads[i]):
                row(ways, lower=1.0)
            if s < m:
                row([*ways, (int(self.held[s, i]), -1.0)], lower=0.0)
            if self.again[s, i] >= 0:
                for j in r.operands[i]:
                    if self.first[j] < s:
                        row([*self._ways(s, j), (int(self.again[s, i]), -1.0)], lower=0.0)


class _Carried:
    """Decisions of a program, carried out step by step: made again at the first need."""

    def __init__(self, program: Program, values: NDArray[np.float64]) -> None:
        self.p, self.r = program, program.r
        self.values = np.append(np.round(values), 0.0)  # column -1 is 0
        self.made = Remade(late=set(np.flatnonzero(program.r.auxiliary).tolist()))
        self.here = set(range(len(self.r.tensors)))
        self.fresh = set(self.here)  # as forward has left them
        self.interval = 0

    def run(self) -> Remade | None:
        """What is made again; None: something can't be when it is needed."""
        for step in self.r.steps:
            k = step.index
            while self.interval < len(self.p.cuts) and self.p.cuts[self.interval] < k:
                self._cut()
            wanted = list(self.r.read_by.get(k, ()))
            if self.interval < len(self.p.cuts) and self.p.cuts[self.interval] == k:
                again, held = self.p.again[self.interval], self.p.held[self.interval]
                made = (self.values[again] > 0) & (self.values[held] > 0)
                wanted += np.flatnonzero(made).tolist()
            if not all(self._supply(i, k, None) for i in wanted):
                return None
        for tensors in self.made.again.values():
            tensors.sort(key=lambda i: self.r.order[i])
        return self.made

    def _cut(self) -> None:
        """What is not held at a cut is gone behind it."""
        held = self.p.held[self.interval]
        gone = set(np.flatnonzero((held >= 0) & (self.values[held] == 0)).tolist())
        self.here -= gone
        self.fresh -= gone
        self.interval += 1

    def _supply(self, i: int, step: int, reader: int | None) -> bool:
        """Have a tensor for a step, or for a tensor that is made again right before it."""
        if i in self.here:
            if i in self.fresh:
                self.made.late.discard(i)
            return True
        if self.p.loaded.size and self.values[self.p.loaded[self.interval, i]]:
            self.made.loaded.setdefault(step, []).append((i, reader))
            self.made.late.discard(i)
        elif self.r.can[i] and step <= self.r.until[i]:
            if not all(self._supply(j, step, i) for j in self.r.operands[i]):
                return False
            self.made.again.setdefault(step, []).append(i)
        else:
            return False
        self.here.add(i)
        return True


def search(
    remakes: Remakes,
    prices: Prices,
    base: float,
    options: SolverOptions,
    watch: Watch,
    rounds: int = ROUNDS,
    begin: Found | None = None,
) -> Found:
    """Search for the plan of the least price.

    Args:
        remakes: The tensors.
        prices: Their prices.
        base: Price of making everything once.
        options: How to solve; the gap is relative, ``base`` included.
        watch: Says when to end.
        rounds: Programs that are solved at most.
        begin: The cuts to begin with, and a plan that may no longer fit; None: none are known.

    Raises:
        OdtPlanError: The solver failed.
    """
    known = _Search(remakes, prices, base, options, watch, rounds)
    if begin is not None:
        known.cuts, known.makes = list(begin.cuts), set(begin.makes)
        if begin.made is not None:
            known.offer_like(begin.made)
    return known.run()


def excludes(
    remakes: Remakes,
    prices: Prices,
    cuts: Sequence[int],
    makes: Sequence[tuple[int, int]],
    options: SolverOptions,
    watch: Watch,
) -> bool:
    """These cuts, and makings at them, prove that no plan keeps the RAM budget.

    Raises:
        OdtPlanError: The solver failed.
    """
    program = in_all_room(remakes, prices, cuts, makes).c
    result = program.solve([], proving(options, watch), maximize=False, watch=watch)
    return result.status == "infeasible"


def in_all_room(
    remakes: Remakes, prices: Prices, cuts: Sequence[int], makes: Collection[tuple[int, int]]
) -> Program:
    """The program in which each cut has the room that there is."""
    return Program(remakes, cuts, [int(remakes.room[k]) for k in cuts], prices, makes)


def proving(options: SolverOptions, watch: Watch) -> SolverOptions:
    """How to prove that a program has no solution: by CP-SAT unless a solver was asked for."""
    left = max(0.01, min(options.time_limit_s, watch.left_s))
    solver: SolverName = "cp-sat" if options.solver == "auto" else options.solver
    return replace(options, solver=solver, time_limit_s=left)


def _solver(options: SolverOptions) -> SolverName:
    return "highs" if options.solver == "auto" else options.solver


@dataclass
class _Search:
    remakes: Remakes
    prices: Prices
    base: float
    options: SolverOptions
    watch: Watch
    rounds: int
    best: Found = field(default_factory=lambda: Found(None, INF, 0.0))
    cuts: list[int] = field(default_factory=list)
    makes: set[tuple[int, int]] = field(default_factory=set)
    tighter: dict[int, int] = field(default_factory=dict)
    everywhere: bool = False

    def run(self) -> Found:
        self.cuts = self.cuts or [self._first()]
        for k in range(self.rounds):
            if self.watch.over():
                break
            if k == PATIENCE and not self.tighter:
                self._cut_everywhere()
            program = Program(self.remakes, self.cuts, self._rooms(), self.prices, self.makes)
            terms = [*program.objective, (program.one, self.base)]
            options, below = self._options(), self._below()
            effort = Effort(below=below) if below < INF and options.solver == "highs" else None
            result = program.c.solve(
                terms, options, maximize=False, watch=self.watch, effort=effort
            )
            if not self.tighter:
                bound = INF if result.status == "infeasible" else result.bound - self.base
                if effort is not None:
                    bound = min(bound, below - self.base)
                self.best = replace(self.best, bound=max(self.best.bound, bound))
            if result.values is None:
                tightened = result.status == "infeasible" and bool(self.tighter)  # proves nothing
                if tightened and self.best.made is None and self._cut_everywhere():
                    continue
                break
            made = _Carried(program, result.values).run()
            if made is None or not self._offer(made):
                break
        bound = min(self.best.bound, self.best.price)
        makes = tuple(sorted(self.makes))
        return replace(self.best, bound=bound, cuts=tuple(self.cuts), makes=makes)

    def _below(self) -> float:
        """What a plan costs that is better than the best one by more than the gap."""
        total = self.base + self.best.price
        return total if total == INF else total - WITHIN * self.options.gap * total

    def _options(self) -> SolverOptions:
        o = self.options
        left = max(0.01, min(o.time_limit_s, self.watch.left_s))
        solver = "cp-sat" if self.everywhere and o.solver == "auto" else _solver(o)
        return replace(o, solver=solver, gap=PART * o.gap, time_limit_s=left)

    def _offer(self, made: Remade) -> bool:
        """Keep a plan if it fits and is better; else one like it. True: there may be better ones.

        What doesn't fit tells where another cut is needed.
        """
        needs = self.remakes.run(made)
        over = needs.live + self.remakes.state - self.remakes.problem.limits.ram_bytes
        if over.max() <= 0:
            self._keep(made)
            return False
        self._keep_guided(made)
        self._refine(needs, over)
        best = self.best
        if best.made is None:
            return True
        return best.price - best.bound > self.options.gap * (self.base + best.price)

    def offer_like(self, made: Remade) -> None:
        """Keep a plan if it fits and is better, else those like it."""
        if self.remakes.over(made) <= 0:
            self._keep(made)
        else:
            self._keep_guided(made)

    def _keep_guided(self, wish: Remade) -> None:
        for other in guided(self.remakes, self.prices, wish):
            self._keep(other)

    def _keep(self, made: Remade) -> None:
        price = self.prices.of(self.remakes, made)
        if price < self.best.price:
            self.best = replace(self.best, made=made, price=price)

    def _rooms(self) -> list[int]:
        return [int(self.remakes.room[k]) - self.tighter.get(k, 0) for k in self.cuts]

    def _refine(self, needs: Needs, over: Ints) -> None:
        """More cuts where memory is over the limit, or less room where there is one already.

        One cut, the worst, once there is a plan, so that the program stays small. Before, one in
        each run of steps that are over the limit.
        """
        at_steps = np.where(needs.makes >= 0, 0, over)
        makes: set[tuple[int, int]] = set()
        if at_steps.max() > 0:
            worst = int(needs.step[int(np.argmax(at_steps))])
            new = {worst} if self.best.made is not None else set(self._peaks(needs, at_steps))
        else:
            moments = np.argsort(-over, kind="stable")[:MAKES]
            moments = moments[over[moments] > 0]
            worst = int(needs.step[moments[0]])
            steps = needs.step[moments].tolist()
            makes = set(zip(steps, needs.makes[moments].tolist(), strict=True))
            new = {k for step in steps for k in (self.remakes.before(step), step)}
        if makes <= self.makes and new <= set(self.cuts):
            self.tighter[worst] = self.tighter.get(worst, 0) + int(over.max())
        self.makes |= makes
        self.cuts = sorted(new.union(self.cuts))

    def _cut_everywhere(self) -> bool:
        """Cuts at all steps, and whatever is made again right before each, unless it is too much.

        With few cuts each round may only move what takes too much to another step.
        """
        r = self.remakes
        steps = [r.backward - 1, *(s.index for s in r.steps)]
        made = [i for i in range(len(r.tensors)) if r.can[i]]
        if self.everywhere or len(steps) * len(made) > ALL:
            return False
        self.everywhere, self.tighter = True, {}
        self.cuts = sorted({*self.cuts, *steps, *r.made.tolist()})
        self.makes |= {
            (k, i) for before, k in pairwise(steps) for i in made if r.made[i] < before < r.until[i]
        }
        return True

    @staticmethod
    def _peaks(needs: Needs, over: Ints) -> list[int]:
        """The highest step of each run of moments that are over the limit, the highest ones."""
        edges = np.flatnonzero(np.diff(over > 0, prepend=False, append=False))
        runs = edges.reshape(-1, 2)
        tops = [int(begin + np.argmax(over[begin:end])) for begin, end in runs]
        tops.sort(key=lambda k: -int(over[k]))
        return [int(needs.step[k]) for k in tops[:PEAKS]]

    def _first(self) -> int:
        """The slot that costs most by itself: a knapsack of what has to be there or made again."""
        r = self.remakes
        last = np.array([steps[-1] if steps else -1 for steps in r.reads])
        price = np.where(r.can, np.array(self.prices.again), INF)
        price[r.auxiliary] = 0.0
        if r.pages:
            price = np.minimum(price, np.add(self.prices.store, self.prices.load))
        price /= np.maximum(r.size, 1)
        order = np.argsort(price, kind="stable")
        k = np.arange(len(r.problem.slots))[:, None]
        held = np.where((r.made[order] < k) & (k <= last[order]), r.size[order], 0)
        over = np.maximum(held.sum(axis=1) - r.room, 0)[:, None]
        part = np.clip(over - (np.cumsum(held, axis=1) - held), 0, held)
        each = np.where(np.isfinite(price[order]), price[order], 0.0)
        return int(np.argmax((part * each).sum(axis=1)))
