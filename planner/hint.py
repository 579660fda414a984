"""Decisions as a solution that a solver can start from: values of the model's 0/1 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .footprint import holds
from .problem import ALWAYS
from .solution import Solution

if TYPE_CHECKING:
    from .milp import Milp


def hint(milp: Milp, solution: Solution) -> dict[int, float]:
    """Column -> value of activities, holds and page-ins; the solver completes the others.

    Raises:
        KeyError: The decisions read a tensor that they never make.
    """
    values = {
        milp.a[a.index]: float(a.index in solution.active)
        for a in milp.problem.activities
        if a.index != ALWAYS
    }
    for i, r in enumerate(milp.problem.retentions):
        found = holds(r, solution)
        values |= {c: float(h.held) for c, h in zip(milp.held[i], found, strict=True)}
        loads = {
            c: float((r.tensor.index, r.events[j].slot) in solution.loads)
            for j, c in milp.loaded[i].items()
        }
        stored = milp.stored[i]
        if stored is not None:
            values |= {**loads, stored: max(loads.values(), default=0.0)}
    return values
