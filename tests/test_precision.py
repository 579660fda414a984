"""Lowering of an annotated graph: any mix of precisions, boundaries, names, gradients, refusals."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from odt_plan.ir.autodiff import build_training
from odt_plan.ir.calibrate import calibrate
from odt_plan.ir.errors import UsageError
from odt_plan.ir.graph import Attr, Graph, TensorType
from odt_plan.ir.interpreter import run
from odt_plan.ir.lowered_layers import bias_and_factors
from odt_plan.ir.precision import Precision, all_i8, lower, quantizable
from odt_plan.ir.quantization import Quantization
from odt_plan.ir.training import Candidate, TrainingSpec

Array = NDArray[Any]


def _floats(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network() -> Graph:
    """A residual block with pools and a classifier, calibrated."""
    g = Graph("net")
    x = g.add_input("x", TensorType((1, 3, 8, 8)))

    def weight(name: str, *shape: int) -> Any:
        return g.add_constant(name, _floats(len(g.values), *shape) * np.float32(0.4))

    def conv(name: str, x: Any, outs: int, kernel: int, group: int = 1) -> Any:
        w = weight(f"{name}.w", outs, x.type.shape[1] // group, kernel, kernel)
        attrs: dict[str, Attr] = {
            "strides": (1, 1),
            "dilations": (1, 1),
            "pads": (kernel // 2,) * 4,
            "group": group,
        }
        return g.add_node("Conv", (x, w, weight(f"{name}.b", outs)), attrs, name=name).out

    a = g.add_node("Relu", (conv("c1", x, 4, 3),), name="r1").out
    b = g.add_node("Clip", (conv("c2", a, 4, 3, 4),), {"min": 0.0, "max": 1.5}, name="r2").out
    s = g.add_node("Add", (conv("c3", b, 4, 1), a), name="sum").out
    t = g.add_node("Relu", (s,), name="r3").out
    window: dict[str, Attr] = {
        "kernel_shape": (2, 2),
        "strides": (2, 2),
        "pads": (0,) * 4,
        "dilations": (1, 1),
    }
    p = g.add_node("MaxPool", (t,), {**window, "ceil_mode": 0}, name="pool").out
    m = g.add_node("ReduceMean", (p,), {"axes": (2, 3), "keepdims": 0}, name="mean").out
    z = g.add_node(
        "Gemm", (m, weight("fc.w", 4, 5), weight("fc.b", 5)), {"trans_b": 0}, name="fc"
    ).out
    g.outputs = [g.add_node("Softmax", (z,), {"axis": -1}, name="probs").out]
    g.verify()
    calibrate(g, _floats(50, 16, 3, 8, 8))
    return g


LAYERS = ["c1", "c2", "c3", "sum", "pool", "mean", "fc"]


def test_layers() -> None:
    graph = network()
    assert quantizable(graph) == dict.fromkeys(LAYERS)
    assert all_i8(graph, inputs=True) == dict.fromkeys([*LAYERS, "x"], "i8")


@settings(max_examples=40, deadline=None)
@given(st.sets(st.sampled_from([*LAYERS, "x"])))
def test_any_mix_is_close(chosen: set[str]) -> None:
    """Every choice lowers, verifies, keeps names, and computes nearly the same."""
    graph = network()
    before = repr(graph)
    low = lower(graph, dict.fromkeys(chosen, "i8"))
    assert repr(graph) == before
    assert [v.name for v in low.outputs] == ["probs"]
    assert low.outputs[0].type == graph.outputs[0].type
    ops = Counter(n.op for n in low.nodes)
    assert ops["QConv"] == len(chosen & {"c1", "c2", "c3"})
    assert ops["QAdd"] == ("sum" in chosen)
    assert ops["QMaxPool"] == ("pool" in chosen)
    assert ops["QGlobalAveragePool"] == ("mean" in chosen)
    assert ops["QGemm"] == ("fc" in chosen)
    converted = [n.inputs[0] for n in low.nodes if n.op in ("Quantize", "Dequantize")]
    assert len(set(converted)) == len(converted)  # one conversion per value and direction
    assert {n.name for n in low.nodes} >= chosen - {"x"}
    x = _floats(51, 1, 3, 8, 8)
    feed = graph.quantization["x"].quantize(x) if "x" in chosen else x
    got, want = run(low, {"x": feed})["probs"], run(graph, {"x": x})["probs"]
    assert np.abs(got - want).max() < 0.05
    if not chosen:
        assert np.array_equal(got, want)


def test_boundaries() -> None:
    """Conversions stand where precisions meet, and nowhere else."""
    graph = network()
    low = lower(graph, {"c2": "i8", "c3": "i8"})
    assert [n.op for n in low.nodes][:8] == [
        "Conv", "Relu", "Quantize", "QConv", "QConv", "Dequantize", "Add", "Relu",
    ]  # fmt: skip
    assert low.values["r2"].type.dtype == "i8"
    assert low.values["c1.w"].type.dtype == "f32"
    assert low.values["c2.w"].type == TensorType((4, 1, 3, 3), "i8", graph.quantization["c2.w"])
    everywhere = lower(graph, all_i8(graph, inputs=True))
    assert [n.op for n in everywhere.nodes if "uantize" in n.op] == ["Dequantize"]
    assert everywhere.inputs[0].type == TensorType((1, 3, 8, 8), "i8", graph.quantization["x"])


def test_integer_layer_is_the_rounded_real_one() -> None:
    """QConv against exact arithmetic on the stored numbers: rounded to nearest, clamped."""
    graph = network()
    low = lower(graph, all_i8(graph))
    env = run(low, {"x": _floats(52, 1, 3, 8, 8)})
    x, w, b = (env[k].astype(np.int64) for k in ("r2", "c3.w", "c3.b"))
    quants = {k: graph.quantization[k] for k in ("r2", "c3.w", "c3")}
    acc = np.einsum("oc,chw->ohw", w[:, :, 0, 0], x[0] - quants["r2"].zero_point)
    acc += b[:, None, None]
    factor = quants["r2"].scale[0] * np.array(quants["c3.w"].scale) / quants["c3"].scale[0]
    exact = acc * factor[:, None, None] + quants["c3"].zero_point
    got = env["c3"][0].astype(np.float64)
    inside = (got > -128) & (got < 127)
    assert inside.mean() > 0.9
    assert np.abs(got - exact)[inside].max() <= 0.5 + 1e-6


def test_clamp_of_a_fused_clip() -> None:
    graph = network()
    low = lower(graph, all_i8(graph))
    attrs = {n.name: n.attrs for n in low.nodes}
    quant = graph.quantization["r2"]
    assert attrs["c2"]["clamp"] == (quant.zero_point, int(quant.quantize(np.array(1.5))))
    assert attrs["c3"]["clamp"] == (-128, 127)


def test_gradients_pass_integer_layers() -> None:
    """A trained f32 layer before frozen integer ones gets nearly the gradient of the float graph.

    Not quite: values beyond the calibrated range are clipped, equal ones tie in the pool.
    """
    graph = network()
    precision: dict[str, Precision] = dict.fromkeys(["c2", "c3", "sum", "pool", "mean", "fc"], "i8")
    grads: list[list[Array]] = [[], []]
    for i, forward in enumerate((graph, lower(graph, precision))):
        training = build_training(forward, TrainingSpec(), [Candidate("c1.w")])
        for seed in range(53, 61):
            feeds = {
                "x": _floats(seed, 1, 3, 8, 8),
                "target": np.array([seed % 5], np.int32),
                "hyper": np.array([0.1, 1.0, 1.0], np.float32),
            }
            env = run(training.graph, feeds)
            grads[i].append(env[training.updates[0].grad.name].astype(np.float64))
    a, b = (np.concatenate(g).reshape(-1) for g in grads)
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98
    assert 0.9 < np.linalg.norm(b) / np.linalg.norm(a) < 1.1


def test_refusals() -> None:
    graph = network()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"c9": "i8"}, "precision of c9: net has no layer or input like that"),
        ({"c1": "i4"}, "precision of c1: i4 is not one of f32, mixed, i8"),
    ]
    for precision, reason in cases:
        with pytest.raises(UsageError, match=reason):
            lower(graph, precision)
    del graph.quantization["x"]
    with pytest.raises(UsageError, match="input x can't be i8: its range is not known"):
        lower(graph, {"x": "i8"})
    with pytest.raises(UsageError, match="c1 can't be i8: the range of its operand x is not known"):
        lower(graph, {"c1": "i8"})
    graph = network()
    graph.quantization["r1"] = Quantization((0.1,) * 4, 0, 1)
    assert "an activation needs one" in str(quantizable(graph)["c1"])
    graph.quantization["c3.w"] = Quantization((0.1,), 3)
    assert "zero point 3" in str(quantizable(graph)["c3"])


def test_layers_that_have_no_integer_twin() -> None:
    g = Graph("odd")
    x = g.add_input("x", TensorType((1, 2, 6, 6)))
    row = g.add_constant("row", np.ones((1, 2, 1, 1), np.float32))
    a = g.add_node("Add", (x, row), name="wide").out
    m = g.add_node("ReduceMean", (a,), {"axes": (1,), "keepdims": 1}, name="across").out
    deep = g.add_constant("deep", np.ones((2, 40000), np.float32))
    f = g.add_input("f", TensorType((1, 40000)))
    z = g.add_node("Gemm", (f, deep, None), {"trans_b": 1}, name="deep_sum").out
    g.outputs = [m, z]
    for name in ("x", "row", "wide", "across", "f", "deep_sum"):
        g.quantization[name] = Quantization((0.1,))
    g.quantization["deep"] = Quantization((0.1,))
    reasons = quantizable(g)
    assert reasons["wide"] == "it broadcasts an operand"
    assert "a mean over the axes [1]" in str(reasons["across"])
    assert reasons["deep_sum"] == "40000 products per result can overflow the accumulator"


@pytest.mark.parametrize(("scale", "fits"), [(1e-6, True), (1e-9, False)])
def test_bias_beyond_int32(scale: float, fits: bool) -> None:
    """A dead channel: the bias saturates where the result does too, else the layer is refused."""
    g = Graph("dead")
    x = g.add_input("x", TensorType((1, 3)))
    w = g.add_constant("w", np.full((2, 3), 100 * scale, np.float32))
    b = g.add_constant("b", np.array([-21.5, 0.0], np.float32))
    node = g.add_node("Gemm", (x, w, b), {"trans_b": 1}, name="fc")
    g.outputs = [node.out]
    g.quantization |= {
        "x": Quantization((0.01,), 5),
        "w": Quantization((scale, scale), 0, 0),
        "fc": Quantization((0.05,), 0),
    }
    if not fits:
        assert "more than int32 holds beside the products" in str(quantizable(g)["fc"])
        return
    assert quantizable(g) == {"fc": None}
    constants = bias_and_factors(g, node, {"out_scale": 0.05, "out_zero_point": 0})
    reach = 3 * 128 * 133  # of any weights
    assert constants.bias.tolist() == [-(2**31) + reach, 0]
    low = lower(g, {"fc": "i8"})
    got = run(low, {"x": _floats(1, 1, 3)})["fc"]
    assert got[0, 0] == np.float32(-128 * np.float32(0.05))


def test_shared_constants_and_values() -> None:
    """A weight that an i8 and an f32 layer read exists in both forms, a value likewise."""
    g = Graph("shared")
    x = g.add_input("x", TensorType((1, 4)))
    w = g.add_constant("w", _floats(0, 4, 4))
    b = g.add_constant("b", _floats(1, 4))
    p = g.add_node("Gemm", (x, w, b), {"trans_b": 1}, name="p").out
    q = g.add_node("Gemm", (p, w, b), {"trans_b": 1}, name="q").out
    r = g.add_node("Gemm", (p, w, b), {"trans_b": 1}, name="r").out
    g.outputs = [g.add_node("Add", (q, r), name="s").out, p]
    calibrate(g, _floats(2, 8, 4))
    low = lower(g, {"p": "i8", "q": "i8", "s": "i8"})
    assert low.values["w"].type.dtype == "f32"
    assert low.values["w/i8"].type.dtype == "i8"
    assert low.values["p"].type.dtype == low.values["s"].type.dtype == "f32"
    assert Counter(n.op for n in low.nodes) == {
        "Quantize": 2, "QGemm": 2, "Gemm": 1, "QAdd": 1, "Dequantize": 2,
    }  # fmt: skip
    x_data = _floats(3, 1, 4)
    got, want = run(low, {"x": x_data}), run(g, {"x": x_data})
    for name in ("s", "p"):
        assert np.abs(got[name] - want[name]).max() < 0.1 * np.abs(want[name]).max() + 0.1
