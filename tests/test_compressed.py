"""Activations kept for backward in half precision or i8: bits, gradients, plans, firmware."""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import plans
import pytest
import torch
from board import lane
from board.objects import link
from c_cases import KERNELS
from numpy.typing import NDArray
from onnx_files import export
from test_board import needs_zig, on_board
from test_c_backend import Planned, reference, samples

from odt_plan.backends.c import emit_c
from odt_plan.backends.numpy import Runtime
from odt_plan.figures import Budgeted
from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.calibrate import calibrate
from odt_plan.ir.errors import InfeasibleError, UsageError
from odt_plan.ir.graph import Graph, TensorType
from odt_plan.ir.interpreter import run
from odt_plan.ir.opdef import get_op
from odt_plan.ir.precision import all_i8, lower
from odt_plan.ir.quantization import Quantization
from odt_plan.ir.training import Candidate, Saved, TrainingGraph, TrainingSpec, Update
from odt_plan.planner.check import check
from odt_plan.planner.check_program import CheckError
from odt_plan.planner.device import load_device
from odt_plan.planner.importance import prior
from odt_plan.planner.linear import SolverOptions
from odt_plan.planner.milp import Milp
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.plan import load_plan
from odt_plan.planner.problem import Limits
from odt_plan.planner.rebuild import rebuild
from odt_plan.report import print_plan

Array = NDArray[Any]
BOARD = load_device(plans.BOARD)
EXACT = SolverOptions(gap=0.0, time_limit_s=30)
needs_host_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


# --- bits of the conversion -----------------------------------------------------------------------

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def hard_floats() -> Array:
    """All halves, the middles between neighbours and the floats beside them, and any bits."""
    with np.errstate(all="ignore"):
        finite = np.sort(HALVES[np.isfinite(HALVES)].astype(np.float32))
        middles = (finite[1:].astype(np.float64) + finite[:-1]) / 2  # exact in fp32
        middles = middles.astype(np.float32)
        exact = np.concatenate((HALVES.astype(np.float32), middles))
        beside = [np.nextafter(exact, np.float32(d)) for d in (-np.inf, np.inf)]
        rng = np.random.default_rng(0)
        any_bits = rng.integers(0, 1 << 32, 1 << 18, np.uint32).view(np.float32)
        edges = np.array([65504, 65519.996, 65520, 65536, 3.4e38, 1e-45, 2**-25, 2**-24], "f4")
        return np.concatenate((exact, *beside, any_bits, edges, -edges)).astype(np.float32)


def expected_halves(x: Array) -> Array:
    """By torch, which knows nothing of saturation: too large values and NaN are set aside."""
    inside = np.abs(x) <= 65504
    half = torch.from_numpy(np.where(inside, x, 0).astype(np.float32)).half().numpy()
    half = np.where(inside, half, np.where(x > 0, np.float16(65504), np.float16(-65504)))
    return np.where(np.isnan(x), np.float16("nan"), half).astype(np.float16)


def to_half(x: Array) -> Array:
    """By the NumPy kernel."""
    g = Graph("half")
    v = g.add_input("x", TensorType((1, len(x))))
    node = g.add_node("ToHalf", (v,), {"axis": 1, "channels": len(x)}, name="half")
    (y,) = get_op("ToHalf").kernel(node, [x.reshape(1, -1)])
    return np.asarray(y).reshape(-1)


def test_numpy_halves_are_those_of_torch() -> None:
    x = hard_floats()
    assert np.array_equal(to_half(x).view(np.uint16), expected_halves(x).view(np.uint16))


@needs_host_gcc
def test_c_halves_are_those_of_numpy_and_come_back_exactly(tmp_path: Path) -> None:
    library = tmp_path / "half.so"
    names = ("half", "depthwise_grad", "margin", "gather", "sums")
    sources = [KERNELS / f"odtplan_{n}.c" for n in names]
    link(["gcc", *lane.STRICT, *lane.OPTIMISED], sources, ["-shared"], library)
    c = ctypes.CDLL(str(library))
    x = hard_floats()
    got = np.zeros(len(x), np.uint16)
    params = (ctypes.c_int32 * 3)(1, len(x), len(x))
    pointer = ctypes.c_void_p
    c.odtplan_to_half(params, pointer(x.ctypes.data), pointer(got.ctypes.data))
    assert np.array_equal(got, to_half(x).view(np.uint16))
    # 1 x 65536 inputs times a gradient of 1: the widened inputs
    one, wide = np.ones(1, np.float32), np.zeros(len(HALVES), np.float32)
    params = (ctypes.c_int32 * 5)(1, 1, len(HALVES), 0, 1)
    c.odtplan_half_gemm_grad_weight(
        params,
        *(pointer(a.ctypes.data) for a in (HALVES, one, wide)),
        ctypes.c_int32(0),
        ctypes.c_int32(1),
    )
    assert np.array_equal(wide, HALVES.astype(np.float32), equal_nan=True)


# --- gradients ------------------------------------------------------------------------------------


def layers(batch: int = 2) -> Graph:
    """Conv, strided Conv, depthwise, grouped, pointwise, MatMul over positions, Gemm."""
    rng, g = np.random.default_rng(1), Graph("layers")
    x = g.add_input("x", TensorType((batch, 3, 12, 12)))
    x = nets.relu(g, nets.conv(g, rng, x, "plain", 8), "relu0")
    x = nets.relu(g, nets.conv(g, rng, x, "strided", 8, stride=2), "relu1")
    x = nets.relu(g, nets.conv(g, rng, x, "depthwise", 8, group=8), "relu2")
    x = nets.relu(g, nets.conv(g, rng, x, "grouped", 12, group=4), "relu3")
    x = nets.relu(g, nets.conv(g, rng, x, "pointwise", 6, kernel=1), "relu4")
    x = g.add_node("Reshape", (x,), {"shape": (batch, 6, 36)}, name="rows").out
    x = nets.relu(g, nets.product(g, rng, x, "product", 10), "relu5")
    g.outputs = [nets.dense(g, rng, nets.flat(g, x), "fc", 4)]
    g.verify()
    return g


def weights(graph: Graph, saved: Saved, *, part: bool = False) -> list[Candidate]:
    """Every weight with a compressed input; those that can by a half."""
    offers = [c for c in candidates(graph) if c.saved == saved and bool(c.channels) == part]
    assert offers
    return offers


def values_of(training: TrainingGraph, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(training.sample.type.shape).astype(np.float32)
    y = rng.integers(0, training.prediction.type.shape[-1], training.target.type.shape)
    feeds: dict[str, Array] = {
        training.sample.name: x,
        training.target.name: y.astype(np.int32),
        training.hyper.name: np.array([0.1, 1, 1, 0.1][: training.hyper.type.size], "f4"),
    }
    graph = training.graph
    state = {
        v.name: np.zeros(v.type.shape, v.type.np_dtype)
        for u in training.updates
        for v in u.resident
        if v.name not in graph.constants
    }
    return run(graph, {**feeds, **state})


def gradient(u: Update, x: Array, dy: Array) -> Array:
    """Of a layer's weight, by torch in float64 from what was kept of x."""
    a, b = (torch.from_numpy(np.asarray(v, np.float64)) for v in (x, dy))
    if u.owner.op == "Conv":
        attrs = {k: u.owner.attrs[k] for k in ("strides", "pads", "dilations", "group")}
        shape = u.value.type.shape
        k, group = u.candidate.channels, int(attrs["group"])  # type: ignore[arg-type]
        if k is not None and group == 1:
            a = a[:, :k]
        elif k is not None:  # depthwise
            a, b, group = a[:, :k], b[:, :k], k
        pads = attrs["pads"]
        assert isinstance(pads, tuple)
        w = torch.nn.grad.conv2d_weight(
            a, shape, b, attrs["strides"], pads[: len(pads) // 2], attrs["dilations"], group
        )  # type: ignore[arg-type]
        return w.numpy()
    a, b = (v.reshape(-1, v.shape[-1]) for v in (a, b))
    a = a[:, : u.candidate.channels]
    product = b.T @ a if u.owner.op == "Gemm" else a.T @ b
    return product.numpy()


@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_gradients_are_those_of_the_halved_input(part: bool) -> None:
    graph = layers()
    chosen = weights(graph, "f16", part=part)
    training = build_training(graph, TrainingSpec(), chosen)
    assert len(training.updates) == (5 if part else 7)
    env = values_of(training)
    for u in training.updates:
        x, dy = u.owner.inputs[0], u.grad.producer
        assert x is not None
        assert dy is not None
        kept, gradient_in = dy.operands()
        assert kept.type.dtype == "f16"
        half = torch.from_numpy(env[x.name]).half().float().numpy()
        want = gradient(u, half, env[gradient_in.name])
        np.testing.assert_allclose(env[u.grad.name], want, rtol=2e-5, atol=2e-6)
        if part:
            assert kept.type.nbytes * 4 == x.type.nbytes
        plain = gradient(u, env[x.name], env[gradient_in.name])
        assert np.abs(want - plain).max() > 0, "the rounding is seen"


def test_gradients_have_the_bits_of_the_float_kernel() -> None:
    """Of an input that is made of halves, nothing is lost."""
    graph = layers()
    halved, plain = (
        build_training(graph, TrainingSpec(), [Candidate("plain.weight", None, saved)])
        for saved in ("f16", "f32")
    )
    for training in (halved, plain):
        assert training.sample.name == "x"
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 3, 12, 12)).astype(np.float16).astype(np.float32)
    y, hyper = np.array([1, 3], np.int32), np.array([0.1, 1, 1], np.float32)
    grads = [
        run(t.graph, {"x": x, "target": y, "hyper": hyper})[t.updates[0].grad.name]
        for t in (halved, plain)
    ]
    assert np.array_equal(grads[0], grads[1])


def pinned(graph: Graph, layers: Sequence[str]) -> Graph:
    """Calibrated, all layers in i8 but some."""
    x = graph.inputs[0]
    data = np.random.default_rng(3).standard_normal((8, *x.type.shape[1:])).astype(np.float32)
    calibrate(graph, data)
    return lower(graph, {n: p for n, p in all_i8(graph).items() if n not in layers})


def test_gradients_of_an_input_kept_as_i8() -> None:
    """Quantized where two float layers meet; what a float layer's input was made from, where i8."""
    low = pinned(nets.cnn(4, 8, 6), ("conv1", "conv2", "fc"))
    chosen = [Candidate(f"{n}.weight", None, "i8") for n in ("conv1", "conv2", "fc")]
    assert set(chosen) < set(candidates(low))
    training = build_training(low, TrainingSpec(), chosen)
    made = {n.name: n.op for n in training.graph.nodes if n.op == "Quantize"}
    assert "conv2/quantized" in made
    assert not {"conv1/quantized", "fc/quantized"} & made.keys()
    env = values_of(training)
    for u in training.updates:
        producer = u.grad.producer
        assert producer is not None
        assert producer.op in ("QConvGradWeight", "QGemmGradWeight")
        kept, dy = producer.operands()
        quant = kept.type.quant
        assert isinstance(quant, Quantization)
        real = (env[kept.name].astype(np.float64) - quant.zero_point) * quant.scale[0]
        x = u.owner.inputs[0]
        assert x is not None
        assert np.abs(real - np.clip(env[x.name], real.min(), real.max())).max() <= quant.scale[0]
        np.testing.assert_allclose(
            env[u.grad.name], gradient(u, real, env[dy.name]), rtol=2e-5, atol=2e-6
        )


# --- what is offered ------------------------------------------------------------------------------


def test_candidates_with_a_compressed_input() -> None:
    graph = nets.cnn(2, 8, 4)
    offered = [(c.param, c.channels, c.saved) for c in candidates(graph) if c.saved != "f32"]
    assert offered == [
        *(("conv0.weight", k, "f16") for k in (1, None)),
        *(("conv1.weight", k, "f16") for k in (4, None)),
        *(("fc.weight", k, "f16") for k in (64, None)),
    ]
    low = pinned(nets.cnn(2, 8, 4), ("fc",))
    kept = {(c.param, c.saved) for c in candidates(low)}
    assert ("fc.weight", "i8") in kept
    assert not {("conv1.weight", s) for s in ("f16", "i8")} & kept, "its input is i8 already"
    scores = prior(graph, [*candidates(graph), Candidate("fc.weight", None, "i8")])
    whole = [scores[Candidate("fc.weight", None, saved)] for saved in ("f32", "f16", "i8")]
    assert whole[0] > whole[1] > whole[2] > scores[Candidate("fc.weight", 64)]


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate("conv0.bias", None, "f16"),
        Candidate("conv0.weight", None, "i8"),
        Candidate("conv0.weight", 1, "i8"),
    ],
)
def test_what_can_not_be_kept_is_a_usage_error(candidate: Candidate) -> None:
    with pytest.raises(UsageError, match=f"can't be kept as {candidate.saved}"):
        build_training(nets.cnn(), TrainingSpec(), [candidate])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_superset_has_the_gradients_of_every_special_graph(optimizer: Any) -> None:
    graph, spec = layers(), TrainingSpec(optimizer=optimizer, micro_batches=2)
    every = candidates(graph)
    superset = build_training(graph, spec, every)
    env = values_of(superset)
    by_candidate = {u.candidate: u for u in superset.updates}
    assert set(by_candidate) == set(every)
    for c in (c for c in every if c.saved != "f32"):
        training = build_training(graph, spec, [c])
        (u,) = training.updates
        assert np.array_equal(values_of(training)[u.grad.name], env[by_candidate[c].grad.name]), c
        assert [v.type for v in by_candidate[c].resident] == [v.type for v in u.resident]


# --- plans ----------------------------------------------------------------------------------------


def kept(graph: Graph, saved: Saved, optimizer: Any = "sgd") -> Planned:
    """All weights whole, their inputs kept in one way; biases too."""
    chosen = [
        replace(c, saved=saved) if c.param.endswith("weight") else c for c in plans.whole(graph)
    ]
    training = build_training(graph, TrainingSpec(optimizer=optimizer), chosen)
    return plans.keep_all(training), training


def inner(graph: Graph, saved: Saved) -> TrainingGraph:
    """The weight of one inner layer."""
    return build_training(graph, TrainingSpec(), [Candidate("conv2.weight", None, saved)])


def least_ram(graph: Graph, training: TrainingGraph) -> int:
    limits = Limits(10**7, 10**7, None, None, 0)
    problem = plans.problem_of(graph, training, limits, plans.cost_of(BOARD), fixed=True)
    return round(Milp(problem).solve("ram", EXACT).value)


def request(folder: Path, graph: Graph, **options: Any) -> Request:
    base = Request(export(graph, folder), BOARD, with_baselines=False, gap=0.0)
    return replace(base, **options)


def deep(channels: int = 8) -> Graph:
    """Convolutions at full size; then a pool, so that backward has room and inputs bind."""
    rng, g = np.random.default_rng(4), Graph("deep")
    x = g.add_input("x", TensorType((1, 2, 12, 12)))
    for i in range(4):
        x = nets.relu(g, nets.conv(g, rng, x, f"conv{i}", channels), f"relu{i}")
    x = g.add_node("GlobalAveragePool", (x,), name="pool").out
    g.outputs = [nets.dense(g, rng, nets.flat(g, x), "fc", 3)]
    g.verify()
    return g


def score(done: PlannedModel) -> float:
    return sum(u.importance for u in done.plan.decisions.updates)


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PlannedModel]:
    """A plan that keeps an input in half precision because RAM binds."""
    folder = tmp_path_factory.mktemp("deep")
    for ram in range(13_000, 30_000, 500):
        try:
            done = make_plan(request(folder, deep(), ram_bytes=ram))
        except InfeasibleError:
            continue
        if any(u.saved == "f16" for u in done.plan.decisions.updates):
            return folder, done
    raise AssertionError("no budget made the planner compress")


def test_more_is_learned_in_the_same_ram(squeezed: tuple[Path, PlannedModel]) -> None:
    _, done = squeezed
    graph, ram = deep(), done.plan.device.budget.ram_bytes
    plain = [c for c in candidates(graph) if c.saved == "f32"]
    training = build_training(graph, TrainingSpec(), plain)
    limits = Limits(ram, 10**7, None, None, 0)
    scores = prior(graph, plain)
    problem = plans.problem_of(graph, training, limits, plans.cost_of(BOARD), fixed=False)
    best = Milp(problem).solve("learn", EXACT)
    assert best.status == "optimal"
    assert sum(scores[c] for c in best.solution.candidates(problem)) == round(best.value)  # type: ignore[union-attr]
    assert score(done) > best.bound
    assert done.plan.claims.ram_bytes.total <= ram


def test_the_plan_trains_as_numpy_says(squeezed: tuple[Path, PlannedModel], tmp_path: Path) -> None:
    folder, done = squeezed
    path = folder / "plan.json"
    path.write_text(done.plan.model_dump_json())
    plan = load_plan(path)
    assert plan == done.plan
    training = rebuild(plan, path)
    assert [u.candidate for u in training.updates] == [u.candidate for u in done.training.updates]
    check(plan, training, BOARD)
    name = emit_c(plan, training, tmp_path)[0].stem
    program = lane.build_host(tmp_path, name)
    result = lane.run_host(program, lane.training_input(*samples(training, 4), 0.05))
    assert result.exit_code == 0, result.stdout
    assert result.value("selftest_exact") == 1
    assert result.files["output.bin"] == reference(plan, training, 4, 0.05)


def test_what_does_not_fit_in_f32_fits_in_half_precision() -> None:
    """The same weights, whatever is rebuilt."""
    graph = deep()
    plain, halved = inner(graph, "f32"), inner(graph, "f16")
    least = least_ram(graph, plain)
    with pytest.raises(AssertionError, match="infeasible"):
        plans.squeezed(graph, plain, ram_bytes=least - 4)
    plan = plans.squeezed(graph, halved, ram_bytes=least - 4)
    check(plan, halved, BOARD)
    assert plan.claims.ram_bytes.total < least


@pytest.mark.parametrize("saved", ["f32", "i8"])
def test_a_plan_that_says_another_form_is_rejected(
    saved: Saved, squeezed: tuple[Path, PlannedModel]
) -> None:
    _, done = squeezed
    decisions = done.plan.decisions
    k = next(i for i, u in enumerate(decisions.updates) if u.saved == "f16")
    updates = list(decisions.updates)
    updates[k] = updates[k].model_copy(update={"saved": saved})
    wrong = done.plan.model_copy(
        update={"decisions": decisions.model_copy(update={"updates": tuple(updates)})}
    )
    with pytest.raises(CheckError, match=f"saved {saved}.* in the plan, but .*saved f16"):
        check(wrong, done.training, BOARD)


def test_the_report_tells_what_is_compressed(
    squeezed: tuple[Path, PlannedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    _, done = squeezed
    print_plan(done, Budgeted(None, None), [])
    assert re.search(r"conv\d\.weight .*input kept as f16", capsys.readouterr().out)


# --- firmware -------------------------------------------------------------------------------------


@needs_zig
@pytest.mark.parametrize("core", ["cortex-m7", "cortex-m4", "cortex-m0plus"])
def test_boards_with_and_without_conversion_in_hardware(core: str, tmp_path: Path) -> None:
    on_board(kept(layers(), "f16"), tmp_path, core)


@needs_zig
@pytest.mark.parametrize("core", ["cortex-m7", "cortex-m0plus"])
def test_boards_round_hard_values_as_numpy(core: str, tmp_path: Path) -> None:
    """One step from zero weights by the mean squared error: the weights become multiples of x."""
    hard = hard_floats()
    hard = hard[(np.abs(hard) < 2e5) & (np.abs(hard) > 2**-26)]
    x = np.random.default_rng(5).choice(hard, 2000)[None]
    x[0, :6] = [65504, 65519.996, 65520, -65536, 2**-25, -(2**-24)]
    graph = nets.mlp((x.size, 2))
    graph.constants["fc0.weight"][:] = 0
    chosen = [Candidate("fc0.weight", None, "f16")]
    training = build_training(graph, TrainingSpec("mse"), chosen)
    plan = plans.keep_all(training)
    name = emit_c(plan, training, tmp_path)[0].stem
    target = np.array([[1, -2]], np.float32)
    image = lane.build(tmp_path, name, core, "zig")
    result = lane.run(image, core, "unicorn", files=lane.training_input([x], [target], 0.05))
    assert result.exit_code == 0, result.stdout
    runtime = Runtime(plan, training)
    runtime.train_step(x, target, 0.05)
    state = runtime.state_bytes()
    assert result.files["output.bin"].endswith(state)
    moved = np.frombuffer(state, np.float32)[: x.size]
    half = expected_halves(x[0]).astype(np.float64)
    np.testing.assert_allclose(moved / moved[0], half / half[0], rtol=1e-6)
