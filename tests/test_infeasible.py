"""Why there is no plan: minimal conflicts, smallest values, and ways out that work."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import nets
import numpy as np
import plans
import pytest
from onnx_files import export, floats

from odt_plan.ir.errors import InfeasibleError, Shortfall, UsageError
from odt_plan.planner.conflict import ConflictSearch, Member
from odt_plan.planner.device import load_device
from odt_plan.planner.infeasible import Explanation, NoPlanError, words
from odt_plan.planner.milp import SolveResult
from odt_plan.planner.needs import Needs
from odt_plan.planner.peak import peak_of
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.plan import ObjectiveName, Plan
from odt_plan.planner.problem import Problem
from odt_plan.planner.relaxations import Relaxations

PLENTY = 1 << 24
BOARD = load_device(plans.BOARD)


@cache
def base() -> Request:
    """A float CNN on a board that could page, all of it to be trained."""
    folder = Path(mkdtemp())
    return Request(
        model=export(nets.cnn(), folder),
        device=BOARD,
        ram_bytes=PLENTY,
        flash_bytes=PLENTY,
        train=("all",),
        gap=0.0,
        with_baselines=False,
    )


@cache
def calibrated() -> Request:
    """The same with scales."""
    path = Path(mkdtemp()) / "calib.npz"
    np.savez(path, x=floats(np.random.default_rng(3), 16, 2, 6, 6))
    return replace(base(), calibration=path)


def plan(request: Request) -> Plan:
    return make_plan(replace(request, with_relaxations=False)).plan


def refused(request: Request) -> Explanation:
    with pytest.raises(NoPlanError) as e:
        make_plan(request)
    assert e.value.exit_code == 3
    assert e.value.shortfalls == e.value.explanation.shortfalls
    return e.value.explanation


def least(request: Request) -> int:
    """The least RAM, by minimizing it."""
    return plan(replace(request, objective="ram")).claims.ram_bytes.total


def hopeless() -> Request:
    return replace(base(), ram_bytes=4)


def update_set() -> Request:
    return replace(base(), ram_bytes=least(replace(base(), storage="sdram")) - 4)


def no_paging() -> Request:
    """Fits with paging only."""
    with_paging = least(replace(base(), storage="sdcard"))
    without = least(base())
    assert with_paging < without
    return replace(base(), ram_bytes=without - 4)


def ram_and_latency() -> Request:
    """Each limit alone can be kept, with paging or without, but not both: no transfer is hidden."""
    fast = plan(base()).claims
    assert least(base()) < fast.ram_bytes.total
    waiting = replace(base(), device=plans.without_dma(BOARD))
    return replace(waiting, ram_bytes=least(base()), latency_s=fast.latency_s * 1.0001)


def pin() -> Request:
    pins = ("conv0=i8", "fc=f32,conv1=f32")
    request = replace(calibrated(), precision=pins, train=("auto",))
    (ram,) = refused(replace(request, ram_bytes=4)).shortfalls
    return replace(request, ram_bytes=int(ram.needs) - 4)


def several() -> Request:
    return replace(base(), ram_bytes=4, flash_bytes=4, latency_s=1e-9, energy_j=1e-12)


CASES: dict[str, tuple[Callable[[], Request], list[set[str]]]] = {
    "hopeless": (hopeless, [{"ram"}]),
    "update-set": (update_set, [{"ram", "train"}]),
    "no-paging": (no_paging, [{"ram", "train", "storage"}]),
    "ram-and-latency": (ram_and_latency, [{"ram", "latency", "train"}]),
    "several": (several, [{"ram"}, {"flash"}, {"latency"}, {"energy"}]),
}


@cache
def case(name: str) -> tuple[Request, Explanation]:
    request = CASES[name][0]()
    return request, refused(request)


def without(request: Request, members: set[Member]) -> list[Request]:
    """The request without these members, written apart from the planner's own code."""
    kinds = {m.kind for m in members}
    changes: dict[str, object] = {}
    for kind, change in (
        ("ram", {"ram_bytes": PLENTY}),
        ("flash", {"flash_bytes": PLENTY}),
        ("latency", {"latency_s": None}),
        ("energy", {"energy_j": None}),
        ("train", {"train": ("auto",)}),
    ):
        if kind in kinds:
            changes |= change
    request = replace(request, **changes)  # type: ignore[arg-type]
    dropped = {m.item for m in members if m.kind == "precision"}
    items = [i for p in request.precision for i in p.split(",")]
    request = replace(request, precision=tuple(i for i in items if i not in dropped))
    if "storage" in kinds:
        return [replace(request, storage=s.id) for s in BOARD.storage]
    return [request]


def possible(requests: list[Request]) -> bool:
    for r in requests:
        try:
            plan(r)
        except InfeasibleError:
            continue
        return True
    return False


@pytest.mark.parametrize("name", CASES)
def test_a_conflict_is_minimal(name: str) -> None:
    """Alone it is infeasible; without any one of its members it is not."""
    request, why = case(name)
    assert [{m.kind for m in c.members} for c in why.conflicts] == CASES[name][1]
    every = {
        Member(kind, "")  # type: ignore[arg-type]
        for kind in ("ram", "flash", "latency", "energy", "train", "storage")
    }
    for c in why.conflicts:
        assert c.irreducible
        kinds = {m.kind for m in c.members}
        rest = {m for m in every if m.kind not in kinds}
        assert not possible(without(request, rest))
        for m in c.members:
            assert possible(without(request, rest | {m})), m


def test_the_pin_that_conflicts_is_named() -> None:
    request = pin()
    why = refused(request)
    (conflict,) = why.conflicts
    assert conflict.irreducible
    pins = {m.item for m in conflict.members if m.kind == "precision"}
    assert pins
    assert pins < {"conv0=i8", "fc=f32", "conv1=f32"}
    assert {m.kind for m in conflict.members} == {"precision", "ram"}
    for m in conflict.members:
        assert possible(without(request, {m})), m
    freed = [r for r in why.relaxations if r.options.startswith("without --precision")]
    assert freed
    for r in freed:
        assert "of the layers no longer pinned" in r.gives_up


def asked(request: Request, s: Shortfall, value: float) -> Request:
    field = {"ram": "ram_bytes", "flash": "flash_bytes", "latency": "latency_s"}
    return replace(request, **{field.get(s.limit, "energy_j"): value})  # type: ignore[arg-type]


def unit(s: Shortfall) -> float:
    """A byte, or one in the last of the six digits that are told."""
    assert s.works is not None
    if s.limit in ("ram", "flash"):
        return 1
    return float(f"1e{int(f'{s.works:e}'.partition('e')[2]) - 5}")


@pytest.mark.parametrize("name", CASES)
def test_the_smallest_value_works_and_a_unit_less_does_not(name: str) -> None:
    request, why = case(name)
    assert why.shortfalls
    works = request
    for s in why.shortfalls:
        assert s.works is not None
        if why.together:
            works = asked(works, s, s.works)
        else:
            plan(asked(request, s, s.works))
    if why.together:
        plan(works)
    for s in why.shortfalls:
        assert s.works is not None
        with pytest.raises(InfeasibleError):
            plan(asked(works if why.together else request, s, s.works - unit(s)))


@pytest.mark.parametrize("name", CASES)
def test_ways_out_work_and_are_ranked(name: str) -> None:
    _, why = case(name)
    assert why.relaxations
    assert [r.price for r in why.relaxations] == sorted(r.price for r in why.relaxations)
    for r in why.relaxations:
        claims = plan(r.request).claims
        assert claims.ram_bytes.total == r.ram_bytes
        assert claims.latency_s == r.latency_s
        assert r.price >= 0


def test_paging_and_smaller_update_sets_are_ways_out() -> None:
    _, why = case("no-paging")
    assert {r.options.split()[0] for r in why.relaxations} >= {"--storage", "--ram"}
    request, why = case("update-set")
    assert "--train auto" in {r.options for r in why.relaxations}
    (way,) = (r for r in why.relaxations if r.options == "--train auto")
    full = sum(u.importance for u in plan(replace(request, ram_bytes=PLENTY)).decisions.updates)
    assert way.price == pytest.approx(1 - way.importance / full)


def peak_plan() -> PlannedModel:
    request, why = case("update-set")
    (ram,) = (s for s in why.shortfalls if s.limit == "ram")
    return make_plan(asked(request, ram, ram.works or 0))


def test_the_peak_is_where_the_ram_is() -> None:
    _, why = case("update-set")
    assert why.peak is not None
    (ram,) = (s for s in why.shortfalls if s.limit == "ram")
    assert sum(r.bytes for r in why.peak.residents) == ram.needs == ram.works
    made = peak_plan()
    peak = peak_of(made)
    assert peak == why.peak
    step = made.plan.steps[peak.step]
    assert all(n in peak.node for n in step.nodes)
    live = {b.value for b in made.plan.buffers if b.first <= peak.step <= b.last}
    assert {r.name for r in peak.residents} <= live
    assert any(r.kept for r in peak.residents)


def test_the_error_crosses_processes() -> None:
    error = NoPlanError(case("hopeless")[1])
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.shortfalls) == (str(error), error.shortfalls)


def test_relaxations_are_left_out_on_request() -> None:
    why = refused(replace(hopeless(), with_relaxations=False))
    assert why.relaxations == ()
    assert why.untried == 0


def test_needs_that_are_not_found_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    request = hopeless()
    monkeypatch.setattr(Needs, "alone", lambda *_: iter(()))
    monkeypatch.setattr(Needs, "jointly", lambda *_: iter(()))
    first, second, *_ = words(refused(request))
    assert first.startswith("--ram 4 can't be kept")
    assert second == "  the smallest values that work were not found within the time limit"


def test_what_was_not_tried_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is over right after the conflict and its need."""
    request, search = update_set(), Relaxations.search

    def late(self: Relaxations) -> None:
        monkeypatch.setattr(ConflictSearch, "left_s", property(lambda _: -1.0))
        search(self)

    monkeypatch.setattr(Relaxations, "search", late)
    why = refused(request)
    assert why.untried == 5  # two storages and three update sets
    assert [r.options.split()[0] for r in why.relaxations] == ["--ram"]
    assert "  5 other changes were not tried: the time limit came first" in words(why)


def test_what_is_not_proven_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any time for it, nothing is left out of the conflict, and it says so."""
    request = update_set()
    monkeypatch.setattr(ConflictSearch, "left_s", property(lambda _: -1.0))
    why = refused(request)
    (conflict,) = why.conflicts
    assert not conflict.irreducible
    assert [m.kind for m in conflict.members] == ["train", "storage", "flash", "ram"]
    assert "fewer of them may conflict already, a solve ended at the time limit" in words(why)[0]
    assert [s.limit for s in why.shortfalls] == ["ram"]


def test_a_need_that_is_not_found_is_told_by_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    request, needs = hopeless(), case("hopeless")[1].shortfalls[0].needs
    least = ConflictSearch.least

    def cut_short(self: ConflictSearch, problem: Problem, name: ObjectiveName) -> SolveResult:
        found = least(self, problem, name)
        return replace(found, status="unknown", bound=found.bound - 100, solution=None)

    monkeypatch.setattr(ConflictSearch, "least", cut_short)
    why = refused(request)
    (ram,) = why.shortfalls
    assert ram.works is None
    assert ram.needs == needs - 100
    assert why.relaxations == ()
    assert "a --ram that works was not found within the time limit" in words(why)[0]


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"ram_bytes": 2**53 + 1}, "RAM budget 9,007,199,254,740,993 is outside"),
        ({"flash_bytes": -1}, "flash budget -1 is outside"),
        ({"latency_s": 0.0}, "latency limit 0 can't be kept by any plan"),
        ({"energy_j": float("nan")}, "energy limit nan can't be kept by any plan"),
    ],
)
def test_limits_that_can_not_be_meant(limits: dict[str, float], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        replace(base(), **limits)  # type: ignore[arg-type]
