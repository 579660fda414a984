"""Samples of an i8 input: int8 as it is, real numbers quantized alike in NumPy and in C."""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import numpy as np
import plans
import pytest
from board import lane
from board.objects import link
from numpy.typing import NDArray
from onnx_files import export, floats
from test_cli import Cli

from odt_plan.backends.c import emit_c
from odt_plan.backends.numpy import Runtime, train
from odt_plan.backends.numpy.data import checked_samples, stored_sample
from odt_plan.ir.autodiff import build_training
from odt_plan.ir.calibrate import calibrate
from odt_plan.ir.errors import UsageError
from odt_plan.ir.precision import all_i8, lower
from odt_plan.ir.quantization import Quantization
from odt_plan.ir.training import TrainingGraph, TrainingSpec
from odt_plan.planner.plan import Plan, load_plan

Array = NDArray[Any]


@pytest.fixture(scope="module")
def planned() -> tuple[Plan, TrainingGraph]:
    """A calibrated CNN whose input and convolutions are i8, its classifier trained in f32."""
    forward = nets.cnn()
    calibrate(forward, floats(np.random.default_rng(3), 8, *forward.inputs[0].type.shape[1:]))
    precision = {n: p for n, p in all_i8(forward, inputs=True).items() if n != "fc"}
    low = lower(forward, precision)
    chosen = [c for c in plans.whole(low) if c.param.startswith("fc")]
    training = build_training(low, TrainingSpec(), chosen)
    return plans.keep_all(training), training


def quant_of(training: TrainingGraph) -> Quantization:
    quant = training.sample.type.quant
    assert quant is not None
    return quant


def reals(training: TrainingGraph, count: int) -> Array:
    """Real samples beyond the range, ends of half a step among them."""
    shape, quant = training.sample.type.shape[1:], quant_of(training)
    x = floats(np.random.default_rng(4), count, *shape) * 3
    half = (np.arange(x.size // 2).reshape(-1) % 40 - 20 + 0.5) * quant.scale[0]
    x.reshape(-1)[: half.size] = half
    return x


def test_floats_are_quantized_and_int8_is_taken_as_it_is(
    planned: tuple[Plan, TrainingGraph],
) -> None:
    plan, training = planned
    x, quant = reals(training, 1), quant_of(training)
    stored = stored_sample(x, training.sample.type, "x")
    assert stored.dtype == np.int8
    assert stored.min() == -128
    assert stored.max() == 127
    exact = x.astype(np.float32) / np.float32(quant.scale[0])
    want = np.clip(np.round(exact) + quant.zero_point, -128, 127)  # np.round: ties to even
    assert np.array_equal(stored, want)
    one, two = Runtime(plan, training), Runtime(plan, training)
    assert np.array_equal(one.infer(x), two.infer(stored))
    assert np.array_equal(one.infer(x.astype(np.float64)), two.infer(stored))
    for _ in range(3):
        assert one.train_step(x, [1], 0.1) == two.train_step(stored, [1], 0.1)
    assert one.state_bytes() == two.state_bytes()


def test_training_on_real_and_on_stored_samples_is_the_same(
    planned: tuple[Plan, TrainingGraph],
) -> None:
    plan, training = planned
    x, y = reals(training, 6), np.arange(6) % 3
    one, two = Runtime(plan, training), Runtime(plan, training)
    stored = checked_samples(training, x)
    assert train(one, x, y, steps=5, lr=0.05) == train(two, stored, y, steps=5, lr=0.05)
    assert one.state_bytes() == two.state_bytes()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x: x.astype(np.uint8), "uint8, the plan needs i8.*: give int8 as it is stored, or"),
        (lambda x: x.astype(np.int64), "int64, the plan needs"),
        (lambda x: np.where(x > 0, np.nan, x), "NaN or infinite"),
        (lambda x: np.where(x > 0, np.inf, x), "NaN or infinite"),
        (lambda x: x[..., 1:], r"is float32\[.*, the plan needs|must be numbers"),
        (lambda x: x.astype(complex), "complex128"),
    ],
)
def test_samples_that_could_mean_anything(
    planned: tuple[Plan, TrainingGraph], make: Callable[[Array], Array], reason: str
) -> None:
    plan, training = planned
    x = make(reals(training, 1))
    for refused in (
        lambda: Runtime(plan, training).infer(x),
        lambda: Runtime(plan, training).train_step(x, [0], 0.1),
        lambda: checked_samples(training, x),
    ):
        with pytest.raises(UsageError, match=reason) as e:
            refused()
        assert "\n" not in str(e.value)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_c_quantizes_samples_bit_for_bit(
    planned: tuple[Plan, TrainingGraph], tmp_path: Path
) -> None:
    """Through the emitted function, with macros that tell the same scale and zero point."""
    plan, training = planned
    files = emit_c(plan, training, tmp_path, name="net")
    header = files[0].read_text()
    quant = quant_of(training)
    scale = re.search(r"#define NET_SAMPLE_SCALE (\S+)f ", header)
    assert scale is not None
    assert np.float32(scale[1]) == np.float32(quant.scale[0])
    assert f"#define NET_SAMPLE_ZERO_POINT {quant.zero_point} " in header
    library = tmp_path / "net.so"
    sources = [p for p in files if p.suffix == ".c"]
    link(["gcc", *lane.STRICT, *lane.OPTIMISED], sources, ["-shared"], library)
    x = reals(training, 1)
    x.reshape(-1)[-3:] = np.inf, -np.inf, np.nan
    got = np.zeros(x.shape, np.int8)
    ctypes.CDLL(str(library)).net_quantize_sample(
        x.ctypes.data_as(ctypes.c_void_p), got.ctypes.data_as(ctypes.c_void_p)
    )
    assert got.reshape(-1)[-3:].tolist() == [127, -128, -128]
    finite = np.where(np.isfinite(x), x, np.float32(0))
    want = stored_sample(finite, training.sample.type, "x")
    assert np.array_equal(got.reshape(-1)[:-3], want.reshape(-1)[:-3])


def test_a_float_model_has_no_such_function(tmp_path: Path) -> None:
    forward = nets.mlp()
    training = build_training(forward, TrainingSpec(), plans.whole(forward))
    files = emit_c(plans.keep_all(training), training, tmp_path, name="net")
    assert "quantize_sample" not in files[0].read_text()
    assert "SAMPLE_SCALE" not in files[0].read_text()


def test_command_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Data of floats and of int8 train alike; bytes are refused with the way out."""
    monkeypatch.chdir(tmp_path)
    odt = Cli(capfd, monkeypatch)
    x = floats(np.random.default_rng(3), 16, 2, 6, 6)
    np.savez("calib.npz", x=x)
    limits = ("--ram", "64KB", "--flash", "1MB", "--train", "last", "-o", "out")
    made = odt(export(nets.cnn(), tmp_path), *limits, "--calib", "calib.npz")
    assert made.code == 0, made.err
    assert "i8[1,2,6,6]" in made.out
    quant = load_plan(Path("out/plan.json")).quantization["x"]
    stored = Quantization(quant.scale, quant.zero_point).quantize(x)
    results = []
    for data in (x, stored):
        np.savez("data.npz", x=data, y=np.arange(16) % 3, x_val=data, y_val=np.arange(16) % 3)
        done = odt("run", "out/plan.json", "--data", "data.npz", "--steps", "4", "--json")
        assert done.code == 0, done.err
        results.append(done.json)
    assert results[0] == results[1]
    np.savez("data.npz", x=stored.view(np.uint8), y=np.arange(16) % 3)
    refused = odt("run", "out/plan.json", "--data", "data.npz", "--steps", "1")
    assert refused.code == 2
    assert "x is uint8, the plan needs i8" in refused.error
    assert "give int8 as it is stored, or floats" in refused.error
