"""The smallest RAM at which a decision is as good the other way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .conflict import NO_LIMIT
from .demands import Demand, impose
from .linear import LARGE, SolverOptions
from .milp import Milp
from .plan import ObjectiveName
from .problem import Problem

#: Optima are sums of integers; solvers work in floating point.
_HALF = 0.5
#: Optima that are tried one after the other.
_ROUNDS = 12


@dataclass(frozen=True)
class Flip:
    """What the search found.

    Attributes:
        searched: It came to an end; else it would have taken long.
        ram_bytes: Smallest RAM, live bytes, at which a plan that decides the other way is as good
            as any; None: there is none, whatever the RAM.
    """

    searched: bool
    ram_bytes: int | None = None


def flip_of(
    problem: Problem, other: Iterable[Demand], name: ObjectiveName, options: SolverOptions
) -> Flip:
    """Search the smallest RAM from the budget on.

    With ``s`` the optimum at RAM ``R``, the other way needs at least ``R'``, the least RAM at which
    it reaches ``s``: below ``R'`` any plan of the other way is worse than one that is known. If
    the optimum at ``R'`` is still ``s``, ``R'`` is the answer; else go on from there.

    Args:
        problem: The problem whose optimum the plan is.
        other: The decision, the other way.
        name: ``learn`` or ``latency``.
        options: How to solve; a solve that reaches the time limit ends the search.
    """
    options = replace(options, gap=0.0)
    forced = impose(problem, other)
    wide = replace(forced, limits=problem.limits.in_one_region(NO_LIMIT))
    ram = problem.limits.ram_bytes
    if len(Milp(problem).c.lower) > LARGE:
        return Flip(searched=False)
    reached = None
    for _ in range(_ROUNDS):
        tight = replace(problem, limits=problem.limits.in_one_region(ram))
        best = Milp(tight).solve(name, options)
        if best.status != "optimal":
            return Flip(searched=False)
        if reached is not None and abs(best.value - reached) < _HALF:
            return Flip(searched=True, ram_bytes=ram)
        reached = best.value
        m = Milp(wide)
        if name == "learn":
            m.c.row(m.objective(name), lower=reached - _HALF)
        else:
            m.c.row(m.objective(name), upper=reached + _HALF)
        least = m.solve("ram", options)
        if least.status == "infeasible":
            return Flip(searched=True)
        if least.status != "optimal":
            return Flip(searched=False)
        if round(least.value) <= ram:
            return Flip(searched=True, ram_bytes=ram)
        ram = round(least.value)
    return Flip(searched=False)
