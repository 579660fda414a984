"""onnx's own conformance cases through our back end: what is supported is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from conformance import Case, folder_cases, judge, node_cases
from onnx import TensorProto, helper
from onnx_files import model, node

from odt_plan.backends.onnx_backend import OdtPlanBackend, OdtPlanRep
from odt_plan.ir.errors import UnsupportedModelError, UsageError
from odt_plan.ir.graph import Graph
from odt_plan.ir.onnx_index import CONSTANT_ONLY
from odt_plan.ir.onnx_ops import RULES
from odt_plan.ir.onnx_support import supported
from odt_plan.ir.onnx_unroll import CONTROL_FLOW, DEFINED

#: Cases that pass, at least; more operators let more pass.
NODE_CASES, FOLDER_CASES = 1095, 116
#: Cases that pass in part: the first result of several, or float32 where the case has double.
PARTLY = 69
#: These need no case that passes: they are refused unless their operands are constant, or onnx
#: has no case of them.
WITHOUT_CASE = {*CONSTANT_ONLY, "GlobalLpPool"}
#: What rules write beside the operator itself: views, moved axes, annotations, 1 and 0 of
#: conditions that a model returns.
BESIDE = {"Reshape", "Transpose", "Dequantize", "Where"}
#: What only some operators need beside it, or become in some of their forms.
BESIDE_SOME = {
    "BatchNormalization": {"BatchMean", "BatchNormTraining", "BatchVariance", "RunningAverage"},
    "Clip": {"Relu"},
    "GRU": {"Concat", "Gemm", "Slice"},
    "Gelu": {"GeluErf"},
    "Gemm": {"Add", "Mul"},
    "LSTM": {"Concat", "Gemm", "Slice"},
    "LpNormalization": {"Abs", "Clip", "Div", "Mul", "ReduceMean"},
    "RNN": {"Concat", "Gemm", "Slice"},
    "Where": {"ToReal"},
}
#: Cases of optimizers, by ours.
TRAINING = {
    *("test_adagrad", "test_adagrad_multiple", "test_adam", "test_adam_multiple"),
    *("test_momentum", "test_momentum_multiple", "test_nesterov_momentum"),
}


def test_node_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """No case gives a wrong result; every operator that we support has one that passes.

    And each becomes what the table of operators says.
    """
    written: dict[str, set[str]] = {}

    def imported(rep: OdtPlanRep, feeds: Mapping[str, Any]) -> Graph:
        graph = import_for(rep, feeds)
        ops = {n.op_type for n in rep._model.graph.node}
        if len(ops) == 1:
            flags = tuple(f"{v.name}/flags" for v in graph.inputs)  # made of inputs of bool
            made = (n for n in graph.nodes if not n.name.startswith(flags))
            written.setdefault(*ops, set()).update(n.op for n in made)
        return graph

    import_for = OdtPlanRep._imported
    monkeypatch.setattr(OdtPlanRep, "_imported", imported)
    outcome = judge(node_cases())
    print(outcome)
    assert not outcome.failed
    assert len(outcome.passed) >= NODE_CASES
    partly = len(outcome.first_result) + len(outcome.as_float32)
    assert len(outcome.passed) + partly >= NODE_CASES + PARTLY
    assert set(outcome.passed) >= TRAINING
    assert {*RULES, *DEFINED} - outcome.operators() <= WITHOUT_CASE
    for row in (r for r in supported() if r.operator not in (*CONTROL_FLOW, *DEFINED)):
        extra = written.get(row.operator, set()) - {row.operator, *row.written_as, *BESIDE}
        assert not extra - BESIDE_SOME.get(row.operator, set()), row
    assert all(": " in reason for reason in outcome.skipped.values())  # what, and why


def test_folder_cases() -> None:
    """Models that PyTorch exported, most at opset 6, and others of several nodes."""
    outcome = judge(folder_cases())
    print(outcome)
    assert not outcome.failed
    assert len(outcome.passed) >= FOLDER_CASES


def test_wrong_results_are_seen() -> None:
    """The judge tells a wrong value, shape and element type from a right one."""
    proto = model([node("Relu", "x", "y")], {"x": [2, 2]}, ["y"])
    x = np.array([[-1, 2], [3, -4]], np.float32)
    right = np.maximum(x, 0)
    wrong = {
        "value": right + np.float32(1e-3),
        "shape": right.reshape(-1),
        "dtype": right.astype(np.float64),
    }
    cases = [Case(k, proto, [([x], [y])]) for k, y in {"right": right, **wrong}.items()]
    outcome = judge(iter(cases))
    assert set(outcome.passed) == {"right"}
    assert set(outcome.failed) == set(wrong)
    other = model([node("Det", "x", "y")], {"x": [2, 2]}, ["y"])
    outcome = judge(iter([Case("det", other, [([x], [x])])]))
    assert outcome.skipped == {"det": "Det: the operator is not supported"}
    assert "1 skipped: Det: the operator is not supported" in str(outcome)


# -- the back end ----------------------------------------------------------------------------------


def test_inputs_that_must_be_constants_are_bound() -> None:
    """Operands are inputs of the model; shapes are those of the arrays."""
    proto = model(
        [node("Clip", "x low high", "a"), node("Add", "a a", "y")],
        {"x": ["n", "m"], "low": [], "high": []},
        ["y"],
    )
    rep = OdtPlanBackend.prepare(proto)
    for shape in ((2, 3), (1, 5)):
        x = np.linspace(-3, 3, shape[0] * shape[1], dtype=np.float32).reshape(shape)
        low, high = np.float32(-1), np.float32(2)
        (y,) = rep.run([x, low, high])
        assert np.array_equal(y, 2 * np.clip(x, low, high))
    assert not proto.graph.initializer


def test_results_are_named() -> None:
    proto = model([node("Relu", "x", "a"), node("Tanh", "x", "b")], {"x": [3]}, ["a", "b"])
    x = np.array([-1, 0, 1], np.float32)
    result: Any = OdtPlanBackend.run_model(proto, [x])
    assert np.array_equal(result["a"], np.maximum(x, 0))
    assert np.allclose(result["b"], np.tanh(x))


def test_run_node() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    (y,) = OdtPlanBackend.run_node(node("Transpose", "x", "y"), [x])
    assert np.array_equal(y, x.T)
    squeeze = node("Squeeze", "x", "y", axes=[0])
    (y,) = OdtPlanBackend.run_node(squeeze, [x[:1]], opset_version=11)
    assert np.array_equal(y, x[0])


def test_eight_bit_results_are_those_of_the_file() -> None:
    """uint8 in and out, with the file's zero points."""
    graph = helper.make_graph(
        [
            node("DequantizeLinear", "x s z", "a"),
            node("Relu", "a", "b"),
            node("QuantizeLinear", "b s z", "y"),
        ],
        "bytes",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [5])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [5])],
        [
            onnx.numpy_helper.from_array(np.array(0.5, np.float32), "s"),
            onnx.numpy_helper.from_array(np.array(100, np.uint8), "z"),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    (y,) = OdtPlanBackend.run_model(proto, [np.array([0, 99, 100, 101, 255], np.uint8)])
    assert y.dtype == np.uint8
    assert y.tolist() == [100, 100, 100, 101, 255]


def test_what_can_not_be_run() -> None:
    proto = model([node("Relu", "x", "y")], {"x": [3, 2]}, ["y"])
    with pytest.raises(UsageError, match="only CPU"):
        OdtPlanBackend.prepare(proto, "CUDA")
    rep = OdtPlanBackend.prepare(proto)
    with pytest.raises(UsageError, match=r"small: 0 inputs; it has 1"):
        rep.run([])
    with pytest.raises(UsageError, match=r"x is \[3, 4\], not \[3, 2\]"):
        rep.run([np.zeros((3, 4), np.float32)])
    with pytest.raises(UnsupportedModelError, match="is double"):
        OdtPlanBackend.run_model(
            model([node("Relu", "x", "y")], {"x": [3]}, ["y"], dtype=TensorProto.DOUBLE),
            [np.zeros(3)],
        )
