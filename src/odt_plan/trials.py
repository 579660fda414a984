"""``--importance trial``: the update set is chosen by what it learns, not by a sum of scores.

First-order gains of tensors overlap, so their sum does not tell which set of updates learns best.
Here each table of scores gives a plan, and so do the usual update sets that fit; each set is
trained shortly on a part of the labelled samples, by its plan, and judged by its loss on the
samples that were held out. Folds and orders are the same for all sets, so differences are paired.
The plan of the measured default stands unless another set's loss is clearly less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .contributions import Source
from .held_out import (
    FOLDS,
    Result,
    StoppedTrialError,
    Trainer,
    course_of,
    difference,
    learned_by,
    loss_before,
)
from .ir.errors import InfeasibleError, UsageError
from .local_pool import cores
from .measuring import DEFAULT, Wanted, gradient_tables, labelled_samples
from .planner.imported import Imported, import_requested
from .planner.pipeline import PlannedModel, Request, make_plan
from .planner.plan import ImportanceTable, Trial, TriedSet
from .planner.progress import Watch
from .planner.rebuild import file_sha256
from .planner.search import StoppedEarlyError
from .sessions import Labelled, workers
from .usual_sets import last_layers, usual_plans

#: What ``--importance`` calls it.
TRIAL = "trial"
#: Standard errors that a set must lead the measured default by. Up to seven sets may, and a chance
#: of one in twenty for all of them together takes 2.4 (Bonferroni); but the errors are too small,
#: as any two of the trainings share two thirds of their samples, and no estimate of the variance of
#: cross-validation is free of bias (Bengio and Grandvalet, JMLR 5, 2004). Hence three.
LEAD = 3.0


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
    except StoppedTrialError:
        note = f"; stopped before {len(found)} update sets were tried"
        return _with_source(found[0].planned, note, None)


class Trials:
    """Trials of one request."""

    def __init__(self, request: Request, samples: Path | None, watch: Watch) -> None:
        """Read the samples, and measure the tables on them.

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
        wanted = Wanted(TRIAL, samples, request.freeze_before)
        source, forward = Source(request.model, request.importing), self._imported.forward
        self._tables = gradient_tables(source, forward, request.spec, wanted, watch)
        x, y, groups = labelled_samples(forward, request.spec, wanted)
        assert samples is not None
        batch, micro_batches = request.importing.batch, request.spec.micro_batches
        try:
            self._course = course_of(Labelled(x, y), groups, batch, micro_batches, request.seed)
        except UsageError as e:
            raise UsageError(f"{samples}: {e}") from None
        self._file, self._digest = samples.name, file_sha256(samples)

    def entries(self) -> list[Entry]:
        """The update sets of all tables and the usual ones that fit, equal ones once.

        The first is that of the measured default.

        Raises:
            UsageError, InfeasibleError, KeyboardInterrupt: As ``plan_by_trial``.
        """
        return _distinct(_plans(self._request, self._imported, self._tables, self._watch))

    def run(self, found: Sequence[Entry], jobs: int | None = None) -> Outcome:
        """Train all sets; the same folds and orders for each.

        Raises:
            UsageError: The data do not fit the model, or a training failed.
        """
        with workers(jobs or cores()) as pool:
            plans = [(e.names[0], e.planned.plan) for e in found]
            trainer = Trainer(plans, self._request.model, self._course, self._watch, pool)
            results = trainer.run()
        return Outcome(found, results, _chosen(results, self._course.groups))

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
            before=_finite(
                loss_before(best.planned.plan, self._request.model, course.data)
            ),
            chosen=best.names[0],
            tried=_told(outcome, course.groups),
        )
        note = f"; update set chosen by trial: {best.names[0]}, of {len(outcome.entries)} sets"
        return _with_source(best.planned, note, record)


# --- plans ----------------------------------------------------------------------------------------


def _plans(
    request: Request,
    imported: Imported,
    tables: Mapping[str, ImportanceTable],
    watch: Watch,
) -> dict[str, PlannedModel]:
    """By name of the table or usual set, that of the measured default first."""
    every = {DEFAULT: tables[DEFAULT], "prior": None, **tables}
    made: dict[str, PlannedModel] = {}
    more = len(last_layers(imported, request)) - 1
    usual_ones = 2 + more.bit_length() + bool(imported.forward.adapters)
    left = len(every) + usual_ones  # plans that may still have to be made

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
        except (InfeasibleError, StoppedEarlyError):
            if not made:
                raise
        watch.has_plan = bool(made)

    def usual(name: str, train: tuple[str, ...]) -> PlannedModel | str:
        if watch.interrupted:
            return "interrupted"
        fixed = replace(request, train=train, importance=None, with_relaxations=False)
        try:
            return plan(name, fixed)
        except (InfeasibleError, UsageError, StoppedEarlyError) as e:
            return str(e)

    for name, planned in usual_plans(imported, request, usual):
        if isinstance(planned, PlannedModel):
            made[name] = planned
    return made


def _distinct(made: dict[str, PlannedModel]) -> list[Entry]:
    found: dict[str, Entry] = {}
    for name, planned in made.items():
        key = repr(learned_by(planned.plan))
        before = found.get(key)
        if before is None:
            found[key] = Entry((name,), planned)
        else:
            found[key] = Entry((*before.names, name), before.planned)
    return list(found.values())


# --- the choice -----------------------------------------------------------------------------------


def _chosen(results: Sequence[Result], groups: NDArray[np.int64]) -> int:
    """The first set, or of those that lead it by more than ``LEAD`` standard errors the best.

    A first set whose training has no finite loss stands behind all that have one.

    Args:
        results: Of the sets, that of the measured default first.
        groups: Of the micro-batches.

    Raises:
        UsageError: No set has a finite loss.
    """
    among: Sequence[int] = range(len(results))
    if isfinite(results[0].loss):
        more = [difference(r.losses, results[0].losses, groups) for r in results]
        among = [0, *(i for i in among if more[i][0] < -LEAD * more[i][1])]
    best = min(among, key=lambda i: results[i].loss)
    if not isfinite(results[best].loss):
        raise UsageError("trial: no training ends in a finite loss; scale the samples")
    return best


def _told(outcome: Outcome, groups: NDArray[np.int64]) -> tuple[TriedSet, ...]:
    told = []
    for entry, r in zip(outcome.entries, outcome.results, strict=True):
        claims, updates = entry.planned.plan.claims, entry.planned.plan.decisions.updates
        more, error = difference(r.losses, outcome.results[0].losses, groups)
        told.append(
            TriedSet(
                names=entry.names,
                updated=sum(u.ratio > 0 for u in updates),
                ram_bytes=claims.ram_bytes.total,
                lr=r.lr,
                loss=_finite(r.loss),
                more=_finite(more),
                error=_finite(error),
            )
        )
    return tuple(told)


def _finite(x: float) -> float | None:
    return float(x) if isfinite(x) else None


def _with_source(planned: PlannedModel, note: str, trial: Trial | None) -> PlannedModel:
    decided = planned.plan.decisions
    decided = decided.model_copy(
        update={"importance_source": decided.importance_source + note, "trial": trial}
    )
    return replace(planned, plan=planned.plan.model_copy(update={"decisions": decided}))
