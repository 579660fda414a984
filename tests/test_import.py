"""The importer against onnxruntime, golden outputs and onnx's own operator cases."""

from __future__ import annotations

import collections
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_files import agrees, assert_close, model, node, outputs, save

from odt_plan.ir.errors import UnsupportedModelError
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.onnx_import import import_model

Array = NDArray[Any]
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODELS = {  # file in the folder of models: input shape, opset and size are the exporters' own
    "mlperf_resnet8_bn",
    "st_har",
    "cntk_mnist",
    "tinymaix_mnist_cnn",
    "mlperf_ad_autoencoder",
    "mbv2-w0.35-head10-relu6",
    "mcunet-5fps-head10-relu6",
    "proxyless-w0.3-head10-relu6",
    "kwt1_op17",
    "tflm_mnist_lstm",
}


# -- real models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODELS))
def test_real_models_equal_runtime_and_golden(shared: Path, name: str) -> None:
    path = shared / "models" / f"{name}.onnx"
    golden_path = path.with_suffix(".golden.npz")
    names = [o.name for o in onnx.load(path).graph.output]
    for fold in (True, False):
        graph = agrees(path, fold_batchnorm=fold)
        assert [v.name for v in graph.outputs] == names
        assert any(n.op == "BatchNormalization" for n in graph.nodes) == (
            not fold and name == "mlperf_resnet8_bn"
        )
        if golden_path.exists():
            golden = np.load(golden_path)
            feeds = {k[3:].replace("~", ":"): golden[k] for k in golden if k.startswith("in_")}
            assert_close(outputs(graph, feeds)[0], golden["out_0"])


def test_exporter_noise_of_real_models_vanishes(shared: Path) -> None:
    """Shape subgraphs, Transposes around layers and separate bias nodes are gone."""

    def ops(name: str) -> collections.Counter[str]:
        graph = import_model(shared / "models" / f"{name}.onnx")
        return collections.Counter(n.op for n in graph.nodes)

    assert ops("cntk_mnist") == {"Conv": 2, "Relu": 2, "MaxPool": 2, "Reshape": 1, "Gemm": 1}
    assert ops("mlperf_ad_autoencoder") == {"Gemm": 10, "Relu": 9}
    har = ops("st_har")
    assert har == {"Reshape": 2, "Transpose": 1, "Conv": 2, "Relu": 3, "Gemm": 2, "Softmax": 1}
    resnet = ops("mlperf_resnet8_bn")
    assert resnet.pop("Conv") == 9
    assert resnet == {"Relu": 7, "Add": 3, "AveragePool": 1, "Reshape": 1, "Gemm": 1}


def test_every_obstacle_of_a_real_model_is_named(shared: Path, tmp_path: Path) -> None:
    """A transformer whose normalizations and attention are of unknown operators."""
    proto = onnx.load(shared / "models" / "kwt1_op17.onnx")
    renamed = [n for n in proto.graph.node if n.op_type in ("LayerNormalization", "Softmax")]
    assert len(renamed) == 36
    for n in renamed:
        n.op_type = f"Unknown{n.op_type}"
    with pytest.raises(UnsupportedModelError) as e:
        import_model(save(proto, tmp_path))
    text = str(e.value)
    assert all(n.name in text for n in renamed)
    assert "(UnknownLayerNormalization): the operator is not supported" in text
    assert "(UnknownSoftmax): the operator is not supported" in text
    assert "36 obstacles" in text
    assert e.value.exit_code == 4


def test_example_model() -> None:
    path = EXAMPLES / "digits_cnn.onnx"
    assert path.stat().st_size < 300_000
    graph = agrees(path)
    assert [n.op for n in graph.nodes if n.op not in ("Relu", "Reshape")] == [
        "Conv", "Conv", "MaxPool", "Conv", "MaxPool", "Gemm",
    ]  # fmt: skip
    data = np.load(EXAMPLES / "digits.npz")
    assert data["x"].dtype == data["x_val"].dtype == np.float32
    assert data["x"].shape[1:] == data["x_val"].shape[1:] == (1, 8, 8)
    assert len(data["x"]) == len(data["y"]) == 320
    graph = import_model(path, ImportOptions(batch=len(data["y_val"])))
    logits = outputs(graph, {"image": data["x_val"]})[0]
    accuracy = float((logits.argmax(1) == data["y_val"]).mean())
    assert 0.5 < accuracy < 0.75  # personalization has something to learn, on a usable start


# -- names, batch, shapes --------------------------------------------------------------------------


def test_names(tmp_path: Path) -> None:
    """Nodes get names of their own; initializers may be listed as inputs; no opset is named."""
    nodes = [node("Relu", "x", "a"), node("Add", "a c", "b"), node("Tanh", "b", "y")]
    nodes[0].name = nodes[1].name = "same"
    nodes[2].name = ""
    proto = model(nodes, {"x": [1, 4], "c": [4]}, ["y"], {"c": np.ones(4, np.float32)})
    del proto.opset_import[:]
    graph = agrees_without_opset = import_model(save(proto, tmp_path))
    assert [n.name for n in graph.nodes] == ["same", "same~2", "Tanh_2"]
    assert [v.name for v in graph.inputs] == ["x"]
    assert list(agrees_without_opset.constants) == ["c"]
    assert [v.name for v in graph.outputs] == ["y"]


def test_symbolic_batch_is_bound_everywhere(tmp_path: Path) -> None:
    """A Reshape to a computed shape and a second input with the same symbol follow the batch."""
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "n"),
        node("Unsqueeze", "n axis", "n1"),
        node("Concat", "n1 rest", "target", axis=0),
        node("Add", "x other", "sum"),
        node("Reshape", "sum target", "y"),
    ]
    constants = {
        "zero": np.array(0, np.int64),
        "axis": np.array([0], np.int64),
        "rest": np.array([-1], np.int64),
    }
    proto = model(nodes, {"x": ["N", 2, 3], "other": ["N", 2, 3]}, ["y"], constants)
    path = save(proto, tmp_path)
    for batch in (1, 4):
        graph = agrees(path, batch)
        assert [n.op for n in graph.nodes] == ["Add", "Reshape"]
        assert graph.outputs[0].type.shape == (batch, 6)


def test_constant_subgraphs_vanish(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["one"], value_float=1.0),
        node("ConstantOfShape", "dims", "zeros"),
        node("Add", "zeros one", "ones"),
        node("Cast", "halves", "float", to=TensorProto.FLOAT),
        node("Mul", "ones float", "weight"),
        node("Transpose", "weight", "turned", perm=[1, 0]),
        node("MatMul", "x turned", "y"),
    ]
    constants = {"dims": np.array([3, 4], np.int64), "halves": np.full((3, 4), 0.5, np.float16)}
    graph = agrees(save(model(nodes, {"x": [2, 4]}, ["y"], constants), tmp_path))
    assert [n.op for n in graph.nodes] == ["MatMul"]
    assert np.array_equal(graph.constants["turned"], np.full((4, 3), 0.5, np.float32))


@pytest.mark.parametrize("opset", [10, 13, 17, 21])
def test_quantized_weights_become_floats(tmp_path: Path, opset: int) -> None:
    """DequantizeLinear of int8 weights per channel and of an int32 bias is folded."""
    rng = np.random.default_rng(0)
    axis = {} if opset < 13 else {"axis": 0}
    channels = () if opset < 13 else (4,)
    nodes = [
        node("DequantizeLinear", "q s z", "w", **axis),
        node("DequantizeLinear", "r t", "b", **axis),
        node("Conv", "x w b", "y"),
    ]
    constants = {
        "q": rng.integers(-128, 128, (4, 3, 3, 3)).astype(np.int8),
        "s": rng.uniform(0.01, 0.02, channels).astype(np.float32),
        "z": rng.integers(-3, 3, channels).astype(np.int8),
        "r": rng.integers(-5000, 5000, 4).astype(np.int32),
        "t": rng.uniform(1e-4, 2e-4, channels).astype(np.float32),
    }
    proto = model(nodes, {"x": [1, 3, 5, 5]}, ["y"], constants, opset=opset)
    assert [n.op for n in agrees(save(proto, tmp_path)).nodes] == ["Conv"]


def test_nodes_that_no_output_needs_are_no_obstacle(tmp_path: Path) -> None:
    nodes = [node("Relu", "x", "y"), node("NonZero", "x", "unused")]
    assert [n.op for n in agrees(save(model(nodes, {"x": [2, 2]}, ["y"]), tmp_path)).nodes] == [
        "Relu"
    ]


def test_results_that_nobody_reads_are_no_obstacle(tmp_path: Path) -> None:
    """Old exporters give a mask or an index a name that nothing reads."""
    nodes = [
        node("Dropout", "x", "a mask"),
        node("MaxPool", "a", "b index", kernel_shape=[2, 2]),
        node("Sum", "b b b", "y"),
    ]
    graph = agrees(save(model(nodes, {"x": [1, 2, 4, 4]}, ["y"]), tmp_path))
    assert [n.op for n in graph.nodes] == ["MaxPool", "Add", "Add"]


def test_weights_that_are_filled(tmp_path: Path) -> None:
    """As in the light models of the onnx package: larger than what inference looks into."""
    one = numpy_helper.from_array(np.array([0.5], np.float32))
    nodes = [
        node("ConstantOfShape", "s", "w", value=one),
        node("Shape", "w", "size"),
        node("MatMul", "x w", "a"),
        node("Reshape", "a size2", "b"),
        node("Reshape", "b t", "y"),
    ]
    nodes.insert(2, node("Slice", "size zero one", "size2"))
    constants = {
        "s": np.array([40, 40]), "zero": np.array([1]), "one": np.array([2]),
        "t": np.array([1, 40]),
    }  # fmt: skip
    graph = agrees(save(model(nodes, {"x": [1, 40]}, ["y"], constants), tmp_path))
    assert graph.constants["w"].shape == (40, 40)
    assert np.all(graph.constants["w"] == 0.5)


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    function = helper.make_function(
        "local", "Twice", ["a"], ["c"], [node("Relu", "a", "b"), node("Tanh", "b", "c")],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    proto = model([node("Twice", "x", "y", domain="local")], {"x": [2, 2]}, ["y"])
    proto.opset_import.append(helper.make_opsetid("local", 1))
    proto.functions.append(function)
    assert [n.op for n in agrees(save(proto, tmp_path)).nodes] == ["Relu", "Tanh"]


def test_external_data_beside_the_model(tmp_path: Path) -> None:
    proto = model(
        [node("Add", "x c", "y")], {"x": [2, 600]}, ["y"], {"c": np.arange(600, dtype=np.float32)}
    )
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert os.path.getsize(tmp_path / "weights.bin") >= 2400
    graph = agrees(path)
    assert graph.constants["c"][-1] == 599
