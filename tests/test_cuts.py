"""Programs over few cuts of the timeline against the whole model, and networks of 1,000 nodes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import nets
import numpy as np
import plans
import pytest
import test_choices as choices
from random_nets import random_net

from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.graph import Graph, TensorType
from odt_plan.ir.training import TrainingGraph, TrainingSpec
from odt_plan.planner import cuts
from odt_plan.planner.device import load_device
from odt_plan.planner.footprint import Footprint, measure
from odt_plan.planner.importance import prior
from odt_plan.planner.linear import INF, SolverOptions
from odt_plan.planner.milp import Milp, SolveResult
from odt_plan.planner.objective import Goal
from odt_plan.planner.plan import ObjectiveName
from odt_plan.planner.problem import Limits, Problem
from odt_plan.planner.progress import Watch
from odt_plan.planner.remakes import Found, Remade
from odt_plan.planner.residency import Residency
from odt_plan.planner.solution import Solution
from odt_plan.planner.timeline import Rebuilds, build_problem

PLENTY = 1 << 40
EXACT = SolverOptions(gap=0.0, time_limit_s=60.0)


@dataclass(frozen=True)
class Case:
    """A network of which everything is updated, or what a seed draws: parts of weights, too."""

    forward: Graph
    updates: int | None = None
    storage: str | None = None
    micro_batches: int = 1
    goal: Goal = "latency"

    @cached_property
    def training(self) -> TrainingGraph:
        """Forward, backward and all updates."""
        spec = TrainingSpec(micro_batches=self.micro_batches)
        updates = plans.whole(self.forward)
        if self.updates is not None:
            rng, drawn = np.random.default_rng(self.updates), candidates(self.forward)
            updates = [
                every[int(rng.integers(len(every)))]
                for u in updates
                if rng.random() < 0.8 and (every := [c for c in drawn if c.param == u.param])
            ]
        return build_training(self.forward, spec, updates or plans.whole(self.forward)[-1:])

    def problem(self, ram: int, rebuild: bool | Rebuilds = True) -> Problem:
        cost = plans.cost_of(load_device(plans.BOARD), self.storage)
        limits = Limits(ram, PLENTY, storage_bytes=10**6 if self.storage else 0)
        scores = prior(self.forward, [u.candidate for u in self.training.updates])
        return build_problem(
            self.training, cost, limits, scores, fixed_updates=True, rebuild=rebuild
        )

    def residency(self, ram: int) -> Residency:
        return Residency(
            self.problem(ram, rebuild=False), lambda r: self.problem(ram, r), self.goal
        )

    def whole(self, ram: int, goal: Goal | None = None) -> SolveResult:
        """The optimum of the whole model."""
        return Milp(self.problem(ram)).solve(goal or self.goal, EXACT)

    def budgets(self, *parts: float) -> list[int]:
        """RAM between the least and what keeping everything takes."""
        least = round(self.whole(PLENTY, "ram").value)
        most = self.whole(PLENTY)
        assert most.solution is not None
        top = measure(self.problem(PLENTY), most.solution).ram_bytes
        return [int(least + (top - least) * part) // 4 * 4 for part in parts]


def case(seed: int) -> Case:
    """Every other one pages, every third one accumulates, every fourth one is i8."""
    forward = random_net(seed, 6 + seed % 14, quantized=seed % 4 == 3)
    if forward.quantization:
        forward = choices.Case(forward, ()).lowered
    goal: ObjectiveName = "energy" if seed % 5 == 0 else "latency"
    storage = "sdcard" if seed % 2 else None
    return Case(forward, None, storage, 1 + seed % 3 // 2, goal)


def figures(residency: Residency, found: Found) -> tuple[Footprint, float]:
    """What a plan takes, measured on the timeline, and its value."""
    decided = residency.decided(found)
    assert decided is not None
    needs = measure(*decided)
    return needs, float(needs.cycles) if residency.goal == "latency" else needs.energy_j


def by_cuts(residency: Residency, options: SolverOptions = EXACT) -> Found:
    """The search that begins with no plan, and with no cut that checkpoints tell."""
    r = residency
    return cuts.search(r.remakes, r.prices, r.base, options, Watch())


def test_cuts_reach_the_optimum_of_the_whole_model() -> None:
    """Rarely, and near the least RAM, is none of their plans an optimal one."""
    met = [m for seed in range(10) for m in cuts_against_the_whole_model(seed)]
    assert sum(met) >= 0.85 * len(met)


def cuts_against_the_whole_model(seed: int) -> list[bool]:
    """At each budget the bound is below the optimum; plans cost what their footprint says.

    Returns whether they cost no more than the optimum.
    """
    net, met = case(seed), []
    for ram in net.budgets(0.0, 0.2, 0.4, 0.6, 0.8):
        residency, whole = net.residency(ram), net.whole(ram)
        found = residency.search(EXACT, Watch())
        assert residency.total(found.bound) <= whole.value * (1 + 1e-9)
        for f in (found, residency.first()):
            if f is None or f.made is None:
                continue
            needs, value = figures(residency, f)
            assert needs.ram_bytes <= ram
            assert value == pytest.approx(residency.total(f.price), rel=1e-9)
            assert value >= residency.total(found.bound) * (1 - 1e-9)
            # the moments that are counted without a timeline are those of the timeline
            assert residency.remakes.over(f.made) + ram >= needs.ram_bytes
        met.append(residency.total(found.price) <= whole.value * (1 + 1e-9))
    return met


def test_a_gap_leaves_plans_and_bounds_true() -> None:
    """Plans that are better by less than it are not sought; the bound excludes none of them."""
    found = [f for seed in range(8) for f in with_and_without_a_gap(seed, 0.1)]
    assert any(loose > exact for exact, loose in found), "none was left out"


def with_and_without_a_gap(seed: int, gap: float) -> list[tuple[float, float]]:
    """Values of the plans, where the best one is proven."""
    net, found = case(seed), []
    for ram in net.budgets(0.1, 0.3, 0.5, 0.7):
        residency = net.residency(ram)
        exact, loose = (
            residency.search(replace(EXACT, gap=g), Watch()) for g in (0.0, gap)
        )
        if exact.made is None or exact.bound < exact.price * (1 - 1e-9):
            continue
        best, value = residency.total(exact.price), residency.total(loose.price)
        assert residency.total(loose.bound) <= best * (1 + 1e-9) <= value * (1 + 2e-9)
        assert value - residency.total(loose.bound) <= gap * value
        found.append((best, value))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_moments_of_parts_of_weights_are_those_of_the_timeline(seed: int) -> None:
    """Leading channels that forward cuts off keep what they are cut from until then."""
    net = Case(random_net(seed, 14), updates=seed)
    for ram in net.budgets(0.0, 0.3, 0.6):
        residency = net.residency(ram)
        found = residency.search(replace(EXACT, gap=cuts.ANY), Watch())
        if found.made is not None:
            assert (
                residency.remakes.over(found.made) + ram == figures(residency, found)[0].ram_bytes
            )
        nothing = Remade()  # all that is auxiliary is made in forward
        problem, solution = residency.remakes.laid_out(residency.build, nothing)
        moments, live = residency.remakes.run(nothing).live, measure(problem, solution).live
        assert moments.max() == live.max()
        assert set(moments) >= set(live)  # moments of steps that do not run come on top


def test_what_programs_decide_can_be_carried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made again before backward, where no step could do it."""
    run, carried = cuts._Carried.run, []

    def kept(decisions: cuts._Carried) -> Remade | None:
        carried.append(run(decisions))
        return carried[-1]

    monkeypatch.setattr(cuts._Carried, "run", kept)
    for seed in (1, 4, 20):
        net = Case(random_net(seed, 8 + seed % 14), updates=seed)
        for ram in net.budgets(0.0, 0.2):
            by_cuts(net.residency(ram), replace(EXACT, gap=cuts.ANY))
    assert len(carried) > 10
    assert all(made is not None for made in carried)


@pytest.mark.parametrize("seed", range(12))
def test_cuts_at_every_step_find_a_plan_at_the_least_ram(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where few cuts have told nothing, all of them together decide, both ways."""
    monkeypatch.setattr(cuts, "PATIENCE", 0)
    net = Case(random_net(seed, 6 + seed), updates=seed)
    (least,) = net.budgets(0.0)
    found = by_cuts(net.residency(least), replace(EXACT, gap=cuts.ANY))
    assert found.made is not None
    assert figures(net.residency(least), found)[0].ram_bytes <= least
    low, less = net.residency(PLENTY).least_ram(least, EXACT, Watch())
    top = least if less is None else measure(*less).ram_bytes
    assert top - low <= 4, "all cuts leave nothing open"


def test_too_little_room_at_few_cuts_proves_nothing_but_all_cuts_do() -> None:
    """Where cuts were given less room than there is, and then have no solution."""
    net = Case(random_net(20, 14), updates=20)
    (high,) = net.budgets(1.0)
    low, less = net.residency(high).least_ram(high, EXACT, Watch())
    least = high if less is None else measure(*less).ram_bytes
    for ram, fits in ((least, True), (least - 1, False)):
        assert fits or low > ram // 4 * 4, "buffers are of 4 bytes"
        found = by_cuts(net.residency(ram), replace(EXACT, gap=cuts.ANY))
        assert (found.made is not None) == fits
        assert (found.bound == INF) == (not fits)


@pytest.mark.parametrize("seed", range(12))
def test_less_than_the_least_ram_is_told_or_left_open(seed: int) -> None:
    """No plan is found where there is none; what is proven is true.

    Less than the whole model's least may do: it makes things again right before they are read.
    """
    net = case(seed)
    (least,) = net.budgets(0.0)
    assert net.whole(least - 4).status == "infeasible"
    assert net.residency(least).search(EXACT, Watch()).bound < INF
    low, less = net.residency(PLENTY).least_ram(least, EXACT, Watch())
    if less is not None:
        ram = measure(*less).ram_bytes
        assert low <= ram < least
        found = net.residency(ram).search(replace(EXACT, gap=cuts.ANY), Watch())
        assert found.made is not None, "there is a plan"
    assert net.residency(low - 4).search(EXACT, Watch()).made is None


def deep(nodes: int) -> Graph:
    """Residual blocks of two layers, about so many nodes."""
    g, rng = Graph("deep"), np.random.default_rng(0)
    x = g.add_input("x", TensorType((1, 4, 8, 8)))
    i = 0
    while len(g.nodes) < nodes - 3:
        y = nets.relu(g, nets.conv(g, rng, x, f"a{i}", 8), f"ra{i}")
        y = nets.conv(g, rng, y, f"b{i}", 4)
        x = nets.relu(g, g.add_node("Add", (x, y), name=f"add{i}").out, f"rb{i}")
        i += 1
    x = g.add_node("GlobalAveragePool", (x,), name="pool").out
    g.outputs = [nets.dense(g, rng, nets.flat(g, x), "fc", 4)]
    g.verify()
    return g


def test_a_thousand_nodes_in_half_the_memory() -> None:
    """Everything is updated; half of what backward reads is made again, at a small gap."""
    net = Case(deep(1000))
    assert len(net.forward.nodes) >= 995
    plain = net.residency(PLENTY)
    top = measure(*plain_decisions(plain)).ram_bytes
    state = plain.remakes.state
    ram = state + (top - state) // 2
    residency = net.residency(ram)
    found = residency.search(replace(EXACT, gap=1e-2), Watch())
    first = residency.first()
    assert first is not None
    for f in (first, found):
        needs, value = figures(residency, f)
        assert needs.ram_bytes <= ram
        assert value > residency.total(0.0), "something is made again"
        assert value >= residency.total(found.bound)
    assert residency.total(found.price) <= residency.total(found.bound) * 1.01


def plain_decisions(residency: Residency) -> tuple[Problem, Solution]:
    """Everything is kept."""
    found = residency.search(EXACT, Watch())
    assert found.price == 0.0
    decided = residency.decided(found)
    assert decided is not None
    return decided
