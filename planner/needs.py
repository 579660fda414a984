"""The smallest value of each limit that works, with a plan that keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from math import ceil, isfinite
from typing import TYPE_CHECKING

from ..ir.errors import InfeasibleError, LimitName, Shortfall
from .conflict import NO_LIMIT, Conflict, ConflictSearch
from .decided import LAYOUT_TRIES, LayoutError
from .problem import Limits, Problem

if TYPE_CHECKING:
    from .pipeline import PlannedModel, Request

#: In the order in which values that only work together are found.
LIMITS: tuple[LimitName, ...] = ("flash", "ram", "latency", "energy")
#: Digits of a time or energy that is to be typed in.
_DIGITS = 6


def with_limit(request: Request, name: LimitName, value: float) -> Request:
    """The request with another limit, in bytes, seconds or joules."""
    if name == "ram":
        return replace(request, ram_bytes=int(value))
    if name == "flash":
        return replace(request, flash_bytes=int(value))
    if name == "latency":
        return replace(request, latency_s=value)
    return replace(request, energy_j=value)


def planned(
    search: ConflictSearch, request: Request, limit: LimitName | None
) -> PlannedModel | None:
    """A plan of a request; RAM, if it is the limit in question, grows until a layout is found."""
    request = replace(
        request,
        time_limit_s=search.options.time_limit_s,
        with_baselines=False,
        with_relaxations=False,
    )
    for _ in range(LAYOUT_TRIES):
        try:
            return search.planning(request).run()
        except LayoutError as e:
            if limit != "ram" or request.ram_bytes is None:
                return None
            request = replace(request, ram_bytes=request.ram_bytes + e.excess.ram_bytes)
        except InfeasibleError:
            return None
    return None


class Needs:
    """Finds the smallest values and plans with them.

    Attributes:
        plans: Limit -> the plan with its smallest value.
    """

    def __init__(self, search: ConflictSearch) -> None:
        """Begin without any."""
        self._search = search
        self.plans: dict[LimitName, PlannedModel] = {}

    def alone(self, conflict: Conflict) -> Iterator[Shortfall]:
        """Limits of a conflict that need not be raised together with another one."""
        search = self._search
        has = search.planning(search.request).limits
        for name in LIMITS:
            for m in conflict.members:
                if m.kind == name:
                    (problem,) = search.problems(frozenset((m,)))
                    short = self._shortfall(problem, name, has, search.request)
                    if short is not None:
                        yield short

    def jointly(self) -> Iterator[Shortfall]:
        """One value after the other, each under those that were found before."""
        search = self._search
        given = search.request
        (problem,) = search.problems()
        has = problem.limits
        request = replace(
            given, ram_bytes=NO_LIMIT, flash_bytes=NO_LIMIT, latency_s=None, energy_j=None
        )
        for name in LIMITS:
            if name in ("latency", "energy") and getattr(given, _TIMES[name]) is None:
                continue
            free = replace(problem, limits=search.planning(request).limits)
            short = self._shortfall(free, name, has, request)
            if short is not None:
                yield short
                value = short.needs if short.works is None else short.works
                request = with_limit(request, name, value)
            elif name == "ram":
                request = replace(request, ram_bytes=given.ram_bytes)
            elif name == "flash":
                request = replace(request, flash_bytes=given.flash_bytes)
            else:
                request = with_limit(request, name, getattr(given, _TIMES[name]))

    def _shortfall(
        self, problem: Problem, name: LimitName, has: Limits, request: Request
    ) -> Shortfall | None:
        """What a limit lacks, with a value that a plan has been made with."""
        result = self._search.least(problem, name)
        if result.status == "infeasible":
            return None
        if result.solution is None:  # the bound is all that is known
            if name == "energy" or not result.bound > 0 or not isfinite(result.bound):
                return None
            short = _measured(problem, name, has, result.bound, result.bound)
            return replace(short, works=None) if short.needs > short.has else None
        least = result.value if result.status == "optimal" else result.bound
        short = _measured(problem, name, has, least, result.value)
        if short.works is None or short.works <= short.has:
            return None
        made = planned(self._search, with_limit(request, name, short.works), name)
        if made is None and problem.cost.overlaps and name in _TIMES:
            # Schedules hide less of transfers than the model: a value that needs none hidden.
            waits = replace(problem.limits, wait_for_transfers=True)
            full = self._search.least(replace(problem, limits=waits), name)
            if full.solution is not None:
                works = _measured(problem, name, has, least, full.value).works
                short = replace(short, works=works)
                assert works is not None
                made = planned(self._search, with_limit(request, name, works), name)
        if made is None:
            return replace(short, works=None)
        self.plans[name] = made
        if name == "ram":  # more, if the layout needs it
            short = replace(short, works=made.plan.device.budget.ram_bytes)
        return short


#: Limit of time or energy -> its field in ``Request``.
_TIMES = {"latency": "latency_s", "energy": "energy_j"}


def _measured(
    problem: Problem, name: LimitName, has: Limits, least: float, found: float
) -> Shortfall:
    """A shortfall in the unit of its limit, with what is to be tried: rounded, but not down."""
    cost = problem.cost
    if name == "latency":
        clock = cost.device.clock_hz.value
        value = _rounded_up(Fraction(round(found)) / Fraction(clock))
        while int(float(value) * clock) < round(found):  # as the limit will be read
            value += Decimal(1).scaleb(value.adjusted() - _DIGITS + 1)
        allowed = cost.latency_s(has.cycles or 0)
        return Shortfall(name, allowed, cost.latency_s(round(least)), float(value))
    if name == "energy":
        return Shortfall(name, has.energy_j or 0.0, least, float(_rounded_up(Fraction(found))))
    # Values of RAM are told and planned for one region, so they compare with the largest.
    allowed_bytes = has.largest_bytes if name == "ram" else has.flash_bytes
    return Shortfall(name, allowed_bytes, ceil(least - 0.5), round(found))


def _rounded_up(x: Fraction) -> Decimal:
    """Six digits that are not below ``x``: typed in again, they must work."""
    exact = Decimal(x.numerator) / Decimal(x.denominator)
    unit = Decimal(1).scaleb(exact.adjusted() - _DIGITS + 1)
    return exact.quantize(unit, rounding=ROUND_CEILING)
