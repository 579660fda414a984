"""The stage model: what is held, computed again or loaded in which stage, as clauses and rows.

Checkmate's formulation (arXiv 1910.02653, eq. 1-9) without its memory variables. In stage ``t``,
before the first computation of node ``t``, earlier nodes are made again or loaded, in node order:

    S[t,v]  v is in memory when stage t begins       R[t,v]  v is computed in stage t
    L[t,v]  v is loaded in stage t                   O[v]    v is written out when first made

Where nobody can read or make ``v`` in stage ``t``, ``S[t,v]`` and ``S[t+1,v]`` are one variable: a
retention interval (Moccasin, arXiv 2304.14463) is a run of few variables then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .cells import Cells
from .clauses import FALSE, FIRST, TRUE, Clauses, negated
from .instance import BoolArray, Instance, IntArray, Step, trace


@dataclass(frozen=True)
class Row:
    """``sum(sizes * codes) <= room``, demanded where ``when`` holds."""

    codes: IntArray
    sizes: IntArray
    room: int
    when: int


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
            many computations, and where ``known`` computes; its bound is none of the whole problem
            then. None: in all stages.
        known: A schedule.
        loose: Be a relaxation for every schedule, in whatever order and however often a stage makes
            its nodes: ``R[t,v]`` says that stage ``t`` makes ``v`` at least once. Its solutions may
            not be executable. Else a stage makes a node at most once, in node order.
        around: Fix everything but ``free`` to this schedule.
        free: Cells that are free, bool[n + 1, n]; None: all.
        zone: Ascending int64[n]: stages of the same zone are merged, and only the last one of each
            has a memory row; of loose models. None: each stage stands for itself.
    """

    instance: Instance
    most: int
    depth: int | None
    known: Cells | None = None
    loose: bool = False
    around: Cells | None = None
    free: BoolArray | None = None
    zone: IntArray | None = None
    variables: int = FIRST
    clauses: Clauses = field(default_factory=Clauses)
    dominance: Clauses = field(default_factory=Clauses)
    exclusive: list[list[int]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    refined: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Build everything but the memory rows that ``refine`` adds."""
        n = self.instance.nodes
        self.zones = np.arange(n) if self.zone is None else self.zone
        z = self.stages = int(self.zones[-1]) + 1
        self.ends = np.searchsorted(self.zones, np.arange(z), side="right") - 1
        self.held = np.zeros((z + 1, n), np.int64)
        self.computed = np.zeros((z, n), np.int64)
        self.loaded = np.zeros((z, n), np.int64)
        self.stored = np.zeros(n, np.int64)
        self._either: dict[tuple[int, ...], int] = {}
        self._lasting: dict[tuple[int, int], int] = {}
        self._cells()
        self._prices()
        self._supply()
        self._dominance()
        for t in range(z):
            self._row(t, int(self.ends[t]))

    @property
    def infeasible(self) -> bool:
        """No schedule costs so little, and the clauses alone say so."""
        return self.clauses.impossible or self.dominance.impossible or self.constant > self.most

    # -- cells ------------------------------------------------------------------------------------

    def _cells(self) -> None:
        x, n, z = self.instance, self.instance.nodes, self.stages
        slack = self.most - x.once_cost
        level = np.full((z, n), n, np.int64)  # how far a computation is from what its stage is for
        for v in range(n - 1, -1, -1):
            read = np.full(z + 1, n, np.int64)
            for u in x.users[v]:
                np.minimum(read[:z], level[:, u] + 1, out=read[:z])
            if x.keep[v]:
                read[z] = 0
            again = bool(x.cost[v] <= slack and x.last_stage[v] > v)
            pages = self._pages(v, slack)
            own = must = int(self.zones[v])
            if not (again or pages or x.lazy[v]):
                must = max((int(self.zones[u]) for u in x.users[v] if not x.lazy[u]), default=own)
                must = z if x.keep[v] else must
            self.computed[own, v] = self._new(1)[0] if x.lazy[v] else TRUE
            level[own, v] = 0
            useful = int(np.flatnonzero(read < n).max(initial=own))
            at = np.arange(must + 1, min(useful, z - 1) + 1)
            if again:
                last = self.zones[x.last_stage[v]]
                here = at[self._offers(at, v, read[at]) & (at <= last)]
                self.computed[here, v] = self._code(here, v, "computed")
                here = here[self.computed[here, v] != FALSE]
                level[here, v] = 1 if self.depth is None else read[here]
            if pages:
                here = at[read[at] < n]
                self.loaded[here, v] = self._code(here, v, "loaded")
            self.held[own + 1 : must + 1, v] = TRUE
            idle = (read[:z] == n) & (self.computed[:, v] == FALSE)
            self._hold(np.arange(must + 1, useful + 1), v, idle)
            if x.keep[v]:
                self.clauses.add(self.held[z:, v])

    def _pages(self, v: int, slack: int) -> bool:
        x = self.instance
        if x.page_in_cost is None or x.page_out_cost is None:
            return False
        return int(x.page_in_cost[v] + x.page_out_cost[v]) <= slack

    def _offers(self, at: IntArray, v: int, level: IntArray) -> BoolArray:
        """In which of the stages a computation of ``v`` is offered."""
        offers = np.ones(len(at), np.bool_)
        if self.depth is not None:
            offers = level <= min(self.depth, self.instance.nodes - 1)
        for schedule in (self.known, self.around):
            if schedule is not None:
                offers |= schedule.computed[at, v] > 0
        return offers

    def _code(self, at: IntArray, v: int, name: str) -> IntArray:
        """New variables, or what the cells are fixed to."""
        if self.around is None or self.free is None:
            return self._new(len(at))
        free = self.free[at, v]
        codes: IntArray = getattr(self.around, name)[at, v].astype(np.int64)
        codes[free] = self._new(int(free.sum()))
        return codes

    def _hold(self, at: IntArray, v: int, idle: BoolArray) -> None:
        """``S`` of consecutive stages; one variable across a stage in which ``v`` is idle."""
        same = np.zeros(len(at), np.bool_)
        same[1:] = idle[at[:-1]]
        free = np.ones(len(at), np.bool_)
        if self.around is not None and self.free is not None:
            free = self.free[at, v]
            same[1:] &= free[:-1]
        begins = free & ~same
        first = self._new(int(begins.sum()))[:1].sum()
        codes = first + np.cumsum(begins) - 1
        if self.around is not None:
            codes = np.where(free, codes, self.around.held[at, v])
        self.held[at, v] = codes

    def _new(self, count: int) -> IntArray:
        self.variables += count
        return np.arange(self.variables - count, self.variables)

    def _prices(self) -> None:
        """Objective: codes and prices, and what is paid in any case."""
        x = self.instance
        codes: list[IntArray] = [self.computed]
        prices: list[IntArray] = [np.broadcast_to(x.cost, self.computed.shape)]
        if x.page_in_cost is not None and x.page_out_cost is not None:
            codes.append(self.loaded)
            prices.append(np.broadcast_to(x.page_in_cost, self.loaded.shape))
            paged = (self.loaded != FALSE).any(axis=0)
            certain = (self.loaded == TRUE).any(axis=0)
            self.stored[certain] = TRUE
            self.stored[paged & ~certain] = self._new(int((paged & ~certain).sum()))
            codes.append(self.stored)
            prices.append(x.page_out_cost)
            t, v = np.nonzero(self.loaded)
            self.clauses.add(negated(self.loaded[t, v]), self.stored[v])
        code = np.concatenate([c.ravel() for c in codes])
        price = np.concatenate([p.ravel() for p in prices])
        self.constant = int(price[code == TRUE].sum())
        priced = (code > TRUE) & (price > 0)
        self.priced, self.prices = code[priced], price[priced]

    # -- clauses ----------------------------------------------------------------------------------

    def _present(self, t: IntArray, v: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Codes of which one holds if ``v`` is there in stage ``t`` < n."""
        return self.held[t, v], self.computed[t, v], self.loaded[t, v]

    def _supply(self) -> None:
        """What is held was there the stage before; what is computed has its operands."""
        x, n = self.instance, self.instance.nodes
        t, v = np.nonzero(self.held)
        self.clauses.add(negated(self.held[t, v]), *self._present(t - 1, v))
        if not self.loose:
            codes = np.stack([self.held[:-1], self.computed, self.loaded], axis=-1)
            several = codes[(codes != FALSE).sum(axis=-1) > 1]
            self.exclusive = [[c for c in row if c != FALSE] for row in several.tolist()]
        t, u = np.nonzero(self.computed)
        for v in _padded(x.preds, n).T:
            here = v[u] < n
            operands = self._present(t[here], v[u[here]])
            self.clauses.add(negated(self.computed[t[here], u[here]]), *operands)
        for lazy in np.flatnonzero(x.lazy).tolist():  # what was never computed can't be loaded
            for s in np.flatnonzero(self.loaded[:, lazy]).tolist():
                before = self.computed[None, : s + self.loose, lazy]
                self.clauses.add(negated(self.loaded[s : s + 1, lazy]), before)

    def _dominance(self) -> None:
        x, n = self.instance, self.instance.nodes
        later = np.arange(self.stages)[:, None] > self.zones
        users = _padded(x.users, n)
        padded = np.column_stack(
            [self.computed, np.zeros(self.stages, np.int64)]
        )  # of a user that is none

        def reading(t: IntArray, v: IntArray) -> IntArray:
            """Codes of the computations in each stage that read the node."""
            return padded[t[:, None], users[v]]

        t, v = np.nonzero((self.held[:-1] > TRUE) & later)
        self.dominance.add(negated(self.held[t, v]), reading(t, v), self.held[t + 1, v])
        t, v = np.nonzero((self.loaded > TRUE) & later)
        self.dominance.add(negated(self.loaded[t, v]), reading(t, v))
        t, v = np.nonzero((self.computed > TRUE) & later)
        if self.depth is not None:
            self.clauses.add(negated(self.computed[t, v]), reading(t, v))
            return
        if self.stages < n:
            return
        again = (t + 1 < n) & (x.scratch_bytes[v] == 0)
        t, v = t[again], v[again]
        again = self.computed[t + 1, v] != FALSE
        t, v = t[again], v[again]
        # an operand may not last through the next stage: it is neither held on nor read at its end
        operands = _padded(x.preds, n)
        fixed = np.zeros((n, n + 1), np.bool_)
        for s in np.flatnonzero(~x.lazy).tolist():
            fixed[s, list(x.preds[s])] = True
        ends = np.column_stack([self.held, np.ones(n + 1, np.int64)])
        p = operands[v]
        if self.loose:  # operands may come after it is gone, unless it lasts, too
            p = np.column_stack([p, v])
        leaves = np.where(fixed[t[:, None] + 1, p], FALSE, negated(ends[t[:, None] + 2, p]))
        self.dominance.add(negated(self.computed[t, v]), reading(t, v), leaves)

    # -- memory -----------------------------------------------------------------------------------

    def _row(self, t: int, j: int) -> None:
        """What is live while node ``j`` is made in stage ``t``."""
        x = self.instance
        for code, operands, scratch in (
            (int(self.computed[t, j]), x.preds[j], int(x.scratch_bytes[j])),
            (int(self.loaded[t, j]), (), 0),
        ):
            if code == FALSE:
                continue
            fixed = [*operands, j]
            room = (
                x.budget_bytes
                - int(x.load_bytes[self.ends[t]] + x.size_bytes[fixed].sum())
                - scratch
            )
            live = self._live_codes(t, j)
            live[fixed] = FALSE
            room -= int(x.size_bytes[live == TRUE].sum())
            at = np.flatnonzero((live > TRUE) & (x.size_bytes > 0))
            sizes = x.size_bytes[at]
            if sizes.sum() > room:
                self.rows.append(Row(live[at], sizes, room, code))

    def _live_codes(self, t: int, j: int) -> IntArray:
        """Codes of the nodes beside operands and result.

        Earlier nodes are live if a later computation of the stage reads them or the next stage
        holds them; later ones if they are held into this stage. In a loose model it is only known
        that what lasts through the stage is there.
        """
        live: IntArray = self.held[t].copy()
        if j == self.ends[t]:
            live[:] = self.held[t + 1]
            return live
        if self.loose:
            live[:] = [self._lasts(t, v) for v in range(self.instance.nodes)]
            return live
        live[:j] = [self._live(t, j, v) for v in range(j)]
        return live

    def _live(self, t: int, j: int, v: int) -> int:
        if not (self.held[t, v] or self.computed[t, v] or self.loaded[t, v]):
            return FALSE
        column = self.computed[t]
        codes = {int(column[u]) for u in self.instance.users[v] if j < u <= t}
        codes = (codes | {int(self.held[t + 1, v])}) - {FALSE}
        if TRUE in codes or len(codes) < 2:
            return TRUE if TRUE in codes else next(iter(codes), FALSE)
        key = tuple(sorted(codes))
        if key not in self._either:
            self._either[key] = either = int(self._new(1)[0])
            for c in key:
                self.clauses.add(np.array([[-c, either]]))
        return self._either[key]

    def _lasts(self, t: int, v: int) -> int:
        """Code that holds at least if ``v`` is in memory throughout stage ``t``."""
        x, end = self.instance, self.ends[t]
        until_end = TRUE if v in x.preds[end] and not x.lazy[end] else int(self.held[t + 1, v])
        through = int(self.held[t, v]), until_end
        made = int(self.computed[t, v]), int(self.loaded[t, v])
        if FALSE in through or TRUE in made:
            return FALSE
        if through[1] in (TRUE, through[0]) and made == (FALSE, FALSE):
            return through[0]
        key = t, v
        if key not in self._lasting:
            self._lasting[key] = lasts = int(self._new(1)[0])
            self.clauses.add(np.array([[*negated(np.array(through)).tolist(), *made, lasts]]))
        return self._lasting[key]

    def refine(self, steps: Sequence[Step]) -> int:
        """Add the memory rows of steps that exceed the budget; how many steps have new rows."""
        live = trace(self.instance, steps).live_bytes
        over = np.flatnonzero(live > self.instance.budget_bytes)
        wanted: set[tuple[int, int]] = set()
        for i in over.tolist():
            stage, _, node = steps[i]
            near = np.flatnonzero(self.computed[:, node] + self.loaded[:, node])
            wanted.update((int(t), node) for t in near if t != node and abs(t - stage) <= _NEAR)
        return self.demand(wanted)

    def demand(self, made: set[tuple[int, int]]) -> int:
        """Add the memory rows of nodes that are made again in a stage; how many are new."""
        made = made - self.refined
        for t, j in sorted(made):
            self._row(t, j)
        self.refined |= made
        return len(made)

    def cells(self, values: NDArray[np.int8]) -> Cells:
        """The schedule of a solution: values int8[variables], the two constants first."""
        return Cells(values[self.held], values[self.computed], values[self.loaded])


#: A violated row is added for this many stages around, too.
_NEAR = 3


def _padded(nodes: Sequence[Sequence[int]], n: int) -> IntArray:
    """Lists of nodes as int64[n, longest], filled up with ``n``."""
    table = np.full((n, max(map(len, nodes), default=0)), n, np.int64)
    for v, listed in enumerate(nodes):
        table[v, : len(listed)] = listed
    return table
