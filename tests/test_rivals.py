"""The benchmark's programs of Checkmate and POET, against exhaustive search and our own."""

from __future__ import annotations

import random

import pytest
from benchmarks.rivals import GAP, ONCE, Run, StageProgram, State
from schedules import cheapest, graph_of

from odt_plan.planner.check_schedule import replay
from odt_plan.planner.cost_graph import CostGraph
from odt_plan.planner.linear import SolverName, SolverOptions
from odt_plan.planner.remat.schedule import keep_all_peak, schedule


def chain_with_skips(seed: int, nodes: int, *, paging: bool) -> CostGraph:
    rng = random.Random(seed)
    edges = [(i - 1, i) for i in range(1, nodes)]
    edges += [(rng.randrange(i - 1), i) for i in range(2, nodes)]
    costs = [rng.randint(1, 9) for _ in range(nodes)]
    sizes = [rng.randint(1, 6) for _ in range(nodes)]
    return graph_of(costs, sizes, sorted(set(edges)), (0, 1) if paging else None)


@pytest.mark.parametrize("paging", [False, True])
@pytest.mark.parametrize("solver", ["highs", "cp-sat"])
def test_optima_are_schedules_no_better_than_exhaustive_search(
    solver: SolverName, paging: bool
) -> None:
    """Where a stage needs nothing twice, they are the very optimum."""
    equal = 0
    for seed in range(6):
        graph = chain_with_skips(seed, 6, paging=paging)
        budget = keep_all_peak(graph) - 1
        best = cheapest(graph, budget, paging=paging)
        program = StageProgram(graph, budget, paging, whole=solver == "cp-sat")
        options = SolverOptions(solver, 0.0)
        found = program.c.solve(program.objective, options, maximize=False)
        if best is None:
            assert found.status == "infeasible"
            continue
        if found.values is None:
            assert found.status == "infeasible"  # only in stages
            continue
        once = sum(v.cost("energy") for v in graph.nodes)
        cost = sum(a * found.values[c] for c, a in program.objective) * once / ONCE
        done = replay(graph, list(program.steps(found.values)), budget_bytes=budget, paging=paging)
        assert done.cost <= cost + 1e-6
        assert done.cost >= best - 1e-9
        equal += done.cost == pytest.approx(best)
        ours = schedule(graph, budget, paging=paging)
        assert ours.replay.cost <= done.cost + 1e-9
    assert equal >= 3


def test_a_budget_of_keep_all_costs_nothing_and_one_byte_less_does() -> None:
    graph = graph_of([1] * 5, [2, 2, 2, 2, 2], [(0, 1), (1, 2), (2, 3), (0, 4), (3, 4)])
    for budget, overhead in ((keep_all_peak(graph), 0.0), (keep_all_peak(graph) - 1, None)):
        program = StageProgram(graph, budget, paging=False)
        found = program.c.solve(program.objective, SolverOptions("highs", 0.0), maximize=False)
        if overhead is None:
            assert found.status == "infeasible"
        else:
            assert found.bound == pytest.approx(ONCE)


def test_as_good_as_the_other_is_as_cheap_and_as_proven() -> None:
    run = Run((State(1.0, 5.0, 0.5), State(2.0, 2.0, 0.4), State(3.0, 2.0, GAP)), "optimal", "")
    assert run.until(State(9.0, 2.0, 0.0)) == run.states[2]
    assert run.until(State(9.0, 1.0, 0.0)) is None
    assert run.until(State(9.0, None, float("inf"))) == run.states[2]
    early = Run(run.states[:2], "time limit", "")
    assert early.until(State(9.0, 3.0, 0.45)) == run.states[1]
    assert early.until(State(9.0, None, float("inf"))) == run.states[0]
