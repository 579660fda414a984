"""Recurrent cells in a loop, as PyTorch writes them out: all steps train one set of parameters."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import plans
import pytest
import torch
from board import lane
from cli_run import Cli
from onnx_files import Array, agrees, assert_close, floats, model, node, outputs, save
from oracle import Unconstrained
from test_c_backend import needs_gcc, reference, samples
from test_export import exported, learn, planned

from odt_plan.backends.c import emit_c
from odt_plan.backends.numpy import Runtime
from odt_plan.ir.autodiff import build_training
from odt_plan.ir.candidates import param_slots
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.training import TrainingSpec

STEPS, SIZE = 3, 6
RNG = np.random.default_rng(0)


class Unrolled(torch.nn.Module):
    """Classes of the last state of a cell, which begins with zeros."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cell, self.fc = kind(5, SIZE), torch.nn.Linear(SIZE, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = c = torch.zeros(x.shape[0], SIZE)
        for t in range(STEPS):
            if isinstance(self.cell, torch.nn.LSTMCell):
                h, c = self.cell(x[:, t], (h, c))
            else:
                h = self.cell(x[:, t], h)
        return self.fc(h)


def file_of(net: torch.nn.Module, folder: Path, *, dynamo: bool) -> Path:
    """What an exporter writes; that with dynamo folds what the first step makes of the zeros."""
    if dynamo:
        pytest.importorskip("onnxscript")
    path = folder / "cell.onnx"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = (torch.randn(1, STEPS, 5),)
        torch.onnx.export(net, x, str(path), opset_version=18, dynamo=dynamo, verbose=False)
    return path


@pytest.mark.parametrize(
    ("kind", "dynamo"),
    [
        *((torch.nn.RNNCell, False), (torch.nn.LSTMCell, False), (torch.nn.GRUCell, False)),
        *((torch.nn.LSTMCell, True), (torch.nn.GRUCell, True)),
    ],
)
def test_a_step_is_that_of_torch(kind: Any, dynamo: bool, tmp_path: Path) -> None:
    """The bias of the hidden half learns from the first step as well, states are no parameters."""
    torch.manual_seed(0)
    net = Unrolled(kind).eval()
    forward = import_model(file_of(net, tmp_path, dynamo=dynamo))
    x = floats(RNG, 1, STEPS, 5)
    (y,) = outputs(forward, {forward.inputs[0].name: x})
    assert_close(y, net(torch.tensor(x)).detach().numpy())
    assert {k.removesuffix("/bias") for k in param_slots(forward)} == {
        k for k, _ in net.named_parameters()
    }
    training = build_training(forward, TrainingSpec(), plans.whole(forward))
    free = Unconstrained(training)
    free.step(x, np.array([1], np.int32), 0.1)
    torch.nn.functional.cross_entropy(net(torch.tensor(x)), torch.tensor([1])).backward()
    learned = {k.removesuffix("/bias"): a for k, a in free.state.items()}
    for name, p in net.named_parameters():
        assert p.grad is not None
        assert_close(learned[name], (p - 0.1 * p.grad).detach().numpy(), 1e-6)


def cells(folder: Path, *, rows: Array | None = None, **attrs: Any) -> Path:
    """Two steps of h = tanh(U x + V h + b), the first of which has ``rows`` for V h + b."""
    constants = {
        "u": floats(np.random.default_rng(1), 4, 4),
        "v": floats(np.random.default_rng(2), 4, 4),
        "b": np.arange(1, 5, dtype=np.float32) / 8,
    }
    constants["r"] = constants["b"][None] if rows is None else rows
    nodes = [
        node("MatMul", "x u", "ux"),
        node("Add", "ux r", "s1"),
        node("Tanh", "s1", "h1"),
        node("Gemm", "h1 v b", "vh", **attrs),
        node("Add", "ux vh", "s2"),
        node("Tanh", "s2", "y"),
    ]
    return save(model(nodes, {"x": [1, 4]}, ["y"], constants), folder)


def test_what_is_learned_goes_into_the_repeated_bias(odt: Cli, tmp_path: Path) -> None:
    planned(odt, cells(tmp_path, transB=1), "--loss", "mse")
    tuned = exported(odt, learn())
    assert tuned.changed == {"u", "v", "b", "r"}
    assert np.array_equal(tuned.data("r"), tuned.data("b")[None])


@needs_gcc
def test_cells_run_by_a_plan(tmp_path: Path) -> None:
    """A layer of a constant alone, in NumPy and in C."""
    forward = import_model(cells(tmp_path))
    training = build_training(forward, TrainingSpec(loss="mse"), plans.whole(forward))
    plan = plans.keep_all(training)
    planned_, free = Runtime(plan, training), Unconstrained(training)
    for x, y in zip(*samples(training, 3), strict=True):
        assert planned_.train_step(x, y, 0.05) == free.step(x, y, 0.05)
    name = emit_c(plan, training, tmp_path)[0].stem
    program = lane.build_host(tmp_path, name)
    result = lane.run_host(program, lane.training_input(*samples(training, 3), 0.05))
    assert result.exit_code == 0, result.stdout
    assert result.files["output.bin"] == reference(plan, training, 3, 0.05)


def test_other_numbers_stay_a_parameter(tmp_path: Path) -> None:
    rows = np.array([[0.125, 0.25, 0.375, 0.625]], np.float32)  # the last one is another
    forward = agrees(cells(tmp_path, rows=rows))
    assert param_slots(forward).keys() == {"u", "v", "b", "r"}


def test_equal_numbers_may_be_so_by_chance(tmp_path: Path) -> None:
    """Zeros, which biases often begin with."""
    path = cells(tmp_path, rows=np.zeros((1, 4), np.float32))
    proto = onnx.load(path)
    bias = next(t for t in proto.graph.initializer if t.name == "b")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.zeros(4, np.float32), "b"))
    forward = agrees(save(proto, tmp_path))
    assert param_slots(forward).keys() == {"u", "v", "b", "r"}


@pytest.mark.parametrize("number", [0.0, 0.5])
def test_a_gate_beside_numbers_stays(number: float, tmp_path: Path) -> None:
    """Only zeros in the shape of the state are one; a scale of zeros is a parameter."""
    for shape in ((1, 4), (4,)):
        nodes = [
            node("Sigmoid", "x", "f"),
            node("Mul", "f c", "kept"),
            node("Tanh", "x", "new"),
            node("Add", "kept new", "y"),
        ]
        constants = {"c": np.full(shape, number, np.float32)}
        path = save(model(nodes, {"x": [1, 4]}, ["y"], constants), tmp_path)
        gone = number == 0.0 and shape == (1, 4)
        assert [n.op for n in agrees(path).nodes] == (
            ["Tanh"] if gone else ["Sigmoid", "Mul", "Tanh", "Add"]
        )
