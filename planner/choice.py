"""The choice of updates over few cuts of the timeline: a program of updates and rebuilding.

``milp.Milp(relaxed=True)`` chooses updates as if rebuilding and paging took nothing: a tensor is
there whenever a slot reads it and takes RAM only then. Here it is held, or not, at a few *cuts*.
Between neighbouring cuts it is made again or loaded at most once, and what is made again needs what
it is made from, as in ``planner.cuts``, but nothing is fixed: a tensor has to be there if the
update that reads it is chosen, and can't be made again if its own parameters are updated before.
Whatever any plan does is a solution, so the optimum is a bound of all plans. Between two cuts with
nothing in between, making a tensor again has to fit as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ..ir.graph import Node
from ..ir.opdef import get_op
from .held import Held
from .milp import Milp
from .objective import Goal
from .problem import ALWAYS, Problem, StreamChoice
from .remakes import NEVER
from .solution import Solution
from .tensors import Tensor, aligned


@dataclass(frozen=True, order=True)
class Cut:
    """A step, as neighbouring slots of which one at most runs: an update in its candidates' slots.

    Attributes:
        first: Slot.
        last: Slot.
    """

    first: int
    last: int

    @property
    def slots(self) -> range:
        """All of them."""
        return range(self.first, self.last + 1)


@dataclass(frozen=True, order=True)
class Make:
    """Making a tensor again, or loading it, right before a cut.

    Attributes:
        cut: The cut.
        before: The one before; what is in between may run or not.
        tensor: Name of the tensor.
    """

    cut: Cut
    before: Cut
    tensor: str


@dataclass(frozen=True)
class Unfit:
    """Updates, precisions and blocks that don't fit: just these, neither fewer nor more.

    Attributes:
        on: Activities that hold.
        off: Those that don't.
    """

    on: tuple[int, ...]
    off: tuple[int, ...]

    @classmethod
    def of(cls, problem: Problem, active: Collection[int]) -> Unfit:
        """What a solution has chosen."""
        chosen = [a.index for a in problem.activities if a.kind in ("update", "mixed", "streamed")]
        on = tuple(a for a in chosen if a in active)
        return cls(on, tuple(a for a in chosen if a not in active))


def cuts_of(problem: Problem) -> dict[str, Cut]:
    """The cut at each node that runs once, in order."""
    updates: dict[str, list[int]] = {}
    for s in problem.slots:
        if s.update is not None and not s.last_micro:
            updates.setdefault(s.update.candidate.param, []).append(s.index)
    found = {}
    for s in problem.slots:
        if s.update is not None:
            at = [s.index] if s.last_micro else updates[s.update.candidate.param]
            if at[-1] - at[0] == len(at) - 1:
                found[s.node.name] = Cut(at[0], at[-1])
        elif not s.rebuild:
            found[s.node.name] = Cut(s.index, s.index)
    return found


class ChoiceByCuts(Milp):
    """The program for some cuts.

    Attributes:
        cuts: In order.
        live: (Cut, tensor) -> column of being live at it.
        again: (Interval, tensor) -> column of being made again in the interval before this cut.
    """

    def __init__(
        self,
        problem: Problem,
        where: Collection[Cut | Make] = (),
        goal: Goal | None = None,
        unfit: Collection[Unfit] = (),
    ) -> None:
        """Build variables and constraints.

        Args:
            problem: What to decide.
            where: Tensors are held or not, and may be made again; cuts don't overlap.
            goal: The only objective that will be asked for; None: any.
            unfit: What is not to be chosen.
        """
        makes = sorted(m for m in where if isinstance(m, Make))
        cuts = {c for c in where if isinstance(c, Cut)}
        self.cuts = sorted(cuts.union(*({m.cut, m.before} for m in makes)))
        self.forward = Held(problem)
        self.first_run = {s.node: s for s in reversed(problem.slots) if not s.rebuild}
        begins = [c.first for c in self.cuts]
        self.begin = np.searchsorted(begins, self.forward.made, side="right").tolist()
        self.used = [i for i in self.forward.used() if self.begin[i] < len(self.cuts)]
        self.live: dict[tuple[int, int], int] = {}
        self.again: dict[tuple[int, int], int] = {}
        self.there: dict[tuple[object, ...], int] = {}
        super().__init__(problem, goal, relaxed=True)
        # a cut in between, of a step that may not run, is one more moment to make the tensor at
        first = {c: s for s, c in enumerate(self.cuts)}
        for s, tensor in sorted(
            {(s, m.tensor) for m in makes for s in range(first[m.before] + 1, first[m.cut] + 1)}
        ):
            self._make(s, tensor)
        for u in unfit:
            terms = [*((self.a[a], 1.0) for a in u.on), *((self.a[a], -1.0) for a in u.off)]
            self.c.row(terms, upper=len(u.on) - 1.0)

    def _cut_columns(self) -> None:
        p, last = self.problem, len(self.cuts)
        steps = (s for s in p.slots if s.node.phase in ("backward", "update") and not s.rebuild)
        self.backward = min((s.index for s in steps), default=NEVER)
        pages = p.cost.storage is not None and p.limits.storage_bytes > 0
        retention = {r.tensor: k for k, r in enumerate(p.retentions)}
        self.paged: dict[tuple[int, int], int] = {}
        self.unread: list[tuple[int, float]] = []
        for i in self.used:
            tensor, begin = self.forward.tensors[i], self.begin[i]
            for s in range(begin, last):
                self.live[s, i] = self.c.column(integer=True)
            for s in range(begin + 1, last + 1):
                # before backward no step asks for anything again
                if tensor.rebuildable and (s == last or self.cuts[s].first >= self.backward):
                    self.again[s, i] = self.c.column(integer=True)
            if pages:
                self._page_columns(i, retention.get(tensor))
        for i in self.used:
            self._supply_at_cuts(i)
        for slot, pair in self.forward.taken.items():
            self._taken(slot, *pair)

    def _taken(self, slot: int, j: int, i: int) -> None:
        """What is overwritten as soon as it is made is neither held nor made or loaded alone.

        A block by rows has other nodes, and with f32 weights a node may need its operand whole.
        """
        p = self.problem
        others = [b.activity for b in p.streams if slot in b.slots or self._inside(b, j)]
        if (form := p.slots[slot].mixed) is not None:
            others.append(form.choice)
        unless = self.weakest(self.forward.in_place[j, i])
        apart = [(self.a[a], -1.0) for a in (*unless, *others)]
        for known in (self.live, self.paged, self.again):
            for (s, k), column in known.items():
                if k == j:
                    both = self.again.get((s, i)) if known is self.again else None
                    with_result = [] if both is None else [(both, -1.0)]
                    self.c.row([(column, 1.0), *with_result, *apart], upper=0.0)

    def _inside(self, block: StreamChoice, i: int) -> bool:
        """A block that runs by rows makes this tensor in another way, and nothing inside it."""
        return any(self.forward.tensors[i] in self.problem.slots[k].writes for k in block.slots)

    def _page_columns(self, i: int, retention: int | None) -> None:
        """A tensor is paged out once, and loaded in any interval.

        One that only others are made from is none that is retained: of its transfers time counts
        alone, not what they take of storage, wear and flash.
        """
        stored, cost = self.c.column(integer=True), self.problem.cost
        loads = {
            s: self.c.column(integer=True) for s in range(self.begin[i] + 1, len(self.cuts) + 1)
        }
        for s, load in loads.items():
            self.paged[s, i] = load
            self.c.row([(stored, 1.0), (load, -1.0)], lower=0.0)
        if retention is not None:
            self.stored[retention], self.loaded[retention] = stored, loads
            return
        size, micro = self.forward.tensors[i].bytes, float(self.problem.micro_batches)
        self.unread.append((stored, micro * cost.write_cycles(size)))
        self.unread += ((load, micro * cost.read_cycles(size)) for load in loads.values())

    def _supply_at_cuts(self, i: int) -> None:
        """What is read, held or needed to make something again is there."""
        reads, row, begin = self.forward.reads[i], self.c.row, self.begin[i]
        early = self.forward.auxiliary.get(self.forward.tensors[i])
        if early is not None and self.cuts[begin].first < self.backward:
            made = self.a[self.problem.slots[early].activity]  # by then nothing is made late
            row([(made, 1.0), (self.live[begin, i], -1.0)], lower=0.0)
        for s in range(begin, len(self.cuts)):
            cut = self.cuts[s]
            for terms in self._read(a for k, a in reads if k in cut.slots):
                row([(self.live[s, i], 1.0), *terms], lower=0.0)
        for s in range(begin + 1, len(self.cuts) + 1):
            ways, behind = self._ways(s, i), self.cuts[s - 1].last
            end = self.cuts[s].first if s < len(self.cuts) else NEVER
            for terms in self._read(a for k, a in reads if behind < k < end):
                row([*ways, *terms], lower=0.0)
            if s < len(self.cuts):
                row([*ways, (self.live[s, i], -1.0)], lower=0.0)
            again = self.again.get((s, i))
            if again is None:
                continue
            for j in self.forward.operands[i]:
                if self.begin[j] < s:
                    row([*self._ways(s, j), (again, -1.0)], lower=0.0)
            changed = dict.fromkeys(a for k, a in self.forward.changes[i] if k <= behind)
            if ALWAYS in changed:
                self.c.upper[again] = 0.0
            else:
                for acts in self._alternatives(changed):
                    row([(again, 1.0), *((self.a[a], 1.0) for a in acts)], upper=1.0)

    def _ways(self, s: int, i: int) -> list[tuple[int, float]]:
        """Columns that say that a tensor is there in the interval before a cut."""
        found = (self.live.get((s - 1, i)), self.again.get((s, i)), self.paged.get((s, i)))
        return [(v, 1.0) for v in found if v is not None]

    def _read(self, activities: Iterator[int]) -> Iterator[list[tuple[int, float]]]:
        for acts in self._alternatives(dict.fromkeys(activities)):
            yield [(self.a[a], -1.0) for a in acts]

    def _at_cuts(self, tensor: Tensor) -> Collection[int]:
        i = self.forward.at.get(tensor)
        if i is None:
            return ()
        return {k for c in self.cuts[self.begin[i] :] for k in c.slots}

    def _occupy_cuts(self) -> None:
        for (s, i), column in self.live.items():
            cut, tensor = self.cuts[s], self.forward.tensors[i]
            self.occupancy.add(cut.first, cut.last, column, tensor.bytes)

    def _make(self, s: int, name: str) -> None:
        """A tensor can be made again in the interval before a cut: beside what is live across."""
        known, p, cut, before = self.forward, self.problem, self.cuts[s], self.cuts[s - 1]
        i = next((i for i in self.used if known.tensors[i].name == name), None)
        again = None if i is None else self.again.get((s, i))
        if i is None or again is None:
            return
        streamed = [self.a[b.activity] for b in p.streams if self._inside(b, i)]
        by_rows = [(v, 1.0) for v in streamed]
        apart: dict[int, int] = {}
        for j in known.operands[i]:
            if unless := known.in_place.get((j, i)):
                apart[j] = self.c.column(integer=False)
                for others in self._alternatives(unless):
                    both = [(again, -1.0), *((self.a[a], -1.0) for a in others)]
                    self.c.row([(apart[j], 1.0), *by_rows, *both], lower=-1.0)
        between = [
            x.activity
            for x in p.slots[before.last + 1 : cut.first]
            if not x.rebuild and p.activities[x.activity].kind != "auxiliary"
        ]
        there = cache(lambda j: self._there(s, i, j, between))
        around = [*self.state]
        for t in p.transients:
            acts = next((acts for last, acts in t.segments if last >= cut.first), None)
            if t.begin <= before.last and acts is not None:
                around.append((self._one_of(acts), float(t.tensor.bytes)))
        writers = known.tensors[i].writers
        for k, w in enumerate(writers):
            # what its later nodes read is there already, unless it is loaded in between
            nodes = [w] if self.paged else writers[k:]
            read = (p.storage.of.get(v) for n in nodes for v in n.operands())
            beside = {i, *(known.at[t] for t in read if t in known.at)}
            own = float(aligned(get_op(w.op).workspace(w)))
            own += sum(known.tensors[j].bytes for j in beside if (j, i) not in known.in_place)
            terms = [(again, own), *((v, -own) for v in streamed), *around]
            terms += self._as_mixed(again, w)
            terms += [(apart[j], float(known.tensors[j].bytes)) for j in beside if j in apart]
            for j in self.used:
                if j not in beside and (v := there(j)) is not None:
                    terms.append((v, float(known.tensors[j].bytes)))
            self.c.row(terms, upper=p.limits.ram_bytes)

    def _as_mixed(self, again: int, writer: Node) -> Iterator[tuple[int, float]]:
        """Workspace that making a tensor again takes more if its layer is mixed."""
        slot = self.first_run.get(writer)
        if slot is None or slot.mixed is None:
            return
        mixed, more = self.a[slot.mixed.choice], slot.mixed.scratch_bytes - slot.scratch_bytes
        if more <= 0:
            yield mixed, float(more)
            return
        both = self.c.column(integer=False)
        self.c.row([(both, 1.0), (again, -1.0), (mixed, -1.0)], lower=-1.0)
        yield both, float(more)

    def _there(self, s: int, i: int, j: int, between: Sequence[int]) -> int | None:
        """1 where one tensor is there when another is made; None: it never has to be.

        As in ``planner.cuts``: it was made before or is live from the cut before, and the cut, or
        what is made later, needs it. Where a step in between runs, what is made before it and
        behind it has no order.
        """
        order, always = self.forward.order, ALWAYS in between
        if (s - 1, j) not in self.live:
            return None
        runs = [] if always else [(self.a[a], 1.0) for a in self.weakest(between)]
        needs = [(self.live[s, j], False)] if (s, j) in self.live else []
        for a in self.used:
            later = order[a] > order[i] and j in self.forward.operands[a]
            if later and (s, a) in self.again and not always:
                needs.append((self.again[s, a], True))
        before = order[j] < order[i] and not always
        anew = [self.paged.get((s, j)), None if before else self.again.get((s, j))]
        absent = [(v, 1.0) for v in anew if v is not None]
        key = s, j, before, tuple(needs)  # few tensors differ in what is made behind them
        if key in self.there:
            return self.there[key]
        v = self.there[key] = self.c.column(integer=False)
        for n, ordered in needs:
            terms = [(v, 1.0), *absent, (n, -1.0), *(runs if before or ordered else ())]
            if not before:
                terms.append((self.live[s - 1, j], -1.0))
            self.c.row(terms, lower=0.0 if before else -1.0)
        return v

    def _remade_cycles(self) -> list[tuple[int, float]]:
        """Cycles of making things again; those of auxiliary tensors are counted without cuts."""
        cost, micro = self.problem.cost, self.problem.micro_batches
        cycles = [
            0 if t in self.forward.auxiliary else micro * sum(map(cost.node_cycles, t.writers))
            for t in self.forward.tensors
        ]
        again = [(column, float(cycles[i])) for (_, i), column in self.again.items()]
        return super()._remade_cycles() + again + self.unread

    def _solution(self, values: NDArray[np.float64]) -> Solution:
        """Activities alone: what is loaded between which cuts is no decision about a slot."""
        return Solution(self._active(values), frozenset())
