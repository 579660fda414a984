"""A training session: updates by the plan, judged on a validation set, kept where they are good."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ...ir.errors import UsageError
from .data import DataSet, chosen_of
from .history import Epoch, History, Stop
from .metrics import Evaluation, MetricName, check_metric, evaluate, metric_of
from .regularization import Regularization
from .replay import Replayed
from .runtime import Runtime, Snapshot
from .sampling import Sampler, balancing
from .schedule import Schedule, ScheduleName


@dataclass(frozen=True)
class SessionOptions:
    """How to train.

    Attributes:
        lr: Step size at its largest.
        steps: Updates to do.
        epochs: Passes over the data instead; a last update that is not full is filled from the
            start of the next pass.
        online: One pass instead, in the order of the data, as a device sees them.
        seed: Of the order of the samples.
        schedule: How the step size changes from update to update.
        warmup: Updates over which it rises.
        weight_decay: See ``Regularization``.
        clip: See ``Regularization``.
        balance: Draw samples with replacement, all classes alike often.
        metric: What is judged on the validation set; None: what the loss suggests.
        patience: Stop after so many epochs without anything better; None: never.
        halvings: How often to go back and halve the step size when a value is not finite.
        checkpoint: File that is written at each epoch and at the end.
        checkpoint_every: Updates between two checkpoints, beside the epochs.
        resume: Checkpoint to continue from.
    """

    lr: float
    steps: int | None = None
    epochs: int | None = None
    online: bool = False
    seed: int = 0
    schedule: ScheduleName = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float | None = None
    balance: bool = False
    metric: MetricName | None = None
    patience: int | None = None
    halvings: int = 0
    checkpoint: Path | None = None
    checkpoint_every: int | None = None
    resume: Path | None = None


class Listener(Protocol):
    """Is told what goes on; every method may raise KeyboardInterrupt, which ends the session."""

    def updated(self, done: int, total: int, loss: float) -> None:
        """An update was kept; ``done`` and ``total`` count updates of the data's course."""

    def ended(self, epoch: Epoch) -> None:
        """An epoch was judged."""

    def noted(self, text: str) -> None:
        """Something the user should know, in one line."""


class Silent:
    """A listener that tells nothing."""

    def updated(self, done: int, total: int, loss: float) -> None:
        """Nothing."""

    def ended(self, epoch: Epoch) -> None:
        """Nothing."""

    def noted(self, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Standing:
    """Where a session stands between two updates; replaced as a whole, so never half changed.

    Attributes:
        state: Of the runtime.
        position: Updates' worth of samples that were used.
        losses: Updates that were kept.
        replayed: Micro-steps from the replay cache.
    """

    state: Snapshot
    position: int
    losses: int
    replayed: int


def train_session(
    runtime: Runtime,
    data: DataSet,
    options: SessionOptions,
    *,
    validation: DataSet | None = None,
    listener: Listener | None = None,
) -> History:
    """Train on a data set, and leave the best state in the runtime.

    With a validation set the model is judged before training and after each epoch; the state that
    was best stays, and the one before training where training made it worse. Without one the last
    good state stays. With replay in the plan, samples stay in the same micro-batches for good, in a
    new order in each pass; as long as the cache has room, each passes the frozen front only once.

    Args:
        runtime: Trains by its plan.
        data: What to train on; ``data_set`` makes it.
        options: How.
        validation: What to judge by.
        listener: Is told what goes on.

    Returns:
        What happened; all but an error in the options ends in a state that can be used.

    Raises:
        UsageError: The options contradict each other, the plan or the data.
        OdtPlanError: A checkpoint can't be written.
    """
    return _Session(runtime, data, options, validation, listener or Silent()).run()


class _Session:
    def __init__(
        self,
        runtime: Runtime,
        data: DataSet,
        options: SessionOptions,
        validation: DataSet | None,
        listener: Listener,
    ) -> None:
        training, plan = runtime.training, runtime.plan
        self.runtime, self.data, self.options = runtime, data, options
        self.validation, self.listener = validation, listener
        self.micro = training.spec.micro_batches
        self.group = plan.model.batch * self.micro
        self.total = _updates(options, data.count, self.group)
        self.cache = None if plan.replay is None else Replayed(runtime, plan.replay)
        self.metric = options.metric or metric_of(training)
        self.regularization = Regularization(options.weight_decay, options.clip)
        _check(options, self.total)
        self.regularization.check(training)
        if validation is not None:
            check_metric(training, self.metric, validation)
        self.sampler = _sampler(options, data, plan.model.batch, fixed=self.cache is not None)
        self.schedule = Schedule(options.schedule, options.lr, self.total, options.warmup)
        self.losses: list[float] = []
        self.epochs: list[Epoch] = []
        self.best: tuple[Epoch, Snapshot] | None = None
        self.halved = 0
        self.first = runtime.snapshot()
        self.good = self.milestone = Standing(self.first, 0, 0, 0)

    def run(self) -> History:
        before, self.runtime.regularization = self.runtime.regularization, self.regularization
        stopped: Stop | None = None
        try:
            if self.validation is not None and not self.epochs:
                self.epochs.append(Epoch(0, 0, None, None, self._judged()))
                self.listener.ended(self.epochs[-1])
            while self.good.position < self.total and stopped is None:
                stopped = self._advance()
        except KeyboardInterrupt:
            stopped = "interrupted"
        finally:
            self.runtime.regularization = before
        del self.losses[self.good.losses :]
        self.runtime.restore(self.good.state)
        return History(
            tuple(self.losses),
            stopped,
            self.good.replayed,
            tuple(self.epochs),
            self._keep_best(),
            self.halved,
            self.data.count - self.total * self.group if self.options.online else 0,
        )

    def _advance(self) -> Stop | None:
        """One update, and what is due after it."""
        at = self.good.position
        lr = self.schedule.rate(at) * 0.5**self.halved
        loss = self._update(at, lr)
        if not (np.isfinite(loss) and self.runtime.is_finite()):
            return self._went_wrong(at)
        self.losses.append(loss)
        replayed = self.cache.replayed if self.cache is not None else 0
        self.good = Standing(self.runtime.snapshot(), at + 1, len(self.losses), replayed)
        self.listener.updated(at + 1, self.total, loss)
        if at + 1 == self.total or self._passes(at + 1) > self._passes(at):
            return self._end_epoch(lr)
        return None

    def _update(self, at: int, lr: float) -> float:
        """Mean loss of the micro-batches of one update."""
        total = 0.0
        with np.errstate(all="ignore"):  # what overflows is found and told by the caller
            for number in range(at * self.micro, (at + 1) * self.micro):
                chosen = self.sampler.batch(number)
                if self.cache is None:
                    x, y = chosen_of(self.data.x, chosen), self.data.y[chosen]
                    total += self.runtime.train_step(x, y, lr)
                else:
                    total += self.cache.train(chosen, self.data.x, self.data.y, lr)
        return total / self.micro

    def _went_wrong(self, at: int) -> Stop | None:
        """Go back to the start of the epoch with half the step size, or stop.

        Online no sample comes a second time: then on from the last good state with the next one.
        """
        if self.halved == self.options.halvings:
            return "not_finite"
        self.halved += 1
        if self.options.online:
            self.good = replace(self.good, position=at + 1)
        else:
            self.good = self.milestone
            del self.losses[self.good.losses :]
        self.runtime.restore(self.good.state)
        self.listener.noted(
            f"update {at + 1} gave a NaN or infinite value; on from update {self.good.losses} at"
            f" 1/{2**self.halved} of the step size"
        )
        return None

    def _end_epoch(self, lr: float) -> Stop | None:
        since = self.losses[self.milestone.losses :]
        number = 1 + sum(e.number > 0 for e in self.epochs)
        epoch = Epoch(number, self.good.losses, float(np.mean(since)), lr, self._judged())
        self.epochs.append(epoch)
        self.milestone = self.good
        if self._improves(epoch):
            self.best = epoch, self.good.state
        self.listener.ended(epoch)
        patience, best = self.options.patience, self.best
        if patience is None or best is None or number - best[0].number < patience:
            return None
        return "patience"

    def _improves(self, epoch: Epoch) -> bool:
        if epoch.validation is None:
            return False
        best = None if self.best is None else self.best[0].validation
        return best is None or epoch.validation.better_than(best)

    def _judged(self) -> Evaluation | None:
        if self.validation is None:
            return None
        return evaluate(self.runtime, self.validation, self.metric)

    def _keep_best(self) -> int | None:
        """Load the best state that was judged; that before training if all others are worse."""
        if self.best is None:
            return None
        epoch, state = self.best
        first, best = self.epochs[0].validation, epoch.validation
        assert first is not None
        assert best is not None
        if best.worse_than(first):
            self.runtime.restore(self.first)
            return 0
        self.runtime.restore(state)
        return epoch.number

    def _passes(self, position: int) -> int:
        return position * self.group // self.data.count


def _updates(options: SessionOptions, count: int, group: int) -> int:
    """Updates of a run.

    Raises:
        UsageError: Not exactly one amount is given, or there is nothing to do.
    """
    given = [options.steps is not None, options.epochs is not None, options.online]
    if sum(given) != 1:
        raise UsageError("give either steps or epochs, or train online, in one pass")
    if options.online:
        if count < group:
            raise UsageError(
                f"there is nothing to train: an update takes {group} samples, the data have {count}"
            )
        return count // group
    steps = options.steps
    if options.epochs is not None:
        steps = -(-options.epochs * count // group)
    assert steps is not None
    if steps < 1:
        raise UsageError(f"there is nothing to train: {steps} steps")
    return steps


def _check(options: SessionOptions, total: int) -> None:
    """Demand options that make sense together.

    Raises:
        UsageError: They don't.
    """
    if not np.isfinite(options.lr) or options.lr <= 0:
        raise UsageError(f"--lr: {options.lr} is no step size; give for example 0.01")
    if not 0 <= options.warmup < total:
        raise UsageError(f"--warmup: {options.warmup} of {total} updates; must leave some to train")
    for name, value in (
        ("patience", options.patience),
        ("checkpoint-every", options.checkpoint_every),
    ):
        if value is not None and value < 1:
            raise UsageError(f"--{name}: {value}; must be at least 1")
    if options.online and options.balance:
        raise UsageError(
            "--balance draws samples again, --online takes each once; give one of them"
        )


def _sampler(options: SessionOptions, data: DataSet, size: int, *, fixed: bool) -> Sampler:
    weights = None
    if options.balance:
        if data.y.ndim != 1 or data.y.dtype.kind != "i":
            raise UsageError("--balance needs one label per sample")
        if fixed and size > 1:
            raise UsageError(
                "--balance draws micro-batches anew, but the plan's replay cache keeps them; plan"
                " again without --replay, or with --batch 1"
            )
        weights = balancing(data.y)
    return Sampler(
        data.count,
        size,
        options.seed,
        shuffled=not options.online,
        fixed=fixed and not options.online,
        weights=weights,
    )
