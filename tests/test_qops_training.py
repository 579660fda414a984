"""Gradients of integer layers against torch, and the optimizers of integers against exact rules."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from op_cases import Case, cases

import odt_plan.backends.c
from odt_plan.backends.c.emit_call import call, param_struct
from odt_plan.ir.errors import GraphError
from odt_plan.ir.grad_builder import GradBuilder
from odt_plan.ir.graph import Attr, Graph, Node, TensorType, Value
from odt_plan.ir.interpreter import run
from odt_plan.ir.opdef import get_op
from odt_plan.ir.ops.qoptimizer import uniform
from odt_plan.ir.quantization import Quantization

Array = NDArray[Any]
T, Q = TensorType, Quantization
LAYERS = [c for c in cases() if c.op.name in ("QConv", "QGemm")]
KERNELS = Path(odt_plan.backends.c.__file__).parent / "kernels"


# --- gradients of weights and biases --------------------------------------------------------------


def _real(v: Value | None, stored: Array) -> Array:
    """Real values in float64, with scales rounded to fp32 as operators use them."""
    assert v is not None
    assert v.type.quant is not None
    quant = v.type.quant
    factor = quant.factor(stored.ndim).astype(np.float32).astype(np.float64)
    return (stored.astype(np.float64) - quant.zero_point) * factor


def _result(case: Case, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The layer on real numbers, without bias."""
    node, rank = case.node, x.ndim - 2
    if case.op.name == "QGemm":
        return x @ w.T
    pads = node.ints_attr("pads", (0,) * 2 * rank)
    sides = [p for i in reversed(range(rank)) for p in (pads[i], pads[i + rank])]
    return (torch.nn.functional.conv1d if rank == 1 else torch.nn.functional.conv2d)(
        torch.nn.functional.pad(x, sides),
        w,
        stride=node.ints_attr("strides", (1,) * rank),
        dilation=node.ints_attr("dilations", (1,) * rank),
        groups=node.int_attr("group", 1),
    )


def _channel_axis(case: Case) -> int:
    slot = case.op.params[0]
    axis = slot.channel_axis(case.node)
    return -1 if axis is None else axis


def _parts() -> list[tuple[Case, int | None]]:
    """Layers with the leading channels to update: those of the hot part, else all or one."""
    result: list[tuple[Case, int | None]] = []
    for case in LAYERS:
        axis, w = _channel_axis(case), case.sample.types[1]
        assert w is not None
        if len(case.sample.types) > 5:
            result.append((case, w.shape[axis]))
        else:
            result += [(case, None), *([(case, 1)] if axis >= 0 else [])]
    return result


@pytest.mark.parametrize(("case", "channels"), _parts(), ids=lambda v: getattr(v, "name", str(v)))
def test_gradients_of_weight_and_bias_are_those_of_torch(case: Case, channels: int | None) -> None:
    """float64 in, float64 out: the rule itself. fp32 follows from the C and NumPy kernels."""
    axis, data = _channel_axis(case), case.data(3)
    g = Graph("one")
    inputs = [
        None if t is None or a is None else g.add_constant(f"x{i}", a, t.dtype, t.quant)
        for i, (t, a) in enumerate(zip(case.sample.types, data, strict=True))
    ]
    node = g.add_node(case.op.name, inputs, case.sample.attrs, name="layer")
    dy = g.add_input("dy", node.out.type.with_dtype("f32"))
    builder = GradBuilder(g, node, {})
    builder.channels = channels
    assert case.op.vjp is not None
    grads: list[Value | None] = []
    for index in (1, 2):  # as the training graph does it, one parameter at a time
        need = [i == index and v is not None for i, v in enumerate(inputs)]
        parts = case.op.vjp(builder, node, dy, need)
        assert [p is not None for p in parts] == need
        grads.append(parts[index])
    g.verify()
    assert sum(n.op == "MaskMul" for n in g.nodes) == 1, "the mask is applied once"

    seed = np.random.default_rng(9).uniform(-1, 1, node.out.type.shape)
    env = run(g, {"dy": seed})
    low, high = node.ints_attr("clamp", (-128, 127))
    inside = (env["layer"] > low) & (env["layer"] < high)
    assert inside.any()
    assert data[0] is not None
    assert data[1] is not None
    parts = [_real(inputs[1], data[1])]
    if len(data) > 5 and data[5] is not None:
        parts.append(_real(inputs[5], data[5]))
    w = torch.tensor(np.concatenate(parts, max(axis, 0)), requires_grad=True)
    _result(case, torch.tensor(_real(inputs[0], data[0])), w).backward(torch.tensor(seed * inside))
    assert w.grad is not None
    hot = data[1].shape[axis] if channels is None else channels
    want = w.grad.numpy() if axis < 0 else w.grad.narrow(axis, 0, hot).numpy()
    assert grads[0] is not None
    got = env[grads[0].name]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)  # the scale of x is fp32
    assert np.count_nonzero(got) > 0
    if grads[1] is not None:
        bias = (seed * inside).swapaxes(0, 1).reshape(seed.shape[1], -1).sum(axis=1)
        np.testing.assert_allclose(env[grads[1].name], bias, rtol=1e-9, atol=1e-12)


def test_the_sum_is_a_chain_of_fp32_products() -> None:
    """In order (n, oy, ox), each product and sum rounded; one product with the scale at the end."""
    g = Graph("one")
    x = g.add_input("x", T((2, 3, 4, 5), "i8", Q((0.037,), -7)))
    dy = g.add_input("dy", T((2, 4, 2, 3)))
    attrs: dict[str, Attr] = {"strides": (2, 2), "pads": (1, 1, 1, 1), "weight_shape": (4, 3, 3, 3)}
    g.add_node("QConvGradWeight", (x, dy), attrs, name="dw")
    rng = np.random.default_rng(0)
    data = rng.integers(-128, 128, x.type.shape, np.int8)
    seed = rng.standard_normal(dy.type.shape).astype(np.float32)
    got = run(g, {"x": data, "dy": seed})["dw"]
    assert got.dtype == np.float32
    for o, c, ky, kx in np.ndindex(*got.shape):
        total = np.float32(0)
        for n, oy, ox in np.ndindex(2, 2, 3):
            iy, ix = 2 * oy - 1 + ky, 2 * ox - 1 + kx
            if 0 <= iy < 4 and 0 <= ix < 5:
                total += seed[n, o, oy, ox] * np.float32(int(data[n, c, iy, ix]) + 7)
        assert got[o, c, ky, kx] == total * np.float32(0.037)


@pytest.mark.parametrize(
    ("op", "types", "attrs", "message"),
    [
        ("QConvGradWeight", (T((1, 2, 3, 3)), T((1, 4, 3, 3))), {}, "a quantized i8 tensor"),
        (
            "QConvGradWeight",
            (T((1, 2, 3, 3), "i8", Q((0.1,))), T((1, 5, 3, 3))),
            {"weight_shape": (4, 2, 1, 1)},
            "does not fit the weight",
        ),
        ("QGemmGradWeight", (T((2, 3), "i8", Q((0.1,))), T((3, 4))), {}, "must agree in all axes"),
        (
            "QGemm",
            (
                *(T((1, 5), "i8", Q((0.1,))), T((2, 3), "i8", Q((0.1,))), None),
                *(T((2,), "i32"), T((2,), "i32"), T((2, 3), "i8", Q((0.1,)))),
            ),
            {"out_scale": 0.1, "out_zero_point": 0},
            r"must be \[m, k\] and \[n, k\]",
        ),
        (
            "QConv",
            (
                *(T((1, 5, 2, 2), "i8", Q((0.1,))), T((2, 3, 1, 1), "i8", Q((0.1,))), None),
                *(T((2,), "i32"), T((2,), "i32"), T((3, 2, 1, 1), "i8", Q((0.1,)))),
            ),
            {"out_scale": 0.1, "out_zero_point": 0},
            "do not fit together",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    op: str, types: tuple[TensorType | None, ...], attrs: dict[str, Attr], message: str
) -> None:
    g = Graph("bad")
    inputs = [None if t is None else g.add_input(f"x{i}", t) for i, t in enumerate(types)]
    with pytest.raises(GraphError, match=f"node layer .{op}.: .*{message}"):
        g.add_node(op, inputs, attrs, name="layer")


# --- optimizers of integers -----------------------------------------------------------------------


def _sgd(
    shape: tuple[int, ...], dtype: str = "i8", rounding: str = "stochastic", **attrs: Attr
) -> Node:
    g = Graph("update")
    quant = Q((0.05,)) if dtype == "i8" else None
    types = (T(shape, dtype, quant), T(shape), T((3,)), T(shape[:1]))
    inputs = [g.add_input(f"x{i}", t) for i, t in enumerate(types)]
    return g.add_node("QSGD", inputs, {"rounding": rounding, "stream": 1, **attrs}, name="update")


def _updated(node: Node, w: Array, steps: Array, update: int = 0) -> Array:
    """The weights after the real gradient ``steps`` (in stored steps) at rate and scale 1."""
    hyper = np.array([1, 0, update], np.float32)
    scales = np.ones(w.shape[:1], np.float32)
    (result,) = get_op("QSGD").kernel(node, [w, steps.astype(np.float32), hyper, scales])
    return np.asarray(result)


@pytest.mark.parametrize("dtype", ["i8", "i32"])
def test_stochastic_rounding_is_unbiased(dtype: str) -> None:
    """The mean over many updates is the real step within 5 standard errors, at every fraction."""
    steps = np.concatenate([np.linspace(-3, 3, 61), [1e-3, -1e-3, 0.9995, -0.9995, 20.25, -20.25]])
    steps = steps.astype(np.float32).reshape(1, -1)
    w = np.full(steps.shape, 10 if dtype == "i8" else 2**29 + 1, np.int8 if dtype == "i8" else "i4")
    node, n = _sgd(steps.shape, dtype), 4000
    moved = np.stack([_updated(node, w, steps, k).astype(np.int64) - w for k in range(n)])
    fraction = np.abs(steps - np.trunc(steps)).astype(np.float64)
    error = np.abs(moved.mean(axis=0) + steps.astype(np.float64))
    assert (error <= 5 * np.sqrt(fraction * (1 - fraction) / n)).all()
    assert set(np.unique(np.abs(moved) - np.trunc(np.abs(steps)))) <= {0.0, 1.0}
    assert (moved[:, fraction == 0] == -steps[fraction == 0]).all()


def test_random_numbers_are_uniform_and_independent() -> None:
    index = np.arange(1 << 16, dtype=np.uint32)
    bits = {
        (update, stream): uniform(update, stream, index)
        for update in (0, 1, 2, 1000)
        for stream in (0, 1, 12345)
    }
    for u in bits.values():
        assert u.min() > 0
        assert u.max() < 1
        counts = np.histogram(u, 64, (0, 1))[0]
        assert ((counts - 1024) ** 2 / 1024).sum() < 130  # chi square, 63 degrees of freedom
        for lag in (1, 2, 7, 64):
            assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 0.02
    keys = list(bits)
    for i, a in enumerate(keys):
        for b in keys[:i]:
            assert abs(np.corrcoef(bits[a], bits[b])[0, 1]) < 0.02
    assert len({u.tobytes() for u in bits.values()}) == len(bits)


@pytest.mark.parametrize("changed", ["update", "stream", "index"])
def test_every_bit_of_the_counter_changes_every_bit(changed: str) -> None:
    """Avalanche: one flipped bit of a counter flips each of the 23 upper bits half of the time."""
    index = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32)
    before = (uniform(5, 9, index) * 2**24).astype(np.uint32)
    for bit in range(0, 24, 5):
        flip = 1 << bit
        after = uniform(
            5 ^ (flip if changed == "update" else 0),
            9 ^ (flip if changed == "stream" else 0),
            index ^ np.uint32(flip if changed == "index" else 0),
        )
        differ = before ^ (after * 2**24).astype(np.uint32)
        rates = [((differ >> np.uint32(k)) & 1).mean() for k in range(1, 24)]
        assert min(rates) > 0.44
        assert max(rates) < 0.56


@pytest.mark.parametrize("dtype", ["i8", "i32"])
def test_nearest_is_the_rounded_weight_with_ties_to_even(dtype: str) -> None:
    steps = np.concatenate([np.arange(-24, 25) / 8, [0.49999997, 0.50000006, -0.49999997]])
    steps = steps.astype(np.float32).reshape(1, -1)
    for start in (-4, -3, 0, 5):
        w = np.full(steps.shape, start, np.int8 if dtype == "i8" else np.int32)
        got = _updated(_sgd(steps.shape, dtype, "nearest"), w, steps)
        want = [round(start - Fraction(float(s))) for s in steps[0]]  # Python: ties to even
        assert got[0].tolist() == want


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("i8", -128, 127), ("i32", -(2**30), 2**30)], ids=["i8", "i32"]
)
def test_saturates_at_both_ends(dtype: str, low: int, high: int, rounding: str) -> None:
    steps = np.array([[0.75, 3e4, 1e9, 2.2e9, 1e30, np.inf]], np.float32)
    node = _sgd(steps.shape, dtype, rounding)
    w = np.full(steps.shape, low, np.int8 if dtype == "i8" else np.int32)
    assert (_updated(node, w, steps) == low).all()
    assert (_updated(node, w + np.asarray(high - low).astype(w.dtype), -steps) == high).all()
    inwards = _updated(node, w, -steps).astype(np.int64)
    assert (inwards >= low).all()
    assert (np.diff(inwards[0]) >= 0).all()
    assert inwards[0, -1] == min(high, low + 2**30)


def test_a_bias_beyond_its_bounds_only_moves_inwards() -> None:
    w = np.array([[-(2**31), 2**31 - 1, 2**30 + 5]], np.int32)
    node = _sgd(w.shape, "i32", "nearest")
    assert (_updated(node, w, np.array([[4, -4, -4]])) == w).all()
    assert (_updated(node, w, np.array([[-4, 4, 4]])) == w + np.array([4, -4, -4])).all()


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("dtype", ["i8", "i32"])
def test_not_a_number_leaves_the_weight(dtype: str, rounding: str) -> None:
    steps = np.array([[np.nan, -np.nan, 0.0, -0.0]], np.float32)
    w = np.array([[-5, 7, 100, -100]], np.int8 if dtype == "i8" else np.int32)
    assert (_updated(_sgd(w.shape, dtype, rounding), w, steps) == w).all()


@pytest.mark.parametrize("qas", [0, 1])
def test_the_step_is_that_of_the_real_weight(qas: int) -> None:
    """Rows have scales of their own; with qas the real weight moves by the real step."""
    rng = np.random.default_rng(2)
    w = rng.integers(-100, 100, (3, 5), np.int8)
    g = rng.standard_normal((3, 5)).astype(np.float32)
    scales = np.array([0.01, 0.5, 0.125], np.float32)
    node = _sgd(w.shape, "i8", "nearest", qas=qas, gradient_scale=0.25)
    hyper = np.array([0.5, 0, 0], np.float32)
    (got,) = get_op("QSGD").kernel(node, [w, g, hyper, scales])
    for i, j in np.ndindex(*w.shape):
        d = np.float32(0.5) * (g[i, j] * np.float32(0.25))
        step = d / scales[i] if qas else d * scales[i]
        assert got[i, j] == max(-128, min(127, round(int(w[i, j]) - Fraction(float(step)))))


@pytest.mark.parametrize("op", ["Momentum", "Adagrad", "Adam"])
def test_moments_are_those_of_the_float_rule(op: str) -> None:
    """Moments are equal bit for bit, and stored steps nearest to the float rule's."""
    rng = np.random.default_rng(3)
    attrs: dict[str, Attr] = {"momentum": 0.9, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
    states = 2 if op == "Adam" else 1
    w = rng.integers(-100, 100, (4, 6), np.int8)
    floats = [np.abs(rng.standard_normal(w.shape)).astype(np.float32) for _ in range(1 + states)]
    hyper = np.array([0.1, 1.3, 4, 0.2][: 2 + states], np.float32)
    scales = np.full(4, 0.0625, np.float32)
    g = Graph("two")
    inputs = [g.add_input(f"s{i}", T(w.shape)) for i in range(1 + states)]
    rate = g.add_input("hyper", T(hyper.shape))
    stored = g.add_input("w", T(w.shape, "i8", Q((0.0625,))))
    scale = g.add_input("scales", T((4,)))
    integer = {**attrs, "rounding": "nearest", "stream": 0}
    node = g.add_node(f"Q{op}", (stored, *inputs, rate, scale), integer, name="integer")
    got = get_op(f"Q{op}").kernel(node, [w, *floats, hyper, scales])
    real = g.add_input("real", T(w.shape))
    twin = g.add_node(op, (real, *inputs, rate), attrs, name="float")
    want = get_op(op).kernel(twin, [w * np.float32(0.0625), *floats, hyper])
    for a, b in zip(got[1:], want[1:], strict=True):
        assert np.array_equal(a, b)
    assert np.abs(got[0] - want[0] / 0.0625).max() <= 0.5 + 1e-4
    assert (got[0] != w).any()


def test_an_update_does_not_depend_on_its_tiles() -> None:
    rng = np.random.default_rng(4)
    w = rng.integers(-128, 128, (11, 3, 2, 2), np.int8)
    g = rng.standard_normal(w.shape).astype(np.float32)
    hyper, scales = np.array([1, 0, 77], np.float32), np.ones(11, np.float32)
    node, op = _sgd(w.shape), get_op("QSGD")
    (whole,) = op.kernel(node, [w, g, hyper, scales])
    assert op.run_kernel is not None
    for tile in (1, 2, 4, 11):
        parts = [
            op.run_kernel(node, [w[i : i + tile], g[i : i + tile], hyper, scales[i : i + tile]], i)
            for i in range(0, 11, tile)
        ]
        assert np.array_equal(np.concatenate([p[0] for p in parts]), whole)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not here")
@pytest.mark.parametrize("name", ["QSGD", "QMomentum", "QAdagrad", "QAdam"])
def test_c_equals_numpy_on_runs_of_rows(name: str, tmp_path: Path) -> None:
    """C on tiles, in place, with steps of all sizes, infinite ones and NaN among them."""
    chosen = [c for c in cases() if c.op.name == name]
    text = '#include "odtplan_qoptimizer.h"\n'
    for i, case in enumerate(chosen):
        names = [f"io[{k}]" for k in range(len(case.node.inputs))]
        results = [names[0], *names[2 : 1 + len(case.node.outputs)]]
        statement = call(case.node, "q", names, results, first_row="first")
        text += param_struct(case.node, f"p{i}")
        text += f"void run{i}(void **io, int32_t rows, int32_t first)\n{{\n"
        text += f"    {_struct(case)} q = p{i};\n    {_rows(case)} = rows;\n    {statement}\n}}\n"
    (tmp_path / "runs.c").write_text(text)
    library = tmp_path / "runs.so"
    command = ["gcc", "-std=c99", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{KERNELS}"]
    sources = [tmp_path / "runs.c", KERNELS / "odtplan_qoptimizer.c"]
    subprocess.run([*command, *sources, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    for i, case in enumerate(chosen):
        function = getattr(loaded, f"run{i}")
        for seed in range(20):
            data = [a.copy() for a in case.data(seed) if a is not None]
            rng = np.random.default_rng(seed)
            data[1] *= (10.0 ** rng.uniform(-9, 12, data[1].shape)).astype(np.float32)
            data[1].flat[:2] = (np.inf, np.nan) if seed % 2 else (0.0, -0.0)
            data[-2][2] = seed
            with np.errstate(all="ignore"):
                want = case.op.kernel(case.node, data)
            rows = len(data[0])
            for first in range(0, rows, 2):
                parts = [a if k == len(data) - 2 else a[first:] for k, a in enumerate(data)]
                pointers = (ctypes.c_void_p * len(parts))(*(a.ctypes.data for a in parts))
                function(pointers, min(2, rows - first), first)
            got = [data[0], *data[2 : 1 + len(want)]]
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b)


def _struct(case: Case) -> str:
    assert case.op.c is not None
    return case.op.c.struct


def _rows(case: Case) -> str:
    return "q.rows" if case.op.name == "QSGD" else "q.base.rows"


def test_adding_without_end_reaches_the_real_sum() -> None:
    """Many small steps of one size add up to their real sum; to nearest, they are all lost."""
    steps = np.full((1, 4096), 0.01, np.float32)
    moved = {}
    for rounding in ("stochastic", "nearest"):
        w = np.full(steps.shape, 60, np.int8)
        node = _sgd(steps.shape, "i8", rounding)
        for k in range(1000):
            w = _updated(node, w, steps, k)
        moved[rounding] = 60 - w.astype(np.float64)
    assert (moved["nearest"] == 0).all()
    error = np.sqrt(1000 * 0.01 * 0.99)
    assert abs(moved["stochastic"].mean() - 10) < 5 * error / np.sqrt(4096)
    assert abs(moved["stochastic"].std() - error) < 0.2
    assert floor(moved["stochastic"].max()) < 10 + 7 * error


@pytest.mark.parametrize(
    ("types", "attrs", "message"),
    [
        ((T((2,)), T((2,)), T((3,)), T((2,))), {}, "i8 and i32 tensors"),
        ((T((2,), "i32"), T((3,)), T((3,)), T((2,))), {}, r"operand 1 is f32\[3\]"),
        ((T((2,), "i32"), T((2,)), T((2,)), T((2,))), {}, r"hyper must have the shape \(3,\)"),
        ((T((2,), "i32"), T((2,)), T((3,)), T((1,))), {}, "do not fit the 2 rows"),
        ((T((2,), "i32"), T((2,)), T((3,)), T((2,))), {"rounding": "up"}, "rounding 'up'"),
    ],
)
def test_updates_that_do_not_fit_are_refused(
    types: tuple[TensorType, ...], attrs: dict[str, Attr], message: str
) -> None:
    g = Graph("bad")
    inputs = [g.add_input(f"x{i}", t) for i, t in enumerate(types)]
    chosen: dict[str, Attr] = {"rounding": "nearest", "stream": 0, **attrs}
    with pytest.raises(GraphError, match=message):
        g.add_node("QSGD", inputs, chosen, name="update")
