"""Import of operators that tell or take entries by positions: against onnxruntime and PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto
from onnx_files import agrees, model, node, outputs, runtime, save

from odt_plan.ir.errors import UnsupportedModelError
from odt_plan.ir.onnx_import import import_model

VALUES = np.array([-1.5, 2.0], np.float32)


@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.FLOAT])
def test_one_hot_of_an_input(axis: int, kind: int, tmp_path: Path) -> None:
    """Indices count from the end where they are negative; those outside mark nothing."""
    nodes = [node("OneHot", "x d v", "y", axis=axis)]
    integers = kind == TensorProto.INT64
    constants = {"d": np.array([5], np.int64 if integers else np.float32), "v": VALUES}
    proto = model(nodes, {"x": [2, 3]}, ["y"], constants, dtype=kind)
    path = save(proto, tmp_path)
    graph = import_model(path)
    x = np.array([[0, 4, -1], [-5, 7, 2]])
    (v,) = graph.inputs
    (got,) = outputs(graph, {"x": x.astype(np.int32 if integers else np.float32)})
    (want,) = runtime(path, {"x": x.astype(np.int64 if integers else np.float32)})
    assert np.array_equal(got, want)
    assert v.type.dtype == ("i32" if integers else "f32")


def test_one_hot_cuts_fractions(tmp_path: Path) -> None:
    constants = {"d": np.array(3), "v": VALUES}
    proto = model([node("OneHot", "x d v", "y")], {"x": [4]}, ["y"], constants)
    x = np.array([0.9, 2.5, -0.5, -1.2], np.float32)
    (got,) = outputs(import_model(save(proto, tmp_path)), {"x": x})
    assert got.argmax(1).tolist() == [0, 2, 0, 2]
    assert np.array_equal(np.sort(got, 1), np.tile(np.float32([-1.5, -1.5, 2]), (4, 1)))


def test_one_hot_as_pytorch_writes_it(tmp_path: Path) -> None:
    """Integers, cast to numbers behind it; of positions that are computed and moved on."""
    nodes = [
        node("ArgMax", "x", "a", axis=1, keepdims=0),
        node("Add", "a one", "b"),
        node("OneHot", "b d v", "h"),
        node("Cast", "h", "f", to=1),
        node("Mul", "f f", "y"),
    ]
    constants = {"one": np.array(1), "d": np.array(6), "v": np.array([0, 1])}
    proto = model(nodes, {"x": [3, 5]}, ["y"], constants)
    agrees(save(proto, tmp_path))


@pytest.mark.parametrize(
    ("opset", "axis", "shape"),
    [
        *((13, -1, (2, 3, 4)), (13, 0, (4, 3)), (13, 1, (2, 5, 3))),
        *((11, 1, (2, 3, 4)), (9, 2, (2, 3, 4))),
    ],
)
def test_hardmax(opset: int, axis: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = save(
        model([node("Hardmax", "x", "y", axis=axis)], {"x": shape}, ["y"], opset=opset), tmp_path
    )
    agrees(path)
    x = np.zeros(shape, np.float32)  # the first of equal numbers
    (got,), (want,) = outputs(import_model(path), {"x": x}), runtime(path, {"x": x})
    assert np.array_equal(got, want)


def test_one_hot_that_is_refused(tmp_path: Path) -> None:
    for depth, values, message in (
        (0, VALUES, r"depth is \(0,\), not a number from 1 to 16777216"),
        (3, np.ones(3, np.float32), "the values are not two constants"),
        (3, np.ones(2), "the values are float64; float32 and integers are supported"),
    ):
        constants = {"d": np.array(depth), "v": values}
        proto = model([node("OneHot", "x d v", "y")], {"x": [2, 4]}, ["y"], constants)
        with pytest.raises(UnsupportedModelError, match=message):
            import_model(save(proto, tmp_path))
