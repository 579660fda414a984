"""Blocks that run by rows chosen over few cuts, against the whole model for every choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
from test_choices import EXACT, Case, Combination, inverted, some

from odt_plan.ir.autodiff import build_training
from odt_plan.ir.errors import InfeasibleError
from odt_plan.ir.training import Candidate
from odt_plan.planner import scheduling
from odt_plan.planner.choice import Held, Make, cuts_of
from odt_plan.planner.decided import Excess
from odt_plan.planner.footprint import measure
from odt_plan.planner.milp import Milp
from odt_plan.planner.objective import Goal
from odt_plan.planner.problem import Limits, Problem
from odt_plan.planner.schedule import Schedule
from odt_plan.planner.scheduling import schedule
from odt_plan.planner.streamed import BlocksByCuts, BlockSearch

#: Updates behind one, two and three blocks.
UPDATES = {
    "three": ("h.weight", "fc.weight"),
    "two": ("e2.weight", "p2.weight", "h.weight", "fc.weight"),
    "one": ("d1.weight", "e2.weight", "d2.weight", "h.weight", "fc.weight"),
}


@cache
def case(updates: str, storage: str | None) -> Case:
    return Case(inverted(), [Candidate(n) for n in UPDATES[updates]], storage=storage)


@cache
def alone(updates: str, storage: str | None) -> dict[tuple[str, ...], Problem]:
    """The whole problem for each choice of blocks."""
    net = case(updates, storage)
    combinations = net.streamings(Combination(net.start.updates, ()))
    return {c.streamed: net.alone(c).problem for c in combinations}


def budgets(problems: Sequence[Problem]) -> list[int]:
    """RAM that a choice of blocks needs at least, and more."""
    least = [round(Milp(p).solve("ram", EXACT).value) for p in problems]
    low, top = min(least), max(least) * 5 // 4
    return sorted({*some(least, 2), *(low + (top - low) * k // 16 * 4 for k in (1, 3))})


def offered(net: Case, limits: Limits, goal: Goal) -> tuple[BlockSearch, Problem]:
    """The search, and the problem that it is about."""
    stages = net.stages(limits)
    training = build_training(net.lowered, net.spec, net.start.updates)
    choices = stages.choices(net.start, net.lowered, ())
    plain = stages.problem(training, fixed=True, choices=choices, rebuild=False)
    return BlockSearch(stages, net.start, plain, goal, limits), plain


@pytest.mark.parametrize(("goal", "updates"), [("latency", tuple(UPDATES)), ("energy", ("two",))])
def test_blocks_by_cuts_equal_the_whole_model_over_all_choices(
    goal: Goal, updates: tuple[str, ...]
) -> None:
    """Rarely, and near the least RAM, is none of their plans the best of the whole model's."""
    met = [
        m for u in updates for storage in (None, "sdcard") for m in against_whole(u, storage, goal)
    ]
    assert sum(met) >= 0.85 * len(met)


def against_whole(updates: str, storage: str | None, goal: Goal) -> list[bool]:
    """At each budget no bound excludes a plan.

    Returns whether what is found costs no more than the best that the whole model finds, proven.
    """
    net, problems = case(updates, storage), alone(updates, storage)
    assert len(problems) == 2 ** {"three": 3, "two": 2, "one": 1}[updates]
    met = []
    for ram in budgets(list(problems.values())):
        limits = replace(net.limits, ram_bytes=ram)
        results = [Milp(replace(p, limits=limits)).solve(goal, EXACT) for p in problems.values()]
        best = min(r.value for r in results if r.solution is not None)
        search, plain = offered(net, limits, goal)
        search.run()
        assert search.bound <= best * (1 + 1e-6)
        over_all = BlocksByCuts(plain, every_cut(plain), goal).solve(goal, EXACT)
        assert over_all.bound <= best * (1 + 1e-6)
        met.append(False)
        if search.best is None:
            continue
        decided, kept = search.best
        met[-1] = kept.result.value <= min(best, search.bound) * (1 + 1e-6)
        assert kept.result.value >= search.bound * (1 - 1e-9)
        assert kept.result.solution is not None
        needs = measure(kept.problem, kept.result.solution)
        assert needs.ram_bytes <= ram
        value = needs.cycles if goal == "latency" else needs.energy_j
        assert value == pytest.approx(kept.result.value, rel=1e-6)
        assert decided.streamed in problems
    return met


def every_cut(problem: Problem) -> set[Make]:
    """Every tensor that may be made again before every step."""
    steps, held = sorted(set(cuts_of(problem).values())), Held(problem)
    return {
        Make(step, before, t.name)
        for before, step in pairwise(steps)
        for t, made in zip(held.tensors, held.made, strict=True)
        if t.rebuildable and before.first > made
    }


def test_what_is_proven_stands_without_a_layout_and_limits_between_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layout that is far over takes as much off the limit; there are better plans in between."""
    net = case("one", None)
    limits = replace(net.limits, ram_bytes=7252)
    known: list[float] = []
    exact = schedule(net.stages(limits), net.start, "latency", (), known.append)
    assert known == [exact.bound]
    assert exact.schedule.cycles == exact.bound

    def none_beyond(most: int) -> None:
        def of(done: Schedule, problem: Problem, limits: Limits) -> Excess:
            return Excess(ram_bytes=1000 * (max(done.live) + done.state_bytes > most))

        monkeypatch.setattr(Excess, "of", of)

    none_beyond(0)
    with pytest.raises(InfeasibleError):
        schedule(net.stages(limits), net.start, "latency", (), known.append)
    assert known == [exact.bound] * 2
    none_beyond(7000)
    done = schedule(net.stages(limits), net.start, "latency", ())
    monkeypatch.setattr(scheduling, "NEARER", 0)
    off = schedule(net.stages(limits), net.start, "latency", ())
    assert exact.bound == done.bound == off.bound
    assert exact.schedule.cycles < done.schedule.cycles < off.schedule.cycles
