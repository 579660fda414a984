"""Why no plan exists: what conflicts, where and by how much, and what would work instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ir.errors import InfeasibleError, Shortfall
from .conflict import Conflict, ConflictSearch, Planning
from .needs import Needs
from .peak import Peak, peak_of
from .problem import ALWAYS
from .relaxations import Relaxation, Relaxations
from .sizes import format_bytes

if TYPE_CHECKING:
    from .pipeline import Request
    from .progress import Watch


@dataclass(frozen=True)
class Explanation:
    """Why no plan keeps what was asked for.

    Attributes:
        conflicts: What can't be kept together; several without a common member if each of them has
            to be given up.
        shortfalls: The limits of which one alone can be raised until a plan exists, or where
            several have to be, values that work together.
        together: The values work together only.
        weights_bytes: Flash of the weights alone.
        peak: Where the most RAM is live with the smallest RAM that works; None: RAM binds nowhere.
        relaxations: Changes with which a plan was made, cheapest first.
        untried: Changes that were not tried before the time was over.
    """

    conflicts: tuple[Conflict, ...]
    shortfalls: tuple[Shortfall, ...]
    together: bool
    weights_bytes: int
    peak: Peak | None
    relaxations: tuple[Relaxation, ...]
    untried: int

    def record(self) -> dict[str, object]:
        """What ``--json`` prints."""
        return {
            "conflicts": [
                {"members": [m.text for m in c.members], "irreducible": c.irreducible}
                for c in self.conflicts
            ],
            "limits": [vars(s) for s in self.shortfalls],
            "together": self.together,
            "peak": None if self.peak is None else self.peak.record(),
            "relaxations": [r.record() for r in self.relaxations],
            "untried": self.untried,
        }


class NoPlanError(InfeasibleError):
    """No plan keeps what was asked for.

    Attributes:
        explanation: Why, and what would work.
    """

    def __init__(self, explanation: Explanation) -> None:
        """Word the explanation."""
        lines = "\n".join(words(explanation))
        super().__init__(f"no plan fits: {lines}", explanation.shortfalls)
        self.explanation = explanation

    def __reduce__(self) -> tuple[type[NoPlanError], tuple[Explanation]]:
        """Cross to another process by the explanation."""
        return NoPlanError, (self.explanation,)


def infeasible_record(error: InfeasibleError) -> dict[str, object]:
    """What ``plan --json`` prints where there is no plan.

    ``explanation`` is null where no plan was found, but none is proven impossible either.
    """
    explanation = error.explanation.record() if isinstance(error, NoPlanError) else None
    return {"ok": False, "error": str(error), "explanation": explanation}


def explain(request: Request, planning: Callable[[Request], Planning], watch: Watch) -> NoPlanError:
    """The error for a request that the solver has proven infeasible.

    Args:
        request: The infeasible request.
        planning: Plans another request for the same model.
        watch: Says when to end with what is known.
    """
    search = ConflictSearch(request, planning, watch)
    conflicts = search.conflicts()
    needs = Needs(search)
    shortfalls = tuple(needs.alone(conflicts[0]))
    together = not shortfalls and search.left_s > 0
    if together:
        shortfalls = tuple(needs.jointly())
    weights = min(
        sum(c.bytes for c in p.constants if ALWAYS in c.readers) for p in search.problems()
    )
    ways: tuple[Relaxation, ...] = ()
    untried = 0
    if request.with_relaxations:
        found = Relaxations(search, conflicts[0], shortfalls, together, needs.plans)
        found.search()
        ways, untried = found.cheapest(), found.untried
    peak = peak_of(needs.plans["ram"]) if "ram" in needs.plans else None
    return NoPlanError(Explanation(conflicts, shortfalls, together, weights, peak, ways, untried))


def words(e: Explanation) -> list[str]:
    """The lines of an explanation; the first one is the conflict."""
    lines = [_need_line(e, s) for s in e.shortfalls]
    named = [" and ".join(m.text for m in c.members) for c in e.conflicts]
    if len(e.conflicts) > 1:
        lines.insert(0, f"several limits bind, each by itself: {'; '.join(named)}")
        lines[1:] = [f"  {line}" for line in ("these values work together", *lines[1:])]
    elif len(e.conflicts[0].members) > 1 or not e.shortfalls:
        proof = "without any one of them a plan exists"
        if not e.conflicts[0].irreducible:
            proof = "fewer of them may conflict already, a solve ended at the time limit"
        together = ", these values work together" if e.together and e.shortfalls else ""
        together = f" together; {proof}{together}" if len(e.conflicts[0].members) > 1 else ""
        lines.insert(0, f"{named[0]} can't be kept{together}")
        lines[1:] = [f"  {line}" for line in lines[1:]]
    if not e.shortfalls:
        lines.append("  the smallest values that work were not found within the time limit")
    if e.peak is not None:
        lines.append(f"  largest there: {e.peak.words()}")
    if e.relaxations:
        lines.append("  ways out, cheapest first:")
        lines += [f"    {r.words()}" for r in e.relaxations]
    if e.untried:
        lines.append(f"  {e.untried} other changes were not tried: the time limit came first")
    return lines


def _need_line(e: Explanation, s: Shortfall) -> str:
    """What binds, where, by how much, and the smallest value that works."""
    if s.limit == "flash":
        weights = format_bytes(e.weights_bytes)
        text = f"flash: weights need {weights} or more, with code (estimated) "
        return text + _bytes_words(int(s.needs), s, "")
    if s.limit == "ram":
        where = "" if e.peak is None else f" at {e.peak.where()}"
        return "RAM: needs " + _bytes_words(int(s.needs), s, where)
    unit = "s" if s.limit == "latency" else "J"
    text = f"{s.limit}: needs {s.needs:.6g} {unit}, has {s.has:.6g} {unit}"
    return f"{text}; {_value_words(s, '' if s.works is None else f'{s.works:.6g}{unit}')}"


def _bytes_words(need: int, s: Shortfall, where: str) -> str:
    has = int(s.has)
    value = "" if s.works is None else str(int(s.works))
    more = ""
    if s.limit == "ram" and s.works is not None and int(s.works) > need:
        more = " and more for the layout"
    return (
        f"{format_bytes(need)}{where}{more}, has {format_bytes(has)}, {need - has:,} B too few;"
        f" {_value_words(s, value)}"
    )


def _value_words(s: Shortfall, value: str) -> str:
    if not value:
        return f"a --{s.limit} that works was not found within the time limit, or no layout for it"
    exact = s.works == s.needs or s.limit in ("latency", "energy")
    return f"{'the smallest' if exact else 'a'} --{s.limit} that works is {value}"
