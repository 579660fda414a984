"""Import of quantized models against onnxruntime, golden outputs and onnx's own operator cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper
from onnx_files import floats, model, node, outputs, save
from qdq_exact import Exact, picture

from odt_plan.ir.errors import UnsupportedModelError
from odt_plan.ir.graph import Graph
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.opdef import get_op
from odt_plan.ir.precision import all_i8, lower, quantizable
from odt_plan.ir.quantization import Quantization

Array = NDArray[Any]
GOLDEN = ("tinyengine_mcunet_vww_int8", "mlperf_dscnn_kws_int8", "mlperf_resnet8_int8")
HEADS = ("mcunet-5fps-head10-qdq", "mbv2-w0.35-head10-qdq", "proxyless-w0.3-head10-qdq")


def everything(path: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Every value of the file, by onnxruntime without graph optimizations."""
    ort = pytest.importorskip("onnxruntime")
    proto = onnx.load(path)
    results = {v.name for v in proto.graph.output}
    inner = onnx.shape_inference.infer_shapes(proto).graph.value_info
    proto.graph.output.extend([v for v in inner if v.name not in results])
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [v.name for v in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def steps(values: Array, quant: Quantization) -> NDArray[np.int64]:
    """Stored values, whichever form they come in."""
    return (quant.quantize(values) if values.dtype.kind == "f" else values).astype(np.int64)


def sample(graph: Graph, seed: int) -> Array:
    """An int8 picture, or one over 127.5."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, graph.inputs[0].type.shape).astype(np.int8)
    return x if graph.inputs[0].type.dtype == "i8" else (x / np.float32(127.5)).astype(np.float32)


# -- real models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_outputs(shared: Path, name: str) -> None:
    """All layers in i8: the recorded outputs, within one step."""
    path = shared / "models" / f"{name}.onnx"
    golden = np.load(path.with_suffix(".golden.npz"))
    graph = import_model(path)
    assert set(quantizable(graph).values()) == {None}
    low = lower(graph, all_i8(graph))
    out = graph.outputs[0].name
    (x,) = (golden[k] for k in golden if k.startswith("in_"))
    got = run(low, {graph.inputs[0].name: x})[out]
    quant = graph.quantization[out]
    assert np.abs(steps(got, quant) - steps(golden["out_0"], quant)).max() <= 1


@pytest.mark.parametrize("name", [*GOLDEN, *HEADS])
def test_every_layer_equals_onnxruntime(shared: Path, name: str) -> None:
    """Each layer on onnxruntime's own operands: one step at most, and hardly ever.

    Means of stored values lie on half a step often, where the fp32 sums of onnxruntime fall to
    either side. Over a whole network one flipped step among a million spreads, so the ends may be
    a few steps apart: see ``test_whole_networks_equal_exact_arithmetic``.
    """
    path = shared / "models" / f"{name}.onnx"
    graph = import_model(path)
    low = lower(graph, all_i8(graph))
    x = sample(graph, 0)
    want = everything(path, {graph.inputs[0].name: x})
    right = {
        v.name: steps(want[n], v.type.quant).astype(np.int8)
        for v in low.values.values()
        for n in [v.name.removesuffix("/i8")]
        if v.type.quant is not None and n in want and want[n].shape == v.type.shape
    }
    right |= low.constants
    checked: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for n in low.nodes:
        names = [v.name for v in n.operands()]
        if n.out.name not in right or not all(i in right for i in names):
            continue
        operands = [None if v is None else right[v.name] for v in n.inputs]
        got = get_op(n.op).kernel(n, operands)[0].astype(np.int64)
        difference = np.abs(got - right[n.out.name])
        assert difference.max() <= 1, n.name
        kind = "mean" if "Pool" in n.op or n.op == "Reshape" else "layer"
        wrong[kind] += int((difference > 0).sum())
        checked[kind] += difference.size
        checked["nodes"] += 1
    assert checked["nodes"] >= 0.9 * sum(n.op.startswith("Q") for n in low.nodes) - 2
    assert wrong["layer"] <= 3e-5 * checked["layer"]
    assert wrong["mean"] <= 0.1 * checked["mean"]


@pytest.mark.parametrize("name", [*GOLDEN, *HEADS])
def test_whole_networks_equal_exact_arithmetic(shared: Path, name: str) -> None:
    """Outputs for pictures: within one step of float64, and at least as near as onnxruntime.

    Its own two modes (fp32 between the quantizations, and integer kernels) are up to 22 steps away.
    """
    path = shared / "models" / f"{name}.onnx"
    graph, exact = import_model(path), Exact(path)
    low = lower(graph, all_i8(graph))
    x, out = graph.inputs[0], graph.outputs[0].name
    quant = graph.quantization[out]
    distances = []
    for seed in range(6):
        picked = picture(x.type.shape, seed)
        data = picked if x.type.dtype == "i8" else (picked / np.float32(127.5)).astype(np.float32)
        ours = run(low, {x.name: data})[out]
        theirs = everything(path, {x.name: data})[out]
        stored = theirs.dtype == np.int8
        true = exact.run(data)
        want = true.astype(np.int64) if stored else steps(true, quant)
        distances.append([np.abs(steps(y, quant) - want).max() for y in (ours, theirs)])
    mine, other = np.array(distances).T
    assert mine.max() <= 1
    assert mine.sum() <= other.sum()


@pytest.mark.parametrize("name", HEADS)
def test_quantized_and_float_file_agree(shared: Path, name: str) -> None:
    """The real-number graph of the QDQ file is near the float model that it was made from."""
    folder = shared / "models"
    quantized = import_model(folder / f"{name}.onnx")
    exact = import_model(folder / f"{name.replace('qdq', 'relu6')}.onnx")
    x = sample(quantized, 1)
    a, b = (outputs(g, {"input": x})[0] for g in (quantized, exact))
    assert np.abs(a - b).max() <= 4 * quantized.quantization["logits"].scale[0]


# -- small models ----------------------------------------------------------------------------------


class Builder:
    """A QDQ file, node by node."""

    def __init__(self, stored: str = "int8", opset: int = 17) -> None:
        """``stored``: dtype of the activations."""
        self.dtype = np.dtype(stored)
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, Array] = {}

    def parameters(self, name: str, scale: Any, zero: Any, dtype: Any = None) -> str:
        """Scale and zero point of a tensor, as operands; the zero point is that of int8."""
        kind = np.dtype(dtype or self.dtype)
        shift = 128 if kind == np.uint8 else 0
        self.constants[f"{name}.s"] = np.asarray(scale, np.float32)
        self.constants[f"{name}.z"] = (np.asarray(zero) + shift).astype(kind)
        return f"{name}.s {name}.z"

    def pair(self, name: str, scale: float, zero: int) -> str:
        """Quantize and dequantize a value."""
        p = self.parameters(name, scale, zero)
        self.nodes.append(node("QuantizeLinear", f"{name} {p}", f"{name}.q"))
        self.nodes.append(node("DequantizeLinear", f"{name}.q {p}", f"{name}.d"))
        return f"{name}.d"

    def weight(self, name: str, stored: Array, scale: Any, axis: int = 0, zero: Any = 0) -> str:
        """A stored constant and its DequantizeLinear."""
        kind = stored.dtype if stored.dtype != np.int32 else np.int32
        p = self.parameters(name, scale, np.broadcast_to(zero, np.shape(scale)), kind)
        shift = 128 if kind == np.uint8 else 0
        self.constants[f"{name}.c"] = (stored.astype(np.int64) + shift).astype(kind)
        attrs: dict[str, Any] = {"axis": axis} if np.ndim(scale) else {}
        self.nodes.append(node("DequantizeLinear", f"{name}.c {p}", name, **attrs))
        return name

    def add(self, op: str, inputs: str, output: str, **attrs: Any) -> str:
        """A float node."""
        self.nodes.append(node(op, inputs, output, **attrs))
        return output

    def save(self, folder: Path, shape: Any, output: str, inputs: int = TensorProto.FLOAT) -> Path:
        """The file."""
        proto = model(
            self.nodes, {"x": shape}, [output], self.constants, opset=self.opset, dtype=inputs
        )
        return save(proto, folder)


def _small(stored: str, opset: int = 17) -> Builder:
    """Strided and depthwise convolutions per channel, pools, a residual, a dense layer."""
    rng = np.random.default_rng(0)
    b = Builder(stored, opset)

    def weight(name: str, *shape: int, axis: int = 0) -> str:
        scale = rng.uniform(0.005, 0.02, shape[axis])
        data = rng.integers(-127, 128, shape).astype(np.int8)
        return b.weight(name, data, scale, axis)

    def bias(name: str, n: int, scale: float) -> str:
        steps = scale * b.constants[f"{name[:-1]}w.s"].astype(np.float64)
        return b.weight(name, rng.integers(-900, 900, n).astype(np.int32), steps.astype(np.float32))

    x = b.pair("x", 0.02, -3)
    b.add("Conv", f"{x} {weight('aw', 6, 3, 3, 3)} {bias('ab', 6, 0.02)}", "a",
          pads=[1, 1, 1, 1], strides=[2, 2])  # fmt: skip
    b.add("Relu", "a", "ar")
    ar = b.pair("ar", 0.03, -128)
    m = b.add("MaxPool", ar, "m", kernel_shape=[2, 2], strides=[2, 2])
    m = b.pair("m", 0.03, -128)
    b.add("Conv", f"{m} {weight('cw', 6, 1, 3, 3)} {bias('cb', 6, 0.03)}", "c",
          pads=[1, 1, 1, 1], group=6)  # fmt: skip
    c = b.pair("c", 0.05, 10)
    b.add("Add", f"{c} {m}", "r")
    r = b.pair("r", 0.06, 20)
    b.add("AveragePool", r, "p", kernel_shape=[2, 2], strides=[2, 2])
    p = b.pair("p", 0.06, 20)
    b.add("GlobalAveragePool", p, "g")
    g = b.pair("g", 0.06, 5)
    b.add("Flatten", g, "f")
    b.add("Gemm", f"f {weight('dw', 6, 4, axis=1)} {bias('db', 4, 0.06)}", "y")
    return b


@pytest.mark.parametrize("stored", ["int8", "uint8"])
@pytest.mark.parametrize("opset", [13, 17, 21])
def test_small_network(tmp_path: Path, stored: str, opset: int) -> None:
    """Every stored value of a network of all kinds, against onnxruntime."""
    b = _small(stored, opset)
    y = b.pair("y", 0.2, 0)
    path = b.save(tmp_path, ["N", 3, 16, 16], y)
    graph = import_model(path)
    assert set(quantizable(graph).values()) == {None}
    assert graph.quantization["aw"].axis == 0
    assert graph.quantization["dw"].axis == 1
    assert graph.quantization["x"] == Quantization((float(np.float32(0.02)),), -3)
    low = lower(graph, all_i8(graph))
    assert [n.op for n in low.nodes] == [
        "Quantize", "QConv", "QMaxPool", "QConv", "QAdd", "QAveragePool", "QGlobalAveragePool",
        "Reshape", "QGemm", "Dequantize",
    ]  # fmt: skip
    assert np.array_equal(low.constants["cw"], b.constants["cw.c"])
    assert np.abs(low.constants["cb"].astype(np.int64) - b.constants["cb.c"]).max() <= 1
    for seed in range(5):
        x = floats(np.random.default_rng(seed), 1, 3, 16, 16) * 1.5
        want, got = everything(path, {"x": x}), run(low, {"x": x})
        for name in ("ar", "m", "c", "r", "p", "g"):
            quant = graph.quantization[name]
            assert np.abs(steps(got[name], quant) - steps(want[name], quant)).max() <= 1, name
        assert np.abs(got[y] - want[y]).max() <= 0.201


def test_bounds_of_a_quantization_become_a_clip(tmp_path: Path) -> None:
    """A lower bound of 0 is the network's Relu; it must stay where the layer is f32."""
    b = Builder()
    x = b.pair("x", 0.02, 0)
    w = b.weight("w", np.random.default_rng(0).integers(-9, 9, (2, 3, 1, 1)).astype(np.int8), 0.1)
    b.add("Conv", f"{x} {w}", "y")
    path = b.save(tmp_path, [1, 3, 4, 4], b.pair("y", 0.01, -128))
    graph = import_model(path)
    assert [n.op for n in graph.nodes] == ["Conv", "Clip"]
    x_data = floats(np.random.default_rng(1), 1, 3, 4, 4) * 0.5
    want = everything(path, {"x": x_data})["y.d"]
    assert (want == 0).any()
    assert np.abs(outputs(graph, {"x": x_data})[0] - want).max() < 0.03
    low = lower(graph, all_i8(graph))
    assert [n.op for n in low.nodes] == ["Quantize", "QConv", "Dequantize"]
    assert np.abs(outputs(low, {"x": x_data})[0] - want).max() <= 0.0101


@pytest.mark.parametrize("stored", ["int8", "uint8"])
def test_int8_inputs_and_outputs(tmp_path: Path, stored: str) -> None:
    """An 8-bit input stays one (uint8: 128 less); an 8-bit output is what it means."""
    b = Builder(stored)
    rng = np.random.default_rng(0)
    p, q = b.parameters("p", 0.02, 7), b.parameters("y", 0.05, -9)
    b.add("Reshape", "x shape", "r")
    b.constants["shape"] = np.array([1, 12], np.int64)
    b.add("DequantizeLinear", f"r {p}", "d")
    w = b.weight("w", rng.integers(-127, 128, (12, 3)).astype(np.int8), 0.01)
    b.add("MatMul", f"d {w}", "m")
    b.add("QuantizeLinear", f"m {q}", "yq")
    kind = TensorProto.INT8 if stored == "int8" else TensorProto.UINT8
    path = b.save(tmp_path, ["N", 3, 4], "yq", kind)
    proto = onnx.load(path)
    proto.graph.output[0].type.tensor_type.elem_type = kind
    path = save(proto, tmp_path)
    graph = import_model(path)
    assert str(graph.inputs[0].type) == "i8[1,3,4]"
    assert graph.outputs[0].type.dtype == "f32"
    low = lower(graph, all_i8(graph))
    assert [n.op for n in low.nodes] == ["Reshape", "QGemm", "Dequantize"]
    assert low.inputs[0].type.quant == Quantization((float(np.float32(0.02)),), 7)
    shift = 128 if stored == "uint8" else 0
    for seed in range(5):
        x = np.random.default_rng(seed).integers(-128, 128, (1, 3, 4))
        want = everything(path, {"x": (x + shift).astype(stored)})["yq"].astype(int) - shift
        x = x.astype(np.int8)
        for g in (graph, low):
            got = steps(outputs(g, {"x": x})[0], graph.quantization["yq"])
            assert np.abs(got - want).max() <= 1


def test_weight_only(tmp_path: Path) -> None:
    """The float model that onnxruntime computes; the weight keeps its scales."""
    b = Builder()
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.01, 0.02, 4).astype(np.float32)
    data = rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)
    b.add("Conv", f"x {b.weight('w', data, scale)}", "y")
    path = b.save(tmp_path, [1, 3, 8, 8], "y")
    graph = import_model(path)
    assert graph.quantization == {"w": Quantization(tuple(map(float, scale)), 0, 0)}
    assert np.array_equal(graph.quantization["w"].quantize(graph.constants["w"]), data)
    assert quantizable(graph) == {"Conv_y": "the range of its operand x is not known"}
    x = floats(rng, 1, 3, 8, 8)
    assert np.allclose(outputs(graph, {"x": x})[0], everything(path, {"x": x})["y"], atol=1e-5)


def test_weights_that_i8_cannot_hold(tmp_path: Path) -> None:
    """Zero points of weights: exact as floats, and the reason is told."""
    rng = np.random.default_rng(0)
    for zero, scale, reason in (
        (5, 0.1, "its weight w has the zero point 5; i8 weights need 0"),
        ([1, 2], [0.1, 0.2], "its weight w has no scales"),
    ):
        b = Builder()
        x = b.pair("x", 0.1, 0)
        data = rng.integers(-100, 100, (2, 3, 1, 1)).astype(np.int8)
        b.add("Conv", f"{x} {b.weight('w', data, np.array(scale), 0, np.array(zero))}", "y")
        path = b.save(tmp_path, [1, 3, 4, 4], b.pair("y", 0.5, 0))
        graph = import_model(path)
        assert quantizable(graph) == {"Conv_y": reason}
        x_data = np.rint(floats(rng, 1, 3, 4, 4) * 20).astype(np.float32) / 10
        want = everything(path, {"x": x_data})["y"]
        assert np.allclose(outputs(graph, {"x": x_data})[0], want, rtol=1e-5, atol=1e-4)


def test_scales_follow_a_turned_weight(tmp_path: Path) -> None:
    """DequantizeLinear -> Transpose -> MatMul: the scales run along the turned axis."""
    b = Builder()
    x = b.pair("x", 0.1, 0)
    data = np.random.default_rng(0).integers(-127, 128, (2, 3)).astype(np.int8)
    b.weight("w", data, np.array([0.1, 0.2]))
    b.add("Transpose", "w", "t", perm=[1, 0])
    b.add("MatMul", f"{x} t", "y")
    graph = import_model(b.save(tmp_path, [1, 3], b.pair("y", 0.5, 0)))
    assert graph.quantization["t"].axis == 1
    low = lower(graph, all_i8(graph))
    assert np.array_equal(low.constants["t"], data)


def test_value_quantized_twice(tmp_path: Path) -> None:
    """Two quantizations of one value are two values; a reader of the bare value keeps it."""
    b = Builder()
    b.pair("x", 0.1, 0)
    first, second = b.parameters("p", 0.02, 0), b.parameters("q", 0.5, 3)
    b.add("Relu", "x.d", "r")
    b.add("QuantizeLinear", f"r {first}", "a")
    b.add("DequantizeLinear", f"a {first}", "a.d")
    b.add("QuantizeLinear", f"r {second}", "b")
    b.add("DequantizeLinear", f"b {second}", "b.d")
    b.add("Add", "a.d b.d", "s")
    path = b.save(tmp_path, [1, 50], b.pair("s", 0.3, 0))
    graph = import_model(path)
    assert [n.op for n in graph.nodes] == ["Relu", "Clip", "Clip", "Add"]
    low = lower(graph, all_i8(graph))
    assert "QAdd" in {n.op for n in low.nodes}
    x = np.rint(floats(np.random.default_rng(0), 1, 50) * 40).astype(np.float32) / 10
    want = everything(path, {"x": x})["s.d"]
    assert np.abs(outputs(low, {"x": x})[0] - want).max() <= 0.301


@pytest.mark.parametrize("stored", ["int8", "uint8"])
def test_qlinear_operators(tmp_path: Path, stored: str) -> None:
    """QLinearConv and QLinearMatMul, with the meaning of an 8-bit input from the first of them."""
    b = Builder(stored)
    rng = np.random.default_rng(0)
    # onnxruntime's products of uint8 and int8 saturate beyond 64 on x86-64 without VNNI
    most = 127 if stored == "int8" else 63
    p, q, r = (b.parameters(n, s, z) for n, s, z in (("p", 0.02, 7), ("q", 0.1, -3), ("r", 0.3, 4)))
    b.constants["w"] = rng.integers(-most, most + 1, (4, 3, 3, 3)).astype(np.int8)
    b.constants["ws"] = rng.uniform(0.005, 0.02, 4).astype(np.float32)
    b.constants["wz"] = np.zeros(4, np.int8)
    b.constants["b"] = rng.integers(-900, 900, 4).astype(np.int32)
    b.add("QLinearConv", f"x {p} w ws wz {q} b", "c", pads=[1, 1, 1, 1], strides=[2, 2])
    b.constants["shape"] = np.array([1, 64], np.int64)
    b.add("Reshape", "c shape", "f")
    b.constants["v"] = rng.integers(-most, most + 1, (64, 5)).astype(np.int8)
    b.constants["vs"], b.constants["vz"] = np.array(0.01, np.float32), np.array(0, np.int8)
    b.add("QLinearMatMul", f"f {q} v vs vz {r}", "m")
    b.add("DequantizeLinear", f"m {r}", "y")
    kind = TensorProto.INT8 if stored == "int8" else TensorProto.UINT8
    path = b.save(tmp_path, [1, 3, 8, 8], "y", kind)
    graph = import_model(path)
    low = lower(graph, all_i8(graph))
    assert [n.op for n in low.nodes] == ["QConv", "Reshape", "QGemm", "Dequantize"]
    assert np.array_equal(low.constants["b"], b.constants["b"])
    shift = 128 if stored == "uint8" else 0
    for seed in range(5):
        x = np.random.default_rng(seed).integers(-128, 128, (1, 3, 8, 8))
        want = everything(path, {"x": (x + shift).astype(stored)})["y"]
        assert np.abs(outputs(low, {"x": x.astype(np.int8)})[0] - want).max() <= 0.301


def test_what_moves_integers(tmp_path: Path) -> None:
    """Slices, joins and pads of 8-bit integers, between QuantizeLinear and DequantizeLinear."""
    b = Builder("uint8")
    p, q = b.parameters("p", 0.1, 3), b.parameters("q", 0.4, 0)
    b.constants |= {
        "from": np.array([1], np.int64), "to": np.array([12], np.int64),
        "axis": np.array([1], np.int64), "pads": np.array([0, 1, 0, 2], np.int64),
    }  # fmt: skip
    b.add("QuantizeLinear", f"x {p}", "a")
    b.add("Concat", "a a", "c", axis=1)
    b.add("Pad", "c pads", "d")  # with the stored number 0
    b.add("Slice", "d from to axis", "s")
    b.add("DequantizeLinear", f"s {p}", "e")
    w = b.weight("v", np.random.default_rng(0).integers(-9, 9, (11, 2)).astype(np.int8), 0.1)
    b.add("MatMul", f"e {w}", "m")
    b.add("QuantizeLinear", f"m {q}", "mq")
    b.add("DequantizeLinear", f"mq {q}", "y")
    path = b.save(tmp_path, [1, 6], "y")
    graph = import_model(path)
    assert set(quantizable(graph).values()) == {None}
    low = lower(graph, all_i8(graph))
    assert {"Slice", "QGemm"} <= {n.op for n in low.nodes}
    assert low.values["s"].type.dtype == "i8"
    x = floats(np.random.default_rng(1), 1, 6) * 4
    want = everything(path, {"x": x})["y"]
    for g in (graph, low):
        assert np.abs(outputs(g, {"x": x})[0] - want).max() <= (0.401 if g is low else 1.0)


def test_passes_keep_annotations(tmp_path: Path) -> None:
    """Channels-last input, separate padding and bias: nothing stays between the integer layers."""
    b = Builder()
    rng = np.random.default_rng(0)
    x = b.pair("x", 0.05, 4)
    b.constants["pads"] = np.array([0, 1, 1, 0, 0, 1, 1, 0], np.int64)
    b.add("Pad", f"{x} pads", "p")
    p = b.pair("p", 0.05, 4)
    b.add("Transpose", p, "t", perm=[0, 3, 1, 2])
    w = b.weight("w", rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8), 0.01)
    b.add("Conv", f"t {w}", "c")
    b.constants["bias"] = floats(rng, 1, 4, 1, 1)
    b.add("Add", "c bias", "y")
    path = b.save(tmp_path, [1, 6, 6, 3], b.pair("y", 0.2, 0))
    graph = import_model(path)
    assert [n.op for n in graph.nodes] == ["Transpose", "Conv"]
    low = lower(graph, all_i8(graph))
    assert [n.op for n in low.nodes] == ["Quantize", "Transpose", "QConv", "Dequantize"]
    data = floats(rng, 1, 6, 6, 3)
    want = everything(path, {"x": data})["y.d"]
    assert np.abs(outputs(low, {"x": data})[0] - want).max() <= 0.201


# -- what is refused -------------------------------------------------------------------------------


def _pair_with(scale: Array, zero: Array | None, folder: Path, opset: int = 17) -> Path:
    operands = "s z" if zero is not None else "s"
    constants = {"s": scale} | ({"z": zero} if zero is not None else {})
    nodes = [
        node("QuantizeLinear", f"x {operands}", "q", name="quant"),
        node("DequantizeLinear", f"q {operands}", "y", name="dequant"),
    ]
    return save(model(nodes, {"x": [1, 4]}, ["y"], constants, opset=opset), folder)


@pytest.mark.parametrize(
    ("scale", "zero", "reason"),
    [
        (0.0, np.int8(0), "its scale 0 is not a positive finite number"),
        (-1.0, np.int8(0), "its scale -1 is not"),
        (np.inf, np.int8(0), "its scale inf is not"),
        (1.0, np.int16(300), "the result is int16; only int8 and uint8"),
        (1.0, np.int32(0), "int32"),
        ([0.1] * 4, np.zeros(4, np.int8), "4 scales for a value that is computed"),
        ([0.1] * 3, np.zeros(3, np.int8), "3 scales do not fit axis 1 of length 4"),
        ([0.1] * 4, np.zeros(3, np.int8), "it has 4 scales, but 3 zero points"),
        ([0.1, 0.0, 0.1, 0.1], np.zeros(4, np.int8), r"its scale 0 is not .* \(1 of 4 are so\)"),
    ],
)
def test_bad_parameters(tmp_path: Path, scale: Any, zero: Any, reason: str) -> None:
    path = _pair_with(np.asarray(scale, np.float32), np.asarray(zero), tmp_path, 21)
    with pytest.raises(UnsupportedModelError, match=reason) as e:
        import_model(path)
    assert "quant (QuantizeLinear)" in str(e.value)


def test_bad_weight_parameters(tmp_path: Path) -> None:
    for scale, zero, reason in (
        (np.float32(0), None, "dw (DequantizeLinear): its scale 0 is not a positive finite number"),
        (np.float32(np.inf), None, "its scale inf is not"),
        (np.float32(0.1), np.int32(400), "its zero point 400 is out of range of int8"),
        (np.float32(0.1), np.int32(4), "its zero point is int32 for a tensor of int8"),
        (np.float16(0.1), None, "its scale is float16; only float32"),
    ):
        constants: dict[str, Array] = {"w": np.ones((3, 2), np.int8), "s": np.asarray(scale)}
        operands = "w s"
        if zero is not None:
            constants["z"], operands = np.asarray(zero), "w s z"
        nodes = [
            node("DequantizeLinear", operands, "d", name="dw"),
            node("MatMul", "x d", "y"),
        ]
        path = save(model(nodes, {"x": [1, 3]}, ["y"], constants), tmp_path)
        with pytest.raises(UnsupportedModelError) as e:
            import_model(path)
        assert reason in str(e.value)


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "FLOAT8E4M3FN", "FLOAT8E5M2", "INT16", "UINT16"])
def test_other_element_types_are_named(tmp_path: Path, kind: str) -> None:
    nodes = [node("DequantizeLinear", "w s", "d", name="dw"), node("MatMul", "x d", "y")]
    proto = model(nodes, {"x": [1, 3]}, ["y"], {"s": np.array(0.1, np.float32)}, opset=21)
    data = np.ones((3, 2), np.float32)
    proto.graph.initializer.append(
        helper.make_tensor("w", getattr(TensorProto, kind), data.shape, data.reshape(-1).tolist())
    )
    with pytest.raises(UnsupportedModelError) as e:
        import_model(save(proto, tmp_path))
    text = str(e.value)
    assert "dw (DequantizeLinear)" in text
    assert kind.lower() in text.replace("float8_", "float8")
    assert "only int8 and uint8" in text


def test_integers_that_are_computed_with(tmp_path: Path) -> None:
    """An operator on 8-bit integers, an input without a meaning, a reinterpretation."""
    b = Builder()
    p, other = b.parameters("p", 0.1, 0), b.parameters("o", 0.2, 0)
    b.add("QuantizeLinear", f"x {p}", "q")
    b.add("Relu", "q", "r")
    b.add("DequantizeLinear", f"r {p}", "y")
    with pytest.raises(UnsupportedModelError, match=r"Relu_r .*works on 8-bit integers"):
        import_model(b.save(tmp_path, [1, 4], "y"))
    b = Builder()
    p, other = b.parameters("p", 0.1, 0), b.parameters("o", 0.2, 0)
    b.add("QuantizeLinear", f"x {p}", "q")
    b.add("DequantizeLinear", f"q {other}", "y")
    with pytest.raises(UnsupportedModelError, match="such a reinterpretation is not supported"):
        import_model(b.save(tmp_path, [1, 4], "y"))
    b = Builder()
    b.add("Relu", "x", "y")
    path = b.save(tmp_path, [1, 4], "y", TensorProto.INT8)
    with pytest.raises(UnsupportedModelError, match=r"x \(input\).*is int8; only float32 inputs"):
        import_model(path)
