"""Data from folders of arrays, pictures and WAV files, and what is refused or told about data."""

from __future__ import annotations

import struct
import wave
from pathlib import Path
from typing import Any

import nets
import numpy as np
import plans
import pytest
from numpy.typing import NDArray

from odt_plan.backends.numpy import Normalization, data_set, media_files, read_data, remarks
from odt_plan.ir.errors import UsageError
from odt_plan.ir.graph import Graph, TensorType
from odt_plan.ir.training import TrainingGraph, TrainingSpec

Array = NDArray[Any]


def taking(*shape: int, classes: int = 3, loss: str = "cross_entropy") -> TrainingGraph:
    """A model of samples of a shape."""
    rng, g = np.random.default_rng(0), Graph("taking")
    x = g.add_input("x", TensorType((1, *shape)))
    g.outputs = [nets.dense(g, rng, nets.flat(g, x), "fc", classes)]
    g.verify()
    return plans.training_of(g, TrainingSpec(loss=loss))  # type: ignore[arg-type]


# ---- arrays


def test_a_folder_of_arrays_is_an_archive(tmp_path: Path) -> None:
    t, rng = taking(5), np.random.default_rng(0)
    arrays = {"x": rng.random((6, 5)), "y": np.arange(6) % 3, "x_val": rng.random((2, 5))}
    np.savez(tmp_path / "d.npz", **arrays, junk=np.zeros(2))  # type: ignore[arg-type]
    (tmp_path / "d").mkdir()
    for name, a in (*arrays.items(), ("junk", np.zeros(2))):
        np.save(tmp_path / "d" / f"{name}.npy", a)
    one, other = read_data(tmp_path / "d.npz", t), read_data(tmp_path / "d", t)
    assert set(one.arrays) == set(other.arrays) == set(arrays)
    for name, a in arrays.items():
        assert np.array_equal(one.arrays[name], a)
        assert np.array_equal(other.arrays[name], a)
    assert other.data(t).count == 6
    with pytest.raises(UsageError, match="has no array y_val, only"):
        other.data(t, "_val")
    (tmp_path / "d" / "y.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UsageError, match=r"y\.npy: can't be read as \.npz or \.npy"):
        read_data(tmp_path / "d", t)
    (tmp_path / "d" / "y.npy").unlink()
    with pytest.raises(UsageError, match=r"d: has no array y, only junk, x, x_val; save with"):
        read_data(tmp_path / "d", t).data(t)
    with pytest.raises(UsageError, match="--mean and --std are of pictures"):
        read_data(tmp_path / "d", t, Normalization())
    np.save(tmp_path / "x.npy", arrays["x"])
    with pytest.raises(UsageError, match=r"is one array; save with .* or give its folder"):
        read_data(tmp_path / "x.npy", t)


def test_an_autoencoder_needs_no_targets(tmp_path: Path) -> None:
    t = taking(4, classes=4, loss="mse")
    x = np.random.default_rng(1).standard_normal((5, 4)).astype("f4")
    np.savez(tmp_path / "d.npz", x=x, x_val=x, y_val=[0, 1, 0, 1, 1])
    file = read_data(tmp_path / "d.npz", t)
    assert np.array_equal(file.data(t).y["y"], x)
    judged = file.data(t, "_val", anomalies=True)
    assert judged.anomalous is not None
    assert judged.anomalous.tolist() == [0, 1, 0, 1, 1]
    for wrong in ([0, 1, 2, 0, 1], [0, 1]):
        np.savez(tmp_path / "d.npz", x=x, x_val=x, y_val=wrong)
        with pytest.raises(UsageError, match=r"y_val is .* must be 0 \(normal\) or 1"):
            read_data(tmp_path / "d.npz", t).data(t, "_val", anomalies=True)
    with pytest.raises(UsageError, match="has no array y"):
        read_data(tmp_path / "d.npz", taking(4)).data(taking(4))


# ---- pictures


def pictures(folder: Path, content: dict[str, list[Array]], ending: str = "png") -> None:
    image = pytest.importorskip("PIL.Image")
    for name, arrays in content.items():
        (folder / name).mkdir(parents=True)
        for i, a in enumerate(arrays):
            image.fromarray(a).save(folder / name / f"{i}.{ending}")


@pytest.mark.parametrize("shape", [(3, 4, 6), (4, 6, 3), (1, 4, 6), (4, 6, 1), (4, 6)])
def test_pictures_are_what_was_drawn(shape: tuple[int, ...], tmp_path: Path) -> None:
    rng, gray = np.random.default_rng(2), 3 not in shape
    size = (4, 6) if gray else (4, 6, 3)
    drawn = [rng.integers(0, 256, size, dtype=np.uint8) for _ in range(4)]
    pictures(tmp_path / "d", {"cat": drawn[:1], "ant": drawn[1:3], "dog": drawn[3:]})
    (tmp_path / "d" / "ant" / "notes.txt").write_text("no picture")
    (tmp_path / "d" / "ant" / ".hidden").write_text("")
    t = taking(*shape)
    file = read_data(tmp_path / "d", t, Normalization((0.5,), (0.25,)))
    assert file.classes == ("ant", "cat", "dog")
    assert file.arrays["y"].tolist() == [0, 0, 1, 2]
    wanted = np.stack([drawn[1], drawn[2], drawn[0], drawn[3]]).reshape(4, 4, 6, -1)
    wanted = (wanted.astype(np.float32) / 255 - 0.5) / 0.25
    if len(shape) == 3 and shape[0] in (1, 3):
        wanted = wanted.transpose(0, 3, 1, 2)
    np.testing.assert_allclose(file.arrays["x"], wanted.reshape(4, *shape), rtol=1e-6, atol=1e-6)
    (note,) = file.notes
    assert note.endswith("1 files that are no pictures are left out")
    assert file.data(t).count == 4
    per_channel = Normalization((0.1, 0.2), (1.0,))
    with pytest.raises(UsageError, match="--mean: 2 numbers for"):
        read_data(tmp_path / "d", t, per_channel)


def test_pictures_are_scaled_and_classes_carried_over(tmp_path: Path) -> None:
    flat = [np.full((9, 5), v, np.uint8) for v in (10, 200)]
    pictures(tmp_path / "train", {"a": flat[:1], "b": flat[1:]})
    pictures(tmp_path / "val", {"b": flat[1:]})
    t = taking(1, 4, 4)
    train = read_data(tmp_path / "train", t)
    assert train.notes == ("2 pictures are scaled to 4 x 4",)
    val = read_data(tmp_path / "val", t, None, train.classes)
    assert val.arrays["y"].tolist() == [1], "b is 1 there as well"
    assert np.allclose(val.arrays["x"], 200 / 255)
    pictures(tmp_path / "val" / "..", {"other/c": flat[:1]})
    with pytest.raises(UsageError, match="c is none of the classes a, b of the training data"):
        read_data(tmp_path / "other", t, None, train.classes)


def test_pictures_that_cant_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    folder, t = tmp_path / "d", taking(1, 4, 4)
    folder.mkdir()
    with pytest.raises(UsageError, match="holds neither arrays"):
        read_data(folder, t)
    (folder / "a").mkdir()
    with pytest.raises(UsageError, match="neither pictures nor WAV files"):
        read_data(folder, t)
    pictures(folder, {"b": [np.zeros((4, 4), np.uint8)]})
    with pytest.raises(UsageError, match=r"d/a: has no pictures"):
        read_data(folder, t)
    good = (folder / "b" / "0.png").read_bytes()
    for bad in (good[:40], b"", b"text"):
        (folder / "a" / "0.png").write_bytes(bad)
        with pytest.raises(UsageError, match=r"a/0\.png: can't be read as a picture") as caught:
            read_data(folder, t)
        assert "\n" not in str(caught.value)
    (folder / "a" / "0.png").write_bytes(good)
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UsageError, match=r"is larger than pictures are"):
        read_data(folder, t)
    monkeypatch.undo()
    monkeypatch.setattr(media_files, "MAX_BYTES", 100)
    with pytest.raises(UsageError, match=r"2 samples of .* are more than 100 bytes"):
        read_data(folder, t)
    monkeypatch.undo()
    (folder / "a" / "1.wav").write_bytes(b"RIFF")
    with pytest.raises(UsageError, match="hold pictures and WAV files; give one kind"):
        read_data(folder, t)
    (folder / "a" / "1.wav").unlink()
    with pytest.raises(UsageError, match="which is no picture"):
        read_data(folder, taking(7, 5, 5))


def test_pillow_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "d" / "a").mkdir(parents=True)
    (tmp_path / "d" / "a" / "0.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"pip install 'odt-plan\[data\]'"):
        read_data(tmp_path / "d", taking(1, 4, 4))


# ---- sounds


def sound(path: Path, values: Array, width: int = 2, channels: int = 1, rate: int = 16000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if width == 3:
        data = b"".join(struct.pack("<i", int(v))[:3] for v in values)
    else:
        data = values.astype({1: "u1", 2: "<i2", 4: "<i4"}[width]).tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (8, 1)])
def test_sounds_are_those_that_scipy_reads(
    width: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    wavfile = pytest.importorskip("scipy.io.wavfile")
    rng, top = np.random.default_rng(width), 2 ** (8 * width - 1)
    low, high = (0, 256) if width == 1 else (-top, top)
    for name in ("no", "yes"):
        sound(tmp_path / "d" / name / "0.wav", rng.integers(low, high, 8), width)
    t = taking(*shape)
    file = read_data(tmp_path / "d", t)
    assert file.notes == ()
    for i, name in enumerate(file.classes):
        _, data = wavfile.read(tmp_path / "d" / name / "0.wav")
        wanted = data.astype(np.float64)  # SciPy has 24 bits in the upper three bytes
        wanted = (wanted - 128) / 128 if width == 1 else wanted / np.iinfo(data.dtype).max
        np.testing.assert_allclose(file.arrays["x"][i].ravel(), wanted, atol=1e-4)
    assert file.data(t).count == 2


def test_sounds_are_mixed_cut_and_filled(tmp_path: Path) -> None:
    sound(tmp_path / "d" / "a" / "stereo.wav", np.array([2, 4, 6, 8]) * 4096, channels=2)
    sound(tmp_path / "d" / "b" / "long.wav", np.arange(9) * 3000)
    file = read_data(tmp_path / "d", taking(4))
    np.testing.assert_allclose(file.arrays["x"][0], [0.375, -0.125, 0, 0])  # 8 * 4096 wraps
    np.testing.assert_allclose(file.arrays["x"][1] * 32768, np.arange(4) * 3000)
    assert file.notes == (
        "sounds of 16000 Hz: 1 are cut and 1 are filled with silence to 4 samples",
    )
    sound(tmp_path / "d" / "b" / "other.wav", np.arange(4), rate=8000)
    with pytest.raises(UsageError, match=r"other\.wav has 8000 Hz, .*stereo\.wav has 16000 Hz"):
        read_data(tmp_path / "d", taking(4))
    for bad in (b"", b"RIFF1234WAVE", (tmp_path / "d" / "a" / "stereo.wav").read_bytes()[:44]):
        (tmp_path / "d" / "b" / "other.wav").write_bytes(bad)
        with pytest.raises(UsageError, match=r"other\.wav: ") as caught:
            read_data(tmp_path / "d", taking(4))
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="which is no waveform"):
        read_data(tmp_path / "d", taking(2, 4))


# ---- what is odd about data


def test_remarks() -> None:
    t, rng = taking(5), np.random.default_rng(0)
    x, y = rng.random((6, 5)), np.arange(6) % 3
    data = data_set(t, x, y)
    assert remarks(data, data_set(t, rng.random((4, 5)), y[:4]), 2) == []
    (same,) = remarks(data, data_set(t, np.concatenate([x[:3], x[:1] + 1]), y[:4]), 2)
    assert same.startswith("3 of 4 samples to validate by are also trained on")
    (one,) = remarks(data_set(t, x, np.full(6, 2)), None, 2)
    assert one == "all samples are of class 2: nothing can be told apart"
    (few,) = remarks(data, None, 7)
    assert few.startswith("there are 6 samples, and an update takes 7")


@pytest.mark.parametrize(
    ("x", "y", "told"),
    [
        (np.where(np.eye(6, 5) * np.arange(6)[:, None] == 3, np.nan, 1.0), None, "x_val: sample 3"),
        (np.zeros((6, 4)), None, r"x_val is float64\[6, 4\], must be numbers \[count, 5\]"),
        (np.zeros((0, 5)), None, "x_val has no samples"),
        (np.array([["a"] * 5] * 6), None, "x_val is <U1"),
        (np.zeros((6, 5)), np.full(6, 3), "y_val has labels from 3 to 3, but the model has"),
        (np.zeros((6, 5)), np.full(6, -1), "y_val has labels from -1"),
        (np.zeros((6, 5)), np.zeros(6), r"y_val is float64\[6\], must be integer labels"),
        (np.zeros((6, 5)), np.zeros(5, int), r"y_val has shape \[5\], but x_val has 6 samples"),
    ],
)
def test_messages_name_the_array(x: Array, y: Array | None, told: str) -> None:
    labels = np.zeros(len(x), int) if y is None else y
    with pytest.raises(UsageError, match=told):
        data_set(taking(5), x, labels, suffix="_val")
