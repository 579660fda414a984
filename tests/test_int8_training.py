"""Training of i8 layers: gradients against torch, updates by hand, plans and C bit for bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nets
import numpy as np
import plans
import pytest
import torch
from board import lane
from numpy.typing import NDArray
from onnx_files import export, floats
from oracle import Unconstrained, batch
from test_board import needs_qemu, needs_zig, on_board
from test_c_backend import Planned, reference, samples

from odt_plan.backends.c import emit_c
from odt_plan.backends.numpy import Runtime, save_learned, train
from odt_plan.ir.autodiff import build_training, candidates, param_slots
from odt_plan.ir.calibrate import calibrate
from odt_plan.ir.errors import UsageError
from odt_plan.ir.graph import Attr, Graph, Node, TensorType, Value
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.opdef import get_op
from odt_plan.ir.precision import all_i8, lower
from odt_plan.ir.quantization import HIGH, LOW
from odt_plan.ir.training import Candidate, TrainingGraph, TrainingSpec, Update
from odt_plan.planner.check import CheckError, check
from odt_plan.planner.device import load_device
from odt_plan.planner.plan import Plan, load_plan
from odt_plan.planner.tensors import Storage
from odt_plan.planner.train_set import choose

Array = NDArray[Any]
RATE = 0.02
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


# --- networks -------------------------------------------------------------------------------------


def mobile(batch: int = 1) -> Graph:
    """Inverted residual blocks: expand, depthwise (with stride), project, Relu6, a residual sum."""
    rng, g = np.random.default_rng(2), Graph("mobile")

    def relu6(x: Value, name: str) -> Value:
        return g.add_node("Clip", (x,), {"min": 0.0, "max": 6.0}, name=name).out

    x = g.add_input("x", TensorType((batch, 3, 8, 8)))
    x = relu6(nets.conv(g, rng, x, "stem", 8, stride=2), "stem.relu")
    for i, stride in enumerate((1, 2)):
        y = relu6(nets.conv(g, rng, x, f"b{i}.expand", 16, kernel=1), f"b{i}.relu1")
        y = nets.conv(g, rng, y, f"b{i}.depthwise", 16, stride=stride, group=16)
        y = nets.conv(g, rng, relu6(y, f"b{i}.relu2"), f"b{i}.project", 8, kernel=1)
        x = g.add_node("Add", (y, x), name=f"b{i}.add").out if stride == 1 else y
    x = g.add_node("GlobalAveragePool", (x,), name="pool").out
    g.outputs = [nets.dense(g, rng, nets.flat(g, x), "fc", 5)]
    g.verify()
    return g


NETS: dict[str, Callable[[], Graph]] = {
    "cnn": lambda: nets.cnn(batch=2),
    "resnet": nets.resnet,
    "mobile": mobile,
}


def calibrated(name: str) -> Graph:
    graph = NETS[name]()
    calibrate(graph, floats(np.random.default_rng(3), 16, *graph.inputs[0].type.shape[1:]))
    return graph


def lowered(graph: Graph, f32: Sequence[str] = (), *, inputs: bool = False) -> Graph:
    """All layers i8 but those named."""
    precision = all_i8(graph, inputs=inputs)
    low = lower(graph, {n: p for n, p in precision.items() if n not in f32})
    assert any(n.op == "QConv" for n in low.nodes)
    return low


def partly(forward: Graph) -> list[Candidate]:
    """The smallest part of every weight, biases whole."""
    smallest: dict[str, Candidate] = {}
    for c in candidates(forward):
        smallest.setdefault(c.param, c)
    return list(smallest.values())


def integer_updates(training: TrainingGraph) -> list[Update]:
    return [u for u in training.updates if u.value.type.dtype != "f32"]


# --- gradients ------------------------------------------------------------------------------------


class _FakeQuantize(torch.autograd.Function):
    """Stored and given back; the gradient passes where the stored value is inside its bounds.

    At the end of the network also where a step against it leads back inside.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: float, zero: int, low: int, high: int, end: bool
    ) -> Any:
        stored = torch.clamp(torch.round(x / scale) + zero, low, high)
        ctx.save_for_backward(stored > low, stored < high)
        ctx.end = end
        return (stored - zero) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        above, below = ctx.saved_tensors
        if ctx.end:
            above, below = above | (grads[0] < 0), below | (grads[0] > 0)
        return grads[0] * above * below, *[None] * 5


class Torch:
    """The annotated float graph by torch in float64, every i8 value faked.

    ``held`` values take the place of torch's, from which they may differ by a step.
    """

    def __init__(self, graph: Graph, f32: Sequence[str], held: dict[str, Array]) -> None:
        self.graph, self.f32, self.held = graph, f32, held
        self.values: dict[str, torch.Tensor] = {}

    def run(self, x: Array, params: dict[str, torch.Tensor]) -> torch.Tensor:
        sample = self.graph.inputs[0]
        env = {sample.name: torch.from_numpy(x.astype(np.float64)), **params}
        env[sample.name] = self.fake(sample, env[sample.name], None)
        for node in self.graph.nodes:
            y = self.compute(node, [env[v.name] for v in node.operands()])
            env[node.out.name] = y if node.name in self.f32 else self.fake(node.out, y, node)
        self.values = env
        return env[self.graph.outputs[0].name]

    def fake(self, v: Value, x: torch.Tensor, node: Node | None) -> torch.Tensor:
        quant = self.graph.quantization.get(v.name)
        if quant is None:
            return x
        low, high, (scale,) = LOW, HIGH, quant.scale
        if node is not None and node.op in ("Relu", "Clip"):
            low = quant.zero_point
        if node is not None and node.op == "Clip":
            high = min(HIGH, round(node.float_attr("max") / scale) + quant.zero_point)
        y: torch.Tensor = _FakeQuantize.apply(
            x, scale, quant.zero_point, low, high, v is self.graph.outputs[0]
        )
        if v.name in self.held:
            off = torch.from_numpy(self.held[v.name]) - y.detach()
            assert off.abs().max() <= 1.001 * scale, v.name
            y = y + off
        return y

    def compute(self, node: Node, a: list[torch.Tensor]) -> torch.Tensor:
        f, attrs = torch.nn.functional, node.attrs
        match node.op:
            case "Conv":
                group, pads = node.int_attr("group"), node.ints_attr("pads")[:2]
                return f.conv2d(*a, node.ints_attr("strides"), pads, 1, group)
            case "Gemm":
                return f.linear(*a)
            case "Relu":
                return f.relu(a[0])
            case "Clip":
                return torch.clamp(a[0], node.float_attr("min"), node.float_attr("max"))
            case "Add":
                return a[0] + a[1]
            case "GlobalAveragePool":
                return a[0].mean((2, 3), keepdim=True)
            case "Reshape":
                return a[0].reshape(node.ints_attr("shape"))
            case _:
                raise AssertionError((node.op, attrs))


def step_sizes(graph: Graph, name: str) -> Array:
    """Real value of a stored step of a parameter, per row: the definition, from the annotations."""
    ((node, slot),) = param_slots(graph)[name]
    x, w = node.inputs[0], node.inputs[1]
    assert x is not None
    assert w is not None
    scales = graph.quantization[w.name].scales(w.type.shape[0])
    return scales if slot.role == "weight" else graph.quantization[x.name].scale[0] * scales


def real(stored: Array, graph: Graph, name: str) -> Array:
    if stored.dtype.kind == "f":
        return stored.astype(np.float64)
    sizes = step_sizes(graph, name)
    return stored * sizes.reshape(-1, *(1,) * (stored.ndim - 1))


def whole_stored(training: TrainingGraph, state: dict[str, Array], name: str) -> Array:
    """A parameter as it is stored, hot and cold part joined."""
    data = {**training.graph.constants, **state}
    if name in data:
        return data[name]
    (u,) = (u for u in training.updates if u.candidate.param == name)
    cold = data[f"{name}[{u.candidate.channels}:]"]
    return np.concatenate([data[u.value.name], cold], axis_of(u))


def axis_of(u: Update) -> int:
    slot = next(s for s in get_op(u.owner.op).params if u.owner.inputs[s.index] is u.value)
    axis = slot.channel_axis(u.owner)
    assert axis is not None
    return axis


def gradients(
    graph: Graph, training: TrainingGraph, f32: Sequence[str], steps: int
) -> list[tuple[str, Array, Array]]:
    """Parameter, gradient here and by torch, after that many updates."""
    oracle, rng = Unconstrained(training), np.random.default_rng(8)
    for _ in range(steps):
        oracle.step(*batch(training, rng), RATE)
    x, y = batch(training, rng)
    hyper = np.array([RATE, 1, steps + 1], np.float32)
    io = {training.sample.name: x, training.target.name: y, training.hyper.name: hyper}
    env = run(training.graph, {**io, **oracle.state})

    names = param_slots(graph)
    leaves = {
        n: torch.tensor(real(whole_stored(training, oracle.state, n), graph, n), requires_grad=True)
        for n in names
    }
    reference = Torch(graph, f32, {})
    logits = reference.run(x, leaves)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(y.astype(np.int64))).backward()
    for n, v in training.graph.values.items():  # the same forward, so the same masks
        if n in reference.values and v.type.quant is not None and n not in names:
            held = v.type.quant.dequantize(env[n])
            np.testing.assert_allclose(held, reference.values[n].detach(), rtol=1e-6, atol=1e-7)
    result = []
    for u in training.updates:
        grad = leaves[u.candidate.param].grad
        assert grad is not None
        want = grad.numpy()
        if u.candidate.channels is not None:
            want = np.split(want, [u.candidate.channels], axis_of(u))[0]
        result.append((u.candidate.param, env[u.grad.name], want))
    return result


def agree(got: Array, want: Array) -> None:
    assert got.dtype == np.float32
    size = np.linalg.norm(want)
    assert size > 0
    cosine = float(np.vdot(got.astype(np.float64), want) / (np.linalg.norm(got) * size))
    assert cosine >= 0.9999
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("f32", [(), ("fc",)], ids=["all-i8", "f32-classifier"])
@pytest.mark.parametrize("part", [False, True], ids=["whole", "partly"])
@pytest.mark.parametrize("net", NETS)
def test_gradients_equal_autograd(net: str, part: bool, f32: Sequence[str], steps: int) -> None:
    """Through residual blocks, depthwise layers and clamps, before and after updates."""
    graph = calibrated(net)
    low = lowered(graph, f32)
    chosen = partly(low) if part else plans.whole(low)
    training = build_training(low, TrainingSpec(), chosen)
    assert len(integer_updates(training)) == len(chosen) - 2 * len(f32)
    found = gradients(graph, training, f32, steps)
    assert {name for name, _, _ in found} == set(param_slots(graph))
    dead = [name for name, _, want in found if not want.any()]
    assert len(dead) <= len(found) // 8, dead
    for name, got, want in found:
        if name in dead:  # all that it feeds is clamped
            assert not got.any(), name
        else:
            agree(got, want)


@pytest.mark.parametrize("network", ["mbv2-w0.35", "mcunet-5fps", "proxyless-w0.3"])
def test_gradients_of_real_networks(network: str, shared: Path) -> None:
    """Every parameter, through all residual blocks, on the values that the integers have."""
    graph = import_model(shared / "models" / f"{network}-head10-qdq.onnx")
    low = lowered(graph)
    training = build_training(low, TrainingSpec(), plans.whole(low))
    x, y = batch(training, np.random.default_rng(0))
    hyper = np.array([RATE, 1, 1], np.float32)
    io = {training.sample.name: x, training.target.name: y, training.hyper.name: hyper}
    env = run(training.graph, io)
    held = {
        n: v.type.quant.dequantize(env[n]).astype(np.float64)
        for n, v in low.values.items()
        if v.type.quant is not None and n in graph.values and n not in low.constants
    }
    names = param_slots(graph)
    leaves = {n: torch.tensor(real(env[n], graph, n), requires_grad=True) for n in names}
    logits = Torch(graph, (), held).run(x, leaves)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(y.astype(np.int64))).backward()
    assert len(training.updates) == len(names) > 80
    for u in training.updates:
        grad = leaves[u.candidate.param].grad
        assert grad is not None
        agree(env[u.grad.name], grad.numpy())


def test_the_superset_has_the_same_gradients() -> None:
    """Every part of every weight: its update takes the gradient and the scales of its rows."""
    low = lowered(calibrated("mobile"))
    every = candidates(low)
    superset = build_training(low, TrainingSpec(), every)
    x, y = batch(superset, np.random.default_rng(4))
    hyper = np.array([RATE, 1, 1], np.float32)
    feeds = {superset.sample.name: x, superset.target.name: y, superset.hyper.name: hyper}
    state = {
        u.value.name: np.split(
            superset.graph.constants[u.candidate.param], [u.candidate.channels], axis_in(u)
        )[0]
        for u in superset.updates
        if u.candidate.channels is not None
    }
    env = run(superset.graph, {**feeds, **state})
    by_channels = Counter[bool]()
    for u in superset.updates:
        one = build_training(low, TrainingSpec(), [u.candidate])
        (only,) = one.updates
        alone = run(one.graph, feeds)
        assert np.array_equal(env[u.grad.name], alone[only.grad.name])
        assert np.array_equal(env[u.apply_node.out.name], alone[only.apply_node.out.name])
        assert only.value.type == u.value.type
        by_channels[u.candidate.channels is None] += 1
    assert by_channels[False] > by_channels[True] > 0


def axis_in(u: Update) -> int:
    """Channel axis of a weight that stays whole."""
    slot = next(s for s in get_op(u.owner.op).params if s.role == "weight")
    axis = slot.channel_axis(u.owner)
    assert axis is not None
    return axis


def test_the_mask_is_applied_once_and_in_place() -> None:
    low = lowered(calibrated("resnet"))
    training = build_training(low, TrainingSpec(), plans.whole(low))
    nodes = training.graph.nodes
    names = [n.name for n in nodes if n.op in ("MaskMul", "QInward")]
    layers = [n for n in low.nodes if n.op in ("QConv", "QAdd", "QGemm", "QGlobalAveragePool")]
    assert sorted(names) == sorted(f"{n.name}/clamped" for n in layers)
    storage = Storage(training)
    shared = {v.name for v in storage.aliases}
    fan_out = {"b0.conv2/clamped", "b1.conv2/clamped"}  # the sum's other operand needs dy as well
    assert {n for n in names if n not in shared} == fan_out


def test_logits_at_their_bounds_come_back() -> None:
    """All of them saturated, the network says the same of every sample, until it has learned."""
    low = lowered(calibrated("cnn"))
    training = build_training(low, TrainingSpec(), plans.whole(low))
    (seed,) = (n for n in training.graph.nodes if n.op == "QInward")
    dy, logits = seed.operands()
    oracle, rng = Unconstrained(training), np.random.default_rng(2)
    (bias,) = (u for u in training.updates if u.owner is logits.producer and u.role == "bias")
    oracle.state[bias.value.name] = np.array([10**6, 10**6, -(10**6)], np.int32)
    x, _ = batch(training, rng)
    first, last = (np.full(training.target.type.shape, i, np.int32) for i in (0, 2))
    env = evaluated(training, oracle, x, last, 0)
    assert (env[logits.name] == [HIGH, HIGH, LOW]).all()
    assert (env[seed.out.name] == env[dy.name]).all(), "0 and 1 are to fall, 2 is to rise"
    env = evaluated(training, oracle, x, first, 0)
    assert (env[dy.name] != 0).all()
    assert ((env[seed.out.name] != 0) == [False, True, False]).all(), "0 can't rise, 2 can't fall"
    losses = [oracle.step(batch(training, rng)[0], last, 0.5) for _ in range(40)]
    assert losses[-1] < 0.1 * losses[0]


def evaluated(
    training: TrainingGraph, oracle: Unconstrained, x: Array, y: Array, updates: int
) -> dict[str, Array]:
    """Every value of the training step that would come next."""
    hyper = np.array([RATE, 1, updates + 1], np.float32)
    io = {training.sample.name: x, training.target.name: y, training.hyper.name: hyper}
    return run(training.graph, {**io, **oracle.state})


def test_slots_of_integer_layers() -> None:
    graph = calibrated("mobile")
    low = lowered(graph)
    assert candidates(low) == [c for c in candidates(graph) if c.saved == "f32"]
    slots = param_slots(low)
    roles = {(low.values[n].type.dtype, uses[0][1].role) for n, uses in slots.items()}
    assert roles == {("i8", "weight"), ("i32", "bias")}


def test_a_shared_parameter_is_not_updated_in_one_of_its_forms() -> None:
    rng, g = np.random.default_rng(0), Graph("tied")
    x = g.add_input("x", TensorType((1, 4, 6, 6)))
    w, b = g.add_constant("w", floats(rng, 4, 4, 3, 3) / 4), g.add_constant("b", floats(rng, 4))
    attrs: dict[str, Attr] = {
        "strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1), "group": 1,
    }  # fmt: skip
    for i in range(2):
        x = nets.relu(g, g.add_node("Conv", (x, w, b), attrs, name=f"c{i}").out, f"r{i}")
    g.outputs = [nets.dense(g, rng, nets.flat(g, x), "fc", 3)]
    calibrate(g, floats(rng, 8, 4, 6, 6))
    for f32 in ((), ("c1",)):
        low = lowered(g, f32)
        every = candidates(low, imported=g)
        assert {c.param for c in every} == {"fc.weight", "fc.bias"}
        with pytest.raises(UsageError, match="several layers share w; pin all of them to f32"):
            choose(low, ("fc.weight", "w"), every)
    whole = lower(g, {"fc": "i8"})
    assert {c.param for c in candidates(whole, imported=g)} == {"w", "b", "fc.weight", "fc.bias"}


# --- the update -----------------------------------------------------------------------------------


def updated(
    spec: TrainingSpec, rate: float, numbers: Sequence[int] = (1,), net: str = "mobile"
) -> tuple[Graph, TrainingGraph, list[dict[str, Array]]]:
    """One step from the same weights for each number of the update."""
    graph = calibrated(net)
    low = lowered(graph)
    training = build_training(low, spec, plans.whole(low))
    x, y = batch(training, np.random.default_rng(6))
    io = {training.sample.name: x, training.target.name: y}
    first = run(training.graph, {**io, training.hyper.name: np.array([rate, 1, 1], np.float32)})
    results = []
    for number in numbers:
        hyper = np.array([rate, 1, number], np.float32)
        env = dict(first)
        for u in training.updates:
            operands = [
                hyper if v is training.hyper else env[v.name] for v in u.apply_node.operands()
            ]
            env[u.apply_node.out.name] = get_op(u.apply_node.op).kernel(u.apply_node, operands)[0]
        results.append(env)
    return graph, training, results


def real_steps(graph: Graph, u: Update, grad: Array, rate: float, *, qas: bool) -> Array:
    """Stored steps that the update is to take, not rounded."""
    sizes = step_sizes(graph, u.candidate.param).reshape(-1, *(1,) * (grad.ndim - 1))
    d = rate * grad.astype(np.float64)
    return -d / sizes if qas else -d * sizes


@pytest.mark.parametrize(
    ("qas", "rate", "moves"),
    [(True, 0.05, ("i8", "i32")), (False, 3e3, ("i8",)), (False, 1e6, ("i8", "i32"))],
)
def test_quantization_aware_scaling(qas: bool, rate: float, moves: Sequence[str]) -> None:
    """G' = G_int / s^2 moves the real weight by the real step; without it, G_int = G s."""
    spec = TrainingSpec(qas=qas, rounding="nearest")
    graph, training, (env,) = updated(spec, rate)
    moved = Counter[str]()
    for u in training.updates:
        old, new = env[u.value.name].astype(np.int64), env[u.apply_node.out.name].astype(np.int64)
        steps = real_steps(graph, u, env[u.grad.name], rate, qas=qas)
        wanted = old + steps
        if u.value.type.dtype == "i8":
            wanted = np.clip(wanted, LOW, HIGH)
        assert np.abs(new - wanted).max() <= 0.5 + 1e-6 * np.abs(steps).max()
        moved[u.value.type.dtype] += int((new != old).sum())
    assert all(moved[dtype] > 10 for dtype in moves)


def test_stochastic_rounding_is_unbiased() -> None:
    """Over many numbers of the update, the mean step is the real one."""
    count, rate = 800, 0.01
    graph, training, results = updated(TrainingSpec(), rate, range(1, count + 1))
    worst, between = 0.0, 0
    for u in training.updates:
        old = results[0][u.value.name].astype(np.int64)
        steps = real_steps(graph, u, results[0][u.grad.name], rate, qas=True)
        news = np.stack([env[u.apply_node.out.name].astype(np.int64) for env in results])
        free = (np.abs(old + steps) < HIGH - 1) if u.value.type.dtype == "i8" else steps == steps
        fraction = steps - np.floor(steps)
        error = np.abs(news.mean(axis=0) - old - steps)[free]
        deviation = np.sqrt(fraction * (1 - fraction) / count)[free]
        slack = 5.5 * deviation + 1e-5 * np.abs(steps[free]) + 1e-6  # steps are taken in fp32
        worst = max(worst, float((error / slack).max()))
        between += int(((fraction > 0.05) & (fraction < 0.95))[free].sum())
    assert between > 300
    assert worst < 1


def test_parameters_draw_independent_numbers() -> None:
    _, training, (one, two) = updated(TrainingSpec(), 0.01, (1, 2))
    assert any(
        not np.array_equal(one[u.apply_node.out.name], two[u.apply_node.out.name])
        for u in training.updates
    )
    streams = [u.apply_node.int_attr("stream") for u in training.updates]
    assert len(set(streams)) == len(streams)
    for u, stream in zip(training.updates, streams, strict=True):
        assert stream == zlib.crc32(u.candidate.param.encode()) & 0x7FFFFFFF


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_saturates_and_never_wraps(rounding: Any) -> None:
    _, training, (env,) = updated(TrainingSpec(rounding=rounding), 1e13)
    at_bounds = 0
    for u in training.updates:
        old, new = env[u.value.name].astype(np.int64), env[u.apply_node.out.name].astype(np.int64)
        grad = env[u.grad.name]
        assert ((new - old) * np.sign(grad) <= 0).all()
        far = np.abs(grad) > 1e-6  # steps beyond 2^30 are cut to it
        low, high = (LOW, HIGH) if u.value.type.dtype == "i8" else (-(2**30), 2**30)
        want = np.clip(old - np.sign(grad).astype(np.int64) * 2**30, low, high)
        assert np.array_equal(new[far], want[far])
        at_bounds += int(far.sum())
    assert at_bounds > 500


def test_a_spec_knows_its_roundings() -> None:
    with pytest.raises(UsageError, match="rounding up is not one of stochastic, nearest"):
        TrainingSpec(rounding="up")  # type: ignore[arg-type]


# --- plans ----------------------------------------------------------------------------------------


def plan_of(
    net: str,
    spec: TrainingSpec,
    *,
    part: bool = False,
    f32: Sequence[str] = (),
    inputs: bool = False,
    squeeze: float | None = None,
    storage: str | None = None,
) -> Planned:
    low = lowered(calibrated(net), f32, inputs=inputs)
    training = build_training(low, spec, partly(low) if part else plans.whole(low))
    plan = plans.keep_all(training)
    if squeeze is not None:
        ram = plan.claims.ram_bytes
        limit = int(ram.live_peak * squeeze) + ram.total - ram.arena
        plan = plans.squeezed(low, training, ram_bytes=limit, storage=storage)
    return plan, training


CASES: dict[str, Callable[[], Planned]] = {
    "sgd": lambda: plan_of("resnet", TrainingSpec()),
    "nearest-no-qas": lambda: plan_of("cnn", TrainingSpec(qas=False, rounding="nearest")),
    "momentum-accumulate": lambda: plan_of(
        "mobile", TrainingSpec(optimizer="momentum", micro_batches=2)
    ),
    "adam-partly": lambda: plan_of("mobile", TrainingSpec(optimizer="adam"), part=True),
    "adam-accumulate-partly": lambda: plan_of(
        "resnet", TrainingSpec(optimizer="adam", micro_batches=3), part=True
    ),
    "adagrad": lambda: plan_of("cnn", TrainingSpec(optimizer="adagrad")),
    "f32-classifier": lambda: plan_of("resnet", TrainingSpec(optimizer="adam"), f32=("fc",)),
    "i8-input": lambda: plan_of("mobile", TrainingSpec(), inputs=True),
    "recompute": lambda: plan_of("resnet", TrainingSpec(micro_batches=2), squeeze=0.85),
    "paged": lambda: plan_of("resnet", TrainingSpec(), squeeze=0.8, storage="sdcard"),
}


def rate_of(case: str) -> float:
    """Without scaling, steps are smaller by the square of the scale."""
    return 1e3 if "no-qas" in case else RATE


@pytest.mark.parametrize("case", CASES)
def test_a_plan_trains_bit_for_bit_like_unconstrained_training(case: str) -> None:
    plan, training = CASES[case]()
    report = check(plan, training, load_device(plans.BOARD))
    runtime, oracle = Runtime(plan, training), Unconstrained(training)
    assert runtime.arena_nbytes == report.arena_bytes == plan.claims.ram_bytes.arena
    initial = runtime.state_bytes()
    assert initial == oracle.state_bytes(plan)
    xs, ys = samples(training, 3 * training.spec.micro_batches + 1)
    for x, y in zip(xs, ys, strict=True):
        assert runtime.train_step(x, y, rate_of(case)) == oracle.step(x, y, rate_of(case))
        assert runtime.state_bytes() == oracle.state_bytes(plan)
    changed = {u.value.name for u in integer_updates(training)}
    constants = training.graph.constants
    same = {n for n in changed if np.array_equal(oracle.state[n], constants[n])}
    assert len(same) <= len(changed) // 2
    kinds = {s.kind for s in plan.steps}
    assert ("page_in" in kinds) == (case == "paged")
    assert any(s.recompute for s in plan.steps) == (case in ("recompute", "paged"))


def test_state_is_what_the_types_take() -> None:
    """A byte per weight, four per bias, moment and accumulated gradient."""
    plan, training = CASES["momentum-accumulate"]()
    weights = sum(-(-u.value.type.nbytes // 4) * 4 for u in training.updates)
    floats_ = sum(u.value.type.size * 4 for u in training.updates)
    ram = plan.claims.ram_bytes
    assert (ram.weights, ram.optimizer, ram.accumulators) == (weights, floats_, floats_)
    for u in training.updates:
        assert u.tile_bytes == u.grad.type.size // u.grad.type.shape[0] * 4 * u.tile_rows


def _other_scales(d: dict[str, Any]) -> None:
    scales = [(s, r) for s in d["steps"] for r in s["reads"] if s["kind"] == "update" and r]
    (one, mine), (_, other) = [(s, r) for s, r in scales if r.endswith("conv1.weight/scale")]
    one["reads"] = [other if r == mine else r for r in one["reads"]]


def _float_weight(d: dict[str, Any]) -> None:
    b = next(b for b in d["buffers"] if b["value"] == "fc.weight")
    b["dtype"], b["shape"] = "f32", [b["bytes"] // 4]


def _tile_of_bytes(d: dict[str, Any]) -> None:
    """As if the gradient were as small as the weight."""
    b = next(b for b in d["buffers"] if b["value"] == "tile:b0.conv1/grad_weight")
    b["bytes"], b["shape"] = b["bytes"] // 4, [b["bytes"] // 4]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_scales, r"reads buffer .*weight/scale of .* instead of b\d\.conv1\.weight/scale"),
        (_float_weight, r"is f32\[3\] in the plan but i8\[3,4\] in the graph"),
        (_tile_of_bytes, "scratch buffer tile:"),
    ],
)
def test_the_checker_finds(change: Callable[[dict[str, Any]], None], reason: str) -> None:
    plan, training = CASES["sgd"]()
    content = plan.model_dump(mode="json")
    change(content)
    with pytest.raises(CheckError, match=reason):
        check(Plan.model_validate(content), training, load_device(plans.BOARD))


@pytest.mark.parametrize("tile", [4, 70, 1 << 20])
def test_results_do_not_depend_on_tiles(tile: int) -> None:
    plan, training = CASES["i8-input"]()
    other_plan, other = plan_of("mobile", TrainingSpec(tile_bytes=tile), inputs=True)
    assert [u.tile_rows for u in other.updates] != [u.tile_rows for u in training.updates]
    one, two = Runtime(plan, training), Runtime(other_plan, other)
    for x, y in zip(*samples(training, 3), strict=True):
        assert one.train_step(x, y, RATE) == two.train_step(x, y, RATE)
    assert one.state_bytes() == two.state_bytes()


def test_learns() -> None:
    """Four noisy patterns are told apart after a hundred updates of i8 weights."""
    plan, training = CASES["i8-input"]()
    rng = np.random.default_rng(9)
    patterns = rng.standard_normal((4, *training.sample.type.shape[1:]))
    y = rng.integers(0, 4, 64)
    x = (patterns[y] + 0.3 * rng.standard_normal((64, *patterns.shape[1:]))).astype(np.float32)
    runtime = Runtime(plan, training)

    def hits() -> int:
        found = [runtime.infer(sample[None]).argmax() for sample in x]
        return int((np.array(found) == y).sum())

    before = hits()
    history = train(runtime, x, y, steps=100, lr=0.01)
    assert history.stopped is None
    assert hits() >= 60 > before


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["adam-partly", "f32-classifier"])
def test_parameters_are_real_numbers(case: str, tmp_path: Path) -> None:
    plan, training = CASES[case]()
    graph = calibrated({"adam-partly": "mobile", "f32-classifier": "resnet"}[case])
    runtime, oracle = Runtime(plan, training), Unconstrained(training)
    for x, y in zip(*samples(training, 2), strict=True):
        runtime.train_step(x, y, RATE)
        oracle.step(x, y, RATE)
    params = runtime.params()
    assert set(params) == set(param_slots(graph))
    for name, data in params.items():
        assert data.dtype == np.float32
        want = real(whole_stored(training, oracle.state, name), graph, name)
        np.testing.assert_allclose(data, want, rtol=1e-6)
    state = runtime.state_bytes()
    runtime.set_params(params)
    assert runtime.state_bytes() == state
    fresh = Runtime(plan, training)
    fresh.set_params(params)
    again = fresh.params()
    assert all(np.array_equal(again[n], data) for n, data in params.items())
    save_learned(runtime, tmp_path / "learned.npz")
    with np.load(tmp_path / "learned.npz") as saved:
        assert set(saved) == {u.candidate.param for u in training.updates}
        assert all(np.array_equal(saved[n], params[n]) for n in saved)


def test_parameters_are_quantized_when_set() -> None:
    plan, training = plan_of("mobile", TrainingSpec())
    graph, runtime = calibrated("mobile"), Runtime(plan, training)
    rng = np.random.default_rng(5)
    wanted = {n: rng.standard_normal(d.shape) * 0.4 for n, d in runtime.params().items()}
    runtime.set_params({n: d.astype(np.float32) for n, d in wanted.items()})
    for name, data in runtime.params().items():
        sizes = step_sizes(graph, name).reshape(-1, *(1,) * (data.ndim - 1))
        limits = (LOW, HIGH) if name.endswith("weight") else (-(2**30), 2**30)
        nearest = np.clip(wanted[name], limits[0] * sizes, limits[1] * sizes)
        assert (np.abs(data - nearest) <= 0.501 * sizes).all(), name


def test_parameters_that_can_not_be_set() -> None:
    plan, training = CASES["adam-partly"]()
    runtime = Runtime(plan, training)
    params = runtime.params()
    part = params["b0.expand.weight"].copy()
    part[:, -1] += 1.0
    with pytest.raises(UsageError, match="keeps part of it frozen in flash"):
        runtime.set_params({"b0.expand.weight": part})
    bias = params["fc.bias"].copy()
    bias[0] = np.nan
    with pytest.raises(UsageError, match=r"fc\.bias is stored in integers and must be finite"):
        runtime.set_params({"fc.bias": bias})


def test_a_diverging_run_keeps_the_last_good_state() -> None:
    """Moments overflow where integers can't show it."""
    plan, training = plan_of("cnn", TrainingSpec(optimizer="momentum"))
    runtime = Runtime(plan, training)
    moment = next(u.states[0].name for u in training.updates)
    assert runtime.is_finite()
    runtime._resident[moment][...] = np.inf
    assert not runtime.is_finite()


def test_command_line(tmp_path: Path) -> None:
    """Options reach the plan, which verifies, trains and saves real numbers."""
    x = floats(np.random.default_rng(3), 16, 2, 6, 6)
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(16) % 3)
    model, data, out = export(nets.cnn(), tmp_path), str(tmp_path / "data.npz"), tmp_path / "out"

    def odt_plan(*arguments: str) -> str:
        command = [sys.executable, "-m", "odt_plan.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    options = ("--ram", "32KB", "--flash", "1MB", "--calib", data, "--precision", "*=i8")
    update = ("--train", "conv1.weight=0.5,conv2.bias,fc.weight", "--no-qas")
    told = odt_plan(str(model), *options, *update, "--rounding", "nearest", "-o", str(out))
    assert "i8 without QAS, nearest rounding" in told
    plan = load_plan(out / "plan.json")
    assert (plan.training.qas, plan.training.rounding) == (False, "nearest")
    odt_plan("verify", str(out / "plan.json"))
    saved = tmp_path / "learned.npz"
    odt_plan("run", str(out / "plan.json"), "--data", data, "--steps", "3", "--save", str(saved))
    with np.load(saved) as learned:
        assert {n: learned[n].dtype for n in learned} == dict.fromkeys(
            ("conv1.weight", "conv2.bias", "fc.weight"), np.dtype(np.float32)
        )
        assert learned["conv1.weight"].shape == (4, 4, 3, 3)


# --- C --------------------------------------------------------------------------------------------


@needs_gcc
@pytest.mark.parametrize("case", CASES)
def test_host_equals_numpy_bit_for_bit(case: str, tmp_path: Path) -> None:
    plan, training = CASES[case]()
    name = emit_c(plan, training, tmp_path)[0].stem
    program = lane.build_host(tmp_path, name)
    rate = rate_of(case)
    result = lane.run_host(program, lane.training_input(*samples(training, 7), rate))
    assert result.exit_code == 0, result.stdout
    assert result.value("selftest") == 0
    assert result.value("selftest_exact") == 1
    assert result.files["output.bin"] == reference(plan, training, 7, rate)


@needs_gcc
def test_selftest_finds_wrong_integers(tmp_path: Path) -> None:
    """One step off may be rounding, two are not."""
    plan, training = CASES["sgd"]()
    name = emit_c(plan, training, tmp_path)[0].stem
    source = tmp_path / f"{name}_selftest.c"
    text = source.read_text()
    begin = text.index("golden_integers[")
    first = text.index("{", begin) + 1
    value = int(text[first : text.index(",", first)])
    codes = []
    for shift in (1, 2):
        moved = text[first:].replace(str(value), str(value + shift), 1)
        source.write_text(text[:first] + moved)
        program = lane.build_host(tmp_path, name)
        data = lane.training_input(*samples(training, 1), RATE)
        codes.append(lane.run_host(program, data).value("selftest"))
    assert codes == [0, 8]


@needs_zig
@pytest.mark.parametrize("case", ["momentum-accumulate", "adam-partly"])
def test_cortex_m7(case: str, tmp_path: Path) -> None:
    on_board(CASES[case](), tmp_path)


@needs_qemu
def test_qemu_with_the_mpu_on(tmp_path: Path) -> None:
    on_board(CASES["sgd"](), tmp_path, "cortex-m7", "gcc", "qemu", mpu=True)
