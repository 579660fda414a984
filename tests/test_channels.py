"""The order of channels: who shares one, the same function in another, and plans that use it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import nets
import numpy as np
import plans
import pytest
from board import lane
from board.objects import link
from cli_run import Cli
from numpy.typing import NDArray
from onnx_files import assert_close, export, floats, model, node, runtime, save
from op_cases import Case, cases
from test_c_backend import needs_gcc
from test_importance import CHANNELS, CLASSES, METHODS, SIZE, data, measured, small
from test_int8_training import NETS, calibrated, lowered

from odt_plan.backends.c.golden import random_samples
from odt_plan.backends.numpy import Runtime
from odt_plan.ir.calibrate import calibrate
from odt_plan.ir.channels import (
    best_order,
    channel_classes,
    in_file_order,
    orders_of,
    permuted,
    reordered,
)
from odt_plan.ir.errors import UsageError
from odt_plan.ir.graph import Graph, TensorType
from odt_plan.ir.import_options import ImportOptions, Lora
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.precision import all_i8, lower
from odt_plan.ir.streaming import blocks, stream
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request, make_plan
from odt_plan.planner.plan import ImportanceTable, Plan, load_plan
from odt_plan.planner.rebuild import rebuild, updates_of

Array = NDArray[Any]
PLAN = Path("out") / "plan.json"


def shuffled(graph: Graph, seed: int = 0) -> dict[str, tuple[int, ...]]:
    """Every class of a graph in a random order."""
    rng = np.random.default_rng(seed)
    found = {c.name: tuple(rng.permutation(c.size).tolist()) for c in channel_classes(graph)}
    assert found
    return found


def sample(graph: Graph) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {v.name: floats(rng, *v.type.shape) for v in graph.inputs}


def tied(graph: Graph) -> dict[str, set[tuple[str, int]]]:
    """The axes of constants by class."""
    return {
        c.name: {(m.value, m.axis) for m in c.members if m.value in graph.constants}
        for c in channel_classes(graph)
    }


# ---- rules of operators --------------------------------------------------------------------------


def ruled(case: Case) -> bool:
    """Its operator has a rule, which is for weights in one piece."""
    cold = [s.cold_index for s in case.op.params if s.cold_index is not None]
    return case.op.axes is not None and not any(i < len(case.node.inputs) for i in cold)


RULED = [c for c in cases() if ruled(c)]


def alone(case: Case) -> tuple[Graph, dict[str, Array]]:
    """The sample as a graph of constants, and its operands by name."""
    graph, operands = Graph("alone"), {}
    values = []
    for i, (t, a) in enumerate(zip(case.sample.types, case.data(), strict=True)):
        values.append(None)
        if t is not None and a is not None:
            operands[f"x{i}"] = a
            values[-1] = graph.add_constant(f"x{i}", a, t.dtype, t.quant, shape=t.shape)
    graph.add_node(case.node.op, values, case.sample.attrs, name="y")
    return graph, operands


@pytest.mark.parametrize("case", RULED, ids=lambda c: c.name)
def test_a_rule_says_how_results_follow_their_operands(case: Case) -> None:
    graph, operands = alone(case)
    (before,) = case.op.kernel(case.node, case.data())
    ranks = {n: a.ndim for n, a in (*operands.items(), ("y", before))}
    orders: dict[str, list[NDArray[np.intp] | None]] = {n: [None] * k for n, k in ranks.items()}
    rng = np.random.default_rng(1)
    for c in channel_classes(graph):
        order = rng.permutation(c.size).tolist()
        for m in c.members:
            orders[m.value][m.axis] = m.places(order)
    after = {n: permuted(a, tuple(orders[n])) for n, a in operands.items()}
    inputs = [after.get(f"x{i}") for i in range(len(case.sample.types))]
    (got,) = case.op.kernel(case.node, inputs)
    want = permuted(before, tuple(orders["y"]))
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5)


def test_operators_with_channels_have_a_rule() -> None:
    names = {c.op.name for c in RULED}
    assert names >= {
        *("Conv", "Gemm", "MatMul", "Add", "Mul", "Relu", "Clip", "Gelu", "BatchNormalization"),
        *("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Reshape", "Transpose"),
        *("BatchNormTraining", "LayerNormalization", "Slice", "Concat", "Pad", "Expand", "Resize"),
        "ConvTranspose",
    }
    moved = {c.op.name for c in RULED if channel_classes(alone(c)[0])}
    assert moved == names, "each has a sample with an axis that its rule lets go"


# ---- classes -------------------------------------------------------------------------------------


def test_a_chain_has_a_class_behind_each_layer_but_the_last() -> None:
    graph = small()
    assert tied(graph) == {
        "c1:1": {("c1.weight", 0), ("c1.bias", 0), ("c2.weight", 1)},
        "c2:1": {("c2.weight", 0), ("c2.bias", 0), ("fc.weight", 1)},
    }
    (behind,) = (m for c in channel_classes(graph) for m in c.members if m.value == "fc.weight")
    assert (behind.before, behind.behind) == (1, 36), "a channel is a block of the flat axis"


def test_residual_sums_and_depthwise_layers_join_classes() -> None:
    classes = tied(NETS["mobile"]())
    shared = {("stem.weight", 0), ("b0.expand.weight", 1), ("b0.project.weight", 0)}
    assert any(shared <= members for members in classes.values())
    inner = {("b0.expand.weight", 0), ("b0.depthwise.weight", 0), ("b0.project.weight", 1)}
    assert any(inner <= members for members in classes.values())
    assert not any(("fc.weight", 0) in m or ("stem.weight", 1) in m for m in classes.values())


def test_what_is_added_up_over_other_axes_keeps_its_channels() -> None:
    rng, g = np.random.default_rng(0), Graph("mean")
    x, w = g.add_input("x", TensorType((1, 5, 4))), g.add_constant("w", floats(rng, 4, 6))
    x = g.add_node("MatMul", (x, w), name="up").out
    for axis in (1, 2):  # of all rows; of the channels themselves, in any order
        mean = g.add_node("ReduceMean", (x,), {"axes": (axis,), "keepdims": 1}, name=f"m{axis}").out
        x = g.add_node("Sub", (x, mean), name=f"less{axis}").out
    v = g.add_constant("v", floats(rng, 6, 3))
    g.outputs = [g.add_node("MatMul", (x, v), name="down").out]
    assert tied(g) == {"up:2": {("w", 1), ("v", 0)}}
    feeds = sample(g)
    got = run(reordered(g, shuffled(g)), feeds)["down"]
    assert_close(got, run(g, feeds)["down"])


def test_channels_first_or_last_a_flat_axis_runs_over_them() -> None:
    rng, g = np.random.default_rng(0), Graph("last")
    x = nets.conv(g, rng, g.add_input("x", TensorType((1, 2, 3, 4))), "c", 6)
    x = g.add_node("Transpose", (x,), {"perm": (0, 2, 3, 1)}, name="turn").out
    g.outputs = [nets.dense(g, rng, nets.flat(g, x), "fc", 3)]
    (c,) = channel_classes(g)
    (m,) = (m for m in c.members if m.value == "fc.weight")
    assert (c.size, m.before, m.behind) == (6, 12, 1)
    assert m.places([1, 0, 2, 3, 4, 5])[:8].tolist() == [1, 0, 2, 3, 4, 5, 7, 6]


def test_what_is_not_understood_keeps_its_order() -> None:
    rng, g = np.random.default_rng(0), Graph("fixed")
    x = g.add_input("x", TensorType((1, 4, 5, 5)))
    a = nets.conv(g, rng, x, "first", 4)
    b = nets.conv(g, rng, a, "grouped", 8, group=2)  # which reads its channels by halves
    c = nets.conv(g, rng, x, "joined", 4)
    d = g.add_node("Concat", (b, c), {"axis": 1}, name="concat").out
    e = nets.conv(g, rng, d, "free", 6)
    g.outputs = [nets.conv(g, rng, e, "last", 3)]
    assert tied(g) == {"free:1": {("free.weight", 0), ("free.bias", 0), ("last.weight", 1)}}


@pytest.mark.parametrize("net", [nets.functions, nets.recurrent])
def test_no_class_of_a_network_is_free(net: Callable[[], Graph]) -> None:
    """Conditions that differ by place, gates of cells."""
    assert not channel_classes(net())


def test_normalizations_over_neighbours_keep_their_order() -> None:
    assert tied(nets.spatial()) == {"up:1": {("up.weight", 1), ("up.bias", 0), ("last.weight", 1)}}


def test_an_axis_that_two_flat_ones_cut_differently_keeps_its_order() -> None:
    rng, g = np.random.default_rng(0), Graph("cut")
    x = g.add_input("x", TensorType((1, 5)))
    flat = nets.dense(g, rng, x, "up", 12)
    seen = []
    for i, shape in enumerate(((1, 4, 1, 3), (1, 6, 1, 2))):
        image = g.add_node("Reshape", (flat,), {"shape": shape}, name=f"image{i}").out
        y = nets.conv(g, rng, image, f"c{i}", 2, kernel=1)
        seen.append(g.add_node("GlobalAveragePool", (y,), name=f"pool{i}").out)
    g.outputs = [g.add_node("Add", seen, name="sum").out]
    assert not tied(g)


def test_an_axis_over_two_that_are_free_keeps_its_order() -> None:
    rng, g = np.random.default_rng(0), Graph("both")
    x = nets.dense(g, rng, g.add_input("x", TensorType((1, 5))), "up", 12)
    x = g.add_node("Reshape", (x,), {"shape": (1, 3, 4)}, name="rows").out
    x = g.add_node("ReduceSum", (x,), {"axes": (1,), "keepdims": 0}, name="sum").out
    g.outputs = [nets.dense(g, rng, x, "fc", 3)]
    assert not tied(g)


def test_channels_that_meet_in_two_arrangements_keep_their_order() -> None:
    rng, g = np.random.default_rng(0), Graph("met")
    x = nets.conv(g, rng, g.add_input("x", TensorType((1, 2, 1, 3))), "c", 4)
    turned = g.add_node("Transpose", (x,), {"perm": (0, 2, 3, 1)}, name="turn").out
    first, last = (
        g.add_node("Reshape", (v,), {"shape": (1, 12)}, name=f"flat{i}").out
        for i, v in enumerate((x, turned))
    )
    both = g.add_node("Add", (first, last), name="sum").out
    g.outputs = [nets.dense(g, rng, both, "fc", 3)]
    assert not tied(g)


FUNCTIONS: dict[str, Callable[[], Graph]] = {
    "chain": small,
    "mlp": nets.mlp,
    "resnet": nets.resnet,
    "bottlenecks": nets.bottlenecks,
    "mobile": NETS["mobile"],
    "views": nets.views,
    "branches": nets.two_branches,
}
#: Of operators that the small exporter of the tests does not write.
OTHERS: dict[str, Callable[[], Graph]] = {
    "transformer": lambda: nets.transformer(blocks=2),
    "spatial": nets.spatial,
    "normalized by the batch": nets.batch_normalized,
}


@pytest.mark.parametrize("net", FUNCTIONS)
def test_the_function_is_that_of_the_file(net: str, tmp_path: Path) -> None:
    path = export(FUNCTIONS[net](), tmp_path)
    graph = import_model(path)
    other = reordered(graph, shuffled(graph))
    assert any(not np.array_equal(other.constants[n], graph.constants[n]) for n in other.orders)
    feeds = sample(graph)
    values = run(other, feeds)
    for v, want in zip(graph.outputs, runtime(path, feeds), strict=True):
        assert_close(values[v.name], want)
    for name, a in graph.constants.items():
        same = in_file_order(other.constants[name], other.orders.get(name, ()))
        assert np.array_equal(same, a)


@pytest.mark.parametrize("net", OTHERS)
def test_the_function_is_that_of_the_graph(net: str) -> None:
    graph = OTHERS[net]()
    other = reordered(graph, shuffled(graph))
    assert any(not np.array_equal(other.constants[n], graph.constants[n]) for n in other.orders)
    feeds = sample(graph)
    one, two = run(graph, feeds), run(other, feeds)
    for v in graph.outputs:
        assert_close(two[v.name], one[v.name])


@pytest.mark.parametrize(
    ("name", "classes"),
    [("tinymaix_mnist_cnn", 3), ("mlperf_resnet8_bn", 6), ("mbv2-w0.35-head10-relu6", 24)],
)
def test_published_networks(shared: Path, name: str, classes: int) -> None:
    path = shared / "models" / f"{name}.onnx"
    graph = import_model(path)
    assert len(channel_classes(graph)) == classes
    feeds, other = sample(graph), reordered(graph, shuffled(graph))
    got = run(other, feeds)[graph.outputs[0].name]
    assert_close(got, runtime(path, feeds)[0], 1e-4)


def products() -> Graph:
    """Dense layers whose weights have the inputs first; integer ones have them last."""
    rng, g = np.random.default_rng(0), Graph("products")
    x = g.add_input("x", TensorType((1, 6)))
    for name, units in (("a", 8), ("b", 5)):
        w = g.add_constant(f"{name}.weight", floats(rng, x.type.shape[1], units))
        x = nets.relu(g, g.add_node("Gemm", (x, w), name=name).out, f"{name}.relu")
    g.outputs = [nets.dense(g, rng, x, "fc", 3)]
    calibrate(g, floats(rng, 16, 6))
    return g


@pytest.mark.parametrize("net", [*NETS, "products"])
def test_integers_are_the_same_ones(net: str) -> None:
    """Integer sums have no rounding, so results are the same to the bit."""
    graph = products() if net == "products" else calibrated(net)
    other = reordered(graph, shuffled(graph))
    feeds = sample(graph)
    (name,) = (v.name for v in graph.outputs)
    one, two = (lower(g, all_i8(g)) for g in (graph, other))
    assert np.array_equal(run(one, feeds)[name], run(two, feeds)[name])
    assert not np.array_equal(run(one, feeds)[name], 0 * run(one, feeds)[name])
    for n, orders in two.orders.items():  # of weights that lie output features first, too
        assert np.array_equal(in_file_order(two.constants[n], orders), one.constants[n])
    assert any(q.axis is not None for n, q in graph.quantization.items() if n in other.orders)


@pytest.mark.parametrize(
    "order", [(0, 1, 2), (0, 0, 1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7, 8), ()]
)
def test_an_order_that_is_none_is_refused(order: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"small has no channels c1:1 in an order like that"):
        reordered(small(), {"c1:1": order})
    with pytest.raises(UsageError, match=r"small has no channels fc:1"):
        reordered(small(), {"fc:1": tuple(range(5))})


# ---- scores --------------------------------------------------------------------------------------


def learnable() -> tuple[Array, Array]:
    """Samples of classes that can be told apart, so that steps on one help others."""
    x, y = data(12)
    x += 2 * floats(np.random.default_rng(7), CLASSES, *x.shape[1:])[y]
    return x, y


@pytest.mark.parametrize("method", METHODS)
def test_leading_channels_are_those_that_score_best(method: Any) -> None:
    graph, (x, y) = small(), learnable()
    found = measured(graph, x, y)
    channels = best_order(graph, found.channels(method))
    got = dict(found.gains(method, orders_of(graph, channels))["c2.weight"])
    axis, each = found.channels(method)["c2.weight"]
    assert axis == 1
    assert 0 < got[1.0] == pytest.approx(each.sum())
    for k in (1, 2, 4):
        best = max(sum(each[list(some)]) for some in combinations(range(CHANNELS), k))
        assert got[k / CHANNELS] == pytest.approx(best)
    got = dict(found.gains(method, orders_of(graph, channels))["fc.weight"])
    blocks = found.channels(method)["fc.weight"][1].reshape(CHANNELS, SIZE * SIZE).sum(1)
    assert got[0.5] == pytest.approx(np.sort(blocks)[CHANNELS // 2 :].sum())


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_parts_are_those_of_the_ordered_network(method: Any) -> None:
    graph, (x, y) = small(), learnable()
    found = measured(graph, x, y)
    channels = best_order(graph, found.channels(method))
    assert {*channels} == {"c1:1", "c2:1"}
    want = measured(reordered(graph, channels), x, y).gains(method)
    for name, points in found.gains(method, orders_of(graph, channels)).items():
        np.testing.assert_allclose(points, want[name], rtol=1e-3, atol=1e-9)


def test_weights_that_read_the_same_channels_are_added_up() -> None:
    rng, g = np.random.default_rng(0), Graph("two")
    x = nets.conv(g, rng, g.add_input("x", TensorType((1, 2, 4, 4))), "c", 3)
    a, b = (nets.conv(g, rng, x, n, 2) for n in ("a", "b"))
    g.outputs = [g.add_node("Add", (a, b), name="sum").out]
    scores = {"a.weight": (1, np.array([5.0, 0, 1])), "b.weight": (1, np.array([0, 6.0, 0]))}
    assert best_order(g, scores) == {"c:1": (1, 0, 2)}
    assert best_order(g, {"a.weight": scores["a.weight"]}) == {"c:1": (0, 2, 1)}
    assert best_order(g, {"c.weight": (0, np.array([1.0, 2, 3]))}) == {"c:1": (2, 1, 0)}
    equal = {"a.weight": (1, np.ones(3))}
    assert not best_order(g, equal), "equal ones stand as in the file"


# ---- plans ---------------------------------------------------------------------------------------


PARTS = ("--train", "c2.weight=0.25,c2.bias,fc.weight=0.5,fc.bias")
LIMITS = ("--ram", "64KB", "--flash", "1MB")


@pytest.fixture
def labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Samples with labels in ``labelled.npz``, and the model beside it."""
    monkeypatch.setenv("ODT_PLAN_CACHE", str(tmp_path / "cache"))
    x, y = learnable()
    np.savez(tmp_path / "labelled.npz", x=x, y=y.astype(np.int32))
    return export(small(), tmp_path)


def planned(odt: Cli, path: Path, *options: str | Path, train: tuple[str, ...] = PARTS) -> Plan:
    given = ("--calib", path.parent / "labelled.npz", "--precision", "*=f32", "-q", "-o", "out")
    done = odt(path, *LIMITS, *train, *given, *options)
    assert done.code == 0, done.err
    return load_plan(PLAN)


def best(method: Any = "gradient") -> Mapping[str, tuple[int, ...]]:
    """The order that measuring the model gives."""
    graph = small()
    return best_order(graph, measured(graph, *learnable()).channels(method))


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_tells_its_order_and_is_rebuilt_in_it(
    odt: Cli, labelled: Path, method: Any
) -> None:
    plan = planned(odt, labelled, "--importance", method)
    assert plan.model.channels == best(method)
    assert plan.asked is not None
    assert plan.asked.importance is not None
    assert plan.asked.importance.channels == best(method)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert odt("verify", PLAN).code == 0
    training, file = rebuild(plan, PLAN).graph, small()
    c1, c2 = (list(best(method)[n]) for n in ("c1:1", "c2:1"))
    weights = file.constants["c2.weight"]
    updated = rebuild(plan, PLAN).updates
    (hot,) = (training.constants[u.value.name] for u in updated if u.candidate.channels == 2)
    assert np.array_equal(hot, weights[c2][:, c1[:2]])
    (told,) = odt("explain", PLAN, "c2.weight", "--json").json
    assert told["chosen"] == f"25.0% updated, input channels {c1[0]}, {c1[1]} of the file"
    (told,) = odt("explain", PLAN, "fc.weight", "--json").json
    assert told["chosen"].endswith(f"{c2[0] * 36 + 7} and 136 more of the file")
    assert odt("diff", PLAN, PLAN, "--json").json["settings"] == []


def test_channels_stand_as_in_the_file_where_no_part_is_updated_by_them(
    odt: Cli, labelled: Path
) -> None:
    one = planned(odt, labelled, train=("--train", "c2.weight=0.25,fc.weight"))
    assert {*one.model.channels} == {"c1:1"}
    none = planned(odt, labelled, train=("--train", "all"))
    assert not none.model.channels
    assert "channels" not in json.loads(PLAN.read_text())["model"]
    assert none.asked is not None
    assert none.asked.importance is not None
    assert none.asked.importance.channels == best()
    by_prior = planned(odt, labelled, "--importance", "prior")
    assert not by_prior.model.channels
    assert odt("diff", "out/plan.json", "out/plan.json").code == 0


@pytest.mark.parametrize("train", ["all", "c2.weight=0.25"])
def test_the_graph_of_a_plan_is_the_one_that_is_rebuilt(labelled: Path, train: str) -> None:
    gains = {"c2.weight": ((0.25, 1.0), (1.0, 2.0))}
    table = ImportanceTable(
        method="fisher", file="a", sha256="0" * 64, samples=1, gains=gains, channels=best()
    )
    request = Request(labelled, load_device(plans.BOARD), train=(train,), importance=table)
    done = make_plan(request)
    assert {*done.plan.model.channels} == ({"c1:1"} if "=" in train else set())
    again = rebuild(done.plan, labelled, labelled).graph
    made = done.training.graph
    assert made.orders.keys() == again.orders.keys()
    for name, a in again.constants.items():
        assert np.array_equal(made.constants[name], a)


def test_diff_tells_another_order_in_a_line(odt: Cli, labelled: Path) -> None:
    planned(odt, labelled)
    Path("first.json").write_text(PLAN.read_text())
    planned(odt, labelled, "--importance", "prior")
    settings = {s["field"]: s for s in odt("diff", "first.json", PLAN, "--json").json["settings"]}
    told = settings["order of channels"]
    assert (told["before"], told["after"]) == ("by score on 2 axes", "as in the file")
    assert not any(field.startswith("model.channels") for field in settings)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"c9:1": [1, 0]}, "has no channels c9:1 in an order like that; plan the model again"),
        ({"c1:1": [1, 0]}, "has no channels c1:1 in an order like that"),
        ({"c1:1": [0, -1]}, "model.channels.c1:1.1: Input should be greater than or equal to 0"),
    ],
)
def test_a_plan_with_another_order_than_the_model_has(
    odt: Cli, labelled: Path, channels: dict[str, Any], message: str
) -> None:
    planned(odt, labelled)
    record = json.loads(PLAN.read_text())
    record["model"]["channels"] = channels
    PLAN.write_text(json.dumps(record))
    ran = odt("verify", PLAN)
    assert ran.code == 2
    assert message in ran.error


def learn(odt: Cli, *more: str | Path) -> dict[str, Array]:
    """What a run of the plan saves."""
    given = ("--data", "labelled.npz", "--epochs", "4", "--lr", "0.02", "--exact")
    ran = odt("run", PLAN, *given, "--save", "w.npz", *more)
    assert ran.code == 0, ran.err
    with np.load("w.npz") as saved:
        return dict(saved)


def exported(odt: Cli, plan: Plan, saved: Mapping[str, Array]) -> Runtime:
    """A runtime of the plan with these weights, which computes what the exported file does."""
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx", "--json")
    assert done.code == 0, done.err
    trained = Runtime(plan, rebuild(plan, PLAN))
    trained.set_params(saved)
    for seed in range(3):
        given = random_samples(trained.training, np.random.default_rng(seed))
        assert_close(runtime(Path("tuned.onnx"), given)[0], trained.infer(given))
    return trained


def test_what_is_learned_is_saved_and_exported_in_the_order_of_the_file(
    odt: Cli, labelled: Path
) -> None:
    plan, file = planned(odt, labelled), small().constants
    saved = learn(odt)
    trained = exported(odt, plan, saved)
    tuned = import_model(Path("tuned.onnx")).constants
    order = best()
    changed = {"c2.weight": order["c1:1"][:2], "fc.weight": order["c2:1"][:4]}
    for name, channels in changed.items():
        moved = (tuned[name] != file[name]).reshape(file[name].shape[0], CHANNELS, -1)
        assert np.flatnonzero(moved.any((0, 2))).tolist() == sorted(channels)
    for name in file:
        assert np.array_equal(tuned[name], saved.get(name, file[name]))
    given = random_samples(trained.training, np.random.default_rng(0))
    got, old = runtime(Path("tuned.onnx"), given)[0], runtime(labelled, given)[0]
    assert np.abs(got - old).max() > 1e-2 * np.abs(old).max()


def test_a_step_is_that_of_the_same_channels_of_the_file(odt: Cli, labelled: Path) -> None:
    """Half of the channels in an order that has them in front is what a mask leaves of a step."""
    plan = planned(odt, labelled)
    trained = Runtime(plan, rebuild(plan, PLAN))
    plain = planned(odt, labelled, "--importance", "prior", train=("--train", "all"))
    whole = Runtime(plain, rebuild(plain, PLAN))
    before = whole.params()
    x, y = learnable()
    for r in (trained, whole):
        r.train_step({"x": x[:1]}, {"y": y[:1]}, 0.1)
    order, one, all_of_it = best(), trained.params(), whole.params()
    for name, channels, each in (("c2.weight", order["c1:1"][:2], 1), ("fc.weight",
                                 order["c2:1"][:4], SIZE * SIZE)):  # fmt: skip
        kept = np.zeros(CHANNELS, bool)
        kept[list(channels)] = True
        mask = np.repeat(kept, each).reshape(1, -1, *(1,) * (before[name].ndim - 2))
        assert_close(one[name], np.where(mask, all_of_it[name], before[name]))
        assert np.array_equal(one[name][:, ~mask.ravel()], before[name][:, ~mask.ravel()])


def test_weights_of_another_order_can_be_loaded(odt: Cli, labelled: Path) -> None:
    """Saved weights and changes know the file alone, so plans with other orders share them."""
    plan = planned(odt, labelled)
    saved = learn(odt)
    assert odt("export", PLAN, "w.npz", "--delta", "-o", "d.npz").code == 0
    with np.load("d.npz") as changes:
        for name, a in changes.items():
            assert_close(small().constants[name] + a, saved[name])
    train = ("--train", "c2.weight,c2.bias,fc.weight,fc.bias")
    other = planned(odt, labelled, "--importance", "prior", train=train)
    assert plan.model.channels
    assert not other.model.channels
    done = odt("export", PLAN, "w.npz", "-o", "other.onnx", "--json")
    assert done.code == 0, done.err
    for name, a in saved.items():
        assert np.array_equal(import_model(Path("other.onnx")).constants[name], a)


@needs_gcc
def test_c_learns_the_same_to_the_bit(odt: Cli, labelled: Path) -> None:
    plan = planned(odt, labelled, "--emit", "host")
    assert {*plan.model.channels} == {"c1:1", "c2:1"}
    given = ("run", PLAN, "--data", "labelled.npz", "--epochs", "4", "--lr", "0.02")
    wanted = odt(*given, "--exact", "--json", "--save", "numpy.npz").json
    assert odt(*given, "--c-session", "session.bin").code == 0
    sources = [f for f in Path("out").glob("*.c") if not f.stem.endswith("_selftest")]
    link(["gcc", *lane.STRICT, *lane.OPTIMISED], sources, [], Path("host"))
    done = subprocess.run(["./host", "session.bin", "learned.bin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["loss"] for line in told if "update" in line] == wanted["losses"]
    for weights, target in (("learned.bin", "c.onnx"), ("numpy.npz", "numpy.onnx")):
        assert odt("export", PLAN, weights, "-o", target).code == 0
    assert Path("c.onnx").read_bytes() == Path("numpy.onnx").read_bytes()


def test_integer_layers_and_their_scales(odt: Cli, tmp_path: Path) -> None:
    """A plan of i8 layers, calibrated: scales per channel stand in the file's order in the plan."""
    path = export(NETS["resnet"](), tmp_path)
    (v,) = import_model(path).inputs
    rng = np.random.default_rng(0)
    x = floats(rng, 24, *v.type.shape[1:])
    np.savez("labelled.npz", x=x, y=rng.integers(0, 3, 24).astype(np.int32))
    weights = [n for n, a in import_model(path).constants.items() if a.ndim == 4][1:]
    train = ",".join(f"{n}=0.5" for n in weights)
    common = ("--calib", "labelled.npz", "--train", train, "-q", "-o", "out")
    scales = {}
    for importance in ("prior", "fisher"):
        given = ("--importance", importance, "--precision", "*=i8")
        done = odt(path, *LIMITS, *common, *given)
        assert done.code == 0, done.err
        plan = load_plan(PLAN)
        scales[importance] = plan.quantization
        assert bool(plan.model.channels) == (importance == "fisher")
    assert scales["fisher"] == scales["prior"]
    training = rebuild(plan, PLAN)
    assert any(u.value.type.dtype == "i8" and u.candidate.channels for u in training.updates)
    assert odt("verify", PLAN).code == 0
    saved = learn(odt)
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx", "--json")
    assert done.code == 0, done.err
    file, tuned = (import_model(p).constants for p in (path, Path("tuned.onnx")))
    for u in updates_of(plan):
        orders = training.graph.orders.get(u.param)
        moved = (tuned[u.param] != file[u.param]).any((0, 2, 3))
        assert u.channels is not None
        chosen = np.arange(len(moved)) if orders is None or orders[1] is None else orders[1]
        assert set(np.flatnonzero(moved)) <= set(chosen[: u.channels].tolist())
        assert np.any(saved[u.param] != 0)
    assert any(np.any(tuned[u.param] != file[u.param]) for u in updates_of(plan))


@pytest.mark.parametrize(
    ("net", "option", "train"),
    [
        (small, "--lora", "c2.weight=0.25,c1.weight.lora_A,c1.weight.lora_B"),
        (small, "--lora", "c2.weight=0.25,fc.weight.lora_A,fc.weight.lora_B"),
        (nets.resnet, "--lite-residual", "lite,b0.conv2.weight=0.5,fc.weight=0.5"),
    ],
)
def test_what_stands_beside_layers_follows_their_channels(
    odt: Cli, tmp_path: Path, net: Callable[[], Graph], option: str, train: str
) -> None:
    path = export(net(), tmp_path)
    (v,) = import_model(path).inputs
    rng = np.random.default_rng(0)
    x, y = floats(rng, 24, *v.type.shape[1:]), rng.integers(0, 3, 24).astype(np.int32)
    np.savez("labelled.npz", x=x, y=y)
    more = ("--importance", "fisher", option, "3")
    plan = planned(odt, path, *more, train=("--train", train))
    assert plan.model.channels
    beside = {n for n in rebuild(plan, PLAN).graph.orders if ".lora_" in n or ".lite_" in n}
    assert beside == ({"c1.weight.lora_B"} if "c1" in train else set())
    saved = learn(odt)
    trained = exported(odt, plan, saved)
    given = random_samples(trained.training, np.random.default_rng(0))
    plain = planned(odt, path, *more, train=("--train", ",".join({p.partition("=")[0] for p in
                    train.split(",")})))  # fmt: skip
    assert not plain.model.channels
    other = Runtime(plain, rebuild(plain, PLAN))
    other.set_params(saved)
    assert_close(other.infer(given), trained.infer(given))


def test_blocks_that_run_by_rows_know_the_order(tmp_path: Path) -> None:
    graph = calibrated("mobile")
    plain, low = lowered(graph), lowered(reordered(graph, shuffled(graph)))
    names = [b.name for b in blocks(low)]
    assert names
    by_rows = stream(low, names)
    feeds = sample(graph)
    (name,) = (v.name for v in graph.outputs)
    assert np.array_equal(run(by_rows, feeds)[name], run(plain, feeds)[name])
    for n in by_rows.constants:
        back = in_file_order(by_rows.constants[n], by_rows.orders.get(n, ()))
        assert np.array_equal(back, plain.constants[n]) or n not in low.orders


def test_contributions_are_of_the_channels_that_are_updated(
    odt: Cli, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No channel is trained alone: they stand by the scores of the default, parts are of these."""
    from odt_plan import contributions

    monkeypatch.setattr(contributions, "cores", lambda: 1)
    seen: list[Array] = []
    measure = contributions.contribution

    def watching(forward: Graph, *rest: Any) -> float:
        seen.append(forward.constants["c2.weight"])
        return measure(forward, *rest)

    monkeypatch.setattr(contributions, "contribution", watching)
    plan = planned(odt, labelled, "--importance", "contribution")
    assert plan.model.channels == best()
    c1, c2 = (list(best()[n]) for n in ("c1:1", "c2:1"))
    assert seen
    assert all(np.array_equal(w, small().constants["c2.weight"][c2][:, c1]) for w in seen)


def test_a_fresh_head_reads_ordered_channels(odt: Cli, labelled: Path) -> None:
    with np.load("labelled.npz") as d:
        np.savez("labelled.npz", x=d["x"], y=(d["y"] % 3).astype(np.int32))
    plan = planned(odt, labelled, "--head", "3")
    assert "c2:1" in plan.model.channels
    saved = learn(odt)
    exported(odt, plan, saved)


def test_adapters_beside_weights_that_the_file_rounds(odt: Cli, tmp_path: Path) -> None:
    """What the written file computes is told from a graph of merged weights."""
    rng = np.random.default_rng(0)
    weights = {"h": floats(rng, 6, 8).astype(np.float16), "w": floats(rng, 8, 7)}
    weights["bias"] = floats(rng, 8)
    nodes = [
        *(node("Cast", "h", "c", to=1), node("MatMul", "x c", "a0"), node("Add", "a0 bias", "a")),
        node("Relu", "a", "r"),
        *(node("MatMul", "r w", "b"), node("Relu", "b", "s"), node("MatMul", "s u", "y")),
    ]
    path = save(model(nodes, {"x": [1, 6]}, ["y"], weights | {"u": floats(rng, 7, 3)}), tmp_path)
    y = rng.integers(0, 3, 24).astype(np.int32)
    np.savez("labelled.npz", x=floats(rng, 24, 6), y=y)
    names = [a.params for a in import_model(path, ImportOptions(lora=Lora(2, 2.0))).adapters]
    train = ("--train", ",".join(("w=0.5", *names[0])))
    plan = planned(odt, path, "--importance", "fisher", "--lora", "2", train=train)
    assert len(plan.model.channels) == 1
    learn(odt)
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx", "--json")
    assert done.code == 0, done.err
    assert done.json["rounded"]
    assert {*done.json["changed"]} == {"h", "w"}


def test_heads_of_an_attention_are_permuted_inside_alike(tmp_path: Path) -> None:
    rng, size, heads = np.random.default_rng(0), 8, 2
    weights: dict[str, Array] = {n: floats(rng, size, size) for n in "qkvo"}
    weights |= {"split": np.array([1, 5, heads, size // heads]), "join": np.array([1, 5, size])}
    nodes = []
    for n, perm in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
        nodes += [node("MatMul", f"x {n}", f"{n}1"), node("Reshape", f"{n}1 split", f"{n}2"),
                  node("Transpose", f"{n}2", f"{n}3", perm=perm)]  # fmt: skip
    nodes += [
        *(node("MatMul", "q3 k3", "a"), node("Softmax", "a", "b"), node("MatMul", "b v3", "c")),
        *(node("Transpose", "c", "d", perm=(0, 2, 1, 3)), node("Reshape", "d join", "e")),
        node("MatMul", "e o", "y"),
    ]
    path = save(model(nodes, {"x": [1, 5, size]}, ["y"], weights), tmp_path)
    graph = import_model(path)
    assert sorted(map(sorted, tied(graph).values())) == [
        [("k", 1), ("q", 1)],
        [("o", 0), ("v", 1)],
    ]
    assert {(c.size, m.before, m.behind) for c in channel_classes(graph) for m in c.members
            if m.value in weights} == {(4, heads, 1)}  # fmt: skip
    feeds = sample(graph)
    got = run(reordered(graph, shuffled(graph)), feeds)[graph.outputs[0].name]
    assert_close(got, runtime(path, feeds)[0])


def test_a_weight_that_two_layers_share(tmp_path: Path) -> None:
    """Both have the same order, or the one that the file has."""
    rng = np.random.default_rng(0)
    weights = {"w": floats(rng, 6, 6), "u": floats(rng, 5, 6), "h": floats(rng, 6, 3)}
    nodes = [
        *(node("MatMul", "x u", "a"), node("MatMul", "a w", "b"), node("Relu", "b", "c")),
        *(node("MatMul", "c w", "d"), node("Relu", "d", "e"), node("MatMul", "e h", "y")),
    ]
    path = save(model(nodes, {"x": [1, 5]}, ["y"], weights), tmp_path)
    graph = import_model(path, ImportOptions())
    feeds = sample(graph)
    other = reordered(graph, shuffled(graph))
    assert_close(run(other, feeds)["y"], runtime(path, feeds)[0])
