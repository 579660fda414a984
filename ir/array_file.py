"""NumPy's files: read under guard, so that no array is larger than it says, and written."""

from __future__ import annotations

import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO

from numpy.lib import format as npy

from .errors import UsageError
from .graph import Array

#: Bytes of one array.
MAX_BYTES = 2**31 - 1
#: Compressed arrays of more bytes may not be this many times larger than in the file.
BOMB_BYTES, BOMB_RATIO = 2**28, 200
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
#: What NumPy, zipfile and the decompressors raise when they read damaged files.
_DAMAGED = (
    *(ValueError, EOFError, RuntimeError, MemoryError, OverflowError, IndexError, struct.error),
    *(SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)


@contextmanager
def array_file(path: Path) -> Iterator[IO[bytes]]:
    """An .npy or .npz file to read from, its headers judged before anything is read into memory.

    Raises:
        UsageError: It can't be read, then or inside the block; an array is larger than 2 GiB or
            than its data; or the file is a decompression bomb.
    """
    try:
        with path.open("rb") as file:
            _check_all(file, path)
            file.seek(0)
            yield file
    except OSError as e:
        raise UsageError(f"{path}: can't be read as .npz or .npy: {e.strerror or e}") from None
    except _DAMAGED as e:
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UsageError(f"{path}: can't be read as .npz or .npy: {reason}") from None


def write_arrays(file: IO[bytes], arrays: Mapping[str, Array]) -> None:
    """Write an .npz file of arrays with any names.

    ``numpy.savez`` takes names as keyword arguments: none could be called ``file``.

    Args:
        file: Open for writing.
        arrays: By name.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, array, allow_pickle=False)


def _check_all(file: IO[bytes], path: Path) -> None:
    if not zipfile.is_zipfile(file):
        file.seek(0)
        _check(file, path.stat().st_size, f"{path}: the array")
        return
    with zipfile.ZipFile(file) as archive:
        for info in (i for i in archive.infolist() if i.filename.endswith(".npy")):
            what = f"{path}: the array {info.filename.removesuffix('.npy')}"
            size, ratio = info.file_size, info.file_size / max(1, info.compress_size)
            if size > BOMB_BYTES and ratio > BOMB_RATIO:
                raise UsageError(
                    f"{what} has {size} bytes, {ratio:.0f} times as many as in the file;"
                    " save without compression if it is no decompression bomb"
                )
            with archive.open(info) as member:
                _check(member, size, what)


def _check(file: IO[bytes], size: int, what: str) -> None:
    version = npy.read_magic(file)
    if version not in _HEADERS:
        raise ValueError("it holds records instead of numbers")
    shape, _, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        return  # which NumPy refuses
    declared = prod(shape) * dtype.itemsize
    if declared > MAX_BYTES:
        raise UsageError(f"{what} has {declared} bytes, {dtype}{[*shape]}; at most {MAX_BYTES}")
    if declared > size:
        raise UsageError(
            f"{what} declares {declared} bytes, {dtype}{[*shape]}, but the file has {size} for it;"
            " it is damaged"
        )
