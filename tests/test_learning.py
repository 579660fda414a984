"""The benchmark of learning, on a small network: update sets keep their budgets, and learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import learning
from benchmarks.learning import RATES, Bench, Draw, Updates
from onnx_files import export
from test_compare import labelled
from test_importance import small

from odt_plan.ir.errors import InfeasibleError
from odt_plan.ir.training import Candidate
from odt_plan.trials import LEAD
from odt_plan.usual_sets import LAYERS


class Corner:
    """Classes that differ in a row of pixels."""

    name, about, epochs, rates = "corner", "A small network.", 2, RATES

    def __init__(self, model: Path) -> None:
        self._model = model

    def _draws(self, first: int) -> list[Draw]:
        found = []
        for seed in (first, first + 1):
            (x, y), (tx, ty) = labelled(20, seed), labelled(20, seed + 100)
            found.append(Draw(self._model, x, y.astype(np.int32), tx, ty.astype(np.int32)))
        return found

    def draws(self) -> list[Draw]:
        return self._draws(0)

    def others(self) -> list[Draw]:
        return self._draws(10)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("ODT_PLAN_CACHE", str(tmp_path / "cache"))
    for batch in ("TESTED", "BATCHED"):
        monkeypatch.setattr(learning, batch, 1)  # the file has a fixed batch
    monkeypatch.setattr(learning, "SHARES", (0.1, 0.5))
    monkeypatch.setattr(learning, "RATES", (0.01,))
    return Bench(Corner(export(small(), tmp_path)))


def test_choices_keep_their_budgets_and_the_solver_is_no_worse_than_greedy(bench: Bench) -> None:
    draw = bench._draws[0]
    assert bench.least < bench.budgets[0] < bench.budgets[-1] < bench.most
    for ram in bench.budgets:
        for method in ("prior", "fisher"):
            score = bench.score(draw, ram, method)
            _, greedy = bench.greedy(draw, ram, method)
            assert score >= greedy * (1 - learning.GAP)
        fitting = [c.param for c in bench.updates(draw, LAYERS, ram).chosen]
        assert bench._plan(draw, ram, *fitting)[1] <= ram


def test_a_part_is_of_the_channels_that_are_in_front(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(Bench, "_tested", lambda _, __, state: seen.append(state) or 0.0)
    updates = Updates((Candidate("c2.weight", 2),), (("c1:1", (5, 3, 0, 1, 2, 4, 6, 7)),))
    bench.learn(bench._draws[0], updates, 0.01)
    moved = seen[0]["c2.weight"] != bench._draws[0].forward.constants["c2.weight"]
    assert np.flatnonzero(moved.any((0, 2, 3))).tolist() == [3, 5]


def test_rows_tell_every_strategy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "METHODS", ("prior", "gradient"))
    bench.budgets = bench.budgets[:1]
    rows = list(bench.rows())
    assert rows[0] == "### What plans learn: corner (measured)"
    assert sum(r.startswith("| plan, importance: ") for r in rows) == 2
    assert rows[-1].startswith("Whatever the budget: last layer ")
    assert bench.accuracies("all", learning.PLENTY).mean() > bench.untouched().mean() + 0.1
    share = [r for r in rows if r.startswith("| score of the")]
    assert len(share) == 2
    (tried,) = [r for r in rows if r.startswith("| **plan by trial** | ")]
    least, _ = bench._smallest()
    assert any(f"The least that any update takes is {least:,} B" in r for r in rows)
    best = bench.accuracies("trial", bench.budgets[0])
    assert f"| {100 * best.mean():.1f} ± " in tried
    assert sum(r.startswith("| trial less ") for r in rows) == 6


def test_the_trial_is_that_of_the_planner(bench: Bench) -> None:
    draw, ram = bench._draws[0], bench.budgets[0]
    tried = bench.tried(draw, ram)
    outcome = tried._trials.run(tried._entries, 1)
    told = tried._trials.planned(outcome).plan.decisions.trial
    assert told is not None
    assert told.chosen == tried.chosen
    best = min(t.more / t.error for t in told.tried[1:] if t.more is not None and t.error)
    assert tried.lead[0] == -best
    assert (tried.chosen == "gradient") == (-best <= LEAD)
    assert bench._accuracy(draw, "trial", ram) == bench._accuracy(draw, tried.chosen, ram)


def test_nothing_is_trained_in_less_than_the_least(bench: Bench) -> None:
    least, bound = bench._smallest()
    assert bound <= least < bench.least
    draw = bench._draws[0]
    assert bench._plan(draw, least, "auto")[1] <= least
    with pytest.raises(InfeasibleError):
        bench._plan(draw, bound - 4, "auto")
