"""The replay cache: what is kept, that it is enough, and that training by it is the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import nets
import numpy as np
import plans
import pytest
from board import lane
from cli_run import Cli
from mutate import DEVICE, Json
from oracle import Unconstrained, batch
from test_c_backend import needs_gcc, paged, quantized, samples

from odt_plan.backends.c import emit_c
from odt_plan.backends.numpy import Runtime, train
from odt_plan.ir.errors import UsageError
from odt_plan.ir.graph import Graph
from odt_plan.ir.training import TrainingGraph, TrainingSpec
from odt_plan.planner.check import CheckError, check
from odt_plan.planner.device import Wear, load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.plan import Plan, load_plan
from odt_plan.planner.replay import RAM, Wanted, cuts, with_replay

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits_cnn.onnx"
DATA = DIGITS.parent / "digits.npz"
needs_zig = pytest.mark.skipif(not lane.has_zig_lane(), reason="needs ziglang and unicorn")

Planned = tuple[Plan, TrainingGraph]


def roomy(plan: Plan, more: int = 10**7) -> Plan:
    """With a RAM budget that a cache fits into."""
    budget = plan.device.budget.model_copy(
        update={"ram_bytes": plan.device.budget.ram_bytes + more}
    )
    return plan.model_copy(update={"device": plan.device.model_copy(update={"budget": budget})})


def tail(forward: Graph, layers: tuple[str, ...], spec: TrainingSpec | None = None) -> Planned:
    """Only some layers are trained."""
    chosen = [c for c in plans.whole(forward) if c.param.rpartition(".")[0] in layers]
    training = plans.training_of(forward, spec, chosen)
    return plans.keep_all(training), training


def paging_tail(forward: Graph, layers: tuple[str, ...], storage: str) -> Planned:
    """So little RAM that the plan pages."""
    _, training = tail(forward, layers)
    ram = plans.squeezed(forward, training, ram_bytes=10**6).claims.ram_bytes
    for ram_bytes in range(ram.total, ram.total - ram.arena, -128):
        plan = plans.squeezed(forward, training, ram_bytes=ram_bytes, storage=storage)
        if plan.claims.storage_bytes:
            return plan, training
    raise AssertionError("no budget made the plan page")


def kept(case: Planned, n: int = 6, place: str = RAM, epochs: int = 4) -> Planned:
    """With a cache."""
    plan, training = case
    cost = plans.cost_of(DEVICE, plan.device.storage)
    found, why = with_replay(roomy(plan), training, Wanted(n, epochs, place), cost)
    assert not why
    assert found.replay is not None
    check(found, training, DEVICE)
    return found, training


ADAM3 = TrainingSpec(optimizer="adam", micro_batches=3)
CASES: dict[str, Callable[[], Planned]] = {
    "mlp-last": lambda: kept(tail(nets.mlp(), ("fc2",))),
    "cnn-momentum-batch2": lambda: kept(
        tail(nets.cnn(batch=2), ("fc",), TrainingSpec(optimizer="momentum"))
    ),
    "resnet-adam-accumulate": lambda: kept(tail(nets.resnet(), ("b1.conv2", "fc"), ADAM3)),
    "resnet-sdram": lambda: kept(tail(nets.resnet(), ("fc",)), place="sdram"),
    "transformer": lambda: kept(tail(nets.transformer(blocks=2), ("b1.up", "b1.down", "fc"))),
    "mse": lambda: kept(tail(nets.mlp(), ("fc1", "fc2"), TrainingSpec(loss="mse"))),
    "paged": lambda: kept(
        paging_tail(nets.resnet(), ("b1.conv1", "b1.conv2", "fc"), "sdram"), place="sdram"
    ),
    "ids": lambda: kept(tail(nets.tokens(), ("fc",))),
    "two inputs": lambda: kept(tail(nets.two_branches(), ("fc",))),
    "i8": lambda: kept(quantized(nets.cnn(), i8_input=True)),
}


@cache
def case(name: str) -> Planned:
    return CASES[name]()


# ---- what is kept


def averages(plan: Plan, training: TrainingGraph, epochs: int) -> dict[tuple[int, int], int]:
    """(steps before, offset) -> average cycles, of every buffer that training can begin from.

    Found by trying: the rest of the steps runs in an arena of NaN, of which one buffer has been
    filled, two updates later, and must give the bits of the whole step.
    """
    rng = np.random.default_rng(4)
    lr, micro = 0.05, plan.training.micro_batches
    (x, y), later = batch(training, rng), [batch(training, rng) for _ in range(2 * micro)]
    plain = Runtime(plan, training)
    for other in later:
        plain.train_step(*other, lr)
    begin, updates = plain.state_bytes(), plain.updates
    want = plain.train_step(x, y, lr), plain.state_bytes()
    cost, result = plans.cost_of(DEVICE), {}
    end = next(i for i, s in enumerate(plan.steps) if training.loss.name in s.writes)
    for k in range(1, end + 1):  # the caller is told the loss
        early = Runtime(plan, training)  # with the weights from before
        early._feed(x)
        for i in range(k):
            early._steps[i]()
            early._memory.retire(i)
        for b in plan.buffers:
            if b.space != "arena" or not b.first < k <= b.last:
                continue
            here = Runtime(plan, training)
            here.load_state(begin, updates=updates)
            here._memory.clear()
            here._arrays[b.id][...] = early._arrays[b.id]
            if (here._train(k, y, lr), here.state_bytes()) == want:
                core = cost.core
                assert core.operators is not None
                copy = core.call.value + b.bytes * core.operators.rates["Concat"]["copy"].value
                copy = ceil(round(copy * DEVICE.cycles_per_instruction.value, 6))
                front = sum(s.cycles for s in plan.steps[:k])
                share = ceil(micro * (front + copy) / epochs)
                result[k, b.offset] = plan.claims.cycles + micro * (copy - front) + share
    return result


@pytest.mark.parametrize(
    "made",
    [
        lambda: tail(nets.mlp(), ("fc2",)),
        lambda: tail(nets.resnet(), ("fc",)),
        lambda: tail(nets.resnet(), ("b1.conv2", "fc"), ADAM3),
        lambda: tail(nets.transformer(blocks=2), ("b1.up", "fc")),
        lambda: tail(nets.cnn(), ("conv2", "fc")),
        lambda: paged(nets.cnn(size=8)),
        lambda: paging_tail(nets.resnet(), ("b1.conv1", "b1.conv2", "fc"), "sdram"),
    ],
)
@pytest.mark.parametrize("epochs", [2, 10])
def test_the_best_cut_is_the_best_of_all_that_can_be_trained_from(
    made: Callable[[], Planned], epochs: int
) -> None:
    plan, training = made()
    tried = averages(plan, training, epochs)
    assert {(c.front, c.boundary.offset) for c in cuts(plan)} == set(tried)
    best = min([plan.claims.cycles, *tried.values()])
    cost = plans.cost_of(DEVICE, plan.device.storage)
    found, why = with_replay(roomy(plan), training, Wanted(5, epochs, RAM), cost)
    if best == plan.claims.cycles:
        assert found == roomy(plan)
        assert why
        return
    assert found.replay is not None
    assert found.replay.average_cycles == best
    assert found.replay.bound <= best
    check(found, training, DEVICE)


def test_figures_by_hand() -> None:
    plan, training = kept(tail(nets.cnn(batch=2), ("fc",)), n=5, epochs=4)
    r = plan.replay
    assert r is not None
    assert (r.samples, r.epochs, r.place, r.region) == (5, 4, "ram", "")
    boundary = next(b for b in plan.buffers if b.id == r.buffer)
    assert r.entry_bytes == boundary.bytes
    assert r.entries == 3, "batches of 2"
    assert r.cache_bytes == 3 * boundary.bytes
    ram = plan.claims.ram_bytes
    assert ram.total == ram.arena + ram.weights + r.cache_bytes
    front = sum(s.cycles for s in plan.steps[: r.front])
    copy = r.capture_cycles - front
    assert r.cached_cycles == plan.claims.cycles - front + copy
    assert r.average_cycles == r.cached_cycles + ceil(r.capture_cycles / 4)
    assert r.latency_s == r.average_cycles / DEVICE.clock_hz.value
    assert r.energy_j == pytest.approx(DEVICE.power_w.value * r.latency_s)
    assert {training.graph.values[r.value].type.nbytes} == {r.entry_bytes}


def test_pages_and_cache_share_a_storage() -> None:
    plan, _ = case("paged")
    r = plan.replay
    assert r is not None
    assert plan.claims.storage_bytes > 0, "of pages alone"
    s = DEVICE.find_storage("sdram")
    paging = sum(t.cycles for t in plan.steps if t.kind in ("page_out", "page_in"))
    write = r.capture_cycles - sum(t.cycles for t in plan.steps[: r.front])
    read = r.cached_cycles + r.capture_cycles - write - plan.claims.cycles
    moved = paging + write / r.epochs + read
    power = DEVICE.power_w.value * r.latency_s + s.power_w.value * moved / DEVICE.clock_hz.value
    assert r.energy_j == pytest.approx(power, rel=1e-9)


def test_a_storage_costs_its_transfers_and_their_energy() -> None:
    base = tail(nets.resnet(), ("fc",), ADAM3)
    here, _ = kept(base)
    there, _ = kept(base, place="sdram")
    a, b = here.replay, there.replay
    assert a is not None
    assert b is not None
    assert there.claims == base[0].claims, "no RAM, and paging has a figure of its own"
    s = DEVICE.find_storage("sdram")
    clock, size = DEVICE.clock_hz.value, b.entry_bytes
    read = ceil((s.read_latency_s.value + size / s.read_bytes_per_s.value) * clock)
    write = ceil((s.write_latency_s.value + size / s.write_bytes_per_s.value) * clock)
    front = sum(t.cycles for t in there.steps[: b.front])
    assert b.capture_cycles == 3 * (front + write)
    assert b.cached_cycles == there.claims.cycles + 3 * (read - front)
    power = DEVICE.power_w.value * b.latency_s
    moved = s.power_w.value * 3 * (write / 4 + read) / clock
    assert b.energy_j == pytest.approx(power + moved, rel=1e-9)


def planned(**options: Any) -> PlannedModel:
    device = load_device(options.pop("device", plans.BOARD))
    return make_plan(
        Request(DIGITS, device, with_baselines=False, with_relaxations=False, **options)
    )


def test_what_is_left_of_ram_decides() -> None:
    """As many samples as fit, and not one more; then the storage takes them."""
    train_set = ("conv3.weight", "classifier.weight")
    full = planned(train=train_set, replay=Wanted(10**6))
    assert full.plan.replay is None
    assert "1,000,000 samples take" in full.no_replay
    assert "--replay-in sdcard or sdram" in full.no_replay
    fit = int(full.no_replay.split("--replay ")[1].split(" ")[0].replace(",", ""))
    assert planned(train=train_set, replay=Wanted(fit)).plan.replay is not None
    assert planned(train=train_set, replay=Wanted(fit + 1)).plan.replay is None
    stored = planned(train=train_set, replay=Wanted(fit + 1), storage="sdram").plan
    assert stored.replay is not None
    assert stored.replay.place == "sdram"
    plain = planned(train=train_set).plan
    assert stored.steps == plain.steps
    assert "replay" not in plain.model_dump()
    assert stored.objective == plain.objective


def test_regions_take_the_cache_as_a_whole() -> None:
    done = planned(train=("last",), replay=Wanted(150), device="stm32h743",
                   ram_regions=(("DTCM", 100_000), ("SRAM1", 200_000)))  # fmt: skip
    plan, r = done.plan, done.plan.replay
    assert r is not None
    assert r.region == "SRAM1", "134,400 B"
    small = planned(train=("last",), replay=Wanted(10), device="stm32h743",
                    ram_regions=(("DTCM", 100_000), ("SRAM1", 200_000))).plan.replay  # fmt: skip
    assert small is not None
    assert small.region == "DTCM", "the fast one"
    for region in ("DTCM", "", "AXI"):
        wrong = plan.model_copy(update={"replay": r.model_copy(update={"region": region})})
        with pytest.raises(CheckError, match="replay"):
            check(wrong, done.training, done.device)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"train": ("all",), "ram_bytes": 10**6}, "training changes the first layer"),
        ({"train": ("last",), "replay": Wanted(10, 2, "slow")}, "copies take longer"),
    ],
)
def test_why_there_is_none(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    options = {"replay": Wanted(10), **options}
    if options["replay"].place == "slow":
        text = (DIGITS.parent.parent / "specs" / "devices" / f"{plans.BOARD}.yaml").read_text()
        text = text.replace("id: sdram", "id: slow").replace("value: 100000000", "value: 1000")
        (tmp_path / "slow.yaml").write_text(text)
        options["device"] = str(tmp_path / "slow.yaml")
    done = planned(**options)
    assert done.plan.replay is None
    assert why in done.no_replay


# ---- training


@pytest.mark.parametrize("name", CASES)
def test_trains_bit_for_bit_like_unconstrained_training(name: str) -> None:
    """Entries of before are right after any number of updates."""
    plan, training = case(name)
    runtime, oracle = Runtime(plan, training), Unconstrained(training)
    rng = np.random.default_rng(1)
    data = [batch(training, rng) for _ in range(4)]
    entries = [runtime.capture(x) for x, _ in data]
    for i in (*rng.permutation(4), *rng.permutation(4), *rng.permutation(4)):
        x, y = data[i]
        assert runtime.train_cached(entries[i], y, 0.02) == oracle.step(x, y, 0.02)
        assert runtime.state_bytes() == b"".join(a.tobytes() for a in runtime._memory.state)
        for b in plan.buffers:
            if b.space == "state":
                assert runtime._arrays[b.id].tobytes() == oracle.state[b.value].tobytes()


def test_run_is_the_same_with_and_without(tmp_path: Path) -> None:
    done = planned(train=("last",), replay=Wanted(20, 3))
    with np.load(DATA) as data:
        x, y = data["x"][:30], data["y"][:30]
    without = done.plan.without_replay()
    assert "replay" not in without.model_dump()
    check(without, done.training, done.device)
    results = []
    for plan in (done.plan, without):
        runtime = Runtime(plan, done.training)
        history = train(runtime, x, y, epochs=3, lr=0.05, seed=3)
        results.append((history.losses, runtime.state_bytes(), runtime.updates))
        assert history.replayed == (40 if plan.replay else 0), (
            "20 of 30 fit, in two of three epochs"
        )
    assert results[0] == results[1]


def test_batches_stay_together() -> None:
    plan, training = kept(tail(nets.cnn(batch=2), ("fc",)), n=10)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, *training.sample.type.shape[1:])).astype("f4")
    y = rng.integers(0, 3, 9).astype("i4")
    history = train(Runtime(plan, training), x, y, epochs=4, lr=0.01)
    assert len(history.losses) == 18
    assert history.replayed == 18 - 5, "five batches, the last filled up"


def test_runtime_refuses_what_is_no_entry() -> None:
    plan, training = case("mlp-last")
    runtime = Runtime(plan, training)
    with pytest.raises(UsageError, match="an entry is"):
        runtime.train_cached(np.zeros(3, np.float32), np.zeros(1, np.int32), 0.1)
    plain = Runtime(plan.model_copy(update={"replay": None}), training)
    with pytest.raises(UsageError, match="replays nothing"):
        plain.capture(np.zeros(training.sample.type.shape, np.float32))


# ---- the checker


def rejected(name: str, change: Callable[[Json], None], pattern: str) -> None:
    plan, training = case(name)
    d = plan.model_dump(mode="json")
    change(d)
    with pytest.raises(CheckError, match=pattern) as caught:
        check(Plan.model_validate(d), training, DEVICE)
    assert "\n" not in str(caught.value)


def cost_again(d: Json) -> None:
    """Figures that agree with the front, so that only the front is wrong."""
    r, micro = d["replay"], d["training"]["micro_batches"]
    old, _ = case("mlp-last")
    assert old.replay is not None
    copy = old.replay.capture_cycles - sum(s.cycles for s in old.steps[: old.replay.front])
    front = sum(s["cycles"] for s in d["steps"][: r["front"]])
    r["capture_cycles"] = micro * (front + copy)
    r["cached_cycles"] = d["claims"]["cycles"] + micro * (copy - front)
    r["average_cycles"] = r["cached_cycles"] + ceil(r["capture_cycles"] / r["epochs"])


@pytest.mark.parametrize("by", [-2, -1, 1, 2, 3])
def test_a_front_that_is_moved_is_rejected(by: int) -> None:
    def move(d: Json) -> None:
        d["replay"]["front"] += by
        cost_again(d)

    rejected("mlp-last", move, r"replay")


@pytest.mark.parametrize("name", ["resnet-adam-accumulate", "transformer", "i8"])
@pytest.mark.parametrize("by", [-1, 1])
def test_so_in_other_networks(name: str, by: int) -> None:
    def move(d: Json) -> None:
        d["replay"]["front"] += by

    rejected(name, move, r"replay")


def other_buffer(d: Json) -> None:
    r = d["replay"]
    old = next(b for b in d["buffers"] if b["id"] == r["buffer"])
    new = next(
        b for b in d["buffers"]
        if b["space"] == "arena" and b["id"] != old["id"] and b["offset"] != old["offset"]
    )  # fmt: skip
    r["buffer"], r["value"] = new["id"], new["value"]


def reads_an_updated_weight(d: Json) -> None:
    d["replay"]["front"] = next(
        i for i, s in enumerate(d["steps"]) if any((n or "").startswith("fc2.") for n in s["reads"])
    ) + 1  # fmt: skip
    last = d["steps"][d["replay"]["front"] - 1]["writes"][0]
    d["replay"] |= {"buffer": last, "value": last}


def overwritten(d: Json) -> None:
    """Something else takes the bytes of the boundary before the rest has read it."""
    r = d["replay"]
    kept_there = next(b for b in d["buffers"] if b["id"] == r["buffer"])
    for b in d["buffers"]:
        if b["space"] == "arena" and r["front"] <= b["first"] < kept_there["last"]:
            b["offset"] = kept_there["offset"]


def claim(**changes: Any) -> Callable[[Json], None]:
    def change(d: Json) -> None:
        for key, by in changes.items():
            d["replay"][key] = by if isinstance(by, str) else d["replay"][key] + by

    return change


MUTANTS: dict[str, tuple[Callable[[Json], None], str]] = {
    "other buffer": (other_buffer, "replay|lives"),
    "updated weight": (reads_an_updated_weight, "replay: .*front reads .*changes from step"),
    "overwritten": (overwritten, "takes bytes|holds|hold"),
    "all steps": (lambda d: d["replay"].update(front=len(d["steps"])), r"replay\.front is"),
    "no such buffer": (claim(buffer="nothing"), "is no arena buffer"),
    "other value": (claim(value="x"), "is no arena buffer of x"),
    "fewer bytes": (claim(entry_bytes=-4), "replay.entry_bytes"),
    "smaller cache": (claim(cache_bytes=-4), "replay.cache_bytes|ram_bytes.total"),
    "more samples": (claim(samples=1), "replay.cache_bytes"),
    "cheap capture": (claim(capture_cycles=-1), "replay.capture_cycles"),
    "cheap step": (claim(cached_cycles=-1), "replay.cached_cycles"),
    "cheap average": (claim(average_cycles=-1), "replay.average_cycles"),
    "more epochs": (claim(epochs=1), "replay.average_cycles"),
    "faster": (claim(latency_s=-1e-6), "replay.latency_s"),
    "frugal": (claim(energy_j=-1e-7), "replay.energy_j"),
    "bound above": (claim(bound=10**6), "replay.bound"),
    "region": (claim(region="AXI"), "replay.region"),
    "unknown place": (claim(place="tape"), "ram_bytes.total|replay.place"),
    "free RAM": (lambda d: d["claims"]["ram_bytes"].update(
        total=d["claims"]["ram_bytes"]["total"] - d["replay"]["cache_bytes"]), "ram_bytes.total"),
    "over budget": (lambda d: d["device"]["budget"].update(
        ram_bytes=d["claims"]["ram_bytes"]["total"] - 1), "of ram_bytes, but the budget"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_checker_rejects(mutant: str) -> None:
    rejected("mlp-last", *MUTANTS[mutant])


def test_the_checker_knows_the_storage() -> None:
    plan, training = case("resnet-sdram")
    r = plan.replay
    assert r is not None
    for place, pattern in (("sdcard", "replay"), ("tape", "neither ram nor a storage")):
        wrong = plan.model_copy(update={"replay": r.model_copy(update={"place": place})})
        with pytest.raises(CheckError, match=pattern):
            check(wrong, training, DEVICE)
    many = DEVICE.find_storage("sdram").bytes // r.stride + 1
    large = r.model_copy(update={"samples": many, "cache_bytes": many * r.stride})
    with pytest.raises(CheckError, match="of sdram, which holds"):
        check(plan.model_copy(update={"replay": large}), training, DEVICE)


def test_no_cache_where_somebody_must_look_after_erase_units() -> None:
    plan, training = case("resnet-sdram")
    s = DEVICE.find_storage("sdram")
    wear = Wear(unit_bytes=4096, cycles=s.read_bytes_per_s, levelled=False, source="tests")
    worn = [t.model_copy(update={"wear": wear}) if t is s else t for t in DEVICE.storage]
    device = DEVICE.model_copy(update={"storage": tuple(worn)})
    with pytest.raises(CheckError, match="sdram is neither ram nor a storage"):
        check(plan, training, device)
    with pytest.raises(UsageError, match=r"it has ram, sdcard$"):
        Request(DIGITS, device, replay=Wanted(5, place="sdram"))
    done = make_plan(
        Request(DIGITS, device, storage="sdram", train=("last",), replay=Wanted(10**6))
    )
    assert done.plan.replay is None


# ---- C


def in_c(case_: Planned) -> tuple[dict[str, bytes], bytes]:
    """Input of the program, and what it must write: losses and state by the plain steps."""
    plan, training = case_
    xs, ys = samples(training, 3)
    runtime = Runtime(plan, training)
    uses = [(int(i), ys[i], 0.05) for i in (0, 2, 1, 1, 0, 2)]
    parts = [np.float32(runtime.train_step(xs[i], y, lr)).tobytes() for i, y, lr in uses]
    return lane.replay_input(xs, uses), b"".join([*parts, runtime.state_bytes()])


@needs_gcc
@pytest.mark.parametrize("name", [n for n in CASES if n != "two inputs"])  # the program feeds one
def test_c_equals_numpy_bit_for_bit(name: str, tmp_path: Path) -> None:
    made = case(name)
    model = emit_c(*made, tmp_path)[0].stem
    main = lane.FIRMWARE / "replay.c"
    files, want = in_c(made)
    result = lane.run_host(lane.build_host(tmp_path, model, selftest=False, main=main), files)
    assert result.exit_code == 0, result.stdout
    assert result.files["output.bin"] == want
    told = [result.value(n) for n in ("uninitialised", "nothing_captured", "out_of_order", "full")]
    pages = made[0].claims.storage_bytes > 0
    assert told == [2, 4 if pages else 1, 1, 1], "a missing callback is told first"
    assert result.value("bad_step_size") == 1
    plan = made[0]
    assert plan.replay is not None
    if plan.replay.place != RAM:
        assert result.value("no_callback") == 4
        paged_bytes = plan.claims.storage_bytes
        stored = paged_bytes + 2 * plan.replay.stride + plan.replay.entry_bytes
        assert len(result.files["page.bin"]) == stored
    both = lane.run_host(
        lane.build_host(tmp_path, model), lane.training_input(*samples(made[1], 2), 0.05)
    )
    assert both.value("selftest_exact") == 1, "the plain calls still do all steps"


@needs_zig
@pytest.mark.parametrize("name", ["resnet-adam-accumulate", "i8"])
def test_a_cached_step_executes_what_is_predicted(name: str, tmp_path: Path) -> None:
    made = case(name)
    plan, replay = made[0], made[0].replay
    assert replay is not None
    compiler: lane.Compiler = "gcc" if lane.has_gcc() else "zig"
    model = emit_c(*made, tmp_path)[0].stem
    files, want = in_c(made)
    image = lane.build(
        tmp_path, model, "cortex-m7", compiler, selftest=False, main=lane.FIRMWARE / "replay.c"
    )
    result = lane.run(image, files=files)
    assert result.exit_code == 0, result.stdout
    assert result.files["output.bin"] == want
    micro, cpi = plan.training.micro_batches, DEVICE.cycles_per_instruction.value
    for region, calls, cycles in (
        ("train", 6, replay.cached_cycles),
        ("infer", 3, replay.capture_cycles),
    ):
        executed = micro * result.instructions[region] / calls
        assert 0.85 < executed * cpi / cycles < (1.15 if compiler == "gcc" else 1.5), region


def test_without_replay_nothing_of_it_is_emitted(tmp_path: Path) -> None:
    plan, training = tail(nets.mlp(), ("fc2",))
    text = "".join(f.read_text() for f in emit_c(plan, training, tmp_path) if "mlp" in f.name)
    assert "replay" not in text.lower()
    assert "capture" not in text


# ---- command line


def test_command_line(odt: Cli) -> None:
    ran = odt(DIGITS, "--device", plans.BOARD, "--train", "last", "--replay", "50", "-o", "out")
    assert ran.code == 0, ran.err
    assert "replay    50 samples as pool3_out in RAM, 896 B per sample, 44,800 B" in ran.out
    plan = load_plan(Path("out/plan.json"))
    assert plan.replay is not None
    assert plan.replay.epochs == 10
    assert odt("verify", "out/plan.json", "--json").json["replay"] == plan.replay.model_dump()
    with np.load(DATA) as data:
        np.savez("few.npz", x=data["x"][:60], y=data["y"][:60])
    ran = odt("run", "out/plan.json", "--data", "few.npz", "--epochs", "2")
    assert "replayed: 50 micro-steps without the first 8 of" in ran.out
    quick = ("--time-limit", "0.5", "--gap", "0.5")
    told = odt("explain", "out/plan.json", "conv1.weight", "pool3", *quick).out
    assert "conv1.weight: frozen, its layer runs once per sample (replay)" in told
    assert "pool3_out: kept, 896 B, replayed from RAM" in told
    card = odt(DIGITS, "--device", plans.BOARD, "--train", "last", "--replay", "50", "--replay-in",
               "sdcard", "--epochs", "3", "--json").json  # fmt: skip
    assert (card["replay"]["place"], card["replay"]["epochs"]) == ("sdcard", 3)
    none = odt(DIGITS, "--ram", "320KB", "--flash", "1MB", "--train", "last", "--replay", "9999")
    assert none.code == 0
    assert "replay    none: 9,999 samples take" in none.out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--epochs", "3"], "give --replay N"),
        (["--replay-in", "ram"], "give --replay N"),
        (["--replay", "0"], "--replay: 0 samples"),
        (["--replay", "5", "--epochs", "1"], "--epochs: 1"),
        (["--replay", "5", "--replay-in", "tape"], "tape"),
        (["--replay", "5", "--replay-in", "sdram", "--storage", "sdcard"], "knows one storage"),
    ],
)
def test_bad_options(options: list[str], told: str, odt: Cli) -> None:
    ran = odt(DIGITS, "--device", plans.BOARD, *options)
    assert ran.code == 2
    assert told in ran.error
