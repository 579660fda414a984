"""Integer operators against plain integers, ONNX Runtime and torch, which share no code with them.

Their DSP kernels run on emulated boards and must give the integers of NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from board import lane
from board.kernels import run_kernels
from numpy.typing import NDArray
from onnx import TensorProto, helper
from op_cases import Case, cases

from odt_plan.ir.autodiff import build_training
from odt_plan.ir.errors import GraphError
from odt_plan.ir.grad_builder import GradBuilder
from odt_plan.ir.graph import Attr, Graph, Node, TensorType, Value
from odt_plan.ir.interpreter import run
from odt_plan.ir.opdef import get_op
from odt_plan.ir.ops.qconvert import short_factors
from odt_plan.ir.quantization import Quantization, fixed_points
from odt_plan.ir.training import Candidate, TrainingSpec

Array = NDArray[Any]
T, Q = TensorType, Quantization
CASES = [
    c
    for c in cases()
    if any(v is not None and v.type.dtype == "i8" for v in (*c.node.inputs, c.node.out))
    or c.op.name in ("QSGD", "QMomentum", "QAdagrad", "QAdam")  # biases are i32
]
needs_zig = pytest.mark.skipif(not lane.has_zig_lane(), reason="needs ziglang and unicorn")
needs_gcc = pytest.mark.skipif(
    not (lane.has_zig_lane() and lane.has_gcc()), reason="needs unicorn and arm-none-eabi-gcc"
)


def some(*ops: str) -> pytest.MarkDecorator:
    chosen = [c for c in CASES if c.op.name in ops]
    assert {c.op.name for c in chosen} == set(ops)
    return pytest.mark.parametrize("case", chosen, ids=lambda c: c.name)


def _quant(node: Node, index: int) -> Quantization:
    v = node.inputs[index]
    assert v is not None
    assert v.type.quant is not None
    return v.type.quant


def _nearest(value: Fraction) -> int:
    """Nearest integer, ties up."""
    return floor(value + Fraction(1, 2))


def _clamp(node: Node, value: int) -> int:
    low, high = node.ints_attr("clamp", (-128, 127))
    return max(low, min(high, value + node.int_attr("out_zero_point")))


def _windows(
    node: Node, size: tuple[int, ...], kernel: tuple[int, ...], out: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]]:
    """Each window and its taps inside the input: tap, place."""
    rank = len(kernel)
    strides = node.ints_attr("strides", (1,) * rank)
    dilations = node.ints_attr("dilations", (1,) * rank)
    pads = node.ints_attr("pads", (0,) * 2 * rank)
    for at in product(*map(range, out)):
        taps = []
        for tap in product(*map(range, kernel)):
            place = tuple(
                a * s + t * d - p
                for a, s, t, d, p in zip(at, strides, tap, dilations, pads, strict=False)
            )
            if all(0 <= i < n for i, n in zip(place, size, strict=True)):
                taps.append((tap, place))
        yield at, taps


def _whole(node: Node, w: Array, cold: Array | None = None) -> Array:
    """A weight joined with its frozen rest: input channels, filters where depthwise."""
    axis = 1 if node.int_attr("group", 1) == 1 else 0
    return w if cold is None else np.concatenate([w, cold], axis)


# --- plain integers -------------------------------------------------------------------------------


@some("QConv")
def test_convolution_in_plain_integers(case: Case) -> None:
    x, w, b, m, s, *cold = case.data(5)
    assert x is not None
    assert w is not None
    assert m is not None
    assert s is not None
    node, zero = case.node, _quant(case.node, 0).zero_point
    (got,) = case.op.kernel(node, [x, w, b, m, s, *cold])
    w = _whole(node, w, *cold)
    per_group = w.shape[0] // node.int_attr("group", 1)
    for n, o in product(range(x.shape[0]), range(w.shape[0])):
        first = o // per_group * w.shape[1]
        for at, taps in _windows(node, x.shape[2:], w.shape[2:], got.shape[2:]):
            acc = 0 if b is None else int(b[o])
            for c in range(w.shape[1]):
                for tap, place in taps:
                    acc += (int(x[(n, first + c, *place)]) - zero) * int(w[(o, c, *tap)])
            assert -(2**31) <= acc < 2**31
            want = _clamp(node, _nearest(Fraction(acc * int(m[o]), 2 ** int(s[o]))))
            assert got[(n, o, *at)] == want


@some("QGemm")
def test_dense_in_plain_integers(case: Case) -> None:
    x, w, b, m, s, *cold = case.data(5)
    assert x is not None
    assert w is not None
    assert m is not None
    assert s is not None
    zero = _quant(case.node, 0).zero_point
    (got,) = case.op.kernel(case.node, [x, w, b, m, s, *cold])
    w = _whole(case.node, w, *cold)
    for i, j in np.ndindex(got.shape):
        acc = 0 if b is None else int(b[j])
        acc += sum((int(p) - zero) * int(q) for p, q in zip(x[i], w[j], strict=True))
        assert got[i, j] == _clamp(case.node, _nearest(Fraction(acc * int(m[j]), 2 ** int(s[j]))))


@some("QAdd", "Requantize")
def test_elementwise_is_the_real_result_rounded(case: Case) -> None:
    """Exact but for factors of 21 bits, which move a result by less than 2**-12 steps."""
    data = case.data(5)
    (got,) = case.op.kernel(case.node, data)
    out = Fraction(case.node.float_attr("out_scale"))
    for at in np.ndindex(got.shape):
        real = Fraction(0)
        for i, x in enumerate(data):
            assert x is not None
            quant = _quant(case.node, i)
            real += Fraction(quant.scale[0]) * (int(x[at]) - quant.zero_point)
        near = {_clamp(case.node, _nearest(real / out + Fraction(d, 4096))) for d in (-1, 1)}
        assert int(got[at]) in near


@some("QAveragePool", "QGlobalAveragePool")
def test_average_is_the_real_result_rounded(case: Case) -> None:
    (x,) = case.data(5)
    assert x is not None
    node, quant = case.node, _quant(case.node, 0)
    (got,) = case.op.kernel(node, [x])
    factor = Fraction(quant.scale[0]) / Fraction(node.float_attr("out_scale"))
    kernel = node.ints_attr("kernel_shape") if "kernel_shape" in node.attrs else x.shape[2:]
    padded = _padded(node, x.shape[2:], kernel, got.shape[2:])
    for n, c in np.ndindex(*x.shape[:2]):
        for at, taps in _windows(node, x.shape[2:], kernel, got.shape[2:]):
            total = sum(int(x[(n, c, *place)]) - quant.zero_point for _, place in taps)
            count = padded[at] if node.int_attr("count_include_pad", 0) else len(taps)
            real = factor * Fraction(total, count)
            near = {_clamp(node, _nearest(real + Fraction(d, 1024))) for d in (-1, 1)}
            assert int(got[(n, c, *at)]) in near


@pytest.mark.parametrize("op", ["QGlobalAveragePool", "QAveragePool"])
@pytest.mark.parametrize("count", [2, 6, 10, 16, 36])
@pytest.mark.parametrize("ratio", [1, 3, 0.5])
def test_means_round_ties_to_even(op: str, count: int, ratio: float) -> None:
    """Every sum, also of windows whose size has no exact fixed-point inverse."""
    sums = np.arange(-20 * count, 20 * count + 1)
    x = np.full((sums.size, count), sums[:, None] // count, np.int8)
    x += (np.arange(count) < sums[:, None] % count).astype(np.int8)
    g = Graph("g")
    kind = TensorType((1, *x.shape), "i8", Quantization((0.25 * ratio,), 0))
    out: dict[str, Attr] = {"out_scale": 0.25, "out_zero_point": 1, "clamp": (-128, 127)}
    window: dict[str, Attr] = {"kernel_shape": (count,), "strides": (count,)}
    attrs = out if op == "QGlobalAveragePool" else {**out, **window}
    node = g.add_node(op, (g.add_input("x", kind),), attrs, name="mean")
    (got,) = get_op(op).kernel(node, [x[None]])
    exact = [Fraction(int(s)) * Fraction(ratio) / count for s in sums]
    assert any(e.denominator == 2 for e in exact)
    assert got.reshape(-1).tolist() == [max(-128, min(127, round(e) + 1)) for e in exact]


def _padded(
    node: Node, size: tuple[int, ...], kernel: tuple[int, ...], out: tuple[int, ...]
) -> dict[tuple[int, ...], int]:
    """Taps of each window inside the padded input."""
    rank = len(kernel)
    pads = node.ints_attr("pads", (0,) * 2 * rank)
    wide = Node("", "", (), (), {**node.attrs, "pads": (0,) * 2 * rank})
    size = tuple(n + a + b for n, a, b in zip(size, pads[:rank], pads[rank:], strict=True))
    return {at: len(taps) for at, taps in _windows(wide, size, kernel, out)}


@some("QMaxPool")
def test_maximum_is_that_of_real_numbers(case: Case) -> None:
    (x,) = case.data(5)
    assert x is not None
    (got,) = case.op.kernel(case.node, [x])
    (want,) = get_op("MaxPool").kernel(case.node, [x.astype(np.float32)])
    assert np.array_equal(got, want)
    index = Node("QMaxPoolIndex", "index", case.node.inputs, case.node.outputs, case.node.attrs)
    (taps,) = get_op("QMaxPoolIndex").kernel(index, [x])
    (wanted,) = get_op("MaxPoolIndex").kernel(index, [x.astype(np.float32)])
    assert np.array_equal(taps, wanted)


@pytest.mark.parametrize("seed", range(20))
def test_short_factors_fit_int32(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (float(v) for v in 10 ** rng.uniform(-9, 5, 2))
    (ma, mb), shift = short_factors(a, b)
    assert 1 <= shift <= 30
    assert 0 <= ma < 2**21
    assert 0 <= mb < 2**21
    assert 2 * 255 * 2**21 + 2 ** (shift - 1) < 2**31
    for real, m in ((a, ma), (b, mb)):
        assert abs(m / 2**shift - real) * 255 < max(a, b) * 255 * 2**-20 + 2**-22


# --- ONNX Runtime ---------------------------------------------------------------------------------


def _session(node: onnx.NodeProto, inputs: dict[str, Array], rank: int) -> Array:
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for k, v in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.INT8, [None] * rank)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def _layer(
    op: str, x: Array, w: Array, bias: Array | None, scales: Array, attrs: dict[str, Attr]
) -> Array:
    """Run QConv or QGemm with real scales: x 0.05 (zero point -3), y 0.1 (zero point 7)."""
    g = Graph("layer")
    inputs: list[Value | None] = [
        g.add_input("x", T(x.shape, "i8", Q((0.05,), -3))),
        g.add_constant("w", w, quant=Q(tuple(map(float, scales)), 0, 0)),
        None if bias is None else g.add_constant("b", bias),
    ]
    multiplier, shift = fixed_points(0.05 * scales.astype(np.float64) / 0.1)
    inputs += [g.add_constant("m", multiplier), g.add_constant("s", shift)]
    g.add_node(op, inputs, {"out_scale": 0.1, "out_zero_point": 7, **attrs}, name="y")
    g.verify()
    return run(g, {"x": x})["y"]


@pytest.mark.parametrize(
    ("shape", "weight", "attrs"),
    [
        ((1, 8, 12, 10), (16, 8, 1, 1), {}),
        ((2, 3, 13, 11), (8, 3, 3, 3), {"strides": (2, 2), "pads": (1, 1, 1, 1)}),
        ((1, 12, 9, 9), (12, 1, 3, 3), {"group": 12, "pads": (1, 1, 1, 1)}),
        ((1, 6, 9, 9), (6, 1, 5, 5), {"group": 6, "pads": (2, 2, 2, 2), "strides": (2, 2)}),
        ((1, 8, 7, 7), (6, 4, 3, 3), {"group": 2, "dilations": (2, 2)}),
    ],
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution_is_that_of_onnxruntime(
    shape: tuple[int, ...], weight: tuple[int, ...], attrs: dict[str, Any], with_bias: bool
) -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(-128, 128, shape, np.int8)
    w = rng.integers(-127, 128, weight, np.int8)
    scales = rng.uniform(0.0005, 0.01, weight[0]).astype(np.float32)
    bias = rng.integers(-2000, 2000, weight[0]).astype(np.int32) if with_bias else None
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", *(["b"] if with_bias else [])]
    values = [
        *(x, np.float32(0.05), np.int8(-3), w, scales, np.zeros(weight[0], np.int8)),
        *(np.float32(0.1), np.int8(7), *([bias] if with_bias else [])),
    ]
    node = helper.make_node("QLinearConv", names, ["y"], **attrs)
    feeds = {k: np.asarray(v) for k, v in zip(names, values, strict=True)}
    want = _session(node, feeds, len(shape))
    got = _layer("QConv", x, w, bias, scales, attrs)
    difference = np.abs(got.astype(int) - want)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001
    assert len(np.unique(got)) > 40


def test_dense_is_that_of_onnxruntime() -> None:
    rng = np.random.default_rng(2)
    x, w = rng.integers(-128, 128, (3, 64), np.int8), rng.integers(-127, 128, (20, 64), np.int8)
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
    zero, scale = np.int8(0), np.float32(0.004)
    values = [
        x,
        np.float32(0.05),
        np.int8(-3),
        w.T.copy(),
        scale,
        zero,
        np.float32(0.1),
        np.int8(7),
    ]
    feeds = {k: np.asarray(v) for k, v in zip(names, values, strict=True)}
    want = _session(helper.make_node("QLinearMatMul", names, ["y"]), feeds, 2)
    got = _layer("QGemm", x, w, None, np.full(20, 0.004, np.float32), {})
    assert np.abs(got.astype(int) - want).max() <= 1
    assert (got != want).mean() < 0.02


@pytest.mark.parametrize("zero", [-128, 0, 11])
def test_quantize_is_that_of_onnxruntime(zero: int) -> None:
    scale = 0.037
    x = np.concatenate(
        [
            np.random.default_rng(0).uniform(-8, 8, 5000),
            (np.arange(-300, 300) + 0.5) * 0.037,
            [np.inf, -np.inf, 1e30, -1e30, 0.0, -0.0],
        ]
    ).astype(np.float32)
    feeds = {"x": x, "s": np.asarray(np.float32(scale)), "z": np.asarray(np.int8(zero))}
    want = _session(helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"]), feeds, 1)
    g = Graph("quantize")
    v = g.add_input("x", T(x.shape))
    attrs: dict[str, Attr] = {"out_scale": scale, "out_zero_point": zero}
    y = g.add_node("Quantize", (v,), attrs, name="y").out
    g.add_node("Dequantize", (y,), name="real")
    env = run(g, {"x": x})
    assert np.array_equal(env["y"], want)
    assert np.array_equal(env["real"], Q((scale,), zero).dequantize(want))


def test_nan_becomes_the_lower_bound() -> None:
    g = Graph("quantize")
    attrs: dict[str, Attr] = {"out_scale": 0.1, "out_zero_point": 3, "clamp": (-100, 100)}
    g.add_node("Quantize", (g.add_input("x", T((2,))),), attrs, name="y")
    assert run(g, {"x": np.array([np.nan, 0.1], np.float32)})["y"].tolist() == [-100, 4]


# --- gradients ------------------------------------------------------------------------------------


def _gradients(case: Case, data: list[Array | None]) -> tuple[Array, Array, list[Array | None]]:
    """Result, float64 gradient of the result, gradients of the i8 or f32 operands that are data."""
    g = Graph("one")
    inputs: list[Value | None] = []
    for i, (t, a) in enumerate(zip(case.sample.types, data, strict=True)):
        if t is None or a is None:
            inputs.append(None)
        elif i > 0 and case.op.name in ("QConv", "QGemm"):
            inputs.append(g.add_constant(f"x{i}", a, t.dtype, t.quant))
        else:
            inputs.append(g.add_input(f"x{i}", t))
    node = g.add_node(case.op.name, inputs, case.sample.attrs, name="node")
    dy = g.add_input("dy", node.out.type.with_dtype("f32"))
    assert case.op.vjp is not None
    need = [v is not None and v.name not in g.constants for v in inputs]
    parts = case.op.vjp(GradBuilder(g, node, {}), node, dy, need)
    g.verify()
    for v, d in zip(inputs, parts, strict=True):
        assert d is None or v is None or d.type == v.type.with_dtype("f32")
    seed = np.random.default_rng(9).uniform(-1, 1, node.out.type.shape)
    feeds = {f"x{i}": a for i, a in enumerate(data) if a is not None and f"x{i}" not in g.constants}
    env = run(g, {**feeds, "dy": seed})
    return env["node"], seed, [None if d is None else env[d.name] for d in parts]


def _real(node: Node, index: int, data: list[Array | None]) -> torch.Tensor:
    """Operand in float64, a leaf."""
    a = data[index]
    assert a is not None
    quant = _quant(node, index)
    real = (a.astype(np.float64) - quant.zero_point) * np.float32(1) * _factor(quant, a.ndim)
    return torch.tensor(real, requires_grad=True)


def _real_weight(node: Node, data: list[Array | None]) -> torch.Tensor:
    """The whole weight in float64; in the samples hot and cold parts have the same scales."""
    cold = _real(node, 5, data).detach().numpy() if len(data) > 5 else None
    return torch.tensor(_whole(node, _real(node, 1, data).detach().numpy(), cold))


def _factor(quant: Quantization, rank: int) -> Array:
    return quant.factor(rank).astype(np.float32).astype(np.float64)


def _through(node: Node, stored: Array, seed: Array) -> torch.Tensor:
    """The gradient of the result where the stored result is strictly inside its bounds."""
    low, high = node.ints_attr("clamp", (-128, 127))
    return torch.tensor(seed * ((stored > low) & (stored < high)))


@some("QConv")
def test_convolution_gradient_is_that_of_torch(case: Case) -> None:
    data, node = case.data(3), case.node
    stored, seed, grads = _gradients(case, data)
    x, w = _real(node, 0, data), _real_weight(node, data)
    rank = x.ndim - 2
    pads = node.ints_attr("pads", (0,) * 2 * rank)
    sides = [p for i in reversed(range(rank)) for p in (pads[i], pads[i + rank])]
    y = (torch.nn.functional.conv1d if rank == 1 else torch.nn.functional.conv2d)(
        torch.nn.functional.pad(x, sides),
        w,
        stride=node.ints_attr("strides", (1,) * rank),
        dilation=node.ints_attr("dilations", (1,) * rank),
        groups=node.int_attr("group", 1),
    )
    y.backward(_through(node, stored, seed))
    assert grads[0] is not None
    assert x.grad is not None
    np.testing.assert_allclose(grads[0], x.grad.numpy(), rtol=1e-9, atol=1e-12)
    assert np.count_nonzero(grads[0]) > 0


@some("QGemm")
def test_dense_gradient_is_that_of_torch(case: Case) -> None:
    data, node = case.data(3), case.node
    stored, seed, grads = _gradients(case, data)
    x, w = _real(node, 0, data), _real_weight(node, data)
    (x @ w.T).backward(_through(node, stored, seed))
    assert grads[0] is not None
    assert x.grad is not None
    np.testing.assert_allclose(grads[0], x.grad.numpy(), rtol=1e-9, atol=1e-12)


@some("QAdd", "Requantize", "Dequantize", "Quantize")
def test_elementwise_gradient_is_that_of_the_real_numbers(case: Case) -> None:
    data = case.data(3)
    stored, seed, grads = _gradients(case, data)
    want = _through(case.node, stored, seed).numpy() if stored.dtype == np.int8 else seed
    for g in grads:
        assert g is not None
        assert np.array_equal(g, want)


@some("QAveragePool", "QGlobalAveragePool", "QMaxPool")
def test_pool_gradient_is_that_of_the_float_operator(case: Case) -> None:
    data, node = case.data(3), case.node
    stored, seed, grads = _gradients(case, data)
    float_op = case.op.name[1:]
    attrs = {k: v for k, v in node.attrs.items() if not k.startswith("out_") and k != "clamp"}
    g = Graph("float")
    x = node.inputs[0]
    assert x is not None
    twin = g.add_node(float_op, (g.add_input("x0", x.type.with_dtype("f32")),), attrs, name="node")
    dy = g.add_input("dy", twin.out.type)
    vjp = get_op(float_op).vjp
    assert vjp is not None
    (d,) = vjp(GradBuilder(g, twin, {}), twin, dy, [True])
    assert d is not None
    masked = seed if float_op == "MaxPool" else _through(node, stored, seed).numpy()
    assert data[0] is not None
    want = run(g, {"x0": data[0].astype(np.float64), "dy": masked})[d.name]
    assert grads[0] is not None
    np.testing.assert_allclose(grads[0], want, rtol=1e-12)


def _straight(real: torch.Tensor, quant: Quantization, stored: Array) -> torch.Tensor:
    """The stored value, and the gradient of the real one where it is not clipped."""
    inside = torch.tensor((stored > -128) & (stored < 127))
    held = torch.tensor((stored.astype(np.float64) - quant.zero_point) * _factor(quant, 0))
    return held + (real - real.detach()) * inside


def test_gradient_through_a_frozen_block_is_that_of_torch() -> None:
    """An fp32 layer before and behind an integer block with a branch, in a whole training graph."""
    rng = np.random.default_rng(4)
    g = Graph("mixed")
    x = g.add_input("x", T((1, 3, 8, 8)))
    first = g.add_constant("first", rng.normal(0, 0.4, (6, 3, 3, 3)).astype(np.float32))
    y = g.add_node("Conv", (x, first, None), {"pads": (1,) * 4}, name="y").out
    scales = {"q": 0.02, "d": 0.03, "p": 0.02, "s": 0.03, "a": 0.01}
    quants = {k: Q((v,), i - 2) for i, (k, v) in enumerate(scales.items())}

    def out(name: str) -> dict[str, Attr]:
        return {"out_scale": scales[name], "out_zero_point": quants[name].zero_point}

    def layer(v: Value, name: str, shape: tuple[int, ...], attrs: dict[str, Attr]) -> Value:
        w = rng.integers(-127, 128, shape, np.int8)
        per_channel = tuple(map(float, rng.uniform(0.001, 0.006, shape[0])))
        weight = g.add_constant(f"{name}/w", w, quant=Q(per_channel, 0, 0))
        assert v.type.quant is not None
        factors = np.array(per_channel) * v.type.quant.scale[0] / scales[name]
        fixed = [g.add_constant(f"{name}/{i}", a) for i, a in enumerate(fixed_points(factors))]
        inputs = (v, weight, None, *fixed)
        return g.add_node("QConv", inputs, {**attrs, **out(name)}, name=name).out

    q = g.add_node("Quantize", (y,), out("q"), name="q").out
    d = layer(q, "d", (6, 1, 3, 3), {"pads": (1,) * 4, "group": 6})
    p = layer(d, "p", (6, 6, 1, 1), {})
    s = g.add_node("QAdd", (p, q), out("s"), name="s").out
    a = g.add_node("QGlobalAveragePool", (s,), out("a"), name="a").out
    flat = g.add_node("Reshape", (a,), {"shape": (1, 6)}, name="flat").out
    real = g.add_node("Dequantize", (flat,), name="real").out
    last = g.add_constant("last", rng.normal(0, 1, (4, 6)).astype(np.float32))
    g.outputs = [g.add_node("Gemm", (real, last, None), {"trans_b": 1}, name="logits").out]
    g.verify()

    training = build_training(g, TrainingSpec(loss="mse"), [Candidate("first"), Candidate("last")])
    sample, target = (rng.normal(0, 1, v.type.shape) for v in (x, training.target))
    hyper = np.array([1e-3, 0.0, 1.0])
    env = run(
        training.graph,
        {"x": sample, training.target.name: target, training.hyper.name: hyper},
    )
    grads = {u.candidate.param: env[u.grad.name] for u in training.updates}

    t = {k: torch.tensor(env[k].astype(np.float64), requires_grad=True) for k in ("first", "last")}
    conv = torch.nn.functional.conv2d
    tq = _straight(conv(torch.tensor(sample), t["first"], padding=1), quants["q"], env["q"])
    w = {k: torch.tensor(_stored_weight(g, f"{k}/w", env)) for k in "dp"}
    td = _straight(conv(tq, w["d"], padding=1, groups=6), quants["d"], env["d"])
    ts = _straight(_straight(conv(td, w["p"]), quants["p"], env["p"]) + tq, quants["s"], env["s"])
    ta = _straight(ts.mean((2, 3), keepdim=True), quants["a"], env["a"])
    loss = torch.nn.functional.mse_loss(ta.reshape(1, 6) @ t["last"].T, torch.tensor(target))
    loss.backward()
    np.testing.assert_allclose(env[training.loss.name], loss.detach().numpy(), rtol=1e-6)
    for name, leaf in t.items():
        assert leaf.grad is not None
        np.testing.assert_allclose(grads[name], leaf.grad.numpy(), rtol=1e-5, atol=1e-9)
        assert np.abs(grads[name]).max() > 1e-4


def _stored_weight(g: Graph, name: str, env: dict[str, Array]) -> Array:
    quant = g.values[name].type.quant
    assert quant is not None
    return env[name].astype(np.float64) * _factor(quant, env[name].ndim)


# --- what does not fit ----------------------------------------------------------------------------


X, W = T((1, 4, 5, 5), "i8", Q((0.1,), 3)), T((6, 4, 3, 3), "i8", Q((0.1,) * 6, 0, 0))
I32 = T((6,), "i32")
OUT: dict[str, Attr] = {"out_scale": 0.1, "out_zero_point": 0}


@pytest.mark.parametrize(
    ("types", "attrs", "message"),
    [
        ((T((1, 4, 5, 5)), W, None, I32, I32), OUT, r"operand 0 is f32\[1,4,5,5\]; a quantized"),
        ((T((1, 4, 5, 5), "i8"), W, None, I32, I32), OUT, "a quantized i8 tensor is needed"),
        ((X, T(W.shape, "i8", Q((0.1,), 1)), None, I32, I32), OUT, "zero point 0 and scales on"),
        ((X, T(W.shape, "i8", Q((0.1,) * 4, 0, 1)), None, I32, I32), OUT, "scales on axis 0"),
        ((X, W, T((5,), "i32"), I32, I32), OUT, r"bias \(operand 2\) i32\[5\] must be i32\[6\]"),
        ((X, W, None, T((6,)), I32), OUT, r"multipliers \(operand 3\)"),
        ((X, W, None, I32), OUT, "operand 4 is missing"),
        ((X, W, None, I32, I32), {**OUT, "clamp": (5, 4)}, "clamp bounds 5, 4"),
        ((X, W, None, I32, I32), {**OUT, "out_scale": 0.0}, "scale 0.0 is not a positive"),
        ((X, W, None, I32, I32), {**OUT, "out_zero_point": 200}, "zero point 200"),
    ],
)
def test_what_does_not_fit_is_refused(
    types: tuple[TensorType | None, ...], attrs: dict[str, Attr], message: str
) -> None:
    g = Graph("bad")
    inputs = [None if t is None else g.add_input(f"x{i}", t) for i, t in enumerate(types)]
    with pytest.raises(GraphError, match=f"node layer .QConv.: .*{message}"):
        g.add_node("QConv", inputs, attrs, name="layer")


def test_sums_that_could_overflow_are_refused() -> None:
    g = Graph("bad")
    x = g.add_input("x", T((1, 40000), "i8", Q((0.1,))))
    w = g.add_input("w", T((1, 40000), "i8", Q((0.1,))))
    i = g.add_input("i", T((1,), "i32"))
    with pytest.raises(GraphError, match="40000 products per result can overflow"):
        g.add_node("QGemm", (x, w, None, i, i), OUT, name="layer")
    small = Graph("bias")
    x = small.add_input("x", T((1, 2), "i8", Q((0.1,))))
    w = small.add_input("w", T((1, 2), "i8", Q((0.1,))))
    i = small.add_input("i", T((1,), "i32"))
    small.add_node("QGemm", (x, w, i, i, i), OUT, name="layer")
    data = np.full((1, 2), 127, np.int8)
    with pytest.raises(GraphError, match="layer: accumulators overflow int32"):
        run(small, {"x": data, "w": data, "i": np.array([2**31 - 1], np.int32)})


# --- emulated boards ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("core", "compiler", "optimise"),
    [
        pytest.param("cortex-m7", "gcc", "-O2", marks=needs_gcc),
        pytest.param("cortex-m7", "gcc", "-O3", marks=needs_gcc),
        pytest.param("cortex-m7", "zig", "-O2", marks=needs_zig),
        pytest.param("cortex-m4", "zig", "-O2", marks=needs_zig),
        pytest.param("cortex-m33", "zig", "-Os", marks=needs_zig),
        pytest.param("cortex-m0plus", "zig", "-O2", marks=needs_zig),
    ],
)
def test_kernels_on_boards(
    core: str, compiler: lane.Compiler, optimise: str, tmp_path: Path
) -> None:
    """The DSP variants (the plain one on the M0+) give the integers of NumPy."""
    chosen = [c for c in CASES if c.op.c is not None]
    runs = [(c.node, c.data(seed)) for c in chosen for seed in (0, 1)]
    results, _ = run_kernels(tmp_path, runs, core, compiler, optimise=optimise)
    for (node, data), got in zip(runs, results, strict=True):
        want = get_op(node.op).kernel(node, data)
        for g, w in zip(got, want, strict=True):
            assert np.array_equal(g, w), node


@needs_gcc
@pytest.mark.parametrize(
    ("weight", "attrs", "most"),
    [((8, 48, 1, 1), {}, 2.3), ((48, 1, 3, 3), {"group": 48, "pads": (1, 1, 1, 1)}, 6.5)],
    ids=["pointwise", "depthwise"],
)
def test_instructions_per_mac(
    weight: tuple[int, ...], attrs: dict[str, Attr], most: float, tmp_path: Path
) -> None:
    """Executed instructions on the emulated Cortex-M7, gcc -O3, 48 channels of 16 x 16."""
    g = Graph("one")
    x = g.add_input("x", T((1, 48, 16, 16), "i8", Q((0.05,), -3)))
    w = g.add_input("w", T(weight, "i8", Q((0.01,))))
    rest = [g.add_input(n, T((weight[0],), "i32")) for n in "bms"]
    node = g.add_node("QConv", (x, w, *rest), {**attrs, **OUT}, name="y")
    rng = np.random.default_rng(0)
    multiplier, shift = fixed_points(np.full(weight[0], 0.005))
    data = [
        rng.integers(-128, 128, x.type.shape, np.int8),
        rng.integers(-128, 128, weight, np.int8),
        rng.integers(-3000, 3000, weight[0]).astype(np.int32),
        multiplier,
        shift,
    ]
    results, done = run_kernels(tmp_path, [(node, data)], "cortex-m7", "gcc", optimise="-O3")
    assert np.array_equal(results[0][0], get_op("QConv").kernel(node, data)[0])
    macs = node.out.type.size * int(np.prod(weight[1:]))
    assert 1.0 < done.instructions["train"] / macs <= most
