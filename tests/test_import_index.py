"""Import of operators with indices, reductions, Einsum: against PyTorch and onnxruntime."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_files import Array, agrees, floats, model, node, outputs, runtime, save

from odt_plan.ir.candidates import param_slots
from odt_plan.ir.errors import UnsupportedModelError, UsageError
from odt_plan.ir.grad_builder import GradBuilder
from odt_plan.ir.graph import Graph
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.opdef import get_op

torch = pytest.importorskip("torch")

#: One folder for all examples: each writes over the file of the one before.
FAST = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def imported(
    folder: Path, op: str, x: tuple[int, ...], *constants: Array, opset: int = 18, **attrs: Any
) -> Graph:
    """One node whose first operand is the input, the others constants."""
    names = [f"c{i}" for i in range(len(constants))]
    nodes = [node(op, " ".join(["x", *names]), "y", **attrs)]
    data = dict(zip(names, constants, strict=True))
    proto = model(nodes, {"x": x}, ["y"], data, opset=opset)
    if op.startswith("Arg"):
        proto.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    return import_model(save(proto, folder))


def gradient(graph: Graph, dy: Array, feeds: dict[str, Array], of: str) -> Array:
    """What the rules make of the gradient of the result: that of an input or constant, in f64."""
    (y,) = graph.outputs
    grads = {y: graph.add_input("dy", y.type)}
    for n in reversed(list(graph.nodes)):
        if n.out not in grads:
            continue
        need = [v is not None and v.type.dtype == "f32" for v in n.inputs]
        vjp = get_op(n.op).vjp
        assert vjp is not None, n.op
        builder = GradBuilder(graph, n, {})
        for v, d in zip(n.inputs, vjp(builder, n, grads[n.out], need), strict=True):
            if v is not None and d is not None:
                old = grads.get(v)
                grads[v] = d if old is None else builder.add("Add", (old, d), suffix="sum")
    graph.verify()
    wide = {k: c.astype(np.float64) for k, c in graph.constants.items() if c.dtype == np.float32}
    return run(graph, {**wide, **feeds, "dy": dy})[grads[graph.values[of]].name]


def equals_torch(graph: Graph, data: Array, function: Any) -> None:
    """Result and gradient, in float64."""
    leaf = torch.tensor(data, requires_grad=True)
    want = function(leaf)
    (y,) = graph.outputs
    got = run(graph, {"x": data})[y.name]
    assert got.shape == tuple(want.shape)
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-10, atol=1e-12)
    dy = np.random.default_rng(5).uniform(-1, 1, got.shape)
    want.backward(torch.tensor(dy))
    np.testing.assert_allclose(
        gradient(graph, dy, {"x": data}, "x"), leaf.grad.numpy(), rtol=1e-8, atol=1e-10
    )


SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)

REDUCTIONS: dict[str, Any] = {
    "ReduceL1": lambda x, a, k: x.abs().sum(a, k),
    "ReduceL2": lambda x, a, k: x.square().sum(a, k).sqrt(),
    "ReduceLogSum": lambda x, a, k: x.sum(a, k).log(),
    "ReduceLogSumExp": lambda x, a, k: torch.logsumexp(x, a, k),
    "ReduceMax": lambda x, a, k: torch.amax(x, a, k),
    "ReduceMean": lambda x, a, k: x.mean(a, k),
    "ReduceMin": lambda x, a, k: torch.amin(x, a, k),
    "ReduceSum": lambda x, a, k: x.sum(a, k),
    "ReduceSumSquare": lambda x, a, k: x.square().sum(a, k),
}


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reductions(op: str, tmp_path: Path) -> None:
    """Any axes, kept or not, as an attribute and as an operand."""

    @FAST
    @given(SHAPES, st.data())
    def check(shape: tuple[int, ...], data: st.DataObject) -> None:
        axes = data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1).map(sorted))
        signed = [a - len(shape) if data.draw(st.booleans()) else a for a in axes]
        keep = data.draw(st.booleans())
        old = data.draw(st.booleans())
        graph = (
            imported(tmp_path, op, shape, opset=11, axes=signed, keepdims=int(keep))
            if old
            else imported(tmp_path, op, shape, np.array(signed), keepdims=int(keep))
        )
        x = np.random.default_rng(1).standard_normal(shape)
        x = np.abs(x) + 0.1 if op == "ReduceLogSum" else x
        equals_torch(graph, x, lambda t: REDUCTIONS[op](t, tuple(axes), keep))

    check()


def test_products_beside_zeros(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 5))
    x[1, 2] = x[2, 0] = x[2, 4] = 0.0
    graph = imported(tmp_path, "ReduceProd", x.shape, np.array([1]))
    equals_torch(graph, x, lambda t: t.prod(1, True))


@pytest.mark.parametrize("p", [1, 2, 4])
def test_pool_of_powers(p: int, tmp_path: Path) -> None:
    """Result and gradient are PyTorch's, but where its root of 0 has the slope NaN: 0 here."""
    attrs = {"kernel_shape": [2, 2], "strides": [2, 2]}
    graph = imported(tmp_path, "LpPool", (1, 2, 4, 6), p=p, **attrs)
    x = np.random.default_rng(0).uniform(0.1, 1, (1, 2, 4, 6))
    equals_torch(graph, x, lambda t: torch.nn.functional.lp_pool2d(t, p, 2))
    graph = imported(tmp_path, "LpPool", (1, 2, 4, 6), p=p, **attrs)
    x[:, :, :2, :2] = 0
    dx = gradient(graph, np.ones((1, 2, 2, 3)), {"x": x}, "x")
    assert np.isfinite(dx).all()
    assert p == 1 or (dx[:, :, :2, :2] == 0).all()


def test_extremes_of_equal_numbers(tmp_path: Path) -> None:
    """The first one gets the gradient, the positions are the first or the last."""
    x = np.array([[1.0, 3.0, 3.0, -1.0, -1.0]])
    for op, at in (("ReduceMax", 1), ("ReduceMin", 3)):
        graph = imported(tmp_path, op, x.shape, np.array([1]), keepdims=0)
        got = gradient(graph, np.array([2.0]), {"x": x}, "x")
        assert got.tolist() == [[2.0 if i == at else 0.0 for i in range(5)]]
    for op, first, last in (("ArgMax", 1, 2), ("ArgMin", 3, 4)):
        for flag, at in ((0, first), (1, last)):
            graph = imported(tmp_path, op, x.shape, axis=1, select_last_index=flag)
            (got,) = outputs(graph, {"x": x.astype(np.float32)})
            assert got.dtype == np.int32
            assert got.tolist() == [[at]]


@FAST
@given(SHAPES, st.data())
def test_moves(tmp_path: Path, shape: tuple[int, ...], data: st.DataObject) -> None:
    """Tile, CumSum, Trilu, LogSoftmax on random shapes."""
    rank = len(shape)
    x = np.random.default_rng(2).standard_normal(shape)
    repeats = np.array(data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank)))
    if sum(repeats > 1) < 3:
        graph = imported(tmp_path, "Tile", shape, repeats)
        equals_torch(graph, x, lambda t: t.repeat(*repeats.tolist()))
    axis = data.draw(st.integers(-rank, rank - 1))
    graph = imported(tmp_path, "LogSoftmax", shape, axis=axis)
    equals_torch(graph, x, lambda t: torch.log_softmax(t, axis))
    graph = imported(tmp_path, "CumSum", shape, np.array(axis), reverse=1)
    equals_torch(graph, x, lambda t: t.flip(axis).cumsum(axis).flip(axis))
    if rank > 1:
        k, upper = data.draw(st.integers(-5, 5)), data.draw(st.booleans())
        graph = imported(tmp_path, "Trilu", shape, np.array(k), upper=int(upper))
        equals_torch(graph, x, lambda t: torch.triu(t, k) if upper else torch.tril(t, k))


@FAST
@given(SHAPES, st.data())
def test_gathers(tmp_path: Path, shape: tuple[int, ...], data: st.DataObject) -> None:
    """Gather, GatherElements, GatherND and Scatter with constant indices."""
    rank = len(shape)
    axis = data.draw(st.integers(0, rank - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = rng.standard_normal(shape)
    size = shape[axis]
    index = rng.integers(-size, size, data.draw(st.sampled_from([(), (3,), (2, 4)])))
    at = torch.tensor(index % size)
    graph = imported(tmp_path, "Gather", shape, index, axis=axis)
    equals_torch(
        graph,
        x,
        lambda t: t.index_select(axis, at.reshape(-1)).reshape(
            (*shape[:axis], *index.shape, *shape[axis + 1 :])
        ),
    )
    few = tuple(n if i == axis else int(rng.integers(1, n + 1)) for i, n in enumerate(shape))
    index = rng.integers(-size, size, few)
    graph = imported(tmp_path, "GatherElements", shape, index, axis=axis)
    equals_torch(graph, x, lambda t: t.gather(axis, torch.tensor(index % size)))
    new = rng.standard_normal(few)
    graph = imported(
        tmp_path, "ScatterElements", shape, index, new.astype("f4"), axis=axis, reduction="add"
    )
    new = new.astype("f4").astype("f8")
    equals_torch(
        graph, x, lambda t: t.scatter_add(axis, torch.tensor(index % size), torch.tensor(new))
    )
    length = axis + 1
    index = np.stack([rng.integers(-n, n, (2, 3)) for n in shape[:length]], -1)
    cut = tuple(torch.tensor(index[..., i] % shape[i]) for i in range(length))
    graph = imported(tmp_path, "GatherND", shape, index)
    equals_torch(graph, x, lambda t: t[cut])


def _computed(folder: Path, shape: tuple[int, ...], few: tuple[int, ...], axis: int) -> Graph:
    """GatherElements whose indices are an input."""
    proto = model([node("GatherElements", "x i", "y", axis=axis)], {"x": shape}, ["y"])
    proto.graph.input.append(helper.make_tensor_value_info("i", TensorProto.INT64, few))
    return import_model(save(proto, folder))


@FAST
@given(SHAPES, st.data())
def test_gathers_by_computed_indices(
    tmp_path: Path, shape: tuple[int, ...], data: st.DataObject
) -> None:
    """Entries may be taken twice, and other axes need not be taken whole."""
    axis = data.draw(st.integers(0, len(shape) - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    few = tuple(3 if i == axis else int(rng.integers(1, n + 1)) for i, n in enumerate(shape))
    size = shape[axis]
    index = rng.integers(-size, size, few, np.int32)
    graph = _computed(tmp_path, shape, few, axis)
    leaf = torch.tensor(rng.standard_normal(shape), requires_grad=True)
    want = leaf.gather(axis, torch.tensor(index % size, dtype=torch.int64))
    dy = rng.uniform(-1, 1, few)
    want.backward(torch.tensor(dy))
    feeds = {"x": leaf.detach().numpy(), "i": index}
    assert np.array_equal(run(graph, feeds)[graph.outputs[0].name], want.detach().numpy())
    np.testing.assert_allclose(gradient(graph, dy, feeds, "x"), leaf.grad.numpy(), rtol=1e-12)


def test_indices_outside_of_lanes(tmp_path: Path) -> None:
    graph = _computed(tmp_path, (2, 3), (2, 1), 1)
    feeds = {"x": np.zeros((2, 3), np.float32), "i": np.array([[1], [3]], np.int32)}
    with pytest.raises(UsageError, match=r"index 3 at position 1 is not in -3..2"):
        run(graph, feeds)
    with pytest.raises(UnsupportedModelError, match=r"indices i32\[3,1\] do not fit f32\[2,3\]"):
        _computed(tmp_path, (2, 3), (3, 1), 1)


@FAST
@given(SHAPES, st.data())
def test_largest_entries(tmp_path: Path, shape: tuple[int, ...], data: st.DataObject) -> None:
    """Values of TopK have the gradient of PyTorch's; so have those of positions moved on."""
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    k = data.draw(st.integers(1, shape[axis]))
    largest = data.draw(st.booleans())
    x = np.random.default_rng(0).permutation(int(np.prod(shape))).reshape(shape) / 7.0
    attrs = {"axis": axis, "largest": int(largest)}
    nodes = [node("TopK", "x k", "y i", **attrs)]
    proto = model(nodes, {"x": shape}, ["y"], {"k": np.array([k])})
    equals_torch(
        import_model(save(proto, tmp_path)), x, lambda t: t.topk(k, axis, largest=largest)[0]
    )
    nodes = [
        node("TopK", "x k", "v i", **attrs),
        node("GatherElements", "x i", "e", axis=axis),
        node("Mul", "v half", "h"),
        node("Add", "h e", "y"),
    ]
    constants = {"k": np.array([k]), "half": np.array(0.5, np.float32)}
    proto = model(nodes, {"x": shape}, ["y"], constants)
    equals_torch(
        import_model(save(proto, tmp_path)), x, lambda t: 1.5 * t.topk(k, axis, largest=largest)[0]
    )


@pytest.mark.parametrize("opset", [9, 10, 11])
def test_largest_entries_equal_runtime(opset: int, tmp_path: Path) -> None:
    """Equal entries in their order; the indices are an output."""
    x = np.array([[2, 5, 5, 1, 5, 0], [1, 1, 1, 1, 1, 1]], np.float32)
    top = node("TopK", "x", "y i", k=4) if opset < 10 else node("TopK", "x k", "y i")
    proto = model([top], {"x": [2, 6]}, ["y", "i"], {"k": np.array([4])}, opset=opset)
    proto.graph.output[1].type.tensor_type.elem_type = TensorProto.INT64
    path = save(proto, tmp_path)
    got = outputs(import_model(path), {"x": x})
    for g, w in zip(got, runtime(path, {"x": x}), strict=True):
        assert np.array_equal(g, w)


def test_scatter_replaces(tmp_path: Path) -> None:
    """ScatterND without reduction: replaced rows get no gradient, their replacements all of it."""
    index = np.array([[2], [0]])
    new = floats(np.random.default_rng(1), 2, 3)
    graph = imported(tmp_path, "ScatterND", (4, 3), index, new)
    x = np.random.default_rng(0).standard_normal((4, 3))

    def replaced(t: Any) -> Any:
        t = t.clone()
        t[[2, 0]] = torch.tensor(new.astype("f8"))
        return t

    equals_torch(graph, x, replaced)
    graph = imported(tmp_path, "ScatterND", (4, 3), index, new)
    dy = np.arange(12.0).reshape(4, 3)
    assert np.array_equal(gradient(graph, dy, {"x": x}, "c1"), dy[[2, 0]])


def test_split(tmp_path: Path) -> None:
    """Every form of every opset; results that nobody reads, and one that is the whole."""
    rng = np.random.default_rng(0)
    constants = {"s": np.array([1, 4, 2]), "w": floats(rng, 7), "zero": np.array([7, 0])}
    for opset in (8, 11, 13, 17, 18, 21):
        uneven = (
            node("Split", "x", "a b c", axis=-1, split=[1, 4, 2])
            if opset < 13
            else node("Split", "x s", "a b c", axis=-1)
        )
        nodes = [uneven, node("Concat", "c a", "y", axis=2)]
        graph = agrees(
            save(model(nodes, {"x": [1, 6, 7]}, ["y"], constants, opset=opset), tmp_path)
        )
        assert [n.op for n in graph.nodes] == ["Slice", "Slice", "Concat"]
        halves = {"num_outputs": 2} if opset >= 18 else {}
        nodes = [node("Split", "x", "a b", axis=1, **halves), node("Mul", "a b", "y")]
        agrees(save(model(nodes, {"x": [1, 6, 7]}, ["y"], opset=opset), tmp_path))
    nodes = [node("Split", "x", "a b c", axis=2, num_outputs=3), node("Concat", "c b", "y", axis=0)]
    with pytest.raises(UnsupportedModelError, match="differ outside axis 0"):  # 3, 3 and 1
        import_model(save(model(nodes, {"x": [1, 6, 7]}, ["y"], opset=18), tmp_path))
    nodes = [node("Split", "x zero", "a b", axis=2), node("Concat", "a b", "y", axis=2)]
    path = save(
        model([*nodes, node("Relu", "y", "z")], {"x": [1, 6, 7]}, ["z"], constants), tmp_path
    )
    assert [n.op for n in agrees(path).nodes] == ["Relu"]
    nodes[1] = node("Relu", "b", "y")
    with pytest.raises(UnsupportedModelError, match="operand b has no elements"):
        import_model(save(model(nodes, {"x": [1, 6, 7]}, ["y"], constants), tmp_path))
    nodes = [node("Split", "x", "a b c", axis=2)]
    path = save(model(nodes, {"x": [1, 6, 9]}, ["c", "a"], opset=17), tmp_path)
    graph = agrees(path)
    assert [v.name for v in graph.outputs] == ["c", "a"]


EQUATIONS = (
    ("bij,bjk->bik", 2),
    ("bij,bkj->bik", 2),
    ("ij,jk", 2),
    ("bhqd,bhkd->bhqk", 2),
    ("bqhd,bkhd->bhqk", 2),
    ("bhqk,bkhd->bqhd", 2),
    ("...ij,...jk->...ik", 2),
    ("...i,i->...", 2),
    ("i,j->ij", 2),
    ("ij,ij->ij", 2),
    ("ij,ij->", 2),
    ("ij->ji", 1),
    ("bij->b", 1),
    ("ij->", 1),
    ("ij,jk,kl->il", 3),
    ("bd,de,be->b", 3),
    ("abc,cd->abd", 2),
    ("bij,j->bi", 2),
)


@pytest.mark.parametrize(("count", "nodes"), [(16, 1), (17, 2), (24, 2), (300, 21)])
def test_concat_of_many_parts(count: int, nodes: int, tmp_path: Path) -> None:
    """Runs of parts are joined first, in their order, and no more of them than must be."""
    bounds = [node("Constant", "", f"e{i}", value_ints=[i]) for i in range(count + 1)]
    parts = [node("Slice", f"x e{i} e{i + 1} axis", f"p{i}") for i in range(count)]
    join = node("Concat", " ".join(f"p{i}" for i in range(count)), "j", axis=1)
    all_nodes = [*bounds, *parts, join, node("Mul", "j j", "y")]
    data = {"axis": np.array([1])}
    graph = agrees(save(model(all_nodes, {"x": [2, count, 3]}, ["y"], data), tmp_path))
    assert sum(n.op == "Concat" for n in graph.nodes) == nodes


@pytest.mark.parametrize(("equation", "count"), EQUATIONS)
@pytest.mark.parametrize("constant", [False, True])
def test_einsum(equation: str, count: int, constant: bool, tmp_path: Path) -> None:
    """Against PyTorch, all operands computed from the input or all but the first constant."""
    sizes = {c: 2 + i % 4 for i, c in enumerate(string.ascii_lowercase)}
    terms = equation.split("->")[0].split(",")
    shapes = [tuple(sizes[c] for c in t.replace("...", "vw")) for t in terms]
    if "..." in equation and terms[1] == "i":
        shapes[1] = (sizes["i"],)
    rng = np.random.default_rng(0)
    data = [rng.standard_normal(s) for s in shapes]
    nodes, constants = [], {}
    names = ["x"]
    for i, a in enumerate(data[1:], 1):  # computed ones are sums of a constant and of the input
        constants[f"c{i}"] = a.astype("f4")
        data[i] = constants[f"c{i}"].astype("f8")
        names.append(f"c{i}" if constant else f"t{i}")
        nodes += [node("Add", f"c{i} s", f"t{i}")] * (not constant)
    nodes = [node("ReduceSum", "x", "s", keepdims=0), *nodes] if not constant else []
    nodes += [node("Einsum", " ".join(names), "y", equation=equation)]
    graph = import_model(save(model(nodes, {"x": shapes[0]}, ["y"], constants, opset=13), tmp_path))

    def function(t: Any) -> Any:
        rest = [torch.tensor(a) + (0 if constant else t.sum()) for a in data[1:]]
        return torch.einsum(equation, t, *rest)

    if constant and equation == "abc,cd->abd":  # a layer
        assert [n.op for n in graph.nodes if n.op != "Reshape"] == ["MatMul"]
        assert param_slots(graph).keys() == {"c1"}
    equals_torch(graph, data[0], function)
