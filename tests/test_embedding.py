"""Models whose input are indices: from the file to trained tables, in NumPy and in C alike."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import plans
import pytest
from board import lane
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_files import Array, floats, model, node, runtime, save
from oracle import Unconstrained
from test_c_backend import reference, samples

from odt_plan.backends.c import emit_c
from odt_plan.backends.c.golden import random_sample
from odt_plan.backends.numpy import Runtime, train
from odt_plan.ir.autodiff import build_training
from odt_plan.ir.calibrate import calibrate
from odt_plan.ir.candidates import param_slots
from odt_plan.ir.errors import UnsupportedModelError, UsageError
from odt_plan.ir.grad_builder import GradBuilder
from odt_plan.ir.graph import Graph, TensorType
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.indices import tables_of
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.opdef import get_op
from odt_plan.ir.training import TrainingGraph, TrainingSpec
from odt_plan.planner.check import check
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
WORDS, WIDTH, LENGTH, CLASSES = 50, 8, 6, 3


def tokens(folder: Path, kind: int = TensorProto.INT64) -> Path:
    """Tokens -> table -> a dense layer -> mean -> classes."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Gather", "table ids", "words", "embed"),
        node("MatMul", "words w", "mixed"),
        node("Tanh", "mixed", "h"),
        node("ReduceMean", "h", "mean", axes=[1], keepdims=0),
        node("Gemm", "mean v b", "y", "head"),
    ]
    constants = {
        "table": floats(rng, WORDS, WIDTH),
        "w": floats(rng, WIDTH, WIDTH),
        "v": floats(rng, WIDTH, CLASSES),
        "b": floats(rng, CLASSES),
    }
    proto = model(nodes, {"ids": ["N", LENGTH]}, ["y"], constants, dtype=kind)
    return save(proto, folder)


def categories(folder: Path) -> Path:
    """Columns of categories, each with a table of its own, joined to features."""
    rng = np.random.default_rng(1)
    nodes, constants = [], {}
    sizes = (7, 3, 11)
    nodes.append(node("Split", "ids", "i0 i1 i2", axis=1, num_outputs=3))
    for i, size in enumerate(sizes):
        constants[f"t{i}"] = floats(rng, size, 4)
        nodes.append(node("Gather", f"t{i} i{i}", f"e{i}"))
    constants["shape"] = np.array([0, -1])
    constants["w"] = floats(rng, CLASSES, 12)
    nodes += [
        node("Concat", "e0 e1 e2", "e", axis=2),
        node("Reshape", "e shape", "f"),
        node("Gemm", "f w", "y", transB=1),
    ]
    proto = model(nodes, {"ids": ["N", 3]}, ["y"], constants, opset=18, dtype=TensorProto.INT32)
    return save(proto, folder)


def last_token(folder: Path, *, pairs: bool = False) -> Path:
    """The row of the last token that is no padding, as GPT-2 finds it; ids may be negative.

    With ``pairs`` it is looked up by batch and position, else by position in the flat rows.
    """
    rng = np.random.default_rng(4)
    i64, rows = np.int64, np.arange(2, dtype=np.int64)[:, None]
    nodes = [
        node("Less", "ids zero", "negative"),
        node("Add", "ids count", "behind"),
        node("Where", "negative behind ids", "at"),
        node("Gather", "table at", "words", "embed"),
        node("MatMul", "words w", "h"),
        node("Equal", "at padding", "equal"),
        node("Not", "equal", "kept"),
        node("Cast", "kept", "ones", to=TensorProto.INT64),
        node("Mul", "places ones", "used"),
        node("ArgMax", "used", "last", axis=1, keepdims=0),
    ]
    if pairs:
        nodes += [
            node("Unsqueeze", "last one", "column"),
            node("Concat", "rows column", "pair", axis=1),
            node("GatherND", "h pair", "y", "pick"),
        ]
    else:
        nodes += [
            node("Reshape", "h flat", "all"),
            node("Add", "last begin", "row"),
            node("Gather", "all row", "y", "pick"),
        ]
    constants = {
        "table": floats(rng, WORDS, WIDTH), "w": floats(rng, WIDTH, CLASSES),
        "zero": np.array(0, i64), "count": np.array(WORDS, i64), "padding": np.array([7], i64),
        "places": np.arange(LENGTH, dtype=i64), "one": np.array([1], i64), "rows": rows,
        "begin": np.array([0, LENGTH], i64), "flat": np.array([-1, CLASSES], i64),
    }  # fmt: skip
    used = {i for n in nodes for i in n.input}
    given_ = {k: a for k, a in constants.items() if k in used}
    return save(model(nodes, {"ids": [2, LENGTH]}, ["y"], given_, dtype=TensorProto.INT64), folder)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> PlannedModel:
    path = tokens(tmp_path_factory.mktemp("tokens"))
    device = load_device("stm32f746g-disco")
    return make_plan(Request(path, device, train=("all",), with_baselines=False))


@pytest.mark.parametrize("kind", [TensorProto.INT32, TensorProto.INT64])
def test_result_is_that_of_onnxruntime(kind: int, tmp_path: Path) -> None:
    path = tokens(tmp_path, kind)
    graph = import_model(path, ImportOptions(batch=2))
    assert graph.inputs[0].type == TensorType((2, LENGTH), "i32")
    ids = np.random.default_rng(2).integers(-WORDS, WORDS, (2, LENGTH))
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    (want,) = runtime(path, {"ids": ids.astype(dtype)})
    got = run(graph, {"ids": ids.astype(np.int32)})[graph.outputs[0].name]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_table_is_trained_and_never_has_a_whole_gradient(planned: PlannedModel) -> None:
    """All of the plan is replayed; rows of the table's gradient are made a few at a time."""
    assert {u.candidate.param for u in planned.training.updates} == {"table", "w", "v", "b"}
    (table,) = (u for u in planned.training.updates if u.candidate.param == "table")
    assert table.tile_bytes <= 512 < table.grad.type.nbytes
    device = load_device("stm32f746g-disco")
    assert check(planned.plan, planned.training, device).cycles == planned.plan.claims.cycles
    oracle = Unconstrained(planned.training)
    learner = Runtime(planned.plan, planned.training)
    rng = np.random.default_rng(3)
    for _ in range(4):
        ids = random_sample(planned.training.graph, planned.training.sample, rng)
        label = rng.integers(0, CLASSES, 1)
        assert learner.train_step(ids, label, 0.1) == oracle.step(ids, label.astype("i4"), 0.1)
    assert learner.state_bytes() == oracle.state_bytes(planned.plan)


def test_a_step_is_that_of_torch(planned: PlannedModel) -> None:
    """Repeated and negative tokens add up in one row; rows that were not read stay."""
    torch = pytest.importorskip("torch")
    training = planned.training
    ids, label, rate = np.array([[3, 7, 3, -1, 49, 3]]), 2, 0.5
    learner = Runtime(planned.plan, training)
    before = learner.params()
    leaves = {k: torch.tensor(before[k], requires_grad=True) for k in ("table", "w", "v", "b")}
    h = torch.tanh(leaves["table"][ids % WORDS] @ leaves["w"]).mean(1)
    loss = torch.nn.functional.cross_entropy(h @ leaves["v"] + leaves["b"], torch.tensor([label]))
    loss.backward()
    assert learner.train_step(ids, [label], rate) == pytest.approx(loss.item(), rel=1e-5)
    after = learner.params()
    for name, leaf in leaves.items():
        want = before[name] - rate * leaf.grad.numpy()
        np.testing.assert_allclose(after[name], want, rtol=1e-4, atol=1e-6)
    untouched = sorted(set(range(WORDS)) - {3, 7, 49})
    assert np.array_equal(after["table"][untouched], before["table"][untouched])
    assert not np.array_equal(after["table"][3], before["table"][3])


def test_it_learns(planned: PlannedModel) -> None:
    """The class is that of the first token."""
    rng = np.random.default_rng(5)
    x = rng.integers(0, WORDS, (200, LENGTH))
    history = train(
        Runtime(planned.plan, planned.training), x, x[:, 0] % CLASSES, steps=600, lr=0.1
    )
    assert np.mean(history.losses[-100:]) < 0.7 * np.mean(history.losses[:100])


def _trained(path: Path) -> tuple[Any, TrainingGraph]:
    forward = import_model(path, ImportOptions(batch=2))
    training = build_training(forward, TrainingSpec(optimizer="momentum"), plans.whole(forward))
    return plans.keep_all(training), training


@pytest.mark.parametrize("pairs", [False, True])
def test_integers_that_are_computed(pairs: bool, tmp_path: Path) -> None:
    """Comparisons, sums and choices of ids, and what is looked up by them; they are not trained.

    Any id of the table is taken, and no other.
    """
    path = last_token(tmp_path, pairs=pairs)
    graph = import_model(path, ImportOptions(batch=2))
    ids = np.random.default_rng(6).integers(-WORDS, WORDS, (2, LENGTH))
    for padding in range(LENGTH):
        ids[0, padding:] = 7
        (want,) = runtime(path, {"ids": ids})
        got = run(graph, {"ids": ids.astype(np.int32)})[graph.outputs[0].name]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert set(param_slots(graph)) == {"table", "w"}
    tables = tables_of(graph, graph.inputs[0])
    assert tables is not None
    assert (tables.entries == WORDS).all()
    values = {v for n in graph.nodes if n.op in ("ToReal", "Add") for v in n.outputs}
    calibrate(graph, None)
    assert not {v.name for v in values} & set(graph.quantization)
    assert any(n.out.name in graph.quantization for n in graph.nodes if n.op == "Gemm")


@pytest.mark.parametrize(
    ("node_", "reason"),
    [
        (node("Mul", "ids large", "i"), r"its integers may be -50000000 to 49000000; only those"),
        (node("Less", "ids huge", "i"), r"operand huge is .* 17179869184, beyond 16777216"),
        (node("Add", "ids none", "i"), "joins the integers ids with operands that are none"),
        (node("Div", "at large", "i"), r"computes with the integers at, which depend on the data"),
        (node("Cast", "h", "i", to=TensorProto.INT64), "none that may drop a fraction"),
    ],
)
def test_integers_that_are_not_exact(node_: Any, reason: str, tmp_path: Path) -> None:
    proto = onnx.load(last_token(tmp_path))
    constants = {"large": np.array(10**6), "huge": np.array(2**34), "none": np.zeros(0, np.int64)}
    nodes = [n for n in proto.graph.node if n.name != "pick"]
    nodes += [node_, node("Gather", "all i", "y", "pick")]
    for name in set(node_.input) & set(constants):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(constants[name], name))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    with pytest.raises(UnsupportedModelError, match=reason):
        import_model(save(proto, tmp_path), ImportOptions(batch=2))


@needs_gcc
@pytest.mark.parametrize("make", [tokens, categories, last_token])
def test_c_trains_to_the_same_bits(make: Any, tmp_path: Path) -> None:
    plan, training = _trained(make(tmp_path))
    assert {u.candidate.param for u in training.updates} >= {"w"}
    assert any(u.grad_node is not None and u.grad_node.op == "GatherGrad" for u in training.updates)
    name = emit_c(plan, training, tmp_path / "c")[0].stem
    program = lane.build_host(tmp_path / "c", name)
    result = lane.run_host(program, lane.training_input(*samples(training, 5), 0.05))
    assert result.exit_code == 0, result.stdout
    assert result.value("selftest_exact") == 1
    assert result.files["output.bin"] == reference(plan, training, 5, 0.05)


@needs_gcc
@pytest.mark.parametrize("make", [tokens, categories])
def test_c_refuses_indices_outside(make: Any, tmp_path: Path) -> None:
    """Each column has the limits of its own table; both ends of the table are taken."""
    plan, training = _trained(make(tmp_path))
    name = emit_c(plan, training, tmp_path / "c")[0].stem
    size = training.sample.type.size
    limits = [WORDS] * size if make is tokens else [7, 3, 11] * 2
    main = tmp_path / "main.c"
    main.write_text(
        f'#include "{name}.h"\n#include "board.h"\n'
        f"static const int32_t limits[] = {{{', '.join(map(str, limits))}}};\n"
        f"static {name}_t net;\n"
        f"int main(void) {{\n    int32_t i, x[{size}] = {{0}}, labels[2] = {{0, 0}};\n"
        f'    board_value("init", (uint32_t){name}_init(&net));\n'
        f"    for (i = 0; i < {size}; i++) {{\n"
        "        int32_t k;\n"
        "        const int32_t tried[4] = {limits[i] - 1, -limits[i], limits[i], -limits[i] - 1};\n"
        "        for (k = 0; k < 4; k++) {\n"
        "            x[i] = tried[k];\n"
        f'            board_value("infer", (uint32_t){name}_infer(&net, x, NULL));\n'
        f'            board_value("train",'
        f" (uint32_t){name}_train_step(&net, x, labels, 0.0f, NULL));\n"
        "        }\n        x[i] = 0;\n    }\n    board_exit(0);\n    return 0;\n}\n"
    )
    result = lane.run_host(lane.build_host(tmp_path / "c", name, main=main), {})
    assert result.exit_code == 0, result.stdout
    codes = [int(v, 0) for k, v in _values(result.stdout) if k in ("infer", "train")]
    assert codes == [0, 0, 0, 0, 9, 9, 9, 9] * size


def _values(text: str) -> list[tuple[str, str]]:
    lines = (line.replace("=", " ").split() for line in text.splitlines())
    return [(line[0], line[-1]) for line in lines if len(line) > 1]


def test_indices_outside_are_one_line(planned: PlannedModel, tmp_path: Path) -> None:
    learner = Runtime(planned.plan, planned.training)
    x = np.zeros((4, LENGTH), np.int64)
    x[2, 1] = WORDS
    before = learner.state_bytes()
    message = "sample {} has the index 50, but embed reads a table of 50 entries, 0 to 49"
    for sample, act in (
        (0, lambda: learner.infer(x[2:3])),
        (0, lambda: learner.train_step(x[2:3], [0], 0.1)),
        (2, lambda: train(learner, x, np.zeros(4, int), steps=1, lr=0.1)),
    ):
        with pytest.raises(UsageError, match=message.format(sample)) as e:
            act()
        assert "\n" not in str(e.value)
    assert learner.state_bytes() == before
    with pytest.raises(UsageError, match=r"float64.*the plan needs i32"):
        learner.infer(np.zeros((1, LENGTH)))
    plan, training = _trained(categories(tmp_path))
    wrong = np.array([[6, 2, 10], [6, 3, 10]])
    with pytest.raises(UsageError, match=r"sample 1 has the index 3, but \w+ reads a table of 3"):
        Runtime(plan, training).infer(wrong)
    Runtime(plan, training).infer(wrong[[0, 0]])
    graph = import_model(tokens(tmp_path))
    with pytest.raises(UsageError, match=r"node embed: index -51 at position 2 is not in -50..49"):
        run(graph, {"ids": np.array([[0, 1, -51, 0, 0, 0]], np.int32)})


def test_other_integer_inputs_are_refused(tmp_path: Path) -> None:
    """Only what Gather reads is an index; a position that is computed is no prediction."""
    proto = model([node("Relu", "x", "y")], {"x": [1, 4]}, ["y"], dtype=TensorProto.INT64)
    with pytest.raises(
        UnsupportedModelError, match=r"x .input.: is int64; only float32 inputs, in"
    ):
        import_model(save(proto, tmp_path))
    proto = onnx.load(tokens(tmp_path))
    proto.graph.node.append(node("ArgMax", "y", "best", axis=1, keepdims=0))
    proto.graph.output[0].name = "best"
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    forward = import_model(save(proto, tmp_path))
    got = run(forward, {"ids": np.zeros((1, LENGTH), np.int32)})
    assert got["best"].tolist() == [int(got["y"].argmax())]
    with pytest.raises(UnsupportedModelError, match=r"the prediction best is i32.*no loss"):
        build_training(forward, TrainingSpec(), plans.whole(forward))


def test_positions_that_are_computed_read_a_table(tmp_path: Path) -> None:
    """ArgMax hands no gradient on, the table behind it is trained."""
    rng = np.random.default_rng(0)
    constants = {"w": floats(rng, 4, 5), "table": floats(rng, 5, 3)}
    nodes = [
        node("MatMul", "x w", "scores"),
        node("ArgMax", "scores", "best", axis=1, keepdims=0),
        node("Gather", "table best", "y"),
    ]
    forward = import_model(save(model(nodes, {"x": [2, 4]}, ["y"], constants), tmp_path))
    assert set(param_slots(forward)) == {"w", "table"}
    (table,) = (c for c in plans.whole(forward) if c.param == "table")
    training = build_training(forward, TrainingSpec(), [table])
    assert [n.op for n in training.graph.nodes if n.phase == "backward"][-1] == "GatherGrad"
    with pytest.raises(UsageError, match="the loss does not depend on w"):
        build_training(forward, TrainingSpec(), plans.whole(forward))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_gather_on_any_axis(data: st.DataObject) -> None:
    """Result and gradient of the table in float64, with repeated and negative indices."""
    torch = pytest.importorskip("torch")
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    form = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    size = shape[axis]
    index = rng.integers(-size, size, form).astype(np.int32)
    x, graph = rng.standard_normal(shape), Graph("gather")
    operands = (
        graph.add_input("x", TensorType(shape)),
        graph.add_input("i", TensorType(form, "i32")),
    )
    forward = graph.add_node("Gather", operands, {"axis": axis}, name="y")
    dy = graph.add_input("dy", forward.out.type)
    vjp = get_op("Gather").vjp
    assert vjp is not None
    dx = vjp(GradBuilder(graph, forward, {}), forward, dy, (True, False))[0]
    assert dx is not None
    given_: Array = rng.standard_normal(dy.type.shape)
    got = run(graph, {"x": x, "i": index, "dy": given_})
    leaf = torch.tensor(x, requires_grad=True)
    at = torch.tensor(index.reshape(-1) % size, dtype=torch.long)
    want = leaf.index_select(axis, at).reshape(dy.type.shape)
    want.backward(torch.tensor(given_))
    np.testing.assert_array_equal(got["y"], want.detach().numpy())
    np.testing.assert_allclose(got[dx.name], leaf.grad.numpy(), rtol=1e-12, atol=1e-12)
