"""Why no plan keeps a RAM budget: few cuts of the timeline, and few makings, that exclude all.

A search by ``planner.cuts`` that ends without any plan has proven that with all the cuts and
makings it came to. Mostly few of them suffice, and these exclude other choices of updates, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .cuts import excludes, in_all_room, proving
from .linear import SolverOptions
from .progress import Watch
from .remakes import Found, Prices, Remakes
from .unsat_core import unsat_core

#: Cuts that exclude plans, and tensors that are made again behind them.
Conflict = tuple[Sequence[int], Sequence[tuple[int, int]]]
#: Times that a core of a core is asked for.
CORES = 4
#: Part of a core that the next one may be, for there to be another one.
SMALLER = 0.7
#: Makings in a core beyond which it is hardly made small.
MANY = 60


def conflict(
    remakes: Remakes, prices: Prices, found: Found, options: SolverOptions, watch: Watch
) -> Conflict:
    """Few cuts with which there is no plan, and what is made again at them, if few are enough.

    Args:
        remakes: The tensors.
        prices: Their prices.
        found: What the search has proven.
        options: How to solve.
        watch: Says when to end; what is known then is the result.

    Raises:
        OdtPlanError: The solver failed.
    """
    return _Reduction(remakes, prices, options, watch, list(found.cuts), list(found.makes)).run()


@dataclass
class _Reduction:
    """``cuts`` and ``makes`` exclude all plans, and become fewer."""

    remakes: Remakes
    prices: Prices
    options: SolverOptions
    watch: Watch
    cuts: list[int]
    makes: list[tuple[int, int]]

    def run(self) -> Conflict:
        if self._exclude(self.cuts, ()):
            self.makes = []
            self._without_each_cut()
            return self.cuts, ()
        self._core_of_makes()
        if len(self.makes) > MANY:
            return self.cuts, self.makes
        self._shorten()
        self._without_each_tensor()
        return self.cuts, self.makes

    def _exclude(self, cuts: Sequence[int], makes: Sequence[tuple[int, int]]) -> bool:
        return excludes(self.remakes, self.prices, cuts, makes, self.options, self.watch)

    def _within(self, cuts: Sequence[int]) -> list[tuple[int, int]]:
        """Of what is made, that behind a cut with no step between it and another one."""
        after = {k for before, k in pairwise(cuts) if before >= self.remakes.before(k)}
        return [m for m in self.makes if m[0] in after]

    def _without_each_cut(self) -> None:
        for k in list(self.cuts):
            fewer = [c for c in self.cuts if c != k]
            if fewer and not self.watch.over() and self._exclude(fewer, ()):
                self.cuts = fewer

    def _core_of_makes(self) -> None:
        if proving(self.options, self.watch).solver != "cp-sat":
            return
        for _ in range(CORES):
            if self.watch.over():
                break
            program = in_all_room(self.remakes, self.prices, self.cuts, self.makes)
            core = unsat_core(program.c, program.making, proving(self.options, self.watch))
            if core is None or len(core) >= len(self.makes):
                break
            more = len(core) <= SMALLER * len(self.makes)
            self.makes = sorted(core)
            if not more:
                break

    def _shorten(self) -> None:
        """To the part of the timeline that begins as late as possible, and ends early."""
        size = 2
        while size < len(self.cuts) and not self.watch.over():
            late = self.cuts[-size:]
            if self._exclude(late, self._within(late)):
                self.cuts = late
                break
            size *= 2
        for sign in (1, -1):
            cuts, low, high = self.cuts[::sign], 0, len(self.cuts) - 1
            while high - low > 1 and not self.watch.over():
                left_out = (low + high) // 2
                part = cuts[left_out:][::sign]
                if self._exclude(part, self._within(part)):
                    low = left_out
                else:
                    high = left_out
            self.cuts = cuts[low:][::sign]
        self.makes = self._within(self.cuts)

    def _without_each_tensor(self) -> None:
        for i in sorted({i for _, i in self.makes}):
            fewer = [m for m in self.makes if m[1] != i]
            if self.watch.over():
                break
            if self._exclude(self.cuts, fewer):
                self.makes = fewer
