"""The choice of updates over few cuts against what is proven of one choice alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from onnx_files import export
from random_nets import random_net
from test_random_graphs import half_way

from odt_plan.ir.autodiff import build_training
from odt_plan.ir.training import Candidate
from odt_plan.planner.choice import ChoiceByCuts, Cut, Make, cuts_of
from odt_plan.planner.footprint import measure
from odt_plan.planner.imported import import_requested
from odt_plan.planner.linear import SolverOptions
from odt_plan.planner.pipeline import Planner
from odt_plan.planner.problem import Problem
from odt_plan.planner.progress import Watch
from odt_plan.planner.remakes import Remade
from odt_plan.planner.residency import Residency

EXACT = SolverOptions(gap=0.0)


class Sample:
    """A random network, and one update of about half of its parameters."""

    def __init__(self, seed: int, folder: Path) -> None:
        request = half_way(export(random_net(seed, 8), folder))
        planner = Planner(request, import_requested(request, watch := Watch()), watch)
        self.stages, start = planner.prepared
        self.problem = self.stages.learn_problem(start.decided, fixed=False, free=())
        rng, by_param = np.random.default_rng(seed), dict[str, list[Candidate]]()
        for c in start.decided.updates:
            by_param.setdefault(c.param, []).append(c)
        self.updates = tuple(
            found[rng.integers(len(found))] for found in by_param.values() if rng.random() < 0.5
        ) or start.decided.updates[-1:]
        decided = replace(start.decided, updates=self.updates)
        graph = self.stages.lowered(decided)
        self.training = build_training(graph, self.stages.spec, self.updates)

    def alone(self, ram: int) -> Residency:
        limits = replace(self.stages.limits, ram_bytes=ram)
        return self.stages.residency(self.training, "latency", limits)

    def least(self) -> int:
        """RAM that these updates take at least, which is proven to 4 bytes."""
        alone = self.alone(self.stages.limits.ram_bytes)
        most = alone.remakes.over(Remade()) + self.stages.limits.ram_bytes
        proven, decided = alone.least_ram(most, EXACT, Watch())
        least = most if decided is None else measure(*decided).ram_bytes
        assert least - 4 < proven <= least
        return least

    def where(self, problem: Problem) -> set[Cut | Make]:
        """All cuts, and all that may be made again between steps that run with these updates."""
        places, alone = cuts_of(problem), self.alone(problem.limits.ram_bytes)
        steps = [
            places[s.node.name]
            for s in alone.plain.slots[alone.remakes.backward - 1 :]
            if s.node.name in places
        ]
        names = [t.name for t in problem.storage.tensors if t.rebuildable]
        makes = {Make(cut, before, n) for before, cut in pairwise(steps) for n in names}
        return {*places.values(), *makes}

    def fits(self, ram: int) -> bool:
        """By the choice, with its updates decided."""
        limits = replace(self.problem.limits, ram_bytes=ram)
        problem = replace(self.problem, limits=limits)
        choice = ChoiceByCuts(problem, self.where(problem), "learn")
        for a in problem.activities:
            if a.update is not None:
                column, holds = choice.a[a.index], a.update.candidate in self.updates
                choice.c.lower[column] = choice.c.upper[column] = float(holds)
        status = choice.solve("learn", EXACT).status
        assert status in ("optimal", "infeasible")
        return status == "optimal"


@pytest.mark.parametrize("seed", [9, 23, 71])
def test_a_choice_over_all_cuts_takes_the_least_ram_that_its_updates_take(
    seed: int, tmp_path: Path
) -> None:
    """Neither more, then it would exclude plans, nor less, then it would have to be tried."""
    sample = Sample(seed, tmp_path)
    least = sample.least()
    assert sample.fits(least)
    assert not sample.fits(least - 4)


@pytest.mark.parametrize("seed", [9, 26])
def test_what_its_only_reader_overwrites_is_not_held(seed: int, tmp_path: Path) -> None:
    """There is no moment at which it could be: making it again makes what overwrites it, too."""
    sample = Sample(seed, tmp_path)
    problem = sample.problem
    choice = ChoiceByCuts(problem, cuts_of(problem).values(), "learn")
    assert choice.forward.taken
    for j, i in choice.forward.taken.values():
        held = [(column, 1.0) for (_, k), column in choice.live.items() if k == j]
        for read in (False, True):
            program = choice.c
            upper = list(program.upper)
            for a in choice.forward.in_place[j, i]:
                upper[choice.a[a]] = float(read)
            found = replace(program, upper=upper).solve(held, EXACT, maximize=True)
            assert found.values is not None
            assert bool(found.values[[c for c, _ in held]].any()) == read
