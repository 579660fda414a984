"""A training session: updates by the plan, judged on a validation set, kept where they are good."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...ir.errors import UsageError
from ...planner.plan import Plan
from .checkpoint import Checkpoint, belonging, resume_from, write_checkpoint
from .data import DataSet, chosen_of, labels_of
from .history import Epoch, History, Stop
from .metrics import Evaluation, check_metric, evaluate, metric_of
from .replay import Replayed
from .runtime import Runtime
from .sampling import Sampler, balancing
from .schedule import Schedule
from .session_options import Listener, SessionOptions, Silent
from .standing import Judged, Standing


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
        self.total = updates_of(options, data.count, self.group)
        self.metric = options.metric or metric_of(training)
        options.regularization.check(training)
        if validation is not None:
            check_metric(training, self.metric, validation)
        self.cache = None if plan.replay is None else Replayed(runtime, plan.replay)
        self.sampler = sampler_of(options, data, plan)
        self.schedule = Schedule(options.schedule, options.lr, self.total, options.warmup)
        self.first = runtime.snapshot()
        self.good = Standing(self.first)
        self.judged = Judged(self.good)
        self.losses: list[float] = []
        self.earlier = 0  # micro-steps that an interrupted session had replayed
        self.written: tuple[Standing, Judged] | None = None
        self.belongs: dict[str, Any] = {}
        if options.checkpoint is not None or options.resume is not None:
            self.belongs = belonging(runtime, data, validation, self._shared())
        if options.resume is not None:
            self._resume(options.resume)

    def run(self) -> History:
        before = self.runtime.regularization
        self.runtime.regularization = self.options.regularization
        stopped: Stop | None = None
        try:
            while stopped is None:
                if self.validation is not None and not self.judged.epochs:
                    self._end_epoch(Epoch(0, 0, None, None, self._judge()))
                elif self._epoch_due():
                    stopped = self._end_epoch(self._epoch())
                elif self.good.position < self.total:
                    stopped = self._advance()
                else:
                    break
        except KeyboardInterrupt:
            stopped = "interrupted"
        finally:
            self.runtime.regularization = before
        self._write()
        self.runtime.restore(self.good.state)
        return History(
            tuple(self.losses[: self.good.losses]),
            stopped,
            self.good.replayed,
            self.judged.epochs,
            self._keep_best(),
            self.good.halved,
            self.data.count - self.total * self.group if self.options.online else 0,
        )

    def _advance(self) -> Stop | None:
        """One update."""
        good, every = self.good, self.options.checkpoint_every
        loss = self._update(good.position, self._rate(good.position))
        if not (np.isfinite(loss) and self.runtime.is_finite()):
            return self._went_wrong()
        del self.losses[good.losses :]
        self.losses.append(loss)
        self.good = replace(
            good,
            state=self.runtime.snapshot(),
            position=good.position + 1,
            losses=good.losses + 1,
            replayed=0 if self.cache is None else self.earlier + self.cache.replayed,
        )
        self.listener.updated(self.good.position, self.total, loss)
        if every is not None and self.good.position % every == 0:
            self._write()
        return None

    def _update(self, at: int, lr: float) -> float:
        """Mean loss of the micro-batches of one update."""
        total = 0.0
        with np.errstate(all="ignore"):  # what overflows is found and told by the caller
            for number in range(at * self.micro, (at + 1) * self.micro):
                chosen = self.sampler.batch(number)
                if self.cache is None:
                    x, y = chosen_of(self.data.x, chosen), chosen_of(self.data.y, chosen)
                    total += self.runtime.train_step(x, y, lr)
                else:
                    total += self.cache.train(chosen, self.data.x, self.data.y, lr)
        return total / self.micro

    def _rate(self, at: int) -> float:
        return self.schedule.rate(at) * 0.5**self.good.halved

    def _went_wrong(self) -> Stop | None:
        """Go back to the start of the epoch with half the step size, or stop.

        Online no sample comes a second time: then on from the last good state with the next one.
        """
        good = self.good
        if good.halved == self.options.halvings:
            return "not_finite"
        back = self.judged.milestone
        if self.options.online:
            back = replace(good, position=good.position + 1)
        self.good = replace(back, halved=good.halved + 1)
        self.runtime.restore(self.good.state)
        self.listener.noted(
            f"update {good.losses + 1} gave a NaN or infinite value; on from update"
            f" {self.good.losses} at 1/{2**self.good.halved} of the step size"
        )
        return None

    # ---- epochs

    def _epoch_due(self) -> bool:
        """Whether an end of an epoch was reached, and not judged yet."""
        at = self.good.position
        if at <= self.judged.milestone.position:
            return False
        passes = at * self.group // self.data.count
        before = (at - 1) * self.group // self.data.count
        return at >= self.total or passes > before

    def _epoch(self) -> Epoch:
        good, judged = self.good, self.judged
        since = self.losses[judged.milestone.losses : good.losses]
        return Epoch(
            1 + sum(e.number > 0 for e in judged.epochs),
            good.losses,
            float(np.mean(since)) if since else None,
            self._rate(good.position - 1),
            self._judge(),
        )

    def _end_epoch(self, epoch: Epoch) -> Stop | None:
        self.judged = self.judged.with_epoch(epoch, self.good)
        self.listener.ended(epoch)
        self._write()
        patience = self.options.patience
        if patience is None or self.judged.since_best < patience:
            return None
        return "patience"

    def _judge(self) -> Evaluation | None:
        if self.validation is None:
            return None
        return evaluate(self.runtime, self.validation, self.metric)

    def _keep_best(self) -> int | None:
        """Load the best state that was judged; that before training if all others are worse."""
        if self.judged.best is None:
            return None
        epoch, state = self.judged.best
        first, best = self.judged.epochs[0].validation, epoch.validation
        assert first is not None
        assert best is not None
        if best.worse_than(first):
            self.runtime.restore(self.first)
            return 0
        self.runtime.restore(state)
        return epoch.number

    # ---- checkpoints

    def _shared(self) -> dict[str, Any]:
        """Options that a resumed session has to share for the same bits."""
        o = self.options
        return {
            "--exact": self.runtime.exact,
            "--lr": o.lr,
            "--seed": o.seed,
            "--online": o.online,
            "--schedule": o.schedule,
            "--warmup": o.warmup,
            "--weight-decay": o.weight_decay,
            "--clip": o.clip,
            "--balance": o.balance,
            "--metric": self.metric,
        }

    def _write(self) -> None:
        path, now = self.options.checkpoint, (self.good, self.judged)
        if path is None or self.written == now:
            return
        losses = tuple(self.losses[: self.good.losses])
        write_checkpoint(path, Checkpoint(self.belongs, self.first, *now, losses))
        self.written = now

    def _resume(self, path: Path) -> None:
        found = resume_from(path, self.belongs, self.listener.noted)
        self.runtime.restore(found.good.state)
        self.first, self.good, self.judged = found.first, found.good, found.judged
        self.losses = list(found.losses)
        self.earlier = found.good.replayed


def updates_of(options: SessionOptions, count: int, group: int) -> int:
    """Updates of a run.

    Raises:
        UsageError: Not exactly one amount is given, there is nothing to do, or it is all warm-up.
    """
    given = [options.steps is not None, options.epochs is not None, options.online]
    if sum(given) != 1:
        raise UsageError("give either steps or epochs, or train online, in one pass")
    if options.online:
        if count < group:
            raise UsageError(
                f"there is nothing to train: an update takes {group} samples, the data have {count}"
            )
        steps = count // group
    elif options.epochs is not None:
        steps = -(-options.epochs * count // group)
    else:
        assert options.steps is not None
        steps = options.steps
    if steps < 1:
        raise UsageError(f"there is nothing to train: {steps} steps")
    if options.warmup >= steps:
        raise UsageError(f"--warmup: {options.warmup} of {steps} updates; must leave some to train")
    return steps


def sampler_of(options: SessionOptions, data: DataSet, plan: Plan) -> Sampler:
    """Which samples the micro-batches of a run hold.

    Raises:
        UsageError: ``--balance`` is asked of data or a plan that it does not suit.
    """
    weights, size, fixed = None, plan.model.batch, plan.replay is not None
    if options.balance:
        labels = labels_of(data)
        if len(labels) != 1:
            held = f", not those of {' and '.join(labels)}" if labels else ""
            raise UsageError(f"--balance needs one label per sample{held}")
        if fixed and size > 1:
            raise UsageError(
                "--balance draws micro-batches anew, but the plan's replay cache keeps them; plan"
                " again without --replay, or with --batch 1"
            )
        weights = balancing(*labels.values())
    return Sampler(
        data.count,
        size,
        options.seed,
        shuffled=not options.online,
        fixed=fixed and not options.online,
        weights=weights,
    )
