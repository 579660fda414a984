"""Plans in mixed precision: calibrated and QDQ models from the file to trained weights."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx_files import export, floats, model, node, save
from oracle import Unconstrained, batch

from odt_plan.backends.numpy import Runtime
from odt_plan.figures import Budgeted
from odt_plan.ir.errors import InfeasibleError, UsageError
from odt_plan.ir.ranges import METHODS, Method
from odt_plan.ir.training import TrainingGraph, TrainingSpec
from odt_plan.planner.check import check
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.plan import Plan, QuantizationRecord, load_plan
from odt_plan.planner.rebuild import rebuild
from odt_plan.report import print_plan

Array = NDArray[Any]


def samples(folder: Path, data: Array | None = None) -> Path:
    path = folder / "calib.npz"
    x = floats(np.random.default_rng(3), 16, 2, 6, 6) if data is None else data
    np.savez(path, x=x)
    return path


def request_of(folder: Path, **options: Any) -> Request:
    """A float CNN of three convolutions and a classifier, with calibration samples."""
    base = Request(
        model=export(nets.cnn(), folder),
        device=load_device("stm32f746g-disco"),
        calibration=samples(folder),
        train=("last",),
        with_baselines=False,
    )
    return replace(base, **options)


def qdq(folder: Path) -> Path:
    """Conv, Relu and Gemm between QuantizeLinear and DequantizeLinear."""
    rng = np.random.default_rng(5)
    scale, zero = np.float32(0.03), np.int8(0)
    constants: dict[str, Array] = {
        "s": np.array(scale),
        "z": np.array(zero),
        "w.q": rng.integers(-127, 128, (4, 2, 3, 3)).astype(np.int8),
        "w.s": np.full(4, 0.002, np.float32),
        "w.z": np.zeros(4, np.int8),
        "b": floats(rng, 4),
        "shape": np.array([1, 144], np.int64),
        "fc.weight": floats(rng, 3, 144) * np.float32(0.1),
        "fc.bias": floats(rng, 3),
    }
    nodes = [
        node("QuantizeLinear", "x s z", "xq"),
        node("DequantizeLinear", "xq s z", "xd"),
        node("DequantizeLinear", "w.q w.s w.z", "w", axis=0),
        node("Conv", "xd w b", "c", "conv", pads=[1, 1, 1, 1]),
        node("Relu", "c", "r"),
        node("QuantizeLinear", "r s z", "rq"),
        node("DequantizeLinear", "rq s z", "rd"),
        node("Reshape", "rd shape", "f"),
        node("Gemm", "f fc.weight fc.bias", "y", "fc", transB=1),
    ]
    return save(model(nodes, {"x": (1, 2, 6, 6)}, ["y"], constants), folder, "qdq.onnx")


def trains(plan: Plan, training: TrainingGraph) -> None:
    """The runtime equals training without a plan, bit for bit, and weights move."""
    runtime, oracle = Runtime(plan, training), Unconstrained(training)
    initial = runtime.state_bytes()
    rng = np.random.default_rng(1)
    for _ in range(2 * training.spec.micro_batches):
        x, y = batch(training, rng)
        assert runtime.train_step(x, y, 0.02) == oracle.step(x, y, 0.02)
        assert runtime.state_bytes() == oracle.state_bytes(plan)
    assert runtime.state_bytes() != initial


def ops(planned: PlannedModel) -> set[str]:
    return {n.op for n in planned.training.graph.nodes}


def written(planned: PlannedModel, folder: Path) -> Path:
    path = folder / "plan.json"
    path.write_text(planned.plan.model_dump_json(indent=2), encoding="utf-8")
    return path


@pytest.mark.parametrize("train", ["last", "auto"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("pins", [(), ("conv*=i8",)], ids=["free", "pinned"])
def test_from_samples_to_trained_weights(
    train: str, micro_batches: int, pins: tuple[str, ...], tmp_path: Path
) -> None:
    spec = TrainingSpec(micro_batches=micro_batches)
    request = request_of(tmp_path, train=(train,), spec=spec, precision=pins)
    if train == "auto":  # too little for all layers, so that some stay frozen
        request = replace(request, ram_bytes=3000)
    planned = make_plan(request)
    assert ops(planned) & {"QConv", "MixedConv"}
    assert set(planned.plan.decisions.precision.values()) <= {"i8", "mixed", "f32"}
    assert "QConv" in ops(planned) or not pins
    trains(planned.plan, planned.training)

    assert request.calibration is not None
    request.calibration.unlink()  # the plan needs no samples any more
    path = written(planned, tmp_path)
    loaded = load_plan(path)
    assert loaded == planned.plan
    training = rebuild(loaded, path)
    assert repr(training.graph) == repr(planned.training.graph)
    for name, data in planned.training.graph.constants.items():
        assert np.array_equal(training.graph.constants[name], data)
    check(loaded, training, request.device)
    trains(loaded, training)


def test_costs_less_than_f32(tmp_path: Path) -> None:
    """Where frozen layers have the peak; a wide input of an updated layer is f32 in both."""
    request = replace(request_of(tmp_path), model=export(nets.resnet(), tmp_path))
    mixed = make_plan(replace(request, precision=("*=i8",))).plan
    plain = make_plan(replace(request, calibration=None)).plan
    assert set(plain.decisions.precision.values()) == {"f32"}
    assert plain.quantization == {}
    assert mixed.claims.ram_bytes.total < plain.claims.ram_bytes.total
    assert mixed.claims.flash_bytes.weights < plain.claims.flash_bytes.weights


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: Method, tmp_path: Path) -> None:
    planned = make_plan(request_of(tmp_path, calibration_method=method))
    assert f"by {method} from 16 samples of calib.npz" in planned.scales


def test_pins(tmp_path: Path) -> None:
    request = request_of(tmp_path)
    of = make_plan(replace(request, precision=("conv*=f32", "conv1=i8"))).plan.decisions.precision
    assert (of["conv0"], of["conv1"], of["conv2"]) == ("f32", "i8", "f32")
    of = make_plan(replace(request, precision=("conv0=f32",))).plan.decisions.precision
    assert of["conv0"] == "f32"
    assert {of["conv1"], of["conv2"]} <= {"i8", "mixed"}
    for pin, dtype in (("i8", "i8"), ("mixed", "f32"), ("f32", "f32")):  # of the updated layer
        planned = make_plan(replace(request, precision=(f"fc={pin}",)))
        assert planned.plan.decisions.precision["fc"] == pin
        (weight,) = (u for u in planned.training.updates if u.role == "weight")
        assert weight.value.type.dtype == dtype


@pytest.mark.parametrize(
    ("precision", "reason"),
    [
        ("conv9=i8", "conv9 matches no layer of .*; nearest: .*conv"),
        ("conv0=i4", "'conv0=i4' is not LAYER=PRECISION, one of f32, mixed, i8"),
        ("conv0", "'conv0' is not LAYER=PRECISION"),
    ],
)
def test_bad_pins(precision: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        make_plan(request_of(tmp_path, precision=(precision,)))


def test_a_float_model_is_not_quantized_silently(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="floats without scales; give samples with --calib"):
        make_plan(request_of(tmp_path, calibration=None, precision=("conv*=i8",)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (np.zeros((4, 3, 6, 6), np.float32), r"x needs \[count, 2, 6, 6\]"),
        (np.full((4, 2, 6, 6), np.nan, np.float32), "sample 0 has a NaN or infinite value"),
    ],
)
def test_bad_samples(data: Array, reason: str, tmp_path: Path) -> None:
    request = request_of(tmp_path)
    with pytest.raises(UsageError, match=reason):
        make_plan(replace(request, calibration=samples(tmp_path, data)))


def test_qdq_model(tmp_path: Path) -> None:
    request = request_of(tmp_path, model=qdq(tmp_path), calibration=None)
    planned = make_plan(request)
    assert planned.scales == "scales from the model file"
    assert planned.plan.quantization == {}
    assert planned.plan.decisions.precision["conv"] == "i8"
    trains(planned.plan, planned.training)
    path = written(planned, tmp_path)
    check(load_plan(path), rebuild(load_plan(path), path), request.device)
    with pytest.raises(UsageError, match="quantized already"):
        make_plan(replace(request, calibration=samples(tmp_path)))
    record = {"x": QuantizationRecord(scale=(0.1,), zero_point=0)}
    with pytest.raises(UsageError, match="brings its own"):
        rebuild(planned.plan.model_copy(update={"quantization": record}), path)


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("nothing", QuantizationRecord(scale=(0.1,), zero_point=0), "has no such value"),
        ("x", QuantizationRecord(scale=(-1.0,), zero_point=0), "not a positive finite"),
        ("fc.weight", QuantizationRecord(scale=(0.1, 0.1), zero_point=0, axis=0), "fc.weight"),
    ],
)
def test_scales_that_do_not_fit(
    name: str, record: QuantizationRecord, reason: str, tmp_path: Path
) -> None:
    planned = make_plan(request_of(tmp_path))
    wrong = planned.plan.model_copy(
        update={"quantization": {**planned.plan.quantization, name: record}}
    )
    with pytest.raises(UsageError, match=reason):
        rebuild(wrong, tmp_path / "plan.json")


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = make_plan(request_of(tmp_path, train=("auto",), ram_bytes=3000))
    print_plan(planned, Budgeted(3000, None), [])
    told = capsys.readouterr().out
    assert "layers i8, " in told
    assert "16 samples of calib.npz" in told
    assert "QAS, stochastic rounding" in told


def test_command_line(tmp_path: Path) -> None:
    """Options reach the planner, and the written plan verifies without the samples."""
    request = request_of(tmp_path)
    out = tmp_path / "out"

    def odt_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "odt_plan.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    options = ("--ram", "32KB", "--flash", "1MB", "--train", "last", "--calib-method", "mse")
    pins = ("--precision", "conv*=f32", "--precision", "conv1=i8")
    samples_option = ("--calib", str(request.calibration))
    made = odt_plan(str(request.model), *options, *pins, *samples_option, "-o", str(out))
    assert made.returncode == 0, made.stderr
    assert "ranges by mse from 16 samples of calib.npz" in made.stdout
    of = load_plan(out / "plan.json").decisions.precision
    assert (of["conv0"], of["conv1"], of["conv2"]) == ("f32", "i8", "f32")
    (tmp_path / "calib.npz").unlink()
    assert odt_plan("verify", str(out / "plan.json")).returncode == 0
    missing = odt_plan(str(request.model), *options, *samples_option)
    assert missing.returncode == 2
    assert "calib.npz" in missing.stderr


def test_too_little_ram_names_what_the_last_layer_needs(tmp_path: Path) -> None:
    request = request_of(tmp_path, train=("auto",), ram_bytes=500)
    with pytest.raises(InfeasibleError, match="RAM: needs") as refused:
        make_plan(request)
    told = re.search(r"--ram that works is (\d+)", str(refused.value))
    assert told is not None
    need = int(told[1])
    assert make_plan(replace(request, ram_bytes=need)).plan.claims.ram_bytes.total <= need
    with pytest.raises(InfeasibleError):
        make_plan(replace(request, ram_bytes=need - 4))
