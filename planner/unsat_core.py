"""Which rows of a program without a solution suffice for that, by assumptions of CP-SAT."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from itertools import groupby
from typing import TypeVar

import numpy as np

from .linear import LinearProgram, SolverOptions

Key = TypeVar("Key", bound=Hashable)


def unsat_core(
    program: LinearProgram, optional: Mapping[int, Key], options: SolverOptions
) -> Collection[Key] | None:
    """Few groups of optional rows with which there is no solution; None: no such proof was found.

    The groups are enough, together with all rows that are not optional, but not always the fewest.

    Args:
        program: All data are whole numbers, and so is some solution if there is any: columns that
            are not integers are taken as such.
        optional: Row -> group.
        options: How to solve; of the solvers it is CP-SAT.
    """
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    columns = [
        model.new_int_var(round(low), round(high), "")
        for low, high in zip(program.lower, program.upper, strict=True)
    ]
    groups = dict.fromkeys(optional.values())
    holds = {g: model.new_bool_var("") for g in groups}
    order = np.argsort(program.rows, kind="stable").tolist()
    for row, at in groupby(order, key=program.rows.__getitem__):
        terms = [(columns[program.columns[k]], round(program.coefficients[k])) for k in at]
        low, high = program.row_lower[row], program.row_upper[row]
        total = cp_model.LinearExpr.weighted_sum([c for c, _ in terms], [a for _, a in terms])
        domain = cp_model.Domain(
            cp_model.INT_MIN if low == -np.inf else round(low),
            cp_model.INT_MAX if high == np.inf else round(high),
        )
        constraint = model.add_linear_expression_in_domain(total, domain)
        if row in optional:
            constraint.only_enforce_if(holds[optional[row]])
    model.add_assumptions(list(holds.values()))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1  # others don't tell which assumptions they needed
    solver.parameters.random_seed = options.seed
    solver.parameters.max_time_in_seconds = options.time_limit_s
    if solver.solve(model) != cp_model.INFEASIBLE:
        return None
    needed = set(solver.sufficient_assumptions_for_infeasibility())
    return [g for g, b in holds.items() if b.index in needed]
