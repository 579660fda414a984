"""Branching and cores against the solver alone, and the rows that are left out of the program."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_choices import WIDE, small

from odt_plan.ir.autodiff import build_training
from odt_plan.planner import milp, timeline
from odt_plan.planner.core import Tree, optimize
from odt_plan.planner.linear import Effort, LinearProgram, LinearResult, SolverOptions
from odt_plan.planner.milp import Milp
from odt_plan.planner.occupancy import Occupancy
from odt_plan.planner.problem import Problem
from odt_plan.planner.progress import Progress, Watch


def knapsack(seed: int) -> tuple[LinearProgram, list[tuple[int, float]], list[int]]:
    """Items that need a prefix of a chain, whose links take room: what training depth is like."""
    rng, c = np.random.default_rng(seed), LinearProgram()
    links = [c.column(integer=True) for _ in range(5)]
    for deep, shallow in pairwise(links):
        c.row([(shallow, 1.0), (deep, -1.0)], lower=0.0)
    items = [c.column(integer=True) for _ in range(14)]
    for i, item in enumerate(items):
        c.row([(links[i % 5], 1.0), (item, -1.0)], lower=0.0)
    room = [(i, float(rng.integers(5, 60))) for i in (*items, *links)]
    c.row(room, upper=float(rng.integers(60, 400)))
    return c, [(i, float(rng.integers(1, 1000))) for i in items], links


@pytest.mark.parametrize("gap", [0.0, 0.001, 0.05])
@pytest.mark.parametrize("maximize", [True, False])
def test_cores_agree_with_the_solver_alone(gap: float, *, maximize: bool) -> None:
    for seed in range(12):
        program, gain, links = knapsack(seed)
        objective = [(c, a if maximize else -a) for c, a in gain]
        alone = program.solve(
            objective, SolverOptions("highs", gap=0.0, time_limit_s=60), maximize=maximize
        )
        options = SolverOptions(gap=gap, time_limit_s=60)
        found = optimize(program, objective, options, maximize=maximize, branch=links)
        assert alone.values is not None
        assert found.values is not None
        best, value = (sum(a * r.values[c] for c, a in objective) for r in (alone, found))
        sign = 1 if maximize else -1
        assert sign * found.bound >= sign * best - 1e-6, "a bound"
        assert abs(found.bound - value) / abs(value) <= (gap or 1e-9), "within it as plans tell it"
        assert found.status == "optimal"


@pytest.mark.parametrize("maximize", [True, False])
def test_a_tighter_program_begins_with_the_parts_of_a_looser_one(*, maximize: bool) -> None:
    """It has the optimum that it has alone, and LPs of parts that are out of question are saved."""
    parts = 0
    for seed in range(12):
        program, gain, links = knapsack(seed)
        objective = [(c, a if maximize else -a) for c, a in gain]
        options, tree = SolverOptions(gap=0.0, time_limit_s=60), Tree()
        loose = optimize(
            program, objective, options, maximize=maximize, branch=links, tree=tree
        )
        parts += len(tree.parts)
        sign = -1 if maximize else 1
        assert min(p.bound for p in tree.parts) >= sign * loose.bound - 1e-6
        assert loose.values is not None
        taken = [c for c, _ in gain if loose.values[c] > 0.5]
        program.row([(c, 1.0) for c in taken], upper=len(taken) - 1.0)
        alone, with_tree = (
            optimize(program, objective, options, maximize=maximize, branch=links, tree=t)
            for t in (None, tree)
        )
        assert alone.values is not None
        assert with_tree.values is not None
        best, value = (sum(a * r.values[c] for c, a in objective) for r in (alone, with_tree))
        assert value == pytest.approx(best)
        assert with_tree.bound == pytest.approx(best)
    assert parts > 12, "something was branched on"


def test_what_a_core_leaves_open_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that stops within the gap proves its bound, not its solution."""

    def answer(
        program: LinearProgram, *_: object, effort: Effort | None = None, **__: object
    ) -> LinearResult:
        if not any(program.integer):
            return LinearResult("optimal", -97.5, np.array([-97.5]), 0.0, np.zeros(1))
        if effort is not None and effort.root_only:
            return LinearResult("feasible", -97.5, np.array([-95.0]), 0.0)
        return LinearResult("optimal", -97.2, np.array([-96.5]), 0.0)

    monkeypatch.setattr(LinearProgram, "solve", answer)
    program = LinearProgram()
    column = program.column(integer=True, lower=-100.0)
    found = optimize(program, [(column, 1.0)], SolverOptions(gap=0.01), maximize=False)
    assert found.values is not None
    assert (found.bound, found.values[0]) == (-97.2, -96.5)


def test_infeasible_is_told() -> None:
    program, gain, links = knapsack(0)
    program.row(gain, lower=1e9)
    found = optimize(program, gain, SolverOptions(), maximize=True, branch=links)
    assert found.status == "infeasible"
    assert found.values is None


def learning() -> Problem:
    """The joint problem in which only auxiliary tensors are made late."""
    case = small()
    stages = case.stages()
    training = build_training(case.lowered, case.spec, case.start.updates)
    choices = stages.choices(case.start, case.lowered, case.free)
    return stages.problem(training, fixed=False, choices=choices)


def test_large_programs_are_solved_like_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "LEARN_REBUILDS", 0)
    problem, options = learning(), SolverOptions(gap=0.0, time_limit_s=60)
    least = Milp(problem).solve("ram", options).value
    most = Milp(problem).solve("learn", options).solution
    assert most is not None
    values = set()
    for ram in range(round(least), round(least) + 3000, 400):
        limited = replace(problem, limits=replace(WIDE, ram_bytes=ram))
        one = Milp(limited).solve("learn", options)
        with monkeypatch.context() as patch:
            patch.setattr(milp, "LARGE", 0)
            program = Milp(limited)
            assert program._tight()
            other = program.solve("learn", options)
        assert other.status == "optimal"
        assert other.value == pytest.approx(one.value)
        assert other.bound == pytest.approx(one.bound)
        values.add(round(one.value))
    assert len(values) > 2


def test_free_rebuilding_is_a_bound() -> None:
    case = small()
    whole = [c for c in case.start.updates if c.channels is None]
    training = build_training(case.lowered, case.spec, whole)
    options = SolverOptions(gap=0.0, time_limit_s=60)
    for rebuild in (False, True):
        problem = case.stages().problem(training, fixed=True, rebuild=rebuild)
        for name in ("latency", "ram"):
            bound = Milp(problem, relaxed=True).solve(name, options).bound
            assert bound <= Milp(problem).solve(name, options).value + 1e-6


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(-4, 9), st.integers(0, 3)),
        max_size=12,
    )
)
def test_slots_without_a_row_are_never_the_only_peak(
    ranges: list[tuple[int, int, int, int]],
) -> None:
    live = Occupancy(10)
    for a, b, size, column in ranges:
        live.add(min(a, b), max(a, b), column, size)
    rng = np.random.default_rng(0)
    peaks = live.peaks()
    rows, columns, sizes = live.held(peaks)
    more, changed, by = live.changes(peaks)
    for _ in range(8):
        values = rng.integers(0, 2, 4).astype(float)
        every = live.live(values)
        assert max(every) == max(every[peaks])
        held = np.zeros(len(peaks))
        np.add.at(held, rows, sizes * values[columns])
        assert np.allclose(held, every[peaks])
        change = np.zeros(len(peaks))
        np.add.at(change, more, by * values[changed])
        assert np.allclose(np.cumsum(change), every[peaks])


@pytest.mark.parametrize("seed", range(6))
def test_a_stopped_search_returns_what_it_began_from(seed: int) -> None:
    program, gain, links = knapsack(seed)
    best = program.solve(gain, SolverOptions("highs", gap=0.0), maximize=True).values
    assert best is not None
    worse = {c: round(x) for c, x in enumerate(best)}
    worse[next(c for c, _ in gain if worse[c])] = 0
    value, most = (sum(a * v[c] for c, a in gain) for v in (worse, best))
    told: list[Progress] = []

    def stop(p: Progress) -> None:
        told.append(p)
        watch.stop()

    watch = Watch(stop)
    found = optimize(
        program, gain, SolverOptions(gap=0.0), maximize=True, branch=links, watch=watch,
        unit=2.0, hint=worse,
    )  # fmt: skip
    assert found.values is not None
    assert value - 1e-6 <= sum(a * found.values[c] for c, a in gain) <= most + 1e-6
    assert found.bound >= most - 1e-6
    assert told[0].best == pytest.approx(2 * value)
    assert told[0].bound is not None
    assert told[0].bound >= 2 * most - 1e-6


def test_a_hint_that_is_no_solution_changes_nothing() -> None:
    program, gain, links = knapsack(1)
    best = program.solve(gain, SolverOptions("highs", gap=0.0), maximize=True)
    for hint in (dict.fromkeys(range(len(program.lower)), 1.0), {gain[0][0]: 1.0}, {0: 2.0}):
        options = SolverOptions(gap=0.0)
        found = optimize(program, gain, options, maximize=True, branch=links, hint=hint)
        assert found.status == "optimal"
        assert found.bound == pytest.approx(best.bound)
