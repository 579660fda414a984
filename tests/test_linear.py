"""Programs of large numbers: no solver leaves out solutions because of their size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nets
import numpy as np
import plans
import pytest
from onnx_files import export

from odt_plan.ir.graph import Graph, TensorType
from odt_plan.planner.bounds import most_gain
from odt_plan.planner.choice import ChoiceByCuts
from odt_plan.planner.device import load_device
from odt_plan.planner.imported import import_requested
from odt_plan.planner.linear import INF, LinearProgram, SolverName, SolverOptions
from odt_plan.planner.milp import Milp
from odt_plan.planner.pipeline import Planner, Request
from odt_plan.planner.progress import Watch

EXACT = SolverOptions(gap=0.0)


@pytest.mark.parametrize("solver", ["highs", "scip", "cp-sat"])
@pytest.mark.parametrize("size", [1e6, 2e7, 3e8])
def test_bytes_beyond_ten_million_are_added_up(size: float, solver: SolverName) -> None:
    program = LinearProgram()
    taken = [program.column(integer=True) for _ in range(2)]
    total = program.column(integer=False, upper=INF)
    program.row([(total, 1.0), *((c, -size) for c in taken)], 0.0, 0.0)
    peak = program.column(integer=False, upper=INF)
    program.row([(total, 1.0), (taken[0], 100.0), (peak, -1.0)], upper=0.0)
    program.row([(peak, 1.0)], upper=1.5 * size)
    found = program.solve([(c, 1.0) for c in taken], replace(EXACT, solver=solver), maximize=True)
    assert found.status == "optimal"
    assert found.bound == pytest.approx(1.0)
    assert found.values is not None
    assert found.values[total] == pytest.approx(size)


def test_large_weights_are_chosen(tmp_path: Path) -> None:
    """The state of 12 MB fits, and all solvers know it."""
    g, rng = Graph("wide"), np.random.default_rng(0)
    x = g.add_input("x", TensorType((1, 1000)))
    x = nets.relu(g, nets.dense(g, rng, x, "wide", 3000), "relu")
    g.outputs = [nets.dense(g, rng, x, "head", 4)]
    g.verify()
    request = Request(
        export(g, tmp_path), load_device(plans.BOARD), ram_bytes=10**8, flash_bytes=10**9
    )
    planner = Planner(request, import_requested(request, watch := Watch()), watch)
    stages, start = planner.prepared
    problem = stages.learn_problem(start.decided, fixed=False, free=())
    for program in (ChoiceByCuts(problem, (), "learn"), Milp(problem)):
        found = program.solve("learn", EXACT)
        assert found.status == "optimal"
        assert found.value == found.bound == most_gain(problem)
