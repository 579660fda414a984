"""Plans over several RAM regions: placed, checked, run by NumPy and C, and on a board of two."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nets
import numpy as np
import plans
import pytest
from board import lane
from board.elf import Elf
from board.objects import BuildError
from cli_run import Cli
from oracle import Unconstrained, batch
from test_c_backend import check_api, needs_gcc, reference, samples

from odt_plan.backends.c import emit_c
from odt_plan.backends.numpy import Runtime
from odt_plan.ir.errors import InfeasibleError, UsageError
from odt_plan.ir.graph import Graph
from odt_plan.ir.opdef import get_op
from odt_plan.ir.training import TrainingGraph, TrainingSpec
from odt_plan.planner.check import CheckError, check
from odt_plan.planner.device import Device, load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.plan import Plan, load_plan
from odt_plan.planner.problem import RamRegion

BOARD = load_device("stm32h743")
DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits_cnn.onnx"
SLOW = next(r.extra_cycles_per_byte for r in BOARD.ram_runs if r.name == "SRAM1")
needs_zig = pytest.mark.skipif(not lane.has_zig_lane(), reason="needs ziglang and unicorn")

Planned = tuple[Plan, TrainingGraph]


def split(
    forward: Graph,
    spec: TrainingSpec,
    share: float,
    storage: str | None = None,
    *,
    overlap: bool = False,
) -> Planned:
    """A plan for a fast and a slow region that only together hold what one region would have to."""
    training = plans.training_of(forward, spec)
    ram = plans.squeezed(forward, training, ram_bytes=10**6).claims.ram_bytes
    total = ram.total if storage is None else ram.total - ram.arena // 3
    # A region is as large as its largest tensor at least; then a little more than all live bytes.
    for more in range(0, total, max(4, total // 160 * 4)):
        fast = int(share * total) // 4 * 4
        regions = RamRegion("DTCM", fast), RamRegion("SRAM1", total + more - fast, SLOW)
        try:
            plan = plans.squeezed(
                forward, training, ram_bytes=total + more, storage=storage, device=BOARD,
                regions=regions, overlap=overlap,
            )  # fmt: skip
        except AssertionError:
            continue
        assert max(r.budget for r in plan.regions) < total, "one region would do"
        return plan, training
    raise AssertionError("no layout")


CASES: dict[str, Callable[[], Planned]] = {
    "mlp-sgd": lambda: split(nets.mlp(), TrainingSpec(), 0.4),
    "resnet-adam-accumulate": lambda: split(
        nets.resnet(), TrainingSpec(optimizer="adam", micro_batches=3), 0.5
    ),
    "cnn-momentum": lambda: split(nets.cnn(), TrainingSpec(optimizer="momentum"), 0.6),
    "cnn-paged": lambda: split(nets.cnn(size=8), TrainingSpec(), 0.4, "sdcard"),
    "cnn-overlapped": lambda: split(
        nets.cnn(size=8), TrainingSpec(micro_batches=2), 0.4, "sdcard", overlap=True
    ),
    "views": lambda: split(nets.views(), TrainingSpec(), 0.5),
}


@cache
def case(name: str) -> Planned:
    return CASES[name]()


@cache
def planned(**options: Any) -> PlannedModel:
    return make_plan(
        Request(DIGITS, BOARD, with_baselines=False, with_relaxations=False, **options)
    )


def place_of(plan: Plan, name: str) -> str:
    """Region of a buffer in arena or state, by sums of the parts alone."""
    b = next(b for b in plan.buffers if b.id == name)
    end = 0
    for r in plan.regions:
        end += r.arena if b.space == "arena" else r.state
        if b.offset < end:
            assert b.offset + b.bytes <= end
            return r.name
    raise AssertionError(name)


# ---- devices


def test_runs_of_a_device_and_their_budgets() -> None:
    got = {r.name: (r.regions, n) for r, n in BOARD.ram_budgets}
    assert list(got) == ["AXI", "DTCM", "SRAM1", "SRAM4"], "fast ones first, then large ones"
    assert got["SRAM1"] == (("SRAM1", "SRAM2", "SRAM3"), 288 << 10)
    assert got["AXI"][1] == (512 << 10) - BOARD.reserve.ram_bytes, "the stack lies there"
    assert got["DTCM"][1] == 128 << 10


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("region: AXI", "region: ITCM", "reserve.region: 'ITCM' is none of the RAM regions DTCM"),
        ("name: SRAM4", "name: SRAM3", "regions: SRAM3 occurs twice"),
        ("kind: code", "kind: code\n    extra_cycles_per_byte: {value: 1, source: abc}",
         "extra_cycles_per_byte: plans place"),
    ],
)  # fmt: skip
def test_a_wrong_spec_is_told(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "board.yaml"
    spec = Path(__file__).resolve().parent.parent / "specs" / "devices" / "stm32h743.yaml"
    assert old in spec.read_text()
    path.write_text(spec.read_text().replace(old, new, 1))
    with pytest.raises(UsageError, match=message):
        load_device(str(path))


def with_reserve_in(region: str) -> Device:
    return BOARD.model_copy(update={"reserve": BOARD.reserve.model_copy(update={"region": region})})


def test_the_reserve_is_taken_where_the_stack_lies() -> None:
    got = {r.name: r.bytes - n for r, n in with_reserve_in("SRAM2").ram_budgets}
    assert got == {"AXI": 0, "DTCM": 0, "SRAM1": BOARD.reserve.ram_bytes, "SRAM4": 0}


# ---- plans


@pytest.mark.parametrize("name", CASES)
def test_trains_bit_for_bit_like_unconstrained_training(name: str) -> None:
    plan, training = case(name)
    check(plan, training, BOARD)
    assert all(r.arena + r.state > 0 for r in plan.regions), "both are in use"
    runtime, oracle = Runtime(plan, training), Unconstrained(training)
    rng = np.random.default_rng(1)
    for _ in range(3 * training.spec.micro_batches):
        x, y = batch(training, rng)
        assert runtime.train_step(x, y, 0.02) == oracle.step(x, y, 0.02)
        assert runtime.state_bytes() == oracle.state_bytes(plan)
    other = Runtime(plan, training)
    other.load_state(runtime.state_bytes(), updates=runtime.updates)
    x, y = batch(training, rng)
    assert other.train_step(x, y, 0.02) == runtime.train_step(x, y, 0.02)


def test_a_net_fits_only_with_two_regions() -> None:
    budgets = (("DTCM", 180 << 10), ("SRAM1", 180 << 10))
    for name, n in budgets:
        with pytest.raises(InfeasibleError):
            planned(train=("all",), ram_regions=((name, n),))
    done = planned(train=("all",), ram_regions=budgets)
    assert done.plan.device.budget.ram_bytes == 360 << 10
    assert [(r.name, r.budget) for r in done.plan.regions] == list(budgets)
    assert all(r.arena + r.state > 0 for r in done.plan.regions)
    plain = planned(train=("all",), ram_bytes=360 << 10)
    assert plain.plan.regions == ()
    rng = np.random.default_rng(2)
    here, there = Runtime(done.plan, done.training), Runtime(plain.plan, plain.training)
    for _ in range(2):
        x, y = batch(done.training, rng)
        assert here.train_step(x, y, 0.05) == there.train_step(x, y, 0.05)
    for param, tensor in here.params().items():
        assert tensor.tobytes() == there.params()[param].tobytes()


def test_all_regions_are_on_offer_and_the_first_is_enough() -> None:
    plan = planned().plan
    assert [(r.name, r.budget) for r in plan.regions] == [(r.name, n) for r, n in BOARD.ram_budgets]
    assert [r.name for r in plan.regions if r.arena + r.state] == ["AXI"]
    one = planned(ram_bytes={r.name: n for r, n in BOARD.ram_budgets}["AXI"]).plan
    assert (plan.claims.cycles, plan.steps) == (one.claims.cycles, one.steps)


def test_slow_regions_cost_what_is_told() -> None:
    """Claimed cycles are those of one region plus bytes x rate, counted from the file alone."""
    done = planned(ram_regions=(("DTCM", 100 << 10), ("SRAM1", 100 << 10)))
    plan, nodes = done.plan, {n.name: n for n in done.training.graph.nodes}
    sizes = {b.id: b.bytes for b in plan.buffers if b.space in ("arena", "state")}
    more = 0
    for s in plan.steps:
        if not s.nodes or get_op(nodes[s.nodes[0]].op).view:
            continue
        named = [b for b in (*s.reads, *s.writes, s.workspace, s.tile) if b in sizes]
        slow = sum(sizes[b] for b in named if b and place_of(plan, b) == "SRAM1")
        more += -(-slow * 6 // 10)
    assert SLOW == 0.6
    plain = planned(ram_bytes=200 << 10).plan
    assert more > 0
    assert plan.claims.cycles == plain.claims.cycles + more
    assert plan.objective[-1].value == plan.claims.cycles
    assert plan.objective[-1].bound <= plain.claims.cycles


def test_hot_buffers_lie_in_the_fast_region() -> None:
    """The fast region holds what is touched most per byte that it takes."""
    plan = planned(train=("all",), ram_regions=(("DTCM", 80 << 10), ("SRAM1", 400 << 10))).plan
    worst = planned(train=("all",), ram_regions=(("SRAM1", 400 << 10),)).plan
    fast = planned(train=("all",), ram_regions=(("DTCM", 400 << 10),)).plan
    assert fast.claims.cycles < plan.claims.cycles < worst.claims.cycles
    share = (plan.claims.cycles - fast.claims.cycles) / (worst.claims.cycles - fast.claims.cycles)
    held = plan.regions[0].arena + plan.regions[0].state
    assert 1 - share > 1.5 * held / plan.claims.ram_bytes.total


def test_latency_limits_count_slow_memory() -> None:
    budgets = (("DTCM", 100 << 10), ("SRAM1", 100 << 10))
    loose = planned(ram_regions=budgets).plan
    least = planned(ram_bytes=200 << 10).plan.claims.latency_s
    assert least < loose.claims.latency_s
    limit = (least + loose.claims.latency_s) / 2
    plan = planned(ram_regions=budgets, latency_s=limit).plan
    assert plan.claims.latency_s <= limit
    assert plan.objective[0].value <= loose.objective[0].value


def test_a_tensor_larger_than_any_region_is_not_updated() -> None:
    """All regions together would hold it."""
    plan = planned(ram_regions=(("DTCM", 124 << 10), ("AXI", 124 << 10))).plan
    sizes = {u.param: u.ratio for u in plan.decisions.updates}
    assert 0 < sizes["conv3.weight"] < 1, "some of its channels"
    with pytest.raises(InfeasibleError, match=r"RAM: needs .* at step") as e:
        planned(train=("conv3.weight",), ram_regions=(("DTCM", 124 << 10), ("AXI", 124 << 10)))
    (short,) = e.value.shortfalls
    assert short.has == 124 << 10
    assert short.works is not None
    assert planned(train=("conv3.weight",), ram_bytes=int(short.works))


def test_an_unknown_region_is_told() -> None:
    with pytest.raises(UsageError, match="--ram: stm32h743 has no RAM region 'CCM'; it has AXI, D"):
        planned(ram_regions=(("CCM", 1 << 16),))


# ---- the checker


def mutated(name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """A changed plan must be refused."""
    plan, training = case(name)
    d = plan.model_dump(mode="json")
    change(d)
    check(Plan.model_validate(d), training, BOARD)


def buffers(d: dict[str, Any], space: str) -> list[dict[str, int]]:
    return sorted(
        (b for b in d["buffers"] if b["space"] == space),
        key=lambda b: b["offset"],
    )


def boundary(d: dict[str, Any], space: str) -> int:
    return int(d["regions"][0][space])


def across(d: dict[str, Any]) -> None:
    """The last buffer of the fast region, 4 bytes further."""
    end = boundary(d, "arena")
    last = next(b for b in buffers(d, "arena") if b["offset"] + -(-b["bytes"] // 4) * 4 == end)
    last["offset"] += 4


def elsewhere(d: dict[str, Any]) -> None:
    """A buffer of the fast region at the first byte of the slow one, where something lives."""
    end = boundary(d, "arena")
    for b in buffers(d, "arena"):
        for other in buffers(d, "arena"):
            meet = b["first"] <= other["last"] and other["first"] <= b["last"]
            fits = b["bytes"] <= other["bytes"]
            if b["offset"] < end <= other["offset"] and meet and fits and b["bytes"] > 0:
                b["offset"] = other["offset"]
                return
    raise AssertionError("nothing to move")


def state_across(d: dict[str, Any]) -> None:
    end = boundary(d, "state")
    next(b for b in buffers(d, "state") if b["offset"] == end)["offset"] = end - 4


def less_budget(d: dict[str, Any]) -> None:
    """The budget of one region for the other: the sum stays."""
    first, second = d["regions"]
    used = first["arena"] + first["state"]
    second["budget"] += first["budget"] - used + 4
    first["budget"] = used - 4


def moved_boundary(d: dict[str, Any]) -> None:
    first, second = d["regions"]
    first["arena"] += 4
    second["arena"] -= 4


def swapped_names(d: dict[str, Any]) -> None:
    """All that is in the slow region claims to be in the fast one."""
    first, second = d["regions"]
    first["name"], second["name"] = second["name"], first["name"]


def wrong_name(d: dict[str, Any]) -> None:
    d["regions"][0]["name"] = "CCM"


def dropped(d: dict[str, Any]) -> None:
    """As if all lay in one region, which is fast."""
    del d["regions"]


def more_in_all(d: dict[str, Any]) -> None:
    d["regions"][0]["budget"] += 4


def no_extra(d: dict[str, Any]) -> None:
    """Cycles of a step as if its slow buffers were fast."""
    whole = case("cnn-momentum")[0]
    training = case("cnn-momentum")[1]
    cost = plans.cost_of(BOARD)
    nodes = {n.name: n for n in training.graph.nodes}
    for i, s in enumerate(whole.steps):
        if s.kind == "compute" and s.cycles > cost.node_cycles(nodes[s.nodes[0]]):
            d["steps"][i]["cycles"] = cost.node_cycles(nodes[s.nodes[0]])
            return
    raise AssertionError("no step touches the slow region")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (across, "lie in no one RAM region"),
        (elsewhere, "where .* lives at"),
        (state_across, "lie in no one RAM region"),
        (less_budget, "B of DTCM, but its budget is"),
        (moved_boundary, "lie in no one RAM region|claims .* B of arena, but takes"),
        (swapped_names, r"claims \d+ cycles, takes"),
        (wrong_name, "device stm32h743 has no RAM region CCM"),
        (dropped, r"claims \d+ cycles, takes"),
        (more_in_all, "regions: budget adds up to"),
        (no_extra, r"claims \d+ cycles, takes"),
    ],
)
def test_the_checker_rejects(change: Callable[[dict[str, Any]], None], message: str) -> None:
    mutated("cnn-momentum", lambda d: None)
    with pytest.raises(CheckError, match=message):
        mutated("cnn-momentum", change)


def test_a_plan_file_comes_back() -> None:
    plan, _ = case("cnn-momentum")
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert '"regions"' not in planned(ram_bytes=200 << 10).plan.model_dump_json()


# ---- C


@needs_gcc
@pytest.mark.parametrize("name", ["mlp-sgd", "cnn-momentum", "cnn-paged"])
def test_host_equals_numpy_bit_for_bit(name: str, tmp_path: Path) -> None:
    plan, training = case(name)
    prefix = emit_c(plan, training, tmp_path)[0].stem
    program = lane.build_host(tmp_path, prefix)
    steps = 2 * training.spec.micro_batches
    result = lane.run_host(program, lane.training_input(*samples(training, steps), 0.05))
    assert result.exit_code == 0, result.stdout
    assert result.value("selftest_exact") == 1
    assert result.files["output.bin"] == reference(plan, training, steps, 0.05)


@needs_gcc
def test_a_state_in_two_regions_is_saved_and_loaded(tmp_path: Path) -> None:
    case_ = split(nets.mlp(), TrainingSpec(optimizer="adam"), 0.5)
    assert all(r.state for r in case_[0].regions)
    check_api(case_, tmp_path)


def two_regions(plan: Plan) -> lane.Limits:
    """The board's RAM is the fast region, with stack and data; the slow one is as planned."""
    fast, slow = (next(r for r in BOARD.ram_runs if r.name == p.name) for p in plan.regions)
    bytes_ = -(-plan.regions[1].budget // 8) * 8
    return lane.Limits(
        ram_bytes=fast.bytes, ram_origin=fast.origin, regions=(("sram1", slow.origin, bytes_),)
    )


@needs_zig
@pytest.mark.parametrize("name", ["resnet-adam-accumulate", "cnn-paged"])
def test_a_board_with_two_regions(name: str, tmp_path: Path) -> None:
    plan, training = case(name)
    limits = two_regions(plan)
    prefix = emit_c(plan, training, tmp_path)[0].stem
    image = lane.build(tmp_path, prefix, limits=limits)
    steps = training.spec.micro_batches
    files = lane.training_input(*samples(training, steps), 0.05)
    result = lane.run(image, files=files, limits=limits)
    assert result.exit_code == 0, result.stdout
    assert result.value("selftest_exact") == 1
    assert result.files["output.bin"] == reference(plan, training, steps, 0.05)
    symbols = Elf(image).symbols
    for r in plan.regions:
        origin = next(x.origin for x in BOARD.ram_runs if x.name == r.name)
        for space, size in (("arena", r.arena), ("state", r.state)):
            if size:
                s = symbols[f"{prefix}_{space}_{r.name.lower()}"]
                assert (s.bytes, s.address // 0x100_0000) == (size, origin // 0x100_0000)


@needs_zig
def test_a_region_that_is_too_small_fails_at_link(tmp_path: Path) -> None:
    plan, training = case("cnn-momentum")
    limits = two_regions(plan)
    ((region, origin, _),) = limits.regions
    used = plan.regions[1].arena + plan.regions[1].state
    emit_c(plan, training, tmp_path)
    with pytest.raises(BuildError, match=r"(?s)sram1.*overflow"):
        lane.build(
            tmp_path, "cnn", limits=replace(limits, regions=((region, origin, used // 8 * 8 - 8),))
        )


# ---- command line and pictures


def test_regions_on_the_command_line(odt: Cli, tmp_path: Path) -> None:
    words = (DIGITS, "--device", "stm32h743", "--ram", "DTCM=100KB,SRAM1=100,000")
    done = odt(*words, "--emit", "svg,c", "-o", "out")
    assert done.code == 0, done.err
    assert "RAM 202,400 B (197.66 KiB) = DTCM 102,400 + SRAM1 100,000 as given" in done.out
    plan = load_plan(tmp_path / "out" / "plan.json")
    dtcm, sram = plan.regions
    assert (dtcm.name, dtcm.budget, sram.name, sram.budget) == ("DTCM", 102400, "SRAM1", 100000)
    told = f"SRAM1 {sram.arena + sram.state:,} B of 100,000 B (97.66 KiB): arena {sram.arena:,}"
    assert told in done.out
    assert told in odt("verify", "out/plan.json").out
    record = odt("verify", "out/plan.json", "--json").json
    assert record["regions"] == [r.model_dump() for r in plan.regions]
    header = (tmp_path / "out" / "digits_cnn.h").read_text()
    assert f"#define DIGITS_CNN_STATE_SRAM1_BYTES {sram.state}u" in header
    picture = ElementTree.parse(tmp_path / "out" / "memory.svg")
    texts = [t.text or "" for t in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert f"DTCM: arena {dtcm.arena:,} B, state {dtcm.state:,} B of 102,400 B" in texts
    given = odt("explain", "out/plan.json", "conv2.bias", "--json")
    assert given.code == 0, given.err
    shown = odt("devices", "show", "stm32h743").out
    assert "294,912 B (288.00 KiB) of RAM from 0x30000000 (SRAM1), 0.6 cycles per byte" in shown


@pytest.mark.parametrize(
    ("ram", "message"),
    [
        ("DTCM=100KB,DTCM=1KB", "--ram: DTCM is given twice"),
        ("CCM=64KB", "--ram: stm32h743 has no RAM region 'CCM'; it has AXI, DTCM, SRAM1, SRAM4"),
        ("DTCM=many", "--ram DTCM: 'many' is not a size; write for example 320KB, 1.5MB, 327680"),
        ("DTCM=", "--ram DTCM: '' is not a size"),
    ],
)
def test_wrong_regions_on_the_command_line(ram: str, message: str, odt: Cli) -> None:
    done = odt(DIGITS, "--device", "stm32h743", "--ram", ram)
    assert done.code == 2
    assert done.error.startswith(message)


def test_too_little_in_every_region(odt: Cli) -> None:
    """The value that is told is one for one region, and works."""
    words = (DIGITS, "--device", "stm32h743", "--train", "last", "-q", "--ram")
    refused = odt(*words, "DTCM=16KB,AXI=20KB").refusal
    assert "--ram DTCM=16384,AXI=20480" in refused[0]
    need = re.search(r"has 20,480 B .*; the smallest --ram that works is (\d+)", "".join(refused))
    assert need
    assert odt(*words, need[1]).code == 0
    assert odt(*words, str(int(need[1]) - 4)).code == 3
