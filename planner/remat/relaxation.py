"""Bound of the whole problem: the linear relaxation of the stage model."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from ..linear import LinearProgram, SolverOptions
from .clauses import FIRST, TRUE
from .instance import BoolArray
from .stage_model import StageModel

#: Relative tolerance of the LP solver that a bound has to give up.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Relaxed:
    """What the linear relaxation proves.

    Attributes:
        bound: Every schedule costs at least this, up to ``most + 1``.
        with_cell: A schedule that computes a node in a stage costs at least this, float[n, n]; from
            the reduced costs.
    """

    bound: int
    with_cell: np.ndarray[tuple[int, ...], np.dtype[np.float64]]

    def offered(self, most: int) -> BoolArray:
        """Cells in which schedules that cost ``most`` or less may compute again."""
        return self.with_cell <= most


def relax(stages: StageModel, seconds: float) -> Relaxed | None:
    """Solve the relaxation; None: not within the time.

    Clauses that only break ties are left out: they don't raise the bound, they cost time. Memory
    rows are those of the first computations alone, so the bound holds for every schedule: also for
    those that make a node twice between two first computations, in any order.
    """
    if seconds <= 0:
        return None
    program = LinearProgram()
    for _ in range(FIRST, stages.variables):
        program.column(integer=False)
    codes, begin = stages.clauses.flat()
    length = np.diff(begin)
    negative = np.add.reduceat(codes < 0, begin[:-1], dtype=np.int64) if len(length) else length
    for count in (1 - negative).tolist():
        program.empty_rows(1, lower=count)
    clause = np.repeat(np.arange(len(length)), length)
    program.terms(clause, np.abs(codes) - FIRST, np.sign(codes))
    for row in stages.rows:
        if row.when != TRUE:
            continue
        scale = max(row.room, 1)
        at = program.empty_rows(1, upper=row.room / scale)
        program.terms(np.full(len(row.codes), at), row.codes - FIRST, row.sizes / scale)
    unit = int(stages.prices.max(initial=1))
    objective = zip((stages.priced - FIRST).tolist(), (stages.prices / unit).tolist(), strict=True)
    options = SolverOptions(solver="highs", time_limit_s=seconds)
    result = program.solve(objective, options, maximize=False)
    nothing = np.zeros(stages.computed.shape)
    if result.status == "infeasible":
        return Relaxed(stages.most + 1, nothing)
    if result.status != "optimal":
        return None
    slack = TOLERANCE * abs(result.bound)
    value = stages.constant + max(0.0, result.bound - slack) * unit
    if result.reduced_costs is None:  # of a program that presolve has solved
        return Relaxed(ceil(value), nothing)
    rise = np.append(np.zeros(FIRST), np.maximum(result.reduced_costs - slack, 0.0) * unit)
    return Relaxed(ceil(value), value + rise[stages.computed])
