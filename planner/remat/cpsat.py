"""Solves a stage model with CP-SAT."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from .clauses import FIRST, TRUE
from .instance import IntArray
from .stage_model import StageModel

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
    from_below: bool = False,
) -> Solved:
    """Minimize the cost of a stage model.

    Args:
        stages: The model.
        seconds: Wall clock limit.
        seed: Random seed.
        threads: Threads; they exchange results at fixed points, so that runs can be repeated.
        effort: Limit in CP-SAT's deterministic time; None: no such limit.
        least: A known lower bound.
        from_below: Branch on the objective's lower half first, which raises the bound, rather than
            look for solutions.
    """
    if stages.infeasible:
        return Solved("infeasible", stages.most + 1, None)
    if seconds <= 0:
        return Solved("unknown", least, None)
    model, variables = _model(stages, least)
    solver = cp_model.CpSolver()
    p = solver.parameters
    p.max_time_in_seconds = seconds
    if effort is not None:
        p.max_deterministic_time = effort
    p.random_seed = seed
    p.num_workers = threads
    p.interleave_search = threads > 1
    p.use_objective_lb_search = from_below
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


def _model(stages: StageModel, least: int) -> tuple[cp_model.CpModel, list[cp_model.IntVar]]:
    """The model and its variables; clauses go into the protocol buffer at once."""
    model = cp_model.CpModel()
    variables = [model.new_bool_var("") for _ in range(FIRST, stages.variables)]

    def weighted(codes: IntArray, weights: IntArray) -> cp_model.LinearExprT:
        terms = [variables[c] for c in (codes - FIRST).tolist()]
        return cp_model.LinearExpr.weighted_sum(terms, weights.tolist())

    constraints = model.proto.constraints
    for clauses in (stages.clauses, stages.dominance):
        codes, begin = clauses.flat()
        literals = np.where(codes > TRUE, codes - FIRST, codes + FIRST - 1).tolist()
        for a, b in pairwise(begin.tolist()):
            constraints.add().bool_or.literals.extend(literals[a:b])
    for exclusive in stages.exclusive:
        model.add_at_most_one([variables[c - FIRST] for c in exclusive])
    for row in stages.rows:
        codes, sizes, room = row.codes, row.sizes, row.room
        if row.when > TRUE:  # without it the row is slack
            codes, sizes = np.append(codes, row.when), np.append(sizes, sizes.sum() - room)
            room = int(sizes[:-1].sum())
        model.add(weighted(codes, sizes) <= room)
    cost = weighted(stages.priced, stages.prices)
    model.add_linear_constraint(
        cost, max(least - stages.constant, 0), stages.most - stages.constant
    )
    model.minimize(cost)
    return model, variables
