"""``--head N``: the last layer replaced by a fresh one for other classes."""

from __future__ import annotations

from pathlib import Path

import nets
import numpy as np
import plans
import pytest
from cli_run import Cli
from onnx_files import export, model, node, save

from odt_plan.backends.numpy import Runtime
from odt_plan.ir.calibrate import calibrate
from odt_plan.ir.errors import UnsupportedModelError
from odt_plan.ir.graph import Graph
from odt_plan.ir.head import replace_head
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.precision import Precision, lower, quantizable
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request, make_plan
from odt_plan.planner.rebuild import rebuild

BOARD = load_device(plans.BOARD)
WEIGHTS = {"w": np.ones((4, 3), np.float32), "b": np.arange(3, dtype=np.float32)}


def gemm(**attrs: int) -> list[object]:
    return [node("Gemm", "x w b", "a", "fc", **attrs), node("Softmax", "a", "y", "probs")]


def test_a_fresh_layer_takes_the_place_of_the_last(tmp_path: Path) -> None:
    path = save(model(gemm(), {"x": [1, 4]}, ["y"], WEIGHTS), tmp_path)
    old, new, again = (import_model(path, ImportOptions(head=n)) for n in (None, 5, 5))
    assert new.outputs[0].type.shape == (1, 5)
    assert new.constants["w"].shape == (4, 5)
    assert np.array_equal(new.constants["b"], np.zeros(5, np.float32))
    assert 0.2 < new.constants["w"].std() < 0.9  # 1 / sqrt(4) is 0.5
    assert np.array_equal(new.constants["w"], again.constants["w"])
    assert [n.op for n in new.nodes] == [n.op for n in old.nodes]
    probs = run(new, {"x": np.ones((1, 4), np.float32)})["y"]
    assert probs.sum() == pytest.approx(1)
    same = import_model(path, ImportOptions(head=3))  # as many classes as before, but fresh
    assert not np.array_equal(same.constants["w"], WEIGHTS["w"])


def test_transposed_weights_and_convolutions(tmp_path: Path) -> None:
    weights = WEIGHTS | {"w": np.ones((3, 4), np.float32)}
    path = save(model(gemm(transB=1), {"x": [1, 4]}, ["y"], weights), tmp_path)
    assert import_model(path, ImportOptions(head=6)).constants["w"].shape == (6, 4)
    conv = [
        node("Conv", "x w", "c", "conv"),
        node("Relu", "c", "y", "relu"),
    ]
    kernel = {"w": np.ones((3, 2, 2, 2), np.float32)}
    path = save(model(conv, {"x": [1, 2, 4, 4]}, ["y"], kernel), tmp_path)
    graph = import_model(path, ImportOptions(head=7))
    assert graph.constants["w"].shape == (7, 2, 2, 2)
    assert graph.outputs[0].type.shape == (1, 7, 3, 3)


def test_scales_of_the_old_head_are_forgotten() -> None:
    """The fresh head is f32 behind layers that stay i8."""
    graph = nets.cnn(2, 3, 4)
    calibrate(graph, np.random.default_rng(0).standard_normal((6, *graph.inputs[0].type.shape[1:])))
    known = set(graph.quantization)
    classes = graph.outputs[0].type.shape[-1] + 2
    replace_head(graph, classes)
    gone = known - set(graph.quantization)
    head = next(n for n in graph.nodes if n.out is graph.outputs[0] or n.op == "Gemm")
    assert head.out.name in gone
    assert graph.outputs[0].name in gone
    assert graph.inputs[0].name not in gone
    assert graph.outputs[0].type.shape[-1] == classes
    kinds: dict[str, Precision] = {
        **dict.fromkeys((graph.inputs[0].name, *quantizable(graph)), "i8"),
        head.name: "f32",
    }
    lowered = lower(graph, kinds)
    assert {"QConv", "Gemm"} <= {n.op for n in lowered.nodes}


@pytest.mark.parametrize(
    ("nodes", "constants", "where"),
    [
        ([node("Relu", "x", "y", "last")], {}, "here it is nothing"),
        ([node("MatMul", "x w", "a", "fc"), node("Neg", "a", "y", "neg")], WEIGHTS, "neg (Neg)"),
        (
            [node("Gemm", "x v", "a", "one"), node("Gemm", "a v", "y", "two")],
            {"v": np.ones((4, 4), np.float32)},
            "two (Gemm)",
        ),
    ],
)
def test_models_without_a_head(
    tmp_path: Path, nodes: list[object], constants: dict[str, np.ndarray], where: str
) -> None:
    path = save(model(nodes, {"x": [1, 4]}, ["y"], constants), tmp_path)
    with pytest.raises(UnsupportedModelError, match="--head needs one output made by") as e:
        import_model(path, ImportOptions(head=5))
    assert where in str(e.value)


def test_planned_run_and_explained(tmp_path: Path, odt: Cli) -> None:
    """The plan remembers the head: the checker, the runtime and explain build it again."""
    net: Graph = nets.cnn(2, 3, 4)
    path = export(net, tmp_path)
    classes = net.outputs[0].type.shape[-1] + 3
    planned = make_plan(Request(path, BOARD, ImportOptions(head=classes), with_baselines=False))
    assert planned.plan.model.head == classes
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(planned.plan.model_dump_json())
    training = rebuild(planned.plan, plan_file)
    assert training.prediction.type.shape[-1] == classes
    runtime = Runtime(planned.plan, training)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(training.sample.type.shape).astype(np.float32)
    labels = np.full(training.sample.type.shape[0], classes - 1, np.int32)
    losses = [float(runtime.train_step(x, labels, 0.1)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert odt("verify", plan_file).code == 0
    ran = odt("explain", plan_file, "fc*")
    assert ran.code == 0, ran.err


def test_command_line(odt: Cli, tmp_path: Path) -> None:
    path = export(nets.cnn(2, 3, 4), tmp_path)
    ran = odt(path, "--ram", "100KB", "--flash", "100KB", "--head", "9", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["model"]["head"] == 9
    ran = odt(path, "--ram", "100KB", "--flash", "100KB", "--json")
    assert "head" not in ran.json["model"]
    assert odt(path, "--ram", "1MB", "--flash", "1MB", "--head", "0").code == 2
