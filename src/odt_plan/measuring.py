"""``--importance``: scores measured on labelled samples, or read from a file of the user."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from .backends.numpy.data import chosen_of
from .backends.numpy.data_files import load_data
from .backends.numpy.gradients import (
    Gains,
    GradientMethod,
    GradientScores,
    measure_gradients,
)
from .backends.numpy.micro_batches import array_names_of
from .contributions import Source, contributions
from .ir.array_file import array_file
from .ir.calibrate import SYNTHETIC
from .ir.candidates import param_slots
from .ir.channels import best_order, orders_of
from .ir.errors import UsageError
from .ir.freezing import frozen_before, untrainable
from .ir.graph import Array, Graph
from .ir.sample import array_names
from .ir.training import TrainingSpec
from .planner.importance_file import load_table
from .planner.plan import ImportanceTable
from .planner.progress import Watch

Method = Literal["prior", "gradient", "fisher", "magnitude", "contribution"]
METHODS: tuple[Method, ...] = get_args(Method)
#: Those that take one pass of gradients.
GRADIENT_METHODS: tuple[GradientMethod, ...] = get_args(GradientMethod)
#: Measured by it where samples with labels are there and nothing else is asked for.
DEFAULT: GradientMethod = "gradient"
#: Samples that are measured at most, spread evenly over those of the file.
MOST_SAMPLES = 256
#: Array of a file that tells which samples belong together.
GROUP = "group"


@dataclass(frozen=True)
class Wanted:
    """What is asked about importance.

    Attributes:
        importance: ``--importance``: a method or a file; None: measured if there are labels.
        samples: ``--calib``: a file of samples, maybe with labels; None: there is none.
        freeze_before: Nodes before which nothing is updated.
    """

    importance: str | None
    samples: Path | None
    freeze_before: tuple[str, ...] = ()


def has_labels(path: Path | None) -> bool:
    """A file of samples has an array ``y``, or of several outputs such as ``y_scores``.

    Raises:
        UsageError: It can't be read.
    """
    if path is None or path == Path(SYNTHETIC):
        return False
    return any(n == "y" or (n.startswith("y_") and n != "y_val") for n in _held(path))


def _held(path: Path) -> Sequence[str]:
    """Names of the arrays of a file."""
    with array_file(path) as file:
        data = np.load(file, allow_pickle=False)
        return data.files if isinstance(data, np.lib.npyio.NpzFile) else ()


def importance_of(
    source: Source, forward: Graph, spec: TrainingSpec, wanted: Wanted, watch: Watch
) -> ImportanceTable | None:
    """The scores that are asked for; None: the prior.

    Where they are measured, the channels with the best ones come first; a file of scores knows the
    file's order alone.

    Args:
        source: Model file.
        forward: The same, imported.
        spec: The loss.
        wanted: Options.
        watch: Told what goes on.

    Raises:
        UsageError: There are no labels to measure with, they do not fit the model, or a file of
            scores is wrong.
    """
    asked = wanted.importance
    if asked is not None and asked not in METHODS:
        return load_table(Path(asked), forward)
    labelled = has_labels(wanted.samples)
    method = next((m for m in METHODS if m == asked), DEFAULT if labelled else "prior")
    if method == "prior":
        return None
    return _measured(source, forward, spec, wanted, (method,), watch)[method]


def gradient_tables(
    source: Source, forward: Graph, spec: TrainingSpec, wanted: Wanted, watch: Watch
) -> dict[str, ImportanceTable]:
    """The scores of all methods that take one pass of gradients together, by method.

    Raises:
        UsageError: As ``importance_of``.
    """
    return _measured(source, forward, spec, wanted, GRADIENT_METHODS, watch)


def labelled_samples(
    forward: Graph, spec: TrainingSpec, wanted: Wanted
) -> tuple[dict[str, Array], dict[str, Array], Array | None]:
    """Samples, labels or targets, and groups: at most ``MOST_SAMPLES``, evenly spread.

    Groups, the array ``group``, tell which samples belong together: to one recording or person.

    Raises:
        UsageError: There are no labels, or they can't be read.
    """
    if wanted.samples is None or not has_labels(wanted.samples):
        raise UsageError(
            f"--importance {wanted.importance}: needs labelled samples; give --calib FILE.npz with"
            f" {', '.join(array_names(forward.inputs))} and y"
        )
    inputs, targets = array_names_of(forward, spec)
    grouped = GROUP in _held(wanted.samples) and GROUP not in (*inputs, *targets)
    more = (GROUP,) if grouped else ()
    x, y = _some(*load_data(wanted.samples, inputs, (*targets, *more)))
    return x, y, y.pop(GROUP) if grouped else None


def _measured(
    source: Source,
    forward: Graph,
    spec: TrainingSpec,
    wanted: Wanted,
    methods: Sequence[Method],
    watch: Watch,
) -> dict[str, ImportanceTable]:
    frozen = frozen_before(forward, wanted.freeze_before)
    out = {*frozen, *untrainable(forward, frozen)}
    params = [p for p in param_slots(forward) if p not in out]
    x, y, _ = labelled_samples(forward, spec, wanted)
    assert wanted.samples is not None

    def told(done: int, of: int) -> None:
        watch.stage(f"measuring importance: {', '.join(methods)}, sample {done} of {of}")

    try:
        found = measure_gradients(forward, spec, params, x, y, told)
        if methods == ("contribution",):  # which no single channel has
            channels = best_order(forward, found.channels(DEFAULT))
            alone = contributions(source, forward, spec, params, x, y, watch, channels)
            measured = {"contribution": (alone, channels)}
        else:
            measured = {m: _ordered(forward, found, m) for m in GRADIENT_METHODS if m in methods}
    except UsageError as e:
        hint = "" if wanted.importance else "; --importance prior measures nothing"
        raise UsageError(f"{wanted.samples}: {e}{hint}") from None
    digest = hashlib.sha256(wanted.samples.read_bytes()).hexdigest()
    count = len(next(iter(y.values())))
    name = wanted.samples.name
    return {
        m: ImportanceTable(
            method=m, file=name, sha256=digest, samples=count, gains=gains, channels=channels
        )
        for m, (gains, channels) in measured.items()
    }


def _ordered(
    forward: Graph, found: GradientScores, method: GradientMethod
) -> tuple[dict[str, Gains], dict[str, tuple[int, ...]]]:
    """Scores of parts, the channels with the best scores first, and that order."""
    channels = best_order(forward, found.channels(method))
    return found.gains(method, orders_of(forward, channels)), channels


def _some(x: dict[str, Array], y: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """At most ``MOST_SAMPLES``, evenly spread; counts that differ are left for the check."""
    counts = {len(a) if a.ndim else 0 for a in (*x.values(), *y.values())}
    count = min(counts)
    if count <= MOST_SAMPLES or len(counts) > 1:
        return x, y
    chosen = np.linspace(0, count - 1, MOST_SAMPLES).round().astype(int)
    return chosen_of(x, chosen), chosen_of(y, chosen)
