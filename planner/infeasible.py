"""Why no plan exists: which limit binds, by how much, and the smallest budget that works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil, floor, log10

from ..ir.errors import InfeasibleError, LimitName, Shortfall
from .linear import SolverOptions
from .milp import Milp
from .plan import ObjectiveName
from .problem import ALWAYS, Limits, Problem
from .sizes import format_bytes

#: Objective that is a need -> the limit on it.
_FIELDS: dict[LimitName, str] = {
    "flash": "flash_bytes",
    "ram": "ram_bytes",
    "latency": "cycles",
    "energy": "energy_j",
}
#: Larger than any budget; small enough for exact arithmetic in doubles.
NO_LIMIT = 2**50


def explain(
    problem: Problem, options: SolverOptions, smallest_ram: Callable[[int], int | None]
) -> InfeasibleError:
    """The error for a problem that the solver has proven infeasible.

    Each limit is relaxed alone and the need for it is minimized under the others; those for which
    that helps bind alone. If none does, each need is minimized under those that were told before,
    so that the values work together.

    Args:
        problem: The infeasible problem.
        options: How to solve; the needs are minimized without a gap.
        smallest_ram: Live bytes that suffice -> RAM with which a plan, layout included, was found;
            None: none was found.
    """
    options = replace(options, gap=0.0)
    limits = problem.limits
    lines: list[str] = []
    found: list[Shortfall] = []
    relaxed: dict[LimitName, Limits] = {
        "flash": replace(limits, flash_bytes=NO_LIMIT),
        "ram": replace(limits, ram_bytes=NO_LIMIT),
        "latency": replace(limits, cycles=None),
        "energy": replace(limits, energy_j=None),
    }
    for name, free in relaxed.items():
        if free != limits and (need := _need(problem, free, name, options)) is not None:
            short = _shortfall(problem, name, need[0])
            if name == "ram":
                short = replace(short, works=smallest_ram(int(short.needs)))
            found.append(short)
            lines.append(_line(problem, short, need[1]))
    if not lines:
        free = Limits(NO_LIMIT, NO_LIMIT, None, None, limits.storage_bytes)
        for name in relaxed:
            need = _need(problem, free, name, options)
            has = getattr(limits, _FIELDS[name])
            if need is None or has is None:
                continue
            if need[0] > has:
                found.append(_shortfall(problem, name, need[0]))
                lines.append(_line(problem, found[-1], need[1]))
            # a billionth more: the solver's own figure must not be out of its reach
            free = replace(free, **{_FIELDS[name]: max(has, need[0] * (1 + 1e-9))})
        if lines:
            lines.insert(0, "several limits bind, these values work together")
    if not lines:
        lines.append("the limits contradict each other and no single one explains it")
    return InfeasibleError("no plan fits: " + "; ".join(lines), found)


def _need(
    problem: Problem, limits: Limits, name: ObjectiveName, options: SolverOptions
) -> tuple[float, str] | None:
    """Smallest need under these limits and the slot where it arises."""
    result = Milp(replace(problem, limits=limits)).solve(name, options)
    if result.solution is None:
        return None
    return result.value, f" at {result.peak_node}"


def _shortfall(problem: Problem, name: LimitName, need: float) -> Shortfall:
    """The shortfall of a limit, in its unit; needs of RAM are live bytes."""
    limits = problem.limits
    if name == "latency":
        s = problem.cost.latency_s(round(need))
        return Shortfall(
            name, problem.cost.latency_s(limits.cycles or 0), s, float(_rounded_up(s))
        )
    if name == "energy":
        return Shortfall(name, limits.energy_j or 0.0, need, float(_rounded_up(need)))
    has = limits.ram_bytes if name == "ram" else limits.flash_bytes
    return Shortfall(name, has, round(need), round(need))


def _line(problem: Problem, short: Shortfall, where: str) -> str:
    """What binds, where, by how much, and the smallest value that works."""
    has, needs = short.has, short.needs
    if short.limit == "flash":
        least = sum(c.bytes for c in problem.constants if ALWAYS in c.readers)
        weights = format_bytes(least)
        text = f"weights need {weights} or more, with code (estimated) "
        return f"flash: {text}" + _bytes_line(int(needs), int(has), "", "--flash")
    if short.limit == "ram":
        if short.works == needs:
            return "RAM: needs " + _bytes_line(int(needs), int(has), where, "--ram")
        way = "no layout was found for it"
        if short.works is not None:
            way = f"a --ram that works is {int(short.works)}"
        return (
            f"RAM: needs {format_bytes(int(needs))}{where} and more for the layout, has"
            f" {format_bytes(int(has))}; {way}"
        )
    unit = "s" if short.limit == "latency" else "J"
    return (
        f"{short.limit}: needs {needs:.6g} {unit}, has {has:.6g} {unit}; the smallest"
        f" --{short.limit} that works is {short.works:.6g}{unit}"
    )


def _rounded_up(x: float) -> str:
    """Six digits that are not below ``x``: typed in again, they must work."""
    unit = 10.0 ** (floor(log10(x)) - 5)
    return f"{ceil(x / unit) * unit:.6g}"


def _bytes_line(need: int, has: int, where: str, option: str) -> str:
    return (
        f"{format_bytes(need)}{where}, has {format_bytes(has)}, {need - has:,} B too few;"
        f" the smallest {option} that works is {need}"
    )
