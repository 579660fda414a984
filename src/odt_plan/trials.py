"""``--importance trial``: the update set is chosen by what it learns, not by a sum of scores.

First-order gains of tensors overlap, so their sum does not tell which set of updates learns best.
Here each table of scores gives a plan, and so do the usual update sets that fit; each set is
trained shortly on a part of the labelled samples, by its plan, and judged by its loss on the
samples that were held out. Folds and orders are the same for all sets, so differences are paired.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, isfinite, nan
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .backends.numpy import data_set
from .backends.numpy.metrics import batch_losses
from .contributions import Source
from .ir.errors import InfeasibleError, OdtPlanError, UsageError
from .ir.graph import Array
from .kept_runs import KeptRuns
from .local_pool import cores
from .measuring import DEFAULT, GROUP, Wanted, gradient_tables, labelled_samples
from .planner.imported import Imported, import_requested
from .planner.pipeline import PlannedModel, Request, make_plan
from .planner.plan import ImportanceTable, Plan, Trial, TriedSet
from .planner.progress import Watch
from .planner.rebuild import file_sha256
from .sessions import Labelled, Pool, Session, train_all, workers
from .usual_sets import last_layers, usual_plans

#: What ``--importance`` calls it.
TRIAL = "trial"
#: Parts of the samples, each held out once.
FOLDS = 4
#: Samples at least; fewer say nothing about which set learns better.
LEAST_SAMPLES = 16
#: A training has this many updates and passes at least.
UPDATES, PASSES = 200, 2
#: Step sizes: each set begins with the middle ones and goes on while the outermost does best.
RATES = tuple(float(f"{m}e{e}") for e in range(-6, 1) for m in (1, 3))
FIRST_RATES = (0.001, 0.003, 0.01)
#: So many step sizes go on from the first fold to the others.
KEPT_RATES = 2

Losses = NDArray[np.float64]


class _InterruptedError(Exception):
    """The trial was asked to end."""


@dataclass(frozen=True)
class Entry:
    """An update set that is tried.

    Attributes:
        names: What leads to it.
        planned: Its plan.
    """

    names: tuple[str, ...]
    planned: PlannedModel


@dataclass(frozen=True)
class HeldOut:
    """A training that is judged by its loss on samples that it has not seen; picklable.

    Attributes:
        session: The training.
        tested: What is judged on.
    """

    session: Session
    tested: Labelled

    @property
    def name(self) -> str:
        """For messages."""
        return self.session.name

    def run(self) -> tuple[float, ...] | str:
        """The loss of each micro-batch after training, or what is wrong."""
        try:
            runtime = self.session.runtime()
            with np.errstate(all="ignore"):  # too large a step size ends in NaN, and is not chosen
                self.session.train(runtime)
                tested = data_set(runtime.training, self.tested.x, self.tested.y)
                return tuple(batch_losses(runtime, tested).tolist())
        except OdtPlanError as e:
            return str(e)

    def lost(self, reason: str) -> tuple[float, ...] | str:
        """Its worker died time and again."""
        return reason


@dataclass(frozen=True)
class Result:
    """What came of a set.

    Attributes:
        lr: Step size that did best.
        losses: Of each micro-batch, held out; not finite where training went wrong.
    """

    lr: float
    losses: Losses

    @property
    def loss(self) -> float:
        """Mean; infinite where it is none."""
        mean = float(self.losses.mean())
        return mean if isfinite(mean) else inf


@dataclass(frozen=True)
class Outcome:
    """A whole trial.

    Attributes:
        entries: The sets.
        results: What came of each.
        best: Index of the one that is chosen.
    """

    entries: Sequence[Entry]
    results: Sequence[Result]
    best: int


def plan_by_trial(
    request: Request, watch: Watch, samples: Path | None, jobs: int | None = None
) -> PlannedModel:
    """The plan of the update set that learns best in a trial.

    The time limit is that of all plans together; trainings take their own time. After Ctrl-C the
    trial is left unfinished, and the plan is that of the measured default, as the plan says.

    Args:
        request: Leaves the update set open; its importance is not used.
        watch: Told what goes on.
        samples: File of labelled samples.
        jobs: Processes; None: one per core.

    Raises:
        UsageError: There are no labels, too few samples, or they do not fit the model.
        InfeasibleError: There is no plan.
        KeyboardInterrupt: Stopped before there was any plan.
    """
    trial = Trials(request, samples, watch)
    found = trial.entries()
    try:
        return trial.planned(trial.run(found, jobs))
    except _InterruptedError:
        note = f"; stopped before {len(found)} update sets were tried"
        return _with_source(found[0].planned, note, None)


class Trials:
    """Trials of one request."""

    def __init__(self, request: Request, samples: Path | None, watch: Watch) -> None:
        """Read the samples.

        Raises:
            UsageError: As ``plan_by_trial``.
        """
        if request.train != ("auto",):
            raise UsageError(
                f"--importance {TRIAL}: chooses the update set; leave --train"
                f" {','.join(request.train)} out"
            )
        watch.begin(request.time_limit_s)
        self._request, self._watch = request, watch
        self._imported = import_requested(request, watch)
        self._wanted = Wanted(TRIAL, samples, request.freeze_before)
        self._course = _course(request, self._imported, self._wanted)
        assert samples is not None
        self._file, self._digest = samples.name, file_sha256(samples)

    def entries(self) -> list[Entry]:
        """The update sets of all tables and the usual ones that fit, equal ones once.

        The first is that of the measured default.

        Raises:
            UsageError, InfeasibleError, KeyboardInterrupt: As ``plan_by_trial``.
        """
        return _distinct(_plans(self._request, self._imported, self._wanted, self._watch))

    def run(self, found: Sequence[Entry], jobs: int | None = None) -> Outcome:
        """Train all sets; the same folds and orders for each.

        Raises:
            UsageError: The data do not fit the model, or a training failed.
        """
        with workers(jobs or cores()) as pool:
            results = _Trainer(found, self._request.model, self._course, self._watch, pool).run()
        return Outcome(found, results, _chosen(found, results))

    def planned(self, outcome: Outcome) -> PlannedModel:
        """The plan that is chosen; it tells of the trial."""
        course, best = self._course, outcome.entries[outcome.best]
        record = Trial(
            file=self._file,
            sha256=self._digest,
            samples=course.data.count,
            folds=FOLDS,
            epochs=course.epochs,
            seed=course.seed,
            before=_finite(_before(best.planned.plan, self._request.model, course.data)),
            chosen=best.names[0],
            tried=_told(outcome),
        )
        note = f"; update set chosen by trial: {best.names[0]}, of {len(outcome.entries)} sets"
        return _with_source(best.planned, note, record)


# --- samples --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """What all sets are trained on, and how.

    Attributes:
        data: Labelled samples.
        folds: Indices of the samples of each part.
        epochs: Passes over what is not held out.
        seed: Of the order of the samples.
    """

    data: Labelled
    folds: tuple[NDArray[np.int64], ...]
    epochs: int
    seed: int


def _course(request: Request, imported: Imported, wanted: Wanted) -> Course:
    """The samples of a file in folds; there are enough for whole micro-batches in each.

    Raises:
        UsageError: There are not, or groups are wrong.
    """
    x, y, groups = labelled_samples(imported.forward, request.spec, wanted)
    data, batch = Labelled(x, y), request.importing.batch
    group = batch * request.spec.micro_batches
    least = max(LEAST_SAMPLES, FOLDS * group)
    if data.count < least:
        raise UsageError(
            f"{wanted.samples}: {data.count} samples are too few for a trial, in which a part of"
            f" them is held out; give {least} or more, or another --importance"
        )
    each = np.arange(data.count) if groups is None else groups
    if each.shape != (data.count,):
        raise UsageError(
            f"{wanted.samples}: {GROUP} has shape {list(each.shape)}, but there are {data.count}"
            " samples; it takes the number of a recording, say, for each"
        )
    folds = _folds(each, request.seed)
    most = max(map(len, folds))
    if min(map(len, folds)) < batch or data.count - most < group:
        raise UsageError(
            f"{wanted.samples}: {len(np.unique(each))} groups of {data.count} samples are too few"
            f" for a trial, in which a part of them is held out; give {FOLDS} or more of one size"
        )
    epochs = max(PASSES, ceil(UPDATES * group / (data.count - most)))
    return Course(data, folds, epochs, request.seed)


def _folds(groups: Array, seed: int) -> tuple[NDArray[np.int64], ...]:
    """Indices of the samples of each fold; a group is in one of them, whole."""
    unique, of = np.unique(groups, return_inverse=True)
    fold = np.random.default_rng(seed).permutation(len(unique))[of] % FOLDS
    return tuple(np.flatnonzero(fold == f) for f in range(FOLDS))


# --- plans ----------------------------------------------------------------------------------------


def _plans(
    request: Request, imported: Imported, wanted: Wanted, watch: Watch
) -> dict[str, PlannedModel]:
    """By name of the table or usual set, that of the measured default first."""
    source = Source(request.model, request.importing)
    tables = gradient_tables(source, imported.forward, request.spec, wanted, watch)
    first = tables.pop(DEFAULT)
    every: dict[str, ImportanceTable | None] = {DEFAULT: first, "prior": None, **tables}
    made: dict[str, PlannedModel] = {}
    more = len(last_layers(imported, request)) - 1
    left = len(every) + 2 + more.bit_length()  # plans that may still have to be made

    def plan(name: str, asked: Request) -> PlannedModel:
        nonlocal left
        watch.stage(f"planning: {name}")
        share = watch.left_s / left
        left -= 1
        asked = replace(asked, time_limit_s=share)
        return make_plan(asked, watch.part(share), imported)

    for name, table in every.items():
        if made and watch.interrupted:
            break
        asked = replace(request, importance=table)
        try:
            made[name] = plan(name, replace(asked, with_relaxations=not made))
        except InfeasibleError:
            if not made:
                raise
        watch.has_plan = bool(made)

    def usual(name: str, train: tuple[str, ...]) -> PlannedModel | str:
        if watch.interrupted:
            return "interrupted"
        fixed = replace(request, train=train, importance=None, with_relaxations=False)
        try:
            return plan(name, fixed)
        except (InfeasibleError, UsageError) as e:
            return str(e)

    for name, planned in usual_plans(imported, request, usual):
        if isinstance(planned, PlannedModel):
            made[name] = planned
    return made


def _distinct(made: dict[str, PlannedModel]) -> list[Entry]:
    found: dict[str, Entry] = {}
    for name, planned in made.items():
        key = repr(_learned(planned.plan))
        before = found.get(key)
        if before is None:
            found[key] = Entry((name,), planned)
        else:
            found[key] = Entry((*before.names, name), before.planned)
    return list(found.values())


def _learned(plan: Plan) -> dict[str, object]:
    """All of a plan that decides what is learned: another layout or schedule changes nothing."""
    found: dict[str, object] = plan.model_dump(
        mode="json", include={"model", "training", "quantization"}
    )
    updates = [u for u in plan.decisions.updates if u.ratio]
    found["updates"] = sorted([u.param, u.channels or 0, u.saved, u.state] for u in updates)
    found["precision"] = dict(sorted(plan.decisions.precision.items()))
    return found


# --- trainings ------------------------------------------------------------------------------------


class _Trainer:
    def __init__(
        self, found: Sequence[Entry], model: Path, course: Course, watch: Watch, pool: Pool
    ) -> None:
        self._found, self._model, self._course = found, model, course
        self._watch, self._pool = watch, pool
        self._kept = KeptRuns(TRIAL, _digest(course))
        self._losses: dict[tuple[int, float, int], tuple[float, ...]] = {}

    def run(self) -> list[Result]:
        entries = range(len(self._found))
        rates = {e: list(FIRST_RATES) for e in entries}
        todo = [(e, r, 0) for e in entries for r in FIRST_RATES]
        while todo:
            self._train(todo)
            todo = []
            for e in entries:
                if (more := self._further(e, rates[e])) is not None:
                    rates[e].append(more)
                    todo.append((e, more, 0))
        for e in entries:
            rates[e].sort(key=lambda r: self._mean(e, r, 1))
            del rates[e][KEPT_RATES:]
        self._train([(e, r, f) for f in range(1, FOLDS) for e in entries for r in rates[e]])
        best = [min(rates[e], key=lambda r: self._mean(e, r, FOLDS)) for e in entries]
        return [Result(r, self._all(e, r, FOLDS)) for e, r in enumerate(best)]

    def _further(self, e: int, known: Sequence[float]) -> float | None:
        """A step size beyond the outermost one, where that does best."""
        best = min(known, key=lambda r: self._mean(e, r, 1))
        at = RATES.index(best)
        for end, next_ in ((min(known), at - 1), (max(known), at + 1)):
            if best == end and 0 <= next_ < len(RATES) and RATES[next_] not in known:
                return RATES[next_]
        return None

    def _all(self, e: int, rate: float, folds: int) -> Losses:
        """Losses over the first folds."""
        return np.concatenate([self._losses[e, rate, f] for f in range(folds)])

    def _mean(self, e: int, rate: float, folds: int) -> float:
        return Result(rate, self._all(e, rate, folds)).loss

    def _train(self, todo: Sequence[tuple[int, float, int]]) -> None:
        """Train what is not kept from before."""
        jobs: list[HeldOut] = []
        keys: list[list[object]] = []
        missing: list[tuple[int, float, int]] = []
        for e, rate, fold in todo:
            key: list[object] = [_learned(self._found[e].planned.plan), rate, fold]
            known = _losses_of(self._kept.read(key))
            if known is not None:
                self._losses[e, rate, fold] = known
                continue
            jobs.append(self._job(e, rate, fold))
            keys.append(key)
            missing.append((e, rate, fold))

        def done(i: int, losses: tuple[float, ...]) -> None:
            self._losses[missing[i]] = losses
            self._kept.write(keys[i], list(losses))
            if self._watch.interrupted:
                raise _InterruptedError

        train_all(jobs, self._pool, f"trial of {len(self._found)} update sets", self._watch, done)

    def _job(self, e: int, rate: float, fold: int) -> HeldOut:
        c, plan = self._course, self._found[e].planned.plan.without_replay()
        learned = np.sort(np.concatenate([p for f, p in enumerate(c.folds) if f != fold]))
        told = f"{self._found[e].names[0]}, step size {rate:g}, fold {fold + 1}"
        session = Session(told, plan, self._model, c.data.part(learned), c.epochs, rate, c.seed)
        return HeldOut(session, c.data.part(c.folds[fold]))


def _losses_of(kept: object) -> tuple[float, ...] | None:
    """Losses as they were kept; None where they are none."""
    if not isinstance(kept, list) or not all(isinstance(x, int | float) for x in kept):
        return None
    return tuple(map(float, kept)) or None


def _digest(course: Course) -> str:
    """SHA-256 of all that decides a training but the set and its step size."""
    setting = [__version__, np.__version__, course.epochs, course.seed]
    found = hashlib.sha256(repr(setting).encode())
    arrays = [*course.data.x.items(), *course.data.y.items()]
    for name, a in (*arrays, *((f"fold {i}", f) for i, f in enumerate(course.folds))):
        found.update(f"{name} {a.dtype} {a.shape}".encode() + a.tobytes())
    return found.hexdigest()


def _before(plan: Plan, model: Path, data: Labelled) -> float:
    """Mean loss without any training."""
    runtime = Session("", plan.without_replay(), model, data, 1, 1.0, 0).runtime()
    return float(batch_losses(runtime, data_set(runtime.training, data.x, data.y)).mean())


# --- the choice -----------------------------------------------------------------------------------


def _chosen(found: Sequence[Entry], results: Sequence[Result]) -> int:
    """Of the sets that the trial can't tell from the one with the least loss, that of least RAM.

    It can't where the mean of paired differences is no more than its standard error. On draws of
    the benchmark that no result is measured on, that learns as much as the least loss itself.

    Raises:
        UsageError: No set has a finite loss.
    """
    least = min(results, key=lambda r: r.loss)
    if not isfinite(least.loss):
        raise UsageError("trial: no training ends in a finite loss; scale the samples")
    alike = [i for i, r in enumerate(results) if _alike(r.losses - least.losses)]
    return min(alike, key=lambda i: found[i].planned.plan.claims.ram_bytes.total)


def _alike(more: Losses) -> bool:
    return bool(more.mean() <= _standard_error(more))  # never of what is not finite


def _told(outcome: Outcome) -> tuple[TriedSet, ...]:
    least = min(outcome.results, key=lambda r: r.loss)
    told = []
    for entry, r in zip(outcome.entries, outcome.results, strict=True):
        claims, updates = entry.planned.plan.claims, entry.planned.plan.decisions.updates
        more = r.losses - least.losses
        told.append(
            TriedSet(
                names=entry.names,
                updated=sum(u.ratio > 0 for u in updates),
                ram_bytes=claims.ram_bytes.total,
                lr=r.lr,
                loss=_finite(r.loss),
                more=_finite(more.mean()),
                error=_finite(_standard_error(more)),
            )
        )
    return tuple(told)


def _standard_error(a: Losses) -> float:
    return float(a.std(ddof=1) / np.sqrt(a.size)) if np.isfinite(a).all() else nan


def _finite(x: float) -> float | None:
    return float(x) if isfinite(x) else None


def _with_source(planned: PlannedModel, note: str, trial: Trial | None) -> PlannedModel:
    decided = planned.plan.decisions
    decided = decided.model_copy(
        update={"importance_source": decided.importance_source + note, "trial": trial}
    )
    return replace(planned, plan=planned.plan.model_copy(update={"decisions": decided}))
