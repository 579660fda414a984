"""Quantization records, fixed-point factors, histograms and post-training quantization."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx_files import floats, model, node, save

from odt_plan.ir.calibrate import calibrate, load_samples
from odt_plan.ir.errors import GraphError, UsageError
from odt_plan.ir.graph import Graph, TensorType
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.precision import all_i8, lower, quantizable
from odt_plan.ir.quantization import MAX_SHIFT, Quantization, fixed_point, rescale
from odt_plan.ir.ranges import METHODS, Histogram, Method, from_range, weight_scales

Array = NDArray[Any]


# -- records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (((),), "no scale"),
        (((0.0,),), "scale 0.0 is not a positive finite number"),
        (((-1.0,),), "scale -1.0"),
        (((float("inf"),),), "scale inf"),
        (((float("nan"),),), "scale nan"),
        (((0.1, 0.0), 0, 0), "scale 0.0 of index 1"),
        (((0.1,), 128), "zero point 128 is not in -128..127"),
        (((0.1,), -129), "zero point -129"),
        (((0.1, 0.2),), "2 scales, but no axis"),
        (((0.1, 0.2), 1, 0), "zero point 1"),
        (((0.1, 0.2), 0, -1), "axis -1"),
    ],
)
def test_bad_quantizations(arguments: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(GraphError, match=reason):
        Quantization(*arguments)


def test_stored_and_real() -> None:
    quant = Quantization((0.5,), 3)
    assert quant.bounds() == (-65.5, 62.0)
    real = np.array([0.0, 0.25, 0.75, 1e9, -np.inf])
    assert quant.quantize(real).tolist() == [3, 3, 5, 127, -128]
    assert quant.dequantize(np.array([3, -128], np.int8)).tolist() == [0.0, -65.5]
    rows = Quantization((1.0, 2.0), 0, 1)
    assert rows.quantize(np.array([[2.0, 2.0]])).tolist() == [[2, 1]]
    assert rows.permuted((1, 0)).axis == 0
    assert not rows.fits((2, 3))


def test_quantization_is_part_of_the_type() -> None:
    one, other = (TensorType((2,), "i8", Quantization((s,))) for s in (0.1, 0.2))
    assert one != other
    assert one.stored == other.stored == TensorType((2,), "i8")
    assert one.with_dtype("f32") == TensorType((2,))
    graph = Graph("g")
    with pytest.raises(GraphError, match="can't be quantized"):
        graph.add_input("x", TensorType((2,), "f32", Quantization((0.1,))))
    with pytest.raises(GraphError, match="can't be quantized"):
        graph.add_input("x", TensorType((2,), "i8", Quantization((0.1, 0.1, 0.1), 0, 0)))
    graph.add_input("x", TensorType((2,)))
    graph.quantization["y"] = Quantization((0.1,))
    with pytest.raises(GraphError, match="quantization of y"):
        graph.verify()


# -- fixed point -----------------------------------------------------------------------------------


@given(st.floats(1e-30, 2.0**29), st.integers(-(2**31), 2**31 - 1))
def test_rescaling_is_the_nearest_integer(factor: float, acc: int) -> None:
    """Against exact rationals: half a step plus the multiplier's relative error of 2**-31."""
    multiplier, shift = fixed_point(factor)
    assert 0 <= multiplier < 2**31
    assert 1 <= shift <= MAX_SHIFT
    got = int(rescale(np.array(acc, np.int32), np.array(multiplier), np.array(shift)))
    exact = Fraction(acc) * Fraction(multiplier, 2**shift)
    assert got == (2 * exact + 1) // 2  # to nearest, ties up
    true = Fraction(acc) * Fraction(factor)
    lost = Fraction(1, 2) if shift == MAX_SHIFT else 0  # of the multiplier, in its last bit
    assert abs(exact - true) <= abs(true) / 2**31 + lost


def test_factors_out_of_range() -> None:
    for bad in (-1.0, float("nan"), float("inf"), 2.0**31):
        with pytest.raises(GraphError, match="between scales"):
            fixed_point(bad)
    assert fixed_point(0.0) == (0, 1)
    assert fixed_point(1.0 - 2.0**-53) == (2**30, 30)


# -- ranges ----------------------------------------------------------------------------------------


def test_histogram_equals_one_over_all_values() -> None:
    """Growing in steps loses nothing but resolution."""
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal(5000) * s for s in (0.1, 1.0, 7.0, 3.0)]
    grown = Histogram()
    for p in parts:
        grown.add(p)
    values = np.concatenate(parts)
    assert grown.counts.sum() == len(values)
    assert (grown.low, grown.high) == (values.min(), values.max())
    for percentile in (99.0, 99.9):
        low, high = grown.inner(percentile)
        width = grown.limit / 4096
        outside = 1 - percentile / 100
        for end, sign in ((-low, -1), (high, 1)):  # a bin further in, more would be outside
            assert (sign * values > end).mean() <= outside
            assert (sign * values > end - 2 * width).mean() >= outside


def test_least_error_beats_all_of_the_range() -> None:
    """One outlier: cutting it has less error in fact, not only in the histogram."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal(200_000)
    values[0] = 12.0
    h = Histogram()
    h.add(values)

    def error(method: Method) -> float:
        quant = h.quantization(method, 99.99)
        return float(((quant.dequantize(quant.quantize(values)) - values) ** 2).mean())

    assert error("mse") < 0.8 * error("minmax")


def test_ranges_hold_zero() -> None:
    for low, high in ((0.0, 6.0), (1.0, 3.0), (-2.0, -1.0), (-0.3, 5.0), (-1e-30, 1e30)):
        quant = from_range(low, high)
        assert quant.dequantize(quant.quantize(np.zeros(1)))[0] == 0.0
        for v in (low, high):
            assert abs(float(quant.dequantize(quant.quantize(np.array(v)))) - v) <= quant.scale[0]
    idle = Histogram()
    idle.add(np.zeros(5))
    assert idle.quantization("mse", 99.0).zero_point == 0


@pytest.mark.parametrize("method", METHODS)
def test_weight_scales(method: Method) -> None:
    rng = np.random.default_rng(2)
    w = rng.standard_normal((6, 40)) * np.array([1.0, 5.0, 1e-3, 0.0, 1.0, 1e-44])[:, None]
    w[4, 0] = 30.0  # one outlier
    least = np.array([0.0, 0.0, 1e-3, 0.0, 0.0, 0.0])
    quant = weight_scales(w.astype(np.float32), 0, least, method)
    assert (np.array(quant.scale) >= least).all()
    stored = quant.quantize(w)
    assert np.abs(stored[[0, 1, 4]]).max() == 127
    assert np.abs(stored.astype(int)).max() <= 127
    error = ((quant.dequantize(stored) - w) ** 2).sum(axis=1)
    full = weight_scales(w.astype(np.float32), 0, least, "minmax")
    full_error = ((full.dequantize(full.quantize(w)) - w) ** 2).sum(axis=1)
    assert (error <= full_error * (1 + 1e-4) + 1e-20).all()
    turned = weight_scales(np.ascontiguousarray(w.T.astype(np.float32)), 1, least, method)
    assert (turned.scale, turned.axis) == (quant.scale, 1)


# -- calibration -----------------------------------------------------------------------------------


def _network(folder: Path, *, dead: bool = False) -> Path:
    """Convolutions with Relu and Clip, a residual, pools and two dense layers."""
    rng = np.random.default_rng(3)
    w1, b1 = floats(rng, 6, 3, 3, 3) * 0.3, floats(rng, 6) * 0.1
    if dead:
        w1[2], b1[2] = 1e-12, -21.5
        w1[3], b1[3] = 0.0, 0.0
    constants = {
        "w1": w1, "b1": b1,
        "w2": floats(rng, 6, 1, 3, 3) * 0.4, "b2": floats(rng, 6) * 0.1,
        "w3": floats(rng, 6, 6, 1, 1) * 0.4,
        "w4": floats(rng, 6, 8) * 0.5, "b4": floats(rng, 8) * 0.1,
        "w5": floats(rng, 5, 8) * 0.5, "low": np.array(0.0, np.float32),
        "high": np.array(6.0, np.float32),
    }  # fmt: skip
    nodes = [
        node("Conv", "x w1 b1", "c1", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Clip", "c1 low high", "r1"),
        node("MaxPool", "r1", "p1", kernel_shape=[2, 2]),
        node("Conv", "p1 w2 b2", "c2", pads=[1, 1, 1, 1], group=6),
        node("Relu", "c2", "r2"),
        node("Conv", "r2 w3", "c3"),
        node("Add", "c3 p1", "s"),
        node("GlobalAveragePool", "s", "g"),
        node("Flatten", "g", "f"),
        node("Gemm", "f w4 b4", "h"),
        node("Relu", "h", "hr"),
        node("Gemm", "hr w5", "z", transB=1),
        node("Softmax", "z", "y"),
    ]
    return save(model(nodes, {"x": ["N", 3, 16, 16]}, ["y"], constants), folder)


def _samples(count: int) -> Array:
    return floats(np.random.default_rng(4), count, 3, 16, 16)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("method", [*METHODS, None])
def test_calibrated_network_is_close_to_the_float_one(
    tmp_path: Path, method: Method | None, dead: bool
) -> None:
    graph = import_model(_network(tmp_path, dead=dead))
    report = calibrate(
        graph, None if method is None else _samples(8), method=method or "minmax", percentile=99.9
    )
    assert set(quantizable(graph).values()) == {None}
    assert set(report.noise) == set(quantizable(graph))
    assert all(0.0 <= n < 0.01 for n in report.noise.values())
    assert report.noise["Conv_c2"] > 0.0
    assert "c1" not in graph.quantization  # fused with the Clip
    assert graph.quantization["p1"] == graph.quantization["r1"]
    assert graph.quantization["y"] == Quantization((1 / 256,), -128)
    if method is None:
        assert "no calibration samples" in report.note.replace("are no", "no")
        assert graph.quantization["r1"] == from_range(0.0, 6.0)
    else:
        assert report.note == f"ranges by {method} from 8 samples"
    low = lower(graph, all_i8(graph, inputs=True))
    assert [n.op for n in low.nodes] == [
        "QConv", "QMaxPool", "QConv", "QConv", "QAdd", "QGlobalAveragePool", "Reshape", "QGemm",
        "QGemm", "Dequantize", "Softmax",
    ]  # fmt: skip
    errors = []
    for x in floats(np.random.default_rng(5), 8, 1, 3, 16, 16):
        x = np.clip(x, -1.0, 1.0) if method is None else x
        want = run(graph, {"x": x})["y"]
        got = run(low, {"x": graph.quantization["x"].quantize(x)})["y"]
        errors.append(np.abs(got - want).max())
    assert max(errors) < (0.06 if method else 0.25)  # guessed ranges are rough


def test_minmax_is_what_was_seen(tmp_path: Path) -> None:
    """Also with a batch that does not divide the number of samples."""
    path, x = _network(tmp_path), _samples(7)
    one, batched = import_model(path), import_model(path, ImportOptions(batch=3))
    calibrate(one, x)
    calibrate(batched, x)
    assert one.quantization == batched.quantization
    values = np.concatenate([run(one, {"x": s[None]})["s"].reshape(-1) for s in x])
    assert one.quantization["s"] == from_range(float(values.min()), float(values.max()))


def test_annotations_of_the_model_stay(tmp_path: Path) -> None:
    graph = import_model(_network(tmp_path))
    fixed = Quantization((0.25,), 7)
    graph.quantization["r1"] = fixed
    graph.quantization["w5"] = scales = Quantization((0.125,))
    report = calibrate(graph, _samples(2))
    assert graph.quantization["r1"] == graph.quantization["p1"] == fixed
    assert graph.quantization["w5"] == scales
    assert "r1" not in report.activations
    assert set(report.weights) == {"w1", "w2", "w3", "w4"}


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros((4, 3, 16, 15), np.float32), r"float32\[4, 3, 16, 15\]; x needs \[count, 3, 16"),
        (np.zeros((3, 16, 16), np.float32), r"x needs \[count"),
        (np.float32(1.0), r"float32\[\]; x needs"),
        (np.zeros((0, 3, 16, 16), np.float32), "no calibration samples"),
        (np.zeros((2, 3, 16, 16), np.complex64), "complex64.*needs numbers"),
        (np.full((2, 3, 16, 16), "a"), "needs numbers"),
        (np.full((2, 3, 16, 16), 1e39), r"sample 0 has a NaN or infinite value \(2 of 2 do\)"),
    ],
)
def test_bad_samples(tmp_path: Path, samples: Array, reason: str) -> None:
    graph = import_model(_network(tmp_path))
    with pytest.raises(UsageError, match=reason) as e:
        calibrate(graph, np.asarray(samples))
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 2


def test_samples_that_overflow(tmp_path: Path) -> None:
    """A finite sample whose sums are not; and one so large that no factor reaches the result."""
    path = save(model([node("Add", "x x", "y")], {"x": ["N", 3]}, ["y"]), tmp_path)
    x = np.ones((4, 3), np.float32)
    x[2] = 3e38
    with pytest.raises(UsageError, match="sample 2: value y becomes NaN or infinite"):
        calibrate(import_model(path), x)
    graph = import_model(_network(tmp_path))
    calibrate(graph, np.full((1, 3, 16, 16), 3e38, np.float32))
    assert "between scales is 2**30 or more" in str(quantizable(graph)["Conv_c1"])


def test_bad_sample_is_numbered(tmp_path: Path) -> None:
    x = _samples(5)
    x[3, 0, 0, 0] = np.nan
    with pytest.raises(UsageError, match=r"sample 3 has a NaN or infinite value \(1 of 5 do\)"):
        calibrate(import_model(_network(tmp_path)), x)


def test_bad_settings(tmp_path: Path) -> None:
    graph = import_model(_network(tmp_path))
    with pytest.raises(UsageError, match="method kl is not one of minmax, percentile, mse"):
        calibrate(graph, _samples(1), method="kl")  # type: ignore[arg-type]
    for p in (50.0, 100.1, float("nan")):
        with pytest.raises(UsageError, match="percentile"):
            calibrate(graph, _samples(1), method="percentile", percentile=p)


def test_sample_files(tmp_path: Path) -> None:
    x = _samples(2)
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "b.npz", x=x, y=np.zeros(2))
    np.savez(tmp_path / "c.npz", pictures=x)
    for name in ("a.npy", "b.npz", "c.npz"):
        assert np.array_equal(load_samples(tmp_path / name)["x"], x)
    np.savez(tmp_path / "d.npz", a=x, b=x)
    (tmp_path / "e.npz").write_bytes(b"PK\x03\x04 nonsense")
    np.save(tmp_path / "f.npy", np.array([{}], object), allow_pickle=True)
    for name, reason in (
        ("d.npz", "has no array x, only a, b"),
        ("e.npz", "can't be read"),
        ("f.npy", "can't be read"),
        ("none.npz", "can't be read"),
    ):
        with pytest.raises(UsageError, match=reason):
            load_samples(tmp_path / name)


def test_dead_channels_keep_their_bias(tmp_path: Path) -> None:
    """A channel without weights and a large bias: the accumulator holds it."""
    graph = import_model(_network(tmp_path, dead=True))
    calibrate(graph, _samples(4))
    scale = np.array(graph.quantization["w1"].scale)
    steps = 21.5 / (graph.quantization["x"].scale[0] * scale[2])
    assert steps <= 2**30
    low = lower(graph, all_i8(graph))
    assert abs(int(low.constants["b1"][2])) == pytest.approx(steps, abs=1)


def test_mnist_accuracy(shared: Path) -> None:
    """A real network on real data: i8 from 100 samples loses less than a point."""
    data = np.load(shared / "data" / "mnist_t10k.npz")
    graph = import_model(shared / "models" / "cntk_mnist.onnx")
    x, y = data["x"].astype(np.float32).reshape(-1, 1, 1, 28, 28), data["y"]
    calibrate(graph, x[9000:9100, 0], method="mse")
    low = lower(graph, all_i8(graph))
    out = graph.outputs[0].name
    right = [
        [int(run(g, {"Input3": x[i]})[out].argmax() == y[i]) for g in (graph, low)]
        for i in range(300)
    ]
    exact, stored = np.mean(right, axis=0)
    assert exact > 0.97
    assert stored > exact - 0.01
