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
    exact: bool
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
    x, y = load_data(options.data, names)
    if not np.isfinite(options.lr) or options.lr <= 0:
        raise UsageError(f"--lr: {options.lr} is no step size; give for example 0.01")
    if options.save is not None and not options.save.parent.is_dir():  # before hours of training
        raise OdtPlanError(f"{options.save}: can't write: {options.save.parent} is no folder")
    steps = options.steps
    if steps is None and options.epochs is None:
        steps = 200
    runtime = Runtime(plan, training, exact=options.exact)
    told = _Told(options.quiet or options.as_json)
    told.line(
        f"arena {format_bytes(runtime.arena_nbytes)}, state {format_bytes(runtime.state_nbytes)},"
        f" {len(plan.steps)} steps per micro-batch: as planned"
    )
    told.line(
        "results are the emitted C's bit for bit"
        if options.exact
        else f"sums in the host's order, scratch {format_bytes(runtime.scratch_nbytes)} beside;"
        " --exact has the device's bits"
    )
    scored = _held_out(options.data, names)
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
        told.line(f"accuracy on x_val: {before:.1%} -> {after:.1%}")
    if options.save is not None:
        save_learned(runtime, options.save)
        told.line(f"learned parameters written to {options.save}")
    return {
        "updates": len(history.losses),
        "losses": list(history.losses),
        "stopped": history.stopped,
        "replayed": history.replayed,
        "accuracy_before": before,
        "accuracy_after": after,
        "arena_bytes": runtime.arena_nbytes,
        "state_bytes": runtime.state_nbytes,
        "scratch_bytes": runtime.scratch_nbytes,
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


def _held_out(path: Path, names: tuple[str, ...]) -> tuple[dict[str, Array], Array] | None:
    """``x_val`` and ``y_val`` (integer labels) of the data file, where it has them."""
    with array_file(path) as file:
        data = np.load(file, allow_pickle=False)
        if not all(f"{name}_val" in data for name in (*names, "y")):
            return None
        x = {name: data[f"{name}_val"][:SCORED_SAMPLES] for name in names}
        y = data["y_val"][:SCORED_SAMPLES]
    if y.ndim != 1 or y.dtype.kind not in "iu" or any(len(a) != len(y) for a in x.values()):
        held = ", ".join(f"{name}_val" for name in names)
        raise UsageError(f"{path}: y_val must be one integer label per sample of {held}")
    return x, y


def _accuracy(runtime: Runtime, x: dict[str, Array], y: Array) -> float:
    """Share of samples whose most likely class is the label; incomplete batches are left out."""
    size = runtime.plan.model.batch
    full = len(y) // size * size
    if not full:
        raise UsageError(f"x_val has {len(y)} samples, fewer than a batch of {size}")
    batches = [slice(i, i + size) for i in range(0, full, size)]
    hits = [np.argmax(runtime.infer(chosen_of(x, b)), axis=-1) == y[b] for b in batches]
    return float(np.mean(hits))
