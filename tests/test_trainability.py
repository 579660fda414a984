"""What ``odt-plan check`` says, for models that can and that can't be planned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from onnx import NodeProto, TensorProto
from onnx_files import floats, model, node, save

from odt_plan.ir import opdef
from odt_plan.ir.autodiff import build_training, param_slots
from odt_plan.ir.errors import UnsupportedModelError, UsageError
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.trainability import trainability
from odt_plan.ir.training import Candidate, TrainingSpec

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def _chain(folder: Path, middle: str = "Relu", **attrs: object) -> Path:
    """Gemm, some operator, Gemm, Softmax."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Gemm", "x w1 b1", "a", name="first"),
        node(middle, "a", "b", name="middle", **attrs),
        node("Gemm", "b w2 b2", "c", name="second"),
        node("Softmax", "c", "y", name="probabilities"),
    ]
    constants = {
        "w1": floats(rng, 6, 5),
        "b1": floats(rng, 5),
        "w2": floats(rng, 5, 3),
        "b2": floats(rng, 3),
    }
    return save(model(nodes, {"x": ["N", 6]}, ["y"], constants), folder)


def test_whole_model_is_trainable(tmp_path: Path) -> None:
    report = trainability(_chain(tmp_path), ImportOptions(batch=2))
    assert [(x.name, x.op, x.parameters, x.macs, x.trainable) for x in report.layers] == [
        ("first", "Gemm", 35, 60, True),
        ("middle", "Relu", 0, 0, False),
        ("second", "Gemm", 18, 30, True),
        ("probabilities", "Softmax", 0, 0, False),
    ]
    assert str(report.layers[0].output) == "f32[2,5]"
    assert report.layers[0].reason == "trainable: w1, b1"
    assert report.obstacles == ()
    assert report.share == 1.0
    assert report.advice == ""
    assert report.summary() == (
        "2 of 2 layers with parameters can be trained (53 of 53 parameters);"
        " 90 MACs per forward run, batch 2"
    )


def test_what_is_trainable_can_be_built(tmp_path: Path) -> None:
    """Each parameter that the report calls trainable gets a training graph."""
    for path in (_chain(tmp_path), EXAMPLES / "digits_cnn.onnx"):
        graph = import_model(path)
        names = {
            n for x in trainability(path).trainable for n in x.reason.split(": ")[1].split(", ")
        }
        assert names == set(param_slots(graph))
        for name in names:
            build_training(graph, TrainingSpec(), [Candidate(name)])


def test_rejected_model_is_reported_in_full(tmp_path: Path) -> None:
    path = _chain(tmp_path, "Bernoulli")
    with pytest.raises(UnsupportedModelError):
        import_model(path)
    report = trainability(path)
    assert [(x.name, x.trainable) for x in report.layers] == [
        ("first", False), ("middle", False), ("second", True), ("probabilities", False),
    ]  # fmt: skip
    assert report.layers[0].reason == "frozen: no gradient passes middle behind it"
    assert report.layers[1].reason == "the operator is not supported"
    assert str(report.layers[1].output) == "f32[1,5]"
    assert [(o.where, o.op) for o in report.obstacles] == [("middle", "Bernoulli")]
    assert report.share == 0.5
    assert report.advice.startswith("cut the file behind middle (Bernoulli)")
    assert "1 of 2 layers remain trainable" in report.advice
    assert report.summary().endswith("; 1 obstacle")


def test_operator_without_gradient_freezes_what_is_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice names the layer to start from; the training graph agrees."""
    path = _chain(tmp_path, "Tanh")
    monkeypatch.setitem(
        opdef.all_ops(), "Tanh", dataclasses.replace(opdef.get_op("Tanh"), vjp=None)
    )
    report = trainability(path)
    assert report.obstacles == ()
    assert [x.name for x in report.trainable] == ["second"]
    assert report.advice == (
        "freeze everything before middle (--freeze-before middle): 34 % of the weights"
        " (1 of 2 layers) stay trainable"
    )
    graph = import_model(path)
    build_training(graph, TrainingSpec(), [Candidate("w2")])
    with pytest.raises(UnsupportedModelError, match="Tanh has no gradient"):
        build_training(graph, TrainingSpec(), [Candidate("w1")])


def test_gradient_must_pass_on_every_way(tmp_path: Path) -> None:
    """A layer that also feeds a rejected branch is not trainable; one beside the branch is."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Gemm", "x w", "a", name="trunk"),
        node("Bernoulli", "a", "b", name="branch"),
        node("Gemm", "a v", "c", name="beside"),
        node("Add", "b c", "y", name="join"),
    ]
    path = save(
        model(nodes, {"x": [1, 4]}, ["y"], {"w": floats(rng, 4, 4), "v": floats(rng, 4, 4)}),
        tmp_path,
    )
    assert [x.name for x in trainability(path).trainable] == ["beside"]


def test_tied_weights_are_trainable_as_long_as_they_are_only_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    nodes = [node("MatMul", "x w", "a", name="one"), node("MatMul", "a w", "y", name="two")]
    path = save(model(nodes, {"x": [1, 4]}, ["y"], {"w": floats(rng, 4, 4)}), tmp_path)
    assert [layer.reason for layer in trainability(path).layers] == ["trainable: w"] * 2
    nodes = [node("MatMul", "x w", "a", name="one"), node("Concat", "a w", "y", axis=1)]
    path = save(model(nodes, {"x": [4, 4]}, ["y"], {"w": floats(rng, 4, 4)}), tmp_path)
    report = trainability(path)
    assert report.layers[0].reason == "frozen: w is also read as an ordinary operand"


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (node("Relu", "y", "w"), None),
        (node("ReduceSum", "y", "w", keepdims=0), "the prediction w, f32[], is not one per sample"),
        (node("ArgMax", "y", "w"), "the prediction w is i32[1,4], which no loss has a gradient of"),
        (node("Identity", "y", "w"), "two outputs are the same, y"),
    ],
)
def test_several_outputs_are_an_obstacle_if_one_has_no_loss(
    tmp_path: Path, last: NodeProto, reason: str | None
) -> None:
    nodes = [node("Add", "x z", "y"), last]
    proto = model(nodes, {"x": [1, 4], "z": [1, 4]}, ["y", "w"])
    if last.op_type == "ArgMax":
        proto.graph.output[1].type.tensor_type.elem_type = TensorProto.INT64
    path = save(proto, tmp_path)
    told = [o.reason for o in trainability(path).obstacles]
    way_out = "; leave it out with --keep-output and the names of the others"
    assert told == ([] if reason is None else [f"{reason}{way_out}"])
    if reason is not None:
        assert not trainability(path, ImportOptions(outputs=("y",))).obstacles


def test_files_that_are_no_graph_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        trainability(tmp_path / "none.onnx")
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(UnsupportedModelError):
        trainability(tmp_path / "model.onnx")


def test_real_models(shared: Path) -> None:
    folder = shared / "models"
    resnet = trainability(folder / "mlperf_resnet8_bn.onnx")
    assert resnet.share == 1.0
    assert len(resnet.parametric) == 10
    whole = trainability(folder / "mlperf_resnet8_bn.onnx", ImportOptions(fold_batchnorm=False))
    assert len(whole.parametric) == 17
    lstm = trainability(folder / "tflm_mnist_lstm.onnx")
    assert lstm.share == 1.0
    assert [x.op for x in lstm.trainable] == ["Gemm", "LSTM", "Gemm"]
    for path in sorted(folder.glob("*.onnx")):  # every model gets an answer, none an exception
        report = trainability(path)
        assert report.layers
        assert bool(report.obstacles) == (not _imports(path))


def _imports(path: Path) -> bool:
    try:
        import_model(path)
    except UnsupportedModelError:
        return False
    return True
