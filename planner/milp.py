"""The joint model as a mixed-integer linear program.

Variables, in the notation of docs/design.md: A (activity of slots; the update choices U, the
rebuild choices R, auxiliary choices F, mixed layers V and streamed blocks B are among them), H (a
tensor is held into an event), P (it is paged in right before an event), O (it is paged out once),
X (it is resident at an event), W (product of an activity and a mixed layer).
All memory rows are linear: update choice is a knapsack, and it needs their LP bound.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from .bounds import most_gain
from .core import Tree, optimize
from .flash_terms import flash_terms
from .hint import hint
from .linear import INF, LARGE, LinearProgram, SolverOptions, Status, Terms
from .objective import Goal, Weighted, wants
from .occupancy import Occupancy
from .overlap import Overlap
from .problem import ALWAYS, Event, Limits, Problem, Retention, Slot, Transient
from .progress import Watch
from .solution import Solution
from .tensors import Tensor

#: A weighted objective counts in millionths: solvers take differences of 1e-6 for rounding.
WEIGHTED_SCALE = 1e6
#: Activities up to which CP-SAT proves a relaxed program sooner than branching and cores do.
FEW = 400
#: What a hidden cycle of a transfer counts for a shy program.
SHYNESS = 0.02


@dataclass(frozen=True)
class SolveResult:
    """Outcome of one solve.

    Attributes:
        status: See ``linear.LinearResult``.
        value: Objective of the solution in the objective's unit; what its schedule takes can be
            less, by decisions that cost something and change nothing.
        bound: Proven bound on the objective of the whole problem.
        solution: Decisions, None without a solution.
        peak_node: Name of the node at whose slot most RAM is needed.
        time_s: Solve time.
    """

    status: Status
    value: float
    bound: float
    solution: Solution | None
    peak_node: str
    time_s: float


def is_timed(goal: Goal, limits: Limits) -> bool:
    """It matters what takes how long."""
    limited = limits.cycles is not None or limits.energy_j is not None
    return limited or wants(goal, "latency", "energy")


class Milp:
    """The program of one problem; constraints are methods, one each.

    Attributes:
        tree: See ``core.optimize``.
    """

    def __init__(
        self,
        problem: Problem,
        goal: Goal | None = None,
        *,
        relaxed: bool = False,
        shy: bool = False,
    ) -> None:
        """Build variables and constraints.

        Args:
            problem: What to decide.
            goal: The only objective that will be asked for; None: any.
            relaxed: Keeping and rebuilding take nothing: a tensor is there whenever a slot reads
                it, and takes RAM then only. The optimum is a bound for the problem with any
                rebuilds.
            shy: A cycle of a page transfer that computing hides counts a little as an objective:
                of equal solutions, the one that moves less hides more than its model says.
        """
        self.problem = problem
        self.goal, self.shy = goal, shy
        self.relaxed = relaxed
        self.tree: Tree | None = None
        self.c = LinearProgram()
        self.one = self.c.column(integer=False, lower=1.0)
        self.a = [
            self.one if a.kind == "always" else self.c.column(integer=True)
            for a in problem.activities
        ]
        self.held: list[list[int]] = []
        self.loaded: list[dict[int, int]] = []
        self.stored: list[int | None] = []
        self.late: list[tuple[int, Slot]] = []
        for r in problem.retentions:
            self._retention_variables(r)
        self.peak = self.c.column(integer=False, upper=float("inf"))
        self.parameter = {
            a: name for name, acts in problem.choices.items() for a in acts if a != ALWAYS
        }
        self.products: dict[tuple[int, ...], int] = {}
        self.block_of = {k: self.a[b.activity] for b in problem.streams for k in b.slots}
        self.maker = self._makers()
        self.implied = self._implications()
        self._activities()
        self._one_candidate_each()
        self._made_for_one_candidate()
        self._one_precision_each()
        self._forced()
        for i, r in enumerate(problem.retentions):
            if relaxed:
                self._made(r)
            else:
                self._supply(i, r)
        self._cut_columns()
        self._memory_rows()
        self._flash_row()
        self._storage_row()
        self._time_rows()

    # -- variables --------------------------------------------------------------------------------

    def _retention_variables(self, r: Retention) -> None:
        n = 0 if self.relaxed else len(r.events)
        if n == 0:
            self.held.append([])
            self.loaded.append({})
            self.stored.append(None)
            return
        first = self.c.column(integer=True, upper=1.0 if r.window is not None else 0.0)
        self.held.append([first, *(self.c.column(integer=True) for _ in range(n - 1))])
        loads = {j: self.c.column(integer=True) for j, e in enumerate(r.events) if e.may_load}
        self.loaded.append(loads)
        self.stored.append(self.c.column(integer=True) if loads else None)

    def _cut_columns(self) -> None:
        """Columns and rows of a program with cuts."""

    # -- constraints ------------------------------------------------------------------------------

    def _activities(self) -> None:
        """A needed backward node runs if one of its readers runs."""
        self.any_of: dict[tuple[int, ...], int] = {}
        for a in self.problem.activities:
            self.at_least(self.a[a.index], a.implied_by)
            if a.kind == "needed":
                self.any_of[tuple(self.weakest(a.implied_by))] = self.a[a.index]

    def at_least(self, column: int, activities: Iterable[int]) -> None:
        """The column is 1 if one of these activities holds."""
        for acts in self._alternatives(activities):
            self.c.row([(column, 1.0), *((self.a[a], -1.0) for a in acts)], lower=0.0)

    def _alternatives(self, activities: Iterable[int]) -> Iterable[list[int]]:
        """Activities of which at most one holds, together: candidates of one parameter.

        Rows with their sum are much tighter in the LP than one row each. An activity that implies
        another one of them is left out.
        """
        groups: dict[str | int, list[int]] = {}
        for a in self.weakest(activities):
            groups.setdefault(self.parameter.get(a, a), []).append(a)
        return groups.values()

    def weakest(self, activities: Iterable[int]) -> list[int]:
        """Those that don't imply another one: if any activity holds, one of them does."""
        every = dict.fromkeys(activities)
        mask = sum(1 << a for a in every)
        return [a for a in every if self.implied[a] & mask == 1 << a]

    def _implications(self) -> list[int]:
        """Activity -> bit set of the activities that hold if it does, itself included."""
        activities = self.problem.activities
        implied = [1 << a.index for a in activities]
        for a in reversed(activities):  # what implies a needed one comes before it
            if a.kind == "needed":
                for cause in a.implied_by:
                    implied[cause] |= implied[a.index]
        for maker, reader in self.maker.items():
            implied[maker] |= implied[reader]
        return implied

    def _one_candidate_each(self) -> None:
        """At most one candidate per parameter, and at least one update in all."""
        chosen = [a for acts in self.problem.choices.values() for a in acts if a != ALWAYS]
        for acts in self.problem.choices.values():
            if len(acts) > 1:
                self.c.row([(self.a[a], 1.0) for a in acts], 0.0, 1.0)
        if chosen:
            self.c.row([(self.a[a], 1.0) for a in chosen], lower=1.0)

    def _one_precision_each(self) -> None:
        """A mixed layer is not computed again as i8; what is inside a streamed block is unused."""
        p = self.problem
        exclusive = [(m.activity, m.excludes) for m in p.mixed_layers]
        exclusive += [(b.activity, b.excludes) for b in p.streams]
        for choice, excludes in exclusive:
            for acts in self._alternatives(excludes):
                self.c.row([(self.a[choice], 1.0), *((self.a[a], 1.0) for a in acts)], upper=1.0)
        # Each update is in one precision; summed up over a parameter's candidates the LP is tight.
        sums: dict[tuple[str, int], list[int]] = {}
        for u in p.mixed_updates:
            if u.activity != ALWAYS:
                sums.setdefault((self.parameter[u.activity], u.choice), []).append(u.activity)
        for (_, choice), acts in sums.items():
            v = self.a[choice]
            both = [self._both_in_sum(a, choice) for a in acts]
            self.c.row([*((w, 1.0) for w in both), (v, -1.0)], upper=0.0)
            i8 = [*((self.a[a], 1.0) for a in acts), *((w, -1.0) for w in both)]
            self.c.row([*i8, (v, 1.0)], upper=1.0)

    def _forced(self) -> None:
        """Decisions that are given."""
        for f in self.problem.forced:
            bound = {"lower": 1.0} if f.holds else {"upper": 0.0}
            self.c.row([(self.a[a], 1.0) for a in f.activities], **bound)

    def _both_in_sum(self, update: int, choice: int) -> int:
        """The product of an update and its layer's choice, which the rows of their sums force."""
        key = tuple(sorted((update, choice)))
        w = self.products[key] = self.c.column(integer=False)
        self.c.row([(w, 1.0), (self.a[update], -1.0)], upper=0.0)
        return w

    def both(self, *activities: int) -> int:
        """1 where these activities hold, of which one may be that of a mixed layer."""
        key = tuple(sorted({a for a in activities if a != ALWAYS}))
        if not key:
            return self.one
        if len(key) == 1:
            return self.a[key[0]]
        if key not in self.products:
            w = self.products[key] = self.c.column(integer=False)
            for a in key:
                self.c.row([(w, 1.0), (self.a[a], -1.0)], upper=0.0)
            all_hold = [(self.a[a], -1.0) for a in key]
            self.c.row([(w, 1.0), *all_hold], lower=1.0 - len(key))
        return self.products[key]

    def _supply(self, i: int, r: Retention) -> None:
        """What is read or held on has been held, loaded or completed right then."""
        n = len(r.events)
        for j, e in enumerate(r.events):
            sources = [(self.held[i][j], 1.0)]
            if j in self.loaded[i]:
                sources.append((self.loaded[i][j], 1.0))
            if not e.writes:
                self.c.row([*sources, (self.a[e.activity], -1.0)], lower=0.0)
            elif self._makes(i, e):
                if j + 1 < n:
                    self.c.row([(self.held[i][j + 1], 1.0), (self.a[e.activity], -1.0)], lower=0.0)
                else:
                    self.c.upper[self.a[e.activity]] = 0.0
            if j + 1 < n:
                held_on = self.held[i][j + 1]
                made = [(self.a[e.activity], 1.0)] if e.writes else []
                self.c.row([*sources, *made, (held_on, -1.0)], lower=0.0)
        stored = self.stored[i]
        if stored is not None:
            for load in self.loaded[i].values():
                self.c.row([(stored, 1.0), (load, -1.0)], lower=0.0)
            self.c.row([(self.a[r.page_out_activity], 1.0), (stored, -1.0)], lower=0.0)
        self._supply_of_alternatives(i, r)

    def _made(self, r: Retention) -> None:
        """An auxiliary tensor that is read has been made: by a slot, or where none is offered.

        Slots make it in forward, or right before what reads it; before any other step of backward
        it may be made, too.
        """
        if r.window is not None:
            return
        slots = {e.activity: self.problem.slots[e.slot] for e in r.events if e.writes}
        makers = [(self.a[m], 1.0) for m in slots]
        for early in filter(self._is_auxiliary, slots.values()):
            late = self.c.column(integer=False)
            makers.append((late, 1.0))
            self.late.append((late, early))
        for acts in self._alternatives(e.activity for e in r.events if not e.writes):
            self.c.row([*makers, *((self.a[a], -1.0) for a in acts)], lower=0.0)

    def _is_auxiliary(self, slot: Slot) -> bool:
        return self.problem.activities[slot.activity].kind == "auxiliary"

    def _makers(self) -> dict[int, int]:
        """Activities that make what only one candidate reads -> the candidate."""
        p = self.problem
        maker: dict[int, int] = {}
        reads: dict[int, list[Slot]] = {}
        makes: dict[int, set[int]] = {}
        for s in p.slots:
            for t in s.writes:
                makes.setdefault(t.index, set()).add(s.activity)
            for t in s.reads:
                if t not in s.writes:
                    reads.setdefault(t.index, []).append(s)
        for index, slots in reads.items():
            reader, makers = slots[0].activity, makes.get(index, set())
            only = len(slots) == 1 and reader in self.parameter
            if only and all(p.activities[m].kind in ("auxiliary", "rebuild") for m in makers):
                maker |= dict.fromkeys(makers, reader)
        return maker

    def _made_for_one_candidate(self) -> None:
        """Leading channels that only one candidate reads are made once, and only for it.

        It never pays to make them otherwise.
        """
        makers: dict[tuple[int, int], list[int]] = {}
        for maker, reader in self.maker.items():
            made = self.problem.activities[maker].tensor
            assert made is not None
            makers.setdefault((reader, made.index), []).append(maker)
        for (reader, _), acts in makers.items():
            self.c.row([(self.a[reader], 1.0), *((self.a[m], -1.0) for m in acts)], lower=0.0)

    def _makes(self, i: int, e: Event) -> bool:
        """The slots of this event run to hold this tensor: not for another one, not to page it."""
        made = self.problem.activities[e.activity].tensor
        return made is self.problem.retentions[i].tensor and not self.loaded[i]

    def _resident(self, i: int, j: int) -> list[int]:
        """Columns whose sum says whether a tensor occupies its bytes during the slot of an event.

        What is held or paged in for a read stays for it; what is made is held on. Only a tensor
        that is made beside another one, or to be paged out, needs a column of its own.
        """
        r = self.problem.retentions[i]
        e = r.events[j]
        if not e.writes:
            return [self.held[i][j], *((self.loaded[i][j],) if j in self.loaded[i] else ())]
        later = [self.held[i][j + 1]] if j + 1 < len(r.events) else []
        if self._makes(i, e):
            return later or [self.a[e.activity]]
        x = self.c.column(integer=False)
        for v in (self.a[e.activity], *later):
            self.c.row([(x, 1.0), (v, -1.0)], lower=0.0)
        return [x]

    def _supply_of_alternatives(self, i: int, r: Retention) -> None:
        """Reads for the candidates of one parameter, of which one is chosen, need a tensor in sum.

        Between events that make it new, the tensor is held into an event for all reads from there
        on. Without this a fraction of it, held once, would do for fractions of all candidates.
        """
        groups: dict[str, list[int]] = {}
        for j in range(len(r.events) - 1, -1, -1):
            e = r.events[j]
            if e.writes or e.may_load:
                groups = {}
                continue
            reader = self.maker.get(e.activity, e.activity)
            if reader not in self.parameter:
                continue
            reads = groups.setdefault(self.parameter[reader], [])
            reads.append(e.activity)
            once = {self.maker.get(a, a) for a in reads}
            if len(reads) > 1 and (len(once) == len(reads) or not once.intersection(reads)):
                terms = [(self.a[a], -1.0) for a in reads]
                self.c.row([(self.held[i][j], 1.0), *terms], lower=0.0)

    def _memory_rows(self) -> None:
        """Live arena bytes + state bytes <= peak <= RAM, at every slot that can be a peak."""
        p = self.problem
        self.occupancy = Occupancy(len(p.slots))
        for s in p.slots:
            mixed = None if s.mixed is None else s.mixed.scratch_bytes
            for column, size in self.of_slot(s, s.scratch_bytes, mixed):
                self.occupancy.add(s.index, s.index, column, size)
        for begin, end, tensor in p.fixed:
            self._occupy_window(tensor, begin, end)
        for b in p.streams:
            self.occupancy.add(b.slots[0], b.slots[0], self.a[b.activity], b.scratch_bytes)
        for t in p.transients:
            self._occupy_transient(t)
        for i, r in enumerate(p.retentions):
            self._occupy_retained(i, r)
        self._overwritten()
        self._occupy_cuts()
        self.overlap = None
        if self._hides():
            self.overlap = Overlap(self)
        state = [(self.a[a], float(b)) for a, b in p.state_bytes.items()]
        state += [(self.both(u.activity, u.choice), float(u.state_bytes)) for u in p.mixed_updates]
        slots, large = self.occupancy.peaks(), len(self.c.lower) > LARGE
        # a hundred terms that all rows have are one: LPs take a tenth of the time
        self.state = [(self._sum(state), 1.0)] if self.relaxed or large else state
        if large and not self.relaxed:
            self._running_sum(slots)
        else:
            for column, size in (*self.state, (self.peak, -1.0)):
                self.occupancy.add(0, len(p.slots) - 1, column, size)
            rows, columns, sizes = self.occupancy.held(slots)
            self.c.terms(self.c.empty_rows(len(slots), upper=0.0) + rows, columns, sizes)
        self.c.row([(self.peak, 1.0)], upper=p.limits.ram_bytes)
        if p.limits.regions:
            self._region_rows(p.limits.largest_bytes)

    def _region_rows(self, largest: int) -> None:
        """What needs a tensor that no region can hold does not run; the layout decides the rest."""
        for s in self.problem.slots:
            if s.largest_bytes > largest:
                self.c.row(self.of_slot(s, 1.0, None), upper=0.0)

    def _hides(self) -> bool:
        """What computing hides of transfers is part of the program."""
        p = self.problem
        if not p.cost.overlaps or p.limits.wait_for_transfers:
            return False
        if self.relaxed and not p.paged_states:  # nothing is paged
            return False
        return self.goal is None or is_timed(self.goal, p.limits)

    def _running_sum(self, slots: NDArray[np.int64]) -> None:
        """Live bytes of a slot as those of the slot before and what changes.

        A tensor then stands in two rows instead of one per slot that it is live at: far sparser,
        and faster in HiGHS. Small problems are better off with the knapsacks in plain sight.
        """
        ((kept, _),), n = self.state, np.arange(len(slots))
        live = np.asarray([self.c.column(integer=False, upper=INF) for _ in n])
        rows, columns, size = self.occupancy.changes(slots)
        first = self.c.empty_rows(len(n), 0.0, 0.0)
        self.c.terms(first + rows, columns, -size)
        self.c.terms(first + n, live, np.ones(len(n)))
        self.c.terms(first + n[1:], live[:-1], -np.ones(len(n) - 1))
        first = self.c.empty_rows(len(n), upper=0.0)
        for column, a in ((live, 1.0), (kept, 1.0), (self.peak, -1.0)):
            self.c.terms(first + n, np.broadcast_to(column, n.shape), np.full(len(n), a))

    def _sum(self, terms: Terms) -> int:
        """A column that is the sum of terms, in bytes."""
        result = self.c.column(integer=False, upper=float("inf"))
        self.c.row([(result, 1.0), *((c, -x) for c, x in terms)], 0.0, 0.0)
        return result

    def of_slot(self, s: Slot, value: float, mixed: float | None) -> list[tuple[int, float]]:
        """Terms of something that a slot costs: if it runs, in its form, unless it is streamed."""
        terms = [(self.a[s.activity], value)] if value else []
        if value and s.index in self.block_of:
            terms.append((self.block_of[s.index], -value))  # the activity of such a slot is 1
        if s.mixed is not None and mixed is not None and mixed != value:
            terms.append((self.both(s.activity, s.mixed.choice), mixed - value))
        return terms

    def _occupy_window(self, tensor: Tensor, begin: int, end: int) -> None:
        """A forward tensor is live in its window, but for what streamed blocks change."""
        size, add = tensor.bytes, self.occupancy.add
        add(begin, end, self.one, size)
        for b in self.problem.streams:
            v = self.a[b.activity]
            if tensor in b.inner:
                add(begin, end, v, -size)
            elif tensor is b.result:
                add(b.slots[0], begin - 1, v, size)
            elif tensor is b.frees:
                add(b.slots[0] + 1, end, v, -size)

    def _occupy_transient(self, t: Transient) -> None:
        begin = t.begin
        for last, acts in t.segments:
            v = self._one_of(acts)
            self.occupancy.add(begin, last, v, t.tensor.bytes, continues=begin > t.begin)
            begin = last + 1

    def _one_of(self, activities: tuple[int, ...]) -> int:
        """1 where any of these activities holds: a needed node's activity, if these cause it."""
        acts = tuple(self.weakest(activities))
        if len(acts) == 1:
            return self.a[acts[0]]
        if acts not in self.any_of:
            v = self.any_of[acts] = self.c.column(integer=False)
            self.at_least(v, acts)
        return self.any_of[acts]

    def _occupy_retained(self, i: int, r: Retention) -> None:
        size, add = r.tensor.bytes, self.occupancy.add
        begin = 0
        if r.window is not None:
            self._occupy_window(r.tensor, *r.window)
            begin = r.window[1] + 1
        if self.relaxed:
            self._occupy_events(r)
            return
        for j, e in enumerate(r.events):
            add(begin, e.slot - 1, self.held[i][j], size, continues=True)
            again = e.writes and e.begin < e.slot
            if again:
                add(e.begin, e.slot - 1, self.a[e.activity], size)
            held, *loaded = self._resident(i, j)
            add(e.slot, e.slot, held, size, continues=again or not e.writes)
            for v in loaded:
                add(e.slot, e.slot, v, size)
            begin = e.slot + 1

    def _occupy_events(self, r: Retention) -> None:
        """A tensor takes RAM in the slots that read it, and in that of forward that makes it."""
        at_cuts = self._at_cuts(r.tensor)
        for e in r.events:
            again = e.writes and self.problem.slots[e.slot].rebuild
            if e.slot not in at_cuts and not again:
                self.occupancy.add(e.slot, e.slot, self.a[e.activity], r.tensor.bytes)

    def _at_cuts(self, tensor: Tensor) -> Collection[int]:
        """Slots of cuts that say whether a tensor is held."""
        return ()

    def _occupy_cuts(self) -> None:
        """What a program with cuts holds at them."""

    def _overwritten(self) -> None:
        """A result in the bytes of its operand: one buffer at that slot, not two."""
        by_slot: dict[int, list[int]] = {}
        for o in self.problem.overwrites:
            v = self.c.column(integer=False)
            activity = self.problem.slots[o.slot].activity
            if activity != ALWAYS:
                self.c.row([(v, 1.0), (self.a[activity], -1.0)], upper=0.0)
            if o.slot in self.block_of:
                self.c.row([(v, 1.0), (self.block_of[o.slot], 1.0)], upper=1.0)
            for acts in self._alternatives(o.unless):
                self.c.row([(v, 1.0), *((self.a[a], 1.0) for a in acts)], upper=1.0)
            self.occupancy.add(o.slot, o.slot, v, -o.operand.bytes)
            by_slot.setdefault(o.slot, []).append(v)
        for columns in by_slot.values():
            if len(columns) > 1:
                self.c.row([(v, 1.0) for v in columns], upper=1.0)

    def _flash_row(self) -> None:
        """Weights + code of the kernels and steps that are used <= flash."""
        self.flash = flash_terms(self)
        self.c.row(self.flash, upper=self.problem.limits.flash_bytes)

    def _storage_row(self) -> None:
        """Paged tensors together <= storage, and what they wear <= its limit."""
        pages = [
            (s, float(self.problem.cost.stored_bytes(r.tensor.bytes)))
            for s, r in zip(self.stored, self.problem.retentions, strict=True)
            if s is not None
        ]
        states = self.problem.paged_states
        pages += [(self.a[s.activity], float(s.stored_bytes)) for s in states]
        if pages:
            self.c.row(pages, upper=self.problem.limits.storage_bytes)
        if pages and self.problem.limits.worn_bytes is not None:
            micro, worn = self.problem.micro_batches, self.problem.cost.worn_bytes
            wears = [
                (s, float(micro * worn(r.tensor.bytes)))
                for s, r in zip(self.stored, self.problem.retentions, strict=True)
                if s is not None
            ]
            wears += [(self.a[s.activity], float(s.worn_bytes)) for s in states]
            self.c.row(wears, upper=self.problem.limits.worn_bytes)

    @cached_property
    def page_cycles(self) -> list[tuple[int, float]]:
        """Cycles of all transfers."""
        p, result = self.problem, []
        for i, r in enumerate(p.retentions):
            stored = self.stored[i]
            if stored is None:
                continue
            n = p.micro_batches
            result.append((stored, float(n * p.cost.write_cycles(r.tensor.bytes))))
            read = float(n * p.cost.read_cycles(r.tensor.bytes))
            result += [(v, read) for v in self.loaded[i].values()]
        return result + [(self.a[s.activity], float(s.cycles)) for s in p.paged_states]

    @property
    def _hidden(self) -> list[tuple[int, float]]:
        """What slots hide of transfers, below 0."""
        return [] if self.overlap is None else self.overlap.terms

    def slot_cycles(self, index: int) -> list[tuple[int, float]]:
        """Cycles of a slot; a block that is streamed runs in its first one."""
        s = self.problem.slots[index]
        terms = self.of_slot(s, s.cycles, None if s.mixed is None else s.mixed.cycles)
        for x in s.split:
            terms.append((self.both(s.activity, x.update), float(x.cycles)))
            if s.mixed is not None:
                mixed = self.both(s.activity, x.update, s.mixed.choice)
                terms.append((mixed, float(x.mixed_cycles - x.cycles)))
        for b in self.problem.streams:
            if b.slots[0] == index:
                terms.append((self.a[b.activity], float(b.cycles)))
        return terms

    @cached_property
    def cycles(self) -> list[tuple[int, float]]:
        """Cycles of all active slots, and of transfers as far as no slot hides them."""
        terms = [t for s in self.problem.slots for t in self.slot_cycles(s.index)]
        return terms + self._remade_cycles() + self.page_cycles + self._hidden

    def _remade_cycles(self) -> list[tuple[int, float]]:
        """Cycles of what a relaxed program makes again without a slot."""
        return [
            (late, float(s.cycles if s.mixed is None else min(s.cycles, s.mixed.cycles)))
            for late, s in self.late
        ]

    @cached_property
    def energy(self) -> list[tuple[int, float]]:
        """Energy of computing and of transfers.

        Counted in the energy of one computing cycle: coefficients in joules would be too small for
        solvers that scale rows to integers.
        """
        extra = 0.0
        if self.page_cycles:
            extra = self.problem.cost.energy_j(1, 1) / self.joules_per_unit - 1.0
        return self.cycles + [(v, c * extra) for v, c in self.page_cycles]

    @property
    def joules_per_unit(self) -> float:
        """Energy of one computing cycle."""
        return self.problem.cost.energy_j(1, 0)

    def _time_rows(self) -> None:
        """Latency and energy limits; without them their terms are not made."""
        limits = self.problem.limits
        if limits.cycles is not None:
            self.c.row(self.cycles, upper=limits.cycles)
        if limits.energy_j is not None:
            self.c.row(self.energy, upper=limits.energy_j / self.joules_per_unit)

    # -- solving ----------------------------------------------------------------------------------

    def objective(self, goal: Goal) -> list[tuple[int, float]]:
        """Terms of an objective; learn is maximized, all others minimized.

        Energy counts in ``joules_per_unit``, a weighted sum in ``1 / WEIGHTED_SCALE``.
        """
        p = self.problem
        if isinstance(goal, Weighted):
            return list(self._weighted(goal))
        if goal == "learn":
            terms = [(self.a[a], float(g)) for a, g in p.gain.items()]
            terms += [(self.both(u.activity, u.choice), float(u.gain)) for u in p.mixed_updates]
            return terms + [(self.a[m.activity], float(m.gain)) for m in p.mixed_layers]
        if goal == "ram":
            return [(self.peak, 1.0)]
        if goal == "flash":
            return self.flash
        bias = [(y, -SHYNESS * a) for y, a in self._hidden] if self.shy else []
        return (self.cycles if goal == "latency" else self.energy) + bias

    def _weighted(self, goal: Weighted) -> Iterator[tuple[int, float]]:
        for name, weight in goal.weights.items():
            factor = WEIGHTED_SCALE * weight / goal.references[name]
            if name == "learn":
                yield self.one, WEIGHTED_SCALE * weight
                factor = -factor
            elif name == "energy":
                factor *= self.joules_per_unit
            for column, x in self.objective(name):
                yield column, factor * x

    def solve(
        self,
        goal: Goal,
        options: SolverOptions,
        watch: Watch | None = None,
        start: Solution | None = None,
    ) -> SolveResult:
        """Solve for one objective.

        Args:
            goal: The objective.
            options: How to solve.
            watch: See ``LinearProgram.solve``.
            start: Decisions to start from.

        Raises:
            OdtPlanError: The solver failed.
        """
        objective, unit, learns = self.objective(goal), self._unit(goal), goal == "learn"
        known = None if start is None else hint(self, start)
        if options.solver == "auto" and self.relaxed and len(self.problem.activities) <= FEW:
            options = replace(options, solver="cp-sat")
        large = self.relaxed or len(self.c.lower) > LARGE
        cores = options.solver == "auto" and large and self._tight()
        needed = [self.a[a.index] for a in self.problem.activities if a.kind == "needed"]

        solve = partial(optimize, self.c, branch=needed, tree=self.tree) if cores else self.c.solve
        r = solve(objective, options, maximize=learns, watch=watch, unit=unit, hint=known)
        bound = unit * (min(r.bound, most_gain(self.problem)) if learns else max(r.bound, 0.0))
        if r.values is None:
            return SolveResult(r.status, float("nan"), bound, None, "", r.time_s)
        value = unit * float(sum(a * r.values[c] for c, a in objective))
        solution, peak = self._solution(r.values), self._peak_node(r.values)
        return SolveResult(r.status, value, bound, solution, peak, r.time_s)

    def relaxation(self, goal: Goal, options: SolverOptions, watch: Watch | None = None) -> float:
        """Bound of the LP: decisions may be taken by halves.

        Raises:
            OdtPlanError: The solver failed.
        """
        program = replace(self.c, integer=[False] * len(self.c.integer))
        learns = goal == "learn"
        highs = replace(options, solver="highs")
        r = program.solve(self.objective(goal), highs, maximize=learns, watch=watch)
        bound = self._unit(goal) * r.bound
        return min(bound, most_gain(self.problem)) if learns else max(bound, 0.0)

    def _tight(self) -> bool:
        """Only auxiliary tensors may be made late: LPs with rebuilds or page-ins are loose."""
        return not any(self.loaded) and not any(
            e.writes for r in self.problem.retentions if r.window is not None for e in r.events
        )

    def _unit(self, goal: Goal) -> float:
        """What 1 in the terms of an objective stands for."""
        if isinstance(goal, Weighted):
            return 1.0 / WEIGHTED_SCALE
        return self.joules_per_unit if goal == "energy" else 1.0

    def _peak_node(self, values: NDArray[np.float64]) -> str:
        return self.problem.slots[int(np.argmax(self.occupancy.live(values)))].node.name

    def _solution(self, values: NDArray[np.float64]) -> Solution:
        p = self.problem
        loads = frozenset(
            (r.tensor.index, r.events[j].slot)
            for i, r in enumerate(p.retentions)
            for j, v in self.loaded[i].items()
            if values[v] > 0.5
        )
        return Solution(self._active(values), loads)

    def _active(self, values: NDArray[np.float64]) -> frozenset[int]:
        """Activities that hold."""
        return frozenset(a.index for a in self.problem.activities if values[self.a[a.index]] > 0.5)
