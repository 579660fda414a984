"""Pictures and WAV files, a folder for each class, as arrays that fit a model's input.

Pictures need Pillow, ``pip install 'odt-plan[data]'``; WAV files are read by the standard library.
"""

from __future__ import annotations

import warnings
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from ...ir.array_file import MAX_BYTES
from ...ir.errors import UsageError
from ...ir.graph import Array, TensorType, Value

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_SOUNDS = (".wav",)
#: Channels of a picture -> Pillow's mode.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
#: Bytes of one PCM sample -> NumPy's type; 24 bits are read as three bytes.
_PCM = {1: "u1", 2: "<i2", 4: "<i4"}


@dataclass(frozen=True)
class Normalization:
    """What the model expects: ``(value - mean) / std``, a number each or one per channel.

    Values are those of pictures divided by 255, and those of sounds from -1 to 1.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


def read_media(
    folder: Path,
    inputs: Sequence[Value],
    normalization: Normalization | None,
    classes: Sequence[str] = (),
) -> tuple[Array, Array, tuple[str, ...], tuple[str, ...]]:
    """Read a folder of classes.

    Pictures are scaled to the size of the input (bilinear), sounds are mixed to one channel and cut
    or filled with silence at their end.

    Args:
        folder: Has a folder for each class.
        inputs: Those of the model.
        normalization: What to do with the values.
        classes: Names of the classes in the order of their labels; empty: the folders, sorted.

    Returns:
        Samples f32 [count, ...], labels [count], the classes, and notes for the user.

    Raises:
        UsageError: There are no classes or files, one can't be read, or the model takes something
            else.
    """
    files = _files(folder, classes)
    known = tuple(classes) or tuple(sorted(files))
    kinds = {_kind(p) for paths in files.values() for p in paths} - {None}
    if len(kinds) != 1:
        found = "pictures and WAV files" if kinds else "neither pictures nor WAV files"
        raise UsageError(f"{folder}: its folders hold {found}; give one kind")
    (kind,) = kinds
    if len(inputs) != 1 or inputs[0].type.dtype not in ("f32", "i8"):
        raise UsageError(f"{folder}: the model takes other inputs than {kind}; give an .npz file")
    t = inputs[0].type
    read = _Pictures(t, normalization) if kind == "pictures" else _Sounds(t, normalization)
    chosen = [(p, label) for label, name in enumerate(known) for p in files.get(name, ())
              if _kind(p) == kind]  # fmt: skip
    empty = sorted(set(files) - {p.parent.name for p, _ in chosen})
    if empty:
        raise UsageError(f"{folder / empty[0]}: has no {kind}; remove the folder, or fill it")
    if len(chosen) * prod(t.shape[1:]) * 4 > MAX_BYTES:
        raise UsageError(
            f"{folder}: {len(chosen)} samples of f32{list(t.shape[1:])} are more than {MAX_BYTES}"
            " bytes; give fewer"
        )
    x = np.empty((len(chosen), *t.shape[1:]), np.float32)
    for i, (path, _) in enumerate(chosen):
        x[i] = read(path)
    passed = sum(len(paths) for paths in files.values()) - len(chosen)
    notes = [f"{folder}: {passed} files that are no {kind} are left out"] if passed else []
    return x, np.array([label for _, label in chosen]), known, (*notes, *read.notes())


def _files(folder: Path, classes: Sequence[str]) -> dict[str, list[Path]]:
    """Files by the name of their class, sorted."""
    folders = [p for p in _listed(folder) if p.is_dir()]
    if not folders:
        raise UsageError(
            f"{folder}: holds neither arrays (x.npy, y.npy) nor a folder of files for each class"
        )
    unknown = [p.name for p in folders if classes and p.name not in classes]
    if unknown:
        raise UsageError(
            f"{folder}: {unknown[0]} is none of the classes {', '.join(classes)} of the training"
            " data"
        )
    return {p.name: [f for f in _listed(p) if f.is_file()] for p in folders}


def _listed(folder: Path) -> list[Path]:
    """What a folder shows, sorted."""
    try:
        return [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
    except OSError as e:
        raise UsageError(f"{folder}: can't be read: {e.strerror or e}") from None


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return "pictures" if suffix in _PICTURES else "WAV files" if suffix in _SOUNDS else None


class _Pictures:
    def __init__(self, t: TensorType, normalization: Normalization | None) -> None:
        try:
            from PIL import Image
        except ImportError:
            raise UsageError(
                "pictures are read by Pillow, which is missing; pip install 'odt-plan[data]'"
            ) from None
        self._image, self._resized = Image, 0
        shape = t.shape[1:]
        axes = [a for a in (0, 2) if len(shape) == 3 and shape[a] in _MODES]
        axis = min(axes, key=lambda a: shape[a] == 4, default=None)  # pictures are rarely RGBA
        if axis is None and len(shape) != 2:
            raise UsageError(
                f"the model takes {t}, which is no picture [channels, height, width] or [height,"
                " width, channels]; give an .npz file"
            )
        self._axis, channels = axis, 1 if axis is None else shape[axis]
        self._mode = _MODES[channels]
        self._height, self._width = (s for a, s in enumerate(shape) if a != axis)
        self._normalize = _normalizer(normalization, channels)

    def __call__(self, path: Path) -> Array:
        """The picture in the shape of the input."""
        with warnings.catch_warnings():
            warnings.simplefilter("error", self._image.DecompressionBombWarning)
            try:
                with self._image.open(path) as picture:
                    mixed = picture.convert(self._mode)
            except (OSError, ValueError, SyntaxError, EOFError) as e:
                raise UsageError(f"{path}: can't be read as a picture: {_reason(e)}") from None
            except (self._image.DecompressionBombError, self._image.DecompressionBombWarning) as e:
                raise UsageError(f"{path}: is larger than pictures are: {_reason(e)}") from None
        if mixed.size != (self._width, self._height):
            self._resized += 1
            mixed = mixed.resize((self._width, self._height), self._image.Resampling.BILINEAR)
        values = np.asarray(mixed, np.float32).reshape(self._height, self._width, -1) / 255
        values = self._normalize(values)
        if self._axis == 0:
            return np.moveaxis(values, 2, 0)
        return values[..., 0] if self._axis is None else values

    def notes(self) -> list[str]:
        """What the user should know."""
        size = f"{self._width} x {self._height}"
        return [f"{self._resized} pictures are scaled to {size}"] if self._resized else []


class _Sounds:
    def __init__(self, t: TensorType, normalization: Normalization | None) -> None:
        shape = t.shape[1:]
        if not shape or max(shape) != prod(shape):
            raise UsageError(
                f"the model takes {t}, which is no waveform [samples]; compute its features, and"
                " give an .npz file"
            )
        self._shape, self._count = shape, prod(shape)
        self._normalize = _normalizer(normalization, 1)
        self._rates: dict[int, Path] = {}
        self._cut = self._filled = 0

    def __call__(self, path: Path) -> Array:
        """The waveform in the shape of the input."""
        try:
            with wave.open(str(path), "rb") as sound:
                rate, channels = sound.getframerate(), sound.getnchannels()
                width, frames = sound.getsampwidth(), sound.getnframes()
                data = sound.readframes(min(frames, self._count))
        except (wave.Error, OSError, EOFError) as e:
            raise UsageError(f"{path}: can't be read as a WAV file of PCM: {_reason(e)}") from None
        self._rates.setdefault(rate, path)
        if len(self._rates) > 1:
            (first, one), (second, other) = self._rates.items()
            raise UsageError(f"{other} has {second} Hz, {one} has {first} Hz; give one rate")
        values = _pcm(data, width)
        if not values.size or values.size % channels:
            raise UsageError(f"{path}: the sound is empty or cut")
        values = values.reshape(-1, channels).mean(1)
        self._cut += frames > self._count
        self._filled += len(values) < self._count
        padded = np.zeros(self._count, np.float32)
        padded[: len(values)] = values
        return self._normalize(padded[:, None]).reshape(self._shape)

    def notes(self) -> list[str]:
        """What the user should know."""
        (rate,) = self._rates
        told = [f"{self._cut} are cut"] if self._cut else []
        told += [f"{self._filled} are filled with silence"] if self._filled else []
        return (
            [f"sounds of {rate} Hz: {' and '.join(told)} to {self._count} samples"] if told else []
        )


def _pcm(data: bytes, width: int) -> Array:
    """Samples from -1 to 1; those of one byte have no sign (RIFF, "Multimedia Data Standards")."""
    if width == 3:
        parts = np.frombuffer(data[: len(data) // 3 * 3], np.uint8).reshape(-1, 3).astype(np.int32)
        whole = (parts[:, 0] << 8) | (parts[:, 1] << 16) | (parts[:, 2] << 24)
        return np.asarray(whole / 2.0**31, np.float32)
    values = np.frombuffer(data[: len(data) // width * width], _PCM[width]).astype(np.float64)
    if width == 1:
        values -= 128
    return np.asarray(values / 2.0 ** (8 * width - 1), np.float32)


def _normalizer(n: Normalization | None, channels: int) -> Callable[[Array], Array]:
    """A function of [..., channels]."""
    if n is None:
        return lambda values: values
    for name, numbers in (("--mean", n.mean), ("--std", n.std)):
        if len(numbers) not in (1, channels):
            raise UsageError(f"{name}: {len(numbers)} numbers for {channels} channels")
    mean, std = np.array(n.mean, np.float32), np.array(n.std, np.float32)
    return lambda values: np.asarray((values - mean) / std)


def _reason(e: BaseException) -> str:
    return (getattr(e, "strerror", None) or str(e) or type(e).__name__).splitlines()[0]
