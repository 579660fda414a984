"""The training graph: one step against torch, pruning, partial updates, and the verifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from op_cases import Array
from torch_recurrent import torch_recurrent

from odt_plan.ir.autodiff import build_training, candidates, param_slots
from odt_plan.ir.candidates import with_states
from odt_plan.ir.errors import GraphError, UnsupportedModelError, UsageError
from odt_plan.ir.graph import Graph, Node, TensorType, Value
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.training import Candidate, OptimizerName, TrainingGraph, TrainingSpec

T = TensorType
RATE = 0.05


# --- an independent forward pass ------------------------------------------------------------------


def torch_forward(graph: Graph, x: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
    """The forward graph by torch's operators."""
    env: dict[str, torch.Tensor] = {graph.inputs[0].name: x, **params}
    for node in graph.nodes:
        a = [None if v is None else env[v.name] for v in node.inputs]
        env[node.out.name] = _torch_op(node, a)
    return env[graph.outputs[0].name]


def _torch_op(node: Node, a: Sequence[torch.Tensor | None]) -> torch.Tensor:
    f, attrs = torch.nn.functional, node.attrs
    x, *rest = a
    assert x is not None
    match node.op:
        case "Conv":
            top, left, bottom, right = node.ints_attr("pads")
            x = f.pad(x, (left, right, top, bottom))
            stride, dilation = node.ints_attr("strides"), node.ints_attr("dilations")
            return f.conv2d(x, rest[0], rest[1], stride, 0, dilation, node.int_attr("group"))
        case "MaxPool" | "AveragePool":
            assert not any(node.ints_attr("pads"))
            pool = f.max_pool2d if node.op == "MaxPool" else f.avg_pool2d
            return pool(x, node.ints_attr("kernel_shape"), node.ints_attr("strides"))
        case "Transpose":
            return x.permute(node.ints_attr("perm"))
        case "Gemm":
            return f.linear(x, rest[0] if attrs["trans_b"] else rest[0].T, rest[1])
        case "MatMul":
            return x @ rest[0]
        case "Add":
            return x + rest[0]
        case "Mul":
            return x * rest[0]
        case "LayerNormalization":
            shape = list(x.shape[node.int_attr("axis") % x.ndim :])
            return f.layer_norm(x, shape, rest[0], rest[1], node.float_attr("epsilon"))
        case "Tanh":
            return torch.tanh(x)
        case "Gelu":
            return f.gelu(x, approximate="tanh")
        case "Concat":
            return torch.cat([t for t in a if t is not None], node.int_attr("axis"))
        case "Slice":
            assert set(node.ints_attr("steps")) == {1}
            for i, n in enumerate(node.ints_attr("sizes")):
                x = x.narrow(i, node.ints_attr("starts")[i], n)
            return x
        case "Relu":
            return f.relu(x)
        case "Sigmoid":
            return torch.sigmoid(x)
        case "Softmax":
            return torch.softmax(x, node.int_attr("axis"))
        case "Reshape":
            return x.reshape(node.ints_attr("shape"))
        case "LSTM" | "GRU" | "RNN":
            return torch_recurrent(node, x, *rest)
        case "GlobalAveragePool":
            return x.mean(dim=(2, 3), keepdim=True)
        case "ReduceMean":
            return x.mean(dim=node.ints_attr("axes"), keepdim=bool(attrs["keepdims"]))
        case _:
            raise AssertionError(node.op)


class Torch:
    """Training by torch.autograd and torch.optim, updating what the candidates say."""

    def __init__(
        self,
        graph: Graph,
        spec: TrainingSpec,
        chosen: Sequence[Candidate],
        dtype: str,
        rate: float,
    ) -> None:
        self.graph, self.spec, self.chosen = graph, spec, chosen
        data = {k: v.astype(dtype) for k, v in graph.constants.items()}
        self.params = {k: torch.from_numpy(v) for k, v in data.items()}
        self.leaves: dict[str, torch.Tensor] = {}
        for c in chosen:
            whole = self.params[c.param]
            leaf = whole.narrow(self.axis(c), 0, c.channels) if c.channels else whole
            self.leaves[c.param] = leaf.clone().requires_grad_()
        plain = [self.leaves[c.param] for c in chosen if c.state == "sgd"]
        parameters = [self.leaves[c.param] for c in chosen if c.state != "sgd"]
        self.optimizers: list[torch.optim.Optimizer] = []
        if plain:
            self.optimizers.append(torch.optim.SGD(plain, rate))
        if parameters and spec.optimizer == "adam":
            betas = (spec.beta1, spec.beta2)
            self.optimizers.append(torch.optim.Adam(parameters, rate, betas, spec.epsilon))
        elif parameters and spec.optimizer == "adagrad":
            self.optimizers.append(torch.optim.Adagrad(parameters, rate, eps=spec.epsilon))
        elif parameters:
            momentum = spec.momentum if spec.optimizer == "momentum" else 0.0
            self.optimizers.append(torch.optim.SGD(parameters, rate, momentum))

    def axis(self, c: Candidate) -> int:
        node, slot = param_slots(self.graph)[c.param][0]
        axis = slot.channel_axis(node)
        assert axis is not None
        return axis

    def step(self, batches: Sequence[tuple[Array, Array]]) -> float:
        """One update by the mean gradient of the micro-batches; returns the last loss."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for x, target in batches:
            params = dict(self.params)
            for c in self.chosen:
                leaf, whole = self.leaves[c.param], self.params[c.param]
                if c.channels:
                    axis = self.axis(c)
                    cold = whole.narrow(axis, c.channels, whole.shape[axis] - c.channels)
                    leaf = torch.cat([leaf, cold], dim=axis)
                params[c.param] = leaf
            y = torch_forward(self.graph, torch.from_numpy(x), params)
            if self.spec.loss == "mse":
                loss = torch.nn.functional.mse_loss(y, torch.from_numpy(target))
            else:
                if self.graph.nodes[-1].op == "Softmax":
                    y = torch.log(y)
                loss = torch.nn.functional.cross_entropy(y, torch.from_numpy(target).long())
            (loss / len(batches)).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return float(loss.detach())


class Interpreted:
    """The same training by the interpreter on the training graph."""

    def __init__(self, training: TrainingGraph, dtype: str, rate: float) -> None:
        self.training, self.steps, self.dtype, self.rate = training, 0, dtype, rate
        self.state = {k: v.astype(dtype) for k, v in training.graph.constants.items()}
        for u in training.updates:
            for v in u.states:
                self.state[v.name] = np.zeros(v.type.shape, dtype)

    def step(self, batches: Sequence[tuple[Array, Array]]) -> float:
        t, spec = self.training, self.training.spec
        self.steps += 1
        hyper = [self.rate, 1.0, self.steps]
        if spec.optimizer == "adam":
            hyper[1] = 1 / np.sqrt(1 - spec.beta2**self.steps)
            hyper.append(self.rate / (1 - spec.beta1**self.steps))
        feeds = {**self.state, t.hyper.name: np.array(hyper, self.dtype)}
        accumulators = {
            u.accumulator.name: np.zeros(u.value.type.shape, self.dtype)
            for u in t.updates
            if u.accumulator is not None
        }
        for x, target in batches:
            env = run(t.graph, {**feeds, **accumulators, t.sample.name: x, t.target.name: target})
            for u in t.updates:
                if u.accumulator is not None and u.accumulate_node is not None:
                    accumulators[u.accumulator.name] = env[u.accumulate_node.out.name]
        self.values = env
        for u in t.updates:
            for v, new in zip((u.value, *u.states), u.apply_node.outputs, strict=True):
                self.state[v.name] = env[new.name]
        return float(env[t.loss.name])


def batches(
    graph: Graph, spec: TrainingSpec, seed: int = 0, dtype: str = "f4"
) -> list[tuple[Array, Array]]:
    rng = np.random.default_rng(seed)
    x, y = graph.inputs[0].type, graph.outputs[0].type
    result = []
    for _ in range(spec.micro_batches):
        target = (
            rng.standard_normal(y.shape).astype(dtype)
            if spec.loss == "mse"
            else rng.integers(0, y.shape[1], y.shape[0]).astype(np.int32)
        )
        result.append((rng.standard_normal(x.shape).astype(dtype), target))
    return result


def check_against_torch(
    graph: Graph,
    spec: TrainingSpec,
    chosen: Sequence[Candidate],
    *,
    rate: float = RATE,
    input_scale: float = 1.0,
) -> None:
    """Train both ways: one step in fp32, three in double, where errors can't hide or grow."""
    training = build_training(graph, spec, chosen)
    assert {u.candidate for u in training.updates} == set(chosen)
    for dtype, steps, tolerance in (("f4", 1, 1e-5), ("f8", 3, 1e-9)):
        mine = Interpreted(training, dtype, rate)
        theirs = Torch(graph, spec, chosen, dtype, rate)
        before = {u.value.name: mine.state[u.value.name].copy() for u in training.updates}
        for i in range(steps):
            drawn = batches(graph, spec, i, dtype)
            data = [((x * input_scale).astype(dtype), target) for x, target in drawn]
            # -log(p) of a p near 1 carries the rounding of p
            near = pytest.approx(
                theirs.step(data), rel=tolerance, abs=4 * float(np.finfo(dtype).eps)
            )
            assert mine.step(data) == near
        for u in training.updates:
            name, old = u.candidate.param, before[u.value.name]
            want = theirs.leaves[name].detach().numpy() - old
            assert np.abs(want).max() > 0, f"{name} did not move"
            got = mine.state[u.value.name] - old
            # a change is a difference of two weights, so it carries their rounding
            floor = 2 * np.finfo(dtype).eps * np.abs(old).max()
            error = np.abs(got - want).max()
            assert error <= tolerance * np.abs(want).max() + floor, (name, dtype)


def whole(graph: Graph) -> list[Candidate]:
    return [Candidate(name) for name in param_slots(graph)]


# --- networks -------------------------------------------------------------------------------------


def with_softmax(graph: Graph) -> Graph:
    graph.outputs = [graph.add_node("Softmax", graph.outputs, {"axis": -1}, name="probs").out]
    return graph


def depthwise_net() -> Graph:
    """Depthwise and pointwise convolutions with a residual sum and a gate (fan-out of three)."""
    rng, g = np.random.default_rng(5), Graph("depthwise")
    x = g.add_input("x", T((2, 3, 6, 6)))
    x = nets.relu(g, nets.conv(g, rng, x, "stem", 6), "stem.relu")
    w = g.add_constant("dw.weight", rng.standard_normal((6, 1, 3, 3)).astype(np.float32) / 3)
    b = g.add_constant("dw.bias", rng.standard_normal(6).astype(np.float32) / 3)
    attrs = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1), "group": 6}
    y = g.add_node("Conv", (x, w, b), attrs, name="dw").out
    y = nets.conv(g, rng, y, "pw", 6, kernel=1)
    gate = g.add_node("Sigmoid", (x,), name="gate").out
    y = g.add_node("Mul", (y, gate), name="gated").out
    x = g.add_node("Add", (x, y), name="sum").out
    x = g.add_node("ReduceMean", (x,), {"axes": (2, 3), "keepdims": 0}, name="mean").out
    g.outputs = [nets.dense(g, rng, x, "fc", 4)]
    g.verify()
    return g


def affine_net() -> Graph:
    """MatMul layers with broadcast biases and a scale, as frameworks export them."""
    rng, g = np.random.default_rng(6), Graph("affine")
    x = g.add_input("x", T((2, 3, 5)))
    for i, (k, n) in enumerate(((5, 8), (8, 4))):
        w = g.add_constant(f"w{i}", rng.standard_normal((k, n)).astype(np.float32) / 2)
        scale = g.add_constant(f"scale{i}", rng.standard_normal(n).astype(np.float32))
        bias = g.add_constant(f"bias{i}", rng.standard_normal((1, n)).astype(np.float32))
        x = g.add_node("MatMul", (x, w), name=f"matmul{i}").out
        x = g.add_node("Mul", (x, scale), name=f"mul{i}").out
        x = g.add_node("Add", (bias, x), name=f"add{i}").out
        x = g.add_node("Sigmoid", (x,), name=f"sigmoid{i}").out
    g.outputs = [x]
    g.verify()
    return g


def tied_net() -> Graph:
    """One weight and one bias used by two layers."""
    rng, g = np.random.default_rng(7), Graph("tied")
    x = g.add_input("x", T((2, 5)))
    w = g.add_constant("w", rng.standard_normal((5, 5)).astype(np.float32) / 2)
    b = g.add_constant("b", rng.standard_normal(5).astype(np.float32))
    first = nets.relu(g, g.add_node("Gemm", (x, w, b), {"trans_b": 1}, name="first").out, "relu")
    second = g.add_node("Gemm", (first, w, b), {"trans_b": 1}, name="second").out
    g.outputs = [g.add_node("Add", (first, second), name="sum").out]
    g.verify()
    return g


# Adam with a small epsilon makes the sign of a gradient of its rounding error; this one does not.
SPECS = [
    TrainingSpec(),
    TrainingSpec(loss="mse"),
    TrainingSpec(optimizer="momentum", momentum=0.7),
    TrainingSpec(optimizer="adagrad", epsilon=0.05),
    TrainingSpec(optimizer="adam", beta1=0.8, beta2=0.95, epsilon=0.05),
    TrainingSpec(micro_batches=3),
    TrainingSpec(optimizer="adam", micro_batches=2, epsilon=0.05),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.loss}-{s.optimizer}-{s.micro_batches}")
@pytest.mark.parametrize(
    "graph",
    [
        nets.mlp(batch=3),
        with_softmax(nets.mlp(batch=2, seed=1)),
        nets.cnn(batch=2),
        nets.resnet(batch=2),
        depthwise_net(),
        nets.transformer(blocks=2, batch=2),
        nets.recurrent(batch=2),
    ],
    ids=lambda g: g.name,
)
def test_full_update_equals_torch(graph: Graph, spec: TrainingSpec) -> None:
    if graph.nodes[-1].op == "Softmax" and spec.loss == "mse":
        assert build_training(graph, spec, whole(graph)).graph.nodes, "differentiates Softmax"
    check_against_torch(graph, spec, whole(graph))


@pytest.mark.parametrize(
    "model",
    [
        *("mlperf_resnet8_bn", "st_har", "cntk_mnist", "tinymaix_mnist_cnn", "kwt1_op17"),
        "tflm_mnist_lstm",
    ],
)
def test_full_update_of_a_pretrained_model_equals_torch(model: str, shared: Path) -> None:
    graph = import_model(shared / "models" / f"{model}.onnx")
    spec = TrainingSpec(optimizer="momentum")
    # small samples and steps keep the probabilities of these sure models away from 0 and 1
    check_against_torch(graph, spec, whole(graph), rate=1e-4, input_scale=0.2)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("graph", [affine_net(), tied_net()], ids=lambda g: g.name)
def test_scales_biases_and_shared_parameters_equal_torch(
    graph: Graph, optimizer: OptimizerName
) -> None:
    loss = "mse" if graph.name == "affine" else "cross_entropy"
    for micro_batches in (1, 2):
        spec = TrainingSpec(loss, optimizer, micro_batches)
        check_against_torch(graph, spec, whole(graph))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("optimizer", ["momentum", "adagrad", "adam"])
@pytest.mark.parametrize("graph", [nets.cnn(batch=2), tied_net()], ids=lambda g: g.name)
def test_plain_sgd_beside_an_optimizer_equals_torch(
    graph: Graph, optimizer: OptimizerName, micro_batches: int
) -> None:
    """Every other parameter has given its state up."""
    spec = TrainingSpec("cross_entropy", optimizer, micro_batches, epsilon=0.05)
    chosen = [replace(c, state="sgd") if i % 2 else c for i, c in enumerate(whole(graph))]
    training = build_training(graph, spec, chosen)
    slots = len(spec.state_slots)
    assert [len(u.states) for u in training.updates].count(slots) == (len(chosen) + 1) // 2
    check_against_torch(graph, spec, chosen)


@pytest.mark.parametrize("graph", [nets.cnn(batch=2), tied_net()], ids=lambda g: g.name)
def test_ways_to_keep_state_stand_side_by_side_in_the_superset(graph: Graph) -> None:
    """Each updates as it does alone, by the same gradient."""
    spec = TrainingSpec(optimizer="momentum", micro_batches=2)
    every = with_states(whole(graph), ("keep", "sgd"))
    superset = build_training(graph, spec, every)
    assert {u.candidate for u in superset.updates} == set(every)
    together = Interpreted(superset, "f4", RATE)
    data = batches(graph, spec, 0, "f4")
    together.step(data)
    for c in every:
        alone = Interpreted(build_training(graph, spec, [c]), "f4", RATE)
        alone.step(data)
        (mine,) = (u for u in superset.updates if u.candidate == c)
        assert np.array_equal(
            together.values[mine.apply_node.out.name], alone.state[mine.value.name]
        )


def test_sgd_has_no_state_to_give_up() -> None:
    with pytest.raises(UsageError, match="sgd has no state"):
        build_training(nets.mlp(), TrainingSpec(), [Candidate("fc0.weight", state="sgd")])


@pytest.mark.parametrize("seed", range(12))
def test_random_choices_equal_torch(seed: int) -> None:
    """Any subset of parameters, each in any part that it offers."""
    rng = np.random.default_rng(seed)
    build = [nets.mlp, nets.cnn, nets.resnet, depthwise_net, affine_net][seed % 5]
    graph = build(batch=2) if build in (nets.mlp, nets.cnn, nets.resnet) else build()
    offers: dict[str, list[Candidate]] = {}
    for c in (c for c in candidates(graph) if c.saved == "f32"):
        offers.setdefault(c.param, []).append(c)
    names = rng.choice(sorted(offers), size=rng.integers(1, len(offers) + 1), replace=False)
    chosen = [offers[n][rng.integers(len(offers[n]))] for n in names]
    spec = SPECS[seed % len(SPECS)]
    if graph.name == "affine":
        spec = TrainingSpec("mse", spec.optimizer, spec.micro_batches)
    check_against_torch(graph, spec, chosen)


# --- update order and pruning ---------------------------------------------------------------------


def test_nothing_reads_a_parameter_after_its_update() -> None:
    """Updates are in place: a later reader would see the new value."""
    for graph in (nets.resnet(), depthwise_net(), affine_net(), tied_net(), nets.transformer()):
        loss = "mse" if len(graph.outputs[0].type.shape) != 2 else "cross_entropy"
        training = build_training(graph, TrainingSpec(loss), whole(graph))
        position = {n: i for i, n in enumerate(training.graph.nodes)}
        readers = training.graph.consumers()
        for u in training.updates:
            assert readers[u.value][-1] is u.apply_node, u.candidate
            assert all(position[n] <= position[u.apply_node] for n in readers[u.value])


def test_last_layer_builds_no_input_gradient() -> None:
    graph = nets.cnn()
    training = build_training(graph, TrainingSpec(), [Candidate("fc.weight"), Candidate("fc.bias")])
    added = [n for n in training.graph.nodes if n.phase in ("backward", "update")]
    assert [n.op for n in added] == [
        "SoftmaxCrossEntropyGrad",
        "GemmGradBias",
        "SGD",
        "GemmGradWeight",
        "SGD",
    ]
    forward = [n for n in training.graph.nodes if n.phase == "forward"]
    assert [n.op for n in forward] == [n.op for n in graph.nodes], "no masks for frozen layers"


def test_bias_only_update_saves_no_inputs() -> None:
    graph = nets.resnet()
    chosen = [Candidate(c) for c in param_slots(graph) if c.endswith("bias")]
    training = build_training(graph, TrainingSpec(), chosen)
    saved = {
        v.name
        for node in training.graph.nodes
        if node.phase == "backward"
        for v in node.operands()
        if v.producer is not None and v.producer.phase == "forward" and v.type.dtype == "f32"
    }
    assert saved == set(), "masks (bits) and frozen weights are all that backward needs"


def test_layer_normalization_saves_its_input_only() -> None:
    graph = nets.transformer()
    for trained, saved in (("b0.norm2.scale", {"b0.sum"}), ("b0.norm2.bias", set())):
        training = build_training(graph, TrainingSpec(), [Candidate(trained)])
        read = {
            v.name
            for node in training.graph.nodes
            if node.phase == "backward"
            for v in node.operands()
            if v.producer is not None and v.producer.phase == "forward"
        }
        assert read == saved


def test_backward_stops_at_the_first_trained_layer() -> None:
    graph = nets.cnn(layers=3)
    training = build_training(graph, TrainingSpec(), [Candidate("conv1.weight")])
    names = {n.name for n in training.graph.nodes if n.phase == "backward"}
    assert any(n.startswith("conv2/") for n in names)
    assert "conv1/grad_weight" in names
    assert not any(n.startswith(("conv0/", "relu0/")) for n in names)
    assert not any("bias" in n for n in names)


def test_partial_update_saves_leading_channels_only() -> None:
    graph = nets.cnn(channels=4)
    training = build_training(graph, TrainingSpec(), [Candidate("conv1.weight", 1)])
    g = training.graph
    assert g.constants["conv1.weight[:1]"].shape == (4, 1, 3, 3)
    assert g.constants["conv1.weight[1:]"].shape == (4, 3, 3, 3)
    (update,) = training.updates
    assert update.grad.type == update.value.type == T((4, 1, 3, 3))
    assert update.grad_node is not None
    kept = next(v for v in update.grad_node.operands() if v.producer and v.producer.op == "Slice")
    assert kept.type.shape == (1, 1, 6, 6)
    assert kept.producer is not None
    assert kept.producer.phase == "forward"
    index = [n.name for n in g.nodes]
    assert index.index(kept.producer.name) == index.index("conv1") + 1


@pytest.mark.parametrize("graph", [nets.resnet(batch=2), depthwise_net()], ids=lambda g: g.name)
def test_superset_graph_has_the_gradients_of_every_special_graph(graph: Graph) -> None:
    every = candidates(graph)
    assert len({c.param for c in every}) < len(every), "some parameter offers a choice"
    superset = build_training(graph, TrainingSpec(), every)
    assert [u.candidate for u in superset.updates] != []
    data = batches(graph, TrainingSpec())[0]
    feeds = {"x": data[0], "target": data[1], "hyper": np.array([RATE, 1, 1], np.float32)}
    states = {
        u.value.name: np.zeros(u.value.type.shape, np.float32)
        for u in superset.updates
        if u.value.name not in superset.graph.constants
    }
    env = run(superset.graph, {**feeds, **states})
    by_candidate = {u.candidate: u for u in superset.updates}
    assert set(by_candidate) == set(every)
    for c in every:
        training = build_training(graph, TrainingSpec(), [c])
        (u,) = training.updates
        got = run(training.graph, feeds)[u.grad.name]
        assert np.array_equal(got, env[by_candidate[c].grad.name]), c
        assert [v.type for v in by_candidate[c].resident] == [v.type for v in u.resident]
        assert by_candidate[c].tile_rows == u.tile_rows


def test_build_leaves_the_forward_graph_alone() -> None:
    graph = nets.resnet()
    before, constants = repr(graph), {k: v.copy() for k, v in graph.constants.items()}
    build_training(graph, TrainingSpec(), candidates(graph))
    assert repr(graph) == before
    assert all(np.array_equal(graph.constants[k], v) for k, v in constants.items())
    graph.verify()


def test_candidates_of_a_layer() -> None:
    graph = nets.mlp((16, 4, 3))
    counts = [(c.param, c.channels) for c in candidates(graph) if c.saved == "f32"]
    assert counts == [
        *(("fc0.weight", k) for k in (2, 4, 8, None)),
        ("fc0.bias", None),
        *(("fc1.weight", k) for k in (1, 2, None)),
        ("fc1.bias", None),
    ]
    assert [(c.param, c.channels) for c in candidates(tied_net())] == [("w", None), ("b", None)]


# --- bad requests ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([], "no parameter is chosen"),
        ([Candidate("nope")], "nope is not a trainable parameter of mlp"),
        ([Candidate("fc0.bias", 1)], "fc0.bias can only be updated whole"),
        ([Candidate("fc0.weight", 8)], "has 8 input channels; 8 of them can't"),
        ([Candidate("fc0.weight", 0)], "has 8 input channels; 0 of them can't"),
        ([Candidate("fc0.bias"), Candidate("fc0.bias")], "fc0.bias is chosen twice"),
    ],
)
def test_impossible_choices_are_usage_errors(chosen: list[Candidate], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_training(nets.mlp(), TrainingSpec(), chosen)


def test_parameter_that_does_not_reach_the_loss_is_an_error() -> None:
    graph = nets.mlp()
    rng = np.random.default_rng(0)
    nets.dense(graph, rng, graph.inputs[0], "dead", 3)
    with pytest.raises(UsageError, match=r"loss does not depend on dead\.weight; freeze"):
        build_training(graph, TrainingSpec(), [Candidate("dead.weight"), Candidate("fc0.bias")])


def test_shared_parameter_can_only_be_updated_whole() -> None:
    with pytest.raises(UsageError, match="w can only be updated whole"):
        build_training(tied_net(), TrainingSpec(), [Candidate("w", 2)])


def test_micro_batches_must_be_positive() -> None:
    with pytest.raises(UsageError, match="at least 1, not 0"):
        TrainingSpec(micro_batches=0)


def test_prediction_must_suit_the_loss() -> None:
    graph = affine_net()
    with pytest.raises(UnsupportedModelError, match=r"prediction \[batch, classes\].*--loss mse"):
        build_training(graph, TrainingSpec(), whole(graph))
    graph = nets.mlp()
    graph.outputs = [graph.add_node("Softmax", graph.outputs, {"axis": 0}, name="odd").out]
    with pytest.raises(UnsupportedModelError, match=r"node odd: .* not axis 0"):
        build_training(graph, TrainingSpec(), whole(graph))


def test_operator_without_gradient_is_named() -> None:
    rng, g = np.random.default_rng(0), Graph("g")
    x = nets.dense(g, rng, g.add_input("x", T((1, 4))), "fc", 4)
    x = g.add_node("ReduceSumTo", (x,), {"shape": (1, 1)}, name="total").out
    g.outputs = [x]
    with pytest.raises(UnsupportedModelError, match="node total: ReduceSumTo has no gradient"):
        build_training(g, TrainingSpec("mse"), whole(g))


# --- the verifier ---------------------------------------------------------------------------------


def _swap(g: Graph) -> None:
    g.nodes[0], g.nodes[1] = g.nodes[1], g.nodes[0]


def _cycle(g: Graph) -> None:
    first = g.nodes[0]
    first.inputs = (g.nodes[-2].out, *first.inputs[1:])


def _wrong_type(g: Graph) -> None:
    g.nodes[0].out.type = T((1, 15))


def _same_node_name(g: Graph) -> None:
    g.nodes[1].name = g.nodes[0].name


def _same_value_name(g: Graph) -> None:
    g.nodes[1].out.name = g.nodes[0].out.name


def _computed_twice(g: Graph) -> None:
    first = g.nodes[0]
    g.nodes.insert(1, Node(first.op, "again", first.inputs, first.outputs, first.attrs))


def _drop(g: Graph) -> None:
    del g.nodes[0]


def _foreign(g: Graph) -> None:
    g.nodes[0].inputs = (Value("x", T((1, 8))), *g.nodes[0].inputs[1:])


def _wrong_data(g: Graph) -> None:
    g.constants["fc0.bias"] = np.zeros(15, np.float32)


def _wrong_dtype(g: Graph) -> None:
    g.constants["fc0.bias"] = g.constants["fc0.bias"].astype(np.float64)


def _no_output(g: Graph) -> None:
    g.outputs = [Value("nowhere", T((1, 4)))]


def _unknown_operator(g: Graph) -> None:
    g.nodes[0].op = "Bessel"


def _missing_attribute(g: Graph) -> None:
    g.nodes[0].inputs = (g.inputs[0],)


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (_swap, "before it is computed"),
        (_cycle, "before it is computed"),
        (_wrong_type, "inferred|features"),
        (_same_node_name, "node name fc0 occurs twice"),
        (_same_value_name, "value name fc0 occurs twice"),
        (_computed_twice, "does not point at its producer|computed twice"),
        (_drop, "before it is computed"),
        (_foreign, "before it is computed|of another graph"),
        (_wrong_data, "constant fc0.bias: data float32"),
        (_wrong_dtype, "constant fc0.bias: data float64"),
        (_no_output, "output nowhere is never computed"),
        (_unknown_operator, "operator Bessel is not known"),
        (_missing_attribute, "node fc0 .Gemm.: operand 1 is missing"),
    ],
)
def test_verifier_finds_the_defect(mutate, message: str) -> None:  # type: ignore[no-untyped-def]
    graph = nets.mlp()
    graph.verify()
    mutate(graph)
    with pytest.raises(GraphError, match=message):
        graph.verify()


def test_duplicate_and_impossible_values_are_refused() -> None:
    graph = Graph("g")
    graph.add_input("x", T((1, 2)))
    with pytest.raises(GraphError, match="value name x occurs twice"):
        graph.add_state("x", T((1,)))
    with pytest.raises(GraphError, match="not positive"):
        graph.add_input("y", T((0, 2)))
    with pytest.raises(GraphError, match="dtype complex128 is not supported"):
        graph.add_constant("z", np.zeros(2, np.complex128))


# --- the interpreter ------------------------------------------------------------------------------


def test_interpreter_names_what_is_wrong() -> None:
    graph = nets.mlp()
    x = np.zeros((1, 8), np.float32)
    with pytest.raises(GraphError, match="node fc0 needs x; feed it"):
        run(graph, {})
    with pytest.raises(GraphError, match="has no value of that name"):
        run(graph, {"x": x, "y": x})
    with pytest.raises(GraphError, match="node fc0 computes it"):
        run(graph, {"x": x, "fc0": np.zeros((1, 16), np.float32)})
    with pytest.raises(GraphError, match=r"feed x: shape \(8,\) is not that of f32\[1,8\]"):
        run(graph, {"x": x[0]})


def test_interpreter_takes_other_constants() -> None:
    graph = nets.mlp()
    x = np.ones((1, 8), np.float32)
    bias = np.full(4, 3.0, np.float32)
    weight = np.zeros((4, 12), np.float32)
    out = graph.outputs[0].name
    assert np.array_equal(
        run(graph, {"x": x, "fc2.weight": weight, "fc2.bias": bias})[out][0], bias
    )
