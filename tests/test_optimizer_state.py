"""``--state``: optimizer tensors that are kept, or given up for plain SGD, as the budget asks."""

from __future__ import annotations

from collections.abc import Callable
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
from test_c_backend import needs_gcc, reference, samples

from odt_plan.backends.c import emit_c
from odt_plan.backends.numpy import Runtime
from odt_plan.ir.autodiff import build_training
from odt_plan.ir.candidates import with_states
from odt_plan.ir.errors import InfeasibleError, UsageError
from odt_plan.ir.graph import Graph
from odt_plan.ir.training import StateForm, TrainingGraph, TrainingSpec
from odt_plan.planner.baselines import keep_all
from odt_plan.planner.check import CheckError, check
from odt_plan.planner.device import Device, load_device
from odt_plan.planner.footprint import measure
from odt_plan.planner.importance import prior
from odt_plan.planner.linear import SolverOptions
from odt_plan.planner.milp import Milp
from odt_plan.planner.order_steps import steps_of
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.plan import Plan, load_plan
from odt_plan.planner.problem import Limits
from odt_plan.planner.rebuild import rebuild
from odt_plan.planner.replay import Wanted
from odt_plan.planner.state_forms import state_forms

BOARD = load_device(plans.BOARD)
ADAM = TrainingSpec(optimizer="adam")
FORMS: tuple[StateForm, ...] = ("keep", "paged", "sgd")
WIDE = Limits(10**8, 10**8, storage_bytes=10**6)
Json = dict[str, Any]
Mutation = Callable[[Json], None]
EXACT = SolverOptions(gap=0.0, time_limit_s=30)
MOMENTUM = TrainingSpec(optimizer="momentum", micro_batches=3)


def planned(
    folder: Path, graph: Graph | None = None, device: Device = BOARD, **options: Any
) -> PlannedModel:
    given: dict[str, Any] = {"spec": ADAM, "state": ("auto",), "train": ("all",)}
    given |= {"with_baselines": False, "time_limit_s": 600.0, "gap": 0.0}
    return make_plan(Request(export(graph or nets.cnn(), folder), device, **{**given, **options}))


def states_of(plan: Plan) -> dict[str, str]:
    return {u.param: u.state for u in plan.decisions.updates if u.ratio}


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [None, "sdcard"])
def test_all_updates_of_a_given_set_are_done_and_the_best_states_fit(
    storage: str | None, tmp_path: Path
) -> None:
    """Against the least RAM of every combination of states, each a problem of its own."""
    graph = nets.mlp((6, 8, 4))
    whole = plans.whole(graph)
    worth = prior(graph, with_states(whole, FORMS), 0.7)
    options, cost = [], plans.cost_of(BOARD, storage)
    for states in product(FORMS if storage else ("keep", "sgd"), repeat=len(whole)):
        chosen = [replace(c, state=s) for c, s in zip(whole, states, strict=True)]
        training = build_training(graph, ADAM, chosen)
        problem = plans.problem_of(graph, training, WIDE, cost, fixed=True)
        least = round(Milp(problem).solve("ram", EXACT).value)
        options.append((least, sum(worth[c] for c in chosen)))
    rams, seen = sorted({r for r, _ in options}), set()
    for budget in (rams[-1], rams[-2], rams[len(rams) // 2], rams[0]):
        asked = {"ram_bytes": budget, "state": ("auto,sgd=0.7",), "storage": storage}
        plan = planned(tmp_path, graph, **asked).plan
        assert len(states_of(plan)) == len(whole)
        learn = plan.objective[0]
        assert (learn.name, learn.value) == ("learn", max(s for r, s in options if r <= budget))
        assert learn.bound == pytest.approx(learn.value)
        assert plan.claims.ram_bytes.total <= budget
        seen.add(frozenset(states_of(plan).values()))
    assert len(seen) > 1
    assert any("paged" in states for states in seen) == (storage is not None)
    with pytest.raises(InfeasibleError):
        planned(tmp_path, graph, **{**asked, "ram_bytes": rams[0] - 4})


@pytest.mark.parametrize("overlap", [False, True], ids=["waits", "beside"])
def test_paging_state_counts_for_every_limit(overlap: bool, tmp_path: Path) -> None:
    """With less than what paging all of it takes, some is given up, and the limit is kept."""
    device = BOARD if overlap else plans.without_dma(BOARD)

    def made(device: Device = device, **limits: Any) -> Plan:
        asked = {"storage": "sdcard", "ram_bytes": 2000, "state": ("paged,sgd",), **limits}
        return planned(tmp_path, nets.mlp((6, 8, 4)), device, **asked).plan

    plan = made()
    whole = plan.claims
    assert set(states_of(plan).values()) == {"paged"}
    assert whole.storage_bytes == 2 * whole.ram_bytes.weights
    assert whole.life_steps is not None
    card = [s.model_copy(update={"bytes": whole.storage_bytes - 4}) for s in device.storage]
    for less in (
        made(latency_s=0.6 * whole.latency_s),
        made(energy_j=0.6 * whole.energy_j),
        made(min_steps=2 * whole.life_steps),
        made(device.model_copy(update={"storage": tuple(card)})),
    ):
        assert set(states_of(less).values()) == {"paged", "sgd"}
        assert less.status == "optimal"
        assert less.objective[0].value < plan.objective[0].value


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
    kept, paged, plain = (with_states(plans.whole(graph), (form,)) for form in FORMS)
    for worth in (1.0, 0.9, 0.25):
        scores = prior(graph, [*kept, *paged, *plain], worth)
        assert [scores[c] for c in paged] == [pytest.approx(0.995 * scores[c], abs=1) for c in kept]
        for a, b in zip(kept, plain, strict=True):
            assert scores[b] == pytest.approx(worth * scores[a], abs=1)
    assert prior(graph, plain, 0.9) == {
        c: s for c, s in prior(graph, [*kept, *plain]).items() if c in plain
    }


def test_what_is_typed() -> None:
    assert state_forms(("auto",), ADAM, pages=False).forms == ("keep", "sgd")
    assert state_forms(("auto",), ADAM, pages=True).forms == FORMS
    assert state_forms(("sgd=0.5, keep",), ADAM, pages=False) == state_forms(
        ("auto,sgd=0.5",), ADAM, pages=False
    )
    assert state_forms(("sgd",), ADAM, pages=False).forms == ("sgd",)
    assert state_forms(("sgd",), TrainingSpec(), pages=False).forms == ("keep",)
    assert state_forms((), ADAM, pages=False).forms == ("keep",)


@pytest.mark.parametrize(
    "item", ["sgd=0", "sgd=1.1", "sgd=nan", "sgd=", "keep=1", "drop", "auto=1", "paged"]
)
def test_what_is_typed_wrong(item: str) -> None:
    with pytest.raises(UsageError, match=rf"--state: '{item}'"):
        state_forms((item,), ADAM, pages=False)


# --- what runs ------------------------------------------------------------------------------------


@cache
def mixed(spec: TrainingSpec, overlap: bool = False) -> tuple[Plan, TrainingGraph]:
    """Parameters take turns with the forms."""
    graph = nets.resnet()
    chosen = [replace(c, state=FORMS[i % len(FORMS)]) for i, c in enumerate(plans.whole(graph))]
    training = build_training(graph, spec, chosen)
    plan = plans.squeezed(graph, training, ram_bytes=10**6, storage="sdcard", overlap=overlap)
    assert any(s.overlapped for s in plan.steps) == overlap
    return plan, training


SPECS = pytest.mark.parametrize("spec", [ADAM, MOMENTUM], ids=lambda s: s.optimizer)
OVERLAP = pytest.mark.parametrize("overlap", [False, True], ids=["waits", "beside"])


@OVERLAP
@SPECS
def test_numpy_trains_as_without_a_plan(spec: TrainingSpec, overlap: bool) -> None:
    plan, training = mixed(spec, overlap)
    check(plan, training, BOARD if overlap else plans.without_dma(BOARD))
    oracle = Unconstrained(training)
    runtimes = [Runtime(plan, training, moved_at=at) for at in ("start", "wait")]
    stored = [v.name for u in training.updates for v in u.paged]
    assert len(stored) > 2
    for x, y in zip(*samples(training, 3 * spec.micro_batches), strict=True):
        loss = oracle.step(x, y, 0.02)
        for runtime in runtimes:
            runtime.infer(x)  # leaves the state in storage alone
            assert runtime.train_step(x, y, 0.02) == loss
            assert runtime.state_bytes() == oracle.state_bytes(plan)
            assert runtime.stored_bytes() == b"".join(oracle.state[n].tobytes() for n in stored)


def test_training_goes_on_from_saved_state() -> None:
    plan, training = mixed(ADAM)
    first, second = Runtime(plan, training), Runtime(plan, training)
    x, y = (s[0] for s in samples(training, 1))
    for _ in range(2):
        first.train_step(x, y, 0.02)
    second.load_state(first.state_bytes(), updates=2, stored=first.stored_bytes())
    assert second.train_step(x, y, 0.02) == first.train_step(x, y, 0.02)
    assert second.state_bytes() == first.state_bytes()
    with pytest.raises(UsageError, match="the state in storage has 0 B"):
        second.load_state(first.state_bytes(), updates=2)


@pytest.mark.parametrize("spec", [ADAM, MOMENTUM], ids=lambda s: s.optimizer)
def test_an_order_of_operators_counts_paged_state(spec: TrainingSpec) -> None:
    graph = nets.resnet(2, 3, 4)
    paged = with_states(plans.whole(graph), ("paged",))
    peaks = []
    for chosen in (plans.whole(graph), paged):
        training = build_training(graph, spec, chosen)
        cost = plans.cost_of(BOARD, "sdcard")
        problem = plans.problem_of(graph, training, WIDE, cost, fixed=True)
        live = measure(problem, keep_all(problem)).live
        steps = steps_of(training)
        assert steps.peak(range(len(steps.nodes))) == live.max()
        peaks.append(sum(live))
    assert peaks[0] < peaks[1]


@pytest.mark.parametrize(("train", "state"), [("auto", "paged"), ("all", "paged,sgd")])
def test_forms_without_the_default_one(train: str, state: str, tmp_path: Path) -> None:
    """In RAM that is too little for everything, so that another order is looked for, too."""
    plan = planned(
        tmp_path, nets.resnet(2, 3, 5), plans.without_dma(BOARD), storage="sdcard",
        train=(train,), state=(state,), ram_bytes=4000, gap=0.05,
    ).plan  # fmt: skip
    assert set(states_of(plan).values()) <= set(state.split(","))
    assert plan.claims.ram_bytes.optimizer == 0


def test_state_in_storage_stays_beside_a_replay_cache(tmp_path: Path) -> None:
    done = planned(
        tmp_path, nets.resnet(), plans.without_dma(BOARD), storage="sdcard", spec=MOMENTUM,
        state=("paged",), train=("b1.conv2.weight", "fc.weight"), replay=Wanted(30, 20, "sdcard"),
    )  # fmt: skip
    assert done.plan.replay is not None
    assert done.plan.claims.storage_bytes > 0
    runtime, oracle = Runtime(done.plan, done.training), Unconstrained(done.training)
    for x, y in zip(*samples(done.training, 6), strict=True):
        assert runtime.train_cached(runtime.capture(x), y, 0.05) == oracle.step(x, y, 0.05)
    assert runtime.state_bytes() == oracle.state_bytes(done.plan.without_replay())


@needs_gcc
@OVERLAP
@SPECS
def test_emitted_c_equals_numpy(spec: TrainingSpec, overlap: bool, tmp_path: Path) -> None:
    plan, training = mixed(spec, overlap)
    count, runtime = 3 * spec.micro_batches, Runtime(plan, training)
    xs, ys = samples(training, count)
    for x, y in zip(xs, ys, strict=True):
        runtime.train_step(x, y, 0.05)
    name = emit_c(plan, training, tmp_path)[0].stem
    for extreme in (1, 2) if overlap else (0,):  # transfers move at their start, at their wait
        defines = [f"MODEL_OVERLAPS={extreme}"] if overlap else []
        program = lane.build_host(tmp_path, name, defines=defines)
        result = lane.run_host(program, lane.training_input(xs, ys, 0.05))
        assert result.exit_code == 0, result.stdout
        assert result.value("selftest_exact") == 1
        assert result.files["output.bin"] == reference(plan, training, count, 0.05)
        assert result.files["page.bin"].startswith(runtime.stored_bytes())


SAVING = """
#include "resnet.h"
#include "board.h"
#include <string.h>
static uint8_t pages[RESNET_STORAGE_BYTES], image[RESNET_SAVED_BYTES];
static int to(void *user, uint32_t at, const void *data, uint32_t n) {
    memcpy((uint8_t *)user + at, data, n);
    return 0;
}
static int from(void *user, uint32_t at, void *data, uint32_t n) {
    memcpy(data, (uint8_t *)user + at, n);
    return 0;
}
static float x[RESNET_SAMPLE_SIZE];
static const int32_t label[RESNET_TARGET_SIZE];
static float trained(resnet_t *net, int n) {
    float loss = 0.0f;
    while (n-- > 0 && resnet_train_step(net, x, label, 0.05f, &loss) == 0) {
        x[n] += 0.25f;
    }
    return loss;
}
int main(void) {
    static resnet_t net;
    static uint8_t state[RESNET_STATE_BYTES], stored[sizeof pages];
    const uint8_t *now;
    float loss;
    memset(pages, 0xff, sizeof pages); /* nobody has written there: NaN */
    net.user = pages;
    board_value("refused", (uint32_t)(resnet_init(&net) + resnet_save(&net, to, image)));
    now = net.state;
    net.page_write = to;
    net.page_read = from;
    board_value("early", (uint32_t)(resnet_save(&net, to, image) + resnet_load(&net, from, image)));
    memset(pages, 0xff, sizeof pages);
    (void)trained(&net, 3);
    board_value("save", (uint32_t)resnet_save(&net, to, image));
    memset(x, 0, sizeof x);
    loss = trained(&net, 2);
    memcpy(state, now, sizeof state);
    memcpy(stored, pages, sizeof stored);
    memset(pages, 0xff, sizeof pages);
    memset(x, 0, sizeof x);
    board_value("load", (uint32_t)(resnet_init(&net) + resnet_load(&net, from, image)));
    board_value("loss", loss == trained(&net, 2) && loss == loss);
    board_value("state", memcmp(state, now, sizeof state) == 0);
    board_value("stored", memcmp(stored, pages, sizeof stored) == 0);
    image[sizeof image - 1u] ^= 1u; /* the end of what was in storage */
    board_value("damaged", (uint32_t)resnet_load(&net, from, image));
    board_value("kept", memcmp(stored, pages, sizeof stored) == 0);
    return 0;
}
"""


@needs_gcc
def test_emitted_c_saves_what_is_in_storage(tmp_path: Path) -> None:
    plan, training = mixed(ADAM)
    emit_c(plan, training, tmp_path)
    main = tmp_path.parent / f"{tmp_path.name}_main.c"
    main.write_text(SAVING)
    result = lane.run_host(lane.build_host(tmp_path, "resnet", selftest=False, main=main), {})
    assert result.exit_code == 0, result.stdout
    told = ("refused", "early", "save", "load", "loss", "state", "stored", "damaged", "kept")
    assert [result.value(name) for name in told] == [4, 0, 0, 0, 1, 1, 1, 7, 1]


def test_a_plan_is_rebuilt_from_its_file(tmp_path: Path) -> None:
    done = planned(tmp_path, state=("sgd",))
    path = tmp_path / "plan.json"
    path.write_text(done.plan.model_dump_json())
    again = load_plan(path)
    assert again.claims.ram_bytes.optimizer == 0
    check(again, rebuild(again, path), BOARD)


# --- mutants --------------------------------------------------------------------------------------


def find(d: Json, kind: str) -> int:
    """The first transfer of state of this kind."""
    value = {b["id"]: b["value"] for b in d["buffers"]}
    return next(
        i
        for i, s in enumerate(d["steps"])
        if s["kind"] == kind and value[s["reads"][0]].endswith((".m", ".momentum"))
    )


def drop(kind: str) -> Mutation:
    def mutate(d: Json) -> None:
        k = find(d, kind)
        d["steps"].pop(k)
        for b in d["buffers"]:
            b["first"], b["last"] = b["first"] - (b["first"] > k), b["last"] - (b["last"] >= k)

    return mutate


def out_first(d: Json) -> None:
    """The state is written back before the update has changed it."""
    k = next(
        i for i, s in enumerate(d["steps"]) if s["kind"] == "update" and i > find(d, "page_in")
    )
    out = find(d, "page_out")
    d["steps"][k], d["steps"][out] = d["steps"][out], d["steps"][k]


def moved(kind: str) -> Mutation:
    """To the place of another tensor in storage."""

    def mutate(d: Json) -> None:
        homes = [b["id"] for b in d["buffers"] if b["space"] == "storage"]
        step = d["steps"][find(d, kind)]
        side = "reads" if kind == "page_in" else "writes"
        step[side] = [next(h for h in homes if h != step[side][0])]

    return mutate


def short_lived(d: Json) -> None:
    next(b for b in d["buffers"] if b["space"] == "storage")["first"] = 1


def two_homes(d: Json) -> None:
    home = next(b for b in d["buffers"] if b["space"] == "storage")
    d["buffers"].append({**home, "id": "other"})


def shared(d: Json) -> None:
    one, other = [b for b in d["buffers"] if b["space"] == "storage"][:2]
    other["offset"] = one["offset"]


def in_every_micro_step(d: Json) -> None:
    d["steps"][find(d, "page_in")]["last_micro"] = False


def elsewhere(d: Json) -> None:
    """An update writes the state elsewhere than where it was read."""
    k = find(d, "page_in")
    update = next(s for s in d["steps"][k:] if s["kind"] == "update")
    update["writes"][1] = d["steps"][k]["reads"][0]


def claims(key: str, by: int) -> Mutation:
    def mutate(d: Json) -> None:
        d["claims"][key] += by

    return mutate


def says(told: str) -> Mutation:
    def mutate(d: Json) -> None:
        next(u for u in d["decisions"]["updates"] if u["state"] != told)["state"] = told

    return mutate


MUTANTS: list[tuple[str, Mutation, str]] = [
    ("adam", drop("page_out"), r"exactly once, but it holds .*version 0"),
    ("momentum", drop("page_out"), r"exactly once, but it holds .*version 0"),
    ("adam", drop("page_in"), "is never written|written by|lives from step"),
    ("adam", out_first, r"lives from step|exactly once, but it holds .*version 0"),
    ("adam", moved("page_in"), "is for"),
    ("adam", moved("page_out"), "is for"),
    ("adam", short_lived, "lives from 1 to"),
    ("adam", two_homes, "has 2 storage buffers"),
    ("adam", shared, "of space storage, where"),
    ("momentum", in_every_micro_step, "does nothing else"),
    ("adam", elsewhere, "must change"),
    ("adam", claims("storage_bytes", 4), "claims.storage_bytes is"),
    ("adam", claims("worn_bytes", 512), "claims.worn_bytes is"),
    ("momentum", claims("life_steps", 1), "claims.life_steps is"),
    *(("adam", says(told), f"state {told}, ratio .* in the plan, but") for told in FORMS),
]


@pytest.mark.parametrize(("optimizer", "mutate", "message"), MUTANTS)
def test_false_plans_are_rejected(optimizer: str, mutate: Mutation, message: str) -> None:
    plan, training = mixed(ADAM if optimizer == "adam" else MOMENTUM)
    d = plan.model_dump()
    d["steps"] = [{**s, "reads": list(s["reads"]), "writes": list(s["writes"])} for s in d["steps"]]
    for key in ("buffers", "steps"):
        d[key] = list(d[key])
    mutate(d)
    with pytest.raises(CheckError, match=message):
        check(Plan.model_validate(d), training, plans.without_dma(BOARD))


def test_state_that_changes_while_it_moves_is_rejected() -> None:
    """The start of a page-out goes before the update, the wait stays behind it."""
    plan, training = mixed(ADAM, overlap=True)
    steps = list(plan.steps)
    value = {b.id: b.value for b in plan.buffers}
    outs = [
        i for i, s in enumerate(steps) if s.kind == "page_out" and value[s.writes[0]].endswith(".m")
    ]
    rejected = 0
    for out in outs:
        update = max(i for i, s in enumerate(steps[:out]) if s.kind == "update")
        if steps[out].reads[0] not in steps[update].writes:
            continue
        mutant = [*steps]
        mutant.insert(update, mutant.pop(out))
        with pytest.raises(CheckError, match=r"changed while it was moved|lives from step|exactly"):
            check(plan.model_copy(update={"steps": tuple(mutant)}), training, BOARD)
        rejected += 1
    assert rejected
