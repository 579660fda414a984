"""Blocks streamed by rows: equal to their layers bit for bit, found and put into graphs."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plans
import pytest
from board import lane
from board.kernels import run_kernels
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from odt_plan.backends.c import emit_c
from odt_plan.backends.numpy import Runtime
from odt_plan.ir.autodiff import build_training
from odt_plan.ir.errors import GraphError, UnsupportedModelError, UsageError
from odt_plan.ir.graph import Attr, Graph, Node, TensorType, Value
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.opdef import Work, get_op, operand, works
from odt_plan.ir.ops.streamed import block_node
from odt_plan.ir.precision import all_i8, lower
from odt_plan.ir.quantization import Quantization, fixed_points
from odt_plan.ir.streaming import blocks, stream
from odt_plan.ir.training import Candidate, TrainingSpec
from odt_plan.planner.check import check
from odt_plan.planner.device import load_device
from odt_plan.planner.tensors import Storage

Array = NDArray[Any]
SHARED = Path(os.environ.get("ODT_PLAN_SHARED", "/nonexistent")) / "models"
NETWORKS = ("mcunet-5fps", "mbv2-w0.35", "proxyless-w0.3")


class Net:
    """An integer network with random constants."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.graph, self.rng = Graph("net"), np.random.default_rng(seed)
        self.x = self.graph.add_input("x", TensorType(shape, "i8", Quantization((0.05,), -3)))

    def conv(
        self,
        name: str,
        x: Value,
        filters: int,
        kernel: int = 1,
        stride: int = 1,
        pads: tuple[int, ...] = (0, 0, 0, 0),
        group: int = 1,
        dilation: int = 1,
    ) -> Value:
        g, rng = self.graph, self.rng
        shape = (filters, x.type.shape[1] // group, kernel, kernel)
        scales = tuple(float(s) for s in rng.uniform(0.005, 0.02, filters))
        quant = Quantization(scales, 0, 0)
        w = g.add_constant(f"{name}.w", rng.integers(-127, 128, shape).astype(np.int8), "i8", quant)
        b = g.add_constant(f"{name}.b", rng.integers(-3000, 3000, filters).astype(np.int32))
        factors = fixed_points(rng.uniform(0.01, 0.03, filters) / np.sqrt(np.prod(shape[1:])))
        m, s = (g.add_constant(f"{name}.{k}", v) for k, v in zip("ms", factors, strict=True))
        attrs: dict[str, Attr] = {
            "strides": (stride, stride),
            "pads": pads,
            "group": group,
            "dilations": (dilation, dilation),
            "out_scale": 0.05,
            "out_zero_point": int(rng.integers(-20, 20)),
            "clamp": (-110, 120),
        }
        return g.add_node("QConv", (x, w, b, m, s), attrs, name=name).out

    def add(self, name: str, a: Value, b: Value) -> Value:
        attrs: dict[str, Attr] = {"out_scale": 0.07, "out_zero_point": 5, "clamp": (-128, 127)}
        return self.graph.add_node("QAdd", (a, b), attrs, name=name).out

    def done(self, y: Value) -> Graph:
        self.graph.outputs = [y]
        self.graph.verify()
        return self.graph

    def sample(self) -> dict[str, Array]:
        return {"x": self.rng.integers(-128, 128, self.x.type.shape).astype(np.int8)}


def classifier() -> Net:
    """A stem block, a strided block, a residual block, a head that can be trained."""
    net = Net((1, 3, 20, 20))
    stem = net.conv("stem", net.x, 8, 3, 2, (1, 1, 1, 1))
    y = net.conv("p0", net.conv("d0", stem, 8, 3, 1, (1, 1, 1, 1), 8), 4)
    y = net.conv("p1", net.conv("d1", net.conv("e1", y, 12), 12, 5, 2, (2, 2, 2, 2), 12), 6)
    z = net.conv("p2", net.conv("d2", net.conv("e2", y, 18), 18, 3, 1, (1, 1, 1, 1), 18), 6)
    g, y = net.graph, net.add("a2", z, y)
    y = g.add_node("Dequantize", (y,), name="real").out
    y = g.add_node("GlobalAveragePool", (y,), name="pool").out
    y = g.add_node("Reshape", (y,), {"shape": (1, 6)}, name="flat").out
    w = g.add_constant("head.w", net.rng.standard_normal((6, 4)).astype(np.float32))
    net.done(g.add_node("Gemm", (y, w), name="head").out)
    return net


def equal(net: Net, streamed: Graph) -> None:
    feeds = net.sample()
    want, got = run(net.graph, feeds), run(streamed, feeds)
    for name in got:
        assert np.array_equal(got[name], want[name]), name


# --- the operator ---------------------------------------------------------------------------------


@st.composite
def nets(draw: st.DrawFn) -> Net:
    """One block of any geometry."""
    size = st.integers(3, 14)
    channels = draw(st.integers(1, 5))
    net = Net((1, channels, draw(size), draw(size)), draw(st.integers(0, 99)))
    x, first = net.x, draw(st.sampled_from(("none", "pointwise", "stem")))
    if first == "pointwise":
        x = net.conv("first", x, draw(st.integers(2, 9)))
    elif first == "stem":
        kernel = draw(st.sampled_from((2, 3, 5)))
        pads = tuple(draw(st.integers(0, kernel // 2)) for _ in range(4))
        assume(min(x.type.shape[2:]) >= kernel)
        x = net.conv("first", x, draw(st.integers(2, 9)), kernel, draw(st.integers(1, 3)), pads)
    channels = x.type.shape[1]
    assume(channels > 1)
    kernel = draw(st.sampled_from((1, 2, 3, 5, 7)))
    residual = first != "stem" and draw(st.booleans())
    same = (kernel - 1) // 2
    pads = (same, same, kernel - 1 - same, kernel - 1 - same)
    stride = dilation = 1
    if not residual:
        stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        pads = tuple(draw(st.integers(0, kernel - 1)) for _ in range(4))
    reach = (kernel - 1) * dilation + 1
    assume(all(x.type.shape[2 + i] + pads[i] + pads[2 + i] >= reach for i in (0, 1)))
    x = net.conv("depthwise", x, channels, kernel, stride, pads, channels, dilation)
    y = net.conv("project", x, net.x.type.shape[1] if residual else draw(st.integers(1, 6)))
    net.done(net.add("add", net.x, y) if residual else y)
    assume(net.x.type.shape != y.type.shape or first == "pointwise" or residual)
    return net


@settings(max_examples=150, deadline=None)
@given(nets(), st.integers(1, 5))
def test_equals_the_separate_layers(net: Net, rows: int) -> None:
    chain = net.graph.nodes
    rows = min(rows, net.graph.outputs[0].type.shape[2])
    node = block_node("block", chain, rows)
    (t,) = get_op("StreamedBlock").infer(node)
    assert t == net.graph.outputs[0].type
    node.outputs = (Value("y", t, node),)
    feeds = net.sample()
    env = run(net.graph, feeds)
    data = [None if v is None else env[v.name] for v in node.inputs]
    (got,) = get_op("StreamedBlock").kernel(node, data)
    assert np.array_equal(got, env[net.graph.outputs[0].name])


def block(net: Net, rows: int = 1) -> Node:
    """A network's layers as one node of a graph."""
    node = block_node("block", net.graph.nodes, rows)
    return net.graph.add_node("StreamedBlock", node.inputs, node.attrs, name="block")


def residual() -> Net:
    net = Net((1, 4, 6, 5))
    d = net.conv("d", net.conv("e", net.x, 8), 8, 3, 1, (1, 1, 1, 1), 8)
    net.done(net.add("a", net.x, net.conv("p", d, 4)))
    return net


def test_workspace_by_hand() -> None:
    """Lines, then the larger of both halves of the work."""
    node = block(residual(), rows=2)
    lines = 8 * 4 * 5
    expand = 4 * 5 + 8 * 5 + get_op("QConv").workspace(_layer("e"))
    outputs = 8 * 2 * 5 + max(
        get_op("QConv").workspace(_layer("d")), 4 * 2 * 5 + get_op("QConv").workspace(_layer("p"))
    )
    assert get_op("StreamedBlock").workspace(node) == lines + max(expand, outputs)


def _layer(name: str) -> Node:
    return next(n for n in residual().graph.nodes if n.name == name)


def test_work_is_that_of_the_rows_and_the_copies() -> None:
    """Six rows: one by one, or as four and two."""

    def kernel(shape: tuple[int, ...], filters: int, *geometry: Any) -> tuple[Work, ...]:
        net = Net(shape)
        node = net.conv("rows", net.x, filters, *geometry).producer
        assert node is not None
        return works(node)

    def times(n: int, parts: tuple[Work, ...]) -> list[Work]:
        fields = ("amount", "loops", "passes", "outputs")
        return [replace(w, **{f: n * getattr(w, f) for f in fields}) for w in parts]

    depthwise = (3, 1, (0, 1, 0, 1), 8)
    expand = times(6, kernel((1, 4, 1, 5), 8))
    add = list(works(residual().graph.nodes[3]))
    *parts, copied = works(block(residual()))
    rows = times(6, kernel((1, 8, 3, 5), 8, *depthwise))
    assert parts == expand + rows + times(6, kernel((1, 8, 1, 5), 4)) + add
    # x gathered; lines, those of padding too; two lines move along five times
    assert copied.amount == 6 * 4 * 5 + 8 * 8 * 5 + 5 * 8 * 2 * 5
    assert copied.loops == 6 * 4 + 8 * 8 + 5 * 8
    assert copied.outputs == 6 + 6 + 6 + 6 * 4
    *parts, copied = works(block(residual(), rows=4))
    four = [*kernel((1, 8, 6, 5), 8, *depthwise), *kernel((1, 8, 4, 5), 4)]
    two = [*kernel((1, 8, 4, 5), 8, *depthwise), *kernel((1, 8, 2, 5), 4)]
    assert parts == expand + four + two + add
    assert copied.outputs == 6 + 2 + 2 + 2 * 4


def _broken(attrs: dict[str, Attr], *drop: str) -> dict[str, Attr]:
    good = block_node("block", residual().graph.nodes, 1).attrs
    return {k: v for k, v in {**good, **attrs}.items() if k not in drop}


#: Attributes of the residual addition.
ADD = ("add.out_scale", "add.out_zero_point", "add.clamp", "add.name")


@pytest.mark.parametrize(
    ("attrs", "reason"),
    [
        (_broken({"rows": 0}), "0 rows at a time, of 6"),
        (_broken({"rows": 7}), "7 rows at a time, of 6"),
        (_broken({"depthwise.group": 1}), "depthwise: .*8 channels"),
        (_broken({"project.strides": (2, 2)}, *ADD), "must be 1x1, with stride 1"),
        (_broken({}, "project.out_scale"), "out_scale"),
        (_broken({"depthwise.strides": (2, 2)}), "must be of one shape"),
        (_broken({"first.out_scale": 0.0}), "scale 0.0"),
        (_broken({"first.clamp": (5, 3)}), "first: clamp bounds 5, 3"),
        (_broken({"depthwise.pads": (3, 1, -1, 1)}), "not negative"),
        (_broken({"depthwise.pads": (3, 1, 0, 1), "depthwise.dilations": (1, 1)}), "one shape"),
    ],
)
def test_inference_refuses(attrs: dict[str, Attr], reason: str) -> None:
    net = residual()
    inputs = block_node("block", net.graph.nodes, 1).inputs
    with pytest.raises(GraphError, match=reason):
        net.graph.add_node("StreamedBlock", inputs, attrs, name="block")


def test_inference_refuses_what_can_not_lie_on_x() -> None:
    """All padding of the first layer on top: it reads rows of x that y has."""
    net = Net((1, 4, 6, 5))
    s = net.conv("s", net.x, 8, 3, 1, (2, 1, 0, 1))
    net.done(net.conv("p", net.conv("d", s, 8, 3, 1, (1, 1, 1, 1), 8), 4))
    with pytest.raises(GraphError, match="overwrite rows of x that are needed again"):
        block(net)
    assert [b.nodes for b in blocks(net.graph)] == [("d", "p")]
    net = Net((1, 4, 6, 5))
    s = net.conv("s", net.x, 8, 3, 1, (1, 1, 1, 1))
    net.done(net.conv("p", net.conv("d", s, 8, 3, 1, (1, 1, 1, 1), 8), 4))
    block(net)


def test_inference_refuses_batches_and_missing_layers() -> None:
    net = Net((2, 4, 6, 5))
    net.done(net.conv("p", net.conv("d", net.x, 4, 3, 1, (1, 1, 1, 1), 4), 6))
    with pytest.raises(GraphError, match="one image"):
        block(net)
    net = residual()
    node = block_node("block", net.graph.nodes, 1)
    with pytest.raises(GraphError, match="9 operands"):
        net.graph.add_node("StreamedBlock", node.inputs[:9], node.attrs, name="block")


@pytest.mark.skipif(not lane.has_zig_lane(), reason="needs ziglang and unicorn")
@pytest.mark.parametrize("compiler", ["gcc", "zig"])
@pytest.mark.parametrize("core", ["cortex-m7", "cortex-m0plus"])
def test_on_an_emulated_board(tmp_path: Path, core: str, compiler: lane.Compiler) -> None:
    """With and without packed instructions: a stem, a strided and a residual block."""
    if compiler == "gcc" and not lane.has_gcc():
        pytest.skip("needs arm-none-eabi-gcc")
    net = classifier()
    streamed = stream(net.graph, [b.name for b in blocks(net.graph)])
    env = run(net.graph, net.sample())
    cases = [
        (n, [None if v is None else env[v.name] for v in n.inputs])
        for n in streamed.nodes
        if n.op == "StreamedBlock"
    ]
    assert len(cases) == 3
    results, _ = run_kernels(tmp_path, cases, core, compiler)
    for (node, _), (got,) in zip(cases, results, strict=True):
        assert np.array_equal(got, env[node.out.name]), node.name


# --- the graph ------------------------------------------------------------------------------------


def test_blocks_of_a_network() -> None:
    net = classifier()
    found = blocks(net.graph)
    assert [b.nodes for b in found] == [
        ("stem", "d0", "p0"),
        ("e1", "d1", "p1"),
        ("e2", "d2", "p2", "a2"),
    ]
    assert [(b.source, b.result) for b in found] == [("x", "p0"), ("p0", "p1"), ("p1", "a2")]
    assert [b.name for b in found] == ["stem/streamed", "e1/streamed", "e2/streamed"]


def test_any_choice_of_blocks_gives_the_same_values() -> None:
    net = classifier()
    names = [b.name for b in blocks(net.graph)]
    for chosen in ([], names[:1], names[1:], names):
        streamed = stream(net.graph, chosen)
        ops = [n.op for n in streamed.nodes]
        assert ops.count("StreamedBlock") == len(chosen)
        assert streamed.constants.keys() == net.graph.constants.keys()
        equal(net, streamed)


def test_separable_layers_in_a_row() -> None:
    """A pointwise layer between two depthwise ones ends the first block."""
    net = Net((1, 4, 9, 9))
    y = net.x
    for i in range(2):
        y = net.conv(f"p{i}", net.conv(f"d{i}", y, 4, 3, 1, (1, 1, 1, 1), 4), 4)
    net.done(y)
    assert [b.nodes for b in blocks(net.graph)] == [("d0", "p0"), ("d1", "p1")]
    equal(net, stream(net.graph, ["d0/streamed", "d1/streamed"]))


def test_values_that_others_read_end_a_block() -> None:
    net = Net((1, 4, 8, 8))
    e = net.conv("e", net.x, 6)
    d = net.conv("d", e, 6, 3, 1, (1, 1, 1, 1), 6)
    p = net.conv("p", d, 4)
    g = net.graph
    net.done(net.add("a", net.x, p))
    assert blocks(g)[0].nodes == ("e", "d", "p", "a")
    g.outputs = [g.outputs[0], p]
    assert blocks(g)[0].nodes == ("e", "d", "p")
    g.outputs = [g.outputs[0], e]
    assert [b.nodes for b in blocks(g)] == [("d", "p")]
    g.outputs = [g.outputs[0], d]
    assert blocks(g) == ()


def test_no_blocks_of_several_images() -> None:
    net = Net((2, 4, 8, 8))
    net.done(net.conv("p", net.conv("d", net.x, 4, 3, 1, (1, 1, 1, 1), 4), 4))
    assert blocks(net.graph) == ()


def test_unknown_block() -> None:
    with pytest.raises(UsageError, match=r"no block e3 .* known are: stem/streamed, e1/"):
        stream(classifier().graph, ["e3"])


def test_training_behind_streamed_blocks() -> None:
    """Streamed blocks are forward steps like others; nothing in them or before them trains."""
    net = classifier()
    streamed = stream(net.graph, [b.name for b in blocks(net.graph)])
    spec, head = TrainingSpec(), [Candidate("head.w", None)]
    feeds = {**net.sample(), "hyper": np.array([0.1, 1.0, 1.0], np.float32)}
    feeds["target"] = np.array([2], np.int32)
    results = []
    for graph in (net.graph, streamed):
        training = build_training(graph, spec, head)
        feeds["hyper"] = feeds["hyper"][: training.hyper.type.shape[0]]
        results.append(run(training.graph, feeds)["head.w'"])
    assert np.array_equal(results[0], results[1])
    with pytest.raises(UsageError, match=r"e1\.w is not a trainable parameter"):
        build_training(streamed, spec, [Candidate("e1.w", None)])


def test_gradients_do_not_pass_a_streamed_block() -> None:
    net = Net((1, 2, 6, 6))
    g = Graph("net")
    x = g.add_input("x", TensorType((1, 2, 6, 6)))
    w = g.add_constant("w", np.ones((2, 2, 1, 1), np.float32))
    y = g.add_node("Conv", (x, w), name="conv").out
    attrs: dict[str, Attr] = {"out_scale": 0.05, "out_zero_point": 0, "clamp": (-128, 127)}
    y = g.add_node("Quantize", (y,), attrs, name="q").out
    net.graph, net.x = g, y
    d = net.conv("d", y, 2, 3, 1, (1, 1, 1, 1), 2)
    y = g.add_node("Dequantize", (net.conv("p", d, 3),), name="real").out
    g.outputs = [y]
    streamed = stream(g, [blocks(g)[0].name])
    with pytest.raises(UnsupportedModelError, match="d/streamed: StreamedBlock has no gradient"):
        build_training(streamed, TrainingSpec(loss="mse"), [Candidate("w", None)])


def test_residual_result_lies_on_its_operand() -> None:
    net = classifier()
    streamed = stream(net.graph, [b.name for b in blocks(net.graph)])
    training = build_training(streamed, TrainingSpec(), [Candidate("head.w", None)])
    storage = Storage(training)
    values = training.graph.values
    assert storage.aliases[values["a2"]] is values["p1"]
    assert values["p1"] not in storage.aliases


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_plan_and_emitted_c(tmp_path: Path) -> None:
    """The checker accepts the plan; NumPy and C run it to the same bits, dead bytes poisoned."""
    net = classifier()
    streamed = stream(net.graph, [b.name for b in blocks(net.graph)])
    training = build_training(streamed, TrainingSpec(), [Candidate("head.w", None)])
    plan = plans.squeezed(streamed, training, ram_bytes=10**5)
    check(plan, training, load_device(plans.BOARD))
    rng, runtime = np.random.default_rng(5), Runtime(plan, training)
    xs = [rng.integers(-128, 128, net.x.type.shape).astype(np.int8) for _ in range(3)]
    targets = [rng.integers(0, 4, 1, dtype="i4") for _ in xs]
    want = [np.asarray(runtime.infer(xs[0]), "<f4").tobytes()]
    assert want[0] == run(net.graph, {"x": xs[0]})["head"].tobytes()
    for x, t in zip(xs, targets, strict=True):
        want.append(np.float32(runtime.train_step(x, t, 0.05)).tobytes())
    name = emit_c(plan, training, tmp_path)[0].stem
    program = lane.build_host(tmp_path, name)
    result = lane.run_host(program, lane.training_input(xs, targets, 0.05))
    assert result.exit_code == 0, result.stdout
    assert result.files["output.bin"] == b"".join([*want, runtime.state_bytes()])


# --- published networks ---------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the networks of ODT_PLAN_SHARED")
@pytest.mark.parametrize("name", NETWORKS)
def test_published_network(name: str) -> None:
    """Every value outside of the blocks is that of the separate layers; memory falls."""
    graph = import_model(SHARED / f"{name}-head10-qdq.onnx")
    lowered = lower(graph, all_i8(graph, inputs=True))
    found = blocks(lowered)
    depthwise = [n for n in lowered.nodes if n.attrs.get("group", 1) != 1]
    assert len(found) == len(depthwise)
    streamed = stream(lowered, [b.name for b in found])
    t = lowered.inputs[0].type
    x = np.random.default_rng(0).integers(-128, 128, t.shape).astype(np.int8)
    want, got = (run(g, {lowered.inputs[0].name: x}) for g in (lowered, streamed))
    for v in got:
        assert np.array_equal(got[v], want[v]), v
    assert sum(v not in got for v in want) >= 2 * len(found)
    assert _peak(streamed) <= 92_000 < 0.71 * _peak(lowered)


def _peak(graph: Graph) -> int:
    """Largest number of bytes that a step's operands, result and workspace take."""
    peak = 0
    for n in graph.nodes:
        t, y = operand(n, 0), n.out.type
        once = n.op == "StreamedBlock" and t.stored == y.stored
        peak = max(peak, t.nbytes + (0 if once else y.nbytes) + get_op(n.op).workspace(n))
    return peak
