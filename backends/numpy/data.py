"""Data sets and operands from outside: read, validated, converted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ...ir.array_file import array_file
from ...ir.errors import UsageError
from ...ir.graph import Array, TensorType, Value
from ...ir.indices import check_indices
from ...ir.opdef import get_op
from ...ir.sample import Samples, by_input, quantizer
from ...ir.targets import bounds_of, by_target, check_bounds
from ...ir.training import TrainingGraph


def load_data(
    path: Path, inputs: Sequence[str] = ("x",), targets: Sequence[str] = ("y",)
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Read samples and targets of an .npz file.

    Args:
        path: The file.
        inputs: Names of the arrays of samples; see ``ir.sample.array_names``.
        targets: Names of the arrays of targets; see ``ir.targets.target_names``.

    Raises:
        UsageError: Unreadable, not an .npz file, or an array is missing.
    """
    wanted = (*inputs, *targets)
    given = {name: f"{name}=..." for name in wanted if name.isidentifier()}
    rest = ", ".join(f"{name!r}: ..." for name in wanted if name not in given)
    call = f"np.savez(path, {', '.join([*given.values(), *([f'**{{{rest}}}'] if rest else [])])})"
    with array_file(path) as file:
        data = np.load(file, allow_pickle=False)
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise UsageError(f"{path}: is one array; save with {call}")
        missing = [name for name in wanted if name not in data]
        if missing:
            raise UsageError(
                f"{path}: has no array {' and '.join(missing)}, only"
                f" {', '.join(data.files) or 'nothing'}; save with {call}"
            )
        return {name: data[name] for name in inputs}, {name: data[name] for name in targets}


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
    kinds = "iu" if t.dtype.startswith(("i", "u")) else "biuf"
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


def checked_samples(training: TrainingGraph, x: Samples) -> dict[str, Array]:
    """The samples of a data set, each array [count, ...] in the dtype of its input.

    Raises:
        UsageError: Not numbers, another shape than the model's, none at all, other counts, or not
            finite; integers other than int8 for an i8 input; indices outside of their table.
    """
    result: dict[str, Array] = {}
    for name, v, given in by_input(training.samples, x):
        result[name] = _checked(training, name, v, np.asarray(given))
        first = next(iter(result))
        if len(result[name]) != len(result[first]):
            raise UsageError(
                f"{name} has {len(result[name])} samples, but {first} has {len(result[first])}"
            )
    return result


def _checked(training: TrainingGraph, name: str, value: Value, x: Array) -> Array:
    kind = value.type
    want = kind.shape[1:]
    if x.ndim < 1 or x.shape[1:] != want or x.dtype.kind not in "biuf":
        raise UsageError(
            f"{name} is {x.dtype}{list(x.shape)}, must be numbers"
            f" [count, {', '.join(map(str, want))}]"
        )
    if len(x) == 0:
        raise UsageError(f"{name} has no samples")
    if x.dtype.kind == "f" or kind.dtype == "f32":
        x = _f32(x)
        if not np.isfinite(x).all():
            bad = int(np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))[0])
            raise UsageError(f"{name}: sample {bad} has a NaN or infinite value")
    stored = stored_sample(x, replace(kind, shape=(len(x), *want)), name)
    check_indices(training.graph, value, stored, name)
    return stored


def chosen_of(x: Mapping[str, Array], chosen: Sequence[int] | slice) -> dict[str, Array]:
    """Some samples of all arrays."""
    return {name: a[chosen] for name, a in x.items()}


def checked_targets(training: TrainingGraph, y: Samples, count: int) -> dict[str, Array]:
    """The targets of a data set, each array labels i32 or numbers f32 [count, ...].

    Raises:
        UsageError: Wrong kind, shape or count, out of range, or not finite.
    """
    return {
        name: _checked_target(training, name, v, np.asarray(given), count)
        for name, v, given in by_target(training, y)
    }


def _checked_target(
    training: TrainingGraph, name: str, value: Value, y: Array, count: int
) -> Array:
    if y.ndim < 1 or len(y) != count:
        raise UsageError(f"{name} has shape {list(y.shape)}, but x has {count} samples")
    want = value.type.shape[1:]
    labels = value.type.dtype == "i32"
    if y.shape[1:] != want or y.dtype.kind not in ("iu" if labels else "iuf"):
        what = "integer labels" if labels else "numbers"
        raise UsageError(
            f"{name} is {y.dtype}{list(y.shape)}, must be {what}"
            f" [{', '.join(map(str, (count, *want)))}]"
        )
    if not labels:
        y = _f32(y)
        if not np.isfinite(y).all():
            raise UsageError(f"{name} has a NaN or infinite value")
    y = fitted(y, replace(value.type, shape=y.shape), name)
    check_bounds(y, bounds_of(training.graph, value), name)
    return y


def _f32(a: Array) -> Array:
    with np.errstate(over="ignore"):  # too large for f32 becomes infinite, which callers refuse
        return a.astype(np.float32)
