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

from .linear import INF, Effort, LinearProgram, LinearResult, SolverOptions, Status, Terms
from .progress import Watch

#: ``delta`` of the cores that first solutions come from, in gaps.
FIRST = (0.25, 1.0)
#: Relative gap of a leaf's LP from which on it counts as loose: cores don't help then.
LOOSE = 0.03
#: Distance from an integer that counts as none.
FRACTION = 1e-6


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

    Raises:
        OdtPlanError: The solver failed.
    """
    sign = -1.0 if maximize else 1.0
    cost = [(c, sign * a) for c, a in objective]
    search = _Search(program, cost, options, branch, watch or Watch(), sign * unit)
    if hint is not None:
        search.begin_from(hint)
    result = search.run()
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
    closed: float = INF  # bound on what needs no more work
    open: list[tuple[float, int, LinearProgram, LinearResult]] = field(default_factory=list)
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

    def run(self) -> LinearResult:
        proven = self._branch(self.program, -INF)
        root = self.open[0][0] if self.open else -INF
        while proven and self.open and not self._enough(self.open[0][0]):
            self._tell()
            least, _, program, relaxed = heapq.heappop(self.open)
            assert relaxed.values is not None
            x = relaxed.values
            fractional = [c for c in self.branch if FRACTION < x[c] < 1 - FRACTION]
            if fractional:  # by halves: mostly they are a range of one chain
                split = fractional[len(fractional) // 2]
                for name in ("lower", "upper"):
                    bounds = list(getattr(program, name))
                    bounds[split] = float(name == "lower")
                    part = replace(program, **{name: bounds})
                    proven = self._branch(part, least) and proven
                continue
            if self._loose(least):
                self._first(program, relaxed)
            if self._loose(least):
                self.open, self.closed = [], INF
                proven = self._whole(root)
            else:
                proven = self._leaf(program, relaxed)
        seconds = time.perf_counter() - self.begin
        bound = self._bound()
        if self.values is None:
            known = bound == INF
            return LinearResult("infeasible" if known else "unknown", bound, None, seconds)
        status: Status = "optimal" if self._enough(bound) else "feasible"
        return LinearResult(status, bound, self.values, seconds)

    def _whole(self, root: float) -> bool:
        """Leave all to the solver; the LP's bound holds in any case."""
        start = None if self.values is None else dict(enumerate(self.values.tolist()))
        result = self._solve(self.program, start, shown=True)
        self._take(result)
        if result.status != "infeasible":
            self.closed = max(root, result.bound)
        return result.status in ("optimal", "infeasible")

    def _bound(self) -> float:
        """On the cost of all solutions."""
        return float(min([self.closed, self.best, *(o[0] for o in self.open)]))

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

    def _branch(self, program: LinearProgram, above: float) -> bool:
        """Bound a part of the problem and keep it for later.

        False: the time is over, and the bound ``above`` of the part around it is all that is known.
        """
        relaxed = self._solve(replace(program, integer=[False] * len(program.integer)))
        if relaxed.status == "optimal":
            self.order += 1
            heapq.heappush(self.open, (relaxed.bound, self.order, program, relaxed))
        elif relaxed.status != "infeasible":
            self.closed = min(self.closed, above)
            return False
        return True

    def _first(self, program: LinearProgram, relaxed: LinearResult) -> None:
        """Look for solutions near the LP's, and if there are none as far away as cores reach."""
        gap = self.options.gap or 1e-3
        for delta in (*(gap * gaps for gaps in FIRST), LOOSE):
            if delta < LOOSE or self._loose(relaxed.bound):
                core = _core(program, relaxed, delta * abs(relaxed.bound))
                self._take(self._solve(core, effort=Effort(below=self.best, root_only=True)))

    def _leaf(self, program: LinearProgram, relaxed: LinearResult) -> bool:
        """Prove that a part has nothing better by more than the gap, or find it.

        False: the time is over.
        """
        below = self.best - self.options.gap * abs(self.best)
        delta = max(0.0, below - relaxed.bound)
        core = _core(program, relaxed, delta)
        result = self._solve(core, effort=Effort(below=below))
        self._take(result)
        within = below if result.status == "infeasible" else min(result.bound, below)
        self.closed = min(self.closed, max(relaxed.bound, min(within, relaxed.bound + delta)))
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
