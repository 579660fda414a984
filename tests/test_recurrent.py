"""LSTM, GRU and RNN against PyTorch and ONNX Runtime, from file to firmware."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
import torch
from board import lane
from cli_run import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx_files import agrees, assert_close, export, floats, model, node, outputs, runtime, save
from op_cases import Array, forward_and_gradients
from test_board import COMPILER, check_prediction, needs_zig, on_board
from test_c_backend import needs_gcc, reference, samples
from torch_recurrent import torch_recurrent

from odt_plan.backends.c import emit_c
from odt_plan.ir.autodiff import build_training
from odt_plan.ir.errors import GraphError, UnsupportedModelError
from odt_plan.ir.graph import Attr, Graph, TensorType
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.trainability import trainability
from odt_plan.ir.training import Candidate, TrainingSpec
from odt_plan.planner.check import check
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request, make_plan

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
sizes = st.integers(1, 5)


# --- gradients ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    op=st.sampled_from(sorted(GATES)),
    steps=sizes,
    batch=st.integers(1, 3),
    size=sizes,
    reverse=st.integers(0, 1),
    variant=st.booleans(),
    bptt=st.none() | st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_gradients_equal_torch(
    op: str,
    steps: int,
    batch: int,
    size: int,
    reverse: int,
    variant: bool,
    bptt: int | None,
    seed: int,
) -> None:
    """Back-propagation through all steps or some, in float64."""
    rng, gates = np.random.default_rng(seed), GATES[op]
    data = [rng.standard_normal((steps, batch, gates * size))]
    data.append(rng.standard_normal((gates * size, size)))
    attrs: dict[str, Attr] = {"reverse": reverse}
    if op == "LSTM":
        attrs["cells"] = 0
    elif op == "RNN":
        attrs["activation"] = "Relu" if variant else "Tanh"
    else:
        attrs["linear_before_reset"] = 1
        data += [rng.standard_normal(size)] * variant
    y, dy, gradients = forward_and_gradients(op, data, attrs, seed, bptt)
    leaves = [torch.tensor(a, requires_grad=True) for a in data]
    graph = Graph(op)
    operands = [graph.add_input(f"x{i}", TensorType(a.shape)) for i, a in enumerate(data)]
    layer = graph.add_node(op, operands, attrs, name="n")
    want = torch_recurrent(layer, *leaves, bptt=bptt)
    want.backward(torch.tensor(dy))
    np.testing.assert_allclose(y, want.detach().numpy(), rtol=1e-11, atol=1e-11)
    assert len(gradients) == len(leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-9, atol=1e-10)


def test_truncated_back_propagation(tmp_path: Path, odt: Cli) -> None:
    """Less work; kept in the plan, which the checker compares; nothing for other models."""
    folder, rng = tmp_path / "out", np.random.default_rng(0)
    path = save(recurrent(rng, "LSTM", results="y", steps=6, layout=1), tmp_path)
    limits = ("--ram", "200KB", "--flash", "1MB", "--train", "all", "--loss", "mse")
    cycles = []
    for more in ((), ("--bptt", "2")):
        done = odt(path, *limits, *more, "-o", folder, "--json")
        assert done.code == 0, done.err
        cycles.append(done.json["claims"]["cycles"])
        assert odt("verify", folder / "plan.json").code == 0
    assert cycles[1] < cycles[0]
    text = (folder / "plan.json").read_text()
    assert '"bptt": 2' in text
    (folder / "plan.json").write_text(text.replace('"bptt": 2', '"bptt": 3'))
    assert odt("verify", folder / "plan.json").code == 1
    other = export(nets.mlp(), tmp_path)
    told = odt(other, "--ram", "64KB", "--flash", "1MB", "--bptt", "2")
    assert told.error == "--bptt: small has no recurrent layer; leave it out"


def test_operands_that_do_not_fit() -> None:
    graph = Graph("bad")
    x, r = (graph.add_input(n, TensorType(s)) for n, s in (("x", (3, 2, 8)), ("r", (8, 2))))
    state = graph.add_input("h", TensorType((2, 2)))
    attrs: dict[str, Attr] = {"reverse": 0, "cells": 0, "linear_before_reset": 0}
    with pytest.raises(GraphError, match=r"node n .*\[8,2\] are not 3 square matrices"):
        graph.add_node("GRU", (x, r), attrs, name="n")
    with pytest.raises(GraphError, match=r"initial state f32\[2,2\] is not \[1, 2, 2\]"):
        graph.add_node("LSTM", (x, r, state), attrs, name="n")
    r6 = graph.add_input("r6", TensorType((6, 2)))
    with pytest.raises(GraphError, match=r"input f32\[3,2,8\] is not \[steps, batch, 6\]"):
        graph.add_node("GRU", (x, r6), attrs, name="n")
    x6, bias = graph.add_input("x6", TensorType((3, 2, 6))), graph.add_input("b", TensorType((2,)))
    with pytest.raises(GraphError, match="a recurrent bias needs linear_before_reset"):
        graph.add_node("GRU", (x6, r6, bias), attrs, name="n")


# --- importing ------------------------------------------------------------------------------------


def recurrent(
    rng: np.random.Generator,
    op: str,
    direction: str = "forward",
    *,
    steps: int = 4,
    batch: int = 1,
    features: int = 3,
    size: int = 2,
    bias: bool = True,
    states: bool = False,
    results: str = "y",
    layout: int = 0,
    **attrs: Any,
) -> onnx.ModelProto:
    """A model of one node; ``results`` as of ``onnx_files.node``."""
    count = 2 if direction == "bidirectional" else 1
    rows = GATES[op] * size
    constants = {"W": floats(rng, count, rows, features), "R": floats(rng, count, rows, size)}
    operands = "x W R"
    if bias:
        constants["B"] = floats(rng, count, 2 * rows)
    operands += " B" if bias else " -"
    if states:
        names = ("h0", "c0")[: 2 if op == "LSTM" else 1]
        shape = (batch, count, size) if layout else (count, batch, size)
        constants |= {n: floats(rng, *shape) for n in names}
        operands += " - " + " ".join(names)
    wanted = [r for r in results.split() if r != "-"]
    layer = onnx.helper.make_node(
        op,
        ["" if i == "-" else i for i in operands.split()],
        ["" if r == "-" else r for r in results.split()],
        name="layer",
        direction=direction,
        hidden_size=size,
        **({"layout": 1} if layout else {}),
        **attrs,
    )
    x = [batch, steps, features] if layout else [steps, batch, features]
    return model([layer], {"x": x}, wanted, constants)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_results_equal_onnxruntime(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """All directions, biases, states and results; operator variants."""
    op = data.draw(st.sampled_from(sorted(GATES)))
    direction = data.draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    all_results = ["y", "y y_h", "- y_h"] + ["y - y_c", "y y_h y_c", "- - y_c"] * (op == "LSTM")
    attrs: dict[str, Any] = {}
    if op == "GRU":
        attrs["linear_before_reset"] = data.draw(st.integers(0, 1))
    if op == "RNN" and data.draw(st.booleans()):
        names = st.sampled_from(["Relu", "Tanh"])
        count = 2 if direction == "bidirectional" else 1
        attrs["activations"] = data.draw(st.lists(names, min_size=count, max_size=count))
    proto = recurrent(
        np.random.default_rng(data.draw(st.integers(0, 2**16))),
        op,
        direction,
        steps=data.draw(sizes),
        batch=data.draw(st.integers(1, 3)),
        features=data.draw(sizes),
        size=data.draw(sizes),
        bias=data.draw(st.booleans()),
        states=data.draw(st.booleans()),
        results=data.draw(st.sampled_from(all_results)),
        **attrs,
    )
    graph = agrees(save(proto, tmp_path_factory.mktemp("model")))
    assert [v.name for v in graph.outputs] == [v.name for v in proto.graph.output]


@pytest.mark.parametrize("direction", ["reverse", "bidirectional"])
@pytest.mark.parametrize("op", sorted(GATES))
def test_batch_first_is_the_other_layout(op: str, direction: str, tmp_path: Path) -> None:
    """Runtimes lack ``layout`` 1; they agree on layout 0 of the transposed operands."""
    results = "y y_h y_c" if op == "LSTM" else "y y_h"
    given: dict[int, onnx.ModelProto] = {}
    for layout in (0, 1):
        given[layout] = recurrent(
            np.random.default_rng(0), op, direction,
            steps=4, batch=2, states=True, results=results, layout=layout,
        )  # fmt: skip
    for t, other in zip(given[1].graph.initializer, given[0].graph.initializer, strict=True):
        a = numpy_helper.to_array(other)
        t.CopyFrom(numpy_helper.from_array(a.swapaxes(0, 1) if "0" in t.name else a, t.name))
    x = floats(np.random.default_rng(1), 4, 2, 3)
    want = runtime(save(given[0], tmp_path), {"x": x})
    graph = import_model(save(given[1], tmp_path), ImportOptions(batch=2))
    got = outputs(graph, {"x": x.swapaxes(0, 1)})
    assert_close(got[0], want[0].transpose(2, 0, 1, 3))
    for g, w in zip(got[1:], want[1:], strict=True):
        assert_close(g, w.swapaxes(0, 1))


def torch_file(layer: torch.nn.Module, x: torch.Tensor, folder: Path) -> Path:
    """What PyTorch writes for a layer."""
    path = folder / "torch.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(layer, (x,), str(path), opset_version=17, dynamo=False)
    return path


class Last(torch.nn.Module):
    """Classes of the last state of a layer."""

    def __init__(self, layer: torch.nn.RNNBase, features: int) -> None:
        super().__init__()
        self.layer, self.fc = layer, torch.nn.Linear(features, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_stacked_layers_of_torch(kind: Any, tmp_path: Path) -> None:
    """Two bidirectional layers, batch first, whose initial states are computed zeros."""
    torch.manual_seed(0)
    net = Last(kind(5, 6, num_layers=2, bidirectional=True, batch_first=True), 12).eval()
    x = torch.randn(2, 7, 5)
    graph = import_model(torch_file(net, x, tmp_path), ImportOptions(batch=2))
    (y,) = outputs(graph, {graph.inputs[0].name: x.numpy()})
    assert_close(y, net(x).detach().numpy())
    assert sum(n.op == kind.__name__ for n in graph.nodes) == 4
    assert build_training(graph, TrainingSpec(), [Candidate(n) for n in graph.constants]).updates


def stateful(*, also: bool = False, steps: int = 4) -> onnx.ModelProto:
    """An LSTM whose states come in and go out, stacked as one input each."""
    rng = np.random.default_rng(0)
    proto = recurrent(rng, "LSTM", results="y y_h y_c", steps=steps)
    layer = proto.graph.node[0]
    layer.input.extend(["", "h1", "c1"])
    nodes = [node("Slice", f"{s} zero one", f"{s}1") for s in "hc"]
    nodes += [layer, node("Squeeze", "y axis", "s"), node("Identity", "y_h", "h_out")]
    nodes += [node("Add", "s h1" if also else "s s", "z")]
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    ints = {k: np.array([v], np.int64) for k, v in (("zero", 0), ("one", 1), ("axis", 1))}
    batch = 1 if also else "N"
    inputs = {"x": [steps, 1, 3], "h": [2, batch, 2], "c": [2, batch, 2]}
    return model(nodes, inputs, ["z", "h_out", "y_c"], weights | ints)


def test_states_as_inputs_are_bound_to_zero(tmp_path: Path) -> None:
    path = save(stateful(), tmp_path)
    graph = import_model(path)
    assert [v.name for v in graph.inputs] == ["x"]
    assert [v.name for v in graph.outputs] == ["z"]
    note = "initial states h, c are bound to zero, last states h_out, y_c are left out"
    assert graph.notes == trainability(path).notes == (note,)
    assert not trainability(path).obstacles
    x, zero = floats(np.random.default_rng(1), 4, 1, 3), np.zeros((2, 1, 2), np.float32)
    want = runtime(path, {"x": x, "h": zero, "c": zero})
    assert_close(outputs(graph, {"x": x})[0], want[0])


def test_bound_states_are_told(odt: Cli, tmp_path: Path) -> None:
    path = save(stateful(steps=1), tmp_path)
    told = "initial states h, c are bound to zero, last states h_out, y_c are left out"
    assert f"note: {told}" in odt("check", path).out
    assert odt("check", path, "--json").json["notes"] == [told]
    assert told in odt(path, "--ram", "100KB", "--flash", "1MB", "--loss", "mse").out


def test_steps_are_not_taken_for_samples(odt: Cli, tmp_path: Path) -> None:
    done = odt(save(stateful(), tmp_path), "--ram", "100KB", "--flash", "1MB", "--loss", "mse")
    assert done.code == UnsupportedModelError.exit_code
    assert "first axis of the input x, f32[4,1,3], is not a batch of 1; use --batch 4" in done.error


def test_states_that_are_read_otherwise_stay_inputs(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="initial_h, h1, is computed; only constant"):
        import_model(save(stateful(also=True), tmp_path))


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        ("LSTM", {"clip": 3.0}, "clip"),
        ("LSTM", {"input_forget": 1}, "input_forget"),
        ("LSTM", {"activations": ["Sigmoid", "Relu", "Tanh"]}, "Sigmoid, Tanh, Tanh are supported"),
        ("RNN", {"activations": ["Softsign"]}, "Softsign; Tanh or Relu are supported"),
        ("GRU", {"activations": ["Sigmoid"]}, "do not fit"),
        ("GRU", {"hidden_size": 3}, "do not fit the input"),
        ("GRU", {"direction": "sideways"}, "direction sideways is not known"),
    ],
)
def test_what_is_not_supported(
    op: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    proto = recurrent(np.random.default_rng(0), op)
    layer = proto.graph.node[0]
    kept = [a for a in layer.attribute if a.name not in changed]
    del layer.attribute[:]
    layer.attribute.extend(kept)
    layer.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in changed.items())
    with pytest.raises(UnsupportedModelError, match=message):
        import_model(save(proto, tmp_path))


@pytest.mark.parametrize(
    ("operand", "data", "message"),
    [
        (4, np.array([3], np.int32), r"sequence_lens \[3\] differ from the length 4"),
        (5, np.ones((1, 2, 2), np.float32), r"initial_h, extra, of \[1, 2, 2\] does not fit"),
        (7, np.ones((1, 6), np.float32), "peepholes"),
        (3, np.ones((1, 3), np.float32), r"the bias B \[1, 3\] does not fit"),
    ],
)
def test_operands_that_are_refused(operand: int, data: Array, message: str, tmp_path: Path) -> None:
    proto = recurrent(np.random.default_rng(0), "LSTM", bias=False)
    layer = proto.graph.node[0]
    layer.input.extend([""] * (operand + 1 - len(layer.input)))
    layer.input[operand] = "extra"
    proto.graph.initializer.append(numpy_helper.from_array(data, "extra"))
    with pytest.raises(UnsupportedModelError, match=message):
        import_model(save(proto, tmp_path))


def test_operands_that_change_nothing(tmp_path: Path) -> None:
    """Lengths that are the whole one, peepholes and states of zeros."""
    proto = recurrent(np.random.default_rng(0), "LSTM")
    zeros = {"lens": np.array([4], np.int32), "h": np.zeros((1, 1, 2)), "P": np.zeros((1, 6))}
    for k, a in zeros.items():
        a = a if k == "lens" else a.astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(a, k))
    proto.graph.node[0].input.extend(["lens", "h", "h", "P"])
    graph = agrees(save(proto, tmp_path))
    (layer,) = (n for n in graph.nodes if n.op == "LSTM")
    assert len(layer.inputs) == 2


def test_computed_weights_are_refused(tmp_path: Path) -> None:
    proto = recurrent(np.random.default_rng(0), "RNN")
    layer = proto.graph.node[0]
    layer.input[1] = "w"
    nodes = [node("Slice", "x zero one", "first"), node("Mul", "first W", "w"), layer]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    for k, v in (("zero", 0), ("one", 1)):
        proto.graph.initializer.append(numpy_helper.from_array(np.array([v], np.int64), k))
    with pytest.raises(UnsupportedModelError, match="W, w, is not constant"):
        import_model(save(proto, tmp_path))


# --- a pretrained model ---------------------------------------------------------------------------


@needs_gcc
def test_pretrained_lstm_under_a_budget(shared: Path, tmp_path: Path) -> None:
    """A part of the input weights is trained, all recurrent ones; C gives the bits of NumPy."""
    device = load_device("stm32f746g-disco")
    file = shared / "models" / "tflm_mnist_lstm.onnx"
    done = make_plan(Request(file, device, ram_bytes=40_000, with_baselines=False))
    plan, training = done.plan, done.training
    parts = {u.candidate.param: u.candidate.channels for u in training.updates}
    assert parts["W"] is not None
    assert parts["R"] is None
    assert plan.claims.ram_bytes.total <= 40_000
    assert plan.claims.cycles == check(plan, training, device).cycles
    name = emit_c(plan, training, tmp_path)[0].stem
    program = lane.build_host(tmp_path, name)
    result = lane.run_host(program, lane.training_input(*samples(training, 3), 0.05))
    assert result.exit_code == 0, result.stdout
    assert result.value("selftest_exact") == 1
    assert result.files["output.bin"] == reference(plan, training, 3, 0.05)


@needs_zig
def test_pretrained_lstm_on_the_board(shared: Path, tmp_path: Path) -> None:
    device = load_device("stm32f746g-disco")
    file = shared / "models" / "tflm_mnist_lstm.onnx"
    done = make_plan(Request(file, device, train=("all",), with_baselines=False))
    names = {u.candidate.param for u in done.training.updates}
    assert names == {"W", "R", "B", "fc_w", "fc_b"}
    case = (done.plan, done.training)
    _, result = on_board(case, tmp_path, compiler=COMPILER, limits=lane.Limits.of(device))
    check_prediction(case, result, COMPILER)
