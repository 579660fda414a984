"""Rates of kernels: how they are found, and that every operator has one."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import plans
import pytest
from op_cases import cases

from odt_plan.ir.opdef import Work, works
from odt_plan.planner.cost import CostModel
from odt_plan.planner.device import bundled_ids, load_core, load_device

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.calibrate import nonnegative

CORES = [load_core(c) for c in bundled_ids("cores")]


def _by_subsets(a: np.ndarray, b: np.ndarray) -> float:
    """Least squared error of all subsets of columns whose solution is not negative."""
    best = float(b @ b)
    for size in range(1, a.shape[1] + 1):
        for chosen in map(list, combinations(range(a.shape[1]), size)):
            x = np.linalg.lstsq(a[:, chosen], b, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, float(np.sum((a[:, chosen] @ x - b) ** 2)))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_rates_have_the_least_squared_error(seed: int) -> None:
    """As all subsets of rates tried out; figures of counts differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    a = rng.random((12, 5)) * 10.0 ** rng.integers(0, 6, 5)
    b = a @ np.maximum(rng.standard_normal(5), 0) / 1000 + rng.standard_normal(12) * 10
    x = nonnegative(a, b)
    assert (x >= 0).all()
    assert np.sum((a @ x - b) ** 2) == pytest.approx(_by_subsets(a, b), rel=1e-9)


def test_rates_of_equal_and_absent_columns() -> None:
    """Counts that are proportional, and a loop that never runs."""
    ones = np.arange(1.0, 7.0)
    a = np.stack([ones, 2 * ones, 0 * ones], axis=1)
    x = nonnegative(a, 6 * ones)
    assert (x >= 0).all()
    assert x[2] == 0
    assert a @ x == pytest.approx(6 * ones)


def test_work_has_a_price_on_every_core() -> None:
    """Of every sample of every operator."""
    for case in cases():
        for work in works(case.node):
            counts = (work.amount, work.passes, work.loops, work.outputs)
            assert all(isinstance(n, int) and n >= 0 for n in counts), (case.name, counts)
            assert work.operator, case.name
            assert all(core.rate(work).value >= 0 for core in CORES), case.name


def test_an_operator_without_rates_of_its_own_has_those_of_its_class() -> None:
    core = load_core("cortex-m7")
    assert core.operators is not None
    own = core.operators.rates["Conv"]["pointwise"]
    assert core.rate(Work("pointwise", 1, operator="Conv")) == own
    general = core.instructions["f32"]["pointwise"]
    assert core.rate(Work("pointwise", 1, operator="Another")) == general
    assert core.rate(Work("pool", 1, operator="Conv")) == core.instructions["f32"]["pool"]


def test_nodes_cost_the_same_after_all_others_as_alone() -> None:
    """What is known of one node is taken for no other than its like."""
    device = load_device(plans.BOARD)
    core = load_core(device.core)
    shared = CostModel(device, core, None)
    for case in cases():
        assert shared.node_cycles(case.node) == CostModel(device, core, None).node_cycles(case.node)
