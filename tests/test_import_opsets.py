"""Operators, opsets, windows and random networks: the imported graph equals onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx_files import agrees, floats, model, node, save

Array = NDArray[Any]


def _opset_cases(opset: int) -> list[tuple[list[onnx.NodeProto], dict[str, Array]]]:
    """The same operators in the form that the opset has for them."""
    i64 = np.int64
    ints: dict[str, Array] = {}

    def split(op: str, text: str, out: str, since: int, **lists: list[int]) -> onnx.NodeProto:
        if opset < since:
            return node(op, text, out, **lists)
        names = []
        for key, value in lists.items():
            name = f"{op}.{key}"
            ints[name] = np.array(value, i64)
            names.append(name)
        return node(op, " ".join([text, *names]), out)

    cases = [
        [node("Softmax", "x", "y", axis=1)],
        [node("Softmax", "x", "y", axis=2)],
        [node("Softmax", "x", "y")],
        [split("ReduceMean", "x", "y", 18, axes=[2, -1])],
        [split("Unsqueeze", "x", "a", 13, axes=[1]), split("Squeeze", "a", "y", 13, axes=[1])],
        [split("Slice", "x", "y", 10, starts=[1, -3], ends=[9, -1], axes=[1, 2])],
        [split("Pad", "x", "y", 11, pads=[0, 0, 1, 2, 0, 0, 0, 3])],
        [node("BatchNormalization", "x s b m v", "y", epsilon=1e-3)],
        [node("Dropout", "x", "a"), node("Identity", "a", "y")],
        [node("MaxPool", "x", "y", kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_LOWER")],
        [
            node(
                "AveragePool", "x", "y", kernel_shape=[3, 3], pads=[1, 0, 1, 2], count_include_pad=1
            )
        ],
        [node("Conv", "x w", "y", auto_pad="SAME_UPPER", strides=[2, 3], group=2)],
        [node("Flatten", "x", "a", axis=2), node("Gemm", "a g h", "y", alpha=0.5, transB=1)],
    ]
    for i, at in enumerate((np.array(2), np.array([-1, 0, 0, 1]), np.array([[0, 2], [3, 1]]))):
        ints[f"at{i}"] = at
        cases.append([node("Gather", f"x at{i}", "y", axis=1)])
    if opset >= 17:
        cases += [
            [node("LayerNormalization", "x s7 b7", "y", epsilon=1e-3)],
            [node("LayerNormalization", "x s57", "y", axis=2)],
            [node("LayerNormalization", "x s57 b7", "y", axis=-2)],
            [node("LayerNormalization", "x s157 one", "y", axis=-2)],
        ]
    if opset >= 20:
        cases.append([node("Gelu", "x", "y", approximate="tanh")])
    if opset < 11:
        cases.append([node("Clip", "x", "y", min=-0.5, max=0.7)])
    else:
        cases.append([node("Clip", "x - high", "y")])
    rng = np.random.default_rng(1)
    constants = {
        "w": floats(rng, 6, 2, 3, 3),
        "g": floats(rng, 3, 35),
        "h": floats(rng, 3),
        "high": np.array(0.3, np.float32),
        "s": floats(rng, 4),
        "b": floats(rng, 4),
        "m": floats(rng, 4),
        "v": np.abs(floats(rng, 4)) + 1,
        "s7": floats(rng, 7),
        "b7": floats(rng, 7),
        "s57": floats(rng, 5, 7),
        "s157": floats(rng, 1, 5, 7),
        "one": floats(rng, 1),
        **ints,
    }
    return [(nodes, constants) for nodes in cases]


@pytest.mark.parametrize("opset", [8, 9, 10, 11, 12, 13, 14, 17, 18, 21])
def test_every_opset_means_the_same_to_runtime(tmp_path: Path, opset: int) -> None:
    for nodes, constants in _opset_cases(opset):
        used = {i for n in nodes for i in n.input}
        kept = {k: a for k, a in constants.items() if k in used}
        agrees(save(model(nodes, {"x": [2, 4, 5, 7]}, ["y"], kept, opset=opset), tmp_path))


def test_random_windows_equal_runtime(tmp_path: Path) -> None:
    """Kernel, stride, dilation, pads, groups and rounding of 60 random windows."""
    rng = np.random.default_rng(3)
    for i in range(60):
        rank = int(rng.integers(1, 3))
        kernel, strides, dilations = (rng.integers(1, 4, rank).tolist() for _ in range(3))
        attrs: dict[str, Any] = {"strides": strides}
        if i % 3:
            attrs["auto_pad"] = ["SAME_UPPER", "SAME_LOWER", "VALID"][i // 3 % 3]
        else:
            attrs["pads"] = [int(rng.integers(0, k)) for k in kernel + kernel]
        sizes = rng.integers(8, 12, rank).tolist()
        group = int(rng.choice([1, 2, 4]))
        op = ("Conv", "MaxPool", "AveragePool")[i % 4 % 3]
        constants: dict[str, Array] = {}
        if op == "Conv":
            attrs["group"] = group
            if not attrs.get("auto_pad", "VALID").startswith(
                "SAME"
            ):  # the runtime can't dilate SAME
                attrs["dilations"] = dilations
            constants = {"w": floats(rng, 8, 4 // group, *kernel), "b": floats(rng, 8)}
        else:
            attrs["strides"] = [min(a, b) for a, b in zip(strides, kernel, strict=True)]
            attrs |= {"kernel_shape": kernel, "ceil_mode": int("pads" in attrs and i % 2)}
        nodes = [node(op, " ".join(["x", *constants]), "y", **attrs)]
        agrees(save(model(nodes, {"x": [2, 4, *sizes]}, ["y"], constants), tmp_path))


@pytest.mark.parametrize("c_shape", [(), (1,), (5,), (1, 5), (3, 1), (3, 5), (1, 1)])
@pytest.mark.parametrize("constant", [True, False])
def test_gemm_forms(tmp_path: Path, c_shape: tuple[int, ...], constant: bool) -> None:
    rng = np.random.default_rng(2)
    nodes = [node("Gemm", "a b c", "y", alpha=0.5, beta=-2.0, transA=1)]
    tensors = {"b": floats(rng, 4, 5), "c": floats(rng, *c_shape)}
    inputs: dict[str, Any] = {"a": [4, 3]}
    if not constant:
        inputs |= {k: list(v.shape) for k, v in tensors.items()}
        tensors = {}
    agrees(save(model(nodes, inputs, ["y"], tensors), tmp_path))


def test_weight_that_two_layers_share_keeps_both_meanings(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    nodes = [node("Gemm", "x w", "a", alpha=0.5), node("Gemm", "a w", "y", transB=1)]
    graph = agrees(save(model(nodes, {"x": [2, 4]}, ["y"], {"w": floats(rng, 4, 4)}), tmp_path))
    assert set(graph.constants) == {"w", "w/alpha"}


@pytest.mark.parametrize(
    "shapes", [((4,), (4, 3)), ((2, 4), (4,)), ((4,), (4,)), ((2, 3, 4), (4, 5))]
)
def test_matmul_ranks(tmp_path: Path, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    rng = np.random.default_rng(2)
    proto = model(
        [node("MatMul", "x w", "y")], {"x": list(shapes[0])}, ["y"], {"w": floats(rng, *shapes[1])}
    )
    agrees(save(proto, tmp_path))


def test_random_chains_equal_runtime(tmp_path: Path) -> None:
    """Forty random networks, with noise that exporters write between the layers."""
    rng = np.random.default_rng(11)
    for _ in range(40):
        nodes, constants, x, channels = [], {}, "x", 3
        for i in range(int(rng.integers(3, 9))):
            y = f"t{i}"
            kind = rng.choice(["conv", "norm", "act", "pool", "turn", "bias", "pad", "skip"])
            if kind == "conv":
                out = int(rng.integers(2, 6))
                constants[f"w{i}"] = floats(rng, out, channels, 3, 3) / 3
                nodes.append(node("Conv", f"{x} w{i}", y, pads=[1, 1, 1, 1]))
                channels = out
            elif kind == "norm":
                for k in "sbm":
                    constants[f"{k}{i}"] = floats(rng, channels)
                constants[f"v{i}"] = rng.uniform(0.5, 2, channels).astype(np.float32)
                nodes.append(node("BatchNormalization", f"{x} s{i} b{i} m{i} v{i}", y))
            elif kind == "act":
                nodes.append(
                    node(str(rng.choice(["Relu", "Tanh", "HardSwish", "LeakyRelu"])), x, y)
                )
            elif kind == "pool":
                nodes.append(node("MaxPool", x, y, kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
            elif kind == "turn":
                nodes.append(node("Transpose", x, f"{y}.n", perm=[0, 2, 3, 1]))
                nodes.append(node("Transpose", f"{y}.n", y, perm=[0, 3, 1, 2]))
            elif kind == "bias":
                constants[f"c{i}"] = floats(rng, channels, 1, 1)
                nodes.append(node("Add", f"c{i} {x}", y))
            elif kind == "pad":
                constants[f"p{i}"] = np.array([0, 0, 1, 0, 0, 0, 0, 1], np.int64)
                constants[f"w{i}"] = floats(rng, channels, channels, 2, 2) / 3
                nodes += [node("Pad", f"{x} p{i}", f"{y}.p"), node("Conv", f"{y}.p w{i}", y)]
            else:
                nodes += [node("Relu", x, f"{y}.r"), node("Add", f"{y}.r {x}", y)]
            x = y
        if rng.integers(2):
            constants["fw"] = floats(rng, channels * 36, 4) / 10
            nodes += [
                node("Transpose", x, "h", perm=[0, 2, 3, 1]),
                node("Flatten", "h", "f"),
                node("MatMul", "f fw", "y"),
            ]
        else:
            nodes += [node("GlobalAveragePool", x, "g"), node("Flatten", "g", "y")]
        path = save(model(nodes, {"x": ["N", 3, 6, 6]}, ["y"], constants), tmp_path)
        batch = int(rng.integers(1, 3))
        for fold in (True, False):
            agrees(path, batch, fold_batchnorm=fold)
