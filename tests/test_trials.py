"""``--importance trial``: update sets that are planned, trained on folds, and the one chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_run import Cli
from onnx_files import export
from pydantic import ValidationError
from test_compare import labelled
from test_importance import SIZE, Array, small

from odt_plan import held_out, trials
from odt_plan.backends.numpy import Runtime, SessionOptions, data_set, train_session
from odt_plan.held_out import FOLDS
from odt_plan.ir.errors import UsageError
from odt_plan.local_pool import InProcess
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request, make_plan
from odt_plan.planner.plan import Plan, Trial, TriedSet
from odt_plan.planner.progress import Watch
from odt_plan.sessions import Judged, train_all
from odt_plan.trials import Outcome, Trials, plan_by_trial

COUNT, RAM = 24, 9000
SETS = {"gradient", "prior", "fisher", "magnitude", "last layer", "biases", "last layers that fit"}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ODT_PLAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trials, "cores", lambda: 1)
    monkeypatch.setattr(held_out, "UPDATES", 20)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    x, y = labelled(COUNT, 0)
    np.savez(tmp_path / "labelled.npz", x=x, y=y)
    return export(small(), tmp_path), tmp_path / "labelled.npz"


def words(files: tuple[Path, Path], *more: object) -> tuple[Any, ...]:
    model, samples = files
    common = ("--ram", RAM, "--flash", "1MB", "--precision", "*=f32", "--calib", samples)
    return (model, *common, "--importance", "trial", *more)


def request(files: tuple[Path, Path], **more: Any) -> Request:
    device = load_device("nrf52840")
    return Request(files[0], device, ram_bytes=RAM, with_baselines=False, **more)


def without_times(plan: Any) -> Any:
    plan["solver"].pop("time_s")
    return plan


# ---- the plan ------------------------------------------------------------------------------------


def test_the_plan_tells_all_sets_and_is_the_same_again(
    odt: Cli, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    ran = odt(*words(files, "-o", out))
    assert ran.code == 0, ran.err
    assert f"loss measured on {COUNT} samples of labelled.npz" in ran.out
    assert "(chosen)" in ran.out
    written = json.loads((out / "plan.json").read_text())
    trial = Plan.model_validate(written).decisions.trial
    assert trial is not None
    names = [n for t in trial.tried for n in t.names]
    assert sorted(names) == sorted(SETS)
    assert all(t.ram_bytes <= RAM for t in trial.tried)
    assert (trial.samples, trial.folds, trial.seed) == (COUNT, FOLDS, 0)
    assert trial.before is not None
    assert all(t.loss is not None and t.loss < trial.before for t in trial.tried)
    assert trial.tried[0].names[0] == "gradient"
    assert (trial.tried[0].more, trial.tried[0].error) == (0.0, 0.0)
    assert "more than gradient" in " ".join(ran.out.split())
    assert trial.chosen in written["decisions"]["importance_source"]
    assert odt("verify", out / "plan.json").code == 0
    monkeypatch.setenv("ODT_PLAN_CACHE", str(tmp_path / "other"))  # nothing of it is kept
    again = odt(*words(files, "--json")).json
    assert without_times(again) == without_times(written)
    assert odt(*words(files, "--seed", 1, "--json")).json["decisions"]["trial"]["seed"] == 1


def test_losses_are_those_of_sessions_by_the_plans(files: tuple[Path, Path]) -> None:
    trial = Trials(request(files), files[1], Watch())
    outcome = trial.run(trial.entries())
    told = trial.planned(outcome).plan.decisions.trial
    assert told is not None
    first = outcome.entries[0]
    assert len(first.names) > 1  # and of sets that are equal the plan is that of the first
    assert first.planned.plan.asked is not None
    assert first.planned.plan.asked.importance is not None
    assert first.planned.plan.asked.importance.method == "gradient"
    at = next(i for i, e in enumerate(outcome.entries) if "biases" in e.names)
    planned = make_plan(request(files, train=("bias",)))
    x, y = labelled(COUNT, 0)
    losses = []
    groups = np.random.default_rng(0).permutation(COUNT) % FOLDS
    for fold in range(FOLDS):
        runtime = Runtime(planned.plan, planned.training, exact=False)
        rest = groups != fold
        options = SessionOptions(told.tried[at].lr, epochs=told.epochs, seed=0, schedule="cosine")
        train_session(runtime, data_set(planned.training, x[rest], y[rest]), options)
        pairs = zip(x[~rest], y[~rest], strict=True)
        losses += [runtime.evaluate(a[None], b[None])[1] for a, b in pairs]
    assert told.tried[at].loss == pytest.approx(np.mean(losses), rel=1e-6)
    np.testing.assert_allclose(outcome.results[at].losses, losses, rtol=1e-6)
    base = outcome.results[0].losses
    more = np.array(losses) - base
    assert at > 0
    assert told.tried[at].more == pytest.approx(more.mean(), abs=1e-6)
    assert told.tried[at].error == pytest.approx(more.std(ddof=1) / np.sqrt(COUNT), rel=1e-4)


def test_equal_sets_are_trained_once_and_kept(
    odt: Cli, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, ...]] = []
    run = Judged.run

    def counting(self: Judged[Any]) -> object:
        calls.append((self.session.name, str(sorted(self.session.data.y["y"]))))
        return run(self)

    monkeypatch.setattr(Judged, "run", counting)
    first = odt(*words(files, "--json")).json
    sets = len(first["decisions"]["trial"]["tried"])
    assert len(set(calls)) == len(calls)
    assert len(calls) >= sets * len(held_out.FIRST_RATES) * FOLDS
    assert len({n.split(",")[0] for n, _ in calls}) == sets < len(SETS)
    calls.clear()
    assert without_times(odt(*words(files, "--json")).json) == without_times(first)
    assert not calls


def by_fixed_set(monkeypatch: pytest.MonkeyPatch, name: str = "biases") -> None:
    """A set is said to be best."""
    run = Trials.run

    def best(self: Trials, found: Any, jobs: int | None = None) -> Outcome:
        outcome = run(self, found, jobs)
        return replace(outcome, best=next(i for i, e in enumerate(found) if name in e.names))

    monkeypatch.setattr(Trials, "run", best)


def test_a_set_without_scores_has_no_bound_on_learning(
    odt: Cli, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_fixed_set(monkeypatch)
    out = tmp_path / "out"
    ran = odt(*words(files, "-o", out))
    assert ran.code == 0, ran.err
    plan = Plan.model_validate_json((out / "plan.json").read_text())
    assert [o.name for o in plan.objective] == ["latency"]
    assert {u.role for u in plan.decisions.updates if u.ratio} == {"bias"}
    assert "objective learn" not in ran.out
    told = odt("explain", out / "plan.json", "fc.bias").out
    assert "as given by the trial, which chose the biases" in told
    assert "set chosen by trial: biases, of" in told
    assert odt("verify", out / "plan.json").code == 0


def test_adapters_are_a_set_where_they_are_offered(
    odt: Cli, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_fixed_set(monkeypatch, "adapters")
    out = tmp_path / "out"
    ran = odt(*words(files, "--lora", 1, "-o", out))
    assert ran.code == 0, ran.err
    decided = Plan.model_validate_json((out / "plan.json").read_text()).decisions
    assert decided.trial is not None
    names = [n for t in decided.trial.tried for n in t.names]
    assert sorted(names) == sorted({*SETS, "adapters"})
    chosen = {u.param.split(".lora_")[-1] for u in decided.updates if u.ratio}
    assert chosen == {"A", "B"}
    assert odt("verify", out / "plan.json").code == 0


def test_modules_with_biases_and_the_last_layer_are_a_set_where_they_are_offered(
    odt: Cli, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "lite residual, biases, last layer"
    by_fixed_set(monkeypatch, name)
    out = tmp_path / "out"
    ran = odt(*words(files, "--ram", 13000, "--lite-residual", 3, "-o", out))
    assert ran.code == 0, ran.err
    decided = Plan.model_validate_json((out / "plan.json").read_text()).decisions
    assert decided.trial is not None
    names = [n for t in decided.trial.tried for n in t.names]
    assert sorted(names) == sorted({*SETS, name})
    lite = {f"c2.weight.lite_{what}" for what in ("down", "bias", "up")}
    chosen = {u.param for u in decided.updates if u.ratio}
    assert chosen == lite | {"c1.bias", "c2.bias", "fc.weight", "fc.bias"}
    assert odt("verify", out / "plan.json").code == 0


def test_a_chosen_set_is_one_of_those_tried() -> None:
    one = TriedSet(
        names=("prior",), updated=1, ram_bytes=4, lr=0.1, loss=1.0, more=0.0, error=0.0
    )
    record = Trial(
        file="x.npz", sha256="0" * 64, samples=16, folds=4, epochs=2, seed=0, before=2.0,
        chosen="prior", tried=(one,),
    )  # fmt: skip
    with pytest.raises(ValidationError, match="a guess is none of the sets"):
        Trial.model_validate(record.model_dump() | {"chosen": "a guess"})


# ---- samples -------------------------------------------------------------------------------------


def test_samples_of_a_group_are_held_out_together(files: tuple[Path, Path]) -> None:
    x, y = labelled(COUNT, 0)
    group = np.repeat(np.arange(6), 4)[np.random.default_rng(3).permutation(COUNT)]
    np.savez(files[1], x=x, y=y, group=group)
    course = Trials(request(files), files[1], Watch())._course
    assert sorted(np.concatenate(course.folds)) == list(range(COUNT))
    parts = [set(group[f]) for f in course.folds]
    np.testing.assert_array_equal(course.groups, group[np.concatenate(course.folds)])
    assert sum(map(len, parts)) == 6
    alone = Trials(request(files, seed=1), files[1], Watch())._course
    assert [set(group[f]) for f in alone.folds] != parts


def refused(odt: Cli, files: tuple[Path, Path], *more: object) -> str:
    ran = odt(*words(files, *more))
    assert ran.code == 2
    return ran.error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, "--importance trial: needs labelled samples; give --calib FILE.npz with x"),
        ({"x": np.zeros((15, 3, SIZE, SIZE), np.float32), "y": np.zeros(15, int)}, "15 samples are"
         " too few for a trial, in which a part of them is held out; give 16 or more"),
        ({"group": np.zeros(COUNT, int)}, "1 groups of 24 samples are too few for a trial"),
        ({"group": np.zeros((COUNT, 2), int)}, "group has shape [24, 2], but there are 24 samples"),
        ({"y": np.full(COUNT, 9)}, "classes 0 to 4"),
        ({"y": np.array(3)}, "y has shape []"),
        ({"y": np.zeros(COUNT - 1, int)}, "y has shape [23], but x has 24 samples"),
        ({"x": np.full((COUNT, 3, SIZE, SIZE), np.nan, np.float32)}, "NaN or infinite"),
    ],
)  # fmt: skip
def test_samples_that_no_trial_can_use(
    odt: Cli, files: tuple[Path, Path], change: dict[str, Array | None], message: str
) -> None:
    x, y = labelled(COUNT, 0)
    given = {k: a for k, a in ({"x": x, "y": y} | change).items() if a is not None}
    np.savez(files[1], **given)
    assert message in refused(odt, files)


def test_too_few_samples_for_batches(odt: Cli, files: tuple[Path, Path]) -> None:
    told = refused(odt, files, "--micro-batches", 7)
    assert "24 samples are too few" in told
    assert "give 28 or more" in told


def test_options_that_contradict_a_trial(odt: Cli, files: tuple[Path, Path]) -> None:
    assert "leave --train last out" in refused(odt, files, "--train", "last")
    assert "a trial compares update sets in one split" in refused(
        odt, files, "--micro-batches", "auto"
    )
    model, samples = files
    for command in ("pareto", "fit"):
        ran = odt(
            command, model, "--device", "nrf52840", "--calib", samples, "--importance", "trial"
        )
        assert ran.code == 2
        assert ran.error.startswith("--importance trial: chooses one plan, and here are many")


def test_no_plan_is_explained_once(odt: Cli, files: tuple[Path, Path]) -> None:
    model, samples = files
    ran = odt(
        model, "--ram", 100, "--flash", "1MB", "--calib", samples, "--precision", "*=f32",
        "--importance", "trial",
    )  # fmt: skip
    assert ran.refusal


# ---- the end of a run ----------------------------------------------------------------------------


def test_ctrl_c_takes_the_plan_of_the_measured_default(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, calls = Watch(), []
    run = Judged.run

    def stopping(self: Judged[Any]) -> object:
        calls.append(self.name)
        watch.stop()
        return run(self)

    monkeypatch.setattr(Judged, "run", stopping)
    planned = plan_by_trial(request(files), watch, files[1])
    decided = planned.plan.decisions
    assert len(calls) == 1
    assert decided.trial is None
    assert decided.importance_source.startswith("gradient, measured on 24 samples")
    assert "; stopped before " in decided.importance_source


def test_the_time_limit_is_shared(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    watch, make = Watch(), make_plan

    def taking_all_its_time(asked: Request, *rest: Any) -> Any:
        limits.append(asked.time_limit_s)
        try:
            return make(replace(asked, time_limit_s=60.0), *rest)
        finally:
            watch._begin -= asked.time_limit_s

    monkeypatch.setattr(trials, "make_plan", taking_all_its_time)
    Trials(request(files, time_limit_s=1000.0), files[1], watch).entries()
    assert len(limits) >= 6
    assert 900.0 / 8 < limits[0] <= 1000.0 / 8
    assert sum(limits) <= 1000.0


def test_a_training_that_fails_is_told_by_its_name(files: tuple[Path, Path]) -> None:
    class Failing:
        name = "biases, step size 0.1"

        def run(self) -> float | str:
            return "went wrong"

        def lost(self, reason: str) -> float | str:
            return reason

    with pytest.raises(UsageError, match=r"biases, step size 0\.1: went wrong"):
        train_all([Failing()], InProcess(), "trial", Watch())


# ---- beside other sets ---------------------------------------------------------------------------


def test_compare_trains_what_the_trial_chose(
    odt: Cli, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_fixed_set(monkeypatch)
    x, y = labelled(20, 1)
    np.savez(tmp_path / "val.npz", x=x, y=y)
    ran = odt(
        "compare", files[0], "--device", "nrf52840", "--ram", RAM, "--data", files[1],
        "--val", tmp_path / "val.npz", "--importance", "trial", "--lr", "0.01", "--seeds", 1,
        "--epochs", 1, "--jobs", 1, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    rows = {r["name"]: r for r in ran.json["rows"]}
    for figure in ("ram_bytes", "values", "updated"):
        assert rows["auto"][figure] == rows["biases"][figure]
    assert "set chosen by trial: biases, of" in ran.json["importance"]


# ---- the choice ----------------------------------------------------------------------------------


def pick(*sets: list[float], groups: list[int] | None = None) -> int:
    """Which of the sets, told by their losses, is chosen."""
    results = [held_out.Result(0.01, np.array(losses)) for losses in sets]
    return trials._chosen(results, np.array(groups or range(len(sets[0]))))


def test_the_measured_default_stands_unless_another_set_is_surely_better() -> None:
    default = [1.0, 2.0, 3.0, 4.0]
    unsure = [0.5, 1.9, 2.6, 3.8]  # less by 0.3 ± 0.091: 3.3 standard errors
    sure = [0.7, 1.9, 2.7, 3.8]  # less by 0.225 ± 0.048: 4.7
    assert pick(default, sure) == 1
    assert pick(default, [0.45, 1.95, 2.6, 3.85]) == 0  # less by 0.2875 ± 0.114: 2.5
    assert pick(default, unsure) == 1
    assert pick(default, sure, unsure) == 2  # the least loss of those that are surely better
    assert pick(default, sure, [0.0, 2.0, 2.0, 4.0]) == 1  # less by 0.5 ± 0.29: not among them
    assert pick(default, [1.3, 2.3, 3.2, 4.2]) == 0
    assert pick(default, default) == 0


def test_a_loss_that_is_not_finite_is_never_chosen() -> None:
    nan, inf = float("nan"), float("inf")
    assert pick([2.0, 3.0], [nan, 1.0], [inf, 0.0], [-inf, 0.0]) == 0
    assert pick([nan, 1.0], [2.0, 3.0], [1.0, 3.0], [inf, 0.0]) == 2
    with pytest.raises(UsageError, match="no training ends in a finite loss"):
        pick([nan, 1.0], [inf, 1.0])


def test_samples_of_a_group_count_together() -> None:
    default, other = [1.0] * 8, [0.7, 0.7, 0.9, 0.9, 0.6, 0.6, 0.9, 0.9]
    assert pick(default, other) == 1  # less by 0.225 ± 0.049
    assert pick(default, other, groups=[0, 0, 1, 1, 2, 2, 3, 3]) == 0  # ± 0.075
    more, groups = np.array([0.5, 0.1, -0.3, 0.2, 0.4]), np.array([7, 7, 3, 9, 9])
    sums = np.array([0.6 - 2 * 0.18, -0.3 - 0.18, 0.6 - 2 * 0.18])
    mean, error = held_out.difference(2 + more, np.full(5, 2.0), groups)
    assert mean == pytest.approx(0.18)
    assert error == pytest.approx(np.sqrt((sums**2).sum() * 3 / 2) / 5)
