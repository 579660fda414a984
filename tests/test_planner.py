"""The joint model against brute force, its own schedules and the laws of budgets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from itertools import combinations, product

import nets
import plans
import pytest

from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.graph import Graph
from odt_plan.ir.opdef import get_op, operand, works
from odt_plan.ir.training import Candidate, TrainingGraph, TrainingSpec
from odt_plan.planner import baselines
from odt_plan.planner.cost import code_bytes, flash_weights_bytes
from odt_plan.planner.device import load_device
from odt_plan.planner.importance import SCALE, prior
from odt_plan.planner.linear import SolverOptions
from odt_plan.planner.milp import Milp
from odt_plan.planner.problem import ALWAYS, Limits, Problem
from odt_plan.planner.schedule import Schedule, realize
from odt_plan.planner.solution import Solution
from odt_plan.planner.train_set import choose

BOARD = load_device(plans.BOARD)
EXACT = SolverOptions(gap=0.0, time_limit_s=30)
WIDE = Limits(10**8, 10**8, None, None, 10**6)


def problem_of(
    training: TrainingGraph,
    forward: Graph,
    limits: Limits,
    storage: str | None = None,
    *,
    fixed: bool,
) -> Problem:
    return plans.problem_of(forward, training, limits, plans.cost_of(BOARD, storage), fixed=fixed)


def train_all(
    forward: Graph,
    storage: str | None = None,
    spec: TrainingSpec | None = None,
    only: tuple[str, ...] = (),
) -> Problem:
    chosen = [c for c in plans.whole(forward) if not only or c.param in only]
    training = plans.training_of(forward, spec, chosen)
    return problem_of(training, forward, WIDE, storage, fixed=True)


def with_ram(problem: Problem, ram: int) -> Problem:
    return replace(problem, limits=replace(problem.limits, ram_bytes=ram))


def ram_of(schedule: Schedule) -> int:
    return max(schedule.live) + schedule.state_bytes


def free_activities(problem: Problem) -> list[int]:
    """Auxiliary nodes and rebuilds."""
    return [a.index for a in problem.activities if a.kind in ("auxiliary", "rebuild")]


def page_ins(problem: Problem) -> list[tuple[int, int]]:
    """(tensor, slot) of every page-in that is offered."""
    return [(r.tensor.index, e.slot) for r in problem.retentions for e in r.events if e.may_load]


def free_bits(problem: Problem) -> int:
    """Choices that ``every_schedule`` goes through."""
    return len(free_activities(problem)) + len(page_ins(problem))


def every_schedule(problem: Problem, without: Collection[int] = ()) -> list[Schedule]:
    """All schedules of a small problem: each set of rebuilds, auxiliary nodes and page-ins.

    Args:
        problem: With all updates fixed.
        without: Activities that no schedule may have.
    """
    result = []
    for solution in every_solution(problem, without):
        try:
            result.append(realize(problem, solution))
        except KeyError:
            continue  # an auxiliary tensor was never made, or not before its page-out
    return result


def every_solution(problem: Problem, without: Collection[int] = ()) -> Iterator[Solution]:
    """All decisions of a small problem, also some that make no schedule."""
    assert free_bits(problem) <= 14, "too large for brute force"
    free, loads = [a for a in free_activities(problem) if a not in without], page_ins(problem)
    for bits in product((False, True), repeat=len(free) + len(loads)):
        active = frozenset(a for a, b in zip(free, bits, strict=False) if b) | {ALWAYS}
        yield Solution(
            active, frozenset(x for x, b in zip(loads, bits[len(free) :], strict=True) if b)
        )


CASES = [
    pytest.param(lambda: nets.mlp((6, 8, 4)), None, (), id="mlp"),
    pytest.param(lambda: nets.mlp((6, 8, 4)), "sdcard", (), id="mlp-paging"),
    pytest.param(lambda: nets.cnn(2, 3, 4), None, (), id="cnn"),
    pytest.param(
        lambda: nets.resnet(1, 2, 4), None, ("b0.conv1.weight", "b0.conv2.bias"), id="resnet"
    ),
]


@pytest.mark.parametrize(("net", "storage", "only"), CASES)
def test_optimum_equals_brute_force_at_every_budget(
    net: Callable[[], Graph], storage: str | None, only: tuple[str, ...]
) -> None:
    problem = train_all(net(), storage, only=only)
    schedules = every_schedule(problem)
    needs = sorted({ram_of(s) for s in schedules})
    assert Milp(problem).solve("ram", EXACT).value == pytest.approx(needs[0], abs=0.5)
    budgets = needs if len(needs) <= 12 else needs[:: len(needs) // 10]
    for ram in budgets:
        best = min(s.cycles for s in schedules if ram_of(s) <= ram)
        result = Milp(with_ram(problem, ram)).solve("latency", EXACT)
        assert result.solution is not None
        assert round(result.value) == best, ram
        placed = realize(with_ram(problem, ram), result.solution)
        assert placed.cycles == best
        assert ram_of(placed) <= ram
    assert Milp(with_ram(problem, needs[0] - 4)).solve("latency", EXACT).status == "infeasible"


@pytest.mark.parametrize("solver", ["highs", "scip", "cp-sat"])
def test_all_solvers_agree(solver: str) -> None:
    problem = train_all(nets.cnn(3, 4, 5), "sdcard")
    need = round(Milp(problem).solve("ram", EXACT).value)
    options = replace(EXACT, solver=solver)
    assert round(Milp(problem).solve("ram", options).value) == need
    for ram in (need, need + 400):
        reference = Milp(with_ram(problem, ram)).solve("latency", EXACT).value
        assert Milp(with_ram(problem, ram)).solve("latency", options).value == pytest.approx(
            reference
        )


def test_choice_of_updates_equals_brute_force() -> None:
    forward = nets.mlp((8, 6, 3))
    every = candidates(forward)
    by_param: dict[str, list[Candidate | None]] = {}
    for c in every:
        by_param.setdefault(c.param, [None]).append(c)
    spec = TrainingSpec()
    scores = prior(forward, every)
    options = []
    for combo in product(*by_param.values()):
        chosen = [c for c in combo if c is not None]
        if chosen:
            training = build_training(forward, spec, chosen)
            problem = problem_of(training, forward, WIDE, fixed=True)
            need = round(Milp(problem).solve("ram", EXACT).value)
            options.append((need, sum(scores[c] for c in chosen)))
    superset = build_training(forward, spec, every)
    for ram in sorted({n for n, _ in options})[::5]:
        problem = problem_of(superset, forward, replace(WIDE, ram_bytes=ram), fixed=False)
        best = max(s for n, s in options if n <= ram)
        assert round(Milp(problem).solve("learn", EXACT).value) == best, ram


def test_more_ram_never_costs_more_and_baselines_bound_the_optimum() -> None:
    problem = train_all(nets.resnet(2, 4, 6), "sdcard")
    need = round(Milp(problem).solve("ram", EXACT).value)
    keep = realize(problem, baselines.keep_all(problem))
    latencies = []
    for ram in range(need, ram_of(keep) + 1, 256):
        result = Milp(with_ram(problem, ram)).solve("latency", EXACT)
        latencies.append(result.value)
        assert result.bound <= result.value + 0.5
    assert latencies == sorted(latencies, reverse=True)
    assert latencies[0] > latencies[-1]
    for rule in baselines.RULES.values():
        schedule = realize(problem, rule(problem))
        tight = with_ram(problem, ram_of(schedule))
        assert Milp(tight).solve("latency", EXACT).value <= schedule.cycles
        assert schedule.cycles >= keep.cycles


def test_every_schedule_of_a_ratio_problem_is_cheaper_in_ram_than_the_whole_update() -> None:
    forward = nets.cnn(2, 8, 4)
    whole = Candidate("conv1.weight")
    part = Candidate("conv1.weight", 2)
    needs = []
    for c in (part, whole):
        training = build_training(forward, TrainingSpec(), [c])
        problem = problem_of(training, forward, WIDE, fixed=True)
        needs.append(Milp(problem).solve("ram", EXACT).value)
    assert needs[0] < needs[1]


def test_limits_on_flash_latency_energy_and_storage_bind() -> None:
    problem = train_all(nets.cnn(3, 4, 5), "sdcard")
    program = Milp(problem)
    for objective, limit in (
        ("flash", "flash_bytes"),
        ("latency", "cycles"),
        ("energy", "energy_j"),
    ):
        least = program.solve(objective, EXACT).value
        fits = replace(problem, limits=replace(problem.limits, **{limit: least * (1 + 1e-9)}))
        assert Milp(fits).solve("ram", EXACT).status == "optimal"
        below = replace(problem, limits=replace(problem.limits, **{limit: least * 0.999}))
        assert Milp(below).solve("ram", EXACT).status == "infeasible"
    need = Milp(problem).solve("ram", EXACT)
    dry = replace(problem, limits=replace(problem.limits, storage_bytes=0))
    assert Milp(dry).solve("ram", EXACT).value > need.value


def test_flash_is_counted_as_the_schedule_takes_it() -> None:
    """Also where a page-in shows views of the tensor again, each by a step of its own."""
    problem = train_all(nets.views(), "sdcard")
    need = round(Milp(problem).solve("ram", EXACT).value)
    tight = with_ram(problem, need)
    result = Milp(tight).solve("flash", EXACT)
    assert result.solution is not None
    assert result.solution.loads
    schedule = realize(tight, result.solution)
    nodes = {n.name: n for n in problem.training.graph.nodes}
    used = [nodes[name] for step in schedule.steps for name in step.nodes]
    views = [s for s in schedule.steps if s.recompute and get_op(nodes[s.nodes[0]].op).view]
    assert views
    took = flash_weights_bytes(problem.training) + code_bytes(used, len(schedule.steps))
    assert round(result.value) == took


def test_accumulation_needs_more_state_and_optimizers_pay_for_their_tensors() -> None:
    forward = nets.mlp((6, 8, 4))
    plain = realize(p := train_all(forward), baselines.keep_all(p))
    for spec, factor in (
        (TrainingSpec(optimizer="momentum"), 2),
        (TrainingSpec(optimizer="adagrad"), 2),
        (TrainingSpec(optimizer="adam"), 3),
        (TrainingSpec(micro_batches=4), 2),
        (TrainingSpec(optimizer="adam", micro_batches=2), 4),
    ):
        problem = train_all(forward, spec=spec)
        schedule = realize(problem, baselines.keep_all(problem))
        assert schedule.state_bytes == factor * plain.state_bytes
        assert schedule.cycles > plain.cycles


@pytest.mark.parametrize(
    ("channels", "typed", "updated"), [(100, "0.29", 29), (100, "0.07", 7), (3, "0.1", 1)]
)
def test_a_ratio_counts_as_it_is_typed(channels: int, typed: str, updated: int) -> None:
    forward = nets.mlp((channels, 4))
    (chosen,) = choose(forward, (f"fc0.weight={typed}",), candidates(forward)) or ()
    assert chosen == Candidate("fc0.weight", updated)


def test_prior_prefers_late_and_large_and_is_concave() -> None:
    forward = nets.cnn(3, 8, 6)
    every = candidates(forward)
    scores = prior(forward, every)
    assert max(scores.values()) == SCALE
    assert scores[Candidate("conv2.weight")] > scores[Candidate("conv1.weight")]
    assert scores[Candidate("conv1.weight")] > scores[Candidate("conv1.bias")]
    quarter, half = scores[Candidate("conv1.weight", 2)], scores[Candidate("conv1.weight", 4)]
    whole = scores[Candidate("conv1.weight")]
    assert quarter / 2 > half / 4 > whole / 8


def test_same_seed_same_schedule() -> None:
    problem = train_all(nets.resnet(2, 4, 6))
    need = round(Milp(problem).solve("ram", EXACT).value)
    runs = []
    for _ in range(2):
        result = Milp(with_ram(problem, need)).solve("latency", EXACT)
        assert result.solution is not None
        runs.append(realize(problem, result.solution))
    assert runs[0] == runs[1]


def test_layout_reaches_the_live_peak() -> None:
    for net, storage in product((nets.mlp(), nets.cnn(), nets.resnet()), (None, "sdcard")):
        problem = train_all(net, storage)
        need = round(Milp(problem).solve("ram", EXACT).value)
        result = Milp(with_ram(problem, need)).solve("latency", EXACT)
        assert result.solution is not None
        schedule = realize(problem, result.solution)
        assert schedule.arena_bytes == max(schedule.live)
        overlapping = [
            (a.id, b.id)
            for a, b in combinations([b for b in schedule.buffers if b.space == "arena"], 2)
            if a.first <= b.last and b.first <= a.last
            and a.offset < b.offset + b.bytes and b.offset < a.offset + a.bytes
            and a.offset != b.offset
        ]  # fmt: skip
        assert not overlapping


def test_inner_loops_are_counted_and_priced() -> None:
    """Conv 3x3 of 4x4 images, padded: no four pixels of a line have all taps, so one by one.

    The four filters share the loops: one per channel and line of taps.
    """
    forward = nets.cnn(1, 4, 4)
    node = next(n for n in forward.nodes if n.op == "Conv")
    (_, channels, _, _), (filters, *_) = operand(node, 0).shape, operand(node, 1).shape
    work = next(w for w in works(node) if w.cost_class == "conv")
    assert filters == 4
    assert work.loops == channels * 4 * (3 * 4 - 2)
    assert work.passes == channels * (3 * 4 - 2) ** 2
    assert work.amount == filters * work.passes
    assert work.outputs == 4 * 4
    cost = train_all(forward).cost
    operators = cost.core.operators
    assert operators is not None
    for counts, name in (
        (work.amount, "value"),
        (work.passes, "per_pass"),
        (work.loops, "per_loop"),
        (work.outputs, "per_output"),
    ):
        rate = operators.rates["Conv"]["conv"]
        dearer = rate.model_copy(update={name: getattr(rate, name) + 1})
        own = {**operators.rates, "Conv": {**operators.rates["Conv"], "conv": dearer}}
        changed = {"operators": operators.model_copy(update={"rates": own})}
        more = replace(cost, core=cost.core.model_copy(update=changed))
        extra = more.node_cycles(node) - cost.node_cycles(node)
        assert extra == pytest.approx(counts * cost.device.cycles_per_instruction.value, abs=1)
