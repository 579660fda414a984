"""Data sets from files: .npz, a folder of .npy arrays, or a folder of pictures or WAV per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...ir.array_file import array_file
from ...ir.errors import UsageError
from ...ir.graph import Array
from ...ir.sample import array_names
from ...ir.targets import target_names
from ...ir.training import TrainingGraph
from .data import DataSet, data_set, reconstruction_set, reconstructs
from .media_files import Normalization, read_media


@dataclass(frozen=True, eq=False)
class DataFile:
    """What stands in a file or folder of data.

    Attributes:
        path: Where.
        arrays: By name: those of samples and targets, and the same with ``_val``, as far as they
            are there.
        held: Names of all arrays that stand there.
        classes: Names of the labels of ``y``, where folders have told them.
        notes: What the user should know, a line each.
    """

    path: Path
    arrays: Mapping[str, Array]
    held: Sequence[str]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def has(self, names: Sequence[str]) -> bool:
        """Whether all arrays are there."""
        return all(name in self.arrays for name in names)

    def data(
        self, training: TrainingGraph, suffix: str = "", *, anomalies: bool = False
    ) -> DataSet:
        """The data set of the arrays with a suffix, checked.

        Args:
            training: The training graph.
            suffix: Empty, or ``_val``.
            anomalies: ``y`` is 0 or 1 per sample of an autoencoder, and tells which are unusual.

        Raises:
            UsageError: An array is missing, or does not fit the model.
        """
        names, targets = array_names(training.samples), target_names(training)
        alone = not anomalies and reconstructs(training) and f"y{suffix}" not in self.arrays
        needed = names if alone else (*names, *targets)
        _demand(self.path, self.held, [f"{name}{suffix}" for name in needed])
        x, y = (
            {name: self.arrays[f"{name}{suffix}"] for name in group if name in needed}
            for group in (names, targets)
        )
        if anomalies or alone:
            return reconstruction_set(training, x, y.get("y"), suffix=suffix)
        return data_set(training, x, y, suffix=suffix)


def read_data(
    path: Path,
    training: TrainingGraph,
    normalization: Normalization | None = None,
    classes: Sequence[str] = (),
) -> DataFile:
    """Read data for a model.

    Args:
        path: An .npz file, a folder of arrays (x.npy, y.npy), or a folder with a folder of pictures
            or WAV files for each class.
        training: The training graph; pictures and sounds are made to fit its input.
        normalization: Of pictures and sounds; arrays are taken as they are.
        classes: Names of the classes in the order of their labels; empty: the folders, sorted.

    Raises:
        UsageError: It can't be read, or holds nothing of that kind.
    """
    names = (*array_names(training.samples), *target_names(training))
    if not path.is_dir():
        _no_normalization(path, normalization)
        found, held = _archive(path, names)
        return DataFile(path, found, held)
    arrays = sorted(path.glob("*.npy"))
    if not arrays:
        x, y, known, notes = read_media(path, training.samples, normalization, classes)
        return DataFile(path, {"x": x, "y": y}, ("x", "y"), known, notes)
    _no_normalization(path, normalization)
    wanted = _with_val(names)
    read = {a.stem: _array(a) for a in arrays if a.stem in wanted}
    return DataFile(path, read, [a.stem for a in arrays])


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
    names = (*inputs, *targets)
    found, held = _archive(path, names)
    _demand(path, held, names)
    return {name: found[name] for name in inputs}, {name: found[name] for name in targets}


def _with_val(names: Sequence[str]) -> set[str]:
    """Names of arrays to train on, and of those to validate by."""
    return {f"{name}{suffix}" for name in names for suffix in ("", "_val")}


def _archive(path: Path, names: Sequence[str]) -> tuple[dict[str, Array], list[str]]:
    """Arrays of an .npz file that may be asked for, and the names of all."""
    wanted = _with_val(names)
    with array_file(path) as file:
        data = np.load(file, allow_pickle=False)
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise UsageError(f"{path}: is one array; save with {_call(names)}, or give its folder")
        return {name: data[name] for name in data.files if name in wanted}, data.files


def _array(path: Path) -> Array:
    with array_file(path) as file:
        found = np.load(file, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise UsageError(f"{path}: is an archive of arrays under the name of one")
        return found


def _demand(path: Path, held: Sequence[str], names: Sequence[str]) -> None:
    """Demand arrays.

    Raises:
        UsageError: One is missing.
    """
    missing = [name for name in names if name not in held]
    if missing:
        raise UsageError(
            f"{path}: has no array {' and '.join(missing)}, only {', '.join(held) or 'nothing'};"
            f" save with {_call(names)}"
        )


def _call(names: Sequence[str]) -> str:
    """What a user would write to save arrays."""
    given = [f"{name}=..." for name in names if name.isidentifier()]
    rest = ", ".join(f"{name!r}: ..." for name in names if not name.isidentifier())
    return f"np.savez(path, {', '.join([*given, *([f'**{{{rest}}}'] if rest else [])])})"


def _no_normalization(path: Path, normalization: Normalization | None) -> None:
    if normalization is not None:
        raise UsageError(
            f"--mean and --std are of pictures and sounds, {path} holds arrays; normalize those"
            " before they are saved"
        )
