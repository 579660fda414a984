"""What ``odt-plan run PLAN.json`` does: train by the NumPy runtime inside the plan's arena."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .backends.numpy import (
    History,
    Runtime,
    chosen_of,
    load_data,
    save_learned,
    train,
)
from .ir.array_file import array_file
from .ir.errors import OdtPlanError, UsageError
from .ir.graph import Array
from .ir.sample import array_names
from .ir.targets import target_names
from .ir.training import TrainingGraph
from .planner.check import check
from .planner.plan import load_plan
from .planner.rebuild import rebuild
from .planner.sizes import format_bytes
from .planning import device_of_plan
from .report import console

#: At most this many samples are scored before and after training.
SCORED_SAMPLES = 500
#: Losses averaged at both ends of a run.
_ENDS = 10
#: Steps between two lines of progress.
_EVERY = 50


@dataclass(frozen=True)
class RunOptions:
    """The options of ``odt-plan run``; see its ``--help``."""

    plan_file: Path
    data: Path
    steps: int | None
    epochs: int | None
    lr: float
    seed: int
    model: Path | None
    device: str | None
    save: Path | None
    as_json: bool
    quiet: bool


def run_training(options: RunOptions) -> dict[str, object]:
    """Check the plan, train, tell what happened.

    Returns:
        What ``--json`` prints: losses, why training stopped, scores before and after.

    Raises:
        OdtPlanError: The plan, its model, the device or the data are wrong, or the result can't be
            written.
    """
    plan = load_plan(options.plan_file)
    training = rebuild(plan, options.plan_file, options.model)
    check(plan, training, device_of_plan(options.plan_file, plan.device.id, options.device))
    names = array_names(training.samples)
    targets = target_names(training)
    x, y = load_data(options.data, names, targets)
    if not np.isfinite(options.lr) or options.lr <= 0:
        raise UsageError(f"--lr: {options.lr} is no step size; give for example 0.01")
    if options.save is not None and not options.save.parent.is_dir():  # before hours of training
        raise OdtPlanError(f"{options.save}: can't write: {options.save.parent} is no folder")
    steps = options.steps
    if steps is None and options.epochs is None:
        steps = 200
    runtime = Runtime(plan, training)
    told = _Told(options.quiet or options.as_json)
    told.line(
        f"arena {format_bytes(runtime.arena_nbytes)}, state {format_bytes(runtime.state_nbytes)},"
        f" {len(plan.steps)} steps per micro-batch: as planned"
    )
    scored = _held_out(options.data, names, targets, training)
    before = _accuracy(runtime, *scored) if scored else None
    history = train(
        runtime,
        x,
        y,
        steps=steps,
        epochs=options.epochs,
        lr=options.lr,
        seed=options.seed,
        on_step=told.progress,
    )
    after = _accuracy(runtime, *scored) if scored else None
    told.line(_summary(history))
    if plan.replay is not None:
        told.line(
            f"replayed: {history.replayed:,} micro-steps without the first {plan.replay.front} of"
            f" {len(plan.steps)} steps"
        )
    if before is not None and after is not None:
        for name, share in before.items():
            of = "" if len(targets) == 1 else f" of {name}"
            told.line(f"accuracy{of} on x_val: {share:.1%} -> {after[name]:.1%}")
    if options.save is not None:
        save_learned(runtime, options.save)
        told.line(f"learned parameters written to {options.save}")
    return {
        "updates": len(history.losses),
        "losses": list(history.losses),
        "stopped": history.stopped,
        "replayed": history.replayed,
        "accuracy_before": _plain(before, targets),
        "accuracy_after": _plain(after, targets),
        "arena_bytes": runtime.arena_nbytes,
        "state_bytes": runtime.state_nbytes,
    }


class _Told:
    """Lines on standard output, unless nothing shall be told."""

    def __init__(self, silent: bool) -> None:
        self._out = console()
        self._silent = silent

    def line(self, text: str) -> None:
        if not self._silent:
            self._out.print(text, soft_wrap=True, markup=False)

    @property
    def progress(self) -> Callable[[int, float], None]:
        """Tells the loss now and then."""

        def tell(step: int, loss: float) -> None:
            if step == 1 or step % _EVERY == 0:
                self.line(f"update {step:5}  loss {loss:.4f}")

        return tell


def _summary(history: History) -> str:
    losses = history.losses
    ends = f"; mean loss {np.mean(losses[:_ENDS]):.4f} -> {np.mean(losses[-_ENDS:]):.4f}"
    return history.message + (ends if len(losses) > _ENDS else "")


def _held_out(
    path: Path, names: tuple[str, ...], targets: tuple[str, ...], training: TrainingGraph
) -> tuple[dict[str, Array], dict[str, Array]] | None:
    """``x_val`` and ``y_val`` (integer labels) of the data file, where it has them.

    Of several outputs those that are trained by labels.
    """
    pairs = zip(targets, training.predictions, training.targets, strict=True)
    labels = {
        name: v.name for name, v, t in pairs if t.type.dtype == "i32" or len(targets) == 1
    }
    with array_file(path) as file:
        data = np.load(file, allow_pickle=False)
        labels = {name: v for name, v in labels.items() if f"{name}_val" in data}
        if not labels or not all(f"{name}_val" in data for name in names):
            return None
        x = {name: data[f"{name}_val"][:SCORED_SAMPLES] for name in names}
        scored = {v: data[f"{name}_val"][:SCORED_SAMPLES] for name, v in labels.items()}
    for name, v in labels.items():
        y = scored[v]
        if y.ndim != 1 or y.dtype.kind not in "iu" or any(len(a) != len(y) for a in x.values()):
            held = ", ".join(f"{n}_val" for n in names)
            raise UsageError(f"{path}: {name}_val must be one integer label per sample of {held}")
    return x, scored


def _accuracy(runtime: Runtime, x: dict[str, Array], y: dict[str, Array]) -> dict[str, float]:
    """Of each output the share of samples whose most likely class is the label.

    Incomplete batches are left out.
    """
    size, count = runtime.plan.model.batch, len(next(iter(y.values())))
    full = count // size * size
    if not full:
        raise UsageError(f"x_val has {count} samples, fewer than a batch of {size}")
    hits: dict[str, list[Array]] = {name: [] for name in y}
    for i in range(0, full, size):
        found = runtime.predict(chosen_of(x, slice(i, i + size)))
        for name, labels in y.items():
            hits[name].append(np.argmax(found[name], axis=-1) == labels[i : i + size])
    return {name: float(np.mean(each)) for name, each in hits.items()}


def _plain(
    shares: dict[str, float] | None, targets: tuple[str, ...]
) -> dict[str, float] | float | None:
    """The number of a model of one output."""
    if shares is None or len(targets) > 1:
        return shares
    return next(iter(shares.values()))
