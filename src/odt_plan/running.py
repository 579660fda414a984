"""What ``odt-plan run PLAN.json`` does: train by the NumPy runtime inside the plan's arena."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from .backends.c import clips, decays, session_file
from .backends.numpy import (
    DataFile,
    DataSet,
    Epoch,
    Evaluation,
    History,
    Normalization,
    Runtime,
    SessionOptions,
    clipped_by,
    metric_of,
    read_data,
    remarks,
    save_learned,
    train_session,
)
from .ir.errors import OdtPlanError, UsageError
from .ir.sample import array_names
from .ir.targets import target_names
from .ir.training import TrainingGraph
from .ir.whole_file import whole_file
from .planner.check import check
from .planner.plan import Plan, load_plan
from .planner.rebuild import rebuild
from .planner.sizes import format_bytes
from .planning import device_of_plan
from .report import console
from .run_progress import Shown, described

#: Updates where no amount is given.
DEFAULT_STEPS = 200
#: Losses averaged at both ends of a run.
_ENDS = 10


@dataclass(frozen=True)
class RunOptions:
    """The options of ``odt-plan run``; see its ``--help``."""

    plan_file: Path
    data: Path
    val: Path | None
    mean: str | None
    std: str | None
    session: SessionOptions
    exact: bool
    model: Path | None
    device: str | None
    save: Path | None
    c_session: Path | None
    as_json: bool
    quiet: bool


def run_training(options: RunOptions) -> dict[str, object]:
    """Check the plan, train, tell what happened.

    Returns:
        What ``--json`` prints: losses, epochs, why training stopped, scores before and after; of
        ``--c-session`` what was written.

    Raises:
        OdtPlanError: The plan, its model, the device or the data are wrong, or the result can't be
            written.
    """
    session = options.session
    plan = load_plan(options.plan_file)
    training = rebuild(plan, options.plan_file, options.model)
    check(plan, training, device_of_plan(options.plan_file, plan.device.id, options.device))
    data, held_out, file = _read(options, training)
    for path in (options.save, options.c_session, session.checkpoint):  # before hours of training
        if path is not None and not path.parent.is_dir():
            raise OdtPlanError(f"{path}: can't write: {path.parent} is no folder")
    if session.steps is None and session.epochs is None and not session.online:
        session = replace(session, steps=DEFAULT_STEPS)
    if options.c_session is not None:
        return _write_session(options, plan, training, data, session, held_out)
    runtime = Runtime(plan, training, exact=options.exact)
    silent = options.quiet or options.as_json
    tell = _teller(silent)
    tell(
        f"arena {format_bytes(runtime.arena_nbytes)}, state {format_bytes(runtime.state_nbytes)},"
        f" {len(plan.steps)} steps per micro-batch: as planned"
    )
    tell(
        "steps have the emitted C's results, bit for bit"
        if options.exact
        else f"sums in the host's order, scratch {format_bytes(runtime.scratch_nbytes)} beside;"
        " --exact has the device's bits"
    )
    if file.classes:
        tell(f"classes   {', '.join(f'{i} {name}' for i, name in enumerate(file.classes))}")
    if not file.has(target_names(training)):
        tell(f"{options.data} has no y: each sample is its own target")
    clipped = None if session.clip is None else clipped_by(plan, training)
    if clipped is not None:
        tell(f"clipping  {_CLIPPED[clipped]}")
        if not clips(plan, training):
            tell("the emitted C can't clip by this plan: what it learns will differ")
    if session.weight_decay and not decays(plan, training):
        tell("the emitted C can't decay by this plan: what it learns will differ")
    with Shown(notes=not options.quiet, progress=not silent) as shown:
        group = plan.model.batch * training.spec.micro_batches
        for note in (*file.notes, *remarks(data, held_out, group)):
            shown.noted(note)
        history = train_session(runtime, data, session, validation=held_out, listener=shown)
    name = "x_val" if options.val is None else str(options.val)
    for line in _report(plan, history, name):
        tell(line)
    if options.save is not None:
        save_learned(runtime, options.save)
        tell(f"learned parameters written to {options.save}")
    return {
        "updates": len(history.losses),
        "losses": list(history.losses),
        "stopped": history.stopped,
        "replayed": history.replayed,
        "halvings": history.halvings,
        "left_over": history.leftover,
        "clipped_by": clipped,
        "epochs": [_epoch(e) for e in history.epochs],
        "kept_epoch": history.kept,
        "rolled_back": history.rolled_back,
        "metric": None if history.before is None else history.before.metric,
        "before": _value(history.before),
        "after": _value(history.after),
        "accuracy_before": _accuracy(history.before),
        "accuracy_after": _accuracy(history.after),
        "classes": list(file.classes),
        "arena_bytes": runtime.arena_nbytes,
        "state_bytes": runtime.state_nbytes,
        "scratch_bytes": runtime.scratch_nbytes,
    }


def _write_session(
    options: RunOptions,
    plan: Plan,
    training: TrainingGraph,
    data: DataSet,
    session: SessionOptions,
    held_out: DataSet | None,
) -> dict[str, object]:
    """What the host program of the emitted C does the session from."""
    path = options.c_session
    assert path is not None
    if options.save is not None:
        raise UsageError("--c-session trains nothing that --save could write; give one of them")
    content = session_file(plan, training, data, session, held_out)
    try:
        with whole_file(path) as file:
            file.write(content)
    except OSError as e:
        raise OdtPlanError(f"{path}: can't write the session: {e.strerror or e}") from None
    judged = 0 if held_out is None else held_out.count
    tell = _teller(options.quiet or options.as_json)
    tell(
        f"session of {data.count} samples, {judged} to judge by, written to {path}:"
        f" {format_bytes(len(content))}"
    )
    return {"file": str(path), "bytes": len(content), "samples": data.count, "judged": judged}


_CLIPPED = {
    "global": "by the norm of all gradients, which are whole before the first weight changes",
    "tensor": "each tensor by its own norm: weights change before all gradients are there",
}


def _read(options: RunOptions, training: TrainingGraph) -> tuple[DataSet, DataSet | None, DataFile]:
    """What to train on, what to judge by, and the file of the first."""
    normalization = _normalization(options.mean, options.std)
    file = read_data(options.data, training, normalization)
    data = file.data(training)
    anomalies = (options.session.metric or metric_of(training)) == "auc"
    judged = None
    if options.val is not None:
        other = read_data(options.val, training, normalization, file.classes)
        judged = other.data(training, anomalies=anomalies)
        judged = replace(judged, name=str(options.val))
    elif file.has([f"{name}_val" for name in array_names(training.samples)]):
        judged = file.data(training, "_val", anomalies=anomalies)
    if judged is None:
        for name, value in (
            ("--patience", options.session.patience),
            ("--metric", options.session.metric),
        ):
            if value is not None:
                raise UsageError(f"{name} needs samples to validate by; give --val, or x_val")
    return data, judged, file


def _normalization(mean: str | None, std: str | None) -> Normalization | None:
    if mean is None and std is None:
        return None
    numbers: dict[str, tuple[float, ...]] = {"mean": (0.0,), "std": (1.0,)}
    for name, text in (("mean", mean), ("std", std)):
        if text is None:
            continue
        try:
            numbers[name] = tuple(float(part) for part in text.split(","))
        except ValueError:
            raise UsageError(f"--{name}: {text!r} is no list of numbers, as 0.5,0.5,0.5") from None
        if not np.isfinite(numbers[name]).all() or (name == "std" and min(numbers[name]) <= 0):
            raise UsageError(f"--{name}: {text} must be finite{', and above 0' * (name == 'std')}")
    return Normalization(**numbers)


def _teller(silent: bool) -> Callable[[str], None]:
    """Prints lines on standard output, unless nothing shall be told."""
    out = console()
    return lambda text: None if silent else out.print(text, soft_wrap=True, markup=False)


def _report(plan: Plan, history: History, held_out: str) -> list[str]:
    """What happened, a line each."""
    losses = history.losses
    ends = f"; mean loss {np.mean(losses[:_ENDS]):.4f} -> {np.mean(losses[-_ENDS:]):.4f}"
    lines = [history.message + (ends if len(losses) > _ENDS else "")]
    if history.leftover:
        lines.append(f"left over: {history.leftover} samples that make no whole update")
    if plan.replay is not None:
        lines.append(
            f"replayed: {history.replayed:,} micro-steps without the first {plan.replay.front} of"
            f" {len(plan.steps)} steps"
        )
    before, trained = history.before, history.best
    if before is not None and trained is not None:
        kept = f", of epoch {history.kept}, which is kept"
        if history.rolled_back:
            kept = ", which is worse: rolled back to the state before training"
        old, new = (described(found.metric, found.value) for found in (before, trained))
        lines.append(f"{before.metric} on {held_out}: {old} -> {new}{kept}")
        for a, b in zip(before.scores, trained.scores, strict=True):
            old, new = (described(score.metric, score.value) for score in (a, b))
            lines.append(f"{a.metric} of {a.output} on {held_out}: {old} -> {new}")
    return lines


def _epoch(epoch: Epoch) -> dict[str, object]:
    found = epoch.validation
    judged: dict[str, object] | None = None
    if found is not None:
        judged = {found.metric: _value(found), "loss": _finite(found.loss)}
        if found.scores:
            judged["outputs"] = {s.output: {s.metric: _finite(s.value)} for s in found.scores}
    return {**asdict(epoch), "validation": judged}


def _value(found: Evaluation | None) -> float | None:
    return None if found is None else _finite(found.value)


def _accuracy(found: Evaluation | None) -> dict[str, float | None] | float | None:
    """Where accuracy was judged; of several outputs by their names."""
    if found is None or not found.scores:
        return _value(found) if found is not None and found.metric == "accuracy" else None
    of = {s.output: _finite(s.value) for s in found.scores if s.metric == "accuracy"}
    return of or None


def _finite(value: float) -> float | None:
    """The number; JSON has none that is not finite."""
    return value if np.isfinite(value) else None
