"""Plans that hold checkpoints: against proofs by cuts, and what the timeline says of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from random_nets import random_net
from test_cuts import EXACT, PLENTY, Case, deep, figures

from odt_plan.planner.checkpoints import Checkpoints
from odt_plan.planner.cuts import ANY, excludes
from odt_plan.planner.footprint import measure
from odt_plan.planner.linear import INF
from odt_plan.planner.progress import Watch
from odt_plan.planner.remakes import Found, Remade
from odt_plan.planner.residency import Residency

ANY_PLAN = replace(EXACT, gap=ANY)


def net(seed: int) -> Case:
    """Of 8 to 21 nodes; of every other one parts of weights are updated."""
    return Case(random_net(seed, 8 + seed % 14), updates=seed if seed % 2 else None)


def held(residency: Residency) -> Checkpoints:
    """The plan of checkpoints."""
    assert residency.checkpoints is not None
    return residency.checkpoints


def found_by(residency: Residency) -> Found:
    """It as what a search has found."""
    made = held(residency).made
    return Found(made, residency.prices.of(residency.remakes, made), 0.0)


def least_by_checkpoints(case: Case) -> int:
    """Bytes with which they fit; 4 less, and they don't."""
    low, high = 0, case.residency(PLENTY).remakes.over(Remade()) + PLENTY
    while high - low > 4:
        middle = (low + high) // 8 * 4
        if held(case.residency(middle)).over <= 0:
            high = middle
        else:
            low = middle
    return high


def test_no_plan_takes_less_ram() -> None:
    """Below what they need cuts prove that nothing fits; rarely, that a few bytes less do."""
    least = 0
    for seed in range(12, 24):
        case = net(seed)
        ram = least_by_checkpoints(case)
        plan = case.residency(ram)
        assert figures(plan, found_by(plan))[0].ram_bytes <= ram
        none = case.residency(ram - 8).search(ANY_PLAN, Watch())
        least += (none.made, none.bound) == (None, INF)
        none = case.residency(ram - ram // 50 - 8).search(ANY_PLAN, Watch())
        assert (none.made, none.bound) == (None, INF)
    assert least >= 11


def test_a_plan_that_takes_less_is_not_excluded() -> None:
    """This network is the rare one: cuts find what checkpoints miss."""
    case = net(17)
    tight = case.residency(least_by_checkpoints(case) - 8)
    assert held(tight).over > 0
    found = tight.search(ANY_PLAN, Watch())
    assert figures(tight, found)[0].ram_bytes <= tight.plain.limits.ram_bytes
    assert found.bound < INF


def test_the_cuts_where_they_exceed_the_budget_mostly_prove_that_nothing_fits() -> None:
    """And exclude nothing where it does."""
    proven = 0
    for seed in range(10):
        case = net(seed)
        least = least_by_checkpoints(case)
        tight, enough = case.residency(least - 8), case.residency(least)
        slots, makes = held(tight).critical
        known = tight.prices, slots, makes, EXACT, Watch()
        proven += excludes(tight.remakes, *known)
        assert not excludes(enough.remakes, *known)
    assert proven >= 9


@pytest.mark.parametrize("seed", range(12))
def test_what_checkpoints_cost_is_what_the_timeline_says(seed: int) -> None:
    """At every budget; with enough RAM nothing is made again."""
    case = net(seed)
    least = least_by_checkpoints(case)
    every = case.residency(PLENTY)
    assert not held(every).made.again
    top = every.remakes.over(Remade()) + PLENTY
    prices = []
    for part in (0.0, 0.5, 1.0):
        ram = least + int((top - least) * part)
        residency = case.residency(ram)
        found = found_by(residency)
        needs, value = figures(residency, found)
        assert needs.ram_bytes <= ram
        assert value == pytest.approx(residency.total(found.price), rel=1e-9)
        assert held(residency).over + ram >= needs.ram_bytes
        assert residency.total(residency.search(EXACT, Watch()).bound) <= value * (1 + 1e-9)
        prices.append(found.price)
    assert prices[0] >= prices[-1] == 0.0


def test_a_search_that_has_no_time_has_the_plan_of_checkpoints() -> None:
    """No program is solved; with time enough a plan is found that costs no more."""
    case = net(8)
    ram = least_by_checkpoints(case)
    first = case.residency(ram).first()
    assert first is not None
    assert first.price <= found_by(case.residency(ram)).price
    begun = case.residency(ram).search(EXACT, Watch(limit_s=0.0))
    assert begun.made is not None
    assert begun.price == first.price
    best = case.residency(ram).search(EXACT, Watch())
    assert best.price <= first.price
    decided = case.residency(ram).decided(best)
    assert decided is not None
    assert measure(*decided).ram_bytes <= ram


def test_large_networks_are_left_to_eviction() -> None:
    """Their states would take too long, and memory is rarely that short."""
    assert Checkpoints.small(net(3).residency(PLENTY).remakes)
    assert Case(deep(600)).residency(PLENTY).checkpoints is None
