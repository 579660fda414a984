"""Bad input about precision through the command line: one line, and the documented exit code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from onnx_files import export, floats, model, node, save
from test_cli import Cli

Array = NDArray[Any]
LIMITS = ("--ram", "64KB", "--flash", "1MB", "--train", "last")
#: Exit codes.
USAGE, MODEL = 2, 4


@pytest.fixture
def odt(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    return Cli(capfd, monkeypatch)


def refused(odt: Cli, code: int, parts: tuple[str, ...], *words: str | Path) -> None:
    """One line on stderr with all parts, the exit code, nothing else and no file."""
    before = sorted(Path().rglob("*"))
    done = odt(*words, *LIMITS, "-o", "out")
    assert done.code == code, done.err
    assert done.out == ""
    for part in parts:
        assert part in done.error
    assert sorted(Path().rglob("*")) == before


# -- calibration samples ---------------------------------------------------------------------------

_GOOD = floats(np.random.default_rng(0), 4, 2, 6, 6)


def _with(value: float, at: int) -> Array:
    x = _GOOD.astype("f8")
    x[at, 0, 0, 0] = value
    return x


@pytest.mark.parametrize(
    ("x", "parts"),
    [
        (np.zeros((4, 2, 6, 5), "f4"), ("float32[4, 2, 6, 5]", "x needs [count, 2, 6, 6]")),
        (np.zeros((4, 6, 6, 2), "f4"), ("[4, 6, 6, 2]", "x needs [count, 2, 6, 6]")),
        (np.zeros((2, 6, 6), "f4"), ("float32[2, 6, 6]", "[count, 2, 6, 6]")),
        (np.zeros((0, 2, 6, 6), "f4"), ("there are no calibration samples",)),
        (np.zeros((4, 2, 6, 6), complex), ("complex128", "x needs numbers")),
        (np.full((4, 2, 6, 6), "cat"), ("<U3", "x needs numbers")),
        (np.zeros((4, 2, 6, 6), bool), ("bool", "x needs numbers")),
        (_with(np.nan, 2), ("sample 2 has a NaN or infinite value (1 of 4 do)",)),
        (_with(-np.inf, 0), ("sample 0 has a NaN or infinite value",)),
        (_with(1e300, 3), ("NaN or infinite value",)),
    ],
)
def test_calibration_samples(odt: Cli, tmp_path: Path, x: Array, parts: tuple[str, ...]) -> None:
    np.savez("calib.npz", x=x)
    refused(odt, USAGE, parts, export(nets.cnn(), tmp_path), "--calib", "calib.npz")


@pytest.mark.parametrize(
    ("write", "parts"),
    [
        (lambda: None, ("calib.npz", "No such file")),
        (lambda: Path("calib.npz").write_bytes(b"PK\x03\x04 cut"), ("calib.npz", "can't be read")),
        (lambda: Path("calib.npz").mkdir(), ("calib.npz", "can't be read")),
        (lambda: np.savez("calib.npz", a=_GOOD, b=_GOOD), ("no array x, only a, b", "np.savez")),
    ],
)
def test_calibration_files(
    odt: Cli, tmp_path: Path, write: Callable[[], object], parts: tuple[str, ...]
) -> None:
    write()
    refused(odt, USAGE, parts, export(nets.cnn(), tmp_path), "--calib", "calib.npz")


def test_samples_for_a_model_that_brings_scales(odt: Cli, tmp_path: Path) -> None:
    np.savez("calib.npz", x=_GOOD)
    for calib in ("calib.npz", "synthetic"):
        parts = ("quantized already", "leave --calib out")
        refused(odt, USAGE, parts, save(qdq(), tmp_path), "--calib", calib)


# -- pins ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pin", "parts"),
    [
        ("conv1=i4", ("'conv1=i4'", "one of", "i8", "f32")),
        ("conv1=int8", ("'conv1=int8'", "one of")),
        ("conv1=", ("'conv1='", "one of")),
        ("=i8", ("'=i8'", "one of")),
        ("conv1", ("'conv1'", "one of")),
        ("conv9=i8", ("conv9 matches no layer", "nearest: ", "conv")),
        ("Conv1=i8", ("Conv1 matches no layer", "nearest: ", "conv1")),
        ("features.*=i8", ("features.* matches no layer", "nearest: ")),
        ("prob=i8", ("prob", "Softmax has no i8 kernel; leave it f32")),
        ("prob=f32,conv*=i8,prob=mixed", ("prob", "Softmax has no mixed kernel")),
        ("relu=i8", ("relu is part of the layer conv1; pin that",)),
        ("pool=mixed", ("pool can't be mixed", "no weights")),
    ],
)
def test_pins(odt: Cli, tmp_path: Path, pin: str, parts: tuple[str, ...]) -> None:
    np.savez("calib.npz", x=_GOOD)
    words = ("--calib", "calib.npz", "--precision", pin)
    refused(odt, USAGE, ("--precision", *parts), _classifier(tmp_path), *words)


@pytest.mark.parametrize("pin", ["conv1=i8", "*=i8", "conv1=mixed"])
def test_pins_of_a_model_without_scales(odt: Cli, tmp_path: Path, pin: str) -> None:
    parts = (f"--precision {pin}", "floats without scales", "give samples with --calib")
    refused(odt, USAGE, parts, _classifier(tmp_path), "--precision", pin)


def test_pin_of_a_layer_whose_operand_has_no_range(odt: Cli, tmp_path: Path) -> None:
    proto = qdq(known_input=False)
    parts = ("conv can't be i8", "the range of its operand x is not known", "leave it f32")
    refused(odt, USAGE, parts, save(proto, tmp_path), "--precision", "conv=i8")


def _classifier(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    constants = {"w1": floats(rng, 3, 2, 3, 3), "w2": floats(rng, 3, 4)}
    nodes = [
        node("Conv", "x w1", "c", "conv1", pads=[1, 1, 1, 1]),
        node("Relu", "c", "r", "relu"),
        node("GlobalAveragePool", "r", "p", "pool"),
        node("Flatten", "p", "f", "flat"),
        node("Gemm", "f w2", "z", "fc"),
        node("Softmax", "z", "y", "prob"),
    ]
    return save(model(nodes, {"x": (1, 2, 6, 6)}, ["y"], constants), folder)


# -- parameters in the file ------------------------------------------------------------------------


def qdq(constants: Mapping[str, Array] | None = None, *, known_input: bool = True) -> ModelProto:
    """Layer ``conv`` between QuantizeLinear and DequantizeLinear, and a float layer behind."""
    rng = np.random.default_rng(5)
    all_constants: dict[str, Array] = {
        "s": np.array(0.03, "f4"),
        "z": np.array(0, "i1"),
        "t": np.array(0.05, "f4"),
        "wq": rng.integers(-127, 128, (3, 2, 1, 1)).astype("i1"),
        "ws": np.full(3, 0.01, "f4"),
        "wz": np.zeros(3, "i1"),
        "v": floats(rng, 2, 3, 1, 1),
        **(constants or {}),
    }
    pair = [
        node("QuantizeLinear", "x s z", "xq"),
        node("DequantizeLinear", "xq s z", "xd"),
    ]
    nodes = [
        *(pair if known_input else []),
        node("DequantizeLinear", "wq ws wz", "w", axis=0),
        node("Conv", "xd w" if known_input else "x w", "c", "conv"),
        node("QuantizeLinear", "c t z", "cq"),
        node("DequantizeLinear", "cq t z", "cd"),
        node("Conv", "cd v", "e", "last"),
        node("GlobalAveragePool", "e", "g"),
        node("Flatten", "g", "y"),
    ]
    return model(nodes, {"x": (1, 2, 6, 6)}, ["y"], all_constants, opset=21)


@pytest.mark.parametrize(
    ("constants", "parts"),
    [
        ({"s": np.array(0, "f4")}, ("QuantizeLinear_xq", "its scale 0 is not a positive finite")),
        ({"s": np.array(np.inf, "f4")}, ("QuantizeLinear_xq", "its scale inf is not a positive")),
        ({"s": np.array(np.nan, "f4")}, ("s (initializer): holds 1 NaN",)),
        ({"s": np.array(-1, "f4")}, ("QuantizeLinear_xq", "its scale -1 is not a positive")),
        ({"ws": np.array([1, 0, 0], "f4")}, ("_w ", "its scale 0 is not", "(2 of 3 are so)")),
        ({"ws": np.full(3, np.inf, "f4")}, ("ws (initializer): holds 0 NaN and 3 infinite",)),
        ({"wz": np.full(3, 200, "i4")}, ("_w ", "its zero point 200 is out of range of int8")),
        ({"wz": np.full(3, -129, "i2")}, ("_w ", "its zero point -129 is out of range of int8")),
        ({"z": np.array(300, "i2")}, ("QuantizeLinear_xq", "int16; only int8 and uint8")),
        ({"ws": np.full(2, 0.1, "f4"), "wz": np.zeros(2, "i1")}, ("2 scales do not fit axis 0",)),
    ],
)
def test_parameters(
    odt: Cli, tmp_path: Path, constants: Mapping[str, Array], parts: tuple[str, ...]
) -> None:
    refused(odt, MODEL, parts, save(qdq(constants), tmp_path))


KINDS = ("INT4", "UINT4", "FLOAT8E4M3FN", "FLOAT8E5M2")


def _name(kind: str) -> str:
    """How the error names an element type."""
    return kind.lower().replace("float8", "float8_") if kind.startswith("F") else kind.lower()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_other_types(odt: Cli, tmp_path: Path, kind: str) -> None:
    proto = qdq({"s": np.array(0.03, "f4")})
    for name, shape in (("wq", [3, 2, 1, 1]), ("wz", [3])):
        (old,) = (t for t in proto.graph.initializer if t.name == name)
        proto.graph.initializer.remove(old)
        data = [1.0] * int(np.prod(shape))
        new = helper.make_tensor(name, getattr(TensorProto, kind), shape, data)
        proto.graph.initializer.append(new)
    parts = ("DequantizeLinear_w ", f"{_name(kind)}; only int8 and uint8")
    refused(odt, MODEL, parts, save(proto, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_other_types(odt: Cli, tmp_path: Path, kind: str) -> None:
    proto = qdq()
    (old,) = (t for t in proto.graph.initializer if t.name == "z")
    proto.graph.initializer.remove(old)
    proto.graph.initializer.append(helper.make_tensor("z", getattr(TensorProto, kind), [], [0]))
    parts = ("QuantizeLinear_xq", f"{_name(kind)}; only int8 and uint8")
    refused(odt, MODEL, parts, save(proto, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_other_types(odt: Cli, tmp_path: Path, kind: str) -> None:
    nodes = [
        node("DequantizeLinear", "x s", "xd"),
        node("MatMul", "xd w", "y"),
    ]
    constants = {"s": np.array(0.1, "f4"), "w": floats(np.random.default_rng(0), 4, 3)}
    dtype = getattr(TensorProto, kind)
    proto = model(nodes, {"x": (1, 4)}, ["y"], constants, opset=21, dtype=dtype)
    refused(odt, MODEL, ("x (input): is " + kind.lower(), "int8 or uint8"), save(proto, tmp_path))
