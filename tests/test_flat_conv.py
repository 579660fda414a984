"""1-D convolutions that files hold as 2-D ones of an axis of length 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_run import Cli
from onnx import NodeProto
from onnx_files import agrees, floats, model, node, runtime, save
from test_patterns import trained_alike

from odt_plan.ir.graph import Graph

RNG = np.random.default_rng(0)


def flat(folder: Path, nodes: list[NodeProto], data: dict[str, Any], steps: int = 9) -> Path:
    used = {i for n in nodes for i in n.input}
    data = {k: v for k, v in data.items() if k in used}
    return save(model(nodes, {"x": ["n", 4, steps]}, ["y"], data), folder)


def convolution(axis: int, taps: int = 3, group: int = 1, **attrs: Any) -> tuple[Any, Any]:
    """A node from ``u`` to ``c``, and its constants."""
    kernel = (1, taps) if axis == 2 else (taps, 1)
    data = {"a": np.array([axis]), "w": floats(RNG, 8, 4 // group, *kernel), "b": floats(RNG, 8)}
    return node("Conv", "u w b", "c", group=group, **attrs), data


FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "rows": (2, {}),
    "columns": (3, {}),
    "causal": (2, {"pads": [0, 2, 0, 0]}),
    "padded columns": (3, {"pads": [1, 0, 2, 0]}),
    "strides": (2, {"strides": [1, 2]}),
    "strides of the added axis": (2, {"strides": [3, 2], "kernel_shape": [1, 3]}),
    "dilations": (3, {"dilations": [2, 1]}),
    "groups": (2, {"group": 4}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("between", [(), ("Relu",), ("Tanh", "LeakyRelu")])
def test_becomes_one_node(form: str, between: tuple[str, ...], tmp_path: Path) -> None:
    """The values of ONNX Runtime, and the same training as of the parts."""
    axis, attrs = FORMS[form]
    conv, data = convolution(axis, **attrs)
    names = ["c", *(f"m{i}" for i in range(len(between)))]
    inner = [node(op, names[i], names[i + 1]) for i, op in enumerate(between)]
    last = node("Squeeze", f"{names[-1]} a", "s")
    nodes = [node("Unsqueeze", "x a", "u"), conv, *inner, last, node("Softsign", "s", "y")]
    path = flat(tmp_path, nodes, data)
    graph = agrees(path)
    assert [n.op for n in graph.nodes] == ["Conv", *between, "Softsign"]
    assert len(graph.constants["w"].shape) == 3
    trained_alike(path, graph, {"w", "b"})


def test_what_stands_around_it_finds_its_neighbour(tmp_path: Path, odt: Cli) -> None:
    """A bias behind the second view becomes the convolution's, and both go back into the file."""
    conv, data = convolution(2)
    conv.input.remove("b")
    data["b"] = data["b"].reshape(8, 1)
    nodes = [
        node("Unsqueeze", "x a", "u"),
        conv,
        node("Squeeze", "c a", "s"),
        node("Add", "s b", "d"),
        node("Relu", "d", "r"),
        node("GlobalAveragePool", "r", "g"),
        node("Flatten", "g", "y"),
    ]
    path = flat(tmp_path, nodes, data)
    graph = agrees(path)
    ops = [n.op for n in graph.nodes if n.op != "Reshape"]
    assert ops == ["Conv", "Relu", "GlobalAveragePool"]
    assert len(graph.nodes[0].inputs) == 3
    limits = ("--ram", "64KB", "--flash", "1MB", "--loss", "mse", "--train", "all", "-o", "out")
    assert odt(path, *limits).code == 0
    np.savez("d.npz", x=floats(RNG, 20, 4, 9), y=floats(RNG, 20, 8))
    plan = Path("out") / "plan.json"
    assert odt("run", plan, "--data", "d.npz", "--lr", "0.1", "--save", "l.npz", "-q").code == 0
    done = odt("export", plan, "l.npz", "-o", "tuned.onnx")
    assert done.code == 0, done.err
    given = {"x": floats(RNG, 1, 4, 9)}
    assert not np.array_equal(runtime(path, given)[0], runtime(Path("tuned.onnx"), given)[0])


LAST = {
    "turned": (
        ("t = Transpose x 0,2,1", "c = Conv t w3", "s = Transpose c 0,2,1"), ["Transpose"]
    ),
    "turned, then an axis": (
        ("t = Transpose x 0,2,1", "u = Unsqueeze t two", "c = Conv u w", "q = Squeeze c two",
         "s = Transpose q 0,2,1"), ["Transpose"]
    ),
    "an axis, then turned": (
        ("u = Unsqueeze x one", "t = Transpose u 0,3,1,2", "c = Conv t w",
         "q = Transpose c 0,2,3,1", "s = Squeeze q one"), ["Transpose"]
    ),
    "depthwise and pointwise": (
        ("u = Unsqueeze x one", "t = Transpose u 0,3,1,2", "d = Conv t dw", "c = Conv d pw",
         "q = Transpose c 0,2,3,1", "s = Squeeze q one"), ["Transpose", "Conv"]
    ),
    "upwards": (
        ("u = Unsqueeze x one", "t = Transpose u 0,3,1,2", "c = ConvTranspose t tw",
         "q = Transpose c 0,2,3,1", "s = Squeeze q one"), ["Transpose"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", LAST)
@pytest.mark.parametrize("batch", [1, 2])
def test_channels_last(form: str, batch: int, tmp_path: Path) -> None:
    """As Keras' Conv1D, SeparableConv1D, Conv1DTranspose: the bias finds its layer."""
    steps, before = LAST[form]
    attrs: dict[str, dict[str, Any]] = {
        "dw": {"group": 4}, "tw": {"strides": [1, 2], "output_padding": [0, 1]},
    }  # fmt: skip
    nodes = []
    for step in steps:
        result, _, op, *operands = step.split()
        if op == "Transpose":
            perm = [int(p) for p in operands.pop().split(",")]
            nodes.append(node(op, operands[0], result, perm=perm))
        else:
            nodes.append(node(op, " ".join(operands), result, **attrs.get(operands[-1], {})))
    nodes += [node("Add", "s b", "a"), node("Relu", "a", "r")]
    nodes.append(node("Transpose", "r", "y0", perm=[0, 2, 1]))
    data = {
        "one": np.array([1]), "two": np.array([2]), "b": floats(RNG, 8), "w3": floats(RNG, 8, 4, 3),
        "w": floats(RNG, 8, 4, 1, 3), "dw": floats(RNG, 4, 1, 1, 3), "pw": floats(RNG, 8, 4, 1, 1),
        "tw": floats(RNG, 4, 8, 1, 3),
    }  # fmt: skip
    used = {i for n in nodes for i in n.input}
    proto = model(nodes, {"x": [batch, 9, 4]}, ["y0"], {k: a for k, a in data.items() if k in used})
    path = save(proto, tmp_path)
    graph = agrees(path)
    conv = graph.nodes[-2]
    assert [n.op for n in graph.nodes] == [*before, conv.op, "Relu"]
    assert (len(conv.out.type.shape), len(conv.inputs)) == (3, 3)
    trained_alike(path, graph, used & {"b", "w", "w3", "dw", "pw", "tw"})


def test_tokens_that_are_turned_stay(tmp_path: Path) -> None:
    """Without a convolution a Transpose of three axes does not pass an Add."""
    nodes = [node("Tanh", "x", "t"), node("Transpose", "t", "s", perm=[0, 2, 1])]
    nodes += [node("Add", "s b", "a"), node("MatMul", "a m", "y")]
    data = {"b": floats(RNG, 4), "m": floats(RNG, 4, 3)}
    graph = agrees(save(model(nodes, {"x": [2, 4, 9]}, ["y"], data), tmp_path))
    assert [n.op for n in graph.nodes][:3] == ["Tanh", "Transpose", "Add"]


def stays(graph: Graph) -> None:
    (conv,) = (n for n in graph.nodes if n.op == "Conv")
    assert len(conv.out.type.shape) == 4


def test_what_is_really_of_two_axes_stays(tmp_path: Path) -> None:
    around = node("Unsqueeze", "x a", "u"), node("Squeeze", "c a", "y")
    conv, data = convolution(2, pads=[1, 0, 1, 0])  # rows of zeros beside
    data["w"] = floats(RNG, 8, 4, 3, 3)
    stays(agrees(flat(tmp_path, [around[0], conv, around[1]], data)))
    conv, data = convolution(2)
    square = node("Conv", "c w2", "d", pads=[1, 1, 1, 1])
    data["w2"] = floats(RNG, 8, 8, 3, 3)
    path = flat(tmp_path, [around[0], conv, square, node("Squeeze", "d a", "y")], data)
    assert [len(n.out.type.shape) for n in agrees(path).nodes if n.op == "Conv"] == [4, 4]
    split = node("Reshape", "x rows", "u")
    data |= {"rows": np.array([1, 4, 1, 9]), "w": floats(RNG, 8, 4, 1, 3)}
    two = [split, conv, node("Tanh", "c", "d"), node("Mul", "c d", "e")]
    stays(agrees(flat(tmp_path, [*two, node("Squeeze", "e a", "y")], data)))  # two nodes read it


def test_a_weight_of_two_convolutions_stays(tmp_path: Path) -> None:
    conv, data = convolution(2, pads=[0, 1, 0, 1])
    other = node("Conv", "u w", "e", pads=[0, 1, 0, 1])
    nodes = [node("Unsqueeze", "x a", "u"), conv, other, node("Squeeze", "c a", "f")]
    nodes += [node("Squeeze", "e a", "g"), node("Add", "f g", "y")]
    graph = agrees(flat(tmp_path, nodes, data))
    assert graph.constants["w"].shape == (8, 4, 1, 3)
