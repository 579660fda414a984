"""Plans by where their scales come from: weights alone, no samples, QLinearConv, int8 inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from onnx_files import export, floats, model, node, runtime, save
from oracle import Unconstrained, batch
from test_cli import Cli
from test_qdq_import import GOLDEN, everything, steps

from odt_plan.backends.numpy import Runtime
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.training import TrainingSpec
from odt_plan.planner.check import check
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.plan import load_plan
from odt_plan.planner.rebuild import rebuild

Array = NDArray[Any]


@pytest.fixture
def odt(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    return Cli(capfd, monkeypatch)


def planned(path: Path, **options: Any) -> PlannedModel:
    device = load_device("stm32f746g-disco")
    base: dict[str, Any] = {"train": ("last",), "with_baselines": False}
    return make_plan(Request(path, device, **{**base, **options}))


def survives(made: PlannedModel, folder: Path) -> None:
    """The plan, read again, passes the check and trains bit for bit like the interpreter."""
    path = folder / "plan.json"
    path.write_text(made.plan.model_dump_json(), encoding="utf-8")
    plan = load_plan(path)
    training = rebuild(plan, path)
    check(plan, training, made.device)
    one, two = Runtime(plan, training), Unconstrained(training)
    rng = np.random.default_rng(0)
    for _ in range(2):
        x, y = batch(training, rng)
        assert one.train_step(x, y, 0.05) == two.step(x, y, 0.05)
    assert one.state_bytes() == two.state_bytes(plan)


def ops(made: PlannedModel) -> list[str]:
    return [n.op for n in made.training.graph.nodes if n.phase == "forward"]


# -- weights alone ---------------------------------------------------------------------------------


def weight_only(folder: Path) -> tuple[Path, dict[str, Array]]:
    """A CNN of float activations whose weights are stored as int8, per channel and per tensor."""
    rng = np.random.default_rng(0)
    constants: dict[str, Array] = {
        "w1.q": rng.integers(-127, 128, (4, 2, 3, 3)).astype("i1"),
        "w1.s": rng.uniform(0.004, 0.006, 4).astype("f4"),
        "w1.z": np.zeros(4, "i1"),
        "b1": floats(rng, 4) * np.float32(0.1),
        "w2.q": rng.integers(-127, 128, (4, 3)).astype("i1"),
        "w2.s": np.array(0.01, "f4"),
        "w2.z": np.array(0, "i1"),
    }
    nodes = [
        node("DequantizeLinear", "w1.q w1.s w1.z", "w1", axis=0),
        node("DequantizeLinear", "w2.q w2.s w2.z", "w2"),
        node("Conv", "x w1 b1", "c", "conv", pads=[1, 1, 1, 1]),
        node("Relu", "c", "r"),
        node("GlobalAveragePool", "r", "p", "pool"),
        node("Flatten", "p", "f"),
        node("MatMul", "f w2", "y", "fc"),
    ]
    return save(model(nodes, {"x": (1, 2, 6, 6)}, ["y"], constants), folder), constants


def test_weight_only_model_stays_f32(tmp_path: Path) -> None:
    path, _ = weight_only(tmp_path)
    made = planned(path)
    assert set(made.plan.decisions.precision.values()) == {"f32"}
    assert not any(op.startswith("Q") for op in ops(made))
    assert made.plan.quantization == {}
    assert (
        "scales of weights alone, so every layer is f32; give samples with --calib" in made.scales
    )
    x = floats(np.random.default_rng(1), 1, 2, 6, 6)
    want = everything(path, {"x": x})["y"]  # optimized, it computes with short activations
    got = Runtime(made.plan, made.training).infer(x)
    assert np.abs(got - want).max() < 1e-5
    survives(made, tmp_path)


def test_weight_only_model_with_samples_keeps_the_integers_of_its_weights(tmp_path: Path) -> None:
    path, constants = weight_only(tmp_path)
    x = floats(np.random.default_rng(2), 32, 2, 6, 6)
    np.savez(tmp_path / "calib.npz", x=x)
    made = planned(path, calibration=tmp_path / "calib.npz")
    precision = made.plan.decisions.precision
    assert precision["conv"] == "i8"
    assert "QConv" in ops(made)
    stored = made.training.graph.constants["w1"]
    assert np.array_equal(stored, constants["w1.q"])
    quant = made.training.graph.values["w1"].type.quant
    assert quant is not None
    assert np.array_equal(np.float32(quant.scale), constants["w1.s"])
    assert set(made.plan.quantization) >= {"x"}
    assert not {"w1", "w2"} & set(made.plan.quantization)  # those stand in the file
    real = Runtime(made.plan, made.training)
    for sample in x[:8]:
        (want,) = runtime(path, {"x": sample[None]})
        assert np.abs(real.infer(sample[None]) - want).max() < 0.05 * np.abs(want).max() + 0.02
    survives(made, tmp_path)


# -- without samples -------------------------------------------------------------------------------


def test_guessed_ranges_are_called_a_guess(odt: Cli, tmp_path: Path) -> None:
    path = export(nets.cnn(), tmp_path)
    limits = ("--ram", "64KB", "--flash", "1MB", "--train", "last")
    done = odt(path, *limits, "--calib", "synthetic", "-o", "out")
    assert done.code == 0, done.err
    told = " ".join(done.out.split())
    assert "ranges guessed from weights, Relu6 bounds and synthetic inputs in -1..1" in told
    assert "there are no calibration samples; give some with --calib" in told
    assert " i8, " in told
    plan = load_plan(Path("out/plan.json"))
    assert "i8" in plan.decisions.precision.values()
    assert odt("verify", "out/plan.json").code == 0
    plain = odt(path, *limits)
    assert "guessed" not in plain.out


# -- inputs and operators of quantized files -------------------------------------------------------


def qlinear(folder: Path) -> Path:
    """An int8 input, QLinearConv, and a float classifier behind it."""
    rng = np.random.default_rng(0)
    constants: dict[str, Array] = {
        "xs": np.array(0.02, "f4"),
        "xz": np.array(7, "i1"),
        "w": rng.integers(-127, 128, (4, 3, 3, 3)).astype("i1"),
        "ws": rng.uniform(0.005, 0.02, 4).astype("f4"),
        "wz": np.zeros(4, "i1"),
        "ys": np.array(0.1, "f4"),
        "yz": np.array(-128, "i1"),
        "b": rng.integers(-900, 900, 4).astype("i4"),
        "v": floats(rng, 3, 4),
    }
    nodes = [
        node("QLinearConv", "x xs xz w ws wz ys yz b", "c", "conv", strides=[2, 2]),
        node("DequantizeLinear", "c ys yz", "d"),
        node("GlobalAveragePool", "d", "p", "pool"),
        node("Flatten", "p", "f"),
        node("Gemm", "f v", "y", "fc", transB=1),
    ]
    inputs = {"x": (1, 3, 9, 9)}
    return save(model(nodes, inputs, ["y"], constants, dtype=TensorProto.INT8), folder)


def qdq_to_int8(folder: Path) -> Path:
    """The same with DequantizeLinear on the input."""
    rng = np.random.default_rng(1)
    constants: dict[str, Array] = {
        "s": np.array(0.02, "f4"),
        "z": np.array(-5, "i1"),
        "w.q": rng.integers(-127, 128, (4, 3, 3, 3)).astype("i1"),
        "w.s": np.full(4, 0.01, "f4"),
        "w.z": np.zeros(4, "i1"),
        "ys": np.array(0.05, "f4"),
        "v": floats(rng, 3, 4),
    }
    nodes = [
        node("DequantizeLinear", "x s z", "d"),
        node("DequantizeLinear", "w.q w.s w.z", "w", axis=0),
        node("Conv", "d w", "c", "conv"),
        node("QuantizeLinear", "c ys z", "cq"),
        node("DequantizeLinear", "cq ys z", "cd"),
        node("GlobalAveragePool", "cd", "p", "pool"),
        node("Flatten", "p", "f"),
        node("Gemm", "f v", "y", "fc", transB=1),
    ]
    inputs = {"x": (1, 3, 9, 9)}
    return save(model(nodes, inputs, ["y"], constants, dtype=TensorProto.INT8), folder)


@pytest.mark.parametrize("make", [qlinear, qdq_to_int8])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_int8_inputs_are_planned_and_trained(
    make: Callable[[Path], Path], optimizer: Any, tmp_path: Path
) -> None:
    path = make(tmp_path)
    made = planned(path, spec=TrainingSpec(optimizer=optimizer))
    assert made.scales == "scales from the model file"
    assert str(made.training.sample.type) == "i8[1,3,9,9]"
    assert "QConv" in ops(made)
    assert "Dequantize" not in ops(made)[:1]
    real = Runtime(made.plan, made.training)
    for seed in range(4):
        x = np.random.default_rng(seed).integers(-128, 128, (1, 3, 9, 9)).astype(np.int8)
        (want,) = runtime(path, {"x": x})
        assert np.abs(real.infer(x) - want).max() < 0.05
    survives(made, tmp_path)


@pytest.mark.parametrize("name", GOLDEN)
def test_plans_of_real_models_reproduce_the_recorded_outputs(shared: Path, name: str) -> None:
    path = shared / "models" / f"{name}.onnx"
    golden = np.load(path.with_suffix(".golden.npz"))
    made = planned(path)
    assert made.training.sample.type.dtype == "i8"
    (x,) = (golden[k] for k in golden if k.startswith("in_"))
    graph = import_model(path)
    quant = graph.quantization[graph.outputs[0].name]
    got = steps(Runtime(made.plan, made.training).infer(x), quant)
    assert np.abs(got - steps(golden["out_0"], quant)).max() <= 1
