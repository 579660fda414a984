"""Memory rows that are added where a solution breaks them, as few of them bind.

A program of updates has a row of a hundred terms for every slot of the timeline, and most of the
time goes into these rows. Without some of them the optimum is still a bound; once a solution keeps
those that were left out, too, it is the optimum of all of them. The LP tells most of those that
matter, at a fraction of what a solve with integers takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from .linear import LinearProgram, LinearResult, SolverOptions, Terms
from .occupancy import Occupancy
from .progress import Watch

#: Rows that are added at once.
AT_ONCE = 40
#: Bytes by which a row is broken; half of what whole numbers can differ by.
BROKEN = 0.5


@dataclass
class MemoryRows:
    """``live bytes <= 0`` at some slots, the peak being counted as less than none.

    Attributes:
        occupancy: Bytes by slot and column.
        slots: Those that have a row.
        added: Those whose rows are part of the program; programs of the same timeline can share
            them.
    """

    occupancy: Occupancy
    slots: NDArray[np.int64]
    added: set[int] = field(default_factory=set)

    def optimize(
        self,
        program: LinearProgram,
        objective: Terms,
        options: SolverOptions,
        search: Callable[[LinearProgram, SolverOptions], LinearResult],
        *,
        maximize: bool,
        watch: Watch | None,
    ) -> LinearResult:
        """Optimize the program with all of the rows.

        Args:
            program: All but these rows.
            objective: What to optimize.
            options: The time limit is that of the whole search.
            search: Solves with integers.
            maximize: Sense of the objective.
            watch: Carries the wish to stop.

        Raises:
            OdtPlanError: The solver failed.
        """
        begin = time.perf_counter()

        def left() -> float:
            return options.time_limit_s - (time.perf_counter() - begin)

        objective = list(objective)
        relaxed, highs = True, replace(options, solver="highs")
        while True:
            rows = self._with_rows(program)
            limit = max(left(), 0.01)
            if relaxed:
                rows = replace(rows, integer=[False] * len(rows.integer))
                quiet = None if watch is None else watch.part(limit, lambda _: None)
                limited = replace(highs, time_limit_s=limit)
                result = rows.solve(objective, limited, maximize=maximize, watch=quiet)
            else:
                result = search(rows, replace(options, time_limit_s=limit))
            seconds = time.perf_counter() - begin
            if result.values is None:
                return replace(result, time_s=seconds)
            broken = self._broken(result.values)
            if relaxed and not broken:
                relaxed = False
            elif not broken:
                return replace(result, time_s=seconds)
            elif left() <= 0:
                return replace(result, status="unknown", values=None, time_s=seconds)
            self.added.update(broken)

    def _with_rows(self, program: LinearProgram) -> LinearProgram:
        at = self.slots[self._is_added()]
        result = replace(
            program,
            row_lower=list(program.row_lower),
            row_upper=list(program.row_upper),
            rows=list(program.rows),
            columns=list(program.columns),
            coefficients=list(program.coefficients),
        )
        rows, columns, sizes = self.occupancy.held(at)
        result.terms(result.empty_rows(len(at), upper=0.0) + rows, columns, sizes)
        return result

    def _broken(self, values: NDArray[np.float64]) -> list[int]:
        """The worst of those that are left out, of neighbours the worst only."""
        over = self.occupancy.live(values)[self.slots]
        over[self._is_added()] = 0.0
        beside = np.pad(over, 1, constant_values=-np.inf)
        worst = (over > BROKEN) & (over >= beside[:-2]) & (over >= beside[2:])
        found = np.flatnonzero(worst)
        order = np.argsort(-over[found], kind="stable")[:AT_ONCE]
        return [int(k) for k in self.slots[found[order]]]

    def _is_added(self) -> NDArray[np.bool_]:
        return np.isin(self.slots, list(self.added))
