"""If, Loop and Scan whose course is known: written out, and equal to onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from onnx_files import agrees, assert_close, floats, model, node, outputs, save

from odt_plan.ir import onnx_unroll
from odt_plan.ir.errors import UnsupportedModelError
from odt_plan.ir.graph import Graph
from odt_plan.ir.onnx_import import import_model

Array = NDArray[Any]
X = np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)
W = np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3)
TRUE, FALSE = np.array(True), np.array(False)
FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64


def body(
    nodes: Sequence[NodeProto],
    results: str,
    inputs: Mapping[str, int] | None = None,
    constants: Mapping[str, Array] | None = None,
) -> GraphProto:
    """A subgraph; results that are conditions begin with ``go``."""
    kinds = {k: BOOL if k.startswith("go") else FLOAT for k in results.split()}

    def infos(values: Mapping[str, int]) -> list[onnx.ValueInfoProto]:
        shapes = {k: None if t == FLOAT else () for k, t in values.items()}
        return [helper.make_tensor_value_info(k, t, shapes[k]) for k, t in values.items()]

    return helper.make_graph(
        list(nodes),
        "body",
        infos(inputs or {}),
        infos(kinds),
        [numpy_helper.from_array(a, k) for k, a in (constants or {}).items()],
    )


def loop(nodes: Sequence[NodeProto], results: str, carried: str, **constants: Array) -> GraphProto:
    inputs = {"i": INT64, "go": BOOL} | dict.fromkeys(carried.split(), FLOAT)
    return body(nodes, results, inputs, constants)


def same(proto: onnx.ModelProto, folder: Path) -> Graph:
    """Import, compare with onnxruntime, return the graph."""
    return agrees(save(proto, folder))


def if_(condition: str, result: str, then: GraphProto, other: GraphProto) -> NodeProto:
    return node("If", condition, result, then_branch=then, else_branch=other)


# -- If --------------------------------------------------------------------------------------------

THEN = body([node("MatMul", "x w", "a", "product"), node("Relu", "a", "b")], "b", {}, {"w": W})
ELSE = body([node("Neg", "x", "a", "product"), node("Tanh", "a", "b")], "b")


@pytest.mark.parametrize("condition", [TRUE, FALSE])
def test_if_is_the_branch_that_is_taken(condition: Array, tmp_path: Path) -> None:
    nodes = [if_("c", "y", THEN, ELSE)]
    graph = same(model(nodes, {"x": [2, 3]}, ["y"], {"c": condition}), tmp_path)
    first = "MatMul" if condition else "Neg"
    assert [n.op for n in graph.nodes] == [first, "Relu" if condition else "Tanh"]
    assert graph.nodes[0].name == "product"
    assert set(graph.constants) == ({"w"} if condition else set())


def test_condition_that_follows_from_shapes(tmp_path: Path) -> None:
    """PyTorch writes such an If for ``squeeze``."""
    nodes = [
        node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Equal", "n two", "c"),
        if_("c", "y", THEN, ELSE),
    ]  # fmt: skip
    constants = {"zero": np.array(0), "two": np.array(2)}
    graph = same(model(nodes, {"x": [2, 3]}, ["y"], constants), tmp_path)
    assert [n.op for n in graph.nodes] == ["MatMul", "Relu"]


def test_names_that_occur_in_several_scopes(tmp_path: Path) -> None:
    """Values, nodes and constants of branches, of branches in them and of the model."""
    inner = body(
        [node("Mul", "a w", "t", "n"), node("Add", "t u", "b2", "m")], "b2", {}, {"w": W[0]}
    )
    other = body([node("Abs", "a", "t", "n")], "t")
    outer = body([node("Add", "x w", "a", "n"), if_("c", "b", inner, other)], "b", {}, {"w": W[1]})
    proto = model(
        [node("Exp", "x", "u", "n"), if_("c", "t1", outer, ELSE), if_("c", "t2", outer, ELSE),
         node("Sub", "t1 t2", "d", "m"), node("Add", "d u", "a", "k"), node("Mul", "a w", "y")],
        {"x": [2, 3]}, ["y"], {"c": TRUE, "w": W[2]},
    )  # fmt: skip
    proto.graph.node[2].name = proto.graph.node[1].name
    graph = import_model(save(proto, tmp_path))
    u = np.exp(X)
    assert_close(outputs(graph, {"x": X})[0], u * W[2])
    assert len({n.name for n in graph.nodes}) == len(graph.nodes)


def test_branch_that_hands_on_an_outer_value(tmp_path: Path) -> None:
    hand_on = body([node("Identity", "x", "b")], "b")
    nodes = [if_("c", "a", hand_on, ELSE), node("Relu", "a", "y")]
    assert len(same(model(nodes, {"x": [2, 3]}, ["y"], {"c": TRUE}), tmp_path).nodes) == 1


# -- Loop ------------------------------------------------------------------------------------------

#: Keeps going, and x = tanh(x @ w), whose rows it lists.
STEP = [
    node("Identity", "go", "go_on"), node("MatMul", "h w", "p", "product"), node("Tanh", "p", "h1"),
    node("Identity", "h1", "row"),
]  # fmt: skip


@pytest.mark.parametrize("opset", [11, 13, 17])
@pytest.mark.parametrize("where", ["outside", "initializer", "constant"])
def test_loop_has_one_weight(where: str, opset: int, tmp_path: Path) -> None:
    """Wherever the file keeps what all iterations read, it is one parameter."""
    steps, constants = list(STEP), {"n": np.array(3)}
    if where == "constant":
        steps.insert(0, node("Transpose", "v", "w"))
        steps.insert(0, helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(W.T)))
    inside = {"w": W} if where == "initializer" else {}
    nodes = [
        node("Loop", "n - x", "last rows", body=loop(steps, "go_on h1 row", "h", **inside)),
        node("ReduceSum", "rows", "s", axes=[0], keepdims=0)
        if opset < 13
        else node("ReduceSum", "rows zero", "s", keepdims=0),
        node("Add", "s last", "y"),
    ]
    constants |= {"zero": np.array([0])} if opset > 11 else {}
    constants |= {"w": W} if where == "outside" else {}
    proto = model(nodes, {"x": [2, 3]}, ["y"], constants, opset=opset)
    graph = same(proto, tmp_path)
    assert [n.op for n in graph.nodes].count("MatMul") + [n.op for n in graph.nodes].count(
        "Gemm"
    ) == 3
    assert [v.shape for v in graph.constants.values()] == [(3, 3)]


def test_loop_ends_by_its_condition(tmp_path: Path) -> None:
    """A condition on counters that it carries; what it carries beside them are data."""
    steps = [
        node("Add", "k two", "k1"), node("Less", "k1 seven", "go_on"), node("Mul", "h h", "h1"),
        node("Cast", "i", "f", to=FLOAT), node("Add", "f k1", "row"),
    ]  # fmt: skip
    constants = {"k0": np.array(0, np.float32), "two": np.array(2, np.float32)}
    constants |= {"seven": np.array(7, np.float32), "c": TRUE}
    nodes = [
        node("Loop", "- c k0 x", "k last rows", body=loop(steps, "go_on k1 h1 row", "k h")),
        node("ReduceSum", "rows", "s", keepdims=0),
        node("Add", "s last", "t"),
        node("Add", "t k", "y"),
    ]
    graph = same(model(nodes, {"x": [2, 3]}, ["y"], constants), tmp_path)
    assert [n.op for n in graph.nodes].count("Mul") == 4


@pytest.mark.parametrize("trip", ["n", "-"])
def test_loop_that_does_not_run(trip: str, tmp_path: Path) -> None:
    nodes = [
        node("Loop", f"{trip} c x", "last rows", body=loop(STEP, "go_on h1 row", "h", w=W)),
        node("Relu", "last", "y"),
    ]
    constants = {"n": np.array(0), "c": TRUE} if trip == "n" else {"c": FALSE}
    graph = same(model(nodes, {"x": [2, 3]}, ["y"], constants), tmp_path)
    assert [n.op for n in graph.nodes] == ["Relu"]


def test_loops_in_loops(tmp_path: Path) -> None:
    """The inner trip count is the number of the outer iteration; an If tells the first apart."""
    inner = body(
        [node("Identity", "go2", "go3"), node("Add", "q x", "q1")],
        "go3 q1",
        {"i2": INT64, "go2": BOOL, "q": FLOAT},
    )
    steps = [
        node("Identity", "go", "go_on"), node("Loop", "i - h", "t", body=inner),
        node("Equal", "i zero", "first"),
        if_("first", "h1", body([node("Tanh", "t", "b")], "b"), body([node("Neg", "t", "b")], "b")),
    ]  # fmt: skip
    nodes = [node("Loop", "n - x", "y", body=loop(steps, "go_on h1", "h"))]
    constants = {"n": np.array(4), "zero": np.array(0)}
    graph = same(model(nodes, {"x": [2, 3]}, ["y"], constants), tmp_path)
    ops = [n.op for n in graph.nodes]
    assert (ops.count("Tanh"), ops.count("Neg"), ops.count("Add")) == (1, 3, 6)


def test_inner_names_hide_outer_ones(tmp_path: Path) -> None:
    """In the branch, ``a`` is the outer value until the branch has one of its own."""
    branch = body(
        [node("Neg", "a", "t"), node("Exp", "t", "a", "own"), node("Mul", "a t", "b")], "b"
    )
    steps = [
        node("Identity", "go", "go_on"), node("Tanh", "h", "a"),
        if_("c", "h1", branch, body([node("Neg", "a", "b")], "b")),
    ]  # fmt: skip
    nodes = [node("Loop", "n - x", "y", body=loop(steps, "go_on h1", "h"))]
    proto = model(nodes, {"x": [2, 3]}, ["y"], {"n": np.array(2), "c": TRUE})
    want = X
    for _ in range(2):
        t = -np.tanh(want)
        want = np.exp(t) * t
    assert_close(outputs(import_model(save(proto, tmp_path)), {"x": X})[0], want)


# -- Scan ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scan_input_directions": [1], "scan_output_directions": [1, 0]},
        {"scan_input_axes": [1], "scan_output_axes": [1, 0]},
        {"scan_input_axes": [-1], "scan_output_axes": [-1, 0]},
    ],
)
def test_scan(options: dict[str, Any], tmp_path: Path) -> None:
    steps = [
        node("Add", "h part", "t"), node("Tanh", "t", "h1"), node("Mul", "h1 part", "a"),
        node("Exp", "h1", "b"),
    ]  # fmt: skip
    inner = body(steps, "h1 a b", {"h": FLOAT, "part": FLOAT})
    size = 2 if "scan_input_axes" in options else 3
    nodes = [
        node("Scan", "h0 x", "last rows more", body=inner, num_scan_inputs=1, **options),
        node("ReduceSum", "more zero", "s", keepdims=0),
        node("Add", "s last", "t"),
        node("Transpose", "rows", "turned") if size == 2 and options["scan_output_axes"][0] else
        node("Identity", "rows", "turned"),
        node("Mul", "turned t", "y"),
    ]  # fmt: skip
    constants = {"h0": np.ones(size, np.float32), "zero": np.array([0])}
    same(model(nodes, {"x": [2, 3]}, ["y"], constants), tmp_path)


# -- what stays ------------------------------------------------------------------------------------


def refused(proto: onnx.ModelProto, folder: Path) -> str:
    with pytest.raises(UnsupportedModelError) as error:
        import_model(save(proto, folder))
    assert "\n" not in str(error.value)
    return str(error.value)


SUM = [node("ReduceSum", "x", "total", keepdims=0), node("Greater", "total zero", "c")]
ZERO = {"zero": np.array(0, np.float32)}
DATA = (
    "depends on the data of a sample; only one that follows from constants and shapes is supported"
)


def test_what_depends_on_data(tmp_path: Path) -> None:
    steps = loop([*SUM, node("Not", "c", "go_on"), node("Relu", "h", "h1")], "go_on h1", "h")
    cases: dict[str, tuple[list[NodeProto], str]] = {
        "if": ([*SUM, if_("c", "y", THEN, ELSE)], f"If_y (If): its condition c {DATA}"),
        "loop": (
            [node("Loop", "four - x", "y", body=steps)],
            f"Loop_y (Loop): its condition Loop_y/0/go_on {DATA}",
        ),
        "trip count": (
            [
                node("Add", "x x", "n"),
                node("Loop", "n - x", "y", body=loop(STEP, "go_on h1", "h", w=W)),
            ],
            f"Loop_y (Loop): its trip count n {DATA}",
        ),
    }
    for nodes, reason in cases.values():
        proto = model(nodes, {"x": [2, 3]}, ["y"], ZERO | {"four": np.array(4)})
        message = refused(proto, tmp_path)
        assert message.endswith(reason), message


@pytest.mark.parametrize("trips", [10**18, onnx_unroll.MAX_WRITTEN // 3 + 1, None])
def test_loops_that_are_too_long(trips: int | None, tmp_path: Path) -> None:
    """Nothing is written out beyond the limit, also of a loop that never ends."""
    nodes = [
        node(
            "Loop",
            f"{'- ' if trips is None else 'n '}- x",
            "y",
            body=loop(STEP[:3], "go_on h1", "h", w=W),
        )
    ]
    proto = model(nodes, {"x": [2, 3]}, ["y"], {} if trips is None else {"n": np.array(trips)})
    assert "would be more than 4096 nodes" in refused(proto, tmp_path)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({}, "attribute body is missing"),
        (
            {"body": loop(STEP, "go_on h1 row", "h g", w=W)},
            "its body has 4 inputs and 3 results, not 3 and 3",
        ),
        (
            {"body": loop([*STEP, STEP[2]], "go_on h1 row", "h", w=W)},
            "its subgraph computes h1 twice",
        ),
    ],
)
def test_bad_bodies(attributes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    nodes = [node("Loop", "n - x", "y rows", **attributes)]
    assert reason in refused(model(nodes, {"x": [2, 3]}, ["y"], {"n": np.array(2)}), tmp_path)


def test_outer_value_that_does_not_exist(tmp_path: Path) -> None:
    nodes = [if_("c", "y", body([node("Add", "x nowhere", "b")], "b"), ELSE)]
    proto = model(nodes, {"x": [2, 3]}, ["y"], {"c": FALSE})
    assert "If_y (If): reads nowhere, which nothing computes" in refused(proto, tmp_path)


def test_no_iteration_has_no_rows(tmp_path: Path) -> None:
    nodes = [node("Loop", "n - x", "last y", body=loop(STEP, "go_on h1 row", "h", w=W))]
    proto = model(nodes, {"x": [2, 3]}, ["y"], {"n": np.array(0)})
    assert "it runs no iteration, so that y would have no elements" in refused(proto, tmp_path)


@pytest.mark.parametrize("bad", [W.astype(np.float64), np.full(4, np.nan, np.float32)])
def test_constants_of_subgraphs_are_judged(bad: Array, tmp_path: Path) -> None:
    inner = loop(STEP, "go_on h1 row", "h", w=bad)
    proto = model(
        [node("Loop", "n - x", "y rows", body=inner)], {"x": [2, 3]}, ["y"], {"n": np.array(2)}
    )
    with pytest.raises(UnsupportedModelError, match="w"):
        import_model(save(proto, tmp_path))


def test_random_loops(tmp_path: Path) -> None:
    """Chains of random length, with constants and values of random scopes."""
    rng = np.random.default_rng(0)
    ops = ["Add", "Mul", "Sub"]
    for _ in range(20):
        names = ["h", "x", "w"]
        steps = [node("Identity", "go", "go_on")]
        for i in range(int(rng.integers(1, 6))):
            a, b = rng.choice(names, 2)
            steps.append(node(str(rng.choice(ops)), f"{a} {b}", f"v{i}"))
            names.append(f"v{i}")
        steps += [node("Tanh", names[-1], "h1"), node("Identity", str(rng.choice(names)), "row")]
        inner = loop(steps, "go_on h1 row", "h", w=floats(rng, 3))
        nodes = [
            node("Loop", "n - x", "last rows", body=inner),
            node("ReduceSum", "rows zero", "s", keepdims=0),
            node("Add", "s last", "y"),
        ]
        constants = {"n": rng.integers(1, 5), "zero": np.array([0])}
        same(model(nodes, {"x": [2, 3]}, ["y"], constants), tmp_path)
