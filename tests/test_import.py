"""The importer against onnxruntime, golden outputs and onnx's own operator cases."""

from __future__ import annotations

import collections
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from odt_plan.ir.errors import UnsupportedModelError
from odt_plan.ir.graph import Graph
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.onnx_ops import RULES
from onnx import TensorProto, helper, numpy_helper
from onnx_files import floats, model, node, save

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
}


def outputs(graph: Graph, feeds: Mapping[str, Array]) -> list[Array]:
    env = run(graph, feeds)
    return [env[v.name] for v in graph.outputs]


def runtime(path: Path, feeds: Mapping[str, Array]) -> list[Array]:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    result: list[Array] = session.run(None, dict(feeds))
    return result


def assert_close(got: Array, want: Array, tolerance: float = 1e-5) -> None:
    """Equal shapes; the largest difference is at most ``tolerance`` of the largest value."""
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0) <= tolerance * max(1.0, np.abs(want).max(initial=0))


def agrees(path: Path, batch: int = 1, **options: Any) -> Graph:
    """Import, compare with onnxruntime on seeded inputs, return the graph."""
    graph = import_model(path, batch=batch, **options)
    rng = np.random.default_rng(0)
    feeds = {v.name: floats(rng, *v.type.shape) for v in graph.inputs}
    for got, want in zip(outputs(graph, feeds), runtime(path, feeds), strict=True):
        assert_close(got, want)
    return graph


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

    assert ops("cntk_mnist") == dict(Conv=2, Relu=2, MaxPool=2, Reshape=1, Gemm=1)
    assert ops("mlperf_ad_autoencoder") == dict(Gemm=10, Relu=9)
    assert ops("st_har") == dict(Reshape=2, Transpose=1, Conv=2, Relu=3, Gemm=2, Softmax=1)
    assert ops("mlperf_resnet8_bn") == dict(Conv=9, Relu=7, Add=3, AveragePool=1, Reshape=1, Gemm=1)


def test_every_obstacle_of_a_real_model_is_named(shared: Path) -> None:
    path = shared / "models" / "kwt1_op17.onnx"
    with pytest.raises(UnsupportedModelError) as e:
        import_model(path)
    text = str(e.value)
    proto = onnx.load(path)
    norms = [n.name for n in proto.graph.node if n.op_type == "LayerNormalization"]
    assert len(norms) == 24
    assert all(name in text for name in norms)
    assert "/Gather_1 (Gather)" in text
    assert "25 obstacles" in text
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
    graph = import_model(path, batch=len(data["y_val"]))
    logits = outputs(graph, {"image": data["x_val"]})[0]
    accuracy = float((logits.argmax(1) == data["y_val"]).mean())
    assert 0.5 < accuracy < 0.75  # personalization has something to learn, on a usable start


# -- onnx's own operator cases ---------------------------------------------------------------------

#: Operands that must be run-time data; the other operands of a case become initializers.
DATA_OPERANDS = {"Add": 2, "Sub": 2, "Mul": 2, "Div": 2, "MatMul": 2, "Concat": 9}
#: Reason in the error -> number of cases that are refused for it.
REFUSED = {
    "3 spatial axes; 1 and 2 are supported": 10,
    "is in training mode": 5,
    "the mask output is not supported": 5,
    "the index output is not supported": 2,
    "only casts of float32 to itself": 17,
    "is not <= max": 1,  # Clip with min > max
    "does not fit the shape [3, 4, 0]": 1,  # a tensor without elements
    "is empty": 1,
    "only positive steps are supported": 1,
}
#: Cases whose expected values are rounded by hand to 4 digits.
ROUNDED = {"test_averagepool_2d_ceil_last_window_starts_on_pad"}


def test_backend_node_cases(tmp_path: Path) -> None:
    """Each case of a supported operator with float inputs gives onnx's own result or is refused."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the generators of cases of other operators warn
        cases = collect_testcases(None)
    passed: collections.Counter[str] = collections.Counter()
    refused: collections.Counter[str] = collections.Counter()
    for case in cases:
        proto, (ins, outs) = case.model, case.data_sets[0]
        ops = {n.op_type for n in proto.graph.node}
        if not ops <= set(RULES) or not proto.graph.node:
            continue
        limit = max(DATA_OPERANDS.get(op, 1) for op in ops)
        values = list(proto.graph.input)
        if any(v.type.tensor_type.elem_type != TensorProto.FLOAT for v in values[:limit]):
            continue
        bound = onnx.ModelProto()
        bound.CopyFrom(proto)
        for v, a in zip(values[limit:], ins[limit:], strict=True):
            t = a if isinstance(a, TensorProto) else numpy_helper.from_array(np.asarray(a))
            bound.graph.initializer.append(t)
            bound.graph.initializer[-1].name = v.name
        feeds = {v.name: np.asarray(a) for v, a in zip(values[:limit], ins[:limit], strict=False)}
        try:
            graph = import_model(save(bound, tmp_path))
        except UnsupportedModelError as e:
            refused[next((r for r in REFUSED if r in str(e)), f"{case.name}: {e}")] += 1
            continue
        for got, want in zip(outputs(graph, feeds), outs, strict=True):
            assert got.shape == want.shape, case.name
            tolerance = 1e-3 if case.name in ROUNDED else 1e-5
            assert np.allclose(got, want, rtol=tolerance, atol=1e-6), case.name
        passed[min(ops)] += 1
    assert set(refused) == set(REFUSED), refused
    assert passed.total() >= 160, passed
    silent = set(RULES) - set(passed) - {"Cast"}  # the cases of Cast are all real conversions
    assert not silent, f"no case of {silent} passes"


def test_pytorch_cases(tmp_path: Path) -> None:
    """Models that PyTorch exported at opset 6 import after conversion and give PyTorch's results."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data"
    passed = 0
    for case in sorted([*(folder / "pytorch-converted").iterdir(), *(folder / "pytorch-operator").iterdir()]):
        if not (case / "model.onnx").exists():
            continue
        try:
            graph = import_model(case / "model.onnx")
        except UnsupportedModelError:
            continue  # counted below; the reasons are judged by the cases above
        data = case / "test_data_set_0"
        feeds = {
            v.name: numpy_helper.to_array(TensorProto.FromString((data / f"input_{i}.pb").read_bytes()))
            for i, v in enumerate(graph.inputs)
        }
        for i, got in enumerate(outputs(graph, feeds)):
            blob = (data / f"output_{i}.pb").read_bytes()
            assert_close(got, numpy_helper.to_array(TensorProto.FromString(blob)))
        passed += 1
    assert passed >= 55


# -- one meaning in every opset --------------------------------------------------------------------


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
        [node("AveragePool", "x", "y", kernel_shape=[3, 3], pads=[1, 0, 1, 2], count_include_pad=1)],
        [node("Conv", "x w", "y", auto_pad="SAME_UPPER", strides=[2, 3], group=2)],
        [node("Flatten", "x", "a", axis=2), node("Gemm", "a g h", "y", alpha=0.5, transB=1)],
    ]
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
            if not attrs.get("auto_pad", "VALID").startswith("SAME"):  # the runtime can't dilate SAME
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


@pytest.mark.parametrize("shapes", [((4,), (4, 3)), ((2, 4), (4,)), ((4,), (4,)), ((2, 3, 4), (4, 5))])
def test_matmul_ranks(tmp_path: Path, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    rng = np.random.default_rng(2)
    proto = model([node("MatMul", "x w", "y")], {"x": list(shapes[0])}, ["y"], {"w": floats(rng, *shapes[1])})
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
                nodes.append(node(str(rng.choice(["Relu", "Tanh", "HardSwish", "LeakyRelu"])), x, y))
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
        agrees(path, batch)
        agrees(path, batch, fold_batchnorm=False)


# -- names, batch, shapes --------------------------------------------------------------------------


def test_names(tmp_path: Path) -> None:
    """Nodes without a name or with the same name get names of their own; initializers may be inputs."""
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


def test_nodes_that_no_output_needs_are_no_obstacle(tmp_path: Path) -> None:
    nodes = [node("Relu", "x", "y"), node("NonZero", "x", "unused")]
    assert [n.op for n in agrees(save(model(nodes, {"x": [2, 2]}, ["y"]), tmp_path)).nodes] == ["Relu"]


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
    proto = model([node("Add", "x c", "y")], {"x": [2, 600]}, ["y"], {"c": np.arange(600, dtype=np.float32)})
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert os.path.getsize(tmp_path / "weights.bin") >= 2400
    graph = agrees(path)
    assert graph.constants["c"][-1] == 599
