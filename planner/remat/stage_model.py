"""The stage model: what is held, computed again or loaded in which stage, as clauses and rows.

Checkmate's formulation (arXiv 1910.02653, eq. 1-9) without its memory variables. In stage ``t``,
before the first computation of node ``t``, earlier nodes are made again or loaded, in node order:

    S[t,v]  v is in memory when stage t begins       R[t,v]  v is computed in stage t
    L[t,v]  v is loaded in stage t                   O[v]    v is written out when first made

Cells are codes: 0 false, 1 true, larger: a Boolean variable; a negative code is its negation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .instance import BoolArray, Instance, IntArray, Step, trace

FALSE, TRUE = 0, 1
#: Index of the first variable.
FIRST = 2


@dataclass(frozen=True)
class Row:
    """``sum(sizes * codes) <= room``, demanded where ``when`` holds."""

    codes: IntArray
    sizes: IntArray
    room: int
    when: int


@dataclass
class Cells:
    """A schedule as 0/1 cells: held int8[n + 1, n], computed and loaded int8[n, n]."""

    held: NDArray[np.int8]
    computed: NDArray[np.int8]
    loaded: NDArray[np.int8]

    @classmethod
    def of(cls, instance: Instance, steps: Sequence[Step]) -> Cells:
        """Cells of steps in which each stage makes a node at most once, in node order."""
        n = instance.nodes
        cells = cls(*(np.zeros((n + k, n), np.int8) for k in (1, 0, 0)))
        last = trace(instance, steps).last_use
        for i, (stage, kind, v) in enumerate(steps):
            (cells.computed if kind == "compute" else cells.loaded)[stage, v] = 1
            end = n if instance.keep[v] and last[i] == len(steps) - 1 else steps[last[i]].stage
            cells.held[stage + 1 : end + 1, v] = 1
        return cells


def steps_of(instance: Instance, cells: Cells) -> list[Step]:
    """Steps of a schedule's cells, without those that nobody needs."""
    made = cells.computed + 2 * cells.loaded
    steps = [
        Step(int(t), "compute" if made[t, v] == 1 else "load", int(v))
        for t, v in np.argwhere(made > 0)
    ]
    return needed(instance, steps)


def needed(instance: Instance, steps: Sequence[Step]) -> list[Step]:
    """Without results that are never read; first computations stay where they are mandatory."""
    first: dict[int, int] = {}
    for i, s in enumerate(steps):
        first.setdefault(s.node, i)
    read = set(map(int, np.flatnonzero(instance.keep)))
    stored: set[int] = set()
    kept: list[Step] = []
    for i in range(len(steps) - 1, -1, -1):
        s = steps[i]
        mandatory = first[s.node] == i and (not instance.lazy[s.node] or s.node in stored)
        if s.node not in read and not mandatory:
            continue
        kept.append(s)
        read.discard(s.node)
        if s.kind == "load":
            stored.add(s.node)
        else:
            read.update(instance.preds[s.node])
    return kept[::-1]


@dataclass
class StageModel:
    """All schedules that cost at most ``most``.

    Three groups of clauses only cut off schedules that another one of the same or less cost and
    memory replaces: nothing is held for nothing, nothing is loaded before its stage of use, nothing
    is computed a stage early while its operands stay. Proof: take a cheapest schedule with the
    fewest held cells.

    Attributes:
        instance: The problem.
        most: Largest total cost.
        depth: Offer a repeated computation only in stages that read its result, through at most so
            many computations; its bound is none of the whole problem then. None: in all stages.
        around: Fix everything but ``free`` to this schedule.
        free: Cells that are free, bool[n + 1, n]; None: all.
    """

    instance: Instance
    most: int
    depth: int | None
    around: Cells | None = None
    free: BoolArray | None = None
    variables: int = FIRST
    clauses: list[list[int]] = field(default_factory=list)
    dominance: list[list[int]] = field(default_factory=list)
    exclusive: list[list[int]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    objective: dict[int, int] = field(default_factory=dict)
    constant: int = 0
    infeasible: bool = False
    refined: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Build everything but the memory rows that ``refine`` adds."""
        n = self.instance.nodes
        self.held = np.zeros((n + 1, n), np.int64)
        self.computed = np.zeros((n, n), np.int64)
        self.loaded = np.zeros((n, n), np.int64)
        self.stored = np.zeros(n, np.int64)
        self._either: dict[tuple[int, ...], int] = {}
        self._cells()
        self._supply()
        self._dominance()
        for t in range(n):
            self._row(t, t)

    # -- cells ------------------------------------------------------------------------------------

    def _cells(self) -> None:
        x, n = self.instance, self.instance.nodes
        slack = self.most - x.once_cost
        cost, last = x.cost.tolist(), x.last_stage.tolist()
        level = np.full((n, n), n, np.int64)  # how far a computation is from what its stage is for
        for v in range(n - 1, -1, -1):
            read = np.full(n + 1, n, np.int64)
            for u in x.users[v]:
                np.minimum(read[:n], level[:, u] + 1, out=read[:n])
            if x.keep[v]:
                read[n] = 0
            first_use = max((u for u in x.users[v] if not x.lazy[u]), default=v)
            first_use = n if x.keep[v] else first_use
            again, pages = cost[v] <= slack and last[v] > v, self._pages(v, slack)
            must = v if again or pages or x.lazy[v] else first_use
            self.computed[v, v] = self._variable() if x.lazy[v] else TRUE
            level[v, v] = 0
            useful = int(np.flatnonzero(read < n).max(initial=v))
            for t in range(v + 1, useful + 1):
                self.held[t, v] = TRUE if t <= must else self._free(t, v, "held")
                if must < t < n:
                    if again and t <= last[v] and self._offered(t, v, int(read[t])):
                        self.computed[t, v] = self._free(t, v, "computed")
                        if self.computed[t, v]:
                            level[t, v] = 1 if self.depth is None else read[t]
                    if pages and read[t] < n:
                        self.loaded[t, v] = self._free(t, v, "loaded")
            if x.keep[v]:
                self._clause([int(self.held[n, v])])
            self._prices(v)

    def _pages(self, v: int, slack: int) -> bool:
        x = self.instance
        if x.page_in_cost is None or x.page_out_cost is None:
            return False
        return int(x.page_in_cost[v] + x.page_out_cost[v]) <= slack

    def _offered(self, t: int, v: int, level: int) -> bool:
        known = self.around is not None and bool(self.around.computed[t, v])
        return self.depth is None or known or level <= min(self.depth, self.instance.nodes - 1)

    def _prices(self, v: int) -> None:
        x = self.instance
        for column, price in ((self.computed, x.cost), (self.loaded, x.page_in_cost)):
            if price is None:
                continue
            for code in column[v:, v].tolist():
                self._charge(code, int(price[v]))
        loads = self.loaded[:, v][self.loaded[:, v] != FALSE]
        if x.page_out_cost is not None and loads.size:
            self.stored[v] = TRUE if (loads == TRUE).any() else self._variable()
            self._charge(int(self.stored[v]), int(x.page_out_cost[v]))
            for code in loads.tolist():
                self._clause([-code if code > 1 else 1 - code, int(self.stored[v])])

    def _charge(self, code: int, price: int) -> None:
        if code == TRUE:
            self.constant += price
        elif code > 1 and price:
            self.objective[code] = self.objective.get(code, 0) + price

    def _free(self, t: int, v: int, name: str) -> int:
        if self.around is None or self.free is None or self.free[t, v]:
            return self._variable()
        return int(getattr(self.around, name)[t, v])

    def _variable(self) -> int:
        self.variables += 1
        return self.variables - 1

    # -- clauses ----------------------------------------------------------------------------------

    def _clause(self, codes: Sequence[int], *, dominance: bool = False) -> None:
        """At least one of the codes holds."""
        if TRUE in codes:
            return
        kept = [c for c in codes if c != FALSE]
        self.infeasible |= not kept
        (self.dominance if dominance else self.clauses).append(kept)

    def _implies(self, code: int, codes: Sequence[int], *, dominance: bool = False) -> None:
        if code != FALSE:
            self._clause([_negated(code), *codes], dominance=dominance)

    def _present(self, t: int, v: int) -> list[int]:
        here = [int(self.held[t, v])]
        if t < self.instance.nodes:
            here += [int(self.computed[t, v]), int(self.loaded[t, v])]
        return here

    def _reading(self, t: int, v: int) -> list[int]:
        """Codes of the computations in stage ``t`` that read ``v``."""
        if t >= self.instance.nodes:
            return [TRUE] if self.instance.keep[v] else []
        column = self.computed[t]
        return [c for u in self.instance.users[v] if u <= t and (c := int(column[u])) != FALSE]

    def _supply(self) -> None:
        """What is held was there the stage before; what is computed has its operands."""
        x, n = self.instance, self.instance.nodes
        for v in range(n):
            for t in range(v + 1, n + 1):
                if (code := int(self.held[t, v])) != FALSE:
                    self._implies(code, self._present(t - 1, v))
                here = [c for c in self._present(t, v) if c != FALSE]
                if len(here) > 1:
                    self.exclusive.append(here)
            for t in (v + np.flatnonzero(self.computed[v:, v])).tolist():
                for p in x.preds[v]:
                    self._implies(int(self.computed[t, v]), self._present(t, p))
            if x.lazy[v]:  # what was never computed can't be loaded
                for t in np.flatnonzero(self.loaded[:, v]).tolist():
                    self._implies(int(self.loaded[t, v]), self.computed[v:t, v].tolist())

    def _dominance(self) -> None:
        x, n = self.instance, self.instance.nodes
        for v in range(n):
            for t in range(v + 1, n):
                reading = self._reading(t, v)
                if TRUE in reading:
                    continue
                if (held := int(self.held[t, v])) > 1:
                    self._implies(held, [*reading, int(self.held[t + 1, v])], dominance=True)
                if (loaded := int(self.loaded[t, v])) > 1:
                    self._implies(loaded, reading, dominance=True)
                if (made := int(self.computed[t, v])) > 1:
                    if self.depth is not None:
                        self._implies(made, reading)
                    elif t + 1 < n and self.computed[t + 1, v] and not x.scratch_bytes[v]:
                        leaves = self._operand_leaves(t + 1, v)
                        self._implies(made, [*reading, *leaves], dominance=True)

    def _operand_leaves(self, t: int, v: int) -> list[int]:
        """Codes that say that an operand of ``v`` may not last through stage ``t``."""
        x = self.instance
        lasts = set(x.preds[t]) if not x.lazy[t] else set()
        return [_negated(int(self.held[t + 1, p])) for p in x.preds[v] if p not in lasts]

    # -- memory -----------------------------------------------------------------------------------

    def _row(self, t: int, j: int) -> None:
        """What is live while node ``j`` is made in stage ``t``.

        Earlier nodes are live if a later computation of the stage reads them or the next stage
        holds them; later ones if they are held into this stage.
        """
        x = self.instance
        for code, operands, scratch in (
            (int(self.computed[t, j]), x.preds[j], int(x.scratch_bytes[j])),
            (int(self.loaded[t, j]), (), 0),
        ):
            if code == FALSE:
                continue
            fixed = [*operands, j]
            room = x.budget_bytes - int(x.load_bytes[t] + x.size_bytes[fixed].sum()) - scratch
            live = self.held[t].copy()
            live[:j] = self.held[t + 1, :j] if j == t else [self._live(t, j, v) for v in range(j)]
            live[fixed] = FALSE
            room -= int(x.size_bytes[live == TRUE].sum())
            at = np.flatnonzero((live > 1) & (x.size_bytes > 0))
            sizes = x.size_bytes[at]
            if sizes.sum() > room:
                self.rows.append(Row(live[at], sizes, room, code))

    def _live(self, t: int, j: int, v: int) -> int:
        if not any(self._present(t, v)):
            return FALSE
        column = self.computed[t]
        codes = {int(column[u]) for u in self.instance.users[v] if j < u <= t}
        codes = (codes | {int(self.held[t + 1, v])}) - {FALSE}
        if TRUE in codes or len(codes) < 2:
            return TRUE if TRUE in codes else next(iter(codes), FALSE)
        key = tuple(sorted(codes))
        if key not in self._either:
            self._either[key] = either = self._variable()
            for c in key:
                self._clause([-c, either])
        return self._either[key]

    def refine(self, steps: Sequence[Step]) -> bool:
        """Add the memory rows of all steps that exceed the budget; False: there is none."""
        live = trace(self.instance, steps).live_bytes
        over = np.flatnonzero(live > self.instance.budget_bytes)
        wanted: set[tuple[int, int]] = set()
        for i in over.tolist():
            stage, _, node = steps[i]
            near = np.flatnonzero(self.computed[:, node] + self.loaded[:, node])
            wanted.update((int(t), node) for t in near if t != node and abs(t - stage) <= _NEAR)
        for t, j in sorted(wanted - self.refined):
            self._row(t, j)
        self.refined |= wanted
        return bool(over.size)

    def cells(self, values: NDArray[np.int8]) -> Cells:
        """The schedule of a solution: values int8[variables], the two constants first."""
        return Cells(values[self.held], values[self.computed], values[self.loaded])


#: A violated row is added for this many stages around, too.
_NEAR = 3


def _negated(code: int) -> int:
    return -code if code > 1 else 1 - code
