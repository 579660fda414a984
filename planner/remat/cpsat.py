"""Solves a stage model with CP-SAT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from .stage_model import FIRST, StageModel

Status = Literal["optimal", "feasible", "infeasible", "unknown"]
_STATUS: dict[cp_model.CpSolverStatus, Status] = {
    cp_model.OPTIMAL: "optimal",
    cp_model.FEASIBLE: "feasible",
    cp_model.INFEASIBLE: "infeasible",
}


@dataclass(frozen=True)
class Solved:
    """Outcome of one solve.

    Attributes:
        status: ``infeasible``: no schedule of the model costs ``most`` or less.
        bound: Every schedule of the model costs at least this, up to ``most + 1``.
        values: int8[variables] of the solution, the constants 0 and 1 first; None: none was found.
    """

    status: Status
    bound: int
    values: NDArray[np.int8] | None


def solve(
    stages: StageModel,
    *,
    seconds: float,
    seed: int,
    threads: int,
    effort: float | None = None,
    least: int = 0,
) -> Solved:
    """Minimize the cost of a stage model.

    Args:
        stages: The model.
        seconds: Wall clock limit.
        seed: Random seed.
        threads: Threads; they exchange results at fixed points, so that runs can be repeated.
        effort: Limit in CP-SAT's deterministic time; None: no such limit.
        least: A known lower bound.
    """
    if stages.infeasible:
        return Solved("infeasible", stages.most + 1, None)
    if seconds <= 0:
        return Solved("unknown", least, None)
    model = cp_model.CpModel()
    variables = [model.new_bool_var("") for _ in range(FIRST, stages.variables)]

    def literal(code: int) -> cp_model.LiteralT:
        return variables[code - FIRST] if code > 0 else ~variables[-code - FIRST]

    for clause in (*stages.clauses, *stages.dominance):
        model.add_bool_or([literal(c) for c in clause])
    for codes in stages.exclusive:
        model.add_at_most_one([literal(c) for c in codes])
    for row in stages.rows:
        terms = [literal(c) for c in row.codes.tolist()]
        sizes, room = row.sizes.tolist(), row.room
        if row.when > 1:  # without it the row is slack
            terms.append(literal(row.when))
            sizes.append(sum(sizes) - room)
            room += sizes[-1]
        model.add(cp_model.LinearExpr.weighted_sum(terms, sizes) <= room)
    cost = cp_model.LinearExpr.weighted_sum(
        [literal(c) for c in stages.objective], list(stages.objective.values())
    )
    most = stages.most - stages.constant
    if most < 0:
        return Solved("infeasible", stages.most + 1, None)
    model.add_linear_constraint(cost, max(least - stages.constant, 0), most)
    model.minimize(cost)
    solver = cp_model.CpSolver()
    p = solver.parameters
    p.max_time_in_seconds = seconds
    if effort is not None:
        p.max_deterministic_time = effort
    p.random_seed = seed
    p.num_workers = threads
    p.interleave_search = threads > 1
    p.linearization_level = 2  # the LP of the clauses is what gives bounds
    status = _STATUS.get(solver.solve(model), "unknown")
    if status == "infeasible":
        return Solved(status, stages.most + 1, None)
    bound = max(least, stages.constant + round(solver.best_objective_bound))
    if status == "unknown":
        return Solved(status, bound, None)
    values = np.ones(stages.variables, np.int8)
    values[0] = 0
    values[FIRST:] = [solver.boolean_value(v) for v in variables]
    return Solved(status, bound, values)
