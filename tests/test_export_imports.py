"""``odt-plan export`` of what importing rewrites: patterns, subgraphs, inputs, own losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_run import Cli
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx_files import floats, model, node, save
from test_export import BUDGET, PLAN, exported, learn, planned, rng
from test_file_loss import BATCH, softmax
from test_import_control import TRUE, body, if_, loop
from test_patterns import LAYER_NORM, between_layers, chain, constants

from odt_plan.planner.plan import load_plan
from odt_plan.planner.rebuild import forward_of

Array = NDArray[Any]
MSE = ("--loss", "mse")


def refused(odt: Cli) -> str:
    """Export learned weights; the reason why nothing is written."""
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx")
    assert done.code == 4, done.err
    assert not Path("tuned.onnx").exists()
    return done.error


def operators() -> list[str]:
    """Of the imported model of the plan."""
    return [n.op for n in forward_of(load_plan(PLAN), PLAN).nodes]


# -- patterns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", LAYER_NORM)
def test_parts_of_a_normalization(odt: Cli, form: str, tmp_path: Path) -> None:
    """Scale and bias keep the shapes that the file's nodes read."""
    data = constants(1, 1, 6)
    planned(odt, between_layers(chain(*LAYER_NORM[form]), data, tmp_path), *MSE)
    assert "LayerNormalization" in operators()
    tuned = exported(odt, learn())
    assert tuned.changed == {"w", "u", "scale", "bias"} - ({"bias"} if form == "no bias" else set())
    assert tuned.data("scale").shape == (1, 1, 6)


def test_normalizations_that_share_their_scale(odt: Cli, tmp_path: Path) -> None:
    """They are one parameter as in the file, which has it in another shape."""
    first = chain(*LAYER_NORM["div"])
    names = {r: f"{r}1" for n in first for r in n.output}
    second = [NodeProto.FromString(n.SerializeToString()) for n in first]
    for n in first:
        n.name, n.output[0] = f"{n.name}1", names[n.output[0]]
        n.input[:] = [names.get(i, i) for i in n.input]
    for n in second:
        n.input[:] = [names["z"] if i == "h" else i for i in n.input]
    planned(odt, between_layers([*first, *second], constants(1, 1, 6), tmp_path), *MSE)
    forward = forward_of(load_plan(PLAN), PLAN)
    norms = [n for n in forward.nodes if n.op == "LayerNormalization"]
    assert norms[0].inputs[1:] == norms[1].inputs[1:]
    tuned = exported(odt, learn())
    assert tuned.changed == {"w", "u", "scale", "bias"}
    assert tuned.data("scale").shape == (1, 1, 6)


@pytest.mark.parametrize("alike", [False, True])
def test_a_weight_of_two_batch_normalizations(odt: Cli, alike: bool, tmp_path: Path) -> None:
    """It is one parameter as in the file; they are folded into it if they are equal."""
    random = rng()
    data = {"w": floats(random, 4, 4, 1, 1), "shape": np.array([1, -1], np.int64)}
    nodes = []
    for i, (x, y) in enumerate((("x", "h"), ("h", "g"))):
        kinds = {k: floats(random, 4) for k in "gbm"} | {"v": np.abs(floats(random, 4)) + 0.5}
        data |= {f"{k}{i}": a for k, a in kinds.items()}
        n = 0 if alike else i
        nodes.append(node("Conv", f"{x} w", f"c{i}"))
        nodes.append(node("BatchNormalization", f"c{i} g{n} b{n} m{n} v{n}", y))
    nodes.append(node("Reshape", "g shape", "y"))
    planned(odt, save(model(nodes, {"x": [1, 4, 2, 2]}, ["y"], data), tmp_path), *MSE)
    layer = ["Conv"] if alike else ["Conv", "BatchNormalization"]
    assert operators() == [*layer, *layer, "Reshape"]
    assert exported(odt, learn()).changed == {"w", "b0"} | (set() if alike else {"g0", "g1", "b1"})


@pytest.mark.parametrize("trained", ["u,u2", "u", "u2"])
def test_a_copy_of_a_tensor(odt: Cli, trained: str, tmp_path: Path) -> None:
    """PyTorch writes an Identity where weights happen to be equal; each learns its own numbers."""
    data = {"u": np.ones(4, np.float32), "w": floats(rng(), 4, 4)}
    nodes = [
        node("Identity", "u", "u1", "copy"),
        node("Identity", "u1", "u2", "copied"),
        node("Mul", "x u", "a", "first"),
        node("MatMul", "a w", "h"),
        node("Mul", "h u2", "y", "second"),
    ]
    path = save(model(nodes, {"x": [1, 4]}, ["y"], data), tmp_path)
    done = odt(path, *BUDGET, "-o", "out", "--train", trained, *MSE, "-q")
    assert done.code == 0, done.err
    net = learn()
    tuned = exported(odt, net, same=False)
    assert tuned.record["changed"].keys() == set(trained.split(","))
    assert tuned.changed == {"u"} & set(trained.split(","))


def test_a_weight_beside_its_own_norm(odt: Cli, tmp_path: Path) -> None:
    """What its file divides by changes with it: a normalized weight has no way back."""
    data = {"v": floats(rng(), 4, 4), "g": floats(rng(), 4, 1), "shape": np.array([1, -1])}
    nodes = [
        node("ReduceL2", "v", "n", "norm", axes=[1]),
        node("Div", "g n", "f"),
        node("Mul", "v f", "w", "scaled"),
        node("Gemm", "x w", "h", "layer", transB=1),
        node("Reshape", "h shape", "y"),
    ]
    planned(odt, save(model(nodes, {"x": [1, 4]}, ["y"], data), tmp_path), *MSE)
    learn()
    assert "w of node layer can't be written: norm (ReduceL2) computes it" in refused(odt)


def test_pads_and_layouts(odt: Cli, tmp_path: Path) -> None:
    """Pads before a convolution and a pool, and operands of what runs channels-last."""
    random = rng()
    data = {
        "w": floats(random, 4, 2, 3, 3), "b": floats(random, 4),
        "slope": floats(random, 1, 1, 1, 4), "gate": floats(random, 1, 1, 1, 4),
        "fc": floats(random, 3, 64), "shape": np.array([1, -1], np.int64),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64), "low": np.float32(-np.inf),
    }  # fmt: skip
    nodes = [
        node("Pad", "x pads", "p"),
        node("Conv", "p w b", "c", "conv"),
        node("Transpose", "c", "t", perm=[0, 2, 3, 1]),
        node("PRelu", "t slope", "a", "act"),
        node("Mul", "a gate", "g", "gated"),
        node("Transpose", "g", "u", perm=[0, 3, 1, 2]),
        node("Pad", "u pads low", "q"),
        node("MaxPool", "q", "m", kernel_shape=[3, 3], strides=[2, 2]),
        node("Reshape", "m shape", "f"),
        node("Gemm", "f fc", "y", "head", transB=1),
    ]
    planned(odt, save(model(nodes, {"x": [1, 2, 8, 8]}, ["y"], data), tmp_path), *MSE)
    assert operators() == ["Conv", "PRelu", "Mul", "MaxPool", "Reshape", "Gemm"]
    assert exported(odt, learn()).changed == {"w", "b", "slope", "gate", "fc"}


def test_a_bias_beside_a_mask(odt: Cli, tmp_path: Path) -> None:
    """What is masked stays; the rest is a parameter."""
    mask = floats(rng(), 1, 4, 4) + np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    data = {"w": floats(rng(), 5, 4), "mask": mask}
    nodes = [
        node("MatMul", "x w", "h"),
        node("Add", "h mask", "s", "masked"),
        node("Softmax", "s", "y", axis=-1),
    ]
    planned(odt, save(model(nodes, {"x": [1, 4, 5]}, ["y"], data), tmp_path), *MSE)
    above = tuple(np.argwhere(np.isinf(mask)).T)
    tuned = exported(odt, learn(keep={"mask/rest": [above]}))
    assert tuned.changed == {"w", "mask"}
    assert np.isneginf(tuned.data("mask")[above]).all()


# -- subgraphs -------------------------------------------------------------------------------------


def branches(folder: Path, *, inside: bool) -> Path:
    """A branch with a weight of its own, or of the main graph."""
    w = {"w": floats(rng(), 4, 4)}
    then = body([node("MatMul", "x w", "a", "product")], "a", {}, w if inside else {})
    other = body([node("Neg", "x", "a", "less")], "a")
    data = {"c": TRUE, "fc": floats(rng(), 4, 3), **({} if inside else w)}
    nodes = [if_("c", "h", then, other), node("MatMul", "h fc", "y", "head")]
    return save(model(nodes, {"x": [1, 4]}, ["y"], data), folder)


def test_weights_of_branches(odt: Cli, tmp_path: Path) -> None:
    planned(odt, branches(tmp_path, inside=False), *MSE)
    assert exported(odt, learn()).changed == {"w", "fc"}


def test_weights_inside_of_branches(odt: Cli, tmp_path: Path) -> None:
    """They stay there."""
    path = branches(tmp_path, inside=True)
    old = onnx.load(path)
    planned(odt, path, *MSE)
    assert exported(odt, learn(), same=False).changed == {"fc"}
    new = onnx.load("tuned.onnx")
    (was,), (now,) = inside(old), inside(new)
    assert was.shape == now.shape
    assert (was != now).all()
    assert "w" not in {t.name for t in new.graph.initializer}


def inside(proto: onnx.ModelProto) -> list[Array]:
    """The weights of the branches that are taken."""
    graphs = [a.g for n in proto.graph.node for a in n.attribute if a.name == "then_branch"]
    return [numpy_helper.to_array(t) for g in graphs for t in g.initializer]


def test_weights_of_two_branches_of_one_name(odt: Cli, tmp_path: Path) -> None:
    """Each is a parameter of its own, and finds its place again."""
    data = {"c": TRUE, "fc": floats(rng(), 4, 3)}
    nodes = []
    for i, (x, y) in enumerate((("x", "h"), ("h", "g"))):
        product = node("MatMul", f"{x} w", f"a{i}", f"product{i}")
        then = body([product], f"a{i}", {}, {"w": floats(np.random.default_rng(i), 4, 4)})
        nodes.append(if_("c", y, then, body([node("Neg", x, f"a{i}", f"less{i}")], f"a{i}")))
    nodes.append(node("MatMul", "g fc", "y", "head"))
    planned(odt, save(model(nodes, {"x": [1, 4]}, ["y"], data), tmp_path), *MSE)
    trained = learn()
    exported(odt, trained, same=False)
    forward = forward_of(load_plan(PLAN), PLAN)
    after = trained.params()
    learned = {n: after[n] for n in forward.constants if n.split("~")[0] == "w"}
    assert len(learned) == 2
    for got, want in zip(inside(onnx.load("tuned.onnx")), learned.values(), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["value", "value_floats"])
def test_constants_inside_of_branches(odt: Cli, kind: str, tmp_path: Path) -> None:
    """Tensors that nodes make there stay there; lists are refused by name."""
    w = floats(rng(), 4)
    value: Any = numpy_helper.from_array(w) if kind == "value" else w.tolist()
    constant = helper.make_node("Constant", [], ["w"], name="made", **{kind: value})
    then = body([constant, node("Add", "x w", "a", "sum")], "a")
    other = body([node("Neg", "x", "a", "less")], "a")
    data = {"c": TRUE, "fc": floats(rng(), 4, 3)}
    nodes = [if_("c", "h", then, other), node("MatMul", "h fc", "y", "head")]
    path = save(model(nodes, {"x": [1, 4]}, ["y"], data), tmp_path)
    planned(odt, path, *MSE)
    trained = learn()
    if kind == "value":
        assert exported(odt, trained, same=False).changed == {"fc"}
        (branch,) = (a.g for a in onnx.load("tuned.onnx").graph.node[0].attribute if a.g.node[1:])
        now = numpy_helper.to_array(branch.node[0].attribute[0].t)
        np.testing.assert_array_equal(now, trained.params()["w"])
        return
    assert "can't be written: " in (reason := refused(odt))
    assert " is no initializer or Constant of the file's main graph, nor a tensor" in reason
    done = odt(path, *BUDGET, "-o", "out", "--train", "fc", *MSE, "-q")
    assert done.code == 0, done.err
    assert exported(odt, learn()).changed == {"fc"}


def test_a_constant_inside_of_a_loop(odt: Cli, tmp_path: Path) -> None:
    """It is one parameter of all iterations, and goes back to its place."""
    w = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(floats(rng(), 4, 4)))
    step = [w, node("MatMul", "h w", "n", "product"), node("Identity", "go", "goes")]
    data = {"trips": np.array(3), "go0": TRUE}
    nodes = [node("Loop", "trips go0 x", "y", body=loop(step, "goes n", "h"))]
    planned(odt, save(model(nodes, {"x": [1, 4]}, ["y"], data), tmp_path), *MSE)
    trained = learn()
    assert list(trained.params()) == ["w"]
    exported(odt, trained, same=False)


def test_weights_of_loops(odt: Cli, tmp_path: Path) -> None:
    """One that all iterations read is one parameter; rows of another are one each."""
    step = [
        node("MatMul", "h w", "m", "product"),
        node("Gather", "rows i", "row", "row"),
        node("Add", "m row", "n", "add"),
        node("Identity", "go", "goes"),
    ]
    data = {
        "trips": np.array(3),
        "go0": TRUE,
        "w": floats(rng(), 4, 4),
        "rows": floats(rng(), 3, 4),
    }
    nodes = [node("Loop", "trips go0 x", "y", body=loop(step, "goes n", "h"))]
    planned(odt, save(model(nodes, {"x": [1, 4]}, ["y"], data), tmp_path), *MSE)
    tuned = exported(odt, learn())
    assert tuned.changed == {"w", "rows"}
    assert (tuned.data("rows") != data["rows"]).all()


# -- inputs and outputs ----------------------------------------------------------------------------


def three_inputs(folder: Path) -> Path:
    """Token ids, a mask of integers, and numbers, with an open length."""
    data = {
        "table": floats(rng(), 7, 4),
        "w": floats(rng(), 3, 4),
        "fc": floats(rng(), 4, 2),
        "last": np.array([2], np.int64),
    }
    nodes = [
        node("Gather", "table ids", "e", "embed"),
        node("Cast", "mask", "m", to=TensorProto.FLOAT),
        node("Unsqueeze", "m last", "mu"),
        node("Mul", "e mu", "k"),
        node("ReduceMean", "k", "p", axes=[1], keepdims=0),
        node("MatMul", "more w", "q", "side"),
        node("Add", "p q", "h"),
        node("Relu", "h", "r"),
        node("MatMul", "r fc", "y", "head"),
    ]
    proto = model(nodes, {"ids": ["n", "s"], "mask": ["n", "s"], "more": ["n", 3]}, ["y"], data)
    for v in proto.graph.input[:2]:
        v.type.tensor_type.elem_type = TensorProto.INT64
    return save(proto, folder)


def test_several_inputs_and_open_dimensions(odt: Cli, tmp_path: Path) -> None:
    planned(odt, three_inputs(tmp_path), "--dim", "s=5", "--batch", "2", "--loss", "cross-entropy")
    tuned = exported(odt, learn())
    assert tuned.changed == {"table", "w", "fc"}
    assert tuned.new.graph.input[0].type == tuned.old.graph.input[0].type


def test_a_loss_in_the_file(odt: Cli, tmp_path: Path) -> None:
    """It stays; the prediction is what is compared."""
    path = softmax(tmp_path, inputs="scores t cw", outputs="loss lp")
    planned(odt, path, "--batch", str(BATCH))
    labels = {"t": np.arange(BATCH)}
    assert exported(odt, learn(), more=labels).changed == {"w", "v", "w2", "v2"}


def test_a_scaler(odt: Cli, tmp_path: Path) -> None:
    """Written as two nodes, it moves no note to another node; its own numbers have no way back."""
    scaler = helper.make_node(
        "Scaler", ["x"], ["s"], domain="ai.onnx.ml", offset=[0.5] * 4, scale=[2.0, 1.0, 3.0, 0.5]
    )
    nodes = [scaler, helper.make_node("MatMul", ["s", "w"], ["h"])]
    nodes += [helper.make_node("Relu", ["h"], ["r"]), helper.make_node("MatMul", ["r", "u"], ["y"])]
    data = {"w": floats(rng(), 4, 4), "u": floats(rng(), 4, 2)}
    proto = model(nodes, {"x": [1, 4]}, ["y"], data)
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    path = save(proto, tmp_path)
    planned(odt, path, *MSE)
    learn()
    assert "scale can't be written: Scaler_0/scale is no initializer or Constant" in refused(odt)
    done = odt(path, *BUDGET, "-o", "out", "--train", "u", *MSE, "-q")
    assert done.code == 0, done.err
    new = exported(odt, learn()).new
    notes = [{p.key: p.value for p in n.metadata_props} for n in new.graph.node]
    assert [n.get("odt_plan.action") for n in notes] == ["frozen", "frozen", None, "updated"]
