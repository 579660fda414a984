"""What is kept, rebuilt and paged where updates are fixed: first plans, better ones, and bounds.

The first plans evict what is cheapest to have back (``planner.evicting``), or hold checkpoints
alone (``planner.checkpoints``); the next ones are those of a program over few cuts of the timeline
(``planner.cuts``), which is where the bound is from, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from math import nan

from .bounds import bound
from .checkpoints import Checkpoints
from .cut_conflict import Conflict, conflict
from .cuts import ANY, ROUNDS, excludes, search
from .evicting import evicting
from .footprint import measure
from .linear import INF, SolverOptions, Status
from .milp import SolveResult
from .objective import Goal
from .problem import Problem
from .progress import Watch
from .remakes import Found, Prices, Remakes
from .solution import Solution
from .timeline import Rebuilds

#: Objectives that are prices of making things again and of paging.
PRICED = ("latency", "energy")
#: Cuts of the first proof that nothing fits, and of the last one; each has twice as many.
FIRST_CUTS, MOST_CUTS = 4, 32
#: Programs that look for a plan that makes less again than checkpoints do.
FEW_ROUNDS = 6


@dataclass(frozen=True)
class Kept:
    """What is decided about a problem.

    Attributes:
        problem: With the rebuilds that it may have.
        result: The decisions, and a bound on all there are.
        found: What a search by cuts has told; None: the whole model decided.
    """

    problem: Problem
    result: SolveResult
    found: Found | None = None


@dataclass
class Residency:
    """One problem.

    Attributes:
        plain: The problem without rebuilt activations.
        build: Lays out the problem with the given rebuilds.
        goal: What is to be minimized.
    """

    plain: Problem
    build: Callable[[bool | Rebuilds], Problem]
    goal: Goal

    @property
    def priced(self) -> bool:
        """All that is left to decide has a price: what is kept, rebuilt and paged."""
        p = self.plain
        return self.has_prices and not (p.streams or p.mixed_layers)

    @property
    def has_prices(self) -> bool:
        """What is kept, rebuilt and paged has a price, whatever else is to be decided.

        Not so where computing may hide transfers, which prices count in full, nor where a buffer is
        larger than any RAM region: the whole model tells why that fails.
        """
        p = self.plain
        if p.cost.overlaps and not p.limits.wait_for_transfers:
            return False
        if p.limits.regions and max(s.largest_bytes for s in p.slots) > p.limits.largest_bytes:
            return False
        return self.goal in PRICED and not p.forced

    @cached_property
    def remakes(self) -> Remakes:
        """The tensors."""
        return Remakes(self.plain)

    @cached_property
    def prices(self) -> Prices:
        """In cycles, or in what one computing cycle takes of energy."""
        cost, micro, pages = self.plain.cost, self.plain.micro_batches, self.remakes.pages
        sizes = [int(b) for b in self.remakes.size] if pages else []
        page = cost.energy_j(1, 1) / cost.energy_j(1, 0) if pages and self.goal == "energy" else 1.0
        return Prices(
            tuple(float(c) for c in self.remakes.cycles),
            tuple(page * micro * cost.write_cycles(b) for b in sizes),
            tuple(page * micro * cost.read_cycles(b) for b in sizes),
        )

    @cached_property
    def checkpoints(self) -> Checkpoints | None:
        """The plan that holds checkpoints; None: the problem is too large for them."""
        small = Checkpoints.small(self.remakes)
        return Checkpoints(self.remakes, self.prices) if small else None

    @cached_property
    def base(self) -> float:
        """What it takes to make everything once, in the unit of the prices."""
        base, paged = bound(self.plain, "latency"), self.plain.always_paged.cycles
        if paged and self.goal == "energy":
            cost = self.plain.cost
            base += paged * cost.energy_j(0, 1) / cost.energy_j(1, 0)
        return base

    def first(self, tries: int | None = None) -> Found | None:
        """The cheapest plan that takes no solver, with the bound that takes none, either.

        Args:
            tries: Plans by eviction that are compared; None: all, and that of checkpoints.
        """
        plans = list(islice(evicting(self.remakes, self.prices), tries))
        if tries is None and (held := self.checkpoints) is not None and held.over <= 0:
            plans.append(held.made)
        if not plans:
            return None
        made = min(plans, key=lambda m: self.prices.of(self.remakes, m))
        return Found(made, self.prices.of(self.remakes, made), 0.0)

    def search(
        self,
        options: SolverOptions,
        watch: Watch,
        rounds: int = ROUNDS,
        begin: Found | None = None,
    ) -> Found:
        """The best plan that is found, without a solver where cuts find none, and a bound on all.

        Where any plan will do, and checkpoints don't fit, it is first tried to prove that nothing
        does. See ``planner.cuts``.
        """
        wanted = begin is None and options.gap >= ANY  # any plan will do
        if wanted and (held := self.checkpoints) is not None:
            if held.over <= 0:
                rounds = min(rounds, FEW_ROUNDS)  # there is one
            elif (none := self._none_fits(held, options, watch)) is not None:
                return none
        found = search(self.remakes, self.prices, self.base, options, watch, rounds, begin)
        if found.made is None and found.bound < INF and (first := self.first()) is not None:
            return replace(
                found, made=first.made, price=first.price, bound=min(found.bound, first.price)
            )
        return found

    def _none_fits(
        self, held: Checkpoints, options: SolverOptions, watch: Watch
    ) -> Found | None:
        """A proof by cuts where checkpoints take too much, as few as suffice, if few do."""
        slots, makes = held.critical
        known, size = 0, FIRST_CUTS
        while known < len(slots) and size <= MOST_CUTS and not watch.over():
            cuts = slots[:size]
            behind = tuple(m for m in makes if m[0] in cuts)
            if excludes(self.remakes, self.prices, cuts, behind, options, watch):
                return Found(None, INF, INF, tuple(cuts), behind)
            known, size = size, 2 * size
        return None

    def conflict(self, found: Found, options: SolverOptions, watch: Watch) -> Conflict:
        """Few cuts, and what is made at them, by which a search has proven that there is no plan.

        None if it has not.
        """
        if found.bound < INF:
            return (), ()
        return conflict(self.remakes, self.prices, found, options, watch)

    def least_ram(
        self, high: int, options: SolverOptions, watch: Watch
    ) -> tuple[int, tuple[Problem, Solution] | None]:
        """Bisect the RAM that is needed, below what is known to do.

        Args:
            high: Bytes that are enough.
            options: How to solve, with the gap that is left.
            watch: Says when to end.

        Returns:
            What is needed at least, proven, and decisions that take less than ``high``, if any.
        """
        low, best = int(bound(self.plain, "ram")), None
        while high - low > max(options.gap * high, 3) and not watch.over():
            limits = replace(self.plain.limits, ram_bytes=(low + high) // 2)
            part = Residency(replace(self.plain, limits=limits), self.build, self.goal)
            found = part.search(replace(options, gap=ANY), watch)
            decided = part.decided(found)
            if decided is not None:
                best, high = decided, measure(*decided).ram_bytes
            elif found.bound == INF:
                low = limits.ram_bytes + 1
            else:
                break
        return low, best

    def total(self, price: float) -> float:
        """A price as the value of the objective."""
        unit = self.plain.cost.energy_j(1, 0) if self.goal == "energy" else 1.0
        return unit * (self.base + price)

    def kept(self, options: SolverOptions, watch: Watch, begin: Found | None = None) -> Kept:
        """What ``search`` finds, as decisions about a problem.

        The bound is infinite where there is no plan.
        """
        found = self.search(options, watch, begin=begin)
        bound, decided, time_s = self.total(found.bound), self.decided(found), watch.elapsed_s
        if decided is None:
            status: Status = "infeasible" if found.bound == INF else "unknown"
            return Kept(self.plain, SolveResult(status, nan, bound, None, "", time_s), found)
        problem, solution = decided
        value = self.total(found.price)
        return Kept(problem, SolveResult("feasible", value, bound, solution, "", time_s), found)

    def decided(self, found: Found) -> tuple[Problem, Solution] | None:
        """A plan as decisions about a problem; None: it breaks a limit other than RAM's."""
        if found.made is None:
            return None
        problem, solution = self.remakes.laid_out(self.build, found.made)
        return (problem, solution) if measure(problem, solution).keeps(problem.limits) else None
