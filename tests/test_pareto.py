"""Trade-off curves: against an imagined planner that is known in full, and against the real one."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nets
import pytest
from cli_run import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_files import export
from test_cli import MODEL

from odt_plan.ir.errors import InfeasibleError, Shortfall, UsageError
from odt_plan.local_pool import InProcess
from odt_plan.pareto import Curve, Tracer, XName, YName
from odt_plan.planner import pipeline, search
from odt_plan.planner.decided import Decided
from odt_plan.planner.device import load_device
from odt_plan.planner.known import Known, KnownPlan
from odt_plan.planner.pipeline import Request, make_plan
from odt_plan.planner.stages import Stages
from odt_plan.sweep import Figures, OnDone, Outcome, Stage, Task, solve

BOARD = load_device("stm32f746g-disco")
CLOCK_HZ = BOARD.clock_hz.value
UNREAD: Any = None  # the schedule of a plan that is only handed on
SOME = KnownPlan(Decided((), {}), UNREAD)
SVG = "{http://www.w3.org/2000/svg}"


class Imagined:
    """A planner with a handful of plans: (bytes in its model, bytes really, score).

    Its bounds are ``slack`` worse than its values. It is an executor that finishes in any order.
    """

    def __init__(
        self,
        plans: Sequence[tuple[int, int, int]],
        slack: float = 0.0,
        order: Callable[[list[int]], list[int]] = lambda i: i,
    ) -> None:
        self.plans, self.slack, self.order = plans, slack, order
        self.asked: list[int] = []
        self.known: dict[int, Known] = {}

    def run(self, tasks: Sequence[Task], on_done: OnDone) -> None:
        for i in self.order(list(range(len(tasks)))):
            on_done(i, self.answer(tasks[i].request))

    def answer(self, request: Request) -> Outcome:
        budget = request.ram_bytes
        assert budget is not None
        self.asked.append(budget)
        if request.objective == "ram":
            assert request.known == Known()  # what it tells is of another objective
        else:
            self.known[budget] = request.known
        fit = [p for p in self.plans if p[0] <= budget]
        if not fit:
            least = min(p[0] for p in self.plans)
            why = (Shortfall("ram", budget, least, least),)
            return Outcome(None, InfeasibleError.exit_code, "too small", why)
        best = max(p[2] for p in fit)
        use = (min if request.objective == "ram" else max)(p[1] for p in fit if p[2] == best)
        return Outcome(self.figures(use, best), plan=SOME)

    def figures(self, use: int, score: int) -> Figures:
        cycles = 10_000 - score
        stages = {
            "learn": Stage(score, score * (1 + self.slack)),
            "latency": Stage(cycles, cycles / (1 + self.slack)),
        }
        return Figures(
            use, 1, cycles, cycles / CLOCK_HZ, 1.0, score, stages, (), 1, ()  # type: ignore[arg-type]
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is small to read: an imagined planner does not look at it."""
    return export(nets.mlp(), tmp_path_factory.mktemp("tiny"))


def trace(
    model: Path, executor: Imagined, y: YName = "learn", points: int = 9, gap: float = 0.0
) -> Curve:
    request = Request(model, BOARD, gap=gap, train=("auto",) if y == "learn" else ("all",))
    return Tracer(request, "ram", y, points=points).run(executor)


PLANS = st.lists(
    st.tuples(st.integers(1, 200), st.integers(0, 60), st.integers(1, 5000)), min_size=1, max_size=9
).map(lambda found: [(4 * (m + more), 4 * m, score) for m, more, score in found])


@settings(max_examples=100, deadline=None)
@given(
    plans=PLANS,
    slack=st.sampled_from([0.0, 5e-4, 0.2]),
    y=st.sampled_from(["learn", "latency"]),
)
def test_a_curve_is_monotone_within_its_bounds_and_never_worse_than_the_planner(
    tiny: Path, plans: list[tuple[int, int, int]], slack: float, y: YName
) -> None:
    planner = Imagined(plans, slack)
    curve = trace(tiny, planner, y, gap=1e-3)
    assert curve.solves == len(planner.asked) <= 9 + 3
    sign = 1 if y == "learn" else -1
    inherited = defaultdict(Known, planner.known)
    before = -float("inf")
    for p in curve.points:
        assert p.figures is not None, p
        assert p.value is not None
        assert p.bound is not None
        assert p.gap is not None
        assert p.figures.ram_bytes <= p.budget
        assert sign * p.value >= before
        before = sign * p.value
        assert sign * (p.bound - p.value) >= -1e-6 * abs(p.value)
        assert p.status == ("optimal" if p.gap <= 1e-3 else "feasible")
        alone = planner.answer(Request(tiny, BOARD, ram_bytes=int(p.budget))).figures
        if alone is not None:  # None: a plan is known that the planner takes for larger than it is
            own = alone.learn if y == "learn" else alone.latency_s
            assert sign * (own - p.value) <= 1e-3 * abs(p.value) + 1e-9
        if alone is not None and (known := inherited[int(p.budget)]).bound is not None:
            unit = 1 if y == "learn" else CLOCK_HZ
            assert sign * (known.bound - unit * own) >= -1e-9 * abs(unit * own)
            assert known.plan in (None, SOME)
        if slack == 0.2 and p.made_for == p.budget:
            assert p.status == "feasible"  # such a bound proves nothing


@settings(max_examples=50, deadline=None)
@given(plans=PLANS, random=st.randoms(use_true_random=False))
def test_the_order_of_completion_changes_nothing(
    tiny: Path, plans: list[tuple[int, int, int]], random: object
) -> None:
    def shuffled(indices: list[int]) -> list[int]:
        random.shuffle(indices)  # type: ignore[attr-defined]
        return indices

    first, second = Imagined(plans), Imagined(plans, order=shuffled)
    assert trace(tiny, first) == trace(tiny, second)
    assert first.known == second.known


def test_budgets_that_are_answered_are_not_solved(tiny: Path) -> None:
    # One plan from 100 B on, a better one from 900 B on: what is between needs no solve.
    planner = Imagined([(100, 100, 10), (900, 900, 1000)])
    curve = trace(tiny, planner, points=9)
    assert [p.value for p in curve.points] == [10] * 8 + [1000]
    asked = set(planner.asked)
    skipped = [p for p in curve.points if p.budget not in asked and 100 < p.budget < 900]
    # the middle, then the right half down to the last budget below 900 B
    assert [p.budget for p in skipped] == [200, 300, 400, 600]
    assert all(p.status == "optimal" and p.made_for not in (None, p.budget) for p in skipped)
    assert all(p.seconds == 0 and p.bound == 10 for p in skipped)


def test_a_range_below_what_works_says_why(tiny: Path) -> None:
    planner = Imagined([(400, 400, 10)])
    request = Request(tiny, BOARD)
    curve = Tracer(request, "ram", "learn", points=4, low=100, high=400).run(planner)
    assert [p.status for p in curve.points] == ["infeasible"] * 3 + ["optimal"]
    assert all(p.reason for p in curve.points[:3])
    # 200 B is proven too small by the needs that 100 B told
    assert 200 not in planner.asked


def test_a_lost_point_is_named_and_the_others_stay(tiny: Path) -> None:
    plans = [(100, 100, 10), (200, 200, 20), (500, 500, 30), (900, 900, 1000)]

    class Losing(Imagined):
        def answer(self, request: Request) -> Outcome:
            if request.ram_bytes == 100:
                return Outcome(None, 1, "its worker died 3 times")
            return super().answer(request)

    curve = trace(tiny, Losing(plans), points=5)
    assert curve.points[0].status == "failed"
    assert curve.points[0].reason == "its worker died 3 times"
    assert [p.value for p in curve.points[1:]] == [20, 30, 30, 1000]


# ---- the real planner ---------------------------------------------------------------------------


def ask(model: Path, y: YName) -> Request:
    train = ("auto",) if y == "learn" else ("all",)
    return Request(
        model, BOARD, train=train, objective=y, ram_bytes=1 << 22, flash_bytes=1 << 22
    )


def test_a_curve_against_every_update_set(tmp_path: Path) -> None:
    """Each set of whole parameters, planned alone for the least RAM, obeys the curve."""
    model = export(nets.mlp((6, 5, 3)), tmp_path)
    curve = Tracer(ask(model, "learn"), "ram", "learn", points=7).run(InProcess())
    names = ["fc0.weight", "fc0.bias", "fc1.weight", "fc1.bias"]
    least: list[tuple[int, float]] = []
    for n in range(1, 5):
        for chosen in itertools.combinations(names, n):
            request = Request(model, BOARD, train=chosen, objective="ram", with_baselines=False)
            plan = make_plan(request).plan
            score = sum(u.importance for u in plan.decisions.updates)
            least.append((plan.claims.ram_bytes.total, score))
    assert curve.points[0].budget == min(ram for ram, _ in least)
    assert curve.points[-1].value == max(score for _, score in least)
    for p in curve.points:
        best = max(score for ram, score in least if ram <= p.budget)
        assert p.value is not None
        assert p.bound is not None
        assert p.bound >= best
        assert p.value >= best * (1 - 1e-3)


@pytest.mark.parametrize(
    ("x", "y"), [("ram", "latency"), ("flash", "learn"), ("latency", "learn"), ("ram", "energy")]
)
def test_real_curves_rise_within_their_budgets(x: XName, y: YName, tmp_path: Path) -> None:
    model = export(nets.cnn() if y == "energy" else nets.resnet(), tmp_path)
    curve = Tracer(ask(model, y), x, y, points=3).run(InProcess())
    assert len(curve.points) == 3
    values = [p.value for p in curve.points]
    assert all(v is not None for v in values)
    assert values == sorted(values, reverse=y != "learn")  # type: ignore[type-var]
    for p in curve.points:
        assert p.status == "optimal"
        assert p.figures is not None
        used = {"ram": p.figures.ram_bytes, "flash": p.figures.flash_bytes}
        assert used.get(x, p.figures.latency_s) <= p.budget
    assert curve.points[0].value != curve.points[-1].value
    # The first budget is the smallest that works.
    low = curve.points[0].budget
    request = ask(model, y)
    if x == "latency":
        request = replace(request, latency_s=low * 0.999)
    else:
        request = replace(request, **{f"{x}_bytes": int(low) - 4})
    with pytest.raises(InfeasibleError):
        make_plan(request)


class Alone(InProcess):
    """Withholds what other budgets tell."""

    def run(self, tasks: Sequence[Task], on_done: OnDone) -> None:
        bare = [replace(t, request=replace(t.request, known=Known())) for t in tasks]
        super().run(bare, on_done)


class Noting(InProcess):
    """Keeps what each budget was told."""

    def __init__(self) -> None:
        self.known: dict[int | None, Known] = {}

    def run(self, tasks: Sequence[Task], on_done: OnDone) -> None:
        self.known |= {t.request.ram_bytes: t.request.known for t in tasks}
        super().run(tasks, on_done)


@pytest.mark.parametrize("y", ["learn", "latency"])
def test_what_budgets_tell_is_true_and_changes_no_curve(y: YName, tmp_path: Path) -> None:
    request, noting = ask(export(nets.cnn(), tmp_path), y), Noting()
    curve = Tracer(request, "ram", y, points=6).run(noting)
    alone = Tracer(request, "ram", y, points=6).run(Alone())
    sign, unit = (1, 1.0) if y == "learn" else (-1, CLOCK_HZ)
    told = 0
    for p, q in zip(curve.points, alone.points, strict=True):
        assert p.budget == q.budget
        assert p.status == q.status == "optimal"
        assert p.value is not None
        assert p.bound is not None
        own = make_plan(replace(request, ram_bytes=int(p.budget))).plan.objective[0]
        assert p.value * unit == pytest.approx(own.value, rel=1e-3)
        assert q.value == pytest.approx(p.value, rel=1e-3)
        assert sign * (p.bound * unit - own.value) >= -1e-6 * own.value
        known = noting.known.get(int(p.budget), Known())
        if known.bound is not None:
            assert sign * (known.bound - own.value) >= -1e-6 * own.value
        if known.plan is not None:
            told += known.bound is not None
            assert sign * (known.value - own.value) <= 1e-3 * own.value
    assert told


def squeezed(folder: Path) -> Request:
    """A request whose RAM is too small for all updates."""
    request = ask(export(nets.resnet(), folder), "learn")
    free = make_plan(request).plan
    request = replace(request, ram_bytes=free.claims.ram_bytes.total * 3 // 5 // 4 * 4)
    assert make_plan(request).plan.objective[0].bound < 0.99 * free.objective[0].value
    return request


def test_a_start_within_the_gap_of_an_inherited_bound_needs_no_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = squeezed(tmp_path)
    assert request.ram_bytes is not None
    planned = make_plan(request)
    learn = planned.plan.objective[0]

    def no_search(*_: object, **__: object) -> None:
        raise AssertionError("searched")

    more = replace(request, ram_bytes=request.ram_bytes + 16)
    with monkeypatch.context() as patch:
        patch.setattr(Stages, "choice", no_search)
        with pytest.raises(AssertionError, match="searched"):
            make_plan(more)
    known = Known(planned.known, learn.value, learn.bound)
    for heuristics in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(Stages, "choice", no_search)
            if not heuristics:
                patch.setattr(search, "at_once", lambda *_, **__: None)
            again = make_plan(replace(more, known=known)).plan
        assert again.objective[0].value == learn.value
        assert [o.gap <= 1e-3 for o in again.objective] == [True, True]
        assert again.device.budget.ram_bytes == request.ram_bytes + 16


def test_an_inherited_bound_that_a_plan_beats_is_dropped(tmp_path: Path) -> None:
    request = squeezed(tmp_path)
    learn = make_plan(request).plan.objective[0]
    again = make_plan(replace(request, known=Known(bound=learn.value / 2))).plan.objective[0]
    assert (again.value, again.bound) == (learn.value, learn.bound)


def test_an_explanation_inherits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(request: Request, *_: object) -> InfeasibleError:
        assert request.known == Known()
        return InfeasibleError("told")

    monkeypatch.setattr(pipeline, "explain", explain)
    request = replace(ask(export(nets.mlp(), tmp_path), "learn"), ram_bytes=4)
    with pytest.raises(InfeasibleError, match="told"):
        make_plan(replace(request, known=Known(bound=1.0)))


def test_the_bundled_model_in_every_form(odt: Cli, tmp_path: Path) -> None:
    words = ("pareto", MODEL, "--device", "stm32f746g-disco", "--points", "4", "--jobs", "1")
    done = odt(*words, "--csv", "c.csv", "--svg", "c.svg", "--html", "c.html", "--json")
    assert done.code == 0, done.err
    points = done.json["points"]
    assert done.json["device_offers"] == BOARD.ram_region()[1] - BOARD.reserve.ram_bytes
    assert len(points) == 4
    learned = [p["learn"] for p in points]
    assert learned == sorted(learned)
    assert all(p["ram_bytes"] <= p["ram_budget_bytes"] for p in points)
    with (tmp_path / "c.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["ram_budget_bytes"]) for r in rows] == [p["ram_budget_bytes"] for p in points]
    assert [float(r["learn"]) for r in rows] == learned
    root = ElementTree.parse(tmp_path / "c.svg").getroot()
    markers = [g for g in root.iter(f"{SVG}g") if g.get("class", "").startswith("marker ")]
    assert len(markers) == 4
    tips = [g.findtext(f"{SVG}title") or "" for g in markers]
    assert all(f"{p['ram_budget_bytes']:,} B" in t for p, t in zip(points, tips, strict=True))
    assert all(f"learn {p['learn']:,.0f}" in t for p, t in zip(points, tips, strict=True))
    xs = [float(next(g.iter(f"{SVG}circle")).get("cx", "nan")) for g in markers]
    assert xs == sorted(set(xs))
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert page.count('class="marker ') == 4
    told = {float(v) for v in re.findall(r'data-value="([^"]*)"', page)}
    assert told >= {p[k] for p in points for k in ("ram_budget_bytes", "learn", "bound")}


def test_what_is_done_is_printed_after_an_interrupt(
    odt: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: InProcess, tasks: Sequence[Task], on_done: OnDone) -> None:
        for i, task in enumerate(tasks):
            if task.request.ram_bytes and 60_000 < task.request.ram_bytes < 300_000:
                raise KeyboardInterrupt
            on_done(i, solve(task))

    monkeypatch.setattr(InProcess, "run", run)
    words = ("pareto", MODEL, "--device", "stm32f746g-disco", "--points", "3", "--jobs", "1")
    done = odt(*words, "--json")
    assert done.code == 130
    assert done.error == "interrupted"
    assert [p["status"] for p in json.loads(done.out)["points"]][-1] == "optimal"


BAD = [
    (("--x", "latency", "--y", "latency"), 2, "--x and --y are both latency"),
    (("--device", "stm32f746-disco"), 2, "did you mean stm32f746g-disco"),
    (("--points", "0"), 2, "'--points'"),
    (("--points", "1"), 2, "'--points'"),
    (("--ram", "64KB"), 2, "--from and --to"),
    (("--from", "64KB", "--to", "32KB"), 2, "is not below"),
    (("--from", "much"), 2, "--from: 'much' is not a size"),
    (("--train", "conv1.weigth"), 2, "did you mean conv1.weight"),
    (("--y", "learn", "--train", "all"), 2, "choose --y latency or energy"),
    (("--from", "1KB", "--to", "2KB", "--points", "2"), 3, "no budget of this range has a plan"),
    (("--flash", "100KB"), 3, "flash: weights need"),
    (("--scheduler", "tcp://127.0.0.1:9", "--jobs", "2"), 2, "give one"),
    (("--svg", "none/c.svg", "--points", "2", "--from", "330KB", "--to", "340KB"), 1, "none/c.svg"),
    (("--html", "no/c.html", "--points", "2", "--from", "330KB", "--to", "340KB"), 1, "no/c.html"),
]


@pytest.mark.parametrize(("words", "code", "message"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input_is_one_line(odt: Cli, words: tuple[str, ...], code: int, message: str) -> None:
    device = () if "--device" in words else ("--device", "stm32f746g-disco")
    jobs = () if "--jobs" in words else ("--jobs", "1")
    done = odt("pareto", MODEL, *device, *jobs, *words)
    assert done.code == code
    assert message in done.error


def test_no_model_is_one_line(odt: Cli, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    done = odt("pareto", "m.onnx", "--device", "rp2040")
    assert done.code == 4
    assert "m.onnx: not an ONNX model" in done.error


def test_a_request_that_contradicts_itself() -> None:
    with pytest.raises(UsageError, match="1 is no curve"):
        Tracer(Request(MODEL, BOARD), "ram", "learn", points=1)
    with pytest.raises(UsageError, match="both latency"):
        Tracer(replace(Request(MODEL, BOARD), train=("all",)), "latency", "latency")
