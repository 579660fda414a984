"""What to change so that a plan exists: each change has been planned, layout and check included.

The **price** of a change ranks them. It is the relative amount of the one thing that is given up:
of a budget what it grows by; of another update set the importance that is lost; of paging the part
of the training step that is spent on it; of a pin the part of all layers that it held. Where a
change needs more RAM as well, the larger of the two counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING

from ..ir.errors import InfeasibleError, LimitName, OdtPlanError, Shortfall
from ..ir.precision import quantizable
from .conflict import NO_LIMIT, Conflict, ConflictSearch, items_of
from .needs import planned, with_limit
from .precision import pinned
from .problem import ALWAYS
from .sizes import format_joules, format_seconds

if TYPE_CHECKING:
    from .pipeline import PlannedModel, Request

#: Changes that are told.
SHOWN = 3


@dataclass(frozen=True)
class Relaxation:
    """A change with which a plan was made.

    Attributes:
        options: What to type instead of, or beside, what was typed.
        price: See the module docstring.
        gives_up: What the price counts, in words.
        request: The changed request.
        ram_bytes: RAM of the plan.
        flash_bytes: Flash of the plan.
        latency_s: Predicted seconds of a training step.
        energy_j: Predicted energy of a training step.
        importance: Summed importance of its updates.
    """

    options: str
    price: float
    gives_up: str
    request: Request
    ram_bytes: int
    flash_bytes: int
    latency_s: float
    energy_j: float
    importance: float

    def words(self) -> str:
        """One line."""
        return (
            f"{self.options}: {self.gives_up}; takes {self.ram_bytes:,} B of RAM,"
            f" {format_seconds(self.latency_s)}, {format_joules(self.energy_j)}"
        )

    def record(self) -> dict[str, object]:
        """For JSON; an infinite price (a budget of nothing) is null."""
        own = {k: v for k, v in vars(self).items() if k != "request"}
        return {**own, "price": None if self.price == inf else self.price}


@dataclass(frozen=True)
class _Change:
    """A changed request, its options, and the price of a plan with what it gives up.

    ``hopeless``: as it is, it is proven infeasible.
    """

    options: str
    request: Request
    price: Callable[[PlannedModel], tuple[float, str]]
    hopeless: bool = False


class Relaxations:
    """Tries changes until the time is over.

    Attributes:
        untried: Changes that were not tried.
    """

    def __init__(
        self,
        search: ConflictSearch,
        conflict: Conflict,
        shortfalls: tuple[Shortfall, ...],
        together: bool,
        plans: Mapping[LimitName, PlannedModel],
    ) -> None:
        """Begin with the values that are known to work.

        Args:
            search: The request.
            conflict: One of it: what is no part of it alone changes nothing.
            shortfalls: Limits and values.
            together: They work together only.
            plans: Limit -> plan with its value.
        """
        self.untried = 0
        self._search, self._conflict = search, conflict
        self._found: list[Relaxation] = []
        known = [s for s in shortfalls if s.works is not None and s.limit in plans]
        for group in [known] if together else [[s] for s in known]:
            if group and (not together or len(group) == len(shortfalls)):
                made = plans[group[-1].limit]
                price = max(map(_growth, group))
                text = ", ".join(map(_growth_words, group))
                self._add(" ".join(map(_typed, group)), price, text, made, _grown(search, group))
        self._ram = next((s for s in known if s.limit == "ram"), None)

    def cheapest(self) -> tuple[Relaxation, ...]:
        """The cheapest ones that were found."""
        return tuple(sorted(self._found, key=lambda r: (r.price, r.options))[:SHOWN])

    def search(self) -> None:
        """Plan every other change, as it is and with the RAM that it needs then."""
        for change in self._changes():
            if self._search.left_s <= 0:
                self.untried += 1
                continue
            try:
                self._try(change)
            except InfeasibleError:
                continue
            except OdtPlanError:
                continue  # a change that the model does not have: no biases, say

    def _try(self, change: _Change) -> None:
        made = None if change.hopeless else planned(self._search, change.request, None)
        if made is not None:
            self._add(change.options, *change.price(made), made, change.request)
            return
        wide = self._search.planning(replace(change.request, ram_bytes=NO_LIMIT))
        need = self._search.least(wide.problem(), "ram")
        if need.solution is None:
            return
        has = self._search.planning(change.request).limits.largest_bytes
        request = replace(change.request, ram_bytes=round(need.value))
        made = planned(self._search, request, "ram")
        if made is None or round(need.value) <= has:
            return
        ram = made.plan.device.budget.ram_bytes
        if self._ram is not None and self._ram.works is not None and ram >= self._ram.works:
            return  # it adds nothing to the RAM that is needed anyway
        more = Shortfall("ram", has, round(need.value), ram)
        price, text = change.price(made)
        self._add(
            f"{change.options} {_typed(more)}",
            max(price, _growth(more)),
            f"{_growth_words(more)}, {text}",
            made,
            replace(request, ram_bytes=ram),
        )

    def _changes(self) -> Iterator[_Change]:
        r = self._search.request
        paging = r.storage is None and not any(m.kind == "storage" for m in self._conflict.members)
        for s in r.device.pageable:
            if s.id != r.storage:
                yield _Change(f"--storage {s.id}", replace(r, storage=s.id), _paging, paging)
        items = items_of(r.precision)
        for i, item in enumerate(items):
            left = replace(r, precision=(*items[:i], *items[i + 1 :]))
            idle = all(m.item != item for m in self._conflict.members)
            yield _Change(f"without --precision {item}", left, self._share_of(item), idle)
        if items_of(r.train) not in ((), ("auto",)):
            (problem,) = self._search.problems()
            gain = problem.gain
            best = (max(gain[a] for a in acts) for acts in problem.choices.values())
            asked = gain[ALWAYS] if ALWAYS in gain else sum(best)
            for name in ("auto", "last", "bias"):
                if items_of(r.train) != (name,) and (name != "auto" or "learn" in r.weights):
                    one = replace(r, train=(name,))
                    yield _Change(f"--train {name}", one, _importance_of(asked))

    def _share_of(self, item: str) -> Callable[[PlannedModel], tuple[float, str]]:
        forward = self._search.planning(self._search.request).forward
        share = len(pinned(forward, (item,))) / max(1, len(quantizable(forward)))
        return lambda _: (share, f"{share:.1%} of the layers no longer pinned")

    def _add(
        self, options: str, price: float, gives_up: str, made: PlannedModel, request: Request
    ) -> None:
        claims = made.plan.claims
        self._found.append(
            Relaxation(
                options, price, gives_up, request,
                claims.ram_bytes.total, claims.flash_bytes.total, claims.latency_s,
                claims.energy_j, sum(u.importance for u in made.plan.decisions.updates),
            )
        )  # fmt: skip


def _paging(made: PlannedModel) -> tuple[float, str]:
    share = made.report.phase_cycles.get("paging", 0) / made.report.cycles
    return share, f"{share:.1%} of the time goes into paging"


def _importance_of(asked: float) -> Callable[[PlannedModel], tuple[float, str]]:
    def price(made: PlannedModel) -> tuple[float, str]:
        got = sum(u.importance for u in made.plan.decisions.updates)
        lost = max(0.0, 1.0 - got / asked)
        return lost, f"{lost:.1%} of the importance lost"

    return price


def _growth(s: Shortfall) -> float:
    assert s.works is not None
    return (s.works - s.has) / s.has if s.has else inf


def _growth_words(s: Shortfall) -> str:
    assert s.works is not None
    relative = f"{_growth(s):+.1%}" if s.has else "from nothing"
    if s.limit in ("ram", "flash"):
        what = "RAM" if s.limit == "ram" else "flash"
        return f"+{int(s.works - s.has):,} B of {what} ({relative})"
    return f"{relative} {s.limit}"


def _typed(s: Shortfall) -> str:
    assert s.works is not None
    value = f"{int(s.works)}" if s.limit in ("ram", "flash") else f"{s.works:.6g}"
    return f"--{s.limit} {value}{ {'latency': 's', 'energy': 'J'}.get(s.limit, '') }"


def _grown(search: ConflictSearch, group: list[Shortfall]) -> Request:
    request = search.request
    for s in group:
        assert s.works is not None
        request = with_limit(request, s.limit, s.works)
    return request
