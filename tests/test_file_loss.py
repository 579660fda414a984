"""Files that end in their own loss: parted, trained by it, in NumPy and C, against PyTorch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import plans
import pytest
from board import lane
from cli_run import Cli
from onnx import TensorProto, helper, numpy_helper
from onnx_files import export, floats, node, runtime, save
from oracle import Unconstrained
from test_c_backend import reference, samples

from odt_plan.backends.c import emit_c
from odt_plan.backends.numpy import Runtime
from odt_plan.ir.errors import UnsupportedModelError, UsageError
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.targets import Bounds, bounds_of
from odt_plan.ir.training import TrainingSpec
from odt_plan.planner.plan import load_plan

torch = pytest.importorskip("torch")
LIMITS = ("--ram", "64KB", "--flash", "1MB")
BATCH, CLASSES = 3, 5
WEIGHTS = np.linspace(0.5, 2, CLASSES, dtype=np.float32)


def file(
    folder: Path,
    ending: list[onnx.NodeProto],
    outputs: tuple[str, ...],
    target: tuple[int, tuple[int | str, ...]] = (TensorProto.INT64, ("n",)),
    constants: dict[str, np.ndarray] | None = None,
) -> Path:
    """Two layers of x, ``scores``, and what is behind them; an input ``t``."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Gemm", "x w v", "h", transB=1),
        node("Relu", "h", "r"),
        node("Gemm", "r w2 v2", "scores", transB=1),
        *ending,
    ]
    data = {"w": floats(rng, 6, 4), "v": floats(rng, 6), "w2": floats(rng, CLASSES, 6)}
    data |= {"v2": floats(rng, CLASSES), **(constants or {})}
    graph = helper.make_graph(
        nodes,
        "own",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info("t", *target),
        ],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
        [numpy_helper.from_array(a, k) for k, a in data.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    return save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder)


def softmax(folder: Path, *, inputs: str = "scores t", outputs: str = "loss", **attrs: Any) -> Path:
    ending = [node("SoftmaxCrossEntropyLoss", inputs, outputs, **attrs)]
    named = ("loss", "scores") if outputs == "loss" else tuple(outputs.split())
    return file(folder, ending, named, constants={"cw": WEIGHTS} if "cw" in inputs else None)


def nll(folder: Path) -> Path:
    ending = [
        node("LogSoftmax", "scores", "lp", axis=1),
        node("NegativeLogLikelihoodLoss", "lp t", "loss", reduction="sum"),
    ]
    return file(folder, ending, ("loss",))


def squares(folder: Path) -> Path:
    ending = [
        node("Sub", "scores t", "d"),
        node("Mul", "d d", "s"),
        node("ReduceMean", "s", "m", axes=[0, 1], keepdims=1),
        node("Reshape", "m scalar", "loss"),
    ]
    scalar = {"scalar": np.array([], np.int64)}
    return file(folder, ending, ("loss",), (TensorProto.FLOAT, ("n", CLASSES)), scalar)


def binary(folder: Path) -> Path:
    """The prediction meets the target twice; one constant is of forward and loss."""
    ending = [
        node("Mul", "scores one", "scaled"),
        node("Sigmoid", "scaled", "p"),
        node("Log", "p", "lp"),
        node("Sub", "one p", "q"),
        node("Log", "q", "lq"),
        node("Sub", "one t", "u"),
        node("Mul", "t lp", "a"),
        node("Mul", "u lq", "b"),
        node("Add", "a b", "c"),
        node("ReduceMean", "c", "m", keepdims=0),
        node("Neg", "m", "loss"),
    ]
    one = {"one": np.array(1, np.float32)}
    return file(folder, ending, ("loss",), (TensorProto.FLOAT, ("n", CLASSES)), one)


def column(folder: Path) -> Path:
    """Labels [n, 1]: a view of what the caller owns."""
    ending = [
        node("Squeeze", "t axes", "flat"),
        node("SoftmaxCrossEntropyLoss", "scores flat", "loss"),
    ]
    axes = {"axes": np.array([1], np.int64)}
    return file(folder, ending, ("loss", "scores"), (TensorProto.INT64, ("n", 1)), axes)


F = torch.nn.functional
CASES: dict[str, tuple[Any, Any, str]] = {
    "softmax": (softmax, lambda y, t: F.cross_entropy(y, t), "scores"),
    "weighted": (
        lambda folder: softmax(folder, inputs="scores t cw", outputs="loss lp", ignore_index=1),
        lambda y, t: F.cross_entropy(y, t, weight=torch.from_numpy(WEIGHTS), ignore_index=1),
        "lp",
    ),
    "nll": (nll, lambda y, t: F.cross_entropy(y, t, reduction="sum"), "lp"),
    "squares": (squares, lambda y, t: F.mse_loss(y, t), "scores"),
    "binary": (binary, lambda y, t: F.binary_cross_entropy_with_logits(y, t), "p"),
    "column": (column, lambda y, t: F.cross_entropy(y, t[:, 0]), "scores"),
}


def target(case: str, rng: np.random.Generator) -> np.ndarray:
    if case in ("squares", "binary"):
        return rng.uniform(0, 1, (BATCH, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (BATCH, 1) if case == "column" else BATCH)
    labels[0] = 1
    return labels.astype(np.int64)


@pytest.mark.parametrize("case", CASES)
def test_value_and_step(case: str, tmp_path: Path) -> None:
    """The value by ONNX Runtime, a step of everything by PyTorch, by a plan bit for bit."""
    make, criterion, prediction = CASES[case]
    path = make(tmp_path)
    forward = import_model(path, ImportOptions(batch=BATCH))
    assert [v.name for v in (*forward.inputs, *forward.outputs)] == ["x", prediction]
    assert "trained by the loss of the file, loss, with the target t; the p" in forward.notes[-1]
    t = plans.training_of(forward, TrainingSpec(loss="output"))
    assert len(t.updates) == 4
    rng = np.random.default_rng(1)
    x, y = floats(rng, BATCH, 4), target(case, rng)
    stored = y.astype(np.int32) if y.dtype == np.int64 else y
    feeds = {"x": x, t.target.name: stored, t.hyper.name: np.array([0.1, 1, 1], np.float32)}
    env = run(t.graph, feeds)
    results = runtime(path, {"x": x, "t": y})
    (want,) = (r for r in results if r.shape == ())
    assert env[t.loss.name] == pytest.approx(float(want), rel=1e-5)

    leaves = {
        k: torch.from_numpy(forward.constants[k].copy()).requires_grad_()
        for k in ("w", "v", "w2", "v2")
    }
    hidden = torch.relu(F.linear(torch.from_numpy(x), leaves["w"], leaves["v"]))
    criterion(F.linear(hidden, leaves["w2"], leaves["v2"]), torch.from_numpy(y)).backward()
    for u in t.updates:
        want = leaves[u.candidate.param].grad
        assert want.abs().max() > 1e-3
        np.testing.assert_allclose(env[u.grad.name], want, rtol=1e-4, atol=1e-6)

    by_plan, free = Runtime(plans.keep_all(t), t), Unconstrained(t)
    for _ in range(2):
        assert by_plan.train_step(x, stored, 0.1) == free.step(x, stored, 0.1)
    for u in t.updates:
        assert by_plan.params()[u.candidate.param].tobytes() == free.state[u.value.name].tobytes()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("case", ["weighted", "binary", "column"])
def test_c_gives_the_same_bits(case: str, tmp_path: Path) -> None:
    """Inference, steps and self-test; an ignored label passes the check."""
    forward = import_model(CASES[case][0](tmp_path), ImportOptions(batch=BATCH))
    t = plans.training_of(forward, TrainingSpec(loss="output"))
    plan = plans.keep_all(t)
    emit_c(plan, t, tmp_path)
    checked = "labels[i] != (1) && (labels[i] < 0"
    assert (checked in (tmp_path / "own.c").read_text()) == (case == "weighted")
    program = lane.build_host(tmp_path, "own")
    result = lane.run_host(program, lane.training_input(*samples(t, 3), 0.05))
    assert result.exit_code == 0, result.stdout
    assert result.value("selftest_exact") == 1
    assert result.files["output.bin"] == reference(plan, t, 3, 0.05)


def test_labels_and_their_bounds(tmp_path: Path) -> None:
    path = softmax(tmp_path, ignore_index=-100)
    forward = import_model(path, ImportOptions(batch=BATCH))
    t = plans.training_of(forward, TrainingSpec(loss="output"))
    assert bounds_of(t.graph, t.target) == Bounds(0, CLASSES - 1, -100)
    by_plan = Runtime(plans.keep_all(t), t)
    x = np.ones((BATCH, 4), np.float32)
    assert by_plan.train_step(x, [0, -100, 4], 0.1) > 0
    with pytest.raises(UsageError, match="has labels from -1 to 4, but the model has classes 0 t"):
        by_plan.train_step(x, [-1, -100, 4], 0.1)


def test_from_the_command_line(tmp_path: Path, odt: Cli) -> None:
    path, out = softmax(tmp_path), tmp_path / "out"
    done = odt(path, *LIMITS, "-o", out, "--batch", "4", "--train", "all")
    assert done.code == 0, done.err
    assert "loss of the file, sgd" in done.out
    assert "trained by the loss of the file, loss, with the target t" in done.out
    assert odt("verify", out / "plan.json").code == 0
    rng = np.random.default_rng(0)
    x = floats(rng, 64, 4)
    np.savez(tmp_path / "d.npz", x=x, y=(x[:, 0] > 0).astype(int))
    told = odt("run", out / "plan.json", "--data", tmp_path / "d.npz", "--lr", "0.1", "--json")
    losses = told.json["losses"]
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    other = odt(path, *LIMITS, "--loss", "mse")
    assert other.code == 2
    assert "own ends in its own loss, loss, so it can't be trained by mse; leave" in other.error
    assert "4 of 4" not in odt("check", path).out
    assert odt("check", path).code == 0


def test_what_can_not_be_parted(tmp_path: Path, odt: Cli) -> None:
    plain = file(tmp_path, [], ("scores",), (TensorProto.FLOAT, ("n", 4)))
    assert import_model(plain).loss is None
    tied = [
        node("Sub", "scores t", "d"),
        node("MatMul", "d w2", "e"),
        node("ReduceL2", "e", "loss", keepdims=0),
    ]
    path = file(tmp_path, tied, ("scores", "loss"), (TensorProto.FLOAT, ("n", CLASSES)))
    with pytest.raises(UnsupportedModelError, match=r"the loss loss reads w2 beside prediction sc"):
        import_model(path)
    assert "the loss loss reads w2 beside" in odt("check", path).out
    twice = [
        node("Sub", "scores t", "d"),
        node("ReduceSum", "x", "rest", keepdims=0),
        node("Mul", "d rest", "e"),
        node("ReduceMean", "e", "loss", keepdims=0),
    ]
    path = file(tmp_path, twice, ("loss",), (TensorProto.FLOAT, ("n", CLASSES)))
    with pytest.raises(UnsupportedModelError, match="meets rest, scores, of no one value, so the"):
        import_model(path)


def test_no_gradient_in_the_loss(tmp_path: Path, odt: Cli) -> None:
    ending = [
        node("Round", "scores", "rounded"),
        node("Sub", "rounded t", "d"),
        node("ReduceL2", "d", "loss", keepdims=0),
    ]
    path = file(tmp_path, ending, ("scores", "loss"), (TensorProto.FLOAT, ("n", CLASSES)))
    done = odt(path, *LIMITS, "--batch", "2")
    assert done.code == 4
    assert "in the loss loss no gradient passes Round_rounded, so it can't be tra" in done.error
    assert "no gradient passes Round_rounded" in odt("check", path).out


def test_obstacles_beside_a_loss(tmp_path: Path, odt: Cli) -> None:
    """The loss is no second prediction then, either."""
    ending = [
        node("Det", "scores", "odd"),
        node("SoftmaxCrossEntropyLoss", "odd t", "loss"),
    ]
    told = odt("check", file(tmp_path, ending, ("loss", "odd")))
    assert told.code == 4
    assert "Det_odd (Det)" in told.out
    assert "outputs; training needs exactly one" not in told.out


def test_a_fresh_head(tmp_path: Path, odt: Cli) -> None:
    """The loss reads it, or one line says why it doesn't."""
    options = ImportOptions(head=3)
    forward = import_model(softmax(tmp_path), options)
    assert forward.loss is not None
    assert forward.loss.inputs[0].type == forward.outputs[0].type
    t = plans.training_of(forward, TrainingSpec(loss="output"))
    assert bounds_of(t.graph, t.target) == Bounds(0, 2, None)
    path = softmax(tmp_path, inputs="scores t cw", outputs="loss lp")
    done = odt(path, *LIMITS, "--head", "3")
    assert done.code == 4
    assert "the loss loss is not one of the fresh head's lp, f32[1,3] (class weights" in done.error
    assert " f32[5] do not fit 3 classes), so it can't be trained by; leave" in done.error
    assert "is not one of the fresh head's lp" in odt("check", path, "--head", "3").out


def test_frozen_layers(tmp_path: Path, odt: Cli) -> None:
    """--freeze-before, with a loss and targets of its own behind."""
    done = odt(softmax(tmp_path), *LIMITS, "--freeze-before", "Gemm_scores", "-o", "out")
    assert done.code == 0, done.err
    updates = load_plan(Path("out") / "plan.json").decisions.updates
    assert {u.param for u in updates if u.ratio} == {"w2", "v2"}
    assert odt("verify", Path("out") / "plan.json").code == 0
    done = odt(tmp_path / "model.onnx", *LIMITS, "--freeze-before", "Gemm_score")
    assert done.code == 2
    assert "has no node Gemm_score; nearest: Gemm_scores" in done.error
    (node,) = import_model(tmp_path / "model.onnx").loss.nodes[-1:]  # type: ignore[union-attr]
    for command in ((tmp_path / "model.onnx", *LIMITS), ("check", tmp_path / "model.onnx")):
        done = odt(*command, "--freeze-before", node.name)
        assert done.code == 2
        told = f"{node.name} is part of the loss loss, so nothing would be left to train; name a"
        assert f"{told} node up to the prediction " in done.error


def test_output_needs_a_loss(tmp_path: Path, odt: Cli) -> None:
    path = export(nets.mlp(), tmp_path)
    told = odt(path, *LIMITS, "--loss", "output").error
    assert told.startswith("--loss output: no output of small is a scalar that depends on")
