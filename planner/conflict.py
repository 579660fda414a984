"""Which of the things that were asked for can't be kept together, as small a set as can be proven.

An irreducible infeasible subset (IIS) by the deletion filter (Chinneck and Dravnieks, ORSA Journal
on Computing 3(2), 1991): leave out one member after the other; what is still infeasible without it
can do without it. What is left in the end is infeasible, and feasible without any one of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from .demands import Demand
from .linear import SolverOptions
from .milp import Milp, SolveResult
from .plan import ObjectiveName
from .problem import Limits, Problem
from .progress import Watch

if TYPE_CHECKING:
    from ..ir.graph import Graph
    from .pipeline import PlannedModel, Request

#: Larger than any budget; small enough for exact arithmetic in doubles.
NO_LIMIT = 2**50
#: Part of the explanation's time that one solve may take, and what it gets in any case.
SOLVE_SHARE, LEAST_S = 0.5, 1.0
MemberKind = Literal["precision", "demand", "train", "storage", "energy", "latency", "flash", "ram"]


#: Members that only bound a figure.
_LIMITS: tuple[MemberKind, ...] = ("energy", "latency", "flash", "ram")


class Planning(Protocol):
    """What of ``planner.pipeline`` a search for conflicts needs."""

    limits: Limits
    options: SolverOptions
    forward: Graph

    def problem(self) -> Problem:
        """The first problem that is solved: infeasible if and only if the request is."""

    def run(self) -> PlannedModel:
        """The plan; raises InfeasibleError."""


@dataclass(frozen=True)
class Member:
    """One of the things that were asked for.

    Attributes:
        kind: What it limits.
        text: As it is told.
        item: The pin, of several.
        demand: The demand, of several.
    """

    kind: MemberKind
    text: str
    item: str = ""
    demand: Demand | None = None


@dataclass(frozen=True)
class Conflict:
    """Members that can't be kept together.

    Attributes:
        members: They are proven infeasible together.
        irreducible: Without any one of them a plan is known to exist; else a solve ended at the
            time limit, and fewer of them may conflict already.
    """

    members: tuple[Member, ...]
    irreducible: bool


def items_of(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Items of a repeatable option that may hold commas."""
    return tuple(i.strip() for t in texts for i in t.split(",") if i.strip())


class ConflictSearch:
    """The problems of a request and of what is left of it without some members.

    Attributes:
        request: What is asked.
        members: Everything that can be left out, in the order in which that is tried: what is left
            at the end is what people can least do about, the memory of a board.
    """

    def __init__(
        self, request: Request, planning: Callable[[Request], Planning], watch: Watch
    ) -> None:
        """List what was asked for."""
        self.request, self.planning, self._watch = request, planning, watch
        self._options = replace(planning(request).options, gap=0.0)
        self.members = tuple(self._members())
        self._problems: dict[tuple[object, ...], Problem] = {}
        self._known: dict[frozenset[Member], bool | None] = {}

    @property
    def left_s(self) -> float:
        """Seconds that are left for the whole explanation, but not more than a solve may take."""
        return min(SOLVE_SHARE * self._options.time_limit_s, self._watch.left_s)

    @property
    def options(self) -> SolverOptions:
        """How to solve: without a gap, in the time that is left."""
        return replace(self._options, time_limit_s=max(LEAST_S, self.left_s))

    def _members(self) -> Iterator[Member]:
        r, limits = self.request, self.planning(self.request).limits
        for item in items_of(r.precision):
            yield Member("precision", f"--precision {item}", item)
        for d in r.demands:
            yield Member("demand", f"{d.kind} {d.name}", demand=d)
        if items_of(r.train) not in ((), ("auto",)):
            yield Member("train", f"--train {','.join(items_of(r.train))}")
        if r.device.pageable:
            paging = "no paging" if r.storage is None else f"--storage {r.storage}"
            yield Member("storage", paging)
        if r.energy_j is not None:
            yield Member("energy", f"--energy {r.energy_j:.6g}J")
        if r.latency_s is not None:
            yield Member("latency", f"--latency {r.latency_s:.6g}s")
        for kind, given, has, what in (
            ("flash", r.flash_bytes, limits.flash_bytes, "flash"),
            ("ram", r.ram_bytes, limits.ram_bytes, "RAM"),
        ):
            text = f"{what} of {r.device.id} ({has:,} B)" if given is None else f"--{kind} {given}"
            if kind == "ram" and given is None and r.ram_regions:
                text = f"--ram {','.join(f'{name}={n}' for name, n in r.ram_regions)}"
            yield Member("ram" if kind == "ram" else "flash", text)

    def problems(self, dropped: frozenset[Member] = frozenset()) -> Iterator[Problem]:
        """The problem without these members; one per storage where paging is left open."""
        kinds = {m.kind for m in dropped}
        r = self._left(dropped)
        storages = [r.storage]
        if "storage" in kinds and r.storage is None:
            storages = [s.id for s in r.device.pageable]
        for storage in storages:
            one = replace(r, storage=storage)
            limits = self.planning(one).limits
            if "ram" in kinds:
                limits = limits.in_one_region(NO_LIMIT)
            if "flash" in kinds:
                limits = replace(limits, flash_bytes=NO_LIMIT)
            if "latency" in kinds:
                limits = replace(limits, cycles=None)
            if "energy" in kinds:
                limits = replace(limits, energy_j=None)
            if "storage" in kinds:
                limits = replace(limits, storage_bytes=NO_LIMIT, worn_bytes=None)
            yield replace(self._problem(one), limits=limits)

    def _left(self, dropped: frozenset[Member]) -> Request:
        """The request without precisions, update set and demands that are dropped."""
        r = self.request
        pins = {m.item for m in dropped if m.kind == "precision"}
        demands = {m.demand for m in dropped if m.kind == "demand"}
        if pins:
            r = replace(r, precision=tuple(i for i in items_of(r.precision) if i not in pins))
        if demands:
            r = replace(r, demands=tuple(d for d in r.demands if d not in demands))
        if any(m.kind == "train" for m in dropped):
            r = replace(r, train=("auto",), objective="learn")
        return r

    def _problem(self, r: Request) -> Problem:
        """Built with the limits that were given, so that it counts what any of them needs."""
        key = (r.storage, r.precision, r.train, r.demands)
        if key not in self._problems:
            self._problems[key] = self.planning(r).problem()
        return self._problems[key]

    def infeasible(self, dropped: frozenset[Member]) -> bool | None:
        """Without these members there is no plan; None: the time limit came first."""
        if dropped not in self._known:
            self._known[dropped] = self._infeasible(dropped)
        return self._known[dropped]

    def _infeasible(self, dropped: frozenset[Member]) -> bool | None:
        proven = True
        for problem in self.problems(dropped):
            if self.left_s <= 0:
                return None
            any_solution = replace(self.options, gap=1.0)  # the first one will do
            self._watch.stage("no plan fits: what conflicts", "ram")
            result = Milp(problem, "ram").solve("ram", any_solution, self._watch)
            if result.solution is not None:
                return False
            proven = proven and result.status == "infeasible"
        return True if proven else None

    def conflict(self, dropped: frozenset[Member] = frozenset()) -> Conflict:
        """An irreducible subset of the members that are not dropped and proven infeasible."""
        kept = [m for m in self.members if m not in dropped]
        everything = frozenset(self.members)
        limits = [m for m in kept if m.kind in _LIMITS]
        if limits and self.infeasible(everything.difference(limits)):
            kept = limits  # most conflicts are of limits alone
        again = True
        while again:  # pins and update sets are not nested as limits are: until nothing changes
            again, proven = False, True
            for m in tuple(kept):
                rest = [x for x in kept if x is not m]
                answer = self.infeasible(everything.difference(rest))
                if answer:
                    kept, again = rest, True
                proven = proven and answer is not None
        return Conflict(tuple(kept), proven)

    def conflicts(self) -> tuple[Conflict, ...]:
        """Conflicts without a common member, until what is left of the request is feasible."""
        found: list[Conflict] = []
        dropped: frozenset[Member] = frozenset()
        while len(dropped) < len(self.members):
            found.append(self.conflict(dropped))
            dropped |= frozenset(found[-1].members)
            if not found[-1].members or self.infeasible(dropped) is not True:
                break
        return tuple(found)

    def least(self, problem: Problem, name: ObjectiveName) -> SolveResult:
        """The smallest need of a problem, without a gap."""
        self._watch.stage("no plan fits: the smallest value that works", name)
        return Milp(problem, name).solve(name, self.options, self._watch)
