"""Large programs whose LP bound is nearly tight: a few branchings, then a small core is left.

Which backward nodes are needed decides how deep training goes, and is what the LP bound is loose
about: it mixes depths. So these columns are branched on first, best bound first. In a leaf the
reduced costs of the LP tell what each decision costs at least that differs from the LP's: with
``z`` the LP bound and ``r_j`` the reduced cost of column ``j``, no solution with another value of
``j`` is better than ``z - |r_j|``. Columns with ``|r_j| > delta`` are fixed, and what is left, the
*core* (Balas and Zemel 1980, for the knapsack problem), goes to the solver. The maximum of its
bound and ``z - delta`` is a bound of the whole problem, so nothing is lost but time where ``delta``
turns out too small and the core is solved again. Where the LP turns out loose, the solver gets the
whole program.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from .linear import LinearProgram, LinearResult, SolverOptions, Status, Terms
from .progress import Watch

#: First ``delta``, in gaps.
GAPS = 2.0
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
        watch: Told what is found; carries the wish to stop.
        unit: What 1 of the objective is for those who watch.
        hint: Column -> value of a solution to start from.

    Raises:
        OdtPlanError: The solver failed.
    """
    found = watch or Watch()
    return _Search(program, list(objective), options, maximize, branch, found, unit, hint).run()


@dataclass
class _Search:
    program: LinearProgram
    objective: list[tuple[int, float]]
    options: SolverOptions
    maximize: bool
    branch: Sequence[int]
    watch: Watch
    unit: float
    hint: Mapping[int, float] | None
    best: float = -np.inf  # scores are maximized: objectives, negated where those are minimized
    values: NDArray[np.float64] | None = None
    closed: float = -np.inf
    open: list[tuple[float, int, LinearProgram, LinearResult]] = field(default_factory=list)
    order: int = 0

    def run(self) -> LinearResult:
        self.begin = time.perf_counter()
        proven = self._branch(self.program, np.inf)
        root = -self.open[0][0] if self.open else np.inf
        while proven and self.open and not self._enough(-self.open[0][0]):
            self._tell()
            negative, _, program, relaxed = heapq.heappop(self.open)
            assert relaxed.values is not None
            x = relaxed.values
            fractional = [c for c in self.branch if FRACTION < x[c] < 1 - FRACTION]
            if fractional:  # by halves: mostly they are a range of one chain
                split = fractional[len(fractional) // 2]
                for name in ("lower", "upper"):
                    bounds = list(getattr(program, name))
                    bounds[split] = float(name == "lower")
                    part = replace(program, **{name: bounds})
                    proven = self._branch(part, -negative) and proven
                continue
            proven = self._leaf(program, relaxed)
            loose = self.values is None or -negative > self.best + LOOSE * abs(self.best)
            if proven and loose:
                self.open, self.closed = [], -np.inf
                proven = self._whole(root)
        seconds = time.perf_counter() - self.begin
        score = self._score()
        bound = self._sign(score)
        if self.values is None:
            known = score == -np.inf
            return LinearResult("infeasible" if known else "unknown", bound, None, seconds)
        status: Status = "optimal" if self._enough(score) else "feasible"
        return LinearResult(status, bound, self.values, seconds)

    def _whole(self, root: float) -> bool:
        """Leave all to the solver; the LP's bound holds in any case."""
        result = self._solve(self.program)
        self._take(result)
        if result.status != "infeasible":
            self.closed = min(root, self._sign(result.bound))
        return result.status in ("optimal", "infeasible")

    def _take(self, result: LinearResult) -> None:
        """Remember a solution if it is the best."""
        if result.values is not None:
            value = self._sign(sum(a * result.values[c] for c, a in self.objective))
            if value > self.best:
                self.best, self.values = value, result.values

    def _sign(self, x: float) -> float:
        return float(x if self.maximize else -x)

    def _enough(self, score: float) -> bool:
        """A bound proves the best solution within the gap."""
        return score <= self.best + self.options.gap * abs(self.best)

    def _solve(self, program: LinearProgram) -> LinearResult:
        left = self.options.time_limit_s - (time.perf_counter() - self.begin)
        options = replace(self.options, solver="highs", time_limit_s=max(left, 0.1))
        hint = self.hint if any(program.integer) else None
        return program.solve(
            self.objective, options, maximize=self.maximize, watch=self.watch.quiet(), hint=hint
        )

    def _tell(self) -> None:
        best = None if self.values is None else self.unit * self._sign(self.best)
        self.watch.found(best, self.unit * self._sign(self._score()))

    def _score(self) -> float:
        """What is proven so far."""
        return max([self.closed, self.best, *(-o[0] for o in self.open)])

    def _branch(self, program: LinearProgram, above: float) -> bool:
        """Bound a part of the problem and keep it for later.

        False: the time is over, and the bound ``above`` of the part around it is all that is known.
        """
        relaxed = self._solve(replace(program, integer=[False] * len(program.integer)))
        if relaxed.status == "optimal":
            self.order += 1
            score = self._sign(relaxed.bound)
            heapq.heappush(self.open, (-score, self.order, program, relaxed))
        elif relaxed.status != "infeasible":
            self.closed = max(self.closed, above)
            return False
        return True

    def _leaf(self, program: LinearProgram, relaxed: LinearResult) -> bool:
        """Solve cores of a part until its bound is as good as its best solution needs it.

        False: the time is over. A first core without a solution proves nothing.
        """
        assert relaxed.reduced_costs is not None
        assert relaxed.values is not None
        score, cost = self._sign(relaxed.bound), np.abs(relaxed.reduced_costs)
        integer, at = np.asarray(program.integer), np.round(relaxed.values)
        delta = GAPS * (self.options.gap or 1e-3) * abs(score)
        if self.values is not None:
            delta = self._needed(score)
        while True:
            fixed = integer & (cost > delta)
            lower, upper = np.array(program.lower), np.array(program.upper)
            lower[fixed] = upper[fixed] = at[fixed]
            result = self._solve(replace(program, lower=lower.tolist(), upper=upper.tolist()))
            self._take(result)
            within = -np.inf if result.status == "infeasible" else self._sign(result.bound)
            bound = min(score, max(within, score - delta if fixed.any() else -np.inf))
            over = result.status not in ("optimal", "infeasible")
            if over or self.values is None or not fixed.any() or self._needed(score) <= delta:
                self.closed = max(self.closed, bound)
                return not over
            delta = self._needed(score)

    def _needed(self, score: float) -> float:
        """A delta with which the best solution can be proven to be within the gap."""
        return max(0.0, score - self.best - 0.999 * self.options.gap * abs(self.best))
