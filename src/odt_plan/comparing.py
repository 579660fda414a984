"""``odt-plan compare``: what the plan's choice of updates learns, beside the usual update sets.

Every update set is planned, and trained by its plan in the NumPy runtime, in several orders of the
samples. The step size of each set is the one that does best on samples held out of the training
data, so that the validation data choose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .backends.numpy import data_set
from .backends.numpy.metrics import MetricName, evaluate, metric_of
from .ir.errors import InfeasibleError, UsageError
from .planner.imported import import_requested
from .planner.pipeline import PlannedModel, Request, make_plan
from .planner.progress import Watch
from .planner.sizes import LARGEST_BYTES
from .sessions import Judged, Labelled, Session, train_all, workers
from .usual_sets import usual_plans

#: Every so many samples one is held out while step sizes are tried.
HELD_OUT = 4
AUTO, ALL = "auto", "all"


def _before_and_after(session: Session, tested: Labelled) -> tuple[float, float]:
    """The metric before and after training."""
    runtime = session.runtime()
    metric = metric_of(runtime.training)
    data = data_set(runtime.training, tested.x, tested.y, suffix="_val")
    before = evaluate(runtime, data, metric).value
    session.train(runtime)
    return before, evaluate(runtime, data, metric).value


@dataclass(frozen=True)
class Row:
    """One update set.

    Attributes:
        name: What it is called.
        reason: Why there is no plan; empty: there is one.
        ram_bytes: Of its plan.
        latency_s: Predicted, of a training step.
        fits: The plan keeps the RAM that the others have.
        updated: Updated tensors.
        lr: Step size that did best on held-out training data.
        before: Metric before training.
        values: Metric after training, by seed.
    """

    name: str
    reason: str = ""
    ram_bytes: int = 0
    latency_s: float = 0.0
    fits: bool = True
    updated: int = 0
    lr: float = 0.0
    before: float = 0.0
    values: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Of the values."""
        return float(np.mean(self.values))

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for one seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Comparison:
    """All update sets.

    Attributes:
        rows: One per update set.
        metric: What values are.
        importance: Where the scores of ``auto`` come from.
        tensors: That could be updated.
    """

    rows: tuple[Row, ...]
    metric: MetricName
    importance: str
    tensors: int


@dataclass(frozen=True)
class Course:
    """How update sets are trained.

    Attributes:
        epochs: Passes over the data.
        rates: Step sizes to choose from.
        seeds: Orders of the samples.
        jobs: Processes.
    """

    epochs: int
    rates: tuple[float, ...]
    seeds: int
    jobs: int


def compare(
    request: Request,
    train: Labelled,
    tested: Labelled,
    course: Course,
    watch: Watch,
    plan: Callable[[Request, Watch], PlannedModel] = make_plan,
) -> Comparison:
    """Plan and train all update sets.

    Args:
        request: That of ``auto``.
        train: Labelled samples to learn from.
        tested: Labelled samples to judge on.
        course: How.
        watch: Told what goes on.
        plan: Makes the plan of ``auto``.

    Raises:
        InfeasibleError: ``auto`` has no plan.
        UsageError: The data do not fit the model.
    """
    if train.count < HELD_OUT:
        raise UsageError(f"--data: {train.count} samples are too few; give {HELD_OUT} or more")
    plans = dict(_plans(request, watch, plan))
    made = {name: p for name, p in plans.items() if isinstance(p, PlannedModel)}
    trainer = _Trainer(request.model, train, tested, course, watch)
    rates = trainer.rates(made)
    values = trainer.values(made, rates)
    budget = made[AUTO].plan.device.budget.ram_bytes
    rows = []
    for name, planned in plans.items():
        if not isinstance(planned, PlannedModel):
            rows.append(Row(name, planned))
            continue
        claims, updates = planned.plan.claims, planned.plan.decisions.updates
        rows.append(
            Row(
                name,
                ram_bytes=claims.ram_bytes.total,
                latency_s=claims.latency_s,
                fits=claims.ram_bytes.total <= budget,
                updated=sum(u.ratio > 0 for u in updates),
                lr=rates[name],
                before=values[name][0][0],
                values=tuple(after for _, after in values[name]),
            )
        )
    decisions, metric = made[AUTO].plan.decisions, metric_of(made[AUTO].training)
    return Comparison(tuple(rows), metric, decisions.importance_source, len(decisions.updates))


def _plans(
    request: Request, watch: Watch, plan: Callable[[Request, Watch], PlannedModel]
) -> Iterator[tuple[str, PlannedModel | str]]:
    """The plan of each update set, or why it has none."""
    request = replace(request, with_baselines=False)
    imported = import_requested(request, watch)

    def made(name: str, train: tuple[str, ...], asked: Request = request) -> PlannedModel | str:
        watch.stage(f"planning: {name}")
        asked = replace(asked, train=train, with_relaxations=False)
        try:
            return make_plan(asked, watch.part(request.time_limit_s), imported)
        except (InfeasibleError, UsageError) as e:
            return str(e)

    watch.stage(f"planning: {AUTO}")
    yield AUTO, plan(request, watch.part(request.time_limit_s))
    yield from usual_plans(imported, request, made)
    free = replace(request, ram_bytes=LARGEST_BYTES, ram_regions=())
    yield ALL, made(ALL, ("all",), free)


class _Trainer:
    """Trains plans in processes."""

    def __init__(
        self, model: Path, train: Labelled, tested: Labelled, course: Course, watch: Watch
    ) -> None:
        self._model, self._train, self._tested = model, train, tested
        self._course, self._watch = course, watch

    def rates(self, made: dict[str, PlannedModel]) -> dict[str, float]:
        """The step size of each plan that does best on held-out samples of the training data."""
        rates = self._course.rates
        if len(rates) == 1:
            return dict.fromkeys(made, rates[0])
        held = np.arange(self._train.count) % HELD_OUT == HELD_OUT - 1
        learned = self._train.part(np.flatnonzero(~held))
        judged = self._train.part(np.flatnonzero(held))
        todo = [(name, r) for name in made for r in rates]
        found = self._run(
            "trying step sizes",
            [self._session(made, name, learned, judged, r, 0) for name, r in todo],
        )
        metric = metric_of(next(iter(made.values())).training)
        sign = 1.0 if metric in ("accuracy", "auc") else -1.0
        best: dict[str, tuple[float, float]] = {}
        for (name, rate), (_, after) in zip(todo, found, strict=True):
            value = sign * after if np.isfinite(after) else -np.inf
            if name not in best or value > best[name][0]:
                best[name] = value, rate
        return {name: rate for name, (_, rate) in best.items()}

    def values(
        self, made: dict[str, PlannedModel], rates: dict[str, float]
    ) -> dict[str, list[tuple[float, float]]]:
        """Metric before and after training, of each plan by seed."""
        seeds = range(self._course.seeds)
        found = self._run(
            "training",
            [
                self._session(made, name, self._train, self._tested, rates[name], s)
                for name in made
                for s in seeds
            ],
        )
        each = iter(found)
        return {name: [next(each) for _ in seeds] for name in made}

    def _session(
        self,
        made: dict[str, PlannedModel],
        name: str,
        data: Labelled,
        tested: Labelled,
        rate: float,
        seed: int,
    ) -> Judged[tuple[float, float]]:
        told = f"{name}, step size {rate:g}, seed {seed}"
        plan, epochs = made[name].plan, self._course.epochs
        session = Session(told, plan, self._model, data, epochs, rate, seed)
        return Judged(session, tested, _before_and_after)

    def _run(
        self, what: str, todo: Sequence[Judged[tuple[float, float]]]
    ) -> list[tuple[float, float]]:
        """Results in the order of the trainings.

        Raises:
            UsageError: One failed.
        """
        with workers(self._course.jobs) as pool:
            return train_all(todo, pool, what, self._watch)
