"""Update sets, trained on folds of labelled samples and judged by the loss on what is held out.

Folds, orders and step sizes that are tried are the same for all sets, so differences are paired.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite, nan
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .backends.numpy import data_set
from .backends.numpy.metrics import batch_losses
from .ir.errors import UsageError
from .ir.graph import Array
from .kept_runs import KeptRuns
from .planner.plan import Plan
from .planner.progress import Watch
from .sessions import Judged, Labelled, Pool, Session, train_all

#: Parts of the samples, each held out once.
FOLDS = 4
#: Samples at least; fewer say nothing about which set learns better.
LEAST_SAMPLES = 16
#: A training has this many updates and passes at least.
UPDATES, PASSES = 200, 2
#: Step sizes: each set begins with these, and goes on as long as the outermost does best.
RATES = tuple(float(f"{m}e{e}") for e in range(-6, 1) for m in (1, 3))
FIRST_RATES = (0.001, 0.003)

Losses = NDArray[np.float64]


class StoppedTrialError(Exception):
    """The trial was asked to end."""


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
        return _mean(self.losses)


def _mean(losses: Losses) -> float:
    mean = float(losses.mean())
    return mean if isfinite(mean) else inf


@dataclass(frozen=True)
class Course:
    """What all sets are trained on, and how.

    Attributes:
        data: Labelled samples.
        folds: Indices of the samples of each part, group by group.
        groups: Group of each micro-batch that is held out, fold by fold: that of its first sample.
        epochs: Passes over what is not held out.
        seed: Of the order of the samples.
    """

    data: Labelled
    folds: tuple[NDArray[np.int64], ...]
    groups: NDArray[np.int64]
    epochs: int
    seed: int


def course_of(
    data: Labelled, groups: Array | None, batch: int, micro_batches: int, seed: int
) -> Course:
    """Samples in folds; there are enough for whole micro-batches in each.

    Args:
        data: The samples.
        groups: Which of them belong together [count]; None: each is one of its own.
        batch: Samples per micro-batch.
        micro_batches: Per update.
        seed: Of folds and orders.

    Raises:
        UsageError: There are too few, or groups are wrong.
    """
    update = batch * micro_batches
    least = max(LEAST_SAMPLES, FOLDS * update)
    if data.count < least:
        raise UsageError(
            f"{data.count} samples are too few for a trial, in which a part of them is held out;"
            f" give {least} or more, or another --importance"
        )
    each = np.arange(data.count) if groups is None else groups
    if each.shape != (data.count,):
        raise UsageError(
            f"group has shape {list(each.shape)}, but there are {data.count} samples; it takes the"
            " number of a recording, say, for each"
        )
    unique, of = np.unique(each, return_inverse=True)
    fold = np.random.default_rng(seed).permutation(len(unique))[of] % FOLDS
    by_group = np.argsort(of, kind="stable")
    folds = tuple(by_group[fold[by_group] == f] for f in range(FOLDS))
    most = max(map(len, folds))
    if min(map(len, folds)) < batch or data.count - most < update:
        raise UsageError(
            f"{len(unique)} groups of {data.count} samples are too few for a trial, in which a"
            f" part of them is held out; give {FOLDS} or more of one size"
        )
    firsts = np.concatenate([of[f[: len(f) // batch * batch : batch]] for f in folds])
    epochs = max(PASSES, ceil(UPDATES * update / (data.count - most)))
    return Course(data, folds, firsts, epochs, seed)


def difference(
    losses: Losses, others: Losses, groups: NDArray[np.int64]
) -> tuple[float, float]:
    """Mean of paired differences, and its standard error; NaN where a loss is not finite.

    Micro-batches of one group are not independent: the error is that of a mean over clusters of
    different sizes (a ratio estimator, linearized; Cochran, Sampling Techniques, 1977). Where each
    is a group of its own it is the usual one.

    Args:
        losses: Of one set [micro-batches].
        others: Of the set that it is compared with [micro-batches].
        groups: Of each micro-batch.
    """
    if not np.isfinite([losses, others]).all():
        return nan, nan
    more = losses - others
    mean = float(more.mean())
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], more - mean)
    return mean, float(np.sqrt((sums**2).sum() * sums.size / (sums.size - 1)) / more.size)


def _held_out(session: Session, tested: Labelled) -> tuple[float, ...]:
    """The loss of each micro-batch after training."""
    runtime = session.runtime()
    with np.errstate(all="ignore"):  # too large a step size ends in NaN, and is not chosen
        session.train(runtime)
        return tuple(batch_losses(runtime, data_set(runtime.training, tested.x, tested.y)).tolist())


def loss_before(plan: Plan, model: Path, data: Labelled) -> float:
    """Mean loss without any training."""
    runtime = Session("", plan.without_replay(), model, data, 1, 1.0, 0).runtime()
    return float(batch_losses(runtime, data_set(runtime.training, data.x, data.y)).mean())


class Trainer:
    """Trains sets; what was trained before is read from the cache."""

    def __init__(
        self,
        plans: Sequence[tuple[str, Plan]],
        model: Path,
        course: Course,
        watch: Watch,
        pool: Pool,
    ) -> None:
        """Nothing is trained yet.

        Args:
            plans: Name and plan of each set.
            model: Their model file.
            course: How they are trained.
            watch: Told what goes on.
            pool: Where.
        """
        self._plans = [(name, plan.without_replay()) for name, plan in plans]
        self._model, self._course = model, course
        self._watch, self._pool = watch, pool
        self._kept = KeptRuns("trial", _digest(course))
        self._losses: dict[tuple[int, float, int], tuple[float, ...]] = {}

    def run(self) -> list[Result]:
        """Train all sets, each at the step sizes that suit it.

        Raises:
            StoppedTrialError: The watch was asked to stop.
            UsageError: The data do not fit the model, or a training failed.
        """
        sets = range(len(self._plans))
        rates = {e: list(FIRST_RATES) for e in sets}
        todo = [(e, r) for e in sets for r in FIRST_RATES]
        while todo:
            self._train([(e, r, f) for f in range(FOLDS) for e, r in todo])
            todo = []
            for e in sets:
                if (more := self._further(e, rates[e])) is not None:
                    rates[e].append(more)
                    todo.append((e, more))
        best = [min(rates[e], key=lambda r: self._loss(e, r)) for e in sets]
        return [Result(r, self._all(e, r)) for e, r in enumerate(best)]

    def _further(self, e: int, known: Sequence[float]) -> float | None:
        """A step size beyond the outermost one, where that does best."""
        best = min(known, key=lambda r: self._loss(e, r))
        at = RATES.index(best)
        for end, next_ in ((min(known), at - 1), (max(known), at + 1)):
            if best == end and 0 <= next_ < len(RATES) and RATES[next_] not in known:
                return RATES[next_]
        return None

    def _all(self, e: int, rate: float) -> Losses:
        """Losses, fold by fold."""
        return np.concatenate([self._losses[e, rate, f] for f in range(FOLDS)])

    def _loss(self, e: int, rate: float) -> float:
        return _mean(self._all(e, rate))

    def _train(self, todo: Sequence[tuple[int, float, int]]) -> None:
        """Train what is not kept from before."""
        if self._watch.interrupted:
            raise StoppedTrialError
        jobs: list[Judged[tuple[float, ...]]] = []
        keys: list[list[object]] = []
        missing: list[tuple[int, float, int]] = []
        for e, rate, fold in todo:
            key: list[object] = [learned_by(self._plans[e][1]), rate, fold]
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
                raise StoppedTrialError

        train_all(jobs, self._pool, f"trial of {len(self._plans)} update sets", self._watch, done)

    def _job(self, e: int, rate: float, fold: int) -> Judged[tuple[float, ...]]:
        c, (name, plan) = self._course, self._plans[e]
        learned = np.sort(np.concatenate([p for f, p in enumerate(c.folds) if f != fold]))
        told = f"{name}, step size {rate:g}, fold {fold + 1}"
        session = Session(told, plan, self._model, c.data.part(learned), c.epochs, rate, c.seed)
        return Judged(session, c.data.part(c.folds[fold]), _held_out)


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


def learned_by(plan: Plan) -> dict[str, object]:
    """All of a plan that decides what is learned: another layout or schedule changes nothing."""
    found: dict[str, object] = plan.model_dump(
        mode="json", include={"model", "training", "quantization"}
    )
    updates = [u for u in plan.decisions.updates if u.ratio]
    found["updates"] = sorted([u.param, u.channels or 0, u.saved, u.state] for u in updates)
    found["precision"] = dict(sorted(plan.decisions.precision.items()))
    return found
