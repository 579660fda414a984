"""Large programs whose LP bound is nearly tight: a few branchings, then a small core is left.

Which backward nodes are needed decides how deep training goes, and is what the LP bound is loose
about: it mixes depths. So these columns are branched on first, best bound first. In a leaf the
reduced costs of the LP tell what each decision costs at least that differs from the LP's: with
``z`` the LP bound of what is minimized and ``r_j`` the reduced cost of column ``j``, no solution
with another value of ``j`` is below ``z + |r_j|``. Columns with ``|r_j| > delta`` are fixed, and
what is left, the *core* (Balas and Zemel 1980, for the knapsack problem), goes to the solver. A
very small core gives a solution; then ``delta`` is what it takes to prove that solution within the
gap, and the solver is asked only for better ones. The minimum of its bound and ``z + delta`` is a
bound of the leaf. Where the LP turns out loose, the solver gets the whole program.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from .linear import INF, WITHIN, Effort, LinearProgram, LinearResult, SolverOptions, Status, Terms
from .progress import Watch

#: ``delta`` of the cores that first solutions come from, in gaps.
FIRST = (0.25, 1.0)
#: Relative gap of a leaf's LP from which on it counts as loose: cores don't help then.
LOOSE = 0.03
#: Distance from an integer that counts as none.
FRACTION = 1e-6


@dataclass(frozen=True)
class Part:
    """All solutions with these values of some columns.

    Attributes:
        fixed: Column -> value.
        bound: On what is minimized there.
    """

    fixed: Mapping[int, float]
    bound: float


@dataclass
class Tree:
    """Parts that a program was divided into; a tighter one begins with them.

    Attributes:
        parts: Together they hold all solutions.
    """

    parts: list[Part] = field(default_factory=lambda: [Part({}, -INF)])


def optimize(
    program: LinearProgram,
    objective: Terms,
    options: SolverOptions,
    *,
    maximize: bool,
    branch: Sequence[int] = (),
    watch: Watch | None = None,
    unit: float = 1.0,
    hint: Mapping[int, float] | None = None,
    tree: Tree | None = None,
) -> LinearResult:
    """Optimize by branching and cores.

    Args:
        program: What to solve.
        objective: Its objective.
        options: The gap and the time limit hold for the whole search.
        maximize: Direction.
        branch: 0/1 columns to branch on, ordered so that neighbours are alike.
        watch: Told solutions and bounds of the whole program; carries the wish to stop.
        unit: What 1 of the objective is for those who watch.
        hint: Column -> value, of all integer columns: a solution to start from.
        tree: Of a program with the same branched columns and objective of which each solution of
            this one is one, too; becomes that of this program.

    Raises:
        OdtPlanError: The solver failed.
    """
    sign = -1.0 if maximize else 1.0
    cost = [(c, sign * a) for c, a in objective]
    search = _Search(program, cost, options, branch, watch or Watch(), sign * unit)
    if hint is not None:
        search.begin_from(hint)
    result = search.run(tree or Tree())
    return replace(result, bound=sign * result.bound)


@dataclass
class _Search:
    """Minimizes ``cost``."""

    program: LinearProgram
    cost: list[tuple[int, float]]
    options: SolverOptions
    branch: Sequence[int]
    watch: Watch
    unit: float
    best: float = INF
    values: NDArray[np.float64] | None = None
    closed: list[Part] = field(default_factory=list)  # what needs no more work
    open: list[tuple[float, int, Part, LinearResult | None]] = field(default_factory=list)
    order: int = 0

    def __post_init__(self) -> None:
        self.begin = time.perf_counter()

    def begin_from(self, hint: Mapping[int, float]) -> None:
        """Take the solution that has these values, if it is one."""
        lower, upper = list(self.program.lower), list(self.program.upper)
        whole = all(c in hint for c, integer in enumerate(self.program.integer) if integer)
        if not whole or any(not lower[c] <= x <= upper[c] for c, x in hint.items()):
            return
        for column, x in hint.items():
            lower[column] = upper[column] = x
        integer = [False] * len(lower)
        self._take(self._solve(replace(self.program, lower=lower, upper=upper, integer=integer)))

    def run(self, tree: Tree) -> LinearResult:
        for part in tree.parts:
            self._open(part, None)
        proven = True
        while proven and self.open and not self._enough(self.open[0][0]):
            self._tell()
            _, _, part, relaxed = heapq.heappop(self.open)
            if relaxed is None:
                proven = self._relax(part)
                continue
            assert relaxed.values is not None
            x = relaxed.values
            fractional = [c for c in self.branch if FRACTION < x[c] < 1 - FRACTION]
            if fractional:  # by halves: mostly they are a range of one chain
                split = fractional[len(fractional) // 2]
                for value in (1.0, 0.0):
                    proven = self._relax(Part({**part.fixed, split: value}, part.bound)) and proven
                continue
            if self._loose(part.bound):
                self._first(part, relaxed)
            if self._loose(part.bound):
                self.closed.append(part)
                proven = self._whole(self._bound())
            else:
                proven = self._leaf(part, relaxed)
        tree.parts = [*self.closed, *(part for _, _, part, _ in self.open)]
        seconds = time.perf_counter() - self.begin
        bound = self._bound()
        if self.values is None:
            known = bound == INF
            return LinearResult("infeasible" if known else "unknown", bound, None, seconds)
        status: Status = "optimal" if self._enough(bound) else "feasible"
        return LinearResult(status, bound, self.values, seconds)

    def _whole(self, root: float) -> bool:
        """Leave all to the solver; the bound that is known holds in any case."""
        start = None if self.values is None else dict(enumerate(self.values.tolist()))
        result = self._solve(self.program, start, shown=True)
        self._take(result)
        bound = INF if result.status == "infeasible" else max(root, result.bound)
        self.open, self.closed = [], [Part({}, bound)]
        return result.status in ("optimal", "infeasible")

    def _bound(self) -> float:
        """On the cost of all solutions."""
        known = [*(p.bound for p in self.closed), *(o[0] for o in self.open)]
        return float(min([self.best, *known]))

    def _tell(self) -> None:
        best = None if self.values is None else self.unit * self.best
        self.watch.found(best, self.unit * self._bound())

    def _take(self, result: LinearResult) -> None:
        """Remember a solution if it is the best."""
        if result.values is not None:
            value = float(sum(a * result.values[c] for c, a in self.cost))
            if value < self.best:
                self.best, self.values = value, result.values

    def _enough(self, bound: float) -> bool:
        """A bound proves the best solution within the gap."""
        return bound >= self.best - self.options.gap * abs(self.best)

    def _loose(self, bound: float) -> bool:
        return self.values is None or bound < self.best - LOOSE * abs(self.best)

    def _solve(
        self,
        program: LinearProgram,
        start: Mapping[int, float] | None = None,
        *,
        shown: bool = False,
        effort: Effort | None = None,
    ) -> LinearResult:
        left = self.options.time_limit_s - (time.perf_counter() - self.begin)
        options = replace(self.options, solver="highs", time_limit_s=max(left, 0.1))
        watch = self.watch
        if not shown:  # what the solver tells is of a part only
            watch = watch.part(options.time_limit_s, lambda _: None)
        return program.solve(
            self.cost,
            options,
            maximize=False,
            watch=watch,
            unit=self.unit,
            hint=start,
            effort=effort,
        )

    def _open(self, part: Part, relaxed: LinearResult | None) -> None:
        self.order += 1
        heapq.heappush(self.open, (part.bound, self.order, part, relaxed))

    def _within(self, part: Part) -> LinearProgram:
        lower, upper = list(self.program.lower), list(self.program.upper)
        for column, value in part.fixed.items():
            lower[column] = upper[column] = value
        return replace(self.program, lower=lower, upper=upper)

    def _relax(self, part: Part) -> bool:
        """Bound a part by its LP and keep it for later.

        False: the time is over, and the bound that it has is all that is known.
        """
        program = replace(self._within(part), integer=[False] * len(self.program.integer))
        relaxed = self._solve(program)
        if relaxed.status == "optimal":
            self._open(replace(part, bound=max(part.bound, relaxed.bound)), relaxed)
        elif relaxed.status != "infeasible":
            self.closed.append(part)
            return False
        return True

    def _first(self, part: Part, relaxed: LinearResult) -> None:
        """Look for solutions near the LP's, and if there are none as far away as cores reach."""
        gap, program = self.options.gap or 1e-3, self._within(part)
        for delta in (*(gap * gaps for gaps in FIRST), LOOSE):
            if delta < LOOSE or self._loose(part.bound):
                core = _core(program, relaxed, delta * abs(relaxed.bound))
                self._take(self._solve(core, effort=Effort(below=self.best, root_only=True)))

    def _leaf(self, part: Part, relaxed: LinearResult) -> bool:
        """Prove that a part has nothing better by more than the gap, or find it.

        False: the time is over.
        """
        below = self.best - WITHIN * self.options.gap * abs(self.best)
        delta = max(0.0, below - relaxed.bound)
        core = _core(self._within(part), relaxed, delta)
        result = self._solve(core, effort=Effort(below=below))
        self._take(result)
        within = below if result.status == "infeasible" else min(result.bound, below)
        bound = max(part.bound, min(within, relaxed.bound + delta))
        self.closed.append(replace(part, bound=bound))
        return result.status in ("optimal", "infeasible")


def _core(program: LinearProgram, relaxed: LinearResult, delta: float) -> LinearProgram:
    """The program without the columns whose change costs more than ``delta``."""
    assert relaxed.reduced_costs is not None
    assert relaxed.values is not None
    at = np.round(relaxed.values)
    fixed = np.asarray(program.integer) & (np.abs(relaxed.reduced_costs) > delta)
    lower, upper = np.array(program.lower), np.array(program.upper)
    lower[fixed] = upper[fixed] = at[fixed]
    return replace(program, lower=lower.tolist(), upper=upper.tolist())
