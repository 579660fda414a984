"""Schedules of bare cost graphs: optimal by brute force, replayed, and told well."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_run import Cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schedules import cheapest, graph_of

from odt_plan import scheduling
from odt_plan.ir.errors import InfeasibleError, UsageError
from odt_plan.planner.check_program import CheckError
from odt_plan.planner.check_schedule import ScheduleStep, replay
from odt_plan.planner.cost_graph import CostGraph, costs_exactly, load_cost_graph
from odt_plan.planner.remat.cells import Cells, steps_of
from odt_plan.planner.remat.clauses import Clauses
from odt_plan.planner.remat.cpsat import Solved, solve
from odt_plan.planner.remat.greedy import RULES, greedy, polish
from odt_plan.planner.remat.instance import Instance, keep_all, trace
from odt_plan.planner.remat.neighbourhoods import improve
from odt_plan.planner.remat.schedule import Schedule, keep_all_peak, schedule, to_instance
from odt_plan.planner.remat.search import Options, Search
from odt_plan.planner.remat.stage_model import StageModel
from odt_plan.planner.remat.zones import Zones
from odt_plan.scheduling import parse_budget


def random_graph(seed: int, nodes: int, *, paging: bool) -> CostGraph:
    rng = random.Random(seed)
    edges = [(a, b) for b in range(nodes) for a in range(b) if rng.random() < 0.45]
    costs = [rng.randint(0, 9) for _ in range(nodes)]
    sizes = [rng.randint(0, 6) for _ in range(nodes)]
    price = (rng.randint(0, 2), rng.randint(0, 2)) if paging else None
    return graph_of(costs, sizes, edges, price)


def tight_budgets(graph: CostGraph) -> list[int]:
    """The least that any node needs, something between, and one less than keeping all takes."""
    instance, _ = to_instance(graph, budget_bytes=0, paging=False, quantity="energy")
    least, most = int(instance.need_bytes.max()), keep_all_peak(graph)
    return sorted({b for b in (least - 1, least, (least + most) // 2, most - 1, most) if b > 0})


# ---- optimality ---------------------------------------------------------------------------------


@pytest.mark.parametrize("paging", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_optimum_equals_brute_force(seed: int, paging: bool) -> None:
    graph = random_graph(seed, 6, paging=paging)
    for budget in tight_budgets(graph):
        expected = cheapest(graph, budget, paging=paging)
        if expected is None:
            with pytest.raises(InfeasibleError):
                schedule(graph, budget, paging=paging)
            continue
        found = schedule(graph, budget, paging=paging)
        assert found.status == "optimal"
        assert found.replay.cost == found.bound == expected
        assert found.replay.peak_bytes <= budget


def test_a_chain_under_half_of_its_memory() -> None:
    # forward 0..3, backward 4..7 reads the forward results in reverse: by hand, 2 nodes again
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (2, 5), (5, 6), (1, 6), (6, 7), (0, 7)]
    graph = graph_of([1] * 8, [1] * 8, edges)
    assert keep_all_peak(graph) == 5
    assert schedule(graph, 5).replay.cost == 8
    assert schedule(graph, 4).replay.cost == 9
    assert cheapest(graph, 4, paging=False) == 9


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**6), st.booleans())
def test_bound_objective_greedy_and_budgets_are_ordered(seed: int, paging: bool) -> None:
    graph = random_graph(seed, 9, paging=paging)
    last = None
    for budget in tight_budgets(graph):
        instance, unit = to_instance(graph, budget_bytes=budget, paging=paging, quantity="energy")
        plans = [polish(instance, p) for r in RULES if (p := greedy(instance, r)) is not None]
        try:
            found = schedule(graph, budget, paging=paging)
        except InfeasibleError:
            assert not plans
            assert last is None
            continue
        assert found.bound <= found.bound_in_stages <= found.bound_where_used
        assert found.bound_where_used <= found.replay.cost
        assert all(found.replay.cost <= trace(instance, p).cost * unit for p in plans)
        assert all(trace(instance, p).peak_bytes <= budget for p in plans)
        assert last is None or found.replay.cost <= last
        last = found.replay.cost
        steps = found.steps
        again = replay(graph, steps, budget_bytes=budget, paging=paging)
        assert again == found.replay


def problems(
    seeds: range, nodes: int, *, paging: bool
) -> Iterator[tuple[Instance, int, random.Random]]:
    """Problems with their optimum by brute force, over every order of operations."""
    for seed in seeds:
        graph = random_graph(seed, nodes, paging=paging)
        for budget in tight_budgets(graph):
            expected = cheapest(graph, budget, paging=paging)
            if expected is not None:
                instance, unit = to_instance(
                    graph, budget_bytes=budget, paging=paging, quantity="energy"
                )
                yield instance, round(expected / unit), random.Random(seed)


def solved_with_all_rows(stages: StageModel) -> Solved:
    n = stages.instance.nodes
    stages.demand({(z, v) for z in range(stages.stages) for v in range(n) if stages.zones[v] < z})
    return solve(stages, seconds=60.0, seed=0, threads=1)


@pytest.mark.parametrize("paging", [False, True])
def test_loose_models_hold_the_optimum_whatever_their_zones(paging: bool) -> None:
    tight = total = 0
    for instance, optimum, rng in problems(range(100, 112), 6, paging=paging):
        n = instance.nodes
        whole = StageModel(instance, optimum, depth=None, loose=True)
        solved = solved_with_all_rows(whole)
        assert solved.status == "optimal"
        assert solved.bound <= optimum
        total, tight = total + 1, tight + (solved.bound == optimum)
        ends = np.array(sorted({*rng.sample(range(n), rng.randint(1, n - 1)), n - 1}))
        zone = np.searchsorted(ends, np.arange(n))
        coarse = StageModel(instance, optimum, depth=None, loose=True, zone=zone)
        solved = solved_with_all_rows(coarse)
        assert solved.status == "optimal"
        assert solved.bound <= optimum
    assert tight > 0.9 * total  # they are relaxations, but good ones


@pytest.mark.parametrize("paging", [False, True])
def test_zones_prove_the_optimum_and_their_schedules_fit(paging: bool) -> None:
    closed = total = 0
    for instance, optimum, rng in problems(range(200, 212), 6, paging=paging):
        zones, bound, best = Zones(instance, gently=rng.random() < 0.5), 0, optimum + 5
        for _ in range(30):
            if zones.exhausted or bound >= best:
                break
            found, steps = zones.bound(best - 1, least=bound, seconds=60.0, seed=0, threads=1)
            bound = max(bound, found)
            if steps is not None:
                known = trace(instance, steps)
                assert known.peak_bytes <= instance.budget_bytes
                best = min(best, known.cost)
        assert bound <= optimum <= best
        total, closed = total + 1, closed + (bound == optimum)
    assert closed > 0.9 * total


@pytest.mark.parametrize("paging", [False, True])
def test_stage_models_hold_no_schedule_below_the_optimum(paging: bool) -> None:
    for instance, optimum, _ in problems(range(300, 308), 6, paging=paging):
        for depth in (None, 1, 2, instance.nodes):
            solved = solved_with_all_rows(StageModel(instance, optimum + 20, depth=depth))
            assert solved.status in ("optimal", "infeasible")
            assert solved.bound >= optimum
            below = StageModel(instance, optimum - 1, depth=depth)
            assert solved_with_all_rows(below).status == "infeasible"


def test_a_restricted_model_holds_the_known_schedule_beside_its_own() -> None:
    kept = 0
    for instance, optimum, _ in problems(range(400, 412), 7, paging=False):
        stages = StageModel(instance, optimum, depth=instance.nodes)
        best = solved_with_all_rows(stages)
        if best.values is None or best.bound > optimum:
            continue  # the optimum does not compute where it is read
        known = stages.cells(best.values)
        for depth in (1, 2):
            again = StageModel(instance, optimum, depth=depth, known=known)
            assert solved_with_all_rows(again).status == "optimal"
        alone = StageModel(instance, optimum, depth=1)
        kept += solved_with_all_rows(alone).status == "infeasible"
    assert kept  # there are schedules that depth 1 alone does not hold


def test_clauses_hold_what_their_rows_say() -> None:
    clauses = Clauses()
    rows = np.array([[2, -3, 0], [2, -2, 5], [1, 4, 0], [4, 4, -7], [0, 0, 6], [-8, 9, -8]])
    clauses.add(rows[:, 0], rows[:, 1:])
    codes, begin = clauses.flat()
    kept = [set(codes[a:b].tolist()) for a, b in itertools.pairwise(begin.tolist())]
    assert kept == [{2, -3}, {4, -7}, {6}, {-8, 9}]
    assert [b - a for a, b in itertools.pairwise(begin.tolist())] == [2, 2, 1, 2]
    assert not clauses.impossible
    clauses.add(np.array([[0, 0]]))
    assert clauses.impossible


def test_neighbourhoods_only_improve() -> None:
    graph = random_graph(5, 14, paging=False)
    budget = tight_budgets(graph)[2]
    instance, _ = to_instance(graph, budget_bytes=budget, paging=False, quantity="energy")
    start = greedy(instance, RULES[-1])
    assert start is not None
    better = improve(instance, start, until=float("inf"), seed=0, threads=1, found=lambda _: None)
    assert trace(instance, better).cost <= trace(instance, start).cost
    assert trace(instance, better).peak_bytes <= budget


def test_cells_and_steps_are_the_same_schedule() -> None:
    graph = random_graph(3, 12, paging=True)
    for budget in tight_budgets(graph):
        instance, _ = to_instance(graph, budget_bytes=budget, paging=True, quantity="energy")
        for rule in RULES:
            steps = greedy(instance, rule)
            if steps is not None:
                steps = polish(instance, steps)
                assert steps_of(instance, Cells.of(instance, steps)) == steps


def test_same_input_and_seed_give_the_same_schedule() -> None:
    graph = random_graph(8, 14, paging=True)
    budget = tight_budgets(graph)[1]
    runs = [
        schedule(graph, budget, paging=True, options=Options(seed=3, threads=t)).steps
        for t in (1, 1, 2, 2)
    ]
    assert runs[0] == runs[1]
    assert runs[2] == runs[3]


# ---- what real problems have ---------------------------------------------------------------------


def diamond(**changes: Any) -> Instance:
    """0 -> 1 -> 2 -> 3 -> 4, and 4 reads 0 and 1, too."""
    n = 5
    zero, no = np.zeros(n, np.int64), np.zeros(n, np.bool_)
    base = Instance(
        cost=np.array([3, 2, 1, 1, 1]),
        size_bytes=np.array([2, 2, 2, 2, 2]),
        scratch_bytes=zero,
        preds=((), (0,), (1,), (2,), (0, 1, 3)),
        budget_bytes=8,
        load_bytes=zero,
        last_stage=np.full(n, n - 1),
        lazy=no,
        keep=no,
    )
    return replace(base, **changes)


def optimum(instance: Instance) -> int | None:
    return Search(instance, Options()).run().cost


def test_last_stage_scratch_load_and_keep_are_obeyed() -> None:
    assert optimum(diamond()) == 8
    assert optimum(diamond(budget_bytes=7)) is None
    scratch = np.array([0, 0, 0, 1, 0])
    assert optimum(diamond(scratch_bytes=scratch)) == 8 + 2  # 0, 1, 2, 3 and one byte: 1 again
    assert optimum(diamond(load_bytes=scratch)) == 8 + 2
    late = np.array([4, 1, 4, 4, 4])  # 1 can't be computed again: 0 has to be
    assert optimum(diamond(scratch_bytes=scratch, last_stage=late)) == 8 + 3
    assert optimum(diamond(scratch_bytes=scratch, last_stage=np.arange(5))) is None
    keep = np.array([False, False, True, False, False])
    assert optimum(diamond(keep=keep)) is None  # 0, 1, 3, 4 and 2: ten bytes
    assert optimum(diamond(keep=keep, budget_bytes=10)) == 8


def test_lazy_nodes_are_made_when_they_are_needed() -> None:
    lazy = np.array([False, False, True, False, False])
    unread = diamond(lazy=lazy, preds=((), (0,), (1,), (1,), (0, 1, 3)))
    assert optimum(unread) == 7
    # read only by the last node: made in forward it would cost two bytes too many for stage 3
    late = diamond(lazy=lazy, preds=((), (0,), (1,), (1,), (1, 2, 3)), budget_bytes=8)
    assert optimum(late) == 8
    tight = replace(late, budget_bytes=8, scratch_bytes=np.array([0, 0, 0, 1, 0]))
    steps = Search(tight, Options()).run().best
    assert steps is not None
    assert optimum(tight) == 8
    assert trace(tight, steps).peak_bytes <= 8


# ---- the replay ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paged() -> tuple[CostGraph, list[ScheduleStep], int]:
    """A schedule that drops, computes again and pages."""
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (2, 4), (4, 5), (1, 5), (5, 6), (0, 6)]
    graph = graph_of([9, 9, 1, 1, 1, 1, 1], [3, 4, 3, 3, 2, 2, 2], edges, (1, 1))
    budget = 10
    found = schedule(graph, budget, paging=True)
    assert found.replay.paged_in
    assert found.replay.recomputed or found.replay.paged_in > 1
    return graph, list(found.steps), budget


def test_mutants_are_rejected_or_cost_what_they_cost(
    paged: tuple[CostGraph, list[ScheduleStep], int],
) -> None:
    graph, steps, budget = paged
    honest = replay(graph, steps, budget_bytes=budget, paging=True)
    assert cheapest(graph, budget, paging=True) == honest.cost
    killed = 0
    for i, step in enumerate(steps):
        mutants = [[*steps[:i], *steps[i + 1 :]], [*steps[:i], step, *steps[i:]]]
        mutants += [
            [*steps[:i], ScheduleStep(op=step.op, node=v), *steps[i + 1 :]]
            for v in range(len(graph.nodes))
            if v != step.node
        ]
        for mutant in mutants:
            try:
                other = replay(graph, mutant, budget_bytes=budget, paging=True)
            except CheckError:
                killed += 1
            else:  # another valid schedule: it can't be cheaper than the optimum
                assert other.cost >= honest.cost
    assert killed > 3 * len(steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [t for t in s if t.node != 0], "operand 0 is not in memory"),
        (lambda s: [t for t in s if (t.op, t.node) != ("compute", 2)], "operand 2 is not"),
        (lambda s: [s[0], *s], "is in memory already"),
        (lambda s: s[:5], "never computed"),
        (lambda s: [*s, ScheduleStep(op="drop", node=0)], "is not in memory"),
        (lambda s: [*s, ScheduleStep(op="page_in", node=3)], "was never written"),
        (lambda s: [*s, ScheduleStep(op="drop", node=99)], "no such node"),
        (lambda s: [t for t in s if t.op != "drop"], "the budget is 10 B"),
    ],
)
def test_replay_names_what_is_wrong(
    paged: tuple[CostGraph, list[ScheduleStep], int], change: Any, message: str
) -> None:
    graph, steps, budget = paged
    with pytest.raises(CheckError, match=message):
        replay(graph, change(steps), budget_bytes=budget, paging=True)


def test_replay_without_storage_and_first_computations_out_of_order(
    paged: tuple[CostGraph, list[ScheduleStep], int],
) -> None:
    graph, steps, _ = paged
    with pytest.raises(CheckError, match="there is no storage"):
        replay(graph, steps)
    two = graph_of([1, 1], [1, 1], [])
    with pytest.raises(CheckError, match="0 has to come first"):
        replay(two, [ScheduleStep(op="compute", node=v) for v in (1, 0)])


# ---- costs ---------------------------------------------------------------------------------------


def test_whole_costs_are_exact_and_others_are_rounded_down() -> None:
    assert costs_exactly([6.0, 9.0, 0.0], 15.0) == ([2, 3, 0], 3)
    assert costs_exactly([0.0], 0.0) == ([0], 1)
    values = [0.1, 1e-7, 3.25]
    integers, unit = costs_exactly(values, sum(values))
    for i, v in zip(integers, values, strict=True):
        assert 0 <= v - i * float(unit) < float(unit)
    assert float(unit) <= sum(values) * 2.0**-39


# ---- files and the command line ------------------------------------------------------------------


def written(tmp_path: Path, **changes: Any) -> Path:
    data: dict[str, Any] = {
        "name": "tiny",
        "nodes": [
            {"id": i, "name": f"n{i}", "cost_cpu_s": 1.0, "energy_J": 2.0, "mem_bytes": 4}
            for i in range(3)
        ],
        "edges": [[0, 1], [1, 2], [0, 2]],
        "order": [0, 1, 2],
    }
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(data | changes))
    return path


NODE = {"id": 0, "cost_cpu_s": 1.0, "mem_bytes": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": [[0, 1], [1, 0]]}, "a cycle: 0 -> 1 -> 0"),
        ({"edges": [[1, 1]]}, "a cycle: 1 -> 1"),
        ({"edges": [[0, 9]]}, "names 9, which is no node"),
        ({"edges": [[0]]}, r"edges\.0\.1: is missing"),
        ({"order": [0, 2, 1]}, "2 stands before its operand 1"),
        ({"order": [0, 1]}, "leaves nodes out"),
        ({"order": [0, 1, 1]}, "names 1 twice"),
        ({"nodes": [], "edges": [], "order": None}, "nodes: "),
        ({"nodes": [NODE, NODE], "edges": [], "order": None}, "id 0 is given twice"),
        ({"nodes": [NODE | {"cost_cpu_s": -1.0}]}, r"nodes\.0\.cost_cpu_s: -1\.0 should be"),
        ({"nodes": [NODE | {"mem_bytes": -1}]}, r"nodes\.0\.mem_bytes: -1 should be"),
        ({"nodes": [NODE | {"mem_bytes": 2**53 + 1}]}, "mem_bytes"),
        ({"nodes": [NODE | {"mem_bytes": 1.5}]}, "mem_bytes"),
        ({"nodes": [NODE | {"cost_cpu_s": float("nan")}]}, "cost_cpu_s"),
        ({"nodes": [NODE | {"cost_cpu_s": float("inf")}]}, "cost_cpu_s"),
        ({"nodes": [{"id": 0}]}, "cost_cpu_s: is missing"),
    ],
)
def test_bad_graphs_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as e:
        load_cost_graph(written(tmp_path, **changes))
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"nodes": ' + "[" * 5000])
def test_files_that_are_no_graphs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "graph.json"
    path.write_text(text)
    with pytest.raises(UsageError) as e:
        load_cost_graph(path)
    assert "\n" not in str(e.value)
    for other in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(UsageError):
            load_cost_graph(other)


def test_budgets() -> None:
    assert parse_budget("0.5", 101) == 50
    assert parse_budget("50%", 101) == 50
    assert parse_budget("1.0", 101) == 101
    assert parse_budget("320KB", 101) == 327_680
    assert parse_budget("1", 101) == 1
    for text in ("0", "0.0", "0.001", "120%", "-1", "nan", "x", str(2**53 + 1), "1e99"):
        with pytest.raises(UsageError, match="--budget"):
            parse_budget(text, 101)


def test_command_reports_writes_and_prints_json(odt: Cli, tmp_path: Path) -> None:
    path = written(tmp_path)
    done = odt("schedule", path, "--budget", "12", "-o", tmp_path / "s.json")
    assert (done.code, done.err) == (0, "")
    assert "12 B" in done.out
    assert "optimal" in done.out
    record = json.loads((tmp_path / "s.json").read_text())
    steps = [ScheduleStep(op=o, node=n) for o, n in record["steps"]]
    assert replay(load_cost_graph(path), steps, budget_bytes=12).cost == record["cost"] == 6.0
    assert odt("schedule", path, "--budget", "1.0", "--json").json["status"] == "optimal"
    timed = odt("schedule", path, "--budget", "1.0", "--json", "--objective", "time")
    assert timed.json["cost"] == 3.0


def test_report_tells_for_which_schedules_a_bound_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def open_gap(*args: Any, **kwargs: Any) -> Schedule:
        bounds = {"bound": 4.0, "bound_in_stages": 5.0, "bound_where_used": 6.0}
        return replace(schedule(*args, **kwargs), status="feasible", **bounds)

    monkeypatch.setattr(scheduling, "schedule", open_gap)
    scheduling.run_schedule(
        scheduling.ScheduleOptions(
            written(tmp_path), "12", False, None, 0.0, 5.0, 0, 1, None, False, False
        )
    )
    told = " ".join(capsys.readouterr().out.split())
    assert "energy 6, bound for every schedule 4, gap 33.3333%" in told
    assert "bound 5 among schedules that make a node at most once" in told
    assert "optimal among schedules that also compute again only right where it is read" in told


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--budget", "11"), 3, "'n2' (node 2) alone needs 12 B"),
        (("--budget", "12", "--paging"), 2, "paging needs"),
        (("--budget", "0"), 2, "--budget"),
        (("--budget", "2.5"), 2, "--budget"),
        (("--budget", "12", "-o", "absent/s.json"), 1, "no folder"),
    ],
)
def test_command_fails_in_one_line(
    odt: Cli, tmp_path: Path, args: tuple[str, ...], code: int, message: str
) -> None:
    done = odt("schedule", written(tmp_path), *args)
    assert done.code == code
    assert message in done.error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph.json"]


def test_smallest_budget_that_is_told_works(odt: Cli, tmp_path: Path) -> None:
    path = written(tmp_path)
    works = odt("schedule", path, "--budget", "5").error.rsplit(" ", 1)[1]
    assert odt("schedule", path, "--budget", works).code == 0
    assert odt("schedule", path, "--budget", str(int(works) - 1)).code == 3


def test_instances_of_other_planners(shared: Path) -> None:
    folder = shared / "instances"
    if not folder.is_dir():
        pytest.skip("no instances here")
    for path in sorted(folder.glob("*.json")):
        stated = json.loads(path.read_text())
        graph = load_cost_graph(path)
        assert keep_all_peak(graph) == stated["peak_storeall_bytes"]
        instance, unit = to_instance(graph, budget_bytes=1, paging=False, quantity="energy")
        once = float(instance.once_cost * unit)
        assert once == pytest.approx(stated["energy_storeall_J"], rel=1e-9)
        assert len(keep_all(instance)) == len(graph.nodes)
