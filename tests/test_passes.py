"""Every pass keeps the outputs, verifies, and leaves what it promises."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from onnx_files import floats, model, node, save

from odt_plan.ir import passes
from odt_plan.ir.autodiff import param_slots
from odt_plan.ir.graph import Array, Attr, Graph, TensorType, Value
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.quantization import Quantization


class Net:
    """A graph under construction, with seeded constants."""

    def __init__(self, *shape: int) -> None:
        self.rng = np.random.default_rng(0)
        self.graph = Graph("net")
        self.x = self.graph.add_input("x", TensorType(shape))

    def constant(self, name: str, *shape: int, positive: bool = False) -> Value:
        data = floats(self.rng, *shape)
        return self.graph.add_constant(name, np.abs(data) + 1 if positive else data)

    def add(self, op: str, *inputs: Value | None, name: str, **attrs: Attr) -> Value:
        return self.graph.add_node(op, inputs, attrs, name=name, outputs=[f"{name}.out"]).out

    def conv(self, x: Value, name: str, filters: int, bias: bool = False) -> Value:
        w = self.constant(f"{name}.w", filters, x.type.shape[1], 3, 3)
        b = self.constant(f"{name}.b", filters) if bias else None
        return self.add(
            "Conv", x, w, b, name=name, strides=(1, 1), pads=(1, 1, 1, 1), dilations=(1, 1), group=1
        )

    def norm(self, x: Value, name: str) -> Value:
        c = x.type.shape[1]
        params = [
            self.constant(f"{name}.{k}", c, positive=k == "var") for k in ("s", "b", "mean", "var")
        ]
        return self.add("BatchNormalization", x, *params, name=name, epsilon=1e-3)

    def done(self, *outputs: Value) -> Graph:
        self.graph.outputs = list(outputs)
        self.graph.verify()
        return self.graph


def results(graph: Graph) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    env = run(graph, {v.name: floats(rng, *v.type.shape) for v in graph.inputs})
    return {v.name: env[v.name] for v in graph.outputs}


def cleaned(graph: Graph, *, fold_batchnorm: bool = True) -> Counter[str]:
    """Clean, compare the outputs before and after, and return the operators that are left."""
    before = results(graph)
    passes.clean(graph, fold_batchnorm=fold_batchnorm)
    after = results(graph)
    assert list(before) == list(after)
    for name, want in before.items():
        assert after[name].shape == want.shape
        assert np.allclose(after[name], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    text = repr(graph)
    passes.clean(graph, fold_batchnorm=fold_batchnorm)
    assert repr(graph) == text  # nothing is left to do
    return Counter(n.op for n in graph.nodes)


def test_batchnorm_merges_into_conv_gemm_and_matmul() -> None:
    net = Net(2, 3, 5, 5)
    y = net.norm(net.conv(net.x, "c1", 4, bias=True), "n1")
    y = net.norm(net.conv(y, "c2", 2), "n2")
    y = net.add("Reshape", y, name="flat", shape=(2, 50))
    y = net.norm(net.add("Gemm", y, net.constant("g.w", 6, 50), None, name="g", trans_b=1), "n3")
    y = net.norm(net.add("MatMul", y, net.constant("m.w", 6, 3), name="m"), "n4")
    graph = net.done(y)
    assert cleaned(graph) == {"Conv": 2, "Reshape": 1, "Gemm": 2}
    assert [n.name for n in graph.nodes] == ["c1", "c2", "flat", "g", "m"]
    assert set(graph.constants) == {"c1.w", "c1.b", "c2.w", "n2.b", "g.w", "n3.b", "m.w", "n4.b"}
    assert graph.outputs[0].name == "n4.out"


def test_batchnorm_stays_where_it_must() -> None:
    """Off by option; behind a sum; behind a result that something else reads; behind an output."""
    net = Net(1, 2, 4, 4)
    graph = net.done(net.norm(net.conv(net.x, "c", 2), "n"))
    assert cleaned(graph, fold_batchnorm=False) == {"Conv": 1, "BatchNormalization": 1}

    net = Net(1, 2, 4, 4)
    y = net.conv(net.x, "c", 2)
    z = net.norm(net.add("Add", y, net.x, name="sum"), "n")
    assert cleaned(net.done(z))["BatchNormalization"] == 1

    net = Net(1, 2, 4, 4)
    y = net.conv(net.x, "c", 2)
    z = net.add("Mul", net.norm(y, "n"), y, name="gate")
    assert cleaned(net.done(z))["BatchNormalization"] == 1

    net = Net(1, 2, 4, 4)
    y = net.conv(net.x, "c", 2)
    assert cleaned(net.done(y, net.norm(y, "n")))["BatchNormalization"] == 1


def _shared(net: Net, x: Value, w: Value, name: str) -> Value:
    attrs: dict[str, Attr] = {
        "strides": (1, 1),
        "pads": (1, 1, 1, 1),
        "dilations": (1, 1),
        "group": 1,
    }
    return net.add("Conv", x, w, None, name=name, **attrs)


@pytest.mark.parametrize("second", [False, True])
def test_batchnorm_does_not_touch_a_weight_that_others_use(second: bool) -> None:
    """It stays one parameter, also where another normalization stands behind the others."""
    net = Net(1, 3, 4, 4)
    w = net.constant("w", 3, 3, 3, 3)
    y = _shared(net, net.norm(_shared(net, net.x, w, "a"), "n"), w, "b")
    original = net.graph.constants["w"].copy()
    graph = net.done(net.norm(y, "m") if second else y)
    assert cleaned(graph) == {"Conv": 2, "BatchNormalization": 1 + second}
    assert np.array_equal(graph.constants["w"], original)


def test_batchnorm_merges_into_a_weight_that_it_always_follows() -> None:
    """Two towers of the same layers: one weight and one bias still, for both."""
    net = Net(1, 3, 4, 4)
    w = net.constant("w", 3, 3, 3, 3)
    one = net.norm(_shared(net, net.x, w, "a"), "n")
    statistics = one.producer.inputs[1:] if one.producer is not None else ()
    y = _shared(net, net.add("Neg", net.x, name="neg"), w, "b")
    two = net.add("BatchNormalization", y, *statistics, name="m", epsilon=1e-3)
    graph = net.done(net.add("Sub", one, two, name="difference"))
    assert cleaned(graph) == {"Conv": 2, "Neg": 1, "Sub": 1}
    assert set(graph.constants) == {"w", "n.b"}


def test_constant_sums_become_biases_that_can_be_trained() -> None:
    net = Net(1, 2, 4, 4)
    y = net.add("Add", net.constant("c1", 3, 1, 1), net.conv(net.x, "a", 3), name="plus1")
    y = net.add("Add", net.conv(y, "b", 4, bias=True), net.constant("c2", 1, 4, 1, 1), name="plus2")
    y = net.add("Reshape", y, name="flat", shape=(1, 64))
    y = net.add("MatMul", y, net.constant("w", 64, 5), name="dense")
    y = net.add("Add", y, net.constant("c3", 1, 5), name="plus3")
    graph = net.done(y)
    assert cleaned(graph) == {"Conv": 2, "Reshape": 1, "Gemm": 1}
    roles = {k: uses[0][1].role for k, uses in param_slots(graph).items()}
    assert roles == {
        "a.w": "weight",
        "c1": "bias",
        "b.w": "weight",
        "b.b": "bias",
        "w": "weight",
        "c3": "bias",
    }


def test_a_bias_of_several_layers_stays_one_parameter() -> None:
    """As in a recurrent layer whose steps are written out."""
    net = Net(2, 4)
    b, y = net.constant("b", 4), net.x
    for i in range(3):
        product = net.add("MatMul", y, net.constant(f"w{i}", 4, 4), name=f"m{i}")
        y = net.add("Tanh", net.add("Add", product, b, name=f"a{i}"), name=f"t{i}")
    assert cleaned(net.done(y)) == {"Gemm": 3, "Tanh": 3}
    assert {n: len(uses) for n, uses in param_slots(net.graph).items()} == {
        "b": 3, "w0": 1, "w1": 1, "w2": 1,
    }  # fmt: skip


def test_a_sum_with_what_others_read_stays_beside_a_bias() -> None:
    net = Net(2, 4)
    c, y = net.constant("c", 4), net.x
    for i in range(2):
        w, b = net.constant(f"w{i}", 4, 4), net.constant(f"b{i}", 4)
        product = net.add("Gemm", y, w, b, name=f"g{i}", trans_b=0)
        y = net.add("Add", product, c, name=f"a{i}")
    assert cleaned(net.done(y)) == {"Gemm": 2, "Add": 2}
    assert len(param_slots(net.graph)["c"]) == 2


def test_constants_that_are_moved_are_constants() -> None:
    """Also one that others read as it is: Einsum's matrices, say."""
    net = Net(2, 6)
    w, v = net.constant("w", 2, 3, 4), net.constant("v", 4, 4)
    y = net.add("MatMul", net.x, net.add("Reshape", w, name="view", shape=(6, 4)), name="m")
    y = net.add("MatMul", y, net.add("Transpose", v, name="turn", perm=(1, 0)), name="n")
    y = net.add("Concat", y, v, name="join", axis=0)
    assert cleaned(net.done(y)) == {"Concat": 1, "MatMul": 2}
    assert {n: a.shape for n, a in net.graph.constants.items()} == {
        "w": (6, 4), "v": (4, 4), "v/turn": (4, 4),
    }  # fmt: skip


def test_sums_that_are_no_bias_stay() -> None:
    """Along the width, or broadcasting the layer's result."""
    net = Net(1, 2, 4, 4)
    y = net.add("Add", net.conv(net.x, "a", 3), net.constant("row", 4), name="plus")
    assert cleaned(net.done(y)) == {"Conv": 1, "Add": 1}
    net = Net(1, 4)
    y = net.add("Gemm", net.x, net.constant("w", 3, 4), None, name="g", trans_b=1)
    y = net.add("Add", y, net.constant("grow", 2, 3), name="plus")
    assert cleaned(net.done(y)) == {"Gemm": 1, "Add": 1}


def test_pad_merges_into_conv_only_if_it_is_zero_spatial_and_private() -> None:
    def net_with(value: float, begins: tuple[int, ...], second_reader: bool = False) -> Graph:
        net = Net(1, 2, 4, 4)
        p = net.add("Pad", net.x, name="pad", begins=begins, ends=(0, 0, 2, 0), value=value)
        outs = [net.conv(p, "c", 3)]
        return net.done(*outs, *([net.add("Relu", p, name="r")] if second_reader else []))

    graph = net_with(0.0, (0, 0, 1, 3))
    assert cleaned(graph) == {"Conv": 1}
    assert graph.nodes[0].attrs["pads"] == (2, 4, 3, 1)
    assert cleaned(net_with(1.0, (0, 0, 1, 3)))["Pad"] == 1
    assert cleaned(net_with(0.0, (0, 1, 1, 3)))["Pad"] == 1
    assert cleaned(net_with(0.0, (0, 0, 1, 3), second_reader=True))["Pad"] == 1


@pytest.mark.parametrize(
    ("shape", "perms", "left"),
    [
        ((1, 2, 3, 4), [(0, 2, 3, 1), (0, 3, 1, 2)], {}),
        ((1, 2, 3, 4), [(0, 2, 3, 1), (0, 2, 3, 1)], {"Transpose": 1}),
        ((1, 2, 3, 4), [(1, 0, 2, 3)], {"Reshape": 1}),
        ((2, 1, 1, 4), [(0, 3, 1, 2)], {"Reshape": 1}),
        ((2, 3, 1, 4), [(2, 0, 1, 3), (1, 2, 0, 3)], {}),
        ((2, 3, 4), [(2, 1, 0)], {"Transpose": 1}),
    ],
)
def test_transposes(
    shape: tuple[int, ...], perms: list[tuple[int, ...]], left: dict[str, int]
) -> None:
    net = Net(*shape)
    y = net.add("Relu", net.x, name="r")
    for i, perm in enumerate(perms):
        y = net.add("Transpose", y, name=f"t{i}", perm=perm)
    assert cleaned(net.done(net.add("Tanh", y, name="t"))) == {"Relu": 1, "Tanh": 1, **left}


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("perm", [(0, 2, 3, 1), (0, 3, 2, 1), (0, 3, 1, 2), (0, 1, 3, 2)])
def test_transpose_before_a_dense_layer_moves_into_its_weight(
    perm: tuple[int, ...], trans_b: int
) -> None:
    net = Net(2, 3, 4, 5)
    y = net.add("Transpose", net.x, name="t", perm=perm)
    y = net.add("Reshape", y, name="flat", shape=(2, 60))
    w = net.constant("w", *((7, 60) if trans_b else (60, 7)))
    y = (
        net.add("Gemm", y, w, None, name="g", trans_b=trans_b)
        if trans_b
        else net.add("MatMul", y, w, name="g")
    )
    graph = net.done(y)
    assert cleaned(graph) == {"Reshape": 1, graph.nodes[-1].op: 1}


def test_transpose_stays_when_the_batch_moves_or_the_weight_is_shared() -> None:
    net = Net(3, 2, 4)
    y = net.add("Transpose", net.x, name="t", perm=(1, 0, 2))
    y = net.add("Reshape", y, name="flat", shape=(2, 12))
    assert (
        cleaned(net.done(net.add("MatMul", y, net.constant("w", 12, 5), name="m")))["Transpose"]
        == 1
    )
    net = Net(1, 3, 4)
    w = net.constant("w", 12, 12)
    y = net.add("Transpose", net.x, name="t", perm=(0, 2, 1))
    y = net.add("MatMul", net.add("Reshape", y, name="flat", shape=(1, 12)), w, name="m")
    assert cleaned(net.done(net.add("MatMul", y, w, name="m2")))["Transpose"] == 1


def test_reshapes_and_dead_code() -> None:
    net = Net(2, 3, 4)
    y = net.add("Reshape", net.x, name="a", shape=(6, 4))
    y = net.add("Reshape", y, name="b", shape=(2, 12))
    y = net.add("Relu", y, name="r")
    net.add("Tanh", net.add("Mul", y, net.constant("unused", 12), name="dead1"), name="dead2")
    y = net.add("Reshape", y, name="c", shape=(2, 12))
    graph = net.done(y)
    assert cleaned(graph) == {"Reshape": 1, "Relu": 1}
    assert graph.outputs[0].name == "c.out"
    assert set(graph.values) == {"x", "b.out", "c.out"}
    assert not graph.constants


def test_outputs_that_are_inputs_or_shared_keep_their_names() -> None:
    net = Net(2, 3)
    same = net.add("Reshape", net.x, name="same", shape=(2, 3))
    r = net.add("Relu", net.x, name="r")
    again = net.add("Reshape", r, name="again", shape=(2, 3))
    graph = net.done(same, r, again)
    cleaned(graph)
    assert [v.name for v in graph.outputs] == ["same.out", "r.out", "again.out"]


def test_folding_counts_on_a_large_graph_stay_fast() -> None:
    """Six hundred layers clean up in a few sweeps, not in one sweep per layer."""
    net = Net(1, 2, 3, 3)
    y = net.x
    for i in range(200):
        y = net.add("Relu", net.norm(net.conv(y, f"c{i}", 2), f"n{i}"), name=f"r{i}")
    graph = net.done(y)
    calls = 0
    original = Graph.verify

    def counting(self: Graph) -> None:
        nonlocal calls
        calls += 1
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Graph, "verify", counting)
        passes.clean(graph)
    assert Counter(n.op for n in graph.nodes) == {"Conv": 200, "Relu": 200}
    assert calls < 10


def test_clean_models_of_channels_last_exporters(tmp_path: Path) -> None:
    """Transpose, Conv, Transpose back, flatten, dense: only the Transpose of the input is left."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Transpose", "x", "a", perm=[0, 3, 1, 2]),
        node("Conv", "a w", "b"),
        node("Transpose", "b", "c", perm=[0, 2, 3, 1]),
        node("Relu", "c", "d"),
        node("Reshape", "d s", "e"),
        node("MatMul", "e m", "y"),
    ]
    constants = {"w": floats(rng, 4, 3, 3, 3), "s": np.array([-1, 36]), "m": floats(rng, 36, 5)}
    graph = import_model(save(model(nodes, {"x": ["N", 5, 5, 3]}, ["y"], constants), tmp_path))
    assert Counter(n.op for n in graph.nodes)["Transpose"] == 1


def _gelu(net: Net, x: Value, order: int, cube: float = 0.044715) -> Value:
    """The ways in which GELU is written: powers by products, the half before or behind."""
    number = {
        k: net.graph.add_constant(f"{k}{order}", np.array(v, np.float32))
        for k, v in (("half", 0.5), ("cube", cube), ("root", 0.7978846), ("one", 1), ("two", 2))
    }
    count = iter(range(100))

    def op(name: str, a: Value, b: Value) -> Value:
        a, b = (b, a) if order % 2 and name != "Div" else (a, b)
        return net.add(name, a, b, name=f"g{order}.{next(count)}")

    square = op("Mul", x, x)
    if order < 2:  # x + c * x * x * x
        inner = op(
            "Mul", op("Add", x, op("Mul", op("Mul", square, x), number["cube"])), number["root"]
        )
    else:  # x * (1 + c * x * x)
        factor = op("Add", number["one"], op("Mul", number["cube"], square))
        inner = op("Mul", number["root"], op("Mul", x, factor))
    t = net.add("Tanh", inner, name=f"g{order}.tanh")
    if order == 3:
        return op("Mul", op("Div", x, number["two"]), op("Add", t, number["one"]))
    return op("Mul", op("Mul", x, op("Add", t, number["one"])), number["half"])


@pytest.mark.parametrize("order", range(4))
def test_gelu_is_found_in_any_order(order: int) -> None:
    net = Net(2, 3, 9)
    x = net.add("Mul", net.x, net.constant("scale", 9), name="before")
    y = net.add("Relu", _gelu(net, x, order), name="behind")
    assert cleaned(net.done(y)) == {"Mul": 1, "Gelu": 1, "Relu": 1}
    assert set(net.graph.constants) == {"scale"}


def test_what_is_not_gelu_stays() -> None:
    for name in ("another number", "read elsewhere", "an output", "annotated"):
        net = Net(2, 3, 9)
        y = _gelu(net, net.x, 0, 0.05 if name == "another number" else 0.044715)
        inner = net.graph.values["g0.tanh.out"]
        outputs = [net.add("Relu", y, name="behind")]
        if name == "read elsewhere":
            outputs.append(net.add("Neg", inner, name="reader"))
        if name == "an output":
            outputs.append(inner)
        graph = net.done(*outputs)
        if name == "annotated":
            graph.quantization[inner.name] = Quantization((0.01,), 0)
        assert cleaned(graph)["Tanh"] == 1, name


def test_products_of_stacked_rows_become_gemm_with_their_bias() -> None:
    net = Net(2, 3, 9)
    y = net.add("MatMul", net.x, net.constant("first.w", 9, 5), name="first")
    y = net.add("Add", net.constant("first.b", 5), y, name="first.add")
    z = net.add("MatMul", y, net.constant("second.w", 5, 4), name="second")
    other = net.add("Add", net.constant("b", 3, 1), z, name="per row")
    graph = net.done(other, net.add("Relu", z, name="relu"))
    assert cleaned(graph) == {"Reshape": 2, "Gemm": 2, "Add": 1, "Relu": 1}
    first = next(n for n in graph.nodes if n.name == "first")
    assert [v.name for v in first.operands()][1:] == ["first.w", "first.b"]
    assert set(param_slots(graph)) == {"first.w", "first.b", "second.w", "b"}


def test_views_of_rows_have_free_names() -> None:
    """Nodes and their results may have one name, as PyTorch's do not and others' do."""
    net = Net(1, 3, 4)
    w = net.constant("w", 4, 4)
    x = net.x
    for name in ("a", "b"):
        x = net.graph.add_node("MatMul", (x, w), name=name).out
    x = net.graph.add_node("Relu", (x,), name="b/rows").out
    assert cleaned(net.done(x)) == {"Reshape": 2, "Gemm": 2, "Relu": 1}


def test_products_of_computed_matrices_stay() -> None:
    net = Net(2, 3, 3)
    y = net.add("MatMul", net.x, net.x, name="square")
    assert cleaned(net.done(net.add("Relu", y, name="relu"))) == {"MatMul": 1, "Relu": 1}
