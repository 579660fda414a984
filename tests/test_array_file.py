"""Files of arrays that would fill the memory, or that promise more than they hold."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odt_plan.backends.numpy import load_data
from odt_plan.ir import array_file
from odt_plan.ir.calibrate import load_samples
from odt_plan.ir.errors import UsageError

HUGE = (2**40, 16)


def _header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    file = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


def _archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def test_arrays_have_any_names(tmp_path: Path) -> None:
    """Those of parameters are the model's own."""
    rng = np.random.default_rng(0)
    names = ("file", "allow_pickle", "/block.0/conv:w", "arr_0")
    arrays = {n: rng.standard_normal((2, i)).astype("f4") for i, n in enumerate(names)}
    with (tmp_path / "a.npz").open("wb") as file:
        array_file.write_arrays(file, arrays)
    read = np.load(tmp_path / "a.npz", allow_pickle=False)
    assert set(read.files) == set(names)
    assert all(np.array_equal(read[n], a) and read[n].dtype == a.dtype for n, a in arrays.items())


@pytest.mark.parametrize("load", [load_data, load_samples])
def test_declared_shapes_are_not_believed(tmp_path: Path, load: Callable[[Path], Any]) -> None:
    """Huge ones, in an archive and alone; ones that the data do not fill."""
    labels = io.BytesIO()
    np.save(labels, np.zeros(4, np.int32))
    huge = _archive(tmp_path / "huge.npz", x=_header(HUGE), y=labels.getvalue())
    with pytest.raises(UsageError, match=r"the array x has 70368744177664 bytes, float32\[") as e:
        load(huge)
    assert "\n" not in str(e.value)
    short = _archive(tmp_path / "short.npz", x=_header((9, 9)), y=labels.getvalue())
    with pytest.raises(UsageError, match=r"array x declares 324 bytes, float32\[9, 9\], but the"):
        load(short)
    (tmp_path / "huge.npy").write_bytes(_header(HUGE) + bytes(64))
    with pytest.raises(UsageError, match="the array has 70368744177664 bytes"):
        load(tmp_path / "huge.npy")


def test_decompression_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file of a large array is refused; a small array of any ratio is none."""
    path = tmp_path / "zeros.npz"
    np.savez_compressed(path, x=np.zeros((1000, 1000), np.float32), y=np.zeros(1000, np.int32))
    x, _ = load_data(path)
    assert x["x"].shape == (1000, 1000)
    monkeypatch.setattr(array_file, "BOMB_BYTES", 10**6)
    with pytest.raises(UsageError, match=r"the array x has 4000128 bytes, \d{3,4} times as many"):
        load_data(path)


def test_damaged_files_never_escape(tmp_path: Path) -> None:
    """Any byte of an archive or array may be wrong: the data are read, or one error is raised."""
    path = tmp_path / "data.npz"
    read, messages = 0, []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        file = io.BytesIO()
        arrays: dict[str, Any] = {"x": rng.standard_normal((4, 3)), "y": np.arange(4)}
        if seed % 3 == 0:
            np.save(file, arrays["x"])
        else:
            (np.savez, np.savez_compressed)[seed % 2](file, **arrays)
        data = bytearray(file.getvalue())
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        path.write_bytes(data[: int(rng.integers(len(data))) if seed % 5 == 0 else None])
        for load in (load_data, load_samples):
            try:
                load(path)
                read += 1
            except UsageError as e:
                messages.append(str(e))
    assert read > 50
    assert len(messages) > 50
    assert not any("\n" in text for text in messages)
