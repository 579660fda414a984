"""Page transfers beside the core: clocks, places, model, checker, back ends, wear."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import nets
import numpy as np
import plans
import pytest
from mutate import DEVICE, Json, buffer, dump, find, reject, repaired
from onnx_files import export
from plan_record import finish
from test_planner import every_solution
from test_runtime import batch
from zoo import exhibit

from odt_plan.backends.numpy import Runtime
from odt_plan.ir.errors import InfeasibleError, UsageError
from odt_plan.ir.graph import Graph
from odt_plan.ir.training import TrainingGraph, TrainingSpec
from odt_plan.planner.baselines import keep_all
from odt_plan.planner.check import CheckError, check
from odt_plan.planner.device import Device, Fact, Quantity, Storage, Wear, load_device
from odt_plan.planner.linear import SolverOptions
from odt_plan.planner.milp import Milp
from odt_plan.planner.pipeline import Request, make_plan
from odt_plan.planner.plan import Plan
from odt_plan.planner.problem import Limits, Problem
from odt_plan.planner.schedule import Moves, moves_of, realize
from odt_plan.planner.transfers import Hiding, Placed, Placement, Transfer, run, synchronous

EXACT = SolverOptions(gap=0.0, time_limit_s=30)

# ---- clocks and places


def ticks(compute: Sequence[int], transfers: Sequence[Transfer], places: Placement) -> int:
    """The length of a micro-step, cycle by cycle: a queue that the bus works off."""
    left: dict[int, int] = {}
    queue: list[int] = []
    now = 0

    def tick() -> None:
        nonlocal now
        now += 1
        if queue:
            left[queue[0]] -= 1
            if left[queue[0]] == 0:
                queue.pop(0)

    both = list(enumerate(zip(transfers, places, strict=True)))
    for p in range(len(compute) + 1):
        early = [i for i, (t, q) in both if t.out and q.start < q.wait == p]
        outs = [i for i, (t, q) in both if t.out and q.start == p]
        at_once = [i for i, (t, q) in both if t.out and q.start == q.wait == p]
        ins = [i for i, (t, q) in both if not t.out and q.start == p]
        needed = [i for i, (t, q) in both if not t.out and q.wait == p]
        for starts, waits in (([], early), (outs, at_once), (ins, needed)):
            for i in starts:
                left[i] = transfers[i].cycles
                queue.append(i)
            for i in waits:
                while left[i]:
                    tick()
        for _ in range(compute[p] if p < len(compute) else 0):
            tick()
    return now


def instance(seed: int) -> tuple[list[int], list[Transfer], list[int], int]:
    """Cycles of steps, transfers of one or two tensors, live bytes, and what RAM holds."""
    rng = random.Random(seed)
    m = rng.randint(4, 7)
    transfers = []
    for tensor in range(rng.randint(1, 2)):
        home = rng.randint(0, m - 3)
        free = rng.randint(home, m - 3)
        needed = rng.randint(free + 1, m - 1)
        size, cycles = rng.randint(1, 4), rng.randint(1, 8)
        transfers.append(Transfer(tensor, True, cycles, size, home, free, needed))
        transfers.append(Transfer(tensor, False, cycles, size, needed, free, needed))
    live = [rng.randint(2, 10) for _ in range(m)]
    compute = [rng.randint(0, 6) for _ in range(m)]
    transfers.sort(key=lambda t: t.home)
    return compute, transfers, live, rng.randint(max(live), max(live) + 5)


def every_placement(
    transfers: Sequence[Transfer], live: Sequence[int], limit: int
) -> Iterator[Placement]:
    """All starts of page-ins and waits for page-outs that RAM holds."""
    ranges = [
        range(t.home if t.out else t.free, (t.latest if t.out else t.home) + 1) for t in transfers
    ]
    for choice in product(*ranges):
        places = tuple(
            Placed(t.home, x) if t.out else Placed(x, t.home)
            for t, x in zip(transfers, choice, strict=True)
        )
        added = [0] * len(live)
        written = {t.tensor: p.wait for t, p in zip(transfers, places, strict=True) if t.out}
        for t, p in zip(transfers, places, strict=True):
            for k in range(t.free, p.wait) if t.out else range(p.start, t.home):
                added[k] += t.bytes
        fits = all(not more or n + more <= limit for n, more in zip(live, added, strict=True))
        if fits and all(
            t.out or p.start >= written[t.tensor] for t, p in zip(transfers, places, strict=True)
        ):
            yield places


def test_both_clocks_are_those_of_a_bus_that_works_off_a_queue() -> None:
    seen = 0
    for seed in range(60):
        compute, transfers, live, _ = instance(seed)
        for places in every_placement(transfers, live, 10**6):
            assert run(compute, transfers, places).cycles == ticks(compute, transfers, places)
            seen += 1
    assert seen > 1500


def test_places_are_best_in_nearly_all_small_cases_and_never_worse_than_waiting() -> None:
    missed = 0
    for seed in range(300):
        compute, transfers, live, limit = instance(seed)
        hiding = Hiding([(1, compute)], transfers, live, limit)
        found = hiding.place()
        takes = ticks(compute, transfers, found)
        possible = list(every_placement(transfers, live, limit))
        assert found in possible, seed
        assert takes <= ticks(compute, transfers, synchronous(transfers))
        missed += takes > min(ticks(compute, transfers, p) for p in possible)
    assert missed <= 6


# ---- the model and the schedule


def problem_of(
    forward: Graph,
    storage: str,
    *,
    overlap: bool = True,
    ram: int = 10**8,
    spec: TrainingSpec | None = None,
    only: tuple[str, ...] = (),
) -> Problem:
    chosen = [c for c in plans.whole(forward) if not only or c.param in only]
    training = plans.training_of(forward, spec, chosen)
    cost = plans.cost_of(DEVICE, storage, overlap=overlap)
    return plans.problem_of(
        forward, training, Limits(ram, 10**8, None, None, 10**6), cost, fixed=True
    )


def with_ram(problem: Problem, ram: int) -> Problem:
    return replace(problem, limits=replace(problem.limits, ram_bytes=ram))


@pytest.mark.parametrize(
    ("net", "only", "storage", "micro"),
    [
        (lambda: nets.mlp((6, 8, 4)), (), "sdcard", 1),
        (lambda: nets.mlp((64, 96, 48)), (), "sdram", 1),
        (lambda: nets.mlp((64, 96, 48)), (), "sdram", 3),
        (lambda: nets.mlp((48, 8, 96)), (), "sdcard", 2),
    ],
)
def test_no_schedule_beats_the_bound_and_the_best_one_is_found(
    net: Callable[[], Graph], only: tuple[str, ...], storage: str, micro: int
) -> None:
    """All decisions x all places of their transfers, at every budget of RAM that matters."""
    problem = problem_of(net(), storage, spec=TrainingSpec(micro_batches=micro), only=only)
    state = realize(problem, keep_all(problem)).state_bytes
    made = []
    for solution in every_solution(problem):
        try:
            made.append(moves_of(problem, solution))
        except KeyError:
            continue  # an auxiliary tensor was never made, or not before its page-out
    needs = sorted({max(f.live) + state for f in made})
    found = 0
    for ram in (needs[0], needs[len(needs) // 2], needs[-1]):
        program = Milp(with_ram(problem, ram), shy=True)
        solution = program.solve("latency", EXACT).solution
        assert solution is not None
        schedule = realize(problem, solution, hide_within=with_ram(problem, ram).limits)
        assert max(schedule.live) + schedule.state_bytes <= ram
        best = fastest(made, ram - state, schedule.cycles)
        assert Milp(with_ram(problem, ram)).solve("latency", EXACT).bound <= best + 0.5, ram
        assert schedule.cycles <= 1.1 * best
        found += schedule.cycles == best
    assert found >= 2


def fastest(made: Sequence[Moves], arena: int, known: int) -> int:
    """Cycles of the fastest schedule; those that can't be faster than a known one are left out."""
    for m in made:
        bus = sum(n for n, _ in m.micro_steps) * sum(t.cycles for t in m.transfers)
        least = max(bus, sum(n * sum(cycles) for n, cycles in m.micro_steps))
        if max(m.live) <= arena and least < known:
            for places in every_placement(m.transfers, m.live, arena):
                takes = sum(n * run(c, m.transfers, places).cycles for n, c in m.micro_steps)
                known = min(known, takes)
    return known


@pytest.mark.parametrize("storage", ["sdram", "sdcard"])
def test_transfers_beside_the_core_never_take_longer(storage: str) -> None:
    forward = nets.resnet(2, 4, 8)
    waiting = problem_of(forward, storage, overlap=False)
    beside = problem_of(forward, storage)
    least = round(Milp(waiting).solve("ram", EXACT).value)
    kept = realize(waiting, keep_all(waiting))
    most = max(kept.live) + kept.state_bytes
    faster = 0
    for ram in range(least, most, (most - least) // 4):
        result = Milp(with_ram(waiting, ram)).solve("latency", EXACT)
        assert result.solution is not None
        before = realize(waiting, result.solution).cycles
        # The very decisions that are best where transfers are waited for.
        same = realize(beside, result.solution, hide_within=with_ram(beside, ram).limits)
        assert same.cycles <= before == round(result.value)
        assert max(same.live) + same.state_bytes <= ram
        bound = Milp(with_ram(beside, ram)).solve("latency", SolverOptions(gap=0.01)).bound
        assert bound <= same.cycles + 0.5
        faster += same.cycles < before
    assert faster


@pytest.mark.parametrize("graph", [nets.resnet(2, 8, 12), nets.views()], ids=lambda g: g.name)
def test_page_ins_that_nobody_reads_are_left_out(graph: Graph) -> None:
    """Decisions of a solve that was cut short may page in for steps that don't run."""
    training = plans.training_of(graph)
    limits = Limits(10**7, 10**7, storage_bytes=10**6)
    cost = plans.cost_of(load_device(plans.BOARD), "sdram", overlap=True)
    problem = plans.problem_of(graph, training, limits, cost, fixed=True)
    every = {
        (r.tensor.index, e.slot) for r in problem.retentions for e in r.events if e.may_load
    }
    kept = keep_all(problem)
    found = realize(problem, replace(kept, loads=frozenset(every)), hide_within=limits)
    plan = finish(
        training, cost.device, cost, found.steps, found.buffers, found.actions, "sdram",
        found.transfer_cycles, found.cycles,
    )  # fmt: skip
    check(plan, training, DEVICE)
    ins = [s for s in found.steps if s.kind == "page_in"]
    read = {b for s in found.steps if s.nodes for b in s.reads}
    assert 0 < len(ins) < len(every)
    assert all(s.writes[0] in read for s in ins)


@pytest.mark.parametrize("storage", ["sdram", "sdcard"])
def test_a_plan_is_never_slower_for_dma_and_says_what_is_proven(
    tmp_path: Path, storage: str
) -> None:
    forward = nets.resnet(2, 8, 12)
    request = Request(
        export(forward, tmp_path), DEVICE, storage=storage, train=("all",), with_baselines=False
    )
    least = make_plan(replace(request, objective="ram")).plan.claims.ram_bytes.total
    most = make_plan(request).plan.claims.ram_bytes.total
    hidden = 0
    for ram in (least, (least + most) // 2):
        tight = replace(request, ram_bytes=ram)
        waits = make_plan(replace(tight, device=plans.without_dma(DEVICE)))
        beside = make_plan(tight)
        assert not any(s.overlapped for s in waits.plan.steps)
        assert beside.plan.claims.cycles <= waits.plan.claims.cycles
        assert beside.plan.claims.ram_bytes.total <= ram
        (stage,) = beside.plan.objective
        assert stage.bound <= stage.value
        assert beside.plan.status == ("optimal" if stage.gap <= 1e-3 else "feasible")
        hidden += beside.report.transfer_cycles - beside.report.phase_cycles["paging"]
    assert hidden > 0


def test_a_latency_that_needs_hidden_transfers_is_kept(tmp_path: Path) -> None:
    request = Request(
        export(nets.resnet(2, 8, 12), tmp_path), DEVICE, storage="sdram", train=("all",),
        with_baselines=False, with_relaxations=False,
    )  # fmt: skip
    least = make_plan(replace(request, objective="ram")).plan.claims.ram_bytes.total
    tight = replace(request, ram_bytes=least)
    limit = make_plan(tight).plan.claims.latency_s
    limited = replace(tight, latency_s=limit * (1 + 1e-9))
    assert make_plan(limited).plan.claims.latency_s <= limit * (1 + 1e-9)
    waits = replace(limited, device=plans.without_dma(DEVICE))
    with pytest.raises(InfeasibleError):
        make_plan(waits)


# ---- the checker


def overlapped() -> tuple[Json, int, int, int]:
    """A plan, and a page-in that other steps run beside: its start, its wait, its reader."""
    d = dump(exhibit("overlapped"))
    for start, s in enumerate(d["steps"]):
        if s["kind"] == "page_in" and s["overlapped"]:
            target = s["writes"][0]
            wait = next(
                i
                for i, w in enumerate(d["steps"])
                if w["reads"][-1:] == [target] and w["kind"] == "page_wait"
            )
            reader = next(
                i for i in range(wait + 1, len(d["steps"])) if target in d["steps"][i]["reads"]
            )
            if wait > start + 1:
                return d, start, wait, reader
    raise AssertionError("nothing is hidden")


def test_the_exhibit_hides_transfers() -> None:
    for name in ("overlapped", "overlapped-card", "overlapped-accumulate"):
        e = exhibit(name)
        report = e.report()
        assert report.transfer_cycles > 0
        assert report.phase_cycles["paging"] < 0.7 * report.transfer_cycles
        assert report.cycles == sum(report.phase_cycles.values()) == e.plan.claims.cycles


def test_a_wait_after_the_read_is_rejected() -> None:
    d, _, wait, reader = overlapped()
    d["steps"].insert(reader, d["steps"].pop(wait))
    reject(exhibit("overlapped"), repaired(d), "still moving")


def test_a_transfer_without_a_wait_is_rejected() -> None:
    d, _, wait, _ = overlapped()
    step = d["steps"].pop(wait)
    assert step["kind"] == "page_wait"
    reject(exhibit("overlapped"), repaired(d), "still moving|never waited for")


def test_a_second_wait_is_rejected() -> None:
    d, _, wait, _ = overlapped()
    d["steps"].insert(wait, dict(d["steps"][wait]))
    reject(exhibit("overlapped"), repaired(d), "no transfer from .* is under way")


def test_a_wait_before_the_start_is_rejected() -> None:
    d, start, wait, _ = overlapped()
    d["steps"].insert(start, d["steps"].pop(wait))
    reject(exhibit("overlapped"), repaired(d), "no transfer from .* is under way|lives from")


def test_a_wait_for_another_source_is_rejected() -> None:
    d, _, wait, _ = overlapped()
    other = next(
        b["id"] for b in d["buffers"]
        if b["space"] == "storage" and b["id"] != d["steps"][wait]["reads"][0]
        and b["first"] <= wait <= b["last"]
    )  # fmt: skip
    d["steps"][wait]["reads"][0] = other
    reject(exhibit("overlapped"), d, "no transfer from .* is under way")


def test_a_source_that_is_overwritten_before_the_wait_is_rejected() -> None:
    """Another buffer takes its bytes, with a true lifetime and with a false one."""
    d = dump(exhibit("overlapped-card"))
    for start, s in enumerate(d["steps"]):
        if s["kind"] != "page_out" or not s["overlapped"]:
            continue
        source = buffer(d, s["reads"][0])
        wait = next(
            i
            for i, w in enumerate(d["steps"])
            if w["kind"] == "page_wait" and w["reads"][0] == source["id"]
        )
        born = [
            b for b in d["buffers"]
            if b["space"] == "arena" and start < b["first"] < wait and b["bytes"] <= source["bytes"]
        ]  # fmt: skip
        if born:
            assert source["last"] == wait
            buffer(d, born[0]["id"])["offset"] = source["offset"]
            reject(exhibit("overlapped-card"), d, "takes bytes")
            source["last"] = born[0]["first"] - 1
            reject(exhibit("overlapped-card"), d, "lives from")
            return
    raise AssertionError("no page-out is beside a step that writes")


def test_the_time_of_two_transfers_at_once_is_no_claim() -> None:
    """As if the bus carried all of them at once, each ending its own time after its start."""
    e = exhibit("overlapped-card")
    d, cost, now = dump(e), plans.cost_of(DEVICE, "sdcard"), 0
    ends: dict[str, int] = {}
    for s in d["steps"]:
        if s["kind"] in ("page_out", "page_in"):
            move = cost.write_cycles if s["kind"] == "page_out" else cost.read_cycles
            ends[s["writes"][0]] = now + move(buffer(d, s["writes"][0])["bytes"])
        elif s["kind"] == "page_wait":
            s["cycles"] = max(0, ends[s["reads"][1]] - now)
        now += s["cycles"]
    assert now < e.plan.claims.cycles
    reject(e, d, r"page_wait.*claims \d+ cycles, takes \d+")


def test_only_dma_overlaps() -> None:
    e = exhibit("overlapped")
    plain = DEVICE.find_storage("sdram").model_copy(update={"dma": None})
    with pytest.raises(CheckError, match="overlaps, but sdram has no DMA"):
        check(e.plan, e.training, with_storage(DEVICE, plain))


def test_only_transfers_overlap() -> None:
    d = dump(exhibit("overlapped"))
    d["steps"][find(d, kind="compute")]["overlapped"] = True
    reject(exhibit("overlapped"), d, "is overlapped, but compute moves nothing")


# ---- back ends


@pytest.mark.parametrize("name", ["overlapped", "overlapped-card", "overlapped-accumulate"])
def test_bytes_may_move_at_the_start_or_at_the_wait(name: str) -> None:
    e = exhibit(name)
    plain = Runtime(plans.keep_all(e.training), e.training)
    early = Runtime(e.plan, e.training, moved_at="start")
    late = Runtime(e.plan, e.training, moved_at="wait")
    rng = np.random.default_rng(3)
    for _ in range(2 * e.training.spec.micro_batches):
        x, y = batch(e.training, rng)
        loss = plain.train_step(x, y, 0.05)
        assert early.train_step(x, y, 0.05) == loss == late.train_step(x, y, 0.05)
    assert early.state_bytes() == late.state_bytes() == plain.state_bytes()


# ---- wear


def with_storage(device: Device, storage: Storage) -> Device:
    others = tuple(s for s in device.storage if s.id != storage.id)
    return device.model_copy(update={"storage": (*others, storage)})


def raw_flash(*, allowed: bool | None = True, unit: int = 2048) -> Storage:
    base = DEVICE.find_storage("sdcard").model_dump()
    base |= {
        "id": "own", "bytes": 1 << 17, "dma": None, "region": "FLASH",
        "allow_paging": None if allowed is None else Fact(value=allowed, source="made up"),
        "wear": Wear(
            cycles=Quantity(value=10_000, source="made up"), unit_bytes=unit, levelled=False,
            source="made up",
        ),
    }  # fmt: skip
    return Storage.model_validate(base)


def paged_to(
    storage: Storage, spec: TrainingSpec | None = None
) -> tuple[Plan, Device, TrainingGraph]:
    device = with_storage(DEVICE, storage)
    forward = nets.resnet()
    training = plans.training_of(forward, spec)
    whole = plans.keep_all(training).claims.ram_bytes
    limit = int(whole.live_peak * 0.5) + whole.total - whole.arena
    plan = plans.squeezed(forward, training, ram_bytes=limit, storage=storage.id, device=device)
    return plan, device, training


def test_wear_of_a_card_is_what_it_writes_over_its_whole_capacity() -> None:
    e = exhibit("paged-accumulate")
    card, micro = DEVICE.find_storage("sdcard"), e.training.spec.micro_batches
    assert card.wear is not None
    outs = [s for s in e.plan.steps if s.kind == "page_out"]
    sizes = {b.id: b.bytes for b in e.plan.buffers}
    pages = sum(-(-sizes[s.writes[0]] // 16384) for s in outs)
    assert e.plan.claims.worn_bytes == micro * pages * 16384
    assert e.plan.claims.life_steps == int(card.bytes * 1000 / (micro * pages * 16384))
    report = e.report()
    assert (report.worn_bytes, report.life_steps) == (
        e.plan.claims.worn_bytes,
        e.plan.claims.life_steps,
    )


@pytest.mark.parametrize("claim", ["worn_bytes", "life_steps"])
def test_false_claims_of_wear_are_rejected(claim: str) -> None:
    e = exhibit("paged")
    d = dump(e)
    d["claims"][claim] += 1
    reject(e, d, f"claims.{claim} is")


def test_raw_flash_gives_each_tensor_units_of_its_own() -> None:
    for micro in (1, 3):
        plan, device, training = paged_to(raw_flash(), TrainingSpec(micro_batches=micro))
        stored = [b for b in plan.buffers if b.space == "storage"]
        assert len(stored) > 1
        assert all(b.offset % 2048 == 0 for b in stored)
        assert plan.claims.life_steps == 10_000 // micro
        check(plan, training, device)


def test_tensors_that_share_an_erase_unit_are_rejected() -> None:
    plan, device, training = paged_to(raw_flash())
    d = plan.model_dump(mode="json")
    first, second = sorted(
        (b for b in d["buffers"] if b["space"] == "storage"), key=lambda b: b["offset"]
    )[:2]
    second["offset"] = first["offset"] + (first["bytes"] + 3) // 4 * 4
    with pytest.raises(CheckError, match="share the erase unit 0 of own"):
        check(Plan.model_validate(d), training, device)


@pytest.mark.parametrize("allowed", [None, False])
def test_no_paging_to_the_flash_of_the_chip_unless_the_spec_allows_it(allowed: bool | None) -> None:
    plan, _, training = paged_to(raw_flash())
    device = with_storage(DEVICE, raw_flash(allowed=allowed))
    assert "own" not in [s.id for s in device.pageable]
    with pytest.raises(
        UsageError, match=r"own is flash of the chip itself.*; choose none, sdcard, sdram"
    ):
        device.find_storage("own")
    with pytest.raises(CheckError, match="does not allow paging to its own flash, own"):
        check(plan, training, device)
    assert with_storage(DEVICE, raw_flash()).find_storage("own").pages


def test_bundled_boards_page_to_no_flash_of_the_chip() -> None:
    for device_id in ("stm32f746g-disco", "stm32h743", "nrf52840", "rp2040"):
        assert all(s.region is None for s in load_device(device_id).storage)


def test_a_storage_has_to_last(tmp_path: Path) -> None:
    """More steps than what pages most allows: fewer tensors are paged; too many: none is."""
    forward = nets.resnet()
    request = Request(
        export(forward, tmp_path), DEVICE, storage="sdcard", train=("all",), with_baselines=False,
        with_relaxations=False,
    )  # fmt: skip
    card = DEVICE.find_storage("sdcard")
    capacity = card.bytes * 1000
    least = make_plan(replace(request, objective="ram")).plan
    assert least.claims.life_steps == capacity // least.claims.worn_bytes
    most = least.claims.worn_bytes // 16384
    assert most > 1
    needs = [least.claims.ram_bytes.total]
    for pages in (most // 2, 0):
        steps = capacity // (pages * 16384) if pages else capacity // 16384 + 1
        plan = make_plan(replace(request, objective="ram", min_steps=steps)).plan
        assert plan.claims.worn_bytes <= pages * 16384
        assert plan.device.budget.min_steps == steps
        needs.append(plan.claims.ram_bytes.total)
    assert needs == sorted(needs)
    assert needs[-1] > needs[0]
    with pytest.raises(InfeasibleError):
        make_plan(replace(request, ram_bytes=needs[0], min_steps=capacity // 16384 + 1))


def test_a_budget_of_steps_is_checked() -> None:
    e = exhibit("paged")
    d = dump(e)
    d["device"]["budget"]["min_steps"] = d["claims"]["life_steps"]
    check(Plan.model_validate(d), e.training, DEVICE)
    d["device"]["budget"]["min_steps"] += 1
    reject(e, d, "wears the storage out in")


def test_raw_flash_lasts_or_is_not_used(tmp_path: Path) -> None:
    device = with_storage(DEVICE, raw_flash())
    request = Request(
        export(nets.resnet(), tmp_path), device, storage="own", train=("all",), objective="ram",
        with_baselines=False,
    )  # fmt: skip
    plan = make_plan(replace(request, min_steps=10_000)).plan
    assert plan.claims.life_steps == 10_000
    assert make_plan(replace(request, min_steps=10_001)).plan.claims.life_steps is None
    # What tensors are paged to is no room for weights and code.
    kept = DEVICE.flash_bytes - DEVICE.reserve.flash_bytes - (1 << 17)
    assert plan.device.budget.flash_bytes == kept
