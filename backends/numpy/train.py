"""Training in one call, and the file of what was learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...ir.array_file import write_arrays
from ...ir.errors import OdtPlanError, UsageError
from ...ir.sample import Samples
from ...ir.whole_file import whole_file
from .data import data_set
from .history import History
from .runtime import Runtime
from .session import train_session
from .session_options import SessionOptions, Silent


class _OnStep(Silent):
    """Tells a function about each update."""

    def __init__(self, on_step: Callable[[int, float], None]) -> None:
        self._on_step = on_step

    def updated(self, done: int, total: int, loss: float) -> None:
        self._on_step(done, loss)


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
    listener = None if on_step is None else _OnStep(on_step)
    options = SessionOptions(lr=lr, steps=steps, epochs=epochs, seed=seed)
    return train_session(runtime, data_set(runtime.training, x, y), options, listener=listener)


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
    try:
        with whole_file(path) as file:
            write_arrays(file, learned)
    except OSError as e:
        raise OdtPlanError(f"{path}: can't write the learned parameters: {e.strerror}") from None
