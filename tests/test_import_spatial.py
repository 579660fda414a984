"""Spatial operators and normalizations of files: the imported graph equals onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_files import Array, agrees, floats, model, node, outputs, save

from odt_plan.ir.errors import UnsupportedModelError
from odt_plan.ir.onnx_import import import_model

RNG = np.random.default_rng(0)


def _imported(
    tmp_path: Path,
    nodes: list[onnx.NodeProto],
    shape: tuple[int, ...],
    constants: dict[str, Array] | None = None,
    opset: int = 17,
    **options: Any,
) -> list[str]:
    """Operators of the graph, after its results were compared."""
    proto = model(nodes, {"x": shape}, ["y"], constants, opset=opset)
    if opset > 21:
        proto.ir_version = 10
    graph = agrees(save(proto, tmp_path), **options)
    return [n.op for n in graph.nodes]


# -- transposed convolution ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "weight", "attrs"),
    [
        ((1, 4, 5, 6), (4, 3, 3, 3), {}),
        ((2, 4, 5, 6), (4, 3, 2, 4), {"strides": [2, 3], "pads": [0, 1, 1, 2]}),
        ((1, 4, 5, 6), (4, 3, 3, 3), {"strides": [2, 2], "output_padding": [1, 1], "group": 2}),
        ((1, 4, 5, 6), (4, 1, 3, 3), {"dilations": [2, 1], "pads": [1, 1, 1, 1], "group": 4}),
        ((1, 4, 5, 6), (4, 3, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        ((1, 4, 5, 6), (4, 3, 4, 4), {"strides": [3, 3], "auto_pad": "SAME_LOWER"}),
        ((1, 4, 5, 6), (4, 3, 3, 3), {"strides": [2, 2], "output_shape": [10, 12]}),
        ((1, 4, 5, 6), (4, 3, 3, 3), {"strides": [2, 2], "auto_pad": "VALID"}),
        ((1, 4, 7), (4, 3, 3), {"strides": [2], "pads": [1, 0], "output_padding": [1]}),
    ],
)
def test_transposed_convolution(
    tmp_path: Path, shape: tuple[int, ...], weight: tuple[int, ...], attrs: dict[str, Any]
) -> None:
    constants = {
        "w": floats(RNG, *weight),
        "b": floats(RNG, weight[1] * attrs.get("group", 1)),
    }
    nodes = [node("ConvTranspose", "x w b", "y", **attrs)]
    assert _imported(tmp_path, nodes, shape, constants) == ["ConvTranspose"]


@pytest.mark.parametrize("group", [1, 2])
def test_batch_normalization_is_folded_into_a_transposed_convolution(
    tmp_path: Path, group: int
) -> None:
    nodes = [
        node("ConvTranspose", "x w", "a", strides=[2, 2], group=group),
        node("BatchNormalization", "a s b m v", "y"),
    ]
    constants = {k: floats(RNG, 3 * group) for k in "sbm"}
    constants |= {"v": np.abs(floats(RNG, 3 * group)) + 1, "w": floats(RNG, 4, 3, 2, 2)}
    assert _imported(tmp_path, nodes, (1, 4, 3, 3), constants) == ["ConvTranspose"]


# -- pools of powers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "attrs"),
    [
        ((1, 3, 7, 8), {"kernel_shape": [2, 3]}),
        ((2, 3, 7, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 0, 1]}),
        ((1, 3, 7, 8), {"kernel_shape": [3, 3], "strides": [2, 3], "auto_pad": "SAME_LOWER"}),
        ((1, 2, 9), {"kernel_shape": [4], "strides": [3]}),
    ],
)
@pytest.mark.parametrize("p", [1, 2, 3])
def test_pool_of_powers(
    tmp_path: Path, shape: tuple[int, ...], attrs: dict[str, Any], p: int
) -> None:
    ops = _imported(tmp_path, [node("LpPool", "x", "y", p=p, **attrs)], shape)
    roots = {1: ["Mul"], 2: ["Mul", "Relu", "Sqrt"], 3: ["Mul", "Relu", "Pow"]}
    powers = {1: ["Abs"], 2: ["Mul"], 3: ["Abs", "Pow"]}
    assert ops == [*powers[p], "AveragePool", *roots[p]]


@pytest.mark.parametrize("size", range(5, 10))
def test_pool_of_powers_rounds_up(tmp_path: Path, size: int) -> None:
    """Windows that reach beyond the end, which the runtime counts otherwise: against PyTorch."""
    torch = pytest.importorskip("torch")
    attrs: dict[str, Any] = {"kernel_shape": [3, 2], "strides": [2, 3], "ceil_mode": 1}
    proto = model([node("LpPool", "x", "y", **attrs)], {"x": [1, 2, size, 9]}, ["y"], opset=18)
    x = floats(RNG, 1, 2, size, 9)
    (got,) = outputs(import_model(save(proto, tmp_path)), {"x": x})
    squares = torch.nn.functional.avg_pool2d(
        torch.tensor(np.pad(x, ((0, 0), (0, 0), (0, 4), (0, 4))) ** 2), (3, 2), (2, 3)
    )
    _, _, high, wide = got.shape
    want = np.sqrt(6 * squares.numpy())[..., :high, :wide]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    pooled = torch.nn.functional.max_pool2d(torch.tensor(x), (3, 2), (2, 3), ceil_mode=True)
    assert got.shape == pooled.shape


@pytest.mark.parametrize("p", [1, 2, 3])
def test_global_pool_of_powers(tmp_path: Path, p: int) -> None:
    expected = {
        1: ["Reshape", "ReduceL1", "Reshape"],
        2: ["Reshape", "ReduceL2", "Reshape"],
        3: ["Reshape", "Abs", "Pow", "ReduceSum", "Reshape", "Relu", "Pow"],
    }
    ops = _imported(tmp_path, [node("GlobalLpPool", "x", "y", p=p)], (2, 3, 5, 4))
    assert [o for o in ops if o != "Reshape"] == [o for o in expected[p] if o != "Reshape"]


def test_pools_of_powers_that_are_refused(tmp_path: Path) -> None:
    for op, attrs in (("LpPool", {"kernel_shape": [2, 2]}), ("GlobalLpPool", {})):
        proto = model([node(op, "x", "y", p=0, **attrs)], {"x": [1, 1, 4, 4]}, ["y"])
        with pytest.raises(UnsupportedModelError, match="p is 0; only norms of order 1 and above"):
            import_model(save(proto, tmp_path))
        proto = model([node(op, "x", "y", **attrs)], {"x": [4]}, ["y"])
        with pytest.raises(UnsupportedModelError, match="has no spatial axis"):
            import_model(save(proto, tmp_path))


# -- normalizations --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6, 7)])
def test_normalizations_of_groups(tmp_path: Path, shape: tuple[int, ...]) -> None:
    constants = {
        "s": floats(RNG, 6),
        "b": floats(RNG, 6),
        "s3": floats(RNG, 3),
        "b3": floats(RNG, 3),
    }
    cases = [
        (node("InstanceNormalization", "x s b", "y", epsilon=1e-3), 17),
        (node("GroupNormalization", "x s3 b3", "y", num_groups=3), 18),
        (node("GroupNormalization", "x s b", "y", num_groups=3, epsilon=1e-3), 21),
    ]
    for n, opset in cases:
        kept = {k: constants[k] for k in n.input if k in constants}
        assert _imported(tmp_path, [n], shape, kept, opset) == ["GroupNormalization"]


def test_other_normalizations(tmp_path: Path) -> None:
    shape = (2, 6, 4, 5)
    plain = ["Transpose", "Reshape", None, "Reshape", "Transpose"]
    for axis in (1, 2, -1):
        ops = _imported(tmp_path, [node("LpNormalization", "x", "y", axis=axis)], shape)
        assert ops == [o or "LpNormalization" for o in (plain if axis > 0 else plain[1:-1])]
        ops = _imported(tmp_path, [node("LpNormalization", "x", "y", axis=axis, p=1)], shape)
        assert ops == ["Abs", "ReduceMean", "Mul", "Clip", "Div"]
    for axes in ([0, 2, 3], [2, 3], [1, 2, 3]):
        ops = _imported(tmp_path, [node("MeanVarianceNormalization", "x", "y", axes=axes)], shape)
        assert ops.count("GroupNormalization") == 1
    bare = model([node("MeanVarianceNormalization", "x", "y")], {"x": shape}, ["y"])
    graph = import_model(save(bare, tmp_path))  # the runtime knows no default
    x = floats(RNG, *shape)
    want = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(outputs(graph, {"x": x})[0], want, rtol=1e-5, atol=1e-5)
    scale = {"s": floats(RNG, 4, 5)}
    rms = [node("RMSNormalization", "x s", "y", axis=2, epsilon=1e-3)]
    assert _imported(tmp_path, rms, shape, scale, 23) == ["RMSNormalization"]
    for size in (1, 5, 13):
        lrn = [node("LRN", "x", "y", size=size, alpha=0.5, beta=0.6, bias=1.5)]
        assert _imported(tmp_path, lrn, shape) == ["LRN"]


@pytest.mark.parametrize("affine", [True, False])
def test_group_normalization_as_exporters_write_it(tmp_path: Path, affine: bool) -> None:
    """PyTorch's exporters at any opset: instances of groups, then a number per channel."""
    nodes = [
        node("Reshape", "x rows", "a"),
        node("InstanceNormalization", "a ones zeros", "b"),
        node("Reshape", "b whole", "c" if affine else "y"),
    ]
    constants = {
        "rows": np.array([0, 3, -1]),
        "whole": np.array([2, 6, 4, 5]),
        "ones": np.ones(3, np.float32),
        "zeros": np.zeros(3, np.float32),
    }
    if affine:
        nodes += [node("Mul", "c s", "d"), node("Add", "b1 d", "y")]
        constants |= {"s": floats(RNG, 6, 1, 1), "b1": floats(RNG, 1, 6, 1, 1)}
    proto = model(nodes, {"x": (2, 6, 4, 5)}, ["y"], constants)
    graph = agrees(save(proto, tmp_path))
    assert [n.op for n in graph.nodes] == ["GroupNormalization"]
    assert set(graph.constants) == ({"s", "b1"} if affine else set())
    constants["ones"][1] = 2.0  # then each group has a scale of its own
    proto = model(nodes, {"x": (2, 6, 4, 5)}, ["y"], constants)
    assert len(agrees(save(proto, tmp_path)).nodes) == len(nodes)


@pytest.mark.parametrize("inverse", [True, False])
def test_rms_normalization_as_exporters_write_it(tmp_path: Path, inverse: bool) -> None:
    nodes = [
        node("Pow", "x two", "a"),
        node("ReduceMean", "a", "b", axes=[-1]),
        node("Add", "b eps", "c"),
        node("Sqrt", "c", "d"),
        *(
            [node("Reciprocal", "d", "e"), node("Mul", "x e", "f")]
            if inverse
            else [node("Div", "x d", "f")]
        ),
        node("Mul", "f s", "y"),
    ]
    numbers = {"two": np.array(2, np.float32), "eps": np.array(1e-3, np.float32)}
    constants = {**numbers, "s": floats(RNG, 5)}
    assert _imported(tmp_path, nodes, (2, 3, 5), constants) == ["RMSNormalization"]
    wide = {**numbers, "s": floats(RNG, 3, 5)}  # no scale of the rows: it stays a product
    assert len(_imported(tmp_path, nodes, (2, 3, 5), wide)) > 1


@pytest.mark.parametrize("axis", [-1, 1])
def test_rms_normalization_without_a_scale(axis: int, tmp_path: Path) -> None:
    """As PyTorch writes it at opset 23: ones of the input's shape."""
    nodes = [node("ConstantOfShape", "shape", "ones", value=helper.make_tensor("v", 1, [1], [1]))]
    nodes.append(node("RMSNormalization", "x ones", "y", axis=axis, epsilon=0.01))
    proto = model(nodes, {"x": [2, 3, 5]}, ["y"], {"shape": np.array([2, 3, 5])}, opset=23)
    graph = agrees(save(proto, tmp_path))
    assert [n.op for n in graph.nodes] == ["Reshape", "GroupNormalization", "Reshape"]
    assert not graph.constants


# -- pools -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["edge", "reflect", "wrap"])
def test_pads_of_the_tensor_itself(mode: str, tmp_path: Path) -> None:
    """Each axis with its own ends; nothing where there is nothing to pad."""
    for pads in ([0, 0, 1, 2, 0, 1, 2, 0], [0] * 8):
        nodes = [node("Pad", "x p", "z", mode=mode), node("Neg", "z", "y")]
        proto = model(nodes, {"x": [1, 3, 4, 5]}, ["y"], {"p": np.array(pads)}, opset=19)
        ops = [n.op for n in agrees(save(proto, tmp_path)).nodes]
        assert ops == ["Gather"] * (3 if any(pads) else 0) + ["Neg"]


#: Kernel, strides and begins of three axes; whether two are left.
POOLS: dict[str, tuple[list[int], list[int], list[int], bool]] = {
    "channels of LocalResponseNorm": ([5, 1, 1], [1, 1, 1], [2, 0, 0], True),
    "the last two": ([1, 2, 3], [1, 2, 1], [0, 1, 1], True),
    "the last": ([1, 1, 2], [1, 1, 2], [0, 0, 0], True),
    "the outer ones": ([3, 1, 2], [2, 1, 2], [1, 0, 0], False),
    "a stride alone": ([2, 1, 1], [1, 2, 1], [0, 0, 0], False),
    "all": ([2, 2, 2], [2, 2, 2], [0, 0, 0], False),
}


@pytest.mark.parametrize("form", POOLS)
@pytest.mark.parametrize("op", ["AveragePool", "MaxPool"])
def test_pools_of_three_axes(op: str, form: str, tmp_path: Path) -> None:
    """Those that leave one axis alone are pools of two; others are two pools."""
    kernel, strides, begins, one = POOLS[form]
    attrs = {"kernel_shape": kernel, "strides": strides, "pads": begins + begins}
    proto = model([node(op, "x", "y", **attrs)], {"x": [2, 3, 6, 4, 5]}, ["y"])
    ops = [n.op for n in agrees(save(proto, tmp_path)).nodes]
    assert ops == ["Reshape", op, "Reshape", *([] if one else [op, "Reshape"])]


@pytest.mark.parametrize(
    ("shape", "pools"),
    [((2, 3, 4, 5), 1), ((1, 2, 17, 16), 2), ((1, 2, 600), 2), ((1, 1, 300, 3), 3)],
)
def test_global_max_pool(tmp_path: Path, shape: tuple[int, ...], pools: int) -> None:
    ops = _imported(tmp_path, [node("GlobalMaxPool", "x", "y")], shape)
    assert ops == ["MaxPool"] * pools


# -- Resize ----------------------------------------------------------------------------------------

MODES = [
    {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    {"mode": "nearest", "coordinate_transformation_mode": "half_pixel"},
    {"mode": "nearest", "coordinate_transformation_mode": "half_pixel", "nearest_mode": "ceil"},
    {"mode": "nearest", "nearest_mode": "round_prefer_ceil"},
    {"mode": "linear", "coordinate_transformation_mode": "asymmetric"},
    {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
    {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
]


@pytest.mark.parametrize("attrs", MODES, ids=lambda a: "-".join(a.values()))
def test_resize(tmp_path: Path, attrs: dict[str, str]) -> None:
    constants = {
        "double": np.array([1, 1, 2, 2], np.float32),
        "half": np.array([1, 1, 0.5, 2], np.float32),
        "sizes": np.array([1, 2, 7, 1], np.int64),
        "wide": np.array([1, 2, 4, 9], np.int64),
    }
    for text in ("x - double", "x - half", "x - - sizes", "x - - wide"):
        kept = {k: constants[k] for k in text.split() if k in constants}
        ops = _imported(tmp_path, [node("Resize", text, "y", **attrs)], (1, 2, 4, 6), kept, 13)
        assert ops == ["Resize"]


def test_resize_in_its_other_forms(tmp_path: Path) -> None:
    scales = {"s": np.array([1, 2, 3, 1], np.float32)}
    old = [node("Upsample", "x s", "y", mode="linear")]
    shape = (1, 4, 3, 5)  # of which the last axis keeps its size
    nearest = [node("Upsample", "x s", "y", mode="nearest")]
    assert _imported(tmp_path, nearest, shape, scales, 9) == ["Transpose", "Resize", "Transpose"]
    two = {"s": np.array([1, 1, 2, 3], np.float32)}
    assert _imported(tmp_path, old, shape, two, 9) == ["Resize"]
    assert _imported(tmp_path, [node("Resize", "x s", "y", mode="linear")], shape, two, 10) == [
        "Resize"
    ]
    attribute = [node("Upsample", "x", "y", scales=[1.0, 1.0, 2.0, 2.0])]
    assert _imported(tmp_path, attribute, shape, None, 8) == ["Resize"]
    axes = {"z": np.array([6, 9], np.int64)}
    for policy in ("stretch", "not_larger", "not_smaller"):
        attrs: dict[str, Any] = {"axes": [3, 2], "keep_aspect_ratio_policy": policy}
        resize = [node("Resize", "x - - z", "y", mode="linear", **attrs)]
        assert _imported(tmp_path, resize, shape, axes, 18) == ["Resize"]
    same = {"s": np.ones(4, np.float32)}
    nodes = [node("Resize", "x - s", "a"), node("Relu", "a", "y")]
    assert _imported(tmp_path, nodes, shape, same, 13) == ["Relu"]
    line = {"s": np.array([1, 1, 3], np.float32)}
    assert _imported(
        tmp_path, [node("Resize", "x - s", "y", mode="linear")], (1, 2, 4), line, 13
    ) == ["Resize"]


@pytest.mark.parametrize(
    ("attrs", "operand", "opset", "reason"),
    [
        ({"mode": "cubic"}, [1, 1, 2, 2], 13, "mode cubic is not supported"),
        ({"mode": "linear", "antialias": 1}, [1, 1, 0.5, 0.5], 18, "antialias is not supported"),
        ({"mode": "nearest"}, [2, 1, 2, 2], 13, "3 axes change their size"),
        (
            {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
            [1, 1, 0.6, 1],
            13,
            "align_corners with a scale of 0.6 for 4 elements",
        ),
        (
            {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"},
            [1, 1, 2, 2],
            13,
            "tf_crop_and_resize is not supported",
        ),
    ],
)
def test_resizing_that_is_refused(
    tmp_path: Path, attrs: dict[str, Any], operand: list[float], opset: int, reason: str
) -> None:
    constants = {"s": np.array(operand, np.float32)}
    nodes = [node("Resize", "x - s", "y", **attrs)]
    path = save(model(nodes, {"x": (1, 2, 4, 4)}, ["y"], constants, opset=opset), tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason):
        import_model(path)
