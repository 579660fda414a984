"""The order of operators: against brute force, the planner's own accounting, and training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import plans
import pytest
from onnx_files import export
from oracle import Unconstrained, batch
from random_nets import random_net

from odt_plan.backends.numpy import Runtime
from odt_plan.ir.errors import InfeasibleError
from odt_plan.ir.graph import Graph, TensorType
from odt_plan.ir.training import TrainingGraph, TrainingSpec
from odt_plan.planner import baselines
from odt_plan.planner.check import check
from odt_plan.planner.check_program import CheckError
from odt_plan.planner.device import load_device
from odt_plan.planner.footprint import measure
from odt_plan.planner.order import arranged, best_order, least_peak
from odt_plan.planner.order_steps import Steps, bits, steps_of
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.problem import Limits
from odt_plan.planner.rebuild import rebuild

BOARD = load_device(plans.BOARD)
WIDE = Limits(10**8, 10**8, None, None, 0)


def branches(count: int = 2, wide: int = 12, size: int = 6) -> Graph:
    """Branches that widen, then narrow, in an unlucky order: all layers of a depth at once."""
    rng, g = np.random.default_rng(0), Graph("branches")
    x = g.add_input("x", TensorType((1, 2, size, size)))
    tops = [nets.conv(g, rng, x, f"up{i}", wide, kernel=1) for i in range(count)]
    tops = [nets.conv(g, rng, y, f"down{i}", 2, kernel=1) for i, y in enumerate(tops)]
    y = g.add_node("Concat", tops, {"axis": 1}, name="concat").out
    y = g.add_node("GlobalAveragePool", (y,), name="pool").out
    g.outputs = [nets.dense(g, rng, nets.flat(g, y), "fc", 3)]
    g.verify()
    return g


def random_steps(seed: int, count: int) -> Steps:
    """Steps that read one to three results of random sizes; some may run in place."""
    rng = np.random.default_rng(seed)
    size = [int(n) for n in rng.integers(1, 20, count + 1)]
    reads: list[tuple[int, ...]] = []
    for k in range(count):
        among = rng.choice(k + 1, size=min(k + 1, int(rng.integers(1, 4))), replace=False)
        reads.append(tuple(int(t) for t in among))
    readers = [sum(1 << k for k, r in enumerate(reads) if t in r) for t in range(count + 1)]
    readers[count] |= 1 << count
    after = tuple(sum(1 << (t - 1) for t in r if t) for r in reads)
    over: list[tuple[tuple[int, int], ...]] = []
    for k, r in enumerate(reads):
        in_place = [t for t in r if t and rng.random() < 0.3]
        for t in in_place:
            size[k + 1] = size[t]
        over.append(tuple((t, readers[t] & ~(1 << k)) for t in in_place[:1]))
    over = [
        tuple((t, others) for t, others in found if size[t] == size[k + 1])
        for k, found in enumerate(over)
    ]
    node = nets.mlp((2, 2)).nodes[0]
    return Steps(
        nodes=tuple(replace(node, name=f"n{k}") for k in range(count)),
        after=after,
        then=tuple(tuple(j for j in range(count) if after[j] >> k & 1) for k in range(count)),
        reads=tuple(reads),
        writes=tuple((k + 1,) for k in range(count)),
        scratch=tuple(int(n) for n in rng.integers(0, 10, count)),
        over=tuple(over),
        at_once=(False,) * count,
        size=tuple(size),
        given=size[0],
        readers=tuple(readers),
        forward=(1 << count) - 1,
    )


def every_order(steps: Steps, done: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """All topological orders; what is to be done at once comes next."""
    if len(done) == len(steps.nodes):
        yield done
    ready = [
        k
        for k in range(len(steps.nodes))
        if k not in done and all(j in done for j in bits(steps.after[k]))
    ]
    for k in [k for k in ready if steps.at_once[k]][:1] or ready:
        yield from every_order(steps, (*done, k))


def peak_by_lifetimes(steps: Steps, order: tuple[int, ...]) -> int:
    """Live bytes at the peak, each tensor from its step to its last reader."""
    n = len(order)
    at = {k: i for i, k in enumerate(order)}
    live = [steps.scratch[k] for k in order]
    made = {t: at[k] for k in order for t in steps.writes[k]}
    for t, size in enumerate(steps.size):
        last = max((at.get(k, n - 1) for k in bits(steps.readers[t])), default=made.get(t, 0))
        for i in range(made.get(t, 0), last + 1):
            live[i] += size
    for k in order:
        taken = [t for t, o in steps.over[k] if all(at[j] < at[k] for j in bits(o))]
        live[at[k]] -= steps.size[taken[0]] if taken else 0
    return max(live)


@pytest.mark.parametrize("seed", range(60))
def test_the_least_peak_is_that_of_brute_force(seed: int) -> None:
    steps = random_steps(seed, 4 + seed % 5)
    orders = list(every_order(steps))
    for order in orders[:20]:
        assert steps.peak(order) == peak_by_lifetimes(steps, order)
    found = least_peak(steps)
    assert found.peak == found.bound == min(peak_by_lifetimes(steps, o) for o in orders)
    assert found.peak == peak_by_lifetimes(steps, found.order)
    assert steps.unavoidable <= found.peak
    early = least_peak(steps, states=1)  # given up: still a bound, still an order
    assert early.bound <= found.peak <= early.peak <= steps.peak(range(len(steps.nodes)))


def test_branches_may_be_run_one_by_one() -> None:
    """The random graphs hold cases in which the order of the file is not the best."""
    better = sum(
        least_peak(s).peak < s.peak(range(len(s.nodes)))
        for s in (random_steps(seed, 8) for seed in range(30))
    )
    assert better > 5


def measured(forward: Graph, training: TrainingGraph) -> int:
    """Live bytes at the peak where everything is kept, by the planner's timeline."""
    problem = plans.problem_of(forward, training, WIDE, plans.cost_of(BOARD), fixed=True)
    return int(measure(problem, baselines.keep_all(problem)).live.max())


def random_order(steps: Steps, rng: np.random.Generator) -> list[int]:
    done: list[int] = []
    while len(done) < len(steps.nodes):
        ready = [
            k
            for k in range(len(steps.nodes))
            if k not in done and all(j in done for j in bits(steps.after[k]))
        ]
        forced = [k for k in ready if steps.at_once[k]]
        done.append(forced[0] if forced else int(rng.choice(ready)))
    return done


@pytest.mark.parametrize(
    ("net", "spec"),
    [
        (branches(3), TrainingSpec()),
        (nets.resnet(2, 3, 4), TrainingSpec()),
        (nets.transformer(1), TrainingSpec(optimizer="adam", micro_batches=2)),
        (random_net(3, 14), TrainingSpec()),
        (nets.views(), TrainingSpec(loss="mse")),
        (nets.two_branches(), TrainingSpec()),
    ],
    ids=["branches", "resnet", "transformer", "random", "views", "two inputs"],
)
def test_any_order_has_the_peak_of_the_timeline_and_trains_the_same(
    net: Graph, spec: TrainingSpec
) -> None:
    training = plans.training_of(net, spec)
    steps, rng = steps_of(training), np.random.default_rng(5)
    least = least_peak(steps)
    assert least.peak == least.bound
    assert measured(net, training) == steps.peak(range(len(steps.nodes)))
    orders = [list(least.order), *(random_order(steps, rng) for _ in range(6))]
    for order in orders:
        ranks = {steps.nodes[k].name: i for i, k in enumerate(order)}
        other = arranged(training, ranks)
        assert set(other.graph.nodes) == set(training.graph.nodes)
        assert measured(net, other) == steps.peak(order) >= least.peak
        plan = plans.keep_all(other, device=BOARD)
        plan = plan.model_copy(update={"reordered": order != sorted(order)})
        check(plan, training, BOARD)  # the graph of the file knows nothing of another order
        with pytest.raises(CheckError, match="operators run in"):
            check(plan.model_copy(update={"reordered": not plan.reordered}), training, BOARD)
        runtime, oracle = Runtime(plan, training), Unconstrained(training)
        for _ in range(2 * spec.micro_batches):
            x, y = batch(training, rng)
            assert runtime.train_step(x, y, 0.1) == oracle.step(x, y, 0.1)
        assert runtime.state_bytes() == oracle.state_bytes(plan)


@pytest.mark.parametrize("net", [nets.cnn(3), nets.resnet(2), nets.mlp(), nets.transformer(1)])
def test_updates_already_run_where_gradients_are_freed_soonest(net: Graph) -> None:
    """Neither peak gets smaller if an update is pulled forward."""
    steps = steps_of(plans.training_of(net))
    plain = list(range(len(steps.nodes)))
    updates = [k for k, n in enumerate(steps.nodes) if n.phase == "update"]
    for s in (steps, steps.dropped()):
        for k in updates:
            first = max(bits(steps.after[k])) + 1
            assert s.peak([*range(first), k, *range(first, k), *plain[k + 1 :]]) >= s.peak(plain)


def test_late_updates_hold_gradients() -> None:
    steps = steps_of(plans.training_of(nets.cnn(3)))
    updates = [k for k, n in enumerate(steps.nodes) if n.phase == "update"]
    late = [*(k for k in range(len(steps.nodes)) if k not in updates), *updates]
    assert steps.peak(late) > steps.peak(range(len(steps.nodes)))


@pytest.mark.parametrize("net", [nets.cnn(4), nets.mlp(), nets.views()])
def test_the_order_of_a_chain_stays(net: Graph) -> None:
    order = best_order(plans.training_of(net))
    assert order.ranks is None
    assert order.found == order.given
    assert order.bound.kept <= order.given.kept
    assert order.bound.dropped <= order.given.dropped


# --- the planner


def planned(path: Path, **options: Any) -> PlannedModel:
    request = Request(
        path, BOARD, train=("last",), with_baselines=False, with_relaxations=False, time_limit_s=20
    )
    return make_plan(replace(request, **options))


def test_a_plan_runs_operators_in_another_order_where_that_takes_less_ram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export(branches(3), tmp_path)
    plain = planned(path).plan
    assert not plain.reordered  # there is RAM for everything: the order of the file stays
    assert "reordered" not in plain.model_dump_json()
    least = planned(path, objective="ram")
    plan = least.plan
    assert plan.reordered
    order = best_order(least.training)
    state = plan.claims.ram_bytes.weights
    assert plan.claims.ram_bytes.total == order.found.kept + state == order.bound.kept + state
    assert plan.claims.ram_bytes.total < order.given.dropped + state
    # the file knows the steps alone; the graph is built from the model again
    file = tmp_path / "plan.json"
    file.write_text(plan.model_dump_json())
    training = rebuild(plan, file)
    check(plan, training, BOARD)
    runtime, oracle = Runtime(plan, training), Unconstrained(training)
    rng = np.random.default_rng(3)
    for _ in range(3):
        x, y = batch(training, rng)
        assert runtime.train_step(x, y, 0.1) == oracle.step(x, y, 0.1)
    assert runtime.state_bytes() == oracle.state_bytes(plan)
    # whatever is asked for fits there, updates chosen by the planner included
    ram = plan.claims.ram_bytes.total
    assert planned(path, ram_bytes=ram).plan.reordered
    assert planned(path, ram_bytes=ram, train=("auto",)).plan.reordered
    with pytest.raises(InfeasibleError, match=str(ram)):  # told as the smallest that works
        planned(path, ram_bytes=ram - 4)
    monkeypatch.setattr("odt_plan.planner.pipeline.best_order", lambda _: order_of_the_file)
    order_of_the_file = replace(order, ranks=None)
    with pytest.raises(InfeasibleError):
        planned(path, ram_bytes=ram)


def test_another_order_is_taken_only_for_a_better_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export(branches(3), tmp_path)
    order = best_order(planned(path).training)
    assert order.ranks is not None
    worst = {n: i for i, n in enumerate(sorted(order.ranks, key=lambda n: n.startswith("down")))}
    monkeypatch.setattr(
        "odt_plan.planner.pipeline.best_order", lambda _: replace(order, ranks=worst)
    )
    plan = planned(path, objective="ram").plan
    assert not plan.reordered
    state = plan.claims.ram_bytes.weights
    assert plan.claims.ram_bytes.total == order.given.kept + state
