"""What exporters write as several nodes becomes one operator: the same function, trained alike."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import NodeProto
from onnx_files import agrees, floats, model, node, save
from oracle import Unconstrained
from plans import whole

from odt_plan.ir.autodiff import build_training
from odt_plan.ir.graph import Graph
from odt_plan.ir.onnx_file import load_file
from odt_plan.ir.onnx_import import convert, import_model
from odt_plan.ir.surgery import drop_dead
from odt_plan.ir.training import TrainingSpec

Array = NDArray[Any]
RNG = np.random.default_rng(0)
WIDTH = 6


def number(value: float) -> Array:
    return np.array(value, np.float32)


def chain(*steps: str, **attributes: Any) -> list[NodeProto]:
    """Nodes written as ``result = Operator operands``; means run over the last axis."""
    nodes = []
    for step in steps:
        result, _, op, *operands = step.split()
        extra = {"axes": attributes.get("axes", [-1])} if op == "ReduceMean" else {}
        if op == "HardSigmoid":
            extra = {"alpha": 1 / 6, "beta": 0.5}
        nodes.append(node(op, " ".join(operands), result, **extra))
    return nodes


DEVIATION = ("m = ReduceMean h", "d = Sub h m")
VARIANCE = ("q = Mul d d", "v = ReduceMean q", "e = Add v eps", "r = Sqrt e")
INVERSE = (*DEVIATION, *VARIANCE, "i = Reciprocal r", "g = Mul i scale", "a = Mul h g")
SQUARES = ("q = Mul h h", "v = ReduceMean q", "e = Add v eps", "r = Sqrt e")
GATE = ("a = Add h three", "b = Clip a zero six")
LAYER_NORM = {
    "div": (*DEVIATION, *VARIANCE, "x = Div d r", "y = Mul x scale", "z = Add y bias"),
    "pow": (
        *DEVIATION, "q = Pow d two", *VARIANCE[1:], "x = Div d r", "y = Mul scale x",
        "z = Add bias y",
    ),
    "root by power": (
        *DEVIATION, *VARIANCE[:3], "r = Pow e half", "x = Div d r", "y = Mul x scale",
        "z = Add y bias",
    ),
    "scaled inverse": (
        *DEVIATION, *VARIANCE, "i = Reciprocal r", "g = Mul i scale", "y = Mul d g",
        "z = Add y bias",
    ),
    "shift behind": (*INVERSE, "b = Mul m g", "c = Sub bias b", "z = Add a c"),
    "shift negated": (*INVERSE, "n = Neg m", "b = Mul n g", "c = Add b bias", "z = Add c a"),
    "deviation twice": (
        "m = ReduceMean h", "d = Sub h m", "d2 = Sub h m", "q = Mul d2 d2", *VARIANCE[1:],
        "x = Div d r", "y = Mul x scale", "z = Add y bias",
    ),
    "no bias": (*DEVIATION, *VARIANCE, "x = Div d r", "z = Mul x scale"),
}  # fmt: skip
RMS_NORM = {
    "div": (*SQUARES, "x = Div h r", "z = Mul x scale"),
    "reciprocal": (*SQUARES, "i = Reciprocal r", "x = Mul h i", "z = Mul scale x"),
    "power": ("q = Pow h two", *SQUARES[1:3], "i = Pow e minus", "x = Mul h i", "z = Mul x scale"),
    "scaled inverse": (*SQUARES, "i = Reciprocal r", "g = Mul i scale", "z = Mul g h"),
}
ACTIVATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gelu erf": (
        "GeluErf",
        ("a = Div h root2", "b = Erf a", "c = Add b one", "d = Mul h c", "z = Mul d half"),
    ),
    "gelu tanh": (
        "Gelu",
        ("a = Pow h three", "b = Mul a cube", "c = Add h b", "d = Mul c root", "e = Tanh d",
         "f = Add e one", "g = Mul h half", "z = Mul g f"),
    ),
    "silu": ("Swish", ("a = Sigmoid h", "z = Mul h a")),
    "quick gelu": ("Swish", ("a = Mul h rate", "b = Sigmoid a", "z = Mul b h")),
    "mish": ("Mish", ("a = Softplus h", "b = Tanh a", "z = Mul h b")),
    "hardswish": ("HardSwish", (*GATE, "c = Mul h b", "z = Div c six")),
    "hardswish gate": ("HardSwish", (*GATE, "c = Div b six", "z = Mul c h")),
    "hardswish min max": (
        "HardSwish",
        ("a = Add three h", "b = Relu a", "c = Min b six", "d = Mul h c", "z = Mul d sixth"),
    ),
    "hardswish hardsigmoid": ("HardSwish", ("a = HardSigmoid h", "z = Mul a h")),
}  # fmt: skip
NUMBERS = {
    "eps": 1e-5, "two": 2, "half": 0.5, "one": 1, "root2": 2**0.5, "cube": 0.044715, "three": 3,
    "root": 0.7978845608, "rate": 1.702, "zero": 0, "six": 6, "sixth": 1 / 6, "minus": -0.5,
}  # fmt: skip


def constants(*shape: int) -> dict[str, Array]:
    return {
        **{k: number(v) for k, v in NUMBERS.items()},
        "scale": floats(RNG, *(shape or (WIDTH,))),
        "bias": floats(RNG, *(shape or (WIDTH,))),
    }


def between_layers(nodes: list[NodeProto], data: dict[str, Array], folder: Path) -> Path:
    """``h`` to ``z`` with a layer before it and one behind it, so that all gradients exist."""
    data = data | {"w": floats(RNG, 4, WIDTH), "u": floats(RNG, WIDTH, 3)}
    used = {i for n in nodes for i in n.input} | {"w", "u"}
    nodes = [node("MatMul", "in w", "h"), *nodes, node("MatMul", "z u", "y0")]
    return save(
        model(nodes, {"in": [1, 5, 4]}, ["y0"], {k: a for k, a in data.items() if k in used}),
        folder,
    )


def after_a_step(graph: Graph, seed: int = 0) -> dict[str, Array]:
    """Every parameter after one step on the mean squared error."""
    training = build_training(graph, TrainingSpec(loss="mse", optimizer="sgd"), whole(graph))
    rng = np.random.default_rng(seed)
    net = Unconstrained(training)
    target = floats(rng, *training.target.type.shape)
    net.step(floats(rng, *training.sample.type.shape), target, 0.1)
    return net.state


def becomes(nodes: list[NodeProto], data: dict[str, Array], op: str, folder: Path) -> None:
    """The nodes become ``op``, equal onnxruntime, and are trained as the parts are."""
    path = between_layers(nodes, data, folder)
    merged = agrees(path)
    inner = [n.op for n in merged.nodes if n.op not in ("Gemm", "MatMul", "Reshape")]
    assert inner == [op]
    trained_alike(path, merged)


def trained_alike(path: Path, merged: Graph, least: Collection[str] = ("u", "w")) -> None:
    """A step on what a file becomes is that on its parts, of these parameters and more."""
    parts = convert(load_file(path)).graph
    drop_dead(parts)
    want, got = after_a_step(parts), after_a_step(merged)
    assert set(got) >= set(want) >= set(least)  # a bias in a Sub is none by itself
    for name, new in want.items():
        before = merged.constants[name].reshape(new.shape)
        step = np.abs(new - before).max()
        np.testing.assert_allclose(
            got[name].reshape(new.shape), new, rtol=0, atol=1e-4 * step, err_msg=name
        )


@pytest.mark.parametrize("form", LAYER_NORM)
def test_layer_normalization(form: str, tmp_path: Path) -> None:
    becomes(chain(*LAYER_NORM[form]), constants(), "LayerNormalization", tmp_path)


@pytest.mark.parametrize("form", RMS_NORM)
def test_rms_normalization(form: str, tmp_path: Path) -> None:
    becomes(chain(*RMS_NORM[form]), constants(), "RMSNormalization", tmp_path)


@pytest.mark.parametrize("form", ACTIVATIONS)
def test_activations(form: str, tmp_path: Path) -> None:
    op, steps = ACTIVATIONS[form]
    becomes(chain(*steps), constants(), op, tmp_path)


def test_constants_of_more_axes_and_rows_of_two_axes(tmp_path: Path) -> None:
    becomes(chain(*LAYER_NORM["div"]), constants(1, 1, WIDTH), "LayerNormalization", tmp_path)
    pooled = [s.replace("ReduceMean", "GlobalAveragePool") for s in LAYER_NORM["pow"]]
    becomes(chain(*pooled), constants(), "LayerNormalization", tmp_path)  # tf2onnx, of three axes
    steps = chain(*LAYER_NORM["shift behind"], axes=[1, 2])
    becomes(steps, constants(5, WIDTH), "LayerNormalization", tmp_path)


CHANNELS = {
    "scale and bias": (*LAYER_NORM["div"], "LayerNormalization"),
    "pow": (*LAYER_NORM["pow"], "LayerNormalization"),
    "scale": (*LAYER_NORM["no bias"], "LayerNormalization"),
    "bare": (*DEVIATION, *VARIANCE, "z = Div d r", "GroupNormalization"),
    "bare root mean square": (*SQUARES, "z = Div h r", "GroupNormalization"),
    "root mean square": (*SQUARES, "x = Div h r", "z = Mul x scale", "RMSNormalization"),
}


@pytest.mark.parametrize("form", CHANNELS)
@pytest.mark.parametrize("shape", [[2, WIDTH, 3, 4], [1, WIDTH, 5]])
def test_channels_at_each_place(form: str, shape: list[int], tmp_path: Path) -> None:
    """ConvNeXt's LayerNorm2d: NumPy's and the file's results, and the same training."""
    *steps, op = CHANNELS[form]
    spatial = [1] * (len(shape) - 2)
    data = constants(WIDTH, *spatial) | {"w": floats(RNG, WIDTH, 4, *spatial)}
    data["u"] = floats(RNG, 3, WIDTH, *spatial)
    nodes = [node("Conv", "in w", "h"), *chain(*steps, axes=[1]), node("Conv", "z u", "y0")]
    used = {i for n in nodes for i in n.input}
    data = {k: a for k, a in data.items() if k in used}
    proto = model(nodes, {"in": [shape[0], 4, *shape[2:]]}, ["y0"], data)
    path = save(proto, tmp_path)
    merged = agrees(path)
    inner = [n.op for n in merged.nodes if n.op not in ("Conv", "Transpose", "Reshape")]
    assert inner == [op]
    assert sum(n.op == "Transpose" for n in merged.nodes) == 2
    trained_alike(path, merged)


@pytest.mark.parametrize("form", ["bare", "bare root mean square"])
@pytest.mark.parametrize("axes", [[-1], [1, 2]])
def test_rows_without_a_scale(form: str, axes: list[int], tmp_path: Path) -> None:
    """There is no parameter, and none comes into being."""
    *steps, op = CHANNELS[form]
    path = between_layers(chain(*steps, axes=axes), constants(), tmp_path)
    merged = agrees(path)
    (norm,) = (n for n in merged.nodes if n.op not in ("Gemm", "MatMul", "Reshape"))
    assert (norm.op, len(norm.inputs)) == (op, 1)
    trained_alike(path, merged)


@pytest.mark.parametrize("shape", [(WIDTH,), (1, 1, WIDTH)])
def test_constants_that_others_read_keep_their_form(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """A scale of two normalizations is one parameter, also where it is no row in the file."""
    steps = [s.replace("h", "z1") if i < 2 else s for i, s in enumerate(LAYER_NORM["div"])]
    first = chain(*(s.replace("z =", "z1 =") for s in LAYER_NORM["div"]))
    renamed = [" ".join(p + "b" if p in set("mdqverxy") else p for p in s.split()) for s in steps]
    path = between_layers(first + chain(*renamed), constants(*shape), tmp_path)
    graph = agrees(path)
    norms = [n for n in graph.nodes if n.op == "LayerNormalization"]
    assert len(norms) == 2
    assert norms[0].inputs[1:] == norms[1].inputs[1:]
    assert {v.name for v in norms[0].operands()} >= {"scale", "bias"}
    trained_alike(path, graph)


GROUPS = {
    "scale and bias": (
        *INVERSE[:-1], "n = Neg m", "s = Mul n g", "t = Add bias s", "x = Mul h g", "z = Add x t",
    ),
    "scale": (*INVERSE[:-1], "n = Neg m", "s = Mul n g", "x = Mul h g", "z = Add x s"),
    "bias": (
        *INVERSE[:-2], "n = Neg m", "s = Mul n i", "t = Add bias s", "x = Mul h i", "z = Add x t",
    ),
    "bare": (*INVERSE[:-2], "n = Neg m", "s = Mul n i", "x = Mul h i", "z = Add x s"),
}  # fmt: skip
#: Places of the groups -> shape behind the layer, and what its channels are split into.
PLACES: dict[str, tuple[list[int], list[int]]] = {
    "last": ([2, 3, 4, WIDTH], [2, 3, 4, 3, 2]),
    "instances": ([2, 3, 4, WIDTH], [2, 3, 4, WIDTH, 1]),
    "all": ([2, 3, 4, WIDTH], [2, 3, 4, 1, WIDTH]),
    "first": ([2, WIDTH, 3, 4], [2, 3, 2, 3, 4]),
    "no space": ([2, WIDTH], [2, 2, 3]),
}


@pytest.mark.parametrize("form", GROUPS)
@pytest.mark.parametrize("place", PLACES)
def test_groups_of_channels(form: str, place: str, tmp_path: Path) -> None:
    """GroupNormalization of Keras: the file's results, the same training, no Transpose left."""
    shape, split = PLACES[place]
    axis = shape.index(WIDTH)
    kept = [1] * axis + split[axis : axis + 2] + [1] * (len(split) - axis - 2)
    axes = [a for a in range(1, len(split)) if a != axis]
    spatial = [1] * (len(shape) - 2)
    wide = [a for a in range(1, len(shape)) if a != axis]
    data = constants(*kept) | {"split": np.array(split), "whole": np.array(shape)}
    data["w"], data["u"] = floats(RNG, WIDTH, 4, *spatial), floats(RNG, 3, WIDTH, *spatial)
    layer = "Conv" if spatial else "Gemm"
    more = {} if spatial else {"transB": 1}
    to_last = [node("Transpose", "a", "b", perm=[0, *(1 + a for a in range(1, 3)), 1])]
    to_first = [node("Transpose", "c", "f", perm=[0, 3, 1, 2])]
    moved = place not in ("first", "no space")
    nodes = [
        node(layer, "in w", "a", **more),
        *(to_last if moved else [node("Identity", "a", "b")]),
        node("Reshape", "b split", "h"),
        *chain(*GROUPS[form], axes=axes),
        node("Reshape", "z whole", "c"),
        *(to_first if moved else [node("Identity", "c", "f")]),
        node(layer, "f u", "y0", **more),
    ]
    used = {i for n in nodes for i in n.input}
    inputs = {"in": [2, 4, *(shape[a] for a in wide)]}
    data = {k: a for k, a in data.items() if k in used}
    path = save(model(nodes, inputs, ["y0"], data), tmp_path)
    merged = agrees(path, batch=2)
    alone = form == "bias" and place != "instances"  # without scales it is one per group
    assert [n.op for n in merged.nodes if n.op != "Reshape"] == [
        *(layer, "GroupNormalization", *["Add"] * alone, layer)
    ]
    trained_alike(path, merged, least=data.keys() & {"u", "w", "scale", "bias"})


def test_a_scale_across_groups_stays(tmp_path: Path) -> None:
    """One per row of the image is none of channels."""
    data = constants(1, 3, 1, 1, 1) | {"split": np.array([1, 3, 4, 3, 2])}
    nodes = [
        node("Reshape", "in split", "h"),
        *chain(*GROUPS["scale"], axes=[1, 2, 4]),
        node("Relu", "z", "y0"),
    ]
    used = {i for n in nodes for i in n.input}
    data = {k: a for k, a in data.items() if k in used}
    graph = agrees(save(model(nodes, {"in": [1, 3, 4, 6]}, ["y0"], data), tmp_path))
    assert "GroupNormalization" not in {n.op for n in graph.nodes}


def test_a_bias_behind_groups_without_a_scale_stays(tmp_path: Path) -> None:
    """As PyTorch writes GroupNorm without parameters before opset 18, and a sum behind it."""
    nodes = [
        node("Reshape", "in split", "r"),
        node("InstanceNormalization", "r ones zeros", "a"),
        node("Reshape", "a whole", "b"),
        node("Add", "b bias", "y0"),
    ]
    data = {
        "split": np.array([1, 2, -1]),
        "whole": np.array([1, 4, 3, 3]),
        "ones": np.ones(2, np.float32),
        "zeros": np.zeros(2, np.float32),
        "bias": floats(RNG, 1, 4, 1, 1),
    }
    graph = agrees(save(model(nodes, {"in": [1, 4, 3, 3]}, ["y0"], data), tmp_path))
    assert [n.op for n in graph.nodes] == ["GroupNormalization", "Add"]


OTHERS = {
    "epsilon behind the root": (
        *DEVIATION, "q = Mul d d", "v = ReduceMean q", "s = Sqrt v", "r = Add s eps",
        "x = Div d r", "y = Mul x scale", "z = Add y bias",
    ),
    "not the mean": (
        "m = ReduceMean h", "k = Mul m three", "d = Sub h k", *VARIANCE[:-1], "r = Sqrt e",
        "x = Div h r", "y = Mul x scale", "z = Add y bias",
    ),
    "another tensor": (
        *DEVIATION, *VARIANCE, "t = Tanh h", "x = Div t r", "y = Mul x scale", "z = Add y bias"
    ),
    "hardswish of 5": ("a = Add h three", "b = Clip a zero five", "c = Mul h b", "z = Div c six"),
    "silu of two": ("a = Sigmoid h", "t = Tanh h", "z = Mul t a"),
    "mish of twice": ("a = Softplus h", "b = Tanh a", "c = Mul h b", "z = Mul c two"),
}  # fmt: skip


@pytest.mark.parametrize("form", OTHERS)
def test_what_is_nearly_such_a_function_stays(form: str, tmp_path: Path) -> None:
    path = between_layers(chain(*OTHERS[form]), constants() | {"five": number(5)}, tmp_path)
    ops = {n.op for n in agrees(path).nodes}
    assert not ops & {"LayerNormalization", "RMSNormalization", "HardSwish", "Swish"}
    assert ("Mish" in ops) == (form == "mish of twice")


@pytest.mark.parametrize("read", ["d", "r", "x"])
def test_what_others_read_stays(read: str, tmp_path: Path) -> None:
    steps = [*LAYER_NORM["div"][:-1], "y2 = Add y bias", f"z = Mul y2 {read}"]
    path = between_layers(chain(*steps), constants(), tmp_path)
    assert "LayerNormalization" not in {n.op for n in agrees(path).nodes}


def test_scale_that_is_no_row_stays(tmp_path: Path) -> None:
    """A number per token is a product; so is one per channel of rows over two axes."""
    path = between_layers(chain(*LAYER_NORM["div"]), constants(5, WIDTH), tmp_path)
    assert "LayerNormalization" not in {n.op for n in agrees(path).nodes}
    path = between_layers(chain(*LAYER_NORM["div"], axes=[1]), constants(), tmp_path)
    assert "LayerNormalization" not in {n.op for n in agrees(path).nodes}


def test_epsilon_is_the_one_of_the_file(tmp_path: Path) -> None:
    for epsilon in (1e-12, 1e-3, 0.1):
        data = constants() | {"eps": number(epsilon)}
        graph = import_model(between_layers(chain(*LAYER_NORM["pow"]), data, tmp_path))
        (norm,) = [n for n in graph.nodes if n.op == "LayerNormalization"]
        assert norm.float_attr("epsilon") == float(np.float32(epsilon))


# -- padding ---------------------------------------------------------------------------------------

PADS = np.array([0, 0, 1, 0, 0, 0, 2, 1])
POOL = {"kernel_shape": [3, 3], "strides": [2, 2]}
PADDED: dict[str, tuple[list[NodeProto], bool]] = {
    "conv": ([node("Pad", "in pads", "p"), node("Conv", "p k", "z")], True),
    "conv of ones": ([node("Pad", "in pads one", "p"), node("Conv", "p k", "z")], False),
    "maximum behind relu": (
        [node("Relu", "in", "r"), node("Pad", "r pads", "p"),
         node("MaxPool", "p", "z", **POOL)], True
    ),
    "maximum behind relu6": (
        [node("Clip", "in zero six", "r"), node("Pad", "r pads", "p"),
         node("MaxPool", "p", "z", **POOL)], True
    ),
    "maximum of all": ([node("Pad", "in pads", "p"), node("MaxPool", "p", "z", **POOL)], False),
    "maximum with the least number": (
        [node("Pad", "in pads least", "p"), node("MaxPool", "p", "z", **POOL)], True
    ),
    "maximum of more windows": (
        [node("Relu", "in", "r"), node("Pad", "r pads", "p"),
         node("MaxPool", "p", "z", ceil_mode=1, **POOL)], False
    ),
    "maximum of small windows": (
        [node("Relu", "in", "r"), node("Pad", "r pads", "p"),
         node("MaxPool", "p", "z", kernel_shape=[2, 2])], False
    ),
    "average": ([node("Pad", "in pads", "p"), node("AveragePool", "p", "z", **POOL)], True),
    "average that pads more": (
        [node("Pad", "in pads", "p"),
         node("AveragePool", "p", "z", pads=[1, 1, 0, 0], count_include_pad=1,
              kernel_shape=[4, 4])], True
    ),
    "average that pads without counting": (
        [node("Pad", "in pads", "p"),
         node("AveragePool", "p", "z", pads=[0, 1, 0, 0], **POOL)], False
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", PADDED)
def test_padding(form: str, tmp_path: Path) -> None:
    nodes, merges = PADDED[form]
    data = {"pads": PADS, "k": floats(RNG, 2, 3, 3, 3), "least": number(-np.inf)}
    data |= {k: number(NUMBERS[k]) for k in ("one", "zero", "six")}
    used = {i for n in nodes for i in n.input}
    given = {k: a for k, a in data.items() if k in used}
    graph = agrees(save(model(nodes, {"in": [1, 3, 8, 9]}, ["z"], given), tmp_path))
    assert ("Pad" not in {n.op for n in graph.nodes}) == merges


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_padding_is_trained_alike(op: str, tmp_path: Path) -> None:
    nodes = [
        node("Conv", "in k", "c"),
        node("Relu", "c", "r"),
        node("Pad", "r pads", "p"),
        node(op, "p", "y", **POOL),
    ]
    data = {"pads": PADS, "k": floats(RNG, 2, 3, 3, 3)}
    path = save(model(nodes, {"in": [1, 3, 8, 9]}, ["y"], data), tmp_path)
    want, got = after_a_step(convert(load_file(path)).graph), after_a_step(import_model(path))
    np.testing.assert_allclose(got["k"], want["k"], rtol=1e-5, atol=1e-6)


# -- channels last ---------------------------------------------------------------------------------


def turned(x: str, y: str, *, last: bool) -> NodeProto:
    return node("Transpose", x, y, perm=[0, 2, 3, 1] if last else [0, 3, 1, 2])


def channels_last_block() -> list[NodeProto]:
    """As tf2onnx writes a block of MobileNetV3: a gate of pooled channels, a sum, a Concat."""
    return [
        turned("in", "a", last=False), node("Conv", "a k1", "b"), turned("b", "c", last=True),
        node("Mul", "c scale", "d"), node("Add", "d bias", "e"), node("HardSwish", "e", "f"),
        node("ReduceMean", "f", "g", axes=[1, 2]),
        turned("g", "h", last=False), node("Conv", "h k2", "i"), turned("i", "j", last=True),
        node("Sigmoid", "j", "l"), node("Mul", "f l", "m"),
        turned("m", "n", last=False), node("Conv", "n k2", "o"), turned("o", "p", last=True),
        node("Add", "p c", "q"), node("Concat", "q c", "r", axis=3), node("Neg", "r", "s"),
        turned("s", "t", last=False), node("Conv", "t k3", "u"),
        node("ReduceSum", "u axes", "y", keepdims=0),
    ]  # fmt: skip


def test_channels_last(tmp_path: Path) -> None:
    """One Transpose is left, that of the input; each gate is a view."""
    rng = np.random.default_rng(1)
    data = {
        "k1": floats(rng, 6, 3, 3, 3), "k2": floats(rng, 6, 6, 1, 1),
        "k3": floats(rng, 4, 12, 1, 1), "scale": floats(rng, 6), "bias": floats(rng, 1, 1, 1, 6),
        "axes": np.array([2, 3]),
    }  # fmt: skip
    path = save(model(channels_last_block(), {"in": [1, 8, 8, 3]}, ["y"], data, opset=14), tmp_path)
    graph = agrees(path)
    assert [n.op for n in graph.nodes].count("Transpose") == 1
    want, got = after_a_step(convert(load_file(path)).graph), after_a_step(graph)
    assert set(got) == set(want)
    for name, new in want.items():
        np.testing.assert_allclose(got[name].reshape(new.shape), new, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", ["Reshape", "MatMul", "output", "tokens"])
def test_transposes_stay_where_one_reader_needs_them(other: str, tmp_path: Path) -> None:
    """Nothing is turned twice: what cannot be swapped keeps the Transpose where it is."""
    nodes = [turned("in", "c", last=True), node("Mul", "c scale", "d")]
    nodes += {
        "Reshape": [node("Reshape", "c shape", "e"), node("MatMul", "e v", "y2")],
        "MatMul": [node("MatMul", "c w", "y2")],
        "output": [node("Identity", "c", "y2")],
        "tokens": [node("Mul", "c whole", "y2")],
    }[other]
    rng = np.random.default_rng(1)
    data = {
        "scale": floats(rng, 6), "shape": np.array([1, -1]), "w": floats(rng, 6, 2),
        "v": floats(rng, 150, 2), "whole": floats(rng, 5, 5, 6),
    }  # fmt: skip
    used = {i for n in nodes for i in n.input}
    given = {k: a for k, a in data.items() if k in used}
    graph = agrees(save(model(nodes, {"in": [1, 6, 5, 5]}, ["d", "y2"], given), tmp_path))
    assert [n.op for n in graph.nodes].count("Transpose") == 1
