"""Data sets and operands from outside: read, validated, converted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from ...ir.errors import UsageError
from ...ir.graph import Array, TensorType, Value
from ...ir.indices import check_indices
from ...ir.opdef import get_op
from ...ir.sample import Samples, by_input, numbers_of, quantizer
from ...ir.targets import bounds_of, by_target, check_bounds
from ...ir.training import TrainingGraph


@dataclass(frozen=True, eq=False)
class DataSet:
    """Samples with their targets, checked against a training graph and in its types.

    Attributes:
        x: Samples by the name of their array, each [count, ...].
        y: Labels i32 [count, ...] or targets f32 [count, ...], by the name of their array.
        anomalous: Of a reconstruction's test, 0 or 1 per sample [count].
        name: What messages call the samples.
    """

    x: dict[str, Array]
    y: dict[str, Array]
    anomalous: Array | None = None
    name: str = "x"

    @property
    def count(self) -> int:
        """Samples."""
        return len(next(iter(self.x.values())))


def data_set(training: TrainingGraph, x: Samples, y: Samples, *, suffix: str = "") -> DataSet:
    """Check a data set and convert it to the types of the plan.

    Args:
        training: The training graph.
        x: Samples [count, ...], each as the model's input without the batch dimension; of several
            inputs arrays by their names.
        y: Labels [count] or targets [count, ...]; of several outputs arrays by name, see
            ``ir.targets.target_names``.
        suffix: Behind the names of arrays in messages, as ``_val``.

    Raises:
        UsageError: The data do not fit the model.
    """
    samples = checked_samples(training, x, suffix)
    first = next(iter(samples))
    targets = checked_targets(training, y, len(samples[first]), suffix)
    return DataSet(samples, targets, name=first + suffix)


def reconstruction_set(
    training: TrainingGraph, x: Samples, anomalous: Array | None = None, *, suffix: str = ""
) -> DataSet:
    """A data set of an autoencoder: each sample is its own target.

    Args:
        training: The training graph; its target is shaped like its only input.
        x: Samples, as in ``data_set``.
        anomalous: Labels of a test, 0 or 1 [count].
        suffix: As in ``data_set``.

    Raises:
        UsageError: The model is no autoencoder, or the data do not fit it.
    """
    if not reconstructs(training):
        raise UsageError(
            "the model is no autoencoder: it has not one target that is like its only input"
        )
    samples = checked_samples(training, x, suffix)
    ((name, stored),) = samples.items()
    y = real_samples(training, samples).reshape(len(stored), *training.target.type.shape[1:])
    if anomalous is not None:
        labels = np.asarray(anomalous)
        if labels.shape != (len(stored),) or not np.isin(labels, (0, 1)).all():
            raise UsageError(
                f"y{suffix} is {labels.dtype}{list(labels.shape)}, must be 0 (normal) or 1 for each"
                f" of {len(stored)} samples"
            )
        anomalous = labels.astype(np.int64)
    return DataSet(samples, {"y": y}, anomalous, name + suffix)


def remarks(data: DataSet, validation: DataSet | None, group: int) -> list[str]:
    """What is odd about data that can be trained on, a line each.

    Args:
        data: To train on.
        validation: To judge by.
        group: Samples per update.
    """
    found = []
    for name, y in labels_of(data).items():
        if len(np.unique(y)) == 1:
            of = "" if len(data.y) == 1 else f" by {name}"
            found.append(f"all samples are of class {y[0]}{of}: nothing can be told apart")
    if data.count < group:
        found.append(
            f"there are {data.count} samples, and an update takes {group}: some count several times"
        )
    if validation is not None:
        seen = set(_fingerprints(data))
        same = sum(f in seen for f in _fingerprints(validation))
        if same:
            found.append(
                f"{same} of {validation.count} samples to validate by are also trained on, so the"
                " result looks better than it is"
            )
    return found


def labels_of(data: DataSet) -> dict[str, Array]:
    """The targets that are one label per sample."""
    return {name: y for name, y in data.y.items() if y.ndim == 1 and y.dtype.kind == "i"}


def _fingerprints(data: DataSet) -> Iterator[bytes]:
    """A digest of each sample."""
    for i in range(data.count):
        parts = b"".join(np.ascontiguousarray(a[i]).tobytes() for a in data.x.values())
        yield hashlib.blake2b(parts, digest_size=16).digest()


def reconstructs(training: TrainingGraph) -> bool:
    """Whether a sample can be its own target, as those of an autoencoder are."""
    target = training.target.type
    alike = target.dtype == "f32" and target.size == training.sample.type.size
    return len(training.samples) == len(training.targets) == 1 and alike


def real_samples(training: TrainingGraph, x: Mapping[str, Array]) -> Array:
    """Stored samples of the only input in real numbers."""
    (stored,) = x.values()
    quant = training.sample.type.quant
    return stored if quant is None else quant.dequantize(stored)


def fitted(data: ArrayLike, t: TensorType, what: str) -> Array:
    """An array of the wanted type; numbers are converted if that keeps their meaning.

    Args:
        data: Anything that NumPy takes for an array of numbers.
        t: Wanted type; the shape must agree already.
        what: Subject of the message.

    Raises:
        UsageError: Wrong shape, or not numbers of the wanted kind.
    """
    array = np.asarray(data)
    kinds = "iu" if t.dtype.startswith(("i", "u")) else "iuf"
    if array.shape != t.storage_shape or array.dtype.kind not in kinds:
        raise UsageError(f"{what} is {array.dtype}{list(array.shape)}, the plan needs {t}")
    with np.errstate(over="ignore"):  # too large for f32 becomes infinite
        converted = array.astype(t.np_dtype)
    if t.dtype.startswith(("i", "u")) and not np.array_equal(converted, array):
        raise UsageError(f"{what} has values that {t.dtype} can't hold")
    return converted


def stored_sample(data: ArrayLike, t: TensorType, what: str) -> Array:
    """Samples of a run-time input in its dtype.

    An i8 input takes int8 as it is, the stored values, and floats as real numbers, which it
    quantizes: to nearest, ties to even, saturated. Other integers could be meant either way.

    Args:
        data: Samples of the shape of ``t``.
        t: Type of the input, any batch.
        what: Subject of the message.

    Raises:
        UsageError: Wrong shape, wrong kind of numbers, or NaN or infinite where an i8 input would
            hide it.
    """
    array, quantize = np.asarray(data), quantizer(t)
    if quantize is None or array.dtype == np.int8 or array.shape != t.storage_shape:
        return fitted(array, t, what)
    if array.dtype.kind != "f":
        raise UsageError(
            f"{what} is {array.dtype}, the plan needs {t}: give int8 as it is stored, or floats,"
            " which are quantized"
        )
    real = _f32(array)
    if not np.isfinite(real).all():
        raise UsageError(f"{what} has a NaN or infinite value")
    return get_op(quantize.op).kernel(quantize, [real])[0]


def checked_samples(training: TrainingGraph, x: Samples, suffix: str = "") -> dict[str, Array]:
    """The samples of a data set, each array [count, ...] in the dtype of its input.

    Args:
        training: The training graph.
        x: Arrays by name, or that of the only input.
        suffix: Behind the names of arrays in messages.

    Raises:
        UsageError: Not numbers, another shape than the model's, none at all, other counts, or not
            finite; integers other than int8 for an i8 input; indices outside of their table.
    """
    result: dict[str, Array] = {}
    for name, v, given in by_input(training.samples, x):
        given = numbers_of(training.graph, v, given)
        result[name] = _checked(training, name + suffix, v, given)
        first = next(iter(result))
        if len(result[name]) != len(result[first]):
            raise UsageError(
                f"{name}{suffix} has {len(result[name])} samples, but {first}{suffix} has"
                f" {len(result[first])}"
            )
    return result


def _checked(training: TrainingGraph, name: str, value: Value, x: Array) -> Array:
    kind = value.type
    want = kind.shape[1:]
    if x.ndim < 1 or x.shape[1:] != want or x.dtype.kind not in "iuf":
        raise UsageError(
            f"{name} is {x.dtype}{list(x.shape)}, must be numbers"
            f" [count, {', '.join(map(str, want))}]"
        )
    if len(x) == 0:
        raise UsageError(f"{name} has no samples")
    if x.dtype.kind == "f" or kind.dtype == "f32":
        x = _f32(x)
        bad = _first_bad(x)
        if bad is not None:
            raise UsageError(f"{name}: sample {bad} has a NaN or infinite value")
    stored = stored_sample(x, replace(kind, shape=(len(x), *want)), name)
    check_indices(training.graph, value, stored, name)
    return stored


def chosen_of(x: Mapping[str, Array], chosen: Sequence[int] | slice | Array) -> dict[str, Array]:
    """Some samples of all arrays."""
    return {name: a[chosen] for name, a in x.items()}


def checked_targets(
    training: TrainingGraph, y: Samples, count: int, suffix: str = ""
) -> dict[str, Array]:
    """The targets of a data set, each array labels i32 or numbers f32 [count, ...].

    Args:
        training: The training graph.
        y: Arrays by name, see ``ir.targets.target_names``, or that of the only target.
        count: Samples.
        suffix: Behind the names of arrays in messages.

    Raises:
        UsageError: Wrong kind, shape or count, out of range, or not finite.
    """
    return {
        name: _checked_target(training, name, suffix, v, np.asarray(given), count)
        for name, v, given in by_target(training, y)
    }


def _checked_target(
    training: TrainingGraph, name: str, suffix: str, value: Value, y: Array, count: int
) -> Array:
    what = f"{name}{suffix}"
    if y.ndim < 1 or len(y) != count:
        raise UsageError(f"{what} has shape {list(y.shape)}, but x{suffix} has {count} samples")
    want = value.type.shape[1:]
    labels = value.type.dtype == "i32"
    if y.shape[1:] != want or y.dtype.kind not in ("iu" if labels else "iuf"):
        kind = "integer labels" if labels else "numbers"
        shape = ", ".join(map(str, (count, *want)))
        raise UsageError(f"{what} is {y.dtype}{list(y.shape)}, must be {kind} [{shape}]")
    if not labels:
        y = _f32(y)
        bad = _first_bad(y)
        if bad is not None:
            raise UsageError(f"{what} has a NaN or infinite value, first in sample {bad}")
    y = fitted(y, replace(value.type, shape=y.shape), what)
    check_bounds(y, bounds_of(training.graph, value), what)
    return y


def _first_bad(a: Array) -> int | None:
    """The first sample with a NaN or infinite value."""
    if np.isfinite(a).all():
        return None
    return int(np.flatnonzero(~np.isfinite(a.reshape(len(a), -1)).all(axis=1))[0])


def _f32(a: Array) -> Array:
    with np.errstate(over="ignore"):  # too large for f32 becomes infinite, which callers refuse
        return a.astype(np.float32)
