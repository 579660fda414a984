"""Few cuts and makings that exclude all plans, and cores of programs without a solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from random_nets import random_net
from test_cuts import EXACT, Case

from odt_plan.planner.cuts import ANY, Program
from odt_plan.planner.linear import INF, LinearProgram, SolverName
from odt_plan.planner.progress import Watch
from odt_plan.planner.residency import Residency
from odt_plan.planner.unsat_core import unsat_core


def test_a_core_excludes_all_solutions_and_leaves_out_what_does_not_matter() -> None:
    program = LinearProgram()
    x, y, z = (program.column(integer=True) for _ in range(3))
    program.row([(x, 3.0), (y, 2.0)], lower=4.0)
    program.row([(x, 1.0), (z, 1.0)], upper=1.0)
    program.row([(z, 1.0)], lower=1.0)
    program.row([(y, 1.0), (z, 1.0)], upper=2.0)
    program.row([(x, 1.0), (y, 1.0), (z, 1.0)], lower=1.0)
    optional = {1: "either", 2: "z", 3: "both", 4: "any"}
    assert set(unsat_core(program, optional, EXACT) or ()) == {"either", "z"}
    assert unsat_core(program, {1: "one", 2: "one", 4: "any"}, EXACT) == ["one"]
    program.row_lower[2] = 0.0
    assert unsat_core(program, optional, EXACT) is None


def excludes(residency: Residency, cuts: Sequence[int], makes: Sequence[tuple[int, int]]) -> bool:
    """By themselves."""
    rooms = [int(residency.remakes.room[k]) for k in cuts]
    program = Program(residency.remakes, cuts, rooms, residency.prices, makes)
    return program.c.solve([], EXACT, maximize=False).status == "infeasible"


@pytest.mark.parametrize("solver", ["auto", "highs"])
@pytest.mark.parametrize("seed", [3, 7, 59])
def test_few_cuts_exclude_all_plans(seed: int, solver: SolverName) -> None:
    """And none of the tensors made at them can be left out."""
    net, options = Case(random_net(seed, 8 + seed % 14), updates=seed), replace(EXACT, gap=ANY)
    (high,) = net.budgets(1.0)
    least, _ = net.residency(high).least_ram(high, EXACT, Watch())
    fewer_cuts, fewer_makes = [], []
    for ram in (least // 4 * 4 - 4, least - 64, least - 256):
        residency = net.residency(ram)
        found = residency.search(options, Watch())
        assert found.bound == INF
        cuts, makes = residency.conflict(found, replace(options, solver=solver), Watch())
        assert set(cuts) <= set(found.cuts)
        assert set(makes) <= set(found.makes)
        assert excludes(residency, cuts, makes)
        for i in {i for _, i in makes}:
            assert not excludes(residency, cuts, [m for m in makes if m[1] != i])
        fewer_cuts.append(len(found.cuts) - len(cuts))
        fewer_makes.append(len(found.makes) - len(makes))
    assert max(fewer_cuts) > 0
    assert max(fewer_makes) > 0
