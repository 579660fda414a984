"""Bound of the whole problem: the linear relaxation of the stage model."""

from __future__ import annotations

from math import ceil

from ..linear import LinearProgram, SolverOptions
from .stage_model import FIRST, StageModel

#: Relative tolerance of the LP solver that a bound has to give up.
TOLERANCE = 1e-6


def lp_bound(stages: StageModel, seconds: float) -> int | None:
    """A proven lower bound on the cost of the model's schedules; None: not within the time.

    Clauses that only break ties are left out: they don't raise the bound, they cost time. Memory
    rows are those of the first computations alone unless the model was refined, so the bound also
    holds for schedules that repeat a node twice between two first computations, in any order.
    """
    if seconds <= 0:
        return None
    program = LinearProgram()
    for _ in range(FIRST, stages.variables):
        program.column(integer=False)
    for clause in stages.clauses:
        negated = sum(c < 0 for c in clause)
        terms = [(abs(c) - FIRST, 1.0 if c > 0 else -1.0) for c in clause]
        program.row(terms, lower=1.0 - negated)
    for row in stages.rows:
        scale = max(row.room, 1)
        if row.when > 1:
            continue
        shares = (row.sizes / scale).tolist()
        program.row(zip((row.codes - FIRST).tolist(), shares, strict=True), upper=row.room / scale)
    unit = max(stages.objective.values(), default=1)
    objective = [(c - FIRST, price / unit) for c, price in stages.objective.items()]
    options = SolverOptions(solver="highs", time_limit_s=seconds)
    result = program.solve(objective, options, maximize=False)
    if result.status == "infeasible":
        return stages.most + 1
    if result.status != "optimal":
        return None
    return stages.constant + max(0, ceil(result.bound * (1 - TOLERANCE) * unit))
