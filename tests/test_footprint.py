"""Footprints of decisions against the schedules that carry them out, and against the model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import nets
import plans
import pytest

from odt_plan.ir.graph import Graph
from odt_plan.ir.training import TrainingSpec
from odt_plan.planner import baselines
from odt_plan.planner.cost import code_bytes, flash_weights_bytes
from odt_plan.planner.device import load_device
from odt_plan.planner.footprint import measure
from odt_plan.planner.hint import hint
from odt_plan.planner.linear import SolverOptions
from odt_plan.planner.milp import Milp
from odt_plan.planner.problem import ALWAYS, Limits, Problem
from odt_plan.planner.schedule import realize
from odt_plan.planner.solution import Solution

BOARD = load_device(plans.BOARD)
WIDE = Limits(10**8, 10**8, None, None, 10**6)


def problem_of(forward: Graph, storage: str | None, spec: TrainingSpec | None = None) -> Problem:
    training = plans.training_of(forward, spec)
    return plans.problem_of(forward, training, WIDE, plans.cost_of(BOARD, storage), fixed=True)


@pytest.mark.parametrize(
    ("net", "storage", "spec"),
    [
        (lambda: nets.mlp((6, 8, 4)), "sdcard", None),
        (lambda: nets.cnn(2, 3, 4), None, None),
        (lambda: nets.cnn(2, 3, 4), None, TrainingSpec(optimizer="adam", micro_batches=3)),
        (lambda: nets.resnet(1, 2, 4), None, None),
        (lambda: nets.two_branches(4), "sdcard", None),
    ],
    ids=["mlp-paging", "cnn", "cnn-accumulate", "resnet", "two inputs"],
)
def test_a_footprint_is_what_the_schedule_takes(
    net: Callable[[], Graph], storage: str | None, spec: TrainingSpec | None
) -> None:
    problem = problem_of(net(), storage, spec)
    free = [a.index for a in problem.activities if a.kind in ("auxiliary", "rebuild")]
    loads = [(r.tensor.index, e.slot) for r in problem.retentions for e in r.events if e.may_load]
    loads = loads[:4]
    free = free[: 8 - len(loads) // 2]
    nodes = {n.name: n for n in problem.training.graph.nodes}
    seen = 0
    for bits in product((False, True), repeat=len(free) + len(loads)):
        active = frozenset(a for a, b in zip(free, bits, strict=False) if b) | {ALWAYS}
        paged = frozenset(x for x, b in zip(loads, bits[len(free) :], strict=True) if b)
        solution = Solution(active, paged)
        try:
            schedule = realize(problem, solution)
        except KeyError:
            continue  # a tensor that is read was never made
        found = measure(problem, solution)
        used = [nodes[n] for step in schedule.steps for n in step.nodes]
        took = flash_weights_bytes(problem.training) + code_bytes(used, len(schedule.steps))
        assert found.ram_bytes == max(schedule.live) + schedule.state_bytes, solution
        assert found.cycles == schedule.cycles, solution
        assert found.flash_bytes == took, solution
        seen += 1
    assert seen > 20


def test_a_hint_is_a_whole_solution_of_the_model() -> None:
    """The hint's columns, fixed, leave a feasible model whose objective is the footprint's."""
    problem = problem_of(nets.resnet(2, 4, 6), "sdcard")
    for rule in baselines.RULES.values():
        solution = rule(problem)
        found = measure(problem, solution)
        milp = Milp(problem)
        for column, value in hint(milp, solution).items():
            milp.c.lower[column] = milp.c.upper[column] = value
        for name, need in (("ram", found.ram_bytes), ("latency", found.cycles)):
            assert milp.solve(name, SolverOptions(gap=0.0)).value == pytest.approx(need, abs=0.5)
