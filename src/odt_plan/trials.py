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
from math import ceil, inf, isfinite
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .backends.numpy import data_set
from .backends.numpy.metrics import batch_losses
from .contributions import Source
from .ir.errors import InfeasibleError, OdtPlanError, UsageError
from .ir.import_options import ImportOptions
from .kept_runs import KeptRuns
from .local_pool import cores
from .measuring import DEFAULT, Wanted, gradient_tables, labelled_samples
from .planner.imported import Imported, import_requested
from .planner.pipeline import PlannedModel, Request, make_plan
from .planner.plan import Plan, Trial, TriedSet
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
RATES = tuple(m * 10.0**e for e in range(-6, 1) for m in (1, 3))
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


def plan_by_trial(
    request: Request, samples: Path | None, watch: Watch, jobs: int | None = None
) -> PlannedModel:
    """The plan of the update set that learns best in a trial.

    The time limit is that of all plans together; trainings take their own time. After Ctrl-C the
    trial is left unfinished, and the plan is that of the measured default, as the plan says.

    Args:
        request: Leaves the update set open; its importance is not used.
        samples: File of labelled samples.
        watch: Told what goes on.
        jobs: Processes; None: one per core.

    Raises:
        UsageError: There are no labels, too few samples, or they do not fit the model.
        InfeasibleError: There is no plan.
        KeyboardInterrupt: Stopped before there was any plan.
    """
    if request.train != ("auto",):
        raise UsageError(
            f"--importance {TRIAL}: chooses the update set; leave --train {','.join(request.train)}"
            " out"
        )
    watch.begin(request.time_limit_s)
    imported = import_requested(request, watch)
    wanted = Wanted(TRIAL, samples, request.freeze_before)
    data = _labelled(request, imported, wanted)
    assert samples is not None
    found = entries(request, imported, wanted, watch)
    digest = file_sha256(samples)
    try:
        results = tried(found, request.model, data, request.seed, watch, jobs)
        before = _before(found[0].planned.plan, request.model, data)
    except _InterruptedError:
        note = f"; stopped before {len(found)} update sets were tried"
        return _with_source(found[0].planned, note, None)
    best = chosen(found, results)
    record = Trial(
        file=samples.name,
        sha256=digest,
        samples=data.count,
        folds=FOLDS,
        epochs=_passes(request, data.count),
        seed=request.seed,
        before=_finite(before),
        chosen=found[best].names[0],
        tried=_told(found, results),
    )
    note = f"; update set chosen by trial: {record.chosen}, of {len(found)} that were trained"
    return _with_source(found[best].planned, note, record)


def _labelled(request: Request, imported: Imported, wanted: Wanted) -> Labelled:
    """The samples; there are enough for whole micro-batches in each part.

    Raises:
        UsageError: There are not.
    """
    x, y, count = labelled_samples(imported.forward, request.spec, wanted)
    group = request.importing.batch * request.spec.micro_batches
    least = max(LEAST_SAMPLES, FOLDS * group)
    if count < least:
        raise UsageError(
            f"{wanted.samples}: {count} samples are too few for a trial, in which a part of them"
            f" is held out; give {least} or more, or another --importance"
        )
    return Labelled(x, y)


# --- plans ----------------------------------------------------------------------------------------


def entries(request: Request, imported: Imported, wanted: Wanted, watch: Watch) -> list[Entry]:
    """The update sets of all tables and the usual ones that fit, equal ones once.

    The first is that of the measured default.

    Raises:
        UsageError, InfeasibleError, KeyboardInterrupt: As ``plan_by_trial``.
    """
    source = Source(request.model, request.importing)
    tables = gradient_tables(source, imported.forward, request.spec, wanted, watch)
    first = {DEFAULT: tables.pop(DEFAULT)}
    made: dict[str, PlannedModel] = {}
    left = 5 + len(last_layers(imported, request)).bit_length()  # plans that are still to be made

    def plan(name: str, asked: Request) -> PlannedModel:
        nonlocal left
        watch.stage(f"planning: {name}")
        share = watch.left_s / max(1, left)
        left -= 1
        asked = replace(asked, time_limit_s=share)
        return make_plan(asked, watch.part(share), imported)

    for name, table in {**first, "prior": None, **tables}.items():
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
    return _distinct(made)


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
    include = {"model", "training", "quantization"}
    decided = plan.decisions
    return plan.model_dump(mode="json", include=include) | {
        "updates": sorted((u.param, u.channels, u.saved, u.state) for u in decided.updates if u.ratio),
        "precision": dict(sorted(decided.precision.items())),
    }


# --- trainings ------------------------------------------------------------------------------------


def tried(
    found: Sequence[Entry],
    model: Path,
    data: Labelled,
    seed: int,
    watch: Watch,
    jobs: int | None = None,
) -> list[Result]:
    """Train all sets; the same folds and orders for each.

    Raises:
        UsageError: The data do not fit the model, or a training failed.
    """
    with workers(jobs or cores()) as pool:
        return _Trials(found, model, data, seed, watch, pool).run()


class _Trials:
    def __init__(
        self,
        found: Sequence[Entry],
        model: Path,
        data: Labelled,
        seed: int,
        watch: Watch,
        pool: Pool,
    ) -> None:
        self._found, self._model, self._data = found, model, data
        self._seed, self._watch, self._pool = seed, watch, pool
        spec, batch = found[0].planned.training.spec, found[0].planned.plan.model.batch
        self._passes = _epochs(data.count, batch * spec.micro_batches)
        order = np.random.default_rng(seed).permutation(data.count)
        self._folds = [np.sort(order[i::FOLDS]) for i in range(FOLDS)]
        setting = [__version__, np.__version__, seed, FOLDS, self._passes]
        self._kept = KeptRuns(TRIAL, _digest(data, setting))
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
        kept = {e: sorted(rates[e], key=lambda r: self._mean(e, r, 1))[:KEPT_RATES] for e in entries}
        self._train([(e, r, f) for f in range(1, FOLDS) for e in entries for r in kept[e]])
        best = {e: min(kept[e], key=lambda r: self._mean(e, r, FOLDS)) for e in entries}
        return [Result(best[e], self._all(e, best[e], FOLDS)) for e in entries]

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
        rest = np.concatenate([part for i, part in enumerate(self._folds) if i != fold])
        told = f"{self._found[e].names[0]}, step size {rate:g}, fold {fold + 1}"
        plan, learned = self._found[e].planned.plan.without_replay(), self._data.part(rest)
        session = Session(told, plan, self._model, learned, self._passes, rate, self._seed)
        return HeldOut(session, self._data.part(self._folds[fold]))


def _epochs(count: int, group: int) -> int:
    """Passes of each training."""
    learned = count - ceil(count / FOLDS)
    return max(PASSES, ceil(UPDATES * group / learned))


def _passes(request: Request, count: int) -> int:
    return _epochs(count, request.importing.batch * request.spec.micro_batches)


def _losses_of(kept: object) -> tuple[float, ...] | None:
    """Losses as they were kept; None where they are none."""
    if not isinstance(kept, list) or not all(isinstance(x, int | float) for x in kept):
        return None
    return tuple(map(float, kept)) or None


def _digest(data: Labelled, setting: object) -> str:
    """SHA-256 of all that decides a training but the set and its step size."""
    found = hashlib.sha256(repr(setting).encode())
    for arrays in (data.x, data.y):
        for name, a in arrays.items():
            found.update(f"{name} {a.dtype} {a.shape}".encode() + a.tobytes())
    return found.hexdigest()


def _before(plan: Plan, model: Path, data: Labelled) -> float:
    """Mean loss without any training."""
    runtime = Session("", plan.without_replay(), model, data, 1, 1.0, 0).runtime()
    return float(batch_losses(runtime, data_set(runtime.training, data.x, data.y)).mean())


# --- the choice -----------------------------------------------------------------------------------


def chosen(found: Sequence[Entry], results: Sequence[Result]) -> int:
    """The set with the least loss."""
    return min(range(len(found)), key=lambda i: results[i].loss)


def _told(found: Sequence[Entry], results: Sequence[Result]) -> tuple[TriedSet, ...]:
    least = min(results, key=lambda r: r.loss)
    told = []
    for entry, r in zip(found, results, strict=True):
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
    return float(a.std(ddof=1) / np.sqrt(a.size))


def _finite(x: float) -> float | None:
    return float(x) if isfinite(x) else None


def _with_source(planned: PlannedModel, note: str, trial: Trial | None) -> PlannedModel:
    decided = planned.plan.decisions
    decided = decided.model_copy(
        update={"importance_source": decided.importance_source + note, "trial": trial}
    )
    return replace(planned, plan=planned.plan.model_copy(update={"decisions": decided}))
