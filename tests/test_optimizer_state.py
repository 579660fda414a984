"""``--state``: optimizer tensors that are kept, or given up for plain SGD, as the budget asks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import nets
import plans
import pytest
from board import lane
from onnx_files import export
from oracle import Unconstrained
from test_c_backend import reference, samples

from odt_plan.backends.c import emit_c
from odt_plan.backends.numpy import Runtime
from odt_plan.ir.autodiff import build_training
from odt_plan.ir.candidates import with_states
from odt_plan.ir.errors import InfeasibleError, UsageError
from odt_plan.ir.graph import Graph
from odt_plan.ir.training import StateForm, TrainingGraph, TrainingSpec
from odt_plan.planner.check import CheckError, check
from odt_plan.planner.device import load_device
from odt_plan.planner.importance import prior
from odt_plan.planner.linear import SolverOptions
from odt_plan.planner.milp import Milp
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.plan import Plan, load_plan
from odt_plan.planner.problem import Limits
from odt_plan.planner.rebuild import rebuild
from odt_plan.planner.state_forms import state_forms

BOARD = load_device(plans.BOARD)
ADAM = TrainingSpec(optimizer="adam")
FORMS: tuple[StateForm, ...] = ("keep", "sgd")
WIDE = Limits(10**8, 10**8)
EXACT = SolverOptions(gap=0.0, time_limit_s=30)
MOMENTUM = TrainingSpec(optimizer="momentum", micro_batches=3)


def planned(folder: Path, graph: Graph | None = None, **options: Any) -> PlannedModel:
    given: dict[str, Any] = {"spec": ADAM, "state": ("auto",), "train": ("all",)}
    given |= {"with_baselines": False, "time_limit_s": 600.0, "gap": 0.0}
    return make_plan(Request(export(graph or nets.cnn(), folder), BOARD, **{**given, **options}))


def states_of(plan: Plan) -> dict[str, str]:
    return {u.param: u.state for u in plan.decisions.updates if u.ratio}


# --- the choice -----------------------------------------------------------------------------------


def test_all_updates_of_a_given_set_are_done_and_the_best_states_fit(tmp_path: Path) -> None:
    """Against the least RAM of every combination of states, each a problem of its own."""
    graph = nets.mlp((6, 8, 4))
    whole = plans.whole(graph)
    worth = prior(graph, with_states(whole, FORMS), 0.7)
    options = []
    for states in product(FORMS, repeat=len(whole)):
        chosen = [replace(c, state=s) for c, s in zip(whole, states, strict=True)]
        training = build_training(graph, ADAM, chosen)
        problem = plans.problem_of(graph, training, WIDE, plans.cost_of(BOARD), fixed=True)
        least = round(Milp(problem).solve("ram", EXACT).value)
        options.append((least, sum(worth[c] for c in chosen)))
    rams, seen = sorted({r for r, _ in options}), set()
    for budget in (rams[-1], rams[-2], rams[len(rams) // 2], rams[0]):
        asked = {"ram_bytes": budget, "state": ("auto,sgd=0.7",)}
        plan = planned(tmp_path, graph, **asked).plan
        assert len(states_of(plan)) == len(whole)
        learn = plan.objective[0]
        assert (learn.name, learn.value) == ("learn", max(s for r, s in options if r <= budget))
        assert learn.bound == pytest.approx(learn.value)
        assert plan.claims.ram_bytes.total <= budget
        seen.add(frozenset(states_of(plan).values()))
    assert len(seen) == 3
    with pytest.raises(InfeasibleError):
        planned(tmp_path, graph, ram_bytes=rams[0] - 4, state=("auto,sgd=0.7",))


def test_for_latency_state_is_given_up_and_kept_by_default(tmp_path: Path) -> None:
    plain = planned(tmp_path, objective="latency", state=("keep",)).plan
    assert set(states_of(plain).values()) == {"keep"}
    fast = planned(tmp_path, objective="latency").plan
    assert set(states_of(fast).values()) == {"sgd"}
    assert fast.claims.cycles < plain.claims.cycles
    assert fast.status == "optimal"
    assert fast.objective[0].name == "latency"


def test_with_sgd_there_is_nothing_to_decide(tmp_path: Path) -> None:
    auto, plain = (planned(tmp_path, spec=TrainingSpec(), state=s) for s in (("auto",), ("keep",)))
    assert auto.plan.steps == plain.plan.steps
    assert set(states_of(auto.plan).values()) == {"keep"}


def test_less_ram_learns_less_and_more_than_without_the_choice(tmp_path: Path) -> None:
    """Updates, too, are the solver's choice."""
    scores: dict[tuple[str, ...], list[float]] = {("keep",): [], ("auto",): []}
    for state, found in scores.items():
        for ram in (9_000, 12_000, 15_000):
            done = planned(tmp_path, ram_bytes=ram, state=state, train=("auto",))
            found.append(done.plan.objective[0].value)
    for kept, free in zip(*scores.values(), strict=True):
        assert free >= kept
    assert scores["auto",] != scores["keep",]
    assert scores["auto",] == sorted(scores["auto",])


def test_plain_sgd_is_worth_what_is_typed() -> None:
    graph = nets.resnet()
    kept, plain = (with_states(plans.whole(graph), (form,)) for form in FORMS)
    for worth in (1.0, 0.9, 0.25):
        scores = prior(graph, [*kept, *plain], worth)
        for a, b in zip(kept, plain, strict=True):
            assert scores[b] == pytest.approx(worth * scores[a], abs=1)
    assert prior(graph, plain, 0.9) == {
        c: s for c, s in prior(graph, [*kept, *plain]).items() if c in plain
    }


def test_what_is_typed() -> None:
    assert state_forms(("auto",), ADAM).forms == ("keep", "sgd")
    assert state_forms(("sgd=0.5, keep",), ADAM) == state_forms(("auto,sgd=0.5",), ADAM)
    assert state_forms(("sgd",), ADAM).forms == ("sgd",)
    assert state_forms(("sgd",), TrainingSpec()).forms == ("keep",)
    assert state_forms((), ADAM).forms == ("keep",)


@pytest.mark.parametrize(
    "item", ["sgd=0", "sgd=1.1", "sgd=nan", "sgd=", "keep=1", "drop", "auto=1"]
)
def test_what_is_typed_wrong(item: str) -> None:
    with pytest.raises(UsageError, match=rf"--state: '{item}'"):
        state_forms((item,), ADAM)


# --- what runs ------------------------------------------------------------------------------------


@cache
def mixed(spec: TrainingSpec, forms: tuple[StateForm, ...]) -> tuple[Plan, TrainingGraph]:
    """Parameters take turns with the forms."""
    graph = nets.resnet()
    chosen = [replace(c, state=forms[i % len(forms)]) for i, c in enumerate(plans.whole(graph))]
    training = build_training(graph, spec, chosen)
    plan = plans.squeezed(graph, training, ram_bytes=10**6)
    check(plan, training, BOARD)
    return plan, training


@pytest.mark.parametrize("spec", [ADAM, MOMENTUM], ids=lambda s: s.optimizer)
def test_numpy_trains_as_without_a_plan(spec: TrainingSpec) -> None:
    plan, training = mixed(spec, FORMS)
    runtime, oracle = Runtime(plan, training), Unconstrained(training)
    for x, y in zip(*samples(training, 3 * spec.micro_batches), strict=True):
        assert runtime.train_step(x, y, 0.02) == oracle.step(x, y, 0.02)
        assert runtime.state_bytes() == oracle.state_bytes(plan)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("spec", [ADAM, MOMENTUM], ids=lambda s: s.optimizer)
def test_emitted_c_equals_numpy(spec: TrainingSpec, tmp_path: Path) -> None:
    plan, training = mixed(spec, FORMS)
    count = 3 * spec.micro_batches
    name = emit_c(plan, training, tmp_path)[0].stem
    program = lane.build_host(tmp_path, name)
    result = lane.run_host(program, lane.training_input(*samples(training, count), 0.05))
    assert result.exit_code == 0, result.stdout
    assert result.value("selftest_exact") == 1
    assert result.files["output.bin"] == reference(plan, training, count, 0.05)


def test_a_plan_is_rebuilt_from_its_file(tmp_path: Path) -> None:
    done = planned(tmp_path, state=("sgd",))
    path = tmp_path / "plan.json"
    path.write_text(done.plan.model_dump_json())
    again = load_plan(path)
    assert again.claims.ram_bytes.optimizer == 0
    check(again, rebuild(again, path), BOARD)


@pytest.mark.parametrize("told", FORMS)
def test_a_false_state_is_rejected(told: str) -> None:
    plan, training = mixed(ADAM, FORMS)
    d = plan.model_dump()
    k = next(i for i, u in enumerate(d["decisions"]["updates"]) if u["state"] != told)
    d["decisions"]["updates"][k]["state"] = told
    with pytest.raises(CheckError, match=f"state {told}, ratio .* in the plan, but"):
        check(Plan.model_validate(d), training, BOARD)
