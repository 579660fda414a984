"""Every objective, and weighted sums of them, against brute force over small networks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import nets
import plans
import pytest
from onnx_files import export
from test_planner import WIDE, every_schedule, problem_of, ram_of, train_all

from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.graph import Graph
from odt_plan.ir.training import Candidate, TrainingSpec
from odt_plan.planner.cost import code_bytes, flash_weights_bytes
from odt_plan.planner.device import load_device
from odt_plan.planner.importance import prior
from odt_plan.planner.linear import SolverOptions
from odt_plan.planner.milp import Milp
from odt_plan.planner.objective import Weighted, parse_objective
from odt_plan.planner.pipeline import Request, make_plan
from odt_plan.planner.plan import ObjectiveName
from odt_plan.planner.problem import Problem
from odt_plan.planner.schedule import Schedule

EXACT = SolverOptions(gap=0.0, time_limit_s=30)
WEIGHTS: list[dict[ObjectiveName, float]] = [
    {"latency": 1.0, "ram": 1.0},
    {"latency": 1.0, "energy": 0.5, "flash": 2.0},
    {"ram": 3.0, "flash": 0.1, "energy": 1.0},
]


def figures(problem: Problem, s: Schedule, learn: float) -> dict[ObjectiveName, float]:
    """All figures of a schedule."""
    nodes = {n.name: n for n in problem.training.graph.nodes}
    used = [nodes[name] for step in s.steps for name in step.nodes]
    return {
        "learn": learn,
        "latency": s.cycles,
        "energy": problem.cost.energy_j(s.cycles, s.transfer_cycles),
        "ram": ram_of(s),
        "flash": flash_weights_bytes(problem.training) + code_bytes(used, len(s.steps)),
    }


@pytest.mark.parametrize("storage", [None, "sdcard"])
def test_every_objective_of_fixed_updates_equals_brute_force(storage: str | None) -> None:
    problem = train_all(nets.mlp((6, 8, 4)), storage)
    every = [figures(problem, s, 1.0) for s in every_schedule(problem)]
    references: dict[ObjectiveName, float] = {n: max(f[n] for f in every) for n in every[0]}
    goals = [Weighted(w, references) for w in WEIGHTS]
    for ram in sorted({f["ram"] for f in every})[:4]:
        kept = [f for f in every if f["ram"] <= ram]
        milp = Milp(replace(problem, limits=replace(problem.limits, ram_bytes=int(ram))))
        for name in ("latency", "energy", "ram", "flash"):
            result = milp.solve(name, EXACT)
            assert result.value == pytest.approx(min(f[name] for f in kept), rel=1e-6)
            assert result.bound == pytest.approx(result.value, rel=1e-5)
        for goal in goals:
            result = milp.solve(goal, EXACT)
            assert result.value == pytest.approx(min(goal.value(f) for f in kept), rel=1e-6)
            assert result.bound == pytest.approx(result.value, rel=1e-5)


@pytest.mark.parametrize("weight", [0.1, 0.4, 2.0])
def test_updates_weighed_against_latency_equal_brute_force(weight: float, tmp_path: Path) -> None:
    forward = nets.mlp((8, 6, 3))
    request = Request(
        export(forward, tmp_path),
        load_device(plans.BOARD),
        ram_bytes=10**6,
        objective={"learn": 1.0, "latency": weight},
        gap=0.0,
        time_limit_s=600.0,
        with_baselines=False,
    )
    plan = make_plan(request).plan
    (o,) = plan.objective
    terms = {t.name: t for t in o.terms}
    assert {n: t.weight for n, t in terms.items()} == {"learn": 1.0, "latency": weight}
    goal = Weighted(
        {n: t.weight for n, t in terms.items()}, {n: t.reference for n, t in terms.items()}
    )
    best = min(goal.value(f) for f in every_choice(forward))
    assert o.value == pytest.approx(best, rel=1e-6)
    assert o.bound == pytest.approx(best, rel=1e-5)
    assert plan.status == "optimal"


def every_choice(forward: Graph) -> list[dict[ObjectiveName, float]]:
    """Importance and least cycles of every update set, with plenty of everything."""
    every = candidates(forward)
    scores = prior(forward, every)
    by_param: dict[str, list[Candidate | None]] = {}
    for c in every:
        by_param.setdefault(c.param, [None]).append(c)
    result = []
    for combo in product(*by_param.values()):
        chosen = [c for c in combo if c is not None]
        if chosen:
            training = build_training(forward, TrainingSpec(), chosen)
            problem = problem_of(training, forward, WIDE, fixed=True)
            cycles = Milp(problem).solve("latency", EXACT).value
            result.append({"learn": sum(scores[c] for c in chosen), "latency": round(cycles)})
    return result


@pytest.mark.parametrize("name", ["latency", "energy", "ram", "flash"])
def test_a_plan_for_one_objective_is_proven(name: ObjectiveName, tmp_path: Path) -> None:
    request = Request(
        export(nets.cnn(), tmp_path),
        load_device(plans.BOARD),
        ram_bytes=10**6,
        train=("all",),
        objective=name,
        with_baselines=False,
    )
    plan = make_plan(request).plan
    assert [o.name for o in plan.objective] == [name]
    assert plan.objective[0].gap <= 1e-3
    assert plan.status == "optimal"


def test_an_objective_as_it_is_typed() -> None:
    assert parse_objective("latency") == "latency"
    assert parse_objective("energy=3") == "energy"
    assert parse_objective("latency=1, energy=0.5") == {"latency": 1.0, "energy": 0.5}
    assert parse_objective("learn,ram=2") == {"learn": 1.0, "ram": 2.0}
