"""Updates, precisions and streamed blocks, chosen together: the joint model against brute force.

Every combination is built as a graph of its own and solved for what is kept alone. The noise of i8
weights is handed in, so that mixed layers are worth something.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nets
import numpy as np
import plans
import pytest
from board import lane
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_files import export
from test_c_backend import reference, samples
from test_mixed_precision import trains

from odt_plan.backends.c import emit_c
from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.calibrate import calibrate
from odt_plan.ir.candidates import with_states
from odt_plan.ir.errors import InfeasibleError, UnsupportedModelError, UsageError
from odt_plan.ir.graph import Graph, TensorType, Value
from odt_plan.ir.precision import lower
from odt_plan.ir.streaming import blocks, stream
from odt_plan.ir.training import Candidate, StateForm, TrainingGraph, TrainingSpec
from odt_plan.planner.check import check
from odt_plan.planner.cost import code_bytes, flash_weights_bytes
from odt_plan.planner.device import load_device
from odt_plan.planner.importance import prior
from odt_plan.planner.linear import SolverName, SolverOptions
from odt_plan.planner.milp import Milp
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.plan import ObjectiveName
from odt_plan.planner.precision import choosable, unchosen
from odt_plan.planner.problem import Limits, Problem
from odt_plan.planner.progress import Watch
from odt_plan.planner.schedule import Schedule
from odt_plan.planner.scheduling import schedule
from odt_plan.planner.stages import Decided, Stages

BOARD = load_device(plans.BOARD)
EXACT = SolverOptions(gap=0.0, time_limit_s=30)
WIDE = Limits(10**8, 10**8)
COSTS: tuple[ObjectiveName, ...] = ("ram", "flash", "latency")


# --- networks and combinations --------------------------------------------------------------------


def _relu6(g: Graph, x: Value, name: str) -> Value:
    return g.add_node("Clip", (x,), {"min": 0.0, "max": 6.0}, name=name).out


def _classified(g: Graph, rng: np.random.Generator, x: Value) -> Graph:
    """With a head, and scales of random samples."""
    x = g.add_node("GlobalAveragePool", (x,), name="pool").out
    g.outputs = [nets.dense(g, rng, nets.flat(g, x), "fc", 3)]
    g.verify()
    calibrate(g, rng.standard_normal((8, *g.inputs[0].type.shape[1:])).astype("f4"))
    return g


def separable() -> Graph:
    """A depthwise and a pointwise layer, which make a block, and a classifier."""
    rng, g = np.random.default_rng(0), Graph("separable")
    x = g.add_input("x", TensorType((1, 4, 6, 6)))
    x = nets.relu(g, nets.conv(g, rng, x, "d", 4, group=4), "d.relu")
    x = nets.relu(g, nets.conv(g, rng, x, "p", 8, kernel=1), "p.relu")
    return _classified(g, rng, x)


def inverted() -> Graph:
    """A stem block, an inverted residual, a strided block, a pointwise layer, a classifier."""
    rng, g = np.random.default_rng(1), Graph("inverted")
    x = g.add_input("x", TensorType((1, 3, 10, 10)))
    x = _relu6(g, nets.conv(g, rng, x, "stem", 6), "stem.relu")
    x = _relu6(g, nets.conv(g, rng, x, "d0", 6, group=6), "d0.relu")
    x = nets.conv(g, rng, x, "p0", 4, kernel=1)
    for i, stride in ((1, 1), (2, 2)):
        y = _relu6(g, nets.conv(g, rng, x, f"e{i}", 8, kernel=1), f"e{i}.relu")
        y = _relu6(g, nets.conv(g, rng, y, f"d{i}", 8, stride=stride, group=8), f"d{i}.relu")
        y = nets.conv(g, rng, y, f"p{i}", 4, kernel=1)
        x = g.add_node("Add", (x, y), name=f"a{i}").out if stride == 1 else y
    return _classified(g, rng, _relu6(g, nets.conv(g, rng, x, "h", 8, kernel=1), "h.relu"))


@dataclass(frozen=True)
class Combination:
    """One way to decide all: updates, mixed layers, streamed blocks."""

    updates: tuple[Candidate, ...]
    mixed: tuple[str, ...]
    streamed: tuple[str, ...] = ()


class Case:
    """A network with what may be chosen about it, and the planner's stages for it."""

    def __init__(
        self,
        forward: Graph,
        offered: Sequence[Candidate],
        noise: float = 0.0,
        spec: TrainingSpec | None = None,
        storage: str | None = None,
    ) -> None:
        self.forward, self.spec = forward, spec or TrainingSpec()
        self.precision = unchosen(forward, {})
        self.free = choosable(forward, {})
        self.lowered = lower(forward, self.precision)
        every = candidates(self.lowered, imported=forward)
        states = tuple(dict.fromkeys(("keep", *(c.state for c in offered))))
        self.importance = prior(forward, with_states(every, states))
        # of different size, so that it matters which layers are mixed
        self.noise = {n: noise * (1 + i % 3) for i, n in enumerate(self.free)}
        self.cost = plans.cost_of(BOARD, storage)
        self.limits = replace(WIDE, storage_bytes=10**6 if storage else 0)
        self.start = Decided(tuple(offered), self.precision)

    def stages(self, limits: Limits | None = None, solver: SolverName = "auto") -> Stages:
        return Stages(
            self.forward, self.spec, self.cost, limits or self.limits,
            replace(EXACT, solver=solver), self.importance, self.noise,
            Watch(),
        )  # fmt: skip

    @cache  # noqa: B019 - a few cases, each for the whole run
    def joint(self, *, fixed: bool = False) -> Problem:
        """The problem of all combinations, as ``Stages`` solves it."""
        stages = self.stages(replace(self.limits, cycles=10**12))
        training = build_training(self.lowered, self.spec, self.start.updates)
        choices = stages.choices(self.start, self.lowered, self.free)
        parts = stages._parts(self.start, self.lowered, self.free)
        choices = replace(choices, parts=tuple(parts))
        return stages.problem(training, fixed=fixed, choices=choices)

    def graph(self, c: Combination) -> TrainingGraph:
        """The training graph of one combination alone."""
        lowered = lower(self.forward, {**self.precision, **dict.fromkeys(c.mixed, "mixed")})
        return build_training(stream(lowered, c.streamed), self.spec, c.updates)

    def alone(self, c: Combination) -> Milp:
        """Its program, without rebuilds of mixed layers, which the joint model leaves out."""
        problem = self.stages().problem(self.graph(c), fixed=True)
        program = Milp(problem)
        for s in problem.slots:
            if s.rebuild and s.node.name in c.mixed:
                program.c.upper[program.a[s.activity]] = 0.0
        return program

    def decided(self, c: Combination) -> Milp:
        """The joint program with one combination decided."""
        problem = self.joint()
        program = Milp(problem)
        holds = {m.activity: m.name in c.mixed for m in problem.mixed_layers}
        holds |= {b.activity: b.name in c.streamed for b in problem.streams}
        for a in problem.activities:
            if a.updates:
                holds[a.index] = a.updates[0].candidate in c.updates
        for a, yes in holds.items():
            column = program.a[a]
            program.c.lower[column] = program.c.upper[column] = float(yes)
        return program

    def score(self, c: Combination) -> int:
        """Written down from docs/design.md once more."""
        updates = 0
        for u in c.updates:
            layer, _, role = u.param.rpartition(".")
            i8 = role == "weight" and layer not in c.mixed
            updates += round(0.95 * self.importance[u]) if i8 else self.importance[u]
        best: dict[str, int] = {}
        for u, s in self.importance.items():
            best[u.param] = max(best.get(u.param, 0), s)
        return updates + sum(round(sum(best.values()) * self.noise[n]) for n in c.mixed)

    def combinations(self) -> Iterator[Combination]:
        by_param: dict[str, list[Candidate | None]] = {}
        for c in self.start.updates:
            by_param.setdefault(c.param, [None]).append(c)
        for chosen in product(*by_param.values()):
            updates = tuple(c for c in chosen if c is not None)
            if not updates:
                continue
            for mixed in subsets(self.free):
                yield from self.streamings(Combination(updates, mixed))

    def streamings(self, c: Combination) -> Iterator[Combination]:
        """With any blocks streamed through which no gradient goes and whose layers are frozen."""
        lowered = lower(self.forward, {**self.precision, **dict.fromkeys(c.mixed, "mixed")})
        for streamed in subsets([b.name for b in blocks(lowered)]):
            found = replace(c, streamed=streamed)
            try:
                self.graph(found)
            except (UsageError, UnsupportedModelError):
                continue
            yield found


def subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for n in range(len(names) + 1):
        yield from combinations(names, n)


@dataclass(frozen=True)
class Option:
    """What a combination scores, and the least of each cost with nothing else limited."""

    combination: Combination
    score: int
    ram: int
    flash: int
    latency: int


STATES: tuple[StateForm, ...] = ("keep", "paged", "sgd")
PARTLY = [
    Candidate("d.bias"), Candidate("p.weight", 2), Candidate("p.weight"), Candidate("fc.weight")
]  # fmt: skip


@cache
def small() -> Case:
    return Case(separable(), PARTLY, noise=0.03)


@cache
def stateful() -> Case:
    """Adam's tensors are kept, paged or given up, weight by weight; all accumulators are kept."""
    weights = [Candidate("p.weight"), Candidate("fc.weight")]
    spec = TrainingSpec(optimizer="adam", micro_batches=2)
    return Case(separable(), with_states(weights, STATES), 0.03, spec, "sdcard")


@cache
def options(case: Case) -> tuple[Option, ...]:
    """All combinations of a case."""
    found = []
    for c in case.combinations():
        program = case.alone(c)
        costs = [round(program.solve(name, EXACT).value) for name in COSTS]
        found.append(Option(c, case.score(c), *costs))
    assert any(o.combination.streamed for o in found)
    assert len({o.ram for o in found}) > 20
    return tuple(found)


def some(values: Sequence[int], n: int) -> list[int]:
    """The smallest, the largest, and some between."""
    every = sorted(set(values))
    return sorted({every[round(i * (len(every) - 1) / (n - 1))] for i in range(n)})


def found_by(case: Case, limits: Limits) -> tuple[Combination, float]:
    """What the first stage decides, as it stands, and its bound."""
    decided, bound = case.stages(limits).learn(case.start, fixed=False, free=case.free)
    mixed = tuple(n for n in case.free if decided.precision[n] == "mixed")
    return Combination(decided.updates, mixed), bound


# --- learn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "stateful"])
def test_combinations_cost_in_the_joint_model_what_they_cost_alone(name: str) -> None:
    case = {"small": small, "stateful": stateful}[name]()
    for o in options(case)[::3]:
        program = case.decided(o.combination)
        for name, least in zip(COSTS, (o.ram, o.flash, o.latency), strict=True):
            result = program.solve(name, EXACT)
            assert result.solution is not None, o
            assert round(result.value) == least, (name, o)
        assert round(program.solve("learn", EXACT).value) == o.score, o


@pytest.mark.parametrize(
    ("limit", "cost"), [("ram_bytes", "ram"), ("flash_bytes", "flash"), ("cycles", "latency")]
)
def test_learn_equals_brute_force_at_every_budget(limit: str, cost: str) -> None:
    case, every = small(), options(small())
    budgets = some([getattr(o, cost) for o in every], 9)
    reached = []
    for budget in budgets:
        best = max(o.score for o in every if getattr(o, cost) <= budget)
        limits = replace(WIDE, **{limit: budget})
        found, bound = found_by(case, limits)
        assert case.score(found) == best, (budget, found)
        assert round(bound) == best
        reached.append(best)
    assert reached == sorted(reached)
    assert len(set(reached)) > 2
    none = replace(WIDE, **{limit: budgets[0] - 1})
    with pytest.raises(InfeasibleError):
        found_by(case, none)


def test_a_split_weight_counts_as_slow_as_it_is() -> None:
    """Right below the latency of a partly updated layer, nothing that takes longer is chosen."""
    case, every = small(), options(small())
    split = [o for o in every if Candidate("p.weight", 2) in o.combination.updates]
    for o in split[::3]:
        problem = replace(case.joint(), limits=replace(WIDE, cycles=o.latency - 1))
        best = max((x.score for x in every if x.latency < o.latency), default=None)
        result = Milp(problem).solve("learn", EXACT)
        assert (best is None) == (result.solution is None)
        assert best is None or round(result.value) == best


def test_learn_equals_brute_force_where_ram_and_flash_bind() -> None:
    """Budgets at which neither the best set of the RAM nor that of the flash alone is possible."""
    case = small()
    ordered = sorted(options(small()), key=lambda o: -o.score)
    mixed = set()
    rams, flashes = ([getattr(o, c) for o in ordered] for c in ("ram", "flash"))
    for ram, flash in product(some(rams, 6)[1:5:2], some(flashes, 6)[1:5]):
        limits = replace(WIDE, ram_bytes=ram, flash_bytes=flash)
        best = None
        for o in (o for o in ordered if o.ram <= ram and o.flash <= flash):
            alone = case.alone(o.combination)
            alone.c.row([(alone.peak, 1.0)], upper=ram)
            if alone.solve("flash", EXACT).value <= flash:
                best = o
                break
        if best is None:
            with pytest.raises(InfeasibleError):
                found_by(case, limits)
            continue
        found, _ = found_by(case, limits)
        assert case.score(found) == best.score, (ram, flash, found, best)
        mixed.add(found.mixed)
    assert len(mixed) > 1, "the precision depends on the budget"


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_more_of_anything_never_gives_less(data: st.DataObject) -> None:
    case, every = small(), options(small())
    rams, flashes = ([getattr(o, c) for o in every] for c in ("ram", "flash"))
    ram = data.draw(st.integers(min(rams), max(rams)))
    flash = data.draw(st.integers(min(flashes), max(flashes)))
    more = data.draw(st.integers(0, 2000)), data.draw(st.integers(0, 6000))
    scores = []
    for r, f in ((ram, flash), (ram + more[0], flash), (ram + more[0], flash + more[1])):
        problem = replace(case.joint(), limits=replace(WIDE, ram_bytes=r, flash_bytes=f))
        result = Milp(problem).solve("learn", EXACT)
        if result.solution is None:
            assert result.status == "infeasible"
            scores.append(0.0)
            continue
        assert result.bound >= result.value - 0.5
        scores.append(result.value)
    assert scores == sorted(scores)


@pytest.mark.parametrize("solver", ["highs", "scip", "cp-sat"])
def test_all_solvers_agree(solver: SolverName) -> None:
    case, every = small(), options(small())
    for ram in some([o.ram for o in every], 6)[1:4]:
        problem = replace(case.joint(), limits=replace(WIDE, ram_bytes=ram))
        best = max(o.score for o in every if o.ram <= ram)
        result = Milp(problem).solve("learn", replace(EXACT, solver=solver))
        assert round(result.value) == best


# --- optimizer state ------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "cost"), [("ram_bytes", "ram"), ("cycles", "latency")])
def test_state_is_given_up_where_brute_force_does(limit: str, cost: str) -> None:
    case, every = stateful(), options(stateful())
    chosen = set()
    for budget in some([getattr(o, cost) for o in every], 9):
        best = max(o.score for o in every if getattr(o, cost) <= budget)
        found, bound = found_by(case, replace(case.limits, **{limit: budget}))
        assert case.score(found) == best, (budget, found)
        assert round(bound) == best
        chosen |= {u.state for u in found.updates}
    assert chosen == ({"keep", "paged"} if cost == "ram" else {"keep", "sgd"})


# --- streaming ------------------------------------------------------------------------------------

HEAD = (Candidate("h.weight"), Candidate("h.bias"), Candidate("fc.weight"))


@cache
def streaming(storage: str | None) -> Case:
    spec = TrainingSpec(optimizer="momentum", micro_batches=2) if storage else None
    return Case(inverted(), HEAD, spec=spec, storage=storage)


@pytest.mark.parametrize("storage", [None, "sdcard"])
def test_streaming_equals_brute_force_for_a_fixed_update_set(storage: str | None) -> None:
    case = streaming(storage)
    problems = {
        c.streamed: case.stages().problem(case.graph(c), fixed=True)
        for c in case.streamings(Combination(HEAD, ()))
    }
    assert len(problems) == 8
    needs = {s: round(Milp(p).solve("ram", EXACT).value) for s, p in problems.items()}
    chosen = set()
    for ram in some(list(needs.values()), 5):
        limits = replace(case.limits, ram_bytes=ram)
        values = [
            Milp(replace(p, limits=limits)).solve("latency", EXACT).value
            for s, p in problems.items()
            if needs[s] <= ram
        ]
        done = schedule(case.stages(limits), case.start, "latency", ())
        assert done.schedule.cycles == round(min(values)), ram
        assert done.bound <= done.schedule.cycles + 0.5
        assert done.schedule.arena_bytes + done.schedule.state_bytes <= ram
        chosen.add(done.decided.streamed)
    assert len(chosen) > 2
    below = replace(case.limits, ram_bytes=min(needs.values()) - 4)
    with pytest.raises(InfeasibleError):
        schedule(case.stages(below), case.start, "latency", ())


@pytest.mark.parametrize("name", ["ram", "flash", "latency", "energy"])
@pytest.mark.parametrize(
    "fixed",
    [
        (Candidate("fc.weight"), Candidate("fc.bias")),
        (Candidate("p.weight", 2), Candidate("fc.weight", 4)),
        (Candidate("d.weight"), Candidate("p.weight"), Candidate("fc.weight")),
    ],
    ids=["last", "parts", "weights"],
)
def test_precision_and_streaming_serve_any_objective(
    name: ObjectiveName, fixed: tuple[Candidate, ...]
) -> None:
    """With the updates given and precisions free, no combination does better.

    For RAM, cuts may: these combinations make activations again right before they are read.
    """
    case = Case(separable(), fixed)
    best = min(
        case.alone(c).solve(name, EXACT).value
        for mixed in subsets(case.free)
        for c in case.streamings(Combination(fixed, mixed))
    )
    done = schedule(case.stages(), case.start, name, case.free)
    s = done.schedule
    found = {
        "ram": max(s.live) + s.state_bytes,
        "flash": flash_weights_bytes(done.training) + _code(done.training, s),
        "latency": s.cycles,
        "energy": case.cost.energy_j(s.cycles, s.transfer_cycles),
    }
    if name == "ram":
        assert done.bound <= found[name] <= best
    else:
        assert found[name] == pytest.approx(best, rel=1e-9)
        assert done.bound == pytest.approx(best, rel=1e-9)


def _code(training: TrainingGraph, schedule: Schedule) -> int:
    nodes = {n.name: n for n in training.graph.nodes}
    return code_bytes([nodes[n] for s in schedule.steps for n in s.nodes], len(schedule.steps))


# --- plans ----------------------------------------------------------------------------------------


@cache
def everything() -> PlannedModel:
    """Mixed, i8 and streamed layers, partial updates, paging, accumulation, momentum: one plan."""
    return planned(
        ram_bytes=3000,
        storage="sdcard",
        spec=TrainingSpec(optimizer="momentum", micro_batches=2),
    )


def planned(**options: Any) -> PlannedModel:
    forward = inverted()
    with TemporaryDirectory() as name:
        folder = Path(name)
        x = np.random.default_rng(3).standard_normal((16, *forward.inputs[0].type.shape[1:]))
        np.savez(folder / "calib.npz", x=x.astype("f4"))
        request = Request(
            export(forward, folder),
            BOARD,
            calibration=folder / "calib.npz",
            with_baselines=False,
            time_limit_s=600.0,  # a plan that is cut short may lack something
            **options,
        )
        return make_plan(request)


PLANS: dict[str, Callable[[], PlannedModel]] = {
    "everything": everything,
    "mixed-rebuilt": lambda: planned(ram_bytes=3000),
    "adam": lambda: planned(ram_bytes=5000, spec=TrainingSpec(optimizer="adam")),
    "pinned": lambda: planned(
        ram_bytes=5000, train=("h.weight=0.5", "fc.bias"), precision=("e2=mixed", "h=i8")
    ),
}


def test_one_plan_has_everything() -> None:
    of = everything().plan
    assert {"i8", "mixed"} == set(of.decisions.precision.values())
    assert of.decisions.streamed
    assert of.claims.storage_bytes > 0
    assert any(u.channels for u in of.decisions.updates)
    assert of.decisions.noise_avoided > 0


@pytest.mark.parametrize("name", PLANS)
def test_plans_train_bit_for_bit(name: str) -> None:
    found = PLANS[name]()
    check(found.plan, found.training, BOARD)
    trains(found.plan, found.training)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_emitted_c_equals_numpy(tmp_path: Path) -> None:
    plan, training = everything().plan, everything().training
    xs, targets = samples(training, 4)
    name = emit_c(plan, training, tmp_path)[0].stem
    program = lane.build_host(tmp_path, name)
    result = lane.run_host(program, lane.training_input(xs, targets, 0.05))
    assert result.exit_code == 0, result.stdout
    assert result.files["output.bin"] == reference(plan, training, 4, 0.05)


def test_a_plan_scores_what_its_stages_promised() -> None:
    plan = everything().plan
    stages = {o.name: o for o in plan.objective}
    updates = sum(u.importance for u in plan.decisions.updates)
    assert stages["learn"].value == pytest.approx(updates + plan.decisions.noise_avoided)
    assert stages["learn"].value <= stages["learn"].bound * (1 + 1e-9)
    assert stages["latency"].value == plan.claims.cycles
    assert stages["latency"].bound <= plan.claims.cycles * (1 + 1e-9)
