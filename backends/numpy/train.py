"""The training loop of ``odt-plan run``: data in, updates by the plan, learned parameters out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ...ir.errors import OdtPlanError, UsageError
from ...ir.sample import Samples
from .data import checked_samples, checked_targets, chosen_of
from .replay import Replayed
from .runtime import Runtime


@dataclass(frozen=True)
class History:
    """What happened during training.

    Attributes:
        losses: Mean loss of each update that was kept.
        stopped: None when all steps were done; ``not_finite`` when a loss or a parameter became
            NaN or infinite, ``interrupted`` by Ctrl-C. The runtime then holds the state of the last
            good update.
        replayed: Micro-steps that were trained from the replay cache.
    """

    losses: tuple[float, ...]
    stopped: Literal["not_finite", "interrupted"] | None
    replayed: int = 0

    @property
    def message(self) -> str:
        """One line about the end of training."""
        done = len(self.losses)
        if self.stopped == "not_finite":
            return (
                f"stopped: update {done + 1} gave a NaN or infinite value; the state after update"
                f" {done} is kept; try a smaller step size"
            )
        if self.stopped == "interrupted":
            return f"interrupted: the state after update {done} is kept"
        return f"{done} updates done"


def train(
    runtime: Runtime,
    x: Samples,
    y: Samples,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    lr: float,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> History:
    """Train on a data set.

    With replay in the plan, samples stay in the same micro-batches for good, in a new order in each
    pass; as long as the cache has room, each passes the frozen front only once.

    Args:
        runtime: Trains by its plan.
        x: Samples [count, ...], each as the model's input without the batch dimension; of several
            inputs arrays by their names.
        y: Labels [count] or targets [count, ...]; of several outputs arrays by name, see
            ``ir.targets.target_names``.
        steps: Updates to do.
        epochs: Passes over the data instead; a last group that is not full is filled from the start
            of the next pass.
        batch: Samples per update; the plan fixes it (batch x micro-batches), so another number is
            an error. None: take the plan's.
        lr: Step size.
        seed: Of the order of the samples.
        on_step: Called after each update with its number (from 1) and mean loss.

    Raises:
        UsageError: The data do not fit the model, or the numbers contradict each other or the plan.
    """
    size, micro = runtime.plan.model.batch, runtime.training.spec.micro_batches
    group = size * micro
    if batch is not None and batch != group:
        raise UsageError(
            f"an update of this plan takes {group} samples (batch {size} x {micro} micro-batches),"
            f" not {batch}; plan again with --batch or --micro-batches"
        )
    samples = checked_samples(runtime.training, x)
    count = len(next(iter(samples.values())))
    targets = checked_targets(runtime.training, y, count)
    if (steps is None) == (epochs is None):
        raise UsageError("give either steps or epochs")
    if steps is None:
        assert epochs is not None
        steps = -(-epochs * count // group)
    if steps < 1:
        raise UsageError(f"there is nothing to train: {steps} steps")
    replay = runtime.plan.replay
    cache = None if replay is None else Replayed(runtime, replay)
    batches = _batches(count, size, seed, fixed=cache is not None)
    losses: list[float] = []
    good, counted = runtime.state_bytes(), runtime.updates
    stopped: Literal["not_finite", "interrupted"] | None = None
    try:
        while len(losses) < steps and stopped is None:
            total = 0.0
            with np.errstate(all="ignore"):  # what overflows is found and told below
                for _ in range(micro):
                    chosen = next(batches)
                    if cache is None:
                        given = chosen_of(samples, chosen), chosen_of(targets, chosen)
                        total += runtime.train_step(*given, lr)
                    else:
                        total += cache.train(chosen, samples, targets, lr)
            if not (np.isfinite(total) and runtime.is_finite()):
                stopped = "not_finite"
                break
            good, counted = runtime.state_bytes(), runtime.updates
            losses.append(total / micro)
            if on_step is not None:
                on_step(len(losses), losses[-1])
    except KeyboardInterrupt:
        stopped = "interrupted"
    if stopped is not None:
        runtime.load_state(good, updates=counted)
    return History(tuple(losses), stopped, cache.replayed if cache is not None else 0)


def save_learned(runtime: Runtime, path: Path) -> None:
    """Write the updated parameters, real, whole and by their names in the model, as .npz.

    The file appears under its name only when it is complete.

    Raises:
        OdtPlanError: The folder can't be written.
    """
    if path.is_dir():
        raise OdtPlanError(
            f"{path}: can't write the learned parameters: is a folder; give a file name"
        )
    values = runtime.params()
    learned = {u.candidate.param: values[u.candidate.param] for u in runtime.training.updates}
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(suffix=".part", prefix=path.name, dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **learned)  # type: ignore[arg-type]  # (names are parameters, not options)
        os.replace(temporary, path)
        temporary = None
    except OSError as e:
        raise OdtPlanError(f"{path}: can't write the learned parameters: {e.strerror}") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _batches(count: int, size: int, seed: int, *, fixed: bool) -> Iterator[list[int]]:
    """Micro-batches of sample numbers without end, each pass over all samples in a new order.

    Fixed ones are made of the same samples in each pass; the last is filled from the first.
    """
    rng = np.random.default_rng(seed)
    if not fixed or size == 1:
        order = _order(count, rng)
        while True:
            yield [next(order) for _ in range(size)]
    mixed = rng.permutation(count)
    batches = np.resize(mixed, (-(-count // size), size)).tolist()
    for i in _order(len(batches), rng):
        yield batches[i]


def _order(count: int, rng: np.random.Generator) -> Iterator[int]:
    """Numbers without end, each pass shuffled anew."""
    while True:
        yield from rng.permutation(count).tolist()
