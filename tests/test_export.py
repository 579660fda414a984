"""``odt-plan export``: learned weights and decisions back in the model file, by onnxruntime."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_run import Cli
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx_files import assert_close, floats, model, node, runtime, save

from odt_plan.backends.c.golden import random_samples
from odt_plan.backends.numpy import Runtime
from odt_plan.ir.onnx_write import OriginalFile
from odt_plan.ir.provenance import Affine, Moved, Origin
from odt_plan.planner.plan import load_plan
from odt_plan.planner.rebuild import forward_of, rebuild

Array = NDArray[Any]
PLAN = Path("out") / "plan.json"
BUDGET = ("--ram", "16MB", "--flash", "64MB", "--time-limit", "5")


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def planned(odt: Cli, path: Path, *options: str) -> None:
    """The plan of a model in the folder ``out``."""
    done = odt(path, *BUDGET, "-o", "out", "--train", "all", *options, "-q")
    assert done.code == 0, done.err


def learn(noise: float = 0.1, keep: Mapping[str, Any] | None = None) -> Runtime:
    """A runtime of the plan with other weights, which are saved as training saves them.

    ``keep`` maps parameters to what stays of them.
    """
    plan = load_plan(PLAN)
    trained = Runtime(plan, rebuild(plan, PLAN))
    random, before = rng(), trained.params()
    values: dict[str, Array] = {}
    for u in trained.training.updates:
        old = before[u.candidate.param]
        new = old + noise * (old.std() or 1) * floats(random, *old.shape)
        if u.candidate.channels is not None:
            new[:, u.candidate.channels :] = old[:, u.candidate.channels :]
        for index in (keep or {}).get(u.candidate.param, ()):
            new[index] = old[index]
        values[u.candidate.param] = new.astype(np.float32)
    assert values
    trained.set_params(values)
    after = trained.params()
    np.savez("w.npz", **{k: after[k] for k in values})  # type: ignore[arg-type]
    return trained


@dataclass
class Tuned:
    """A written file beside the original."""

    old: onnx.ModelProto
    new: onnx.ModelProto
    record: dict[str, Any]

    @property
    def changed(self) -> set[str]:
        """Initializers of other bytes."""
        pairs = zip(self.old.graph.initializer, self.new.graph.initializer, strict=True)
        assert all(a.name == b.name for a, b in pairs)
        pairs = zip(self.old.graph.initializer, self.new.graph.initializer, strict=True)
        return {a.name for a, b in pairs if a.SerializeToString() != b.SerializeToString()}

    def data(self, name: str) -> Array:
        return numpy_helper.to_array(next(t for t in self.new.graph.initializer if t.name == name))


def exported(
    odt: Cli,
    trained: Runtime,
    tolerance: float = 1e-5,
    *,
    same: bool = True,
    more: Mapping[str, Array] | None = None,
) -> Tuned:
    """Write the file; onnxruntime computes from it what the runtime computes.

    ``more`` are inputs of the file that are none of the trained graph.
    """
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx", "--json")
    assert done.code == 0, done.err
    source = PLAN.parent / trained.plan.model.file
    assert not list(Path().glob(".odt-plan-*"))
    inner = onnx.load(source).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in inner.input}
    names = [v.name for v in inner.output]
    output = names.index(trained.training.prediction.name) if len(names) > 1 else 0
    for seed in range(3):
        x = random_samples(trained.training, np.random.default_rng(seed))
        feed = dict(more or {})
        for v, key in zip(trained.training.samples, list(x), strict=True):
            kind = helper.tensor_dtype_to_np_dtype(kinds[v.name])
            if kind.kind == "i" and x[key].dtype.kind == "f":
                x[key] = np.rint(x[key])
            real = x[key] if v.type.quant is None else v.type.quant.dequantize(x[key])
            feed[v.name] = real.astype(kind)
        got = runtime(Path("tuned.onnx"), feed)[output]
        assert_close(got, trained.infer(x), tolerance)
        old = runtime(source, feed)[output]
        moved = old.shape != got.shape or np.abs(old - got).max() > tolerance * np.abs(old).max()
        assert moved, "a file that has not learned would do"
    tuned = Tuned(onnx.load(source), onnx.load("tuned.onnx"), done.json)
    if same:
        for proto in (tuned.old, bare := onnx.ModelProto.FromString(tuned.new.SerializeToString())):
            del proto.metadata_props[:]
            for n in proto.graph.node:
                del n.metadata_props[:]
        del bare.graph.initializer[:]
        bare.graph.initializer.extend(tuned.old.graph.initializer)
        assert bare == tuned.old, "something else than initializers and notes has changed"
    return tuned


def norm(random: np.random.Generator, name: str, channels: int) -> dict[str, Array]:
    return {
        f"{name}.g": floats(random, channels) + np.float32(2),
        f"{name}.b": floats(random, channels),
        f"{name}.m": floats(random, channels),
        f"{name}.v": np.abs(floats(random, channels)) + np.float32(0.5),
    }


def conv_net(folder: Path, random: np.random.Generator, **changes: Array) -> Path:
    """Conv (no bias) + BN, depthwise Conv (bias) + BN, ConvTranspose + BN, and a Gemm."""
    constants: dict[str, Array] = {
        "w1": floats(random, 4, 2, 3, 3),
        "w2": floats(random, 4, 1, 3, 3),
        "b2": floats(random, 4),
        "w3": floats(random, 4, 3, 2, 2),
        "fc": floats(random, 5, 3),
        "fc.b": floats(random, 5),
        "unused": floats(random, 7),
        **norm(random, "n1", 4),
        **norm(random, "n2", 4),
        **norm(random, "n3", 3),
    }
    nodes = [
        node("Conv", "x w1", "c1", "conv1"),
        node("BatchNormalization", "c1 n1.g n1.b n1.m n1.v", "d1", "bn1", epsilon=1e-3),
        node("Relu", "d1", "r1"),
        node("Conv", "r1 w2 b2", "c2", "conv2", group=4),
        node("BatchNormalization", "c2 n2.g n2.b n2.m n2.v", "d2", "bn2"),
        node("ConvTranspose", "d2 w3", "c3", "up"),
        node("BatchNormalization", "c3 n3.g n3.b n3.m n3.v", "d3", "bn3"),
        node("GlobalAveragePool", "d3", "p"),
        node("Flatten", "p", "f"),
        node("Gemm", "f fc fc.b", "y", "head", transB=1),
    ]
    proto = model(nodes, {"x": [1, 2, 8, 8]}, ["y"], constants | changes)
    proto.producer_name = "a test"
    proto.metadata_props.add(key="author", value="somebody")
    proto.metadata_props.add(key="odt_plan.device", value="an older plan's")
    return save(proto, folder)


def test_folded_normalizations(odt: Cli, tmp_path: Path) -> None:
    """Weights are divided by the factors; learned biases go into the normalization's own."""
    planned(odt, conv_net(tmp_path, rng()))
    tuned = exported(odt, learn())
    assert tuned.changed == {"w1", "n1.b", "w2", "n2.b", "w3", "n3.b", "fc", "fc.b"}
    assert set(tuned.record["changed"]) == tuned.changed
    assert tuned.record["rounded"] == {}


def test_unfolded_normalizations(odt: Cli, tmp_path: Path) -> None:
    planned(odt, conv_net(tmp_path, rng()), "--no-fold-batchnorm")
    assert {"n1.g", "n1.b", "b2"} <= exported(odt, learn()).changed


def test_a_shared_normalization_bias_stays(odt: Cli, tmp_path: Path) -> None:
    """Where another node reads it, the layer's own bias takes what is learned."""
    path = conv_net(tmp_path, rng())
    proto = onnx.load(path)
    proto.graph.node[4].input[2] = "n1.b"
    done = odt(save(proto, tmp_path), *BUDGET, "-o", "out", "--train", "w1,w2,b2,fc", "-q")
    assert done.code == 0, done.err
    assert exported(odt, learn()).changed == {"w1", "w2", "b2", "fc"}


def test_channels_that_are_multiplied_by_zero(odt: Cli, tmp_path: Path) -> None:
    """Exact where they have not learned, refused by name where they have."""
    gamma = np.array([1, 0, 2, 3], np.float32)
    planned(odt, conv_net(tmp_path, rng(), **{"n1.g": gamma}))
    exported(odt, learn(keep={"w1": [1]}))
    Path("tuned.onnx").unlink()
    learn()
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx")
    assert done.code == 4
    assert "w1 of node conv1 can't be written: the file multiplies it by 0" in done.error
    assert not Path("tuned.onnx").exists()


def test_a_part_of_the_channels(odt: Cli, tmp_path: Path) -> None:
    """Frozen channels keep their bytes."""
    path = conv_net(tmp_path, rng())
    done = odt(path, *BUDGET, "-o", "out", "--train", "w1=0.5,fc.b", "-q")
    assert done.code == 0, done.err
    tuned = exported(odt, learn())
    assert tuned.changed == {"w1", "fc.b"}
    old = OriginalFile(path).tensors["w1"]
    assert np.array_equal(tuned.data("w1")[:, 1:], old[:, 1:])
    assert not (tuned.data("w1")[:, :1] == old[:, :1]).any()


def matrices(folder: Path) -> Path:
    """Products in the forms of exporters: scaled, transposed, of rows, in f16, from Constants."""
    random = rng()
    constants: dict[str, Array] = {
        "flat": np.array([1, -1], np.int64),
        "w2": floats(random, 10, 5),
        "b2": np.array(0.5, np.float32),
        "w3a": floats(random, 5, 4).astype(np.float16),
        "w3b": floats(random, 5, 2),
        "b3": floats(random, 6),
        "half": np.array(0.5, np.float32),
        "w4": floats(random, 7, 6),
        "axis": np.array([0], np.int64),
    }
    value = numpy_helper.from_array(floats(random, 6, 7), "v")
    nodes = [
        node("Constant", "", "w5", "constant", value=value),
        node("Constant", "", "b5", "floats", value_floats=[0.5] * 6),
        node("Transpose", "x", "t", "to_nhwc", perm=[0, 2, 3, 1]),
        node("Reshape", "t flat", "f"),
        node("Gemm", "f w2 b2", "g2", "gemm2", alpha=0.5, beta=2.0),
        node("Cast", "w3a", "w3f", to=TensorProto.FLOAT),
        node("Concat", "w3f w3b", "w3", axis=1),
        node("MatMul", "g2 w3", "m3", "matmul3"),
        node("Mul", "b3 half", "b3h"),
        node("Unsqueeze", "b3h axis", "b3u"),
        node("Add", "m3 b3u", "a3", "add3"),
        node("Relu", "a3", "r3"),
        node("Transpose", "w4", "w4t", perm=[1, 0]),
        node("Gemm", "r3 w4t", "g4", "gemm4"),
        node("Transpose", "w5", "w5t", perm=[1, 0]),
        node("MatMul", "g4 w5t", "y5", "matmul5"),
        node("Add", "y5 b5", "y", "add5"),
    ]
    return save(model(nodes, {"x": [1, 2, 1, 5]}, ["y"], constants), folder)


def test_matrices(odt: Cli, tmp_path: Path) -> None:
    done = odt(matrices(tmp_path), *BUDGET, "-o", "out", "-q", "--train", "all", "--loss", "mse")
    assert done.code == 0, done.err
    trained = learn(keep={"b2": [slice(None)]})
    tuned = exported(odt, trained, 2e-3, same=False)  # f16 rounds
    assert tuned.changed == {"w2", "w3a", "w3b", "b3", "w4"}
    assert set(tuned.record["changed"]) == tuned.changed | {"w5", "b5"}
    assert tuned.data("w3a").dtype == np.float16
    assert list(tuned.record["rounded"]) == ["w3"]
    assert [n.op_type for n in tuned.new.graph.node] == [n.op_type for n in tuned.old.graph.node]
    (w5,) = (n for n in tuned.new.graph.node if n.name == "constant")
    assert not np.array_equal(
        numpy_helper.to_array(w5.attribute[0].t),
        numpy_helper.to_array(tuned.old.graph.node[0].attribute[0].t),
    )


def test_one_number_for_all_channels(odt: Cli, tmp_path: Path) -> None:
    """It can move, but not become several."""
    planned(odt, matrices(tmp_path), "--loss", "mse")
    learn()
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx")
    assert done.code == 4
    assert "b2 of node gemm2 can't be written: one number of the file" in done.error
    with np.load("w.npz") as file:
        np.savez("w.npz", **{**file, "b2": np.full(5, 3, np.float32)})  # type: ignore[arg-type]
    assert odt("export", PLAN, "w.npz", "-o", "tuned.onnx").code == 0
    assert OriginalFile(Path("tuned.onnx")).tensors["b2"] == 1.5  # beta is 2


def quantize(name: str, scale: str, zero: str) -> list[NodeProto]:
    return [
        node("QuantizeLinear", f"{name} {scale} {zero}", f"{name}.q"),
        node("DequantizeLinear", f"{name}.q {scale} {zero}", f"{name}.d"),
    ]


def qdq(folder: Path, *, weights: str = "int8") -> Path:
    """Conv (scales per channel, int32 bias), Relu, Gemm (turned) between quantizations."""
    random = rng()
    zero = np.array(0 if weights == "int8" else 128, weights)
    info = np.iinfo(weights)
    steps = 0.01 + 0.01 * random.random(4).astype(np.float32)
    constants: dict[str, Array] = {
        "s": np.array(0.05, np.float32),
        "z": np.array(0, np.int8),
        "w.q": random.integers(info.min + 30, info.max - 30, (4, 2, 3, 3)).astype(weights),
        "w.s": steps,
        "w.z": np.broadcast_to(zero, 4).copy(),
        "b.q": random.integers(-900, 900, 4).astype(np.int32),
        "b.s": steps * np.float32(0.05),
        "b.z": np.zeros(4, np.int32),
        "fc.q": random.integers(info.min + 30, info.max - 30, (64, 3)).astype(weights),
        "fc.s": np.array(0.003, np.float32),
        "fc.z": zero,
        "shape": np.array([1, 64], np.int64),
    }
    nodes = [
        *quantize("x", "s", "z"),
        node("DequantizeLinear", "w.q w.s w.z", "w", axis=0),
        node("DequantizeLinear", "b.q b.s b.z", "b", axis=0),
        node("Conv", "x.d w b", "c", "conv"),
        node("Relu", "c", "r"),
        *quantize("r", "s", "z"),
        node("Reshape", "r.d shape", "f"),
        node("DequantizeLinear", "fc.q fc.s fc.z", "fc"),
        node("Gemm", "f fc", "y0", "head"),
        *quantize("y0", "s", "z"),
        node("Identity", "y0.d", "y"),
    ]
    return save(model(nodes, {"x": [1, 2, 6, 6]}, ["y"], constants), folder)


@pytest.mark.parametrize("weights", ["int8", "uint8"])
def test_integers_of_quantized_models(odt: Cli, tmp_path: Path, weights: str) -> None:
    """What i8 layers have learned is integers of the file's scales: exact."""
    planned(odt, qdq(tmp_path, weights=weights), "--precision", "*=i8", "--loss", "cross-entropy")
    trained = learn()
    assert {"QConv", "QGemm"} <= {n.op for n in trained.training.graph.nodes}
    tuned = exported(odt, trained, 0.02)  # onnxruntime rounds differently now and then
    assert tuned.changed == {"w.q", "b.q", "fc.q"}
    assert tuned.data("w.q").dtype == weights
    params = trained.params()
    zero = int(tuned.data("fc.z"))
    stored = (tuned.data("fc.q").astype(np.float32) - zero).T * np.float32(0.003)
    assert np.array_equal(stored, params["fc"])  # output features come first
    assert tuned.record["rounding_difference"] == 0


def test_float_weights_of_quantized_models_are_rounded(odt: Cli, tmp_path: Path) -> None:
    """Mixed layers learn what the file's integers can't hold; that is told."""
    planned(odt, qdq(tmp_path), "--precision", "*=mixed", "--loss", "cross-entropy")
    tuned = exported(odt, learn(), 0.1)
    assert set(tuned.record["rounded"]) == {"w", "b", "fc"}
    assert 0 < tuned.record["rounding_difference"] < 0.1
    assert tuned.record["difference"] < 1e-4
    done = odt("export", PLAN, "w.npz", "-o", "again.onnx")
    assert "3 are rounded to the file's types, " in done.out


def test_quantized_operators(odt: Cli, tmp_path: Path) -> None:
    """QLinearConv has the integers as operands."""
    random = rng()
    constants: dict[str, Array] = {
        "s": np.array(0.05, np.float32),
        "z": np.array(0, np.int8),
        "w": random.integers(-90, 90, (4, 2, 3, 3)).astype(np.int8),
        "w.s": np.full(4, 0.01, np.float32),
        "w.z": np.zeros(4, np.int8),
        "b": random.integers(-900, 900, 4).astype(np.int32),
        "shape": np.array([1, 64], np.int64),
    }
    nodes = [
        node("QuantizeLinear", "x s z", "xq"),
        node("QLinearConv", "xq s z w w.s w.z s z b", "cq", "conv"),
        node("DequantizeLinear", "cq s z", "c"),
        node("Reshape", "c shape", "y"),
    ]
    path = save(model(nodes, {"x": [1, 2, 6, 6]}, ["y"], constants), tmp_path)
    planned(odt, path, "--precision", "*=i8", "--loss", "mse")
    assert exported(odt, learn(), 0.02).changed == {"w", "b"}


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_recurrent_layers(odt: Cli, tmp_path: Path, op: str, direction: str) -> None:
    """One tensor of the file per direction and half; a bias of two sums goes into the first."""
    random, gates, size = rng(), {"LSTM": 4, "GRU": 3}[op], 5
    d = 1 + (direction == "bidirectional")
    constants: dict[str, Array] = {
        "W": floats(random, d, gates * size, 3),
        "R": floats(random, d, gates * size, size),
        "B": floats(random, d, 2 * gates * size),
        "fc": floats(random, d * size, 4),
        "shape": np.array([1, d * size], np.int64),
    }
    attrs: dict[str, Any] = {"hidden_size": size, "direction": direction}
    attrs |= {"linear_before_reset": 1} if op == "GRU" else {}
    nodes = [
        node("Transpose", "x", "t", perm=[1, 0, 2]),
        node(op, "t W R B", "all last", "rnn", **attrs),
        node("Transpose", "last", "l", perm=[1, 0, 2]),
        node("Reshape", "l shape", "f"),
        node("MatMul", "f fc", "y", "head"),
    ]
    planned(odt, save(model(nodes, {"x": [1, 6, 3]}, ["y"], constants), tmp_path))
    assert exported(odt, learn()).changed == {"W", "R", "B", "fc"}


def test_normalized_rows_and_split_weights(odt: Cli, tmp_path: Path) -> None:
    """LayerNorm; queries, scaled, and keys that one matrix of the file holds."""
    random = rng()
    constants: dict[str, Array] = {
        "g": floats(random, 1, 6),
        "beta": floats(random, 6),
        "qk": floats(random, 6, 12),
        "eighth": np.array(0.125, np.float32),
        "shape": np.array([1, 9], np.int64),
        "fc9": floats(random, 9, 4),
    }
    nodes = [
        node("LayerNormalization", "x g beta", "n", "norm"),
        node("Split", "qk", "wq0 wk", "split", axis=1, num_outputs=2),
        node("Mul", "wq0 eighth", "wq"),
        node("MatMul", "n wq", "q", "queries"),
        node("MatMul", "n wk", "k", "keys"),
        node("Transpose", "k", "kt", perm=[0, 2, 1]),
        node("MatMul", "q kt", "s", "scores"),
        node("Reshape", "s shape", "f"),
        node("MatMul", "f fc9", "y", "head"),
    ]
    proto = model(nodes, {"x": [1, 3, 6]}, ["y"], constants, opset=18)
    planned(odt, save(proto, tmp_path))
    assert exported(odt, learn()).changed == {"g", "beta", "qk", "fc9"}


def test_external_data(odt: Cli, tmp_path: Path) -> None:
    """Tensors in a file beside the model are in one beside the new one; the old ones stay."""
    path = conv_net(tmp_path, rng())
    options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 100}
    onnx.save(onnx.load(path), "split.onnx", **options)  # type: ignore[arg-type]
    planned(odt, Path("split.onnx"))
    before = {p.name: p.read_bytes() for p in PLAN.parent.iterdir()}
    tuned = exported(odt, learn(), same=False)
    assert {p.name: p.read_bytes() for p in PLAN.parent.iterdir()} == before
    assert tuned.record["files"] == ["tuned.onnx", "tuned.onnx.data"]
    bare = onnx.load("tuned.onnx", load_external_data=False).graph.initializer
    places = {t.name: t.external_data[0].value for t in bare if t.external_data}
    assert set(places.values()) == {"tuned.onnx.data"}
    assert all(int(t.external_data[1].value) % 4096 == 0 for t in bare if t.external_data)
    assert {"w1", "w2"} <= set(places) <= {"w1", "w2", "w3", "fc", "unused"}
    done = odt("export", PLAN, "w.npz", "-o", "out/split.onnx")
    assert (done.code, done.error) == (
        2, "out/split.onnx: is read and can't be written; give another -o",
    )  # fmt: skip


@pytest.mark.parametrize("classes", [3, 5, 9])
def test_another_head(odt: Cli, tmp_path: Path, classes: int) -> None:
    """The file's last layer gets the new one's sizes, and so does what is said about them."""
    path = conv_net(tmp_path, rng())
    proto = onnx.shape_inference.infer_shapes(onnx.load(path))
    del proto.graph.output[:]
    proto.graph.node.append(node("Softmax", "y", "probs", "softmax"))
    proto.graph.value_info.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5]))
    result = helper.make_tensor_value_info("probs", TensorProto.FLOAT, ["n", 5])
    proto.graph.output.append(result)
    path = save(proto, tmp_path)
    done = odt(path, *BUDGET, "-o", "out", "--train", "fc", "--head", str(classes), "-q")
    assert done.code == 0, done.err
    tuned = exported(odt, learn(), same=False)
    assert tuned.changed == {"fc", "fc.b"}  # the fresh bias, too, though it is frozen
    assert tuned.data("fc").shape == (classes, 3)
    assert np.array_equal(tuned.data("fc.b"), np.zeros(classes, np.float32))
    dims = tuned.new.graph.output[0].type.tensor_type.shape.dim
    assert (dims[0].dim_param, dims[1].dim_value) == ("n", classes)
    kept = {v.name for v in tuned.new.graph.value_info}
    assert kept == {v.name for v in tuned.old.graph.value_info} - {"y"} if classes != 5 else kept


@pytest.mark.parametrize("precision", ["f32", "mixed", "i8"])
def test_another_head_of_a_calibrated_model(odt: Cli, tmp_path: Path, precision: str) -> None:
    """The scales of the plan are those of the fresh head, which the file's last layer has not."""
    path = conv_net(tmp_path, rng())
    options = ("--calib", "synthetic", "--precision", f"head*={precision}", "--train", "fc,fc.b")
    done = odt(path, *BUDGET, "-o", "out", *options, "--head", "9", "-q")
    assert done.code == 0, done.err
    learn()
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx", "--json")
    assert done.code == 0, done.err
    assert done.json["changed"] == {"fc": [9, 3], "fc.b": [9]}


def test_a_head_that_is_stored_in_integers(odt: Cli, tmp_path: Path) -> None:
    proto = onnx.load(qdq(tmp_path))
    del proto.graph.node[-3:]
    proto.graph.node[-1].output[0] = "y"
    done = odt(save(proto, tmp_path), *BUDGET, "-o", "out", "--train", "last", "--head", "7", "-q")
    assert done.code == 0, done.err
    learn()
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx")
    assert done.code == 4
    assert "fc of node head can't be written: the file stores it in integers" in done.error


def test_tensors_of_several_nodes(odt: Cli, tmp_path: Path) -> None:
    """Tied weights learn as one; a tensor that one of its readers has learned alone is refused."""
    random = rng()
    constants = {"w": floats(random, 4, 4), "b": floats(random, 4)}
    nodes = [
        node("Gemm", "x w b", "a", "first"),
        node("Relu", "a", "r"),
        node("Gemm", "r w b", "y", "second", transB=1),
    ]
    path = save(model(nodes, {"x": [1, 4]}, ["y"], constants), tmp_path)
    done = odt(path, *BUDGET, "-o", "out", "--train", "w", "-q")
    assert done.code == 0, done.err
    assert exported(odt, learn()).changed == {"w"}
    with_alpha = [*nodes[:2], node("Gemm", "r w b", "y", "second", alpha=0.5)]
    path = save(model(with_alpha, {"x": [1, 4]}, ["y"], constants), tmp_path)
    done = odt(path, *BUDGET, "-o", "out", "--train", "w", "-q")
    assert done.code == 0, done.err
    learn()
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx")
    assert done.code == 4
    assert "w can't be written: w/alpha of node second is made of it too and has not" in done.error
    assert done.error.endswith("of its own there")


def test_computed_weights_are_refused(odt: Cli, tmp_path: Path) -> None:
    random = rng()
    constants = {"a": floats(random, 4, 4), "b": floats(random, 4, 4)}
    nodes = [node("MatMul", "a b", "w", "product"), node("MatMul", "x w", "y", "layer")]
    planned(odt, save(model(nodes, {"x": [1, 4]}, ["y"], constants), tmp_path), "--loss", "mse")
    learn()
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx")
    assert done.code == 4
    assert "w of node layer can't be written: product (MatMul) computes it; freeze it" in done.error


def test_notes_alone(odt: Cli, tmp_path: Path) -> None:
    """Without weights, no tensor changes; older notes are replaced, those of others stay."""
    path = conv_net(tmp_path, rng())
    done = odt(path, *BUDGET, "-o", "out", "--train", "fc,w2=0.5", "-q")
    assert done.code == 0, done.err
    for source in (PLAN.parent / "model.onnx", Path("a.onnx")):
        done = odt("export", PLAN, "-o", "a.onnx")
        assert done.code == 0, done.err
        new, old = onnx.load("a.onnx"), onnx.load(source)
        assert new.graph.initializer == old.graph.initializer
    notes = {n.name: {p.key: p.value for p in n.metadata_props} for n in new.graph.node}
    assert notes["head"]["odt_plan.action"] == "updated"
    assert notes["head"]["odt_plan.updated"] == "fc 1"
    assert notes["conv1"]["odt_plan.action"] == "frozen"
    assert notes["conv1"]["odt_plan.precision"] == "f32"
    assert notes["conv1"]["odt_plan.bytes"] == str(4 * 4 * 6 * 6)
    assert int(notes["conv1"]["odt_plan.cycles"]) > 0
    assert "odt_plan.action" not in notes["Relu_r1"]
    assert notes["bn1"] == {}
    model_notes = {p.key: p.value for p in new.metadata_props}
    assert model_notes["author"] == "somebody"
    plan = json.loads(PLAN.read_text())
    assert model_notes["odt_plan.device"] == plan["device"]["id"] != "an older plan's"
    assert len(model_notes) == len(new.metadata_props)
    saved = {a["value"]: a["action"] for a in plan["decisions"]["activations"]}
    assert (notes["Flatten_f"].get("odt_plan.activation") == "kept") == (saved.get("f") == "keep")


def test_wrong_arguments(odt: Cli, tmp_path: Path) -> None:
    planned(odt, conv_net(tmp_path, rng()))
    learn()
    with np.load("w.npz") as file:
        arrays = dict(file)
    np.savez("few.npz", **{k: a for k, a in arrays.items() if k != "w2"})  # type: ignore[arg-type]
    np.savez("other.npz", **arrays, other=np.ones(3))  # type: ignore[arg-type]
    np.savez("nan.npz", **(arrays | {"fc.b": np.full(5, np.nan)}))  # type: ignore[arg-type]
    Path("cut.bin").write_bytes(b"ODTP")
    Path("foreign.bin").write_bytes(b"ODTP" + bytes(100))
    for weights, reason in (
        ("few.npz", "few.npz: lacks w2, which the plan updates"),
        ("other.npz", "other.npz: the model has no parameter other"),
        ("nan.npz", "fc.b has learned NaN or infinite numbers"),
        ("none.npz", "none.npz: can't be read: No such file"),
        ("out/model.onnx", "out/model.onnx: can't be read as .npz"),
        ("cut.bin", "cut.bin: 4 bytes are no saved state"),
        ("foreign.bin", "foreign.bin: saved by a library of another plan"),
    ):
        done = odt("export", PLAN, weights, "-o", "tuned.onnx")
        assert done.code == 2
        assert done.error.startswith(reason)
    for output in ("out/model.onnx", "out/../out/plan.json", "w.npz"):
        done = odt("export", PLAN, "w.npz", "-o", output)
        assert (done.code, done.error.endswith("give another -o")) == (2, True)
    assert odt("export", PLAN, "w.npz", "-o", "out").code == 2
    assert odt("export", PLAN, "w.npz").code == 2
    assert not Path("tuned.onnx").exists()


def test_nothing_is_written_that_computes_something_else(
    odt: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is taken back wrongly is found before the file appears."""
    planned(odt, conv_net(tmp_path, rng()))
    learn()
    right = OriginalFile.replace

    def wrong(file: OriginalFile, name: str, data: Array) -> None:
        right(file, name, data * np.float32(1.01))

    monkeypatch.setattr(OriginalFile, "replace", wrong)
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx")
    assert done.code == 1
    assert "does not compute what was trained" in done.error
    assert {p.name for p in Path().iterdir()} == {"model.onnx", "out", "w.npz"}


MAIN = """
#include <stdio.h>
#include "MODEL.h"
static FILE *file;
static int put(void *user, uint32_t offset, const void *data, uint32_t bytes) {
    (void)user;
    return fseek(file, (long)offset, SEEK_SET) || fwrite(data, 1, bytes, file) != bytes;
}
int main(void) {
    static MODEL_t net;
    static float x[UPPER_SAMPLE_SIZE];
    static int32_t label[UPPER_TARGET_SIZE] = {2};
    float loss;
    int i, status = MODEL_init(&net);
    for (i = 0; i < UPPER_SAMPLE_SIZE; i++) {
        x[i] = (float)(i % 7) - 3.0f;
    }
    for (i = 0; i < 3; i++) {
        status |= MODEL_train_step(&net, x, label, 0.01f, &loss);
    }
    file = fopen("saved.bin", "wb");
    return status | MODEL_save(&net, put, NULL) | fclose(file);
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_what_a_device_has_saved(odt: Cli, tmp_path: Path) -> None:
    """The emitted library trains and saves; its weights are those of the runtime."""
    planned(odt, conv_net(tmp_path, rng()), "--emit", "c", "--optimizer", "momentum")
    name = next(p.name.removesuffix("_weights.h") for p in Path("out").glob("*_weights.h"))
    Path("main.c").write_text(MAIN.replace("MODEL", name).replace("UPPER", name.upper()))
    sources = [str(p) for p in Path("out").glob("*.c") if not p.name.endswith("_selftest.c")]
    options = ["-O1", "-ffp-contract=off", "-Iout", "main.c", *sources, "-lm", "-o", "train"]
    subprocess.run(["gcc", *options], check=True)
    subprocess.run(["./train"], check=True)
    plan = load_plan(PLAN)
    trained = Runtime(plan, rebuild(plan, PLAN))
    x = (np.arange(128) % 7 - 3).astype(np.float32).reshape(1, 2, 8, 8)
    for _ in range(3):
        trained.train_step(x, np.array([2], np.int32), 0.01)
    done = odt("export", PLAN, "saved.bin", "-o", "tuned.onnx", "--json")
    assert done.code == 0, done.err
    (got,) = runtime(Path("tuned.onnx"), {"x": x})
    assert_close(got, trained.infer(x))
    damaged = bytearray(Path("saved.bin").read_bytes())
    damaged[60] ^= 1
    Path("bad.bin").write_bytes(damaged)
    done = odt("export", PLAN, "bad.bin", "-o", "again.onnx")
    assert (done.code, "cut or damaged" in done.error) == (2, True)


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [("mlperf_resnet8_bn", "f32", 1e-5), ("mbv2-w0.35-head10-qdq", "i8", 0.2)],
)
def test_real_models(odt: Cli, shared: Path, name: str, precision: str, tolerance: float) -> None:
    path = shared / "models" / f"{name}.onnx"
    planned(odt, path, "--precision", f"*={precision}")
    trained = learn(0.05)
    tuned = exported(odt, trained, tolerance)
    assert 10 < len(tuned.changed) < len(tuned.old.graph.initializer)
    forward = forward_of(trained.plan, PLAN)
    tensors = OriginalFile(path).tensors
    assert set(forward.origins) == set(forward.constants)
    for constant, origin in forward.origins.items():  # the record says what importing does
        assert np.array_equal(origin.value(tensors), forward.constants[constant])


def test_steps() -> None:
    """What has not changed keeps its digits, even where a step loses some."""
    tensors = {"t": floats(rng(), 2, 3)}
    origin = Origin("t").then(Affine(np.array(1 / 3), np.array(1e3))).then(Moved(np.transpose))
    new = origin.value(tensors).copy()
    new[1, 0] += 1
    changed = dict(tensors)
    origin.restore(new, changed)
    assert np.argwhere(changed["t"] != tensors["t"]).tolist() == [[0, 1]]
    assert changed["t"][0, 1] == pytest.approx(tensors["t"][0, 1] + 3, abs=1e-3)
