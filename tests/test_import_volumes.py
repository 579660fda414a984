"""Convolutions and pools over three axes, written as ones over two: ONNX Runtime and PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import plans
import pytest
import torch
from board import lane
from cli_run import Cli
from onnx_files import agrees, floats, model, node, outputs, save
from test_c_backend import needs_gcc, reference, samples
from test_export import exported, learn, planned
from test_import_index import equals_torch, gradient, imported

from odt_plan.backends.c import emit_c
from odt_plan.ir.autodiff import build_training
from odt_plan.ir.errors import UnsupportedModelError
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.training import TrainingSpec

RNG = np.random.default_rng(0)
F = torch.nn.functional
WINDOW: dict[str, Any] = {"kernel_shape": [2, 3, 2], "strides": [2, 1, 2]}


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("MaxPool", WINDOW),
        ("MaxPool", WINDOW | {"pads": [1, 1, 0, 0, 1, 1]}),
        ("MaxPool", WINDOW | {"ceil_mode": 1}),
        ("MaxPool", WINDOW | {"dilations": [2, 1, 3]}),
        ("MaxPool", {"kernel_shape": [2, 1, 2]}),  # the axis in the middle is left alone
        ("MaxPool", {"kernel_shape": [3, 3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2, 2]}),
        ("AveragePool", WINDOW),
        ("AveragePool", WINDOW | {"pads": [1, 1, 0, 0, 1, 1]}),
        ("AveragePool", WINDOW | {"pads": [1, 1, 0, 0, 1, 1], "count_include_pad": 1}),
        ("AveragePool", WINDOW | {"ceil_mode": 1}),
        ("LpPool", WINDOW),
    ],
)
def test_pool(op: str, attrs: dict[str, Any], tmp_path: Path) -> None:
    """Of volumes whose three axes all differ."""
    proto = model([node(op, "x", "y", **attrs)], {"x": [2, 3, 5, 6, 9]}, ["y"], opset=19)
    graph = agrees(save(proto, tmp_path), batch=2)
    pools = {"LpPool": "AveragePool"}.get(op, op)
    assert [n.op for n in graph.nodes].count(pools) == 2


def test_gradients_of_pools(tmp_path: Path) -> None:
    """Also where maxima are equal: the first one has it."""
    shape = (1, 2, 4, 6, 4)
    attrs: dict[str, Any] = {"kernel_shape": [2, 3, 2], "strides": [2, 3, 2]}
    for x in (RNG.standard_normal(shape), RNG.integers(0, 2, shape).astype(np.float64)):
        graph = imported(tmp_path, "MaxPool", shape, **attrs)
        equals_torch(graph, x, lambda t: F.max_pool3d(t, (2, 3, 2)))
        graph = imported(tmp_path, "AveragePool", shape, **attrs)
        equals_torch(graph, x, lambda t: F.avg_pool3d(t, (2, 3, 2)))


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((5, 4, 3, 3, 2), {}),
    "strides and pads": ((5, 4, 3, 3, 2), {"strides": [2, 1, 2], "pads": [1, 1, 0, 2, 0, 1]}),
    "dilations": ((5, 4, 2, 3, 2), {"dilations": [3, 1, 2], "pads": [0, 1, 0, 0, 1, 0]}),
    "groups": ((6, 2, 3, 2, 2), {"group": 2, "strides": [2, 2, 1]}),
    "depthwise": ((4, 1, 3, 3, 3), {"group": 4, "auto_pad": "SAME_LOWER"}),
    "planes apart": ((5, 4, 1, 3, 3), {"pads": [0, 1, 1, 0, 1, 1]}),
    "every second plane": ((5, 4, 1, 3, 3), {"strides": [2, 1, 1]}),
    "pads at the end": ((5, 4, 2, 3, 2), {"pads": [0, 0, 0, 1, 0, 1]}),
    "points": ((5, 4, 1, 1, 1), {}),
}


@pytest.mark.parametrize("form", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_convolution(form: str, bias: bool, tmp_path: Path) -> None:
    shape, attrs = CONVOLUTIONS[form]
    constants = {"w": floats(RNG, *shape), "b": floats(RNG, shape[0])}
    n = node("Conv", "x w b" if bias else "x w", "y", **attrs)
    used = {k: a for k, a in constants.items() if k in n.input}
    path = save(model([n], {"x": [2, 4, 5, 6, 7]}, ["y"], used), tmp_path)
    graph = agrees(path, batch=2)
    assert [m.op for m in graph.nodes].count("Conv") == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_a_convolution(groups: int, tmp_path: Path) -> None:
    x, w = RNG.standard_normal((2, 4, 5, 4, 6)), floats(RNG, 6, 4 // groups, 3, 2, 3)
    b = floats(RNG, 6)
    attrs: dict[str, Any] = {"group": groups, "strides": [2, 1, 2], "pads": [1] * 6}

    def function(t: Any) -> Any:
        return F.conv3d(t, weight, offset, (2, 1, 2), 1, groups=groups)

    weight, offset = (torch.tensor(a.astype("f8"), requires_grad=True) for a in (w, b))
    equals_torch(imported(tmp_path, "Conv", x.shape, w, b, **attrs), x, function)
    graph = imported(tmp_path, "Conv", x.shape, w, b, **attrs)
    dy = np.random.default_rng(5).uniform(-1, 1, graph.outputs[0].type.shape)
    for name, leaf in (("c0", weight), ("c1", offset)):
        graph = imported(tmp_path, "Conv", x.shape, w, b, **attrs)
        got = gradient(graph, dy, {"x": x}, name)
        assert leaf.grad is not None
        np.testing.assert_allclose(got.reshape(leaf.shape), leaf.grad, rtol=1e-8, atol=1e-10)


def test_learned_weights_of_volumes_go_back(odt: Cli, tmp_path: Path) -> None:
    """They keep the five axes that the file's node reads."""
    nodes = [
        node("Conv", "x w b", "c", pads=[1] * 6),
        node("Relu", "c", "r"),
        node("MaxPool", "r", "p", kernel_shape=[2, 2, 2], strides=[2, 2, 2]),
        node("Flatten", "p", "f"),
        node("Gemm", "f v", "y"),
    ]
    data = {"w": floats(RNG, 4, 2, 3, 3, 3), "b": floats(RNG, 4), "v": floats(RNG, 32, 3)}
    planned(odt, save(model(nodes, {"x": [1, 2, 4, 4, 4]}, ["y"], data), tmp_path))
    tuned = exported(odt, learn())
    assert tuned.changed == {"w", "b", "v"}
    assert tuned.data("w").shape == (4, 2, 3, 3, 3)


@needs_gcc
def test_volumes_train_in_c(tmp_path: Path) -> None:
    """The bits of NumPy, also of the largest entries and of functions behind them."""
    nodes = [
        node("Conv", "x w b", "c", pads=[1] * 6),
        node("AveragePool", "c", "p", kernel_shape=[2, 2, 2], strides=[2, 2, 2]),
        node("TopK", "p k", "t i", axis=1),
        node("Flatten", "t", "f"),
        node("Tan", "f", "g"),
        node("Asinh", "g", "h"),
        node("Shrink", "h", "s", lambd=0.1, bias=0.1),
        node("Gemm", "s v", "y"),
    ]
    data = {"w": floats(RNG, 4, 2, 3, 3, 3) / 8, "b": floats(RNG, 4), "v": floats(RNG, 16, 3)}
    data["k"] = np.array([2])
    path = save(model(nodes, {"x": [1, 2, 4, 4, 4]}, ["y"], data), tmp_path)
    forward = import_model(path)
    training = build_training(forward, TrainingSpec(), plans.whole(forward))
    plan = plans.keep_all(training)
    program = lane.build_host(tmp_path, emit_c(plan, training, tmp_path)[0].stem)
    result = lane.run_host(program, lane.training_input(*samples(training, 3), 0.05))
    assert result.exit_code == 0, result.stdout
    assert result.files["output.bin"] == reference(plan, training, 3, 0.05)


def test_what_does_not_fit(tmp_path: Path) -> None:
    for weight, attrs, message in (
        ((2, 2, 7, 1, 1), {}, "a window of 7 planes does not fit"),
        ((2, 2, 2, 2, 2), {"kernel_shape": [2, 2, 3]}, r"kernel_shape \(2, 2, 3\) is not"),
        ((2, 2, 2, 2), {}, "do not fit a convolution"),
    ):
        proto = model(
            [node("Conv", "x w", "y", **attrs)],
            {"x": [1, 2, 5, 5, 5]},
            ["y"],
            {"w": floats(RNG, *weight)},
        )
        with pytest.raises(UnsupportedModelError, match=message):
            import_model(save(proto, tmp_path))


def test_four_axes(tmp_path: Path) -> None:
    """No runtime has them: a maximum over all is a maximum."""
    proto = model(
        [node("MaxPool", "x", "y", kernel_shape=[2, 2, 2, 3], strides=[2, 2, 2, 3])],
        {"x": [1, 1, 2, 4, 2, 6]},
        ["y"],
    )
    x = floats(RNG, 1, 1, 2, 4, 2, 6)
    (y,) = outputs(import_model(save(proto, tmp_path)), {"x": x})
    want = x.reshape(1, 1, 1, 2, 2, 2, 1, 2, 2, 3).max((3, 5, 7, 9))
    assert np.array_equal(y, want)
