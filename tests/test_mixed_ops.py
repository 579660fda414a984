"""Layers in mixed precision: meaning, lowering, gradients, training, plans."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import plans
import pytest
from board import lane
from board.kernels import run_kernels
from numpy.typing import NDArray
from onnx_files import export, floats, model, node, save
from test_board import needs_zig, on_board
from test_c_backend import Planned, reference, samples
from test_int8_training import NETS, agree, calibrated, gradients, partly
from test_mixed_precision import request_of, trains
from test_qdq_import import everything, steps

from odt_plan.backends.c import emit_c
from odt_plan.ir.autodiff import build_training, param_slots
from odt_plan.ir.calibrate import calibrate
from odt_plan.ir.errors import UsageError
from odt_plan.ir.graph import Attr, Graph, Node, TensorType
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.opdef import get_op
from odt_plan.ir.precision import Precision, lower, mixable, quantizable
from odt_plan.ir.quantization import Quantization
from odt_plan.ir.training import TrainingSpec
from odt_plan.planner.check import check
from odt_plan.planner.pipeline import make_plan
from odt_plan.planner.plan import load_plan
from odt_plan.planner.rebuild import rebuild

Array = NDArray[Any]
needs_gcc = pytest.mark.skipif(
    not (lane.has_zig_lane() and lane.has_gcc()), reason="needs arm-none-eabi-gcc and unicorn"
)


def lowered(graph: Graph, i8: Sequence[str] = ()) -> Graph:
    """Layers with weights mixed but those named, which are i8 as all others."""
    precision: dict[str, Precision] = dict.fromkeys(quantizable(graph), "i8")
    precision |= {n: "mixed" for n in mixable(graph) if n not in i8}
    low = lower(graph, precision)
    assert any(n.op.startswith("Mixed") for n in low.nodes)
    return low


def stored(x: Array, attrs: dict[str, Attr]) -> Array:
    """Quantize as a graph of its own."""
    g = Graph("boundary")
    x_in = g.add_input("x", TensorType(x.shape))
    whole = {**attrs, "clamp": (-128, 127)}
    g.outputs = [g.add_node("Quantize", (x_in,), whole, name="y").out]
    return run(g, {"x": x})["y"]


# -- meaning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_layers_are_those_of_the_float_graph_between_conversions(name: str) -> None:
    """Dequantized operand, the float layer with its Relu or Clip, quantized: bit for bit."""
    graph = calibrated(name)
    low = lowered(graph)
    x = floats(np.random.default_rng(1), *graph.inputs[0].type.shape)
    env = run(low, {"x": x})
    float_nodes = {n.name: n for n in graph.nodes}
    readers = graph.consumers()
    mixed = [n for n in low.nodes if n.op.startswith("Mixed")]
    assert {n.name for n in mixed} == set(mixable(graph))
    for n in mixed:
        layer = float_nodes[n.name]
        operand = next(n.operands())
        assert operand.type.quant is not None
        real = operand.type.quant.dequantize(env[operand.name])
        weights = [env[v.name] for v in list(layer.operands())[1:]]
        (y,) = get_op(layer.op).kernel(layer, [real, *weights])
        last: Node = layer
        if layer.out.name not in graph.quantization:
            (last,) = readers[layer.out]
            (y,) = get_op(last.op).kernel(last, [y])
        kept = {k: n.attrs[k] for k in ("out_scale", "out_zero_point")}
        assert np.array_equal(env[n.out.name], stored(y, kept)), n.name


def qdq(folder: Path) -> Path:
    """Convolutions, a residual sum and two dense layers, with float weights between QDQ pairs."""
    rng = np.random.default_rng(6)
    constants: dict[str, Array] = {"shape": np.array([1, 6 * 25], np.int64)}
    nodes = []

    def quantized(value: str, scale: float, zero: int) -> str:
        constants[f"{value}.s"] = np.array(scale, np.float32)
        constants[f"{value}.z"] = np.array(zero, np.int8)
        names = f"{value}.s {value}.z"
        nodes.append(node("QuantizeLinear", f"{value} {names}", f"{value}.q"))
        nodes.append(node("DequantizeLinear", f"{value}.q {names}", f"{value}.d"))
        return f"{value}.d"

    def weights(name: str, *shape: int) -> str:
        constants[f"{name}.w"] = floats(rng, *shape) * np.float32(0.4)
        constants[f"{name}.b"] = floats(rng, shape[0])
        return f"{name}.w {name}.b"

    x = quantized("x", 0.03, 4)
    nodes.append(node("Conv", f"{x} {weights('c1', 6, 3, 3, 3)}", "c1", "c1", pads=[1] * 4))
    nodes.append(node("Relu", "c1", "r1"))
    a = quantized("r1", 0.03, -128)
    w = weights("c2", 6, 1, 3, 3)
    nodes.append(node("Conv", f"{a} {w}", "c2", "c2", pads=[1] * 4, group=6))
    b = quantized("c2", 0.05, -7)
    nodes.append(node("Add", f"{a} {b}", "s", "s"))
    c = quantized("s", 0.06, 0)
    w = weights("c3", 6, 6, 1, 1)
    nodes.append(node("Conv", f"{c} {w}", "c3", "c3", strides=[2, 2]))
    d = quantized("c3", 0.1, 10)
    nodes.append(node("Reshape", f"{d} shape", "f"))
    f = quantized("f", 0.1, 10)
    nodes.append(node("Gemm", f"{f} {weights('fc1', 8, 150)}", "fc1", "fc1", transB=1))
    h = quantized("fc1", 0.3, -4)
    constants["fc2.w"] = floats(rng, 8, 5)
    nodes.append(node("MatMul", f"{h} fc2.w", "fc2", "fc2"))
    y = quantized("fc2", 0.5, 0)
    return save(model(nodes, {"x": (1, 3, 9, 9)}, [y], constants), folder)


@pytest.mark.parametrize("seed", range(3))
def test_float_weights_between_qdq_pairs_as_onnxruntime_has_them(seed: int, tmp_path: Path) -> None:
    """Each layer on onnxruntime's own operands, and the end of the network, within one step."""
    path = qdq(tmp_path)
    graph = import_model(path)
    assert set(mixable(graph).values()) == {None}
    assert "has no scales" in str(quantizable(graph)["c1"])
    precision: dict[str, Precision] = dict.fromkeys(mixable(graph), "mixed")
    low = lower(graph, precision)
    x = floats(np.random.default_rng(seed), 1, 3, 9, 9) * np.float32(2)
    want, env = everything(path, {"x": x}), run(low, {"x": x})
    mixed = [n for n in low.nodes if n.op.startswith("Mixed")]
    assert [n.name for n in mixed] == ["c1", "c2", "c3", "fc1", "fc2"]
    for n in mixed:
        operand, result = next(n.operands()), n.out.name.removesuffix("/i8")
        name = operand.name.removesuffix("/i8")
        x_ort = want[f"{name}.q"].astype(np.int8)
        constants = [None if v is None else env[v.name] for v in n.inputs[1:]]
        (got,) = get_op(n.op).kernel(n, [x_ort, *constants])
        off = np.abs(got.astype(np.int64) - want[f"{result.removesuffix('.d')}.q"])
        assert off.max() <= 1, n.name
        assert (off > 0).mean() < 0.01, n.name
    end = graph.outputs[0].name
    off = np.abs(
        steps(env[end], graph.quantization[end]) - steps(want[end], graph.quantization[end])
    )
    assert off.max() <= 1


def test_one_lowering_with_every_precision() -> None:
    """Mixed, i8 and f32 layers share weights and values."""
    g = Graph("shared")
    x = g.add_input("x", TensorType((1, 4)))
    w = g.add_constant("w", floats(np.random.default_rng(0), 4, 4))
    v = g.add_constant("v", floats(np.random.default_rng(1), 4, 4))
    p = g.add_node("MatMul", (x, v), name="p").out
    q = g.add_node("Gemm", (p, w, None), {"trans_b": 1}, name="q").out
    r = g.add_node("Gemm", (p, w, None), {"trans_b": 1}, name="r").out
    t = g.add_node("Gemm", (p, w, None), {"trans_b": 1}, name="t").out
    total = g.add_node("Add", (q, r), name="sum").out
    g.outputs = [g.add_node("Add", (total, t), name="y").out]
    samples = floats(np.random.default_rng(2), 8, 4)
    calibrate(g, samples)
    low = lower(g, {"p": "mixed", "q": "mixed", "r": "i8", "sum": "i8"})
    assert [n.op for n in low.nodes] == [
        "Quantize", "MixedGemm", "MixedGemm", "QGemm", "Dequantize", "Gemm", "QAdd", "Dequantize",
        "Add",
    ]  # fmt: skip
    assert low.nodes[2].inputs[1] is low.nodes[5].inputs[1] is low.values["w"]
    assert low.nodes[1].attrs["trans_b"] == 0
    feeds = {"x": samples[:1]}
    got, want = run(low, feeds)["y"], run(g, feeds)["y"]
    assert np.abs(got - want).max() < 0.1 * np.abs(want).max() + 0.1


def test_refusals() -> None:
    graph = calibrated("mobile")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"b0.add": "mixed"}, "b0.add can't be mixed: it has no weights; make it i8"),
        ({"x": "mixed"}, "x can't be mixed: it has no weights"),
        ({"stem": "half"}, "half is not one of f32, mixed, i8"),
    ]
    for precision, reason in cases:
        with pytest.raises(UsageError, match=reason):
            lower(graph, precision)
    del graph.quantization["x"]
    with pytest.raises(UsageError, match="stem can't be mixed: the range of its operand x"):
        lower(graph, {"stem": "mixed"})
    deep = Graph("deep")
    x = deep.add_input("x", TensorType((2, 1, 4)))
    w = deep.add_constant("w", np.ones((4, 3), np.float32))
    deep.outputs = [deep.add_node("MatMul", (x, w), name="y").out]
    deep.quantization |= {name: Quantization((0.1,)) for name in "xy"}
    assert "are not matrices" in str(mixable(deep)["y"])


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("part", [False, True], ids=["whole", "partly"])
@pytest.mark.parametrize("share", [1, 2], ids=["all-mixed", "half-mixed"])
@pytest.mark.parametrize("net", NETS)
def test_gradients_equal_autograd(net: str, share: int, part: bool, after: int) -> None:
    """Through residual blocks, depthwise layers and clamps, before and after updates."""
    graph = calibrated(net)
    i8 = [n for i, n in enumerate(mixable(graph)) if i % share]
    low = lowered(graph, i8)
    training = build_training(low, TrainingSpec(), partly(low) if part else plans.whole(low))
    by_type = {u.candidate.param: u.value.type.dtype for u in training.updates}
    assert set(by_type) == set(param_slots(graph))
    assert ("i8" in by_type.values()) == bool(i8)
    for name, got, want in gradients(graph, training, (), after):
        if want.any():
            agree(got, want)
        else:  # all that it feeds is clamped
            assert not got.any(), name


def test_frozen_neighbours_keep_stored_operands() -> None:
    """No gradient reads an f32 copy of an activation."""
    low = lowered(calibrated("mobile"))
    training = build_training(low, TrainingSpec(), plans.whole(low))
    backward = [n for n in training.graph.nodes if n.op in ("QConvGradWeight", "QGemmGradWeight")]
    assert len(backward) == len(mixable(calibrated("mobile")))
    assert all(next(n.operands()).type.dtype == "i8" for n in backward)
    assert not any(n.op in ("ConvGradWeight", "GemmGradWeight") for n in training.graph.nodes)


# -- plans -----------------------------------------------------------------------------------------


def test_pinned_layers_are_planned_and_trained(tmp_path: Path) -> None:
    request = replace(request_of(tmp_path), precision=("conv*=mixed", "fc=mixed"), train=("all",))
    planned = make_plan(request)
    names = ("conv0", "conv1", "conv2", "fc")
    assert [planned.plan.decisions.precision[n] for n in names] == ["mixed"] * 4
    assert {u.value.type.dtype for u in planned.training.updates} == {"f32"}
    trains(planned.plan, planned.training)
    path = tmp_path / "plan.json"
    path.write_text(planned.plan.model_dump_json(), encoding="utf-8")
    training = rebuild(load_plan(path), path)
    assert repr(training.graph) == repr(planned.training.graph)
    check(load_plan(path), training, request.device)


@pytest.mark.parametrize(
    ("precision", "reason"),
    [
        ("pool=mixed", "pool can't be mixed: it has no weights"),
        ("b0.add=mixed", "b0.add can't be mixed: it has no weights"),
        ("stem.relu=mixed", "stem.relu is part of the layer stem"),
    ],
)
def test_bad_pins(precision: str, reason: str, tmp_path: Path) -> None:
    request = replace(request_of(tmp_path), model=export(nets.resnet(), tmp_path))
    with pytest.raises(UsageError, match=reason):
        make_plan(replace(request, precision=(precision,)))


# -- C ---------------------------------------------------------------------------------------------


def plan_of(net: str, spec: TrainingSpec, share: int = 1, *, part: bool = False) -> Planned:
    """Every ``share``-th layer with weights mixed, all updated."""
    graph = calibrated(net)
    low = lowered(graph, [n for i, n in enumerate(mixable(graph)) if i % share])
    training = build_training(low, spec, partly(low) if part else plans.whole(low))
    return plans.keep_all(training), training


PLANS: dict[str, Callable[[], Planned]] = {
    "sgd": lambda: plan_of("mobile", TrainingSpec()),
    "adam-partly": lambda: plan_of("mobile", TrainingSpec(optimizer="adam"), part=True),
    "half-accumulate": lambda: plan_of("resnet", TrainingSpec(micro_batches=2), 2),
    "batch": lambda: plan_of("cnn", TrainingSpec(optimizer="momentum"), part=True),
}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("case", PLANS)
def test_host_equals_numpy_bit_for_bit(case: str, tmp_path: Path) -> None:
    plan, training = PLANS[case]()
    name = emit_c(plan, training, tmp_path)[0].stem
    program = lane.build_host(tmp_path, name)
    result = lane.run_host(program, lane.training_input(*samples(training, 7), 0.02))
    assert result.exit_code == 0, result.stdout
    assert result.value("selftest_exact") == 1
    assert result.files["output.bin"] == reference(plan, training, 7, 0.02)


@needs_zig
def test_cortex_m7(tmp_path: Path) -> None:
    on_board(PLANS["adam-partly"](), tmp_path)


@needs_gcc
@pytest.mark.parametrize("core", ["cortex-m7", "cortex-m4"])
def test_extremes_are_quantized_as_in_numpy(core: str, tmp_path: Path) -> None:
    """NaN of both signs, infinities, halves, what int32 cannot hold, anywhere in a four."""
    odd = np.array([np.nan, -np.nan, np.inf, -np.inf, 3e38, -3e38, 2.0**31, -(2.0**31), 1e-45])
    halves = np.arange(-140, 140) / 2
    rng = np.random.default_rng(0)
    runs = []
    for i, attrs in enumerate(RESULTS):
        values = rng.permutation(np.concatenate([halves, odd])) if i else np.repeat(odd, 4)
        g = Graph("boundary")
        x = g.add_input("x", TensorType((len(values) + i % 2,)))
        data = np.append(values, 1.0)[: x.type.size].astype(np.float32)
        runs.append((g.add_node("Quantize", (x,), attrs, name="y"), [data]))
    results, _ = run_kernels(tmp_path, runs, core, "gcc")
    for (n, operands), (got,) in zip(runs, results, strict=True):
        (want,) = get_op("Quantize").kernel(n, operands)
        assert np.array_equal(got, want)


RESULTS: tuple[dict[str, Attr], ...] = (
    {"out_scale": 1.0, "out_zero_point": 3, "clamp": (-128, 127)},
    {"out_scale": 1.0, "out_zero_point": 127, "clamp": (-128, 127)},
    {"out_scale": 0.5, "out_zero_point": -128, "clamp": (-128, 100)},
    {"out_scale": 2.0, "out_zero_point": -7, "clamp": (-20, 20)},
)


@needs_gcc
@pytest.mark.parametrize(
    ("x", "w", "attrs", "most"),
    [
        ((1, 48, 16, 16), (8, 48, 1, 1), {}, 1.65),
        ((1, 336, 4, 4), (56, 336, 1, 1), {}, 1.25),
        ((1, 16, 32, 32), (16, 16, 3, 3), {"pads": (1, 1, 1, 1)}, 1.12),
        ((1, 48, 16, 16), (48, 1, 3, 3), {"pads": (1, 1, 1, 1), "group": 48}, 1.75),
    ],
    ids=["pointwise", "late-pointwise", "3x3", "depthwise"],
)
def test_instructions_beside_conv(
    x: tuple[int, ...], w: tuple[int, ...], attrs: dict[str, Attr], most: float, tmp_path: Path
) -> None:
    """Executed instructions over those of Conv alone, Cortex-M7, gcc -O2."""
    rng, g = np.random.default_rng(0), Graph("one")
    quant = Quantization((0.02,), 3)
    kernel, bias = g.add_input("w", TensorType(w)), g.add_input("b", TensorType(w[:1]))
    real, held = g.add_input("real", TensorType(x)), g.add_input("x", TensorType(x, "i8", quant))
    conv = g.add_node("Conv", (real, kernel, bias), attrs, name="conv")
    mixed = g.add_node("MixedConv", (held, kernel, bias), {**attrs, **RESULTS[3]}, name="mixed")
    weights = [floats(rng, *w), floats(rng, w[0])]
    data = rng.integers(-128, 128, x, np.int8)
    counts = []
    for i, (n, operand) in enumerate(((conv, quant.dequantize(data)), (mixed, data))):
        (folder := tmp_path / str(i)).mkdir()
        results, done = run_kernels(folder, [(n, [operand, *weights])], "cortex-m7", "gcc")
        assert np.array_equal(results[0][0], get_op(n.op).kernel(n, [operand, *weights])[0])
        counts.append(done.instructions["train"])
    assert 1.0 < counts[1] / counts[0] <= most
