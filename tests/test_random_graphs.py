"""Random networks: the planner against brute force, and the laws that every plan obeys.

``--graphs N`` tries so many seeds of each test; the default is a sample. ``--seconds S`` ends the
search of a plan: laws hold of unproven plans, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import plans
import pytest
from onnx_files import export
from random_nets import random_net
from test_choices import WIDE, Case, Combination
from test_planner import every_schedule, free_bits, ram_of

from odt_plan.ir.autodiff import candidates
from odt_plan.ir.errors import InfeasibleError
from odt_plan.ir.graph import Graph
from odt_plan.ir.training import Candidate, TrainingSpec
from odt_plan.planner import joint, timeline
from odt_plan.planner.bounds import most_gain
from odt_plan.planner.check import check
from odt_plan.planner.choice import ChoiceByCuts, Held, Make, cuts_of
from odt_plan.planner.decided import OutOfTimeError
from odt_plan.planner.device import load_device
from odt_plan.planner.imported import import_requested
from odt_plan.planner.linear import SolverOptions
from odt_plan.planner.milp import Milp
from odt_plan.planner.pipeline import PlannedModel, Planner, Request, make_plan
from odt_plan.planner.problem import Forced
from odt_plan.planner.progress import Watch
from odt_plan.planner.schedule import Schedule
from odt_plan.planner.scheduling import schedule

BOARD = load_device(plans.BOARD)
#: Choices of one schedule, and schedules of one network, that brute force goes through.
MOST_BITS, MOST_SCHEDULES = 12, 3000
#: Parameters that may be updated there.
MOST_PARAMETERS = 4


# --- brute force ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """A combination and one way to keep, rebuild and page under it."""

    combination: Combination
    score: int
    schedule: Schedule


def every_decision(case: Case) -> list[Decision]:
    """All decisions of a case."""
    result = []
    for c in case.combinations():
        problem = case.stages().problem(case.graph(c), fixed=True)
        again = [s.activity for s in problem.slots if s.rebuild and s.node.name in c.mixed]
        for done in every_schedule(problem, without=again):
            result.append(Decision(c, case.score(c), done))
    return result


def small_case(seed: int) -> Case:
    """At most six nodes; as many parameters to choose from as brute force can take."""
    for nodes in range(3 + seed % 4, 1, -1):
        forward = random_net(seed, nodes, quantized=True)
        for storage in ("sdcard", None)[seed % 3 > 0 :]:
            if offered := offers(forward, storage, seed):
                return Case(forward, offered, noise=0.02, storage=storage)
    raise AssertionError(f"seed {seed}: too large for brute force")


def offers(forward: Graph, storage: str | None, seed: int) -> list[Candidate]:
    """Candidates of parameters in random order, as long as brute force can take more."""
    lowered = Case(forward, ()).lowered
    every = [c for c in candidates(lowered, imported=forward) if c.saved == "f32"]
    names = np.random.default_rng(seed).permutation(list(dict.fromkeys(c.param for c in every)))
    offered: list[Candidate] = []
    for name in names:
        more = [*offered, *[c for c in every if c.param == name][-2:]]
        few = len({c.param for c in more}) <= MOST_PARAMETERS
        if few and tractable(Case(forward, more, noise=0.02, storage=storage)):
            offered = more
    return offered


def tractable(case: Case) -> bool:
    """Brute force makes a few thousand schedules at most."""
    bits = [
        free_bits(case.stages().problem(case.graph(c), fixed=True)) for c in case.combinations()
    ]
    return max(bits) <= MOST_BITS and sum(2**b for b in bits) <= MOST_SCHEDULES


def alike(a: Combination, b: Combination) -> bool:
    """The same updates and precisions."""
    return set(a.updates) == set(b.updates) and set(a.mixed) == set(b.mixed)


def spread(values: Sequence[int], n: int) -> list[int]:
    """The smallest, the largest, and some between."""
    every = sorted(set(values))
    return sorted({every[i * (len(every) - 1) // (n - 1)] for i in range(n)})


def test_brute_force_agrees(graph_seed: int) -> None:
    """The most learning, and with its updates and precisions the least time, at every budget.

    That of learning is also told for all plans: those, too, that brute force, as the whole program,
    does not make, because it makes activations again only right before steps that read them.
    """
    case = small_case(graph_seed)
    decisions = every_decision(case)
    for ram in spread([ram_of(d.schedule) for d in decisions], 4):
        fitting = [d for d in decisions if ram_of(d.schedule) <= ram]
        stages = case.stages(replace(case.limits, ram_bytes=ram))
        decided, bound = stages.learn(case.start, fixed=False, free=case.free)
        best = max(d.score for d in fitting)
        problem = stages.learn_problem(case.start, fixed=False, free=case.free)
        whole = Milp(problem).solve("learn", stages.options)
        assert round(whole.bound) == best, (ram, decided)
        assert round(bound) >= best, (ram, decided)
        mixed = tuple(n for n in case.free if decided.precision[n] == "mixed")
        found = Combination(decided.updates, mixed)
        assert case.score(found) == best
        same = [d for d in fitting if alike(d.combination, found)]
        done = schedule(stages, decided, "latency", ())
        assert round(done.bound) == min(d.schedule.cycles for d in same), (ram, found)
        assert done.schedule.cycles >= round(done.bound)
    least = min(ram_of(d.schedule) for d in decisions)
    with pytest.raises(InfeasibleError):
        case.stages(replace(WIDE, ram_bytes=least - 4)).learn(
            case.start, fixed=False, free=case.free
        )


@pytest.mark.parametrize("seed", range(4, 10))
def test_updates_take_the_same_ram_among_all_and_alone(seed: int) -> None:
    """In-place results that depend on the choice are as right as those of the chosen graph."""
    case = small_case(seed)
    stages, options = case.stages(), SolverOptions(gap=0.0)
    every = stages.learn_problem(case.start, fixed=False, free=())
    alone: dict[tuple[Candidate, ...], float] = {}
    for c in case.combinations():
        if not c.mixed:
            problem = stages.problem(case.graph(c), fixed=True)
            least = Milp(problem, "ram").solve("ram", options).value
            alone[c.updates] = min(least, alone.get(c.updates, least))
    for updates, least in alone.items():
        forced = tuple(
            Forced((a.index,), holds=a.updates[0].candidate in updates)
            for a in every.activities
            if a.updates
        )
        among = Milp(replace(every, forced=forced), "ram").solve("ram", options).value
        assert round(among) == round(least), updates


# --- laws -----------------------------------------------------------------------------------------


def planned(
    path: Path, ram_bytes: int | None, seconds: float, *, rivals: bool = False
) -> PlannedModel | None:
    """A plan of a float network within so much RAM; None: proven that there is none."""
    request = Request(path, BOARD, ram_bytes=ram_bytes, with_baselines=rivals, time_limit_s=seconds)
    try:
        return make_plan(request)
    except OutOfTimeError:
        raise
    except InfeasibleError:
        return None


def learned(model: PlannedModel) -> tuple[float, float]:
    """What is learned, and its bound."""
    (learn,) = (o for o in model.plan.objective if o.name == "learn")
    return learn.value, learn.bound


def test_plans_keep_their_promises(
    graph_seed: int, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Checked; bound >= learning >= the baselines that fit; more RAM is never worse."""
    seconds = pytestconfig.getoption("seconds")
    nodes = 4 + graph_seed * 7 % 57
    path = export(random_net(graph_seed, nodes), tmp_path)
    most = planned(path, 10**7, seconds)
    assert most is not None
    need = most.plan.claims.ram_bytes.total
    before: tuple[float, float] | None = None
    for ram in (need // 3, need * 2 // 3, need):
        model = planned(path, ram, seconds, rivals=True)
        if model is None:
            assert before is None, "less RAM was enough"
            continue
        check(model.plan, model.training, BOARD)
        assert model.plan.claims.ram_bytes.total <= ram
        value, bound = learned(model)
        assert value <= bound * (1 + 1e-9)
        assert all(b.importance <= value * (1 + 1e-9) for b in model.baselines if b.fits)
        if before is not None:
            assert bound >= before[0] * (1 - 1e-9), "the bound excludes a plan of less RAM"
            assert value >= before[0] * (1 - 1e-3), "more RAM learns less, beyond the gap"
        before = value, bound
    assert before is not None
    assert before[0] >= learned(most)[0] * (1 - 1e-3)


def half_way(path: Path, **asked: object) -> Request:
    """With half of the RAM between what updating everything takes at least, and most."""
    request = replace(
        Request(path, BOARD, ram_bytes=10**7, with_baselines=False, time_limit_s=20.0), **asked
    )
    least = make_plan(replace(request, train=("all",), objective="ram")).plan.claims.ram_bytes
    most = make_plan(request).plan.claims.ram_bytes
    return replace(request, ram_bytes=(least.total + most.total) // 2)


@pytest.mark.parametrize("seed", [2, 4, 9])
def test_everything_that_fits_with_rebuilt_activations_is_found_where_models_are_large(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their updates are chosen as if rebuilding took nothing, and then for less RAM."""
    request = half_way(export(random_net(seed, 4 + seed * 7 % 57), tmp_path))
    monkeypatch.setattr(timeline, "LEARN_REBUILDS", 0)
    (learn, _) = make_plan(request).plan.objective
    assert learn.value == learn.bound


@pytest.mark.parametrize("seed", [3, 5, 7, 8])
def test_a_large_models_choice_is_near_that_of_the_whole_program(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so little RAM that not everything fits, and a bound that no plan exceeds."""
    request = half_way(export(random_net(seed, 6 + seed), tmp_path))
    request = replace(request, ram_bytes=request.ram_bytes * 3 // 5)
    (whole, _) = make_plan(request).plan.objective
    monkeypatch.setattr(timeline, "LEARN_REBUILDS", 0)
    (learn, _) = make_plan(request).plan.objective
    assert learn.bound >= whole.value * (1 - 1e-6)
    assert whole.bound >= learn.value * (1 - 1e-6)
    assert learn.value >= 0.9 * whole.value


@pytest.mark.parametrize("seed", [1, 3, 13])
def test_small_nets_get_all_cuts_where_few_tell_nothing(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With these the choice is proven, and none has to be excluded by itself."""
    request = half_way(export(random_net(seed, 6 + seed % 12), tmp_path))
    request = replace(request, ram_bytes=request.ram_bytes * 3 // 5, gap=0.0)
    (whole, _) = make_plan(request).plan.objective
    cuts: list[int] = []

    def build(program: ChoiceByCuts, *args: Any) -> None:
        cuts.append(len(args[1]))
        original(program, *args)

    original = ChoiceByCuts.__init__
    monkeypatch.setattr(ChoiceByCuts, "__init__", build)
    monkeypatch.setattr(timeline, "LEARN_REBUILDS", 0)
    monkeypatch.setattr(joint, "MANY", 0)  # no cuts are few
    monkeypatch.setattr(joint, "Unfit", None)
    (learn, _) = make_plan(request).plan.objective
    assert learn.value == learn.bound == whole.value
    assert cuts[0] == 0 < cuts[-1]


@pytest.mark.parametrize("seed", [3, 5, 7])
def test_what_the_whole_program_does_is_a_solution_over_all_cuts(seed: int, tmp_path: Path) -> None:
    """With every tensor that may be made again before every step."""
    request = half_way(export(random_net(seed, 6), tmp_path))
    for part in (1.0, 0.8, 0.6, 0.5):
        watch = Watch()
        tight = replace(request, ram_bytes=int(request.ram_bytes * part))
        planner = Planner(tight, import_requested(tight, watch), watch)
        stages, start = planner.prepared
        problem = stages.learn_problem(start.decided, fixed=False, free=())
        whole = Milp(problem).solve("learn", planner.options)
        if whole.solution is None:
            continue
        steps, held = sorted(set(cuts_of(problem).values())), Held(problem)
        makes = {
            Make(step, before, t.name)
            for before, step in pairwise(steps)
            for t, made in zip(held.tensors, held.made, strict=True)
            if t.rebuildable and before.first > made
        }
        assert makes
        over_cuts = ChoiceByCuts(problem, makes, "learn").solve("learn", planner.options)
        assert over_cuts.bound >= whole.value - 0.5


def test_updates_are_chosen_in_the_forms_of_state_that_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TrainingSpec(optimizer="momentum")
    request = half_way(export(random_net(2, 18), tmp_path), spec=spec, state=("sgd",))
    monkeypatch.setattr(timeline, "LEARN_REBUILDS", 0)
    planned = make_plan(request)
    (learn, _) = planned.plan.objective
    assert learn.value == learn.bound
    assert {u.state for u in planned.plan.decisions.updates} == {"sgd"}


def test_a_bound_of_all_plans_stands_where_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = half_way(export(random_net(2, 18), tmp_path))
    monkeypatch.setattr(timeline, "LEARN_REBUILDS", 0)
    watch = Watch()
    watch.begin(60.0)
    stages, start = Planner(request, import_requested(request, watch), watch).prepared
    problem = stages.learn_problem(start.decided, fixed=False, free=())
    assert problem.left_out == "all"
    tight = stages.choice(problem, "learn").bound
    watch.stop()
    assert tight <= stages.choice(problem, "learn", fails=False).bound == most_gain(problem)
