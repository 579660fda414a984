"""Decisions explained: the other way against brute re-planning, its price, and where it flips."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import mkdtemp

import nets
import numpy as np
import plans
import pytest
from cli_run import Cli
from onnx_files import export, floats
from test_choices import inverted
from test_cli import MODEL
from test_planner import EXACT, every_schedule, problem_of, ram_of

from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.errors import UsageError
from odt_plan.ir.graph import Graph
from odt_plan.ir.training import Candidate, TrainingSpec
from odt_plan.planner.demands import Demand, impose
from odt_plan.planner.device import load_device
from odt_plan.planner.explain import Decision, Explainer, Outcome
from odt_plan.planner.importance import prior
from odt_plan.planner.milp import Milp
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.plan import Plan, load_plan
from odt_plan.planner.problem import Limits

BOARD = plans.without_dma(load_device(plans.BOARD))  # by brute force without places of transfers
PLENTY = 1 << 24


def request_of(graph: Graph, **changes: object) -> Request:
    folder = Path(mkdtemp())
    base = Request(
        model=export(graph, folder),
        device=BOARD,
        ram_bytes=PLENTY,
        flash_bytes=PLENTY,
        gap=0.0,
        with_baselines=False,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def calibration(*shape: int) -> Path:
    path = Path(mkdtemp()) / "calib.npz"
    np.savez(path, x=floats(np.random.default_rng(3), 16, *shape))
    return path


def written(request: Request) -> tuple[PlannedModel, Path]:
    made = make_plan(request)
    path = request.model.parent / f"plan{request.ram_bytes}.json"
    path.write_text(made.plan.model_dump_json(), encoding="utf-8")
    return made, path


def explained(request: Request, *names: str) -> tuple[Plan, list[Decision]]:
    """The plan and what is said about it, from its file and its model alone."""
    _, path = written(request)
    plan = load_plan(path)
    explainer = Explainer(plan, path, BOARD, gap=0.0)
    return plan, [d for n in names for d in explainer.explain(n)]


def only(decision: Decision) -> Outcome:
    (outcome,) = decision.others
    return outcome


# --- updates --------------------------------------------------------------------------------------


@cache
def mlp() -> Graph:
    return nets.mlp((8, 6, 3))


@cache
def options() -> list[tuple[int, int, frozenset[str]]]:
    """Least RAM, score and parameters of every update set of ``mlp``."""
    forward = mlp()
    every = candidates(forward)
    by_param: dict[str, list[Candidate | None]] = {}
    for c in every:
        by_param.setdefault(c.param, [None]).append(c)
    scores = prior(forward, every)
    found = []
    for combo in product(*by_param.values()):
        chosen = [c for c in combo if c is not None]
        if chosen:
            training = build_training(forward, TrainingSpec(), chosen)
            problem = problem_of(training, forward, Limits(10**8, 10**8), fixed=True)
            need = round(Milp(problem).solve("ram", EXACT).value)
            found.append((need, sum(scores[c] for c in chosen), frozenset(c.param for c in chosen)))
    return found


def best(ram: int, param: str | None = None, *, updated: bool = True) -> int | None:
    """The best score of all update sets that fit, with or without a parameter."""
    scores = [
        s for need, s, p in options() if need <= ram and (param is None or (param in p) == updated)
    ]
    return max(scores, default=None)


def budgets() -> list[int]:
    needs = sorted({need for need, _, _ in options()})
    return [needs[0], needs[len(needs) // 3], needs[2 * len(needs) // 3]]


@pytest.mark.parametrize("k", range(3))
def test_updates_the_other_way_equal_brute_force(k: int) -> None:
    ram = budgets()[k]
    plan, decisions = explained(request_of(mlp(), ram_bytes=ram), "*.weight", "*.bias")
    assert {d.name for d in decisions} == {"fc0.weight", "fc0.bias", "fc1.weight", "fc1.bias"}
    now = {u.param: u.ratio for u in plan.decisions.updates}
    assert sum(u.importance for u in plan.decisions.updates) == best(ram)
    for d in decisions:
        outcome = only(d)
        frozen = now[d.name] == 0
        assert d.given == ""
        assert outcome.forced == Demand("update" if frozen else "freeze", d.name)
        reachable = best(ram, d.name, updated=frozen)
        if reachable is None:
            assert outcome.status == "impossible"
            least = min(need for need, _, p in options() if (d.name in p) == frozen)
            assert outcome.missing_bytes == least - ram
            assert f"{least - ram:,} B too few" in " ".join(outcome.why)
        else:
            assert outcome.status == "planned"
            assert outcome.score == reachable
            assert round(outcome.score_bound) == reachable
            assert outcome.score_change == reachable - (best(ram) or 0)
            changed = {c.split()[0] for c in (*outcome.less, *outcome.more)}
            assert d.name in changed
        if frozen:
            assert d.flip.searched
            assert d.flip.ram_bytes == flips(ram, d.name)
        else:
            assert not d.flip.searched


def flips(ram: int, param: str) -> int:
    """The least RAM from ``ram`` on at which updating is as good as anything."""
    rams = sorted({ram, *(need for need, _, _ in options() if need > ram)})
    return next(r for r in rams if best(r, param) == best(r))


def test_the_price_is_that_of_the_update_alone() -> None:
    plan, decisions = explained(request_of(mlp(), train=("all",)), "fc0")
    scores = {u.param: u.importance for u in plan.decisions.updates}
    weight, bias = (next(d for d in decisions if d.name == n) for n in ("fc0.weight", "fc0.bias"))
    assert weight.price is not None
    assert bias.price is not None
    assert weight.given == bias.given == "--train all"
    assert weight.price.kept_bytes == 4 * 8 * 6
    assert weight.price.saved_bytes == 4 * 8
    assert bias.price.kept_bytes == 4 * 6
    assert bias.price.saved_bytes == 0
    assert [p.price.importance for p in (weight, bias) if p.price] == [
        scores["fc0.weight"],
        scores["fc0.bias"],
    ]
    steps = [s for s in plan.steps if s.kind == "update" and "fc0.weight" in str(s.writes)]
    assert weight.price.cycles == sum(s.cycles for s in steps)


def test_given_update_sets_are_changed_by_one() -> None:
    request = request_of(mlp(), train=("fc1.weight", "fc0.bias"))
    _, (frozen, updated) = explained(request, "fc0.weight", "fc0.bias")
    whole = make_plan(replace(request, train=("fc1.weight", "fc0.bias", "fc0.weight"))).plan
    assert only(frozen).score == sum(u.importance for u in whole.decisions.updates)
    assert only(frozen).more == ("fc0.weight frozen -> 100.0%",)
    less = make_plan(replace(request, train=("fc1.weight",))).plan
    assert only(updated).latency_change_s == pytest.approx(
        less.claims.latency_s - make_plan(request).plan.claims.latency_s
    )


# --- kept, recomputed, paged ----------------------------------------------------------------------

WEIGHTS = ("fc0.weight", "fc1.weight")


@pytest.mark.parametrize("action", ["recompute", "page"])
def test_keeping_equals_brute_force(action: str) -> None:
    """At many budgets: what a tensor would cost if it was kept, or how many bytes are missing."""
    storage = "sdcard" if action == "page" else None
    graph = nets.mlp((200, 8, 200)) if storage else nets.cnn(2, 3, 4)
    request = request_of(graph, train=WEIGHTS if storage else ("all",), storage=storage)
    chosen = [c for c in plans.whole(graph) if not storage or c.param in WEIGHTS]
    training = plans.training_of(graph, None, chosen)
    wide = Limits(10**8, 10**8, None, None, 10**9)
    problem = problem_of(training, graph, wide, storage, fixed=True)
    schedules = every_schedule(problem)
    needs = sorted({ram_of(s) for s in schedules})
    seen = set()
    for ram in needs[:: max(1, len(needs) // 6)]:
        made, path = written(replace(request, ram_bytes=ram))
        fastest = min(s.cycles for s in schedules if ram_of(s) <= ram)
        assert made.plan.claims.cycles == fastest
        explainer = Explainer(made.plan, path, BOARD, gap=0.0)
        for a in made.plan.decisions.activations:
            (d,) = (d for d in explainer.explain(a.value) if d.name == a.value)
            assert d.chosen.endswith(f"{a.bytes:,} B")
            if a.action == "keep":
                assert d.others == ()
                continue
            seen.add(a.action)
            outcome = only(d)
            kept = [s for s in schedules if s.actions[a.value][1] == "keep"]
            fit = [s.cycles for s in kept if ram_of(s) <= ram]
            if fit:
                assert outcome.status == "planned"
                change = problem.cost.latency_s(min(fit) - fastest)
                assert outcome.latency_change_s == pytest.approx(change)
            else:
                assert outcome.status == "impossible"
                assert outcome.missing_bytes == min(map(ram_of, kept)) - ram
            assert d.flip.searched
            assert d.flip.ram_bytes == next(
                r
                for r in needs
                if r >= ram
                and min((s.cycles for s in kept if ram_of(s) <= r), default=None)
                == min(s.cycles for s in schedules if ram_of(s) <= r)
            )
    assert action in seen


# --- precision and blocks -------------------------------------------------------------------------


def quantized() -> Request:
    return request_of(nets.cnn(), calibration=calibration(2, 6, 6), ram_bytes=3000)


def test_precisions_the_other_way_equal_pins() -> None:
    request = quantized()
    plan, decisions = explained(request, "conv1", "fc")
    precisions = [d for d in decisions if d.kind == "precision"]
    assert [d.name for d in precisions] == ["conv1", "fc"]
    compared = 0
    for d in precisions:
        assert d.chosen == plan.decisions.precision[d.name]
        assert d.given == ""
        for o in d.others:
            assert o.forced.kind != d.chosen
            pin = replace(request, precision=(f"{d.name}={o.forced.kind}",), with_relaxations=False)
            if o.status == "impossible":
                continue
            other = make_plan(pin).plan
            if o.forced.kind == "f32":  # a pin in either case
                assert other.decisions.noise_avoided >= 0
                score = sum(u.importance for u in other.decisions.updates)
                assert o.score == score + other.decisions.noise_avoided
                latency = other.claims.latency_s - plan.claims.latency_s
                assert o.latency_change_s == pytest.approx(latency)
                compared += 1
    assert compared


def test_a_forced_precision_is_what_the_plan_has() -> None:
    request = quantized()
    now = make_plan(request).plan.decisions.precision["conv1"]
    for kind in ("i8", "mixed", "f32"):
        forced = replace(request, ram_bytes=PLENTY, demands=(Demand(kind, "conv1"),))
        assert make_plan(forced).plan.decisions.precision["conv1"] == kind
    assert now in ("i8", "mixed")


def test_a_pinned_layer_is_told_to_be_pinned() -> None:
    request = replace(quantized(), ram_bytes=PLENTY, precision=("conv*=i8", "conv1=mixed"))
    _, decisions = explained(request, "conv1", "conv0")
    given = {d.name: d.given for d in decisions if d.kind == "precision"}
    assert given == {"conv1": "--precision conv1=mixed", "conv0": "--precision conv*=i8"}
    assert all(d.others == () for d in decisions if d.kind == "precision")


def test_a_streamed_block_run_whole_is_what_brute_force_says() -> None:
    request = request_of(
        inverted(),
        calibration=calibration(3, 10, 10),
        train=("last",),
        precision=("*=i8",),
    )
    with_blocks = make_plan(replace(request, ram_bytes=PLENTY, objective="ram")).plan
    least = with_blocks.claims.ram_bytes.total
    assert with_blocks.decisions.streamed
    name = with_blocks.decisions.streamed[0]
    plan, (d,) = explained(replace(request, ram_bytes=least), name)
    assert name in plan.decisions.streamed
    assert (d.kind, d.chosen) == ("block", "runs row by row")
    outcome = only(d)
    other = replace(request, ram_bytes=PLENTY, objective="ram", demands=(Demand("whole", name),))
    need = make_plan(other).plan
    assert name not in need.decisions.streamed
    assert need.claims.ram_bytes.total > least
    assert outcome.status == "impossible"
    assert outcome.missing_bytes == need.claims.ram_bytes.total - least
    layer = name.removesuffix("/streamed")
    _, about_layer = explained(replace(request, ram_bytes=least), layer)
    assert d in about_layer


# --- demands --------------------------------------------------------------------------------------


def test_demands_that_the_problem_has_no_choice_about_change_nothing() -> None:
    training = plans.training_of(mlp())
    problem = problem_of(training, mlp(), Limits(10**8, 10**8), fixed=True)
    demands = [Demand("mixed", "fc0"), Demand("update", "fc0.weight"), Demand("whole", "none")]
    before = Milp(problem).solve("latency", EXACT)
    after = Milp(impose(problem, demands)).solve("latency", EXACT)
    assert before.value == after.value
    frozen = Milp(impose(problem, [Demand("freeze", "fc0.weight")])).solve("latency", EXACT)
    assert frozen.status == "infeasible"


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned_file() -> Path:
    request = Request(
        model=MODEL, device=load_device("generic-cortex-m7"), ram_bytes=60 * 1024,
        flash_bytes=1 << 20, with_baselines=False,
    )  # fmt: skip
    path = Path(mkdtemp()) / "plan.json"
    path.write_text(make_plan(request).plan.model_dump_json(), encoding="utf-8")
    (path.parent / MODEL.name).write_bytes(MODEL.read_bytes())
    return path


def test_command_line(odt: Cli, planned_file: Path) -> None:
    done = odt("explain", planned_file, "conv2.weight", "conv3/channels8")
    assert done.code == 0, done.err
    first, *rest = done.out.splitlines()
    assert first == "conv2.weight: frozen"
    told = dict(line.strip().split("  ", 1) for line in rest if line.startswith("  "))
    assert told["importance"].strip().startswith("855,236: 5.8 per byte kept")
    assert "147,456 B kept in RAM, 16,384 B saved for its gradient" in told["price"]
    assert told["if updated"].strip().startswith("learn 668,734 (-130,359), latency +5.70 ms")
    assert "conv3.weight 12.5% -> frozen" in told["less"]
    assert "every such plan loses 130,359 or more of learn" in told["proof"]
    assert told["flips"].strip().startswith("at 71,016 B (69.35 KiB) of RAM")
    assert rest[-1] == "conv3/channels8: kept, 512 B"


def test_a_new_plan_is_explained_at_once(odt: Cli) -> None:
    """What the command tells about the plan that was written; in JSON beside the plan."""
    asked = (MODEL, "--ram", "60KB", "--flash", "1MB", "--explain", "conv2.weight")
    done = odt(*asked, "--explain", "conv3/channels8", "-o", "out")
    assert done.code == 0, done.err
    told = odt("explain", "out/plan.json", "conv2.weight", "conv3/channels8").out
    assert told.startswith("conv2.weight: frozen")
    assert done.out.endswith(told)
    record = odt(*asked, "--json").json
    assert record.pop("explained") == odt("explain", "out/plan.json", "conv2.weight", "--json").json
    assert record["decisions"] == json.loads(Path("out/plan.json").read_text())["decisions"]


def test_the_plan_is_told_where_it_can_not_be_explained(odt: Cli) -> None:
    asked = (MODEL, "--ram", "60KB", "--flash", "1MB", "--explain", "conv9")
    done = odt(*asked, "-o", "out")
    assert done.code == 2
    assert "has no layer, parameter or tensor conv9" in done.error
    assert "written   out: digits_cnn.onnx, plan.json" in done.out
    assert load_plan(Path("out/plan.json")).model.name
    done = odt(*asked, "--json")
    assert done.code == 2
    assert done.json["decisions"]
    assert "--quiet leaves --explain nothing to print" in odt(*asked, "-q").error


def test_json(odt: Cli, planned_file: Path) -> None:
    (told,) = odt("explain", planned_file, "conv2.weight", "--json").json
    assert told["name"] == "conv2.weight"
    assert told["chosen"] == "frozen"
    assert told["price"]["kept_bytes"] == 147456
    assert told["others"][0]["forced"] == {"kind": "update", "name": "conv2.weight"}
    assert told["others"][0]["score_change"] == -130359
    assert told["flip"] == {"searched": True, "ram_bytes": 71016}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("conv9", "has no layer, parameter or tensor conv9; nearest: conv3, conv2, conv1"),
        ("conv9*", "has no layer, parameter or tensor conv9*; nearest: conv"),
        ("", "has no layer, parameter or tensor ; nearest: "),
        ("flatten", "nothing is decided about flatten"),
    ],
)
def test_bad_names_are_exit_2(odt: Cli, planned_file: Path, name: str, told: str) -> None:
    done = odt("explain", planned_file, name)
    assert done.code == 2
    assert told in done.error


def test_a_plan_that_does_not_tell_what_was_asked(odt: Cli, planned_file: Path) -> None:
    old = load_plan(planned_file).model_copy(update={"asked": None})
    path = planned_file.parent / "old.json"
    path.write_text(old.model_dump_json(), encoding="utf-8")
    done = odt("explain", path, "conv1")
    assert done.code == 2
    assert "does not tell what was asked for; plan the model again" in done.error


def test_a_name_that_has_wildcards_is_itself_first() -> None:
    plan, _ = explained(request_of(mlp()), "fc0.weight")
    assert plan.asked is not None
    with pytest.raises(UsageError, match="nearest: fc0"):
        explained(request_of(mlp()), "fc0.weights")
