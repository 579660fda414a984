"""Files of scikit-learn's, Keras' and TensorFlow's converters, and the nodes that they write.

The converters themselves are used where they are installed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx_files import agrees, assert_close, floats, model, node, outputs, save
from oracle import Unconstrained
from plans import whole

from odt_plan.ir.autodiff import build_training
from odt_plan.ir.errors import UnsupportedModelError
from odt_plan.ir.graph import Graph
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.onnx_file import load_file
from odt_plan.ir.onnx_import import convert, import_model
from odt_plan.ir.training import TrainingSpec

RNG = np.random.default_rng(0)


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]


# -- scikit-learn ----------------------------------------------------------------------------------


def classifier(*, two: bool, strings: bool, zipped: bool) -> onnx.ModelProto:
    """As skl2onnx writes an MLPClassifier behind a StandardScaler."""
    nodes = [
        helper.make_node("Scaler", ["X"], ["s"], "scale", domain="ai.onnx.ml",
                         offset=[0.5, 0.0, -1.0], scale=[2.0, 1.0, 0.5]),
        node("Cast", "s", "c", to=TensorProto.FLOAT), node("MatMul", "c w", "m"),
        node("Add", "m b", "a"), node("Relu", "a", "h"), node("MatMul", "h v", "n"),
        node("Add", "n d", "z"),
    ]  # fmt: skip
    count = 1 if two else 3
    if two:
        nodes += [
            node("Sigmoid", "z", "p1"),
            node("Sub", "one p1", "p0"),
            node("Concat", "p0 p1", "p", axis=1),
        ]
    else:
        nodes.append(node("Softmax", "z", "p", axis=1))
    nodes += [
        node("ArgMax", "p", "best", axis=1),
        helper.make_node("ArrayFeatureExtractor", ["classes", "best"], ["k"], domain="ai.onnx.ml"),
        node("Reshape", "k shape", "label"),
    ]
    if not strings:
        nodes[-1].output[0] = "label0"
        nodes.append(node("Cast", "label0", "label", to=TensorProto.INT64))
    if zipped:
        names: dict[str, Any] = {"classlabels_int64s": list(range(max(count, 2)))}
        zip_map = helper.make_node("ZipMap", ["p"], ["maps"], domain="ai.onnx.ml", **names)
        nodes.append(zip_map)
    constants = {
        "w": floats(RNG, 3, 5), "b": floats(RNG, 1, 5), "v": floats(RNG, 5, count),
        "d": floats(RNG, 1, count), "shape": np.array([-1]), "one": np.ones(1, np.float32),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "sklearn",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, 3])],
        [
            helper.make_empty_tensor_value_info("label"),
            helper.make_empty_tensor_value_info("maps" if zipped else "p"),
        ],
        [numpy_helper.from_array(a, k) for k, a in constants.items()],
    )
    names_ = [b"no", b"yes", b"maybe"] if strings else [0, 1, 2]
    kind = TensorProto.STRING if strings else TensorProto.INT32
    graph.initializer.append(helper.make_tensor("classes", kind, [3], names_))
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=8)


def probabilities(proto: onnx.ModelProto, x: NDArray[Any]) -> NDArray[Any]:
    c = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if t.name != "classes"}
    x = (x - np.array([0.5, 0, -1])) * np.array([2, 1, 0.5])
    z = np.maximum(x @ c["w"] + c["b"], 0) @ c["v"] + c["d"]
    z = np.concatenate([0 * z, z], 1) if z.shape[1] == 1 else z
    e = np.exp(z)
    return np.asarray(e / e.sum(1, keepdims=True))


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_classifier_is_its_probabilities(
    two: bool, strings: bool, zipped: bool, tmp_path: Path
) -> None:
    proto = classifier(two=two, strings=strings, zipped=zipped)
    graph = import_model(save(proto, tmp_path), ImportOptions(batch=4))
    x = floats(RNG, 4, 3)
    (got,) = outputs(graph, {"X": x})
    np.testing.assert_allclose(got, probabilities(proto, x), rtol=1e-5, atol=1e-6)
    assert ops(graph) == ["Sub", "Mul", "Gemm", "Relu", "Gemm", *["Pad"] * two, "Softmax"]
    (note,) = graph.notes
    assert note.startswith("class labels label are left out")
    assert ("dictionaries maps are given as their numbers p" in note) == zipped


def test_two_classes_have_logits(tmp_path: Path) -> None:
    """The loss on 1 - p and p, and its gradient, are those on the Softmax of the logits 0 and z."""
    torch = pytest.importorskip("torch")
    proto = classifier(two=True, strings=False, zipped=False)
    graph = import_model(save(proto, tmp_path))
    net = Unconstrained(build_training(graph, TrainingSpec(optimizer="sgd"), whole(graph)))
    c = {k: torch.tensor(a, requires_grad=True) for k, a in graph.constants.items()}
    x = floats(RNG, 1, 3)
    shifted = (torch.tensor(x) - torch.tensor([0.5, 0, -1])) * c["scale/scale"]
    z = torch.relu(shifted @ c["w"] + c["b"]) @ c["v"] + c["d"]
    want = torch.nn.functional.binary_cross_entropy_with_logits(z[:, 0], torch.ones(1))
    want.backward()
    assert net.step(x, np.array([1], np.int32), 0.1) == pytest.approx(want.item(), rel=1e-5)
    for name, new in net.state.items():
        leaf = c[name]
        np.testing.assert_allclose(new, (leaf - 0.1 * leaf.grad).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [2.0, 1.0])
def test_other_pairs_stay(number: float, tmp_path: Path) -> None:
    nodes = [
        node("Sigmoid", "x", "p"),
        node("Sub", "n p", "q"),
        node("Concat", "q p" if number != 1.0 else "p q", "y", axis=1),
    ]
    proto = model(nodes, {"x": [3, 1]}, ["y"], {"n": np.array(number, np.float32)})
    assert "Softmax" not in ops(agrees(save(proto, tmp_path)))


def test_a_model_of_labels_alone_is_refused(tmp_path: Path) -> None:
    proto = classifier(two=False, strings=True, zipped=False)
    del proto.graph.output[1]
    with pytest.raises(UnsupportedModelError, match=r"ArrayFeatureExtractor.*ai\.onnx\.ml"):
        import_model(save(proto, tmp_path))


@pytest.mark.parametrize("op", ["ZipMap", "Scaler", "Cast"])
def test_nodes_without_operands(op: str, tmp_path: Path) -> None:
    """A damaged file ends in one clear error."""
    proto = classifier(two=False, strings=False, zipped=True)
    for n in proto.graph.node:
        if n.op_type == op:
            del n.input[:]
    with pytest.raises(UnsupportedModelError, match=op):
        import_model(save(proto, tmp_path))


def test_files_of_skl2onnx(tmp_path: Path) -> None:
    skl2onnx, sklearn = pytest.importorskip("skl2onnx"), pytest.importorskip("sklearn")
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    del sklearn
    x = floats(RNG, 40, 4)
    for net, y in (
        (MLPClassifier((6,), max_iter=20), (x[:, 0] > 0).astype(int)),
        (MLPClassifier((6, 5), max_iter=20, activation="tanh"), np.digitize(x[:, 0], [-0.5, 0.5])),
        (MLPClassifier((6,), max_iter=20), np.where(x[:, 1] > 0, "yes", "no")),
        (MLPRegressor(hidden_layer_sizes=(6,), max_iter=20), x[:, :2] @ np.ones((2, 2))),
    ):
        whole_ = make_pipeline(StandardScaler(), net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole_.fit(x, y)
            proto = skl2onnx.to_onnx(whole_, x[:1], target_opset=17)
        graph = import_model(save(proto, tmp_path), ImportOptions(batch=len(x)))
        want = whole_.predict_proba(x) if hasattr(net, "predict_proba") else whole_.predict(x)
        got = outputs(graph, {"X": x})[0].reshape(want.shape)  # a column is what the converter says
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# -- TensorFlow ------------------------------------------------------------------------------------


def loop_over_time(backwards: bool) -> list[NodeProto]:
    """As tf2onnx writes a recurrent layer of Keras: a While whose condition counts the steps."""
    steps = [
        node("Gather", "ta i", "xt"), node("MatMul", "xt w", "a"), node("MatMul", "h u", "b"),
        node("Add", "a b", "c"), node("Tanh", "c", "h1"), node("Add", "t one", "t1"),
        node("Less", "t1 steps", "lt0"), node("And", "lt0 go", "more"),
    ]  # fmt: skip
    shapes = {"i": (TensorProto.INT64, []), "go": (TensorProto.BOOL, [])}
    shapes |= {"t": (TensorProto.INT32, []), "h": (TensorProto.FLOAT, [1, 4])}
    results = {"more": (TensorProto.BOOL, []), "t1": (TensorProto.INT32, [])}
    results |= {"h1": (TensorProto.FLOAT, [1, 4])}
    inner = helper.make_graph(
        steps,
        "while",
        [helper.make_tensor_value_info(k, *v) for k, v in shapes.items()],
        [helper.make_tensor_value_info(k, *v) for k, v in results.items()],
    )
    turned = [node("ReverseSequence", "tm lengths", "ta", time_axis=0, batch_axis=1)]
    return [
        node("Transpose", "x", "tm", perm=[1, 0, 2]),
        *(turned if backwards else [node("Identity", "tm", "ta")]),
        node("Less", "zero steps", "enter"),
        node("Loop", "trips enter zero h0", "last y", body=inner),
    ]


@pytest.mark.parametrize("backwards", [False, True])
def test_a_while_loop_over_time(backwards: bool, tmp_path: Path) -> None:
    constants = {
        "w": floats(RNG, 3, 4), "u": floats(RNG, 4, 4), "h0": np.zeros((1, 4), np.float32),
        "zero": np.array(0, np.int32), "one": np.array(1, np.int32),
        "steps": np.array(5, np.int32), "trips": np.array(2**31 - 1), "lengths": np.array([5]),
    }  # fmt: skip
    if not backwards:
        del constants["lengths"]
    nodes = loop_over_time(backwards)
    graph = agrees(save(model(nodes, {"x": [1, 5, 3]}, ["y"], constants), tmp_path))
    assert ops(graph).count("Tanh") == 5
    assert {"w", "u"} <= set(graph.constants)


@pytest.mark.parametrize("lengths", [[4, 4], [1, 3]])
@pytest.mark.parametrize("batch_axis", [0, 1])
def test_reverse_sequence(lengths: list[int], batch_axis: int, tmp_path: Path) -> None:
    nodes = [node("ReverseSequence", "x n", "y", time_axis=1 - batch_axis, batch_axis=batch_axis)]
    shape = [2, 4, 3] if batch_axis == 0 else [4, 2, 3]
    agrees(save(model(nodes, {"x": shape}, ["y"], {"n": np.array(lengths)}), tmp_path))


def test_slices_backwards(tmp_path: Path) -> None:
    nodes = [node("Slice", "x s e a t", "y")]
    constants = {
        "s": np.array([-1, 1, 4]), "e": np.array([-9, 9, 0]), "a": np.array([0, 1, 2]),
        "t": np.array([-1, 2, -3]),
    }  # fmt: skip
    graph = agrees(save(model(nodes, {"x": [3, 6, 5]}, ["y"], constants), tmp_path))
    assert ops(graph) == ["Gather", "Gather", "Slice"]
    parts = convert(load_file(save(model(nodes, {"x": [3, 6, 5]}, ["y"], constants), tmp_path)))
    assert not parts.obstacles


@pytest.mark.parametrize(
    ("name", "transposes", "inner"),
    [
        ("groups", 1, "GroupNormalization"),
        ("mobile", 1, "HardSwish"),
        ("tokens", None, "Gather"),
        ("rows", None, "LayerNormalization"),
    ],
)
def test_files_of_tf2onnx(name: str, transposes: int | None, inner: str, tmp_path: Path) -> None:
    """Written by another process: TensorFlow and OR-Tools don't load into one."""
    for package in ("keras", "tensorflow", "tf2onnx"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    script = Path(__file__).with_name("keras_files.py")
    command = [sys.executable, str(script), name, str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    data = np.load(tmp_path / "data.npz")
    graph = import_model(tmp_path / "model.onnx")
    assert_close(outputs(graph, {graph.inputs[0].name: data["x"]})[0], data["y"])
    assert inner in ops(graph)
    if transposes is not None:
        assert ops(graph).count("Transpose") == transposes
