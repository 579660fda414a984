"""Update sets of Tiny Training Engine on its networks: gradients against autograd of the files.

The oracle evaluates the QDQ file itself in float64 by PyTorch, so that importer, lowering and
gradient rules are all put to the test. QuantizeLinear passes its gradient straight through where
the stored value is strictly inside the bounds of int8, which is what a stored value can tell: a
number that rounds to a bound counts as clamped.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import NodeProto
from oracle import Unconstrained
from qdq_exact import Exact, picture

from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.opdef import get_op
from odt_plan.ir.parameter_steps import steps
from odt_plan.ir.precision import all_i8, lower
from odt_plan.ir.training import TrainingGraph, TrainingSpec, Update
from odt_plan.planner.train_set import choose

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import tte

Array = NDArray[Any]
SCHEMES = [
    ("mcunet-5fps", "49kb"),
    ("mcunet-5fps", "99kb"),
    ("proxyless-w0.3", "98kb"),
    ("mbv2-w0.35", "123kb"),
]
RATE = 0.002


# -- the update sets -------------------------------------------------------------------------------


def test_convolutions_are_counted_as_in_the_layer_tables(shared: Path) -> None:
    """The n-th row of the published table has as many weights as the n-th convolution."""
    tables = (shared / "models" / "mcu_networks.md").read_text().split("\n## ")
    for network in tte.schemes(shared):
        (table,) = (t for t in tables if t.startswith(network))
        rows = [r.split("|") for r in table.splitlines() if r.startswith("| ") and r[2].isdigit()]
        graph = import_model(tte.model_path(shared, network))
        convs = [n for n in graph.nodes if n.op == "Conv"]
        sizes = [n.inputs[1].type.size for n in convs if n.inputs[1] is not None]
        assert sizes == [int(r[10]) for r in rows], network


def test_a_scheme_by_hand(shared: Path) -> None:
    """49 KB: biases of convolutions 22 to 41, parts of three weights, the classifier."""
    scheme = tte.schemes(shared)["mcunet-5fps"]["49kb"]
    items = tte.train_items(import_model(tte.model_path(shared, "mcunet-5fps")), scheme)
    assert len(items) == 20 + 3 + 2
    assert items[0] == "b7.dw.bias"
    assert items[19] == "b13.pw2.bias"
    weights = ("b8.pw1.weight=0.25", "b9.pw1.weight=0.5", "b10.pw1.weight=0.5")
    assert items[20:] == (*weights, "fc.weight", "fc.bias")


def training_of(shared: Path, network: str, scheme: str) -> TrainingGraph:
    forward = import_model(tte.model_path(shared, network))
    low = lower(forward, all_i8(forward, inputs=True))
    items = tte.train_items(forward, tte.schemes(shared)[network][scheme])
    chosen = choose(low, items, candidates(low))
    assert chosen is not None
    training = build_training(low, TrainingSpec(), chosen)
    assert {u.value.type.dtype for u in training.updates} == {"i8", "i32"}
    assert len(training.updates) == len(items)
    return training


# -- gradients -------------------------------------------------------------------------------------


class _StraightThrough(torch.autograd.Function):
    """The stored value that we have; the gradient passes where it is inside the bounds.

    At the end of the network also where a step against it leads back inside.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, held: torch.Tensor, scale: torch.Tensor, end: bool
    ) -> Any:
        ctx.save_for_backward(held, scale)
        ctx.end = end
        return held.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        held, scale = ctx.saved_tensors
        above, below = held > -128, held < 127
        if ctx.end:
            above, below = above | (grads[0] < 0), below | (grads[0] > 0)
        return grads[0] * above * below / scale, *[None] * 3


class Differentiable(Exact):
    """The file with a gradient: parameters are leaves, rounding is straight through.

    Our stored values take the place of the rounded ones, so that both follow the same numbers; they
    are at most a step away, and hardly ever.

    Attributes:
        leaves: Real parameters, by the names of the float model.
        flips: Stored values that are a step away.
        count: Stored values.
    """

    def __init__(self, path: Path, held: Mapping[str, Array]) -> None:
        super().__init__(path)
        self.held = held
        self.leaves: dict[str, torch.Tensor] = {}
        self.flips = self.count = 0
        self.dequantized = {n.input[0]: n.output[0] for n in self.graph.node}

    def loss(self, x: Array, label: int) -> torch.Tensor:
        """Cross entropy of the logits."""
        values = {k: torch.from_numpy(np.array(a, np.float64)) for k, a in self.constants.items()}
        values[self.graph.input[0].name] = torch.from_numpy(x)
        for node in self.graph.node:
            values[node.output[0]] = self._node(node, [values[i] for i in node.input if i])
        logits = values[self.graph.output[0].name]
        return torch.nn.functional.cross_entropy(logits, torch.tensor([label]))

    def _node(self, node: NodeProto, operands: list[torch.Tensor]) -> torch.Tensor:
        y = super()._node(node, operands)
        if node.op_type == "DequantizeLinear" and node.input[0] in self.constants:
            y = self.leaves[node.output[0]] = y.detach().requires_grad_()
        if node.op_type == "QuantizeLinear":
            held = torch.from_numpy(self._stored(node).astype(np.float64))
            off = (held - y.detach()).abs()
            assert off.max() <= 1, node.name
            self.flips += int((off > 0).sum())
            self.count += off.numel()
            end = self.dequantized[node.output[0]] == self.graph.output[0].name
            y = _StraightThrough.apply(operands[0], held, operands[1], end)  # type: ignore[no-untyped-call]
        return y

    def _stored(self, node: NodeProto) -> Array:
        """Our integers: under the name of either end of the quantizer, or of what it gives back."""
        real = self.dequantized[node.output[0]]
        names = (node.output[0], node.input[0], f"{real}/i8")
        return next(self.held[n] for n in names if n in self.held)


def channel_axis(u: Update) -> int:
    """Axis along which a weight is updated in part."""
    slot = next(s for s in get_op(u.owner.op).params if u.owner.inputs[s.index] is u.value)
    axis = slot.channel_axis(u.owner)
    assert axis is not None
    return axis


def learn(file: Exact, training: TrainingGraph, state: Mapping[str, Array]) -> None:
    """Write updated integers into the file."""
    for u in training.updates:
        stored = file.constants[f"{u.candidate.param}_q"].copy()
        k = u.candidate.channels
        part = np.s_[:] if k is None else (np.s_[:],) * channel_axis(u) + (np.s_[:k],)
        assert stored[part].shape == state[u.value.name].shape
        stored[part] = state[u.value.name]
        file.constants[f"{u.candidate.param}_q"] = stored


def evaluated(
    training: TrainingGraph, oracle: Unconstrained, x: Array, label: int
) -> dict[str, Array]:
    """Every value of the training step that would come next."""
    hyper = np.array([RATE, 1, oracle.updates + 1], np.float32)
    target = np.array([label], np.int32)
    feeds = {training.sample.name: x, training.target.name: target, training.hyper.name: hyper}
    return run(training.graph, {**feeds, **oracle.state})


@pytest.mark.parametrize("updates", [0, 2])
@pytest.mark.parametrize(("network", "scheme"), SCHEMES)
def test_gradients_equal_autograd(network: str, scheme: str, updates: int, shared: Path) -> None:
    """Of every updated tensor, through all residual blocks, before and after updates."""
    training = training_of(shared, network, scheme)
    oracle = Unconstrained(training)
    for i in range(updates):
        x = picture(training.sample.type.shape, 10 + i)
        oracle.step(x, np.array([i], np.int32), RATE)
    x, label = picture(training.sample.type.shape, updates), 3 + updates
    env = evaluated(training, oracle, x, label)
    held = {n: env[n] for n, v in training.graph.values.items() if v.type.dtype == "i8"}
    reference = Differentiable(tte.model_path(shared, network), held)
    learn(reference, training, oracle.state)
    quant = training.sample.type.quant
    assert quant is not None
    loss = reference.loss(quant.dequantize(x).astype(np.float64), label)
    loss.backward()  # type: ignore[no-untyped-call]
    assert env[training.loss.name] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert reference.flips <= 1e-4 * reference.count
    for u in training.updates:
        grad = reference.leaves[u.candidate.param].grad
        assert grad is not None
        want = grad.numpy()
        if u.candidate.channels is not None:
            want = np.split(want, [u.candidate.channels], channel_axis(u))[0]
        agree(u.candidate.param, env[u.grad.name], want)


def agree(name: str, got: Array, want: Array) -> None:
    """Direction and size."""
    assert got.dtype == np.float32
    assert np.linalg.norm(want) > 0, name
    size = float(np.linalg.norm(got.astype(np.float64)))
    cosine = float(np.vdot(got.astype(np.float64), want)) / (size * float(np.linalg.norm(want)))
    assert cosine >= 0.99999, (name, cosine)
    assert size == pytest.approx(float(np.linalg.norm(want)), rel=1e-4), name


# -- the update ------------------------------------------------------------------------------------


def real_target(training: TrainingGraph, env: Mapping[str, Array], u: Update, rate: float) -> Array:
    """Where the stored parameter would go without rounding and bounds."""
    slot = next(s for s in get_op(u.owner.op).params if u.owner.inputs[s.index] is u.value)
    scale = steps(u.owner, slot)
    if scale.shape[0] != u.value.type.shape[0]:
        scale = scale[: u.value.type.shape[0]]
    scale = scale.reshape(-1, *(1,) * (len(u.value.type.shape) - 1))
    return env[u.value.name] - rate * env[u.grad.name].astype(np.float64) / scale


def updated(u: Update, env: Mapping[str, Array], hyper: Array) -> Array:
    operands = [hyper if v.name == "hyper" else env[v.name] for v in u.apply_node.operands()]
    return get_op(u.apply_node.op).kernel(u.apply_node, operands)[0]


@pytest.mark.parametrize(("network", "scheme"), SCHEMES)
def test_no_parameter_wraps(network: str, scheme: str, shared: Path) -> None:
    """Every stored number moves to one of the two neighbours of its target, or to its bound."""
    training = training_of(shared, network, scheme)
    x = picture(training.sample.type.shape, 1)
    env = evaluated(training, Unconstrained(training), x, 5)
    saturated = 0
    for rate in (0.01, 100.0):
        hyper = np.array([rate, 1, 1], np.float32)
        for u in training.updates:
            new = updated(u, env, hyper).astype(np.int64)
            old = env[u.value.name].astype(np.int64)
            target = real_target(training, env, u, rate)
            low, high = (-128, 127) if u.value.type.dtype == "i8" else (-(2**30), 2**30)
            bounded = np.clip(target, np.minimum(old, low), np.maximum(old, high))
            off = np.abs(new - bounded)
            assert (off <= 1 + 1e-6 * np.abs(target - old)).all(), u.candidate.param
            assert ((new - old) * np.sign(target - old) >= 0).all(), u.candidate.param
            if u.value.type.dtype == "i8":
                saturated += int(((new == low) | (new == high)).sum())
    assert saturated > 1000  # the large step does meet the bounds


def test_the_update_is_unbiased(shared: Path) -> None:
    """The mean of many updates of a real layer is the real step: as a mean of coins scatters."""
    training = training_of(shared, "mcunet-5fps", "99kb")
    x = picture(training.sample.type.shape, 1)
    env = evaluated(training, Unconstrained(training), x, 5)
    (u,) = (u for u in training.updates if u.candidate.param == "b9.pw1.weight")
    target = real_target(training, env, u, RATE)
    count, total = 400, np.zeros(target.shape)
    for number in range(1, count + 1):
        total += updated(u, env, np.array([RATE, 1, number], np.float32))
    fraction = target - np.floor(target)
    inside = (np.abs(target) < 126) & (fraction * (1 - fraction) > 0.01)
    assert inside.sum() > 1000
    scatter = np.sqrt(fraction * (1 - fraction) / count)[inside]
    z = (total / count - target)[inside] / scatter
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    assert 0.9 < z.std() < 1.1
    assert np.abs(z).max() < 6
