"""Rules of elementwise functions and conditions: onnxruntime, onnx's own cases, and training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import plans
import pytest
from nets import functions
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx_files import agrees, floats, model, node, outputs, save
from oracle import Unconstrained, batch

from odt_plan.backends.numpy import Runtime
from odt_plan.ir.autodiff import build_training, candidates, param_slots
from odt_plan.ir.errors import UnsupportedModelError
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.trainability import trainability
from odt_plan.ir.training import Candidate, TrainingSpec
from odt_plan.planner.check import check
from odt_plan.planner.device import load_device

Array = NDArray[Any]
_RNG = np.random.default_rng(5)
F32 = np.float32
CONSTANTS: dict[str, Array] = {
    "half": np.array(0.5, F32),
    "zero": np.array(0.0, F32),
    "ones": np.ones((1, 1), F32),
    "inf": np.array(-np.inf, F32),
    "c": floats(_RNG, 4, 1, 1),
    "d": floats(_RNG, 2, 4, 1, 7),
    "one": np.full((1, 1, 1), 0.3, F32),
    "flags": _RNG.random((5, 7)) < 0.5,
    "wide": _RNG.random((3, 1, 4, 5, 7)) < 0.5,
    "mask": np.where(_RNG.random((5, 7)) < 0.5, 0.0, -np.finfo(F32).max).astype(F32),
    "shape": np.array([3, 2, 1, 5, 1]),
    "i2": np.array(2),
    "p1": np.array(1.0, F32),
    "p3": np.array([3.0], F32),
    "p-2": np.array(-2.0, F32),
    "p.7": np.array(0.7, F32),
    "p-.5": np.array(-0.5, F32),
    "pn": np.array([1.0, 2.0, 0.0, -1.0, 3.0, 0.5, 2.5], F32),
}
POSITIVE = node("Softplus", "x", "a")
#: Numbers from -2 to 2, and infinite ones.
FRACTIONS = [node("Abs", "x", "s"), node("Floor", "s", "z"), node("Div", "x z", "i")]
#: Chains of nodes from x to y, the operators that come out, and the least opset.
CASES: dict[str, tuple[list[onnx.NodeProto], set[str], int]] = {
    "elu": ([node("Elu", "x", "y", alpha=0.7)], {"Elu"}, 8),
    "selu": ([node("Selu", "x", "y")], {"Elu"}, 8),
    "selu attrs": ([node("Selu", "x", "y", alpha=1.5, gamma=2.0)], {"Elu"}, 8),
    "celu": ([node("Celu", "x", "y", alpha=2.5)], {"Elu"}, 12),
    "gelu": ([node("Gelu", "x", "y")], {"GeluErf"}, 20),
    "thresholded": ([node("ThresholdedRelu", "x", "y", alpha=0.4)], {"ThresholdedRelu"}, 10),
    "prelu": ([node("PRelu", "x c", "y")], {"PRelu"}, 9),
    "prelu one": ([node("PRelu", "x one", "y")], {"PRelu"}, 9),
    "square": ([node("Pow", "x i2", "y")], {"Mul"}, 12),
    "rest": ([node("Mod", "x d", "y", fmod=1)], {"Fmod"}, 13),
    "rest of a number": ([node("Mod", "x half", "y", fmod=1)], {"Fmod"}, 13),
    "shrink": ([node("Shrink", "x", "y", lambd=0.7, bias=0.3)], {"Shrink"}, 9),
    **{
        f"infinite {up} {down}": (
            [
                *FRACTIONS,
                node("IsInf", "i", "f", detect_positive=up, detect_negative=down),
                node("Cast", "f", "y", to=1),
            ],
            {"Abs", "Floor", "Div", "Greater", "Where"},
            10,
        )
        for up in (0, 1)
        for down in (0, 1)
    },
    "equals infinity": (
        [
            *FRACTIONS,
            node("Equal", "inf i", "f"),
            node("Cast", "f", "y", to=1),
        ],
        {"Abs", "Floor", "Div", "Greater", "Where"},
        13,
    ),
    "cube": ([node("Pow", "x p3", "y")], {"Pow"}, 9),
    "itself": ([node("Pow", "x p1", "a"), node("Neg", "a", "y")], {"Neg"}, 9),
    "inverse square": ([node("Pow", "x p-2", "y")], {"Pow"}, 9),
    "root": ([POSITIVE, node("Pow", "a half", "y")], {"Softplus", "Sqrt"}, 9),
    "one over root": (
        [POSITIVE, node("Pow", "a p-.5", "y")],
        {"Softplus", "Sqrt", "Reciprocal"},
        9,
    ),
    "real power": ([POSITIVE, node("Pow", "a p.7", "y")], {"Softplus", "Pow"}, 9),
    "powers": ([POSITIVE, node("Pow", "a pn", "y")], {"Softplus", "Pow"}, 9),
    "two powers": ([POSITIVE, node("Pow", "a x", "y")], {"Softplus", "Pow"}, 9),
    "exponential": ([node("Pow", "half x", "y")], {"Pow"}, 9),
    "relu": ([node("Max", "x zero", "y")], {"Relu"}, 8),
    "clip": ([node("Min", "half x", "y")], {"Clip"}, 8),
    "max": ([node("Max", "x c d", "y")], {"Max"}, 8),
    "min": ([node("Min", "x d", "y")], {"Min"}, 8),
    "mean": ([node("Mean", "x c d", "y")], {"Add", "Div"}, 8),
    "mean of one": ([node("Mean", "x", "a"), node("Abs", "a", "y")], {"Abs"}, 8),
    "where constant": ([node("Where", "flags x d", "y")], {"Where"}, 9),
    "where fill": ([node("Where", "flags x inf", "y")], {"Where"}, 9),
    "where wide": ([node("Where", "wide half x", "y")], {"Where"}, 9),
    "where computed": (
        [node("Greater", "x c", "g"), node("Where", "g x d", "y")],
        {"Greater", "Where"},
        9,
    ),
    "where more axes": (
        [node("Greater", "x half", "g"), node("Where", "g zero ones", "y")],
        {"Greater", "Where"},
        9,
    ),
    "less": ([node("Less", "x c", "g"), node("Cast", "g", "y", to=1)], {"Greater", "Where"}, 9),
    "at most": (
        [node("LessOrEqual", "x x", "g"), node("Cast", "g", "y", to=1)],
        {"GreaterOrEqual", "Where"},
        12,
    ),
    "logic": (
        [
            node("Cast", "x", "a", to=9),
            node("Less", "x half", "b"),
            node("Xor", "a b", "e"),
            node("Or", "e flags", "f"),
            node("Not", "f", "g"),
            node("Equal", "g a", "h"),
            node("Cast", "h", "y", to=1),
        ],
        {"Equal", "Greater", "Xor", "Or", "Not", "Where"},
        13,
    ),
    "expand": ([node("Expand", "c shape", "a"), node("Mul", "a x", "y")], {"Mul"}, 8),
    "expand sum": (
        [node("ReduceMean", "x", "m", axes=[3], keepdims=1), node("Expand", "m shape", "y")],
        {"ReduceMean", "Expand"},
        8,
    ),
    "added mask": ([node("Add", "x mask", "y")], {"Where"}, 9),
    "swish": ([node("Sigmoid", "x", "s"), node("Mul", "x s", "y")], {"Swish"}, 8),
    **{
        op.lower(): ([node(op, "x", "y")], {op}, 18)
        for op in (
            "Abs", "Asinh", "Atan", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor", "Mish", "Neg",
            "Reciprocal", "Round", "Sign", "Sin", "Sinh", "Softplus", "Softsign",
        )
    },
    "tangent": ([node("Tan", "x", "y")], {"Sin", "Cos", "Div"}, 8),
    **{
        op.lower(): ([node("Softsign", "x", "a"), node(op, "a", "y")], {"Softsign", op}, 9)
        for op in ("Acos", "Asin", "Atanh")
    },
    "acosh": ([node("Exp", "x", "e"), node("Max", "e p1", "a"), node("Acosh", "a", "y")],
              {"Exp", "Clip", "Acosh"}, 9),
    "log": ([POSITIVE, node("Log", "a", "y")], {"Softplus", "Log"}, 8),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rule_equals_runtime(case: str, tmp_path: Path) -> None:
    nodes, ops, opset = CASES[case]
    used = {i for n in nodes for i in n.input}
    constants = {k: a for k, a in CONSTANTS.items() if k in used}
    shape = [2, 1, 5, 1] if case == "expand sum" else [2, 4, 5, 7]
    graph = agrees(save(model(nodes, {"x": shape}, ["y"], constants, opset=opset), tmp_path))
    assert {n.op for n in graph.nodes} == ops


def test_swish_equals_onnx(tmp_path: Path) -> None:
    """Too new for onnxruntime."""
    x = np.linspace(-5, 5, 24, dtype=F32).reshape(2, 12)
    proto = model([node("Swish", "x", "y", alpha=1.5)], {"x": [2, 12]}, ["y"], opset=24)
    (got,) = outputs(import_model(save(proto, tmp_path)), {"x": x})
    (want,) = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_backend_cases_of_conditions(tmp_path: Path) -> None:
    """Cases of onnx whose operands are boolean, which arrive here as 0 and 1."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the generators of cases of other operators warn
        cases = collect_testcases(None)
    operators, passed = {"And", "Or", "Xor", "Not", "Where"}, set()
    for case in cases:
        graph, (ins, outs) = case.model.graph, case.data_sets[0]
        if graph.node[0].op_type not in operators or len(graph.node) > 1:
            continue
        if len(ins) == 3 and ins[1].dtype != np.float32:
            continue  # choices of integers
        proto = onnx.ModelProto()
        proto.CopyFrom(case.model)
        proto.opset_import[0].version = 18  # some are of 1, where Cast takes text
        flags = [v.name for v, a in zip(graph.input, ins, strict=True) if a.dtype == np.bool_]
        del proto.graph.node[:]
        for name in flags:
            proto.graph.node.append(helper.make_node("Cast", [name], [f"{name}?"], to=9))
        inner = graph.node[0]
        names = [f"{i}?" if i in flags else i for i in inner.input]
        proto.graph.node.append(helper.make_node(inner.op_type, names, inner.output))
        for v in proto.graph.input:
            v.type.tensor_type.elem_type = TensorProto.FLOAT
        feeds = {v.name: a.astype(F32) for v, a in zip(graph.input, ins, strict=True)}
        (got,) = outputs(import_model(save(proto, tmp_path)), feeds)
        assert np.array_equal(got, outs[0].astype(F32)), case.name
        passed.add(inner.op_type)
    assert passed == operators


def test_numbers_beside_products_are_no_parameters(tmp_path: Path) -> None:
    """GELU as exporters write it, an attention's scale, a mask: nothing of them is trained."""
    rng = np.random.default_rng(0)
    nodes = [
        node("MatMul", "x w", "a"),
        node("Mul", "a scale", "b"),
        node("Add", "b mask", "m"),
        node("Div", "m root2", "c"),
        node("Erf", "c", "d"),
        node("Add", "d one", "e"),
        node("Mul", "a e", "f"),
        node("Mul", "f half", "g"),
        node("PRelu", "g slope", "h"),
        node("Mul", "h gains", "y"),
    ]
    constants = {
        "w": floats(rng, 4, 4),
        "scale": np.array(0.125, F32),
        "mask": np.array([0, 0, -3e38, 0], F32),
        "root2": np.array([1.4142135], F32),
        "one": np.array(1, F32),
        "half": np.array([[0.5]], F32),
        "slope": np.array([0.25], F32),
        "gains": floats(rng, 4),
    }
    path = save(model(nodes, {"x": [2, 4]}, ["y"], constants), tmp_path)
    assert set(param_slots(import_model(path))) == {"w", "slope", "gains"}
    layers = {x.name: x.parameters for x in trainability(path).parametric}
    assert layers == {"MatMul_a": 16, "PRelu_h": 1, "Mul_y": 4}


def test_gelu_by_erf_is_found(tmp_path: Path) -> None:
    """Five nodes in two orders become one, which saves its operand alone."""
    c = {"r": np.array(2**0.5, F32), "one": np.array(1, F32), "half": np.array(0.5, F32)}
    head = [node("Div", "x r", "a"), node("Erf", "a", "b"), node("Add", "b one", "c")]
    ends = (
        [node("Mul", "x c", "d"), node("Mul", "d half", "y")],
        [node("Mul", "x half", "d"), node("Mul", "c d", "y")],
    )
    for end in ends:
        graph = agrees(save(model(head + end, {"x": [3, 5]}, ["y"], c), tmp_path))
        assert [n.op for n in graph.nodes] == ["GeluErf"]
    other = {**c, "half": np.array(0.6, F32)}
    graph = agrees(save(model(head + ends[0], {"x": [3, 5]}, ["y"], other), tmp_path))
    assert "Erf" in {n.op for n in graph.nodes}


@pytest.mark.parametrize("op", ["Floor", "Ceil", "Round", "Sign"])
def test_steps_have_no_gradient_and_say_so(op: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    nodes = [
        node("MatMul", "x w", "a", name="first"),
        node(op, "a", "b", name="step"),
        node("MatMul", "b v", "y", name="second"),
    ]
    constants = {"w": floats(rng, 4, 4), "v": floats(rng, 4, 3)}
    path = save(model(nodes, {"x": [1, 4]}, ["y"], constants), tmp_path)
    graph, report = import_model(path), trainability(path)
    assert [x.name for x in report.trainable] == ["second"]
    assert report.advice.startswith("freeze everything before step (--freeze-before step)")
    build_training(graph, TrainingSpec(loss="mse"), [Candidate("v")])
    with pytest.raises(UnsupportedModelError, match=f"node step: {op} has no gradient"):
        build_training(graph, TrainingSpec(loss="mse"), [Candidate("w")])


@pytest.mark.parametrize(
    ("nodes", "constants", "message"),
    [
        ([node("Celu", "x", "y", alpha=0.0)], {}, "alpha is 0"),
        ([node("Elu", "x", "y", alpha=-1.0)], {}, "alpha = -1; only finite numbers >= 0"),
        ([node("Shrink", "x", "y", lambd=-1.0)], {}, "lambd = -1, bias = 0: give finite ones"),
        ([node("PRelu", "x s", "y")], {"s": np.ones((3, 2, 4), F32)}, "does not broadcast to f32"),
        ([node("Expand", "x s", "y")], {"s": np.array([3, 4])}, "does not expand to [3, 4]"),
        ([node("And", "x x", "y")], {}, "operand 0 is f32[2,4], not boolean"),
        ([node("Cast", "x", "y", to=7)], {}, "only casts between float32, bool and integers"),
        ([node("Max", "x s", "y")], {"s": np.ones(3, F32)}, "do not broadcast"),
        ([node("Expand", "x s", "y")], {"s": np.ones(40, np.int64)}, "has 40 dimensions"),
        ([node("Max", "x s", "y")], {"s": np.ones((1,) * 40, F32)}, "has 40 dimensions"),
        ([node("Equal", "x s", "y")], {"s": np.ones((1,) * 40, F32)}, "has 40 dimensions"),
        ([node("MatMul", "x s", "y")], {"s": np.ones((1,) * 38 + (4, 4), F32)}, "38 leading axes"),
        ([node("ReduceMax", "x", "y", keepdims=3)], {}, "keepdims 3 is neither 0 nor 1"),
        ([node("ReduceMean", "x", "y", keepdims=2)], {}, "keepdims 2 is neither 0 nor 1"),
        ([node("ArgMax", "x", "y", keepdims=-1)], {}, "keepdims -1 is neither 0 nor 1"),
    ],
    ids=lambda v: v[0].op_type if isinstance(v, list) else None,
)
def test_refused(
    nodes: list[onnx.NodeProto], constants: dict[str, Array], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError) as e:
        import_model(save(model(nodes, {"x": [2, 4]}, ["y"], constants), tmp_path))
    assert message in str(e.value)


def test_boolean_output_is_ones_and_zeros(tmp_path: Path) -> None:
    proto = model([node("Greater", "x s", "y")], {"x": [2, 3]}, ["y"], {"s": np.zeros(3, F32)})
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.BOOL
    graph = import_model(save(proto, tmp_path))
    x = np.array([[-1, 0, 1], [2, -3, 4]], F32)
    assert outputs(graph, {"x": x})[0].tolist() == [[0, 0, 1], [1, 0, 1]]
    assert graph.outputs[0].name == "y"


@pytest.mark.parametrize("part", [1.0, 0.8])
def test_functions_train_by_a_plan(part: float) -> None:
    """Also in so little RAM that some are computed again: the bits of training without a plan."""
    forward = functions()
    assert "slope" in {c.param for c in candidates(forward)}
    assert {"half", "mask", "power"}.isdisjoint(param_slots(forward))
    training = build_training(forward, TrainingSpec(), plans.whole(forward))
    plan = plans.keep_all(training)
    if part < 1:
        ram = plan.claims.ram_bytes
        limit = ram.total - int((1 - part) * ram.arena)
        plan = plans.squeezed(forward, training, ram_bytes=limit)
        assert any(a.action == "recompute" for a in plan.decisions.activations)
    check(plan, training, load_device(plans.BOARD))
    planned, free = Runtime(plan, training), Unconstrained(training)
    rng = np.random.default_rng(2)
    for _ in range(3):
        x, y = batch(training, rng)
        loss = planned.train_step(x, y, 0.02)
        assert np.isfinite(loss)
        assert loss == free.step(x, y, 0.02)
    for name, value in planned.params().items():
        assert np.array_equal(value, free.state[name]), name
