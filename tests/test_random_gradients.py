"""Every gradient, with random shapes and attributes: PyTorch, central differences, emitted C.

``random_ops`` draws the cases by hypothesis; an operator with a gradient that is not there fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from c_cases import Buffer, Library, assert_same_bits, invoke
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from op_cases import Array, Case
from random_ops import STRATEGIES, Drawn
from test_losses import REFERENCE, ended

from odt_plan.ir.grad_builder import GradBuilder
from odt_plan.ir.graph import Graph, Node, Value
from odt_plan.ir.interpreter import run
from odt_plan.ir.opdef import Sample, all_ops, get_op
from odt_plan.ir.targets import random_target
from odt_plan.ir.training import LossName, TrainingSpec

torch = pytest.importorskip("torch")

#: Gradients of integers and of mixed precision are those of their real operators, rounded: see
#: test_qops.py, test_qops_training.py, test_mixed_ops.py.
ROUNDED = {
    *("Dequantize", "MixedConv", "MixedGemm", "QAdd", "QAveragePool", "QConv", "QGemm"),
    *("QGlobalAveragePool", "QMaxPool", "Quantize", "Requantize"),
}
EXAMPLES = 20
#: Of them run in C, where each example is compiled.
IN_C = 6
STEP = 1e-6
DRAWING = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate]
)
PARAMETERS = st.floats(0.125, 3, width=32)
every_op = pytest.mark.parametrize("op", STRATEGIES)
every_loss = pytest.mark.parametrize("name", sorted(REFERENCE))


@dataclass(frozen=True, eq=False)
class Differentiated:
    """A drawn operator as a graph with its gradients."""

    drawn: Drawn
    graph: Graph
    node: Node
    dy: Value
    gradients: dict[int, Value]

    def feeds(self, real: type, seed: int = 0) -> dict[str, Array]:
        """Operands and a random gradient of the result, real numbers in ``real``."""
        stored = enumerate(self.drawn.stored(real))
        feeds = {f"x{i}": a for i, a in stored if a is not None}
        dy = np.random.default_rng(seed).uniform(-1, 1, self.dy.type.shape)
        return feeds | {"dy": np.asarray(dy, real)}


def differentiated(drawn: Drawn) -> Differentiated:
    graph = Graph(drawn.op)
    types = enumerate(drawn.types)
    inputs = [None if t is None else graph.add_input(f"x{i}", t) for i, t in types]
    node = graph.add_node(drawn.op, inputs, drawn.attrs, name="node")
    dy = graph.add_input("dy", node.out.type)
    vjp = get_op(drawn.op).vjp
    assert vjp is not None
    need = [i in drawn.differentiable for i in range(len(inputs))]
    made = vjp(GradBuilder(graph, node, {}), node, dy, need)
    graph.verify()
    gradients = {i: v for i, v in enumerate(made) if v is not None}
    assert tuple(gradients) == drawn.differentiable
    return Differentiated(drawn, graph, node, dy, gradients)


@cache
def examples(op: str) -> list[Differentiated]:
    """What hypothesis draws, always the same."""
    found: list[Differentiated] = []

    @DRAWING
    @given(STRATEGIES[op])
    def collect(drawn: Drawn) -> None:
        found.append(differentiated(drawn))

    collect()
    assert len(found) >= IN_C
    return found


def test_no_gradient_is_left_out() -> None:
    assert {op.name for op in all_ops().values() if op.vjp is not None} == {*STRATEGIES, *ROUNDED}


@every_op
def test_equals_autograd(op: str) -> None:
    """In float64."""
    for case in examples(op):
        feeds, drawn = case.feeds(np.float64), case.drawn
        env = run(case.graph, feeds)
        operands: list[Any] = [None if a is None else torch.tensor(a) for a in drawn.data]
        for i, t in enumerate(operands):
            if drawn.types[i] is not None and not t.dtype.is_floating_point:
                operands[i] = t if t.dtype == torch.bool else t.long()
        for i in drawn.differentiable:
            operands[i].requires_grad_()
        want = drawn.reference(*operands)
        want.backward(torch.tensor(feeds["dy"]))
        near = {"rtol": 1e-9, "atol": 1e-11, "err_msg": str(drawn)}
        np.testing.assert_allclose(env["node"], want.detach().numpy(), **near)
        for i, gradient in case.gradients.items():
            assert operands[i].grad.shape == gradient.type.shape
            np.testing.assert_allclose(env[gradient.name], operands[i].grad.numpy(), **near)


@every_op
def test_is_the_central_difference(op: str) -> None:
    """In float64, along some elements and along a random direction."""
    for case in examples(op):
        feeds, rng = case.feeds(np.float64), np.random.default_rng(1)
        env = run(case.graph, feeds)

        def value(moved: dict[str, Array], case: Differentiated = case) -> float:
            data = [None if v is None else moved[v.name] for v in case.node.inputs]
            return float((get_op(case.node.op).kernel(case.node, data)[0] * moved["dy"]).sum())

        for i, gradient in case.gradients.items():
            x = feeds[f"x{i}"]
            directions = [rng.uniform(-1, 1, x.shape)]
            for at in rng.permutation(x.size)[:4]:
                directions.append((np.arange(x.size) == at).astype("f8").reshape(x.shape))
            for d in directions:
                ends = [value(feeds | {f"x{i}": x + s * STEP * d}) for s in (-1, 1)]
                want = (ends[1] - ends[0]) / (2 * STEP)
                got = (env[gradient.name] * d).sum()
                scale = max(1.0, np.abs(env[gradient.name]).sum(), np.abs(env["node"]).sum())
                assert abs(got - want) <= 1e-8 * scale, (case.drawn, i)


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss of random logits or numbers, and its gradient."""

    name: LossName
    spec: TrainingSpec
    graph: Graph
    value: str
    gradient: str
    feeds: dict[str, Array]


@cache
def losses(name: LossName) -> list[Loss]:
    """What hypothesis draws, always the same."""
    found: list[Loss] = []

    @DRAWING
    @given(st.integers(3, 6), st.integers(1, 5), PARAMETERS, st.integers(0, 9999))
    def collect(batch: int, features: int, parameter: float, seed: int) -> None:
        spec = TrainingSpec(loss=name, delta=parameter, margin=parameter)
        graph, value, gradient = ended(spec, (batch, features))
        rng = np.random.default_rng(seed)
        target = random_target(graph, graph.values["target"], rng)
        feeds = {"x": rng.standard_normal((batch, features)), "target": target}
        found.append(Loss(name, spec, graph, value, gradient, feeds))

    collect()
    assert len(found) >= IN_C
    return found


@every_loss
def test_loss_gradient(name: LossName) -> None:
    """Autograd and central differences, in float64."""
    for case in losses(name):
        feeds = {k: a.astype("f8") if a.dtype == np.float32 else a for k, a in case.feeds.items()}
        env = run(case.graph, feeds)
        x = torch.tensor(feeds["x"], requires_grad=True)
        REFERENCE[name](x, torch.tensor(feeds["target"]), case.spec).backward()
        np.testing.assert_allclose(env[case.gradient], x.grad.numpy(), rtol=1e-9, atol=1e-12)
        for d in np.eye(x.numel()).reshape(-1, *x.shape):
            ends = [run(case.graph, feeds | {"x": feeds["x"] + s * STEP * d}) for s in (-1, 1)]
            want = (ends[1][case.value] - ends[0][case.value]) / (2 * STEP)
            np.testing.assert_allclose((env[case.gradient] * d).sum(), want, atol=1e-8)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Library, dict[Node, Case]]:
    """Every node of the examples that runs code, forward and of the gradients."""
    cases: dict[Node, Case] = {}
    graphs = [example.graph for op in STRATEGIES for example in examples(op)[:IN_C]]
    graphs += [loss.graph for name in REFERENCE for loss in losses(name)[:IN_C]]
    for node in (n for graph in graphs for n in graph.nodes):
        definition = get_op(node.op)
        if not definition.view:
            types = tuple(None if v is None else v.type for v in node.inputs)
            cases[node] = Case(definition, len(cases), Sample(types, dict(node.attrs)), node)
    return Library(tmp_path_factory.mktemp("random"), list(cases.values())), cases


def check_c(
    graph: Graph, feeds: dict[str, Array], compiled: tuple[Library, dict[Node, Case]]
) -> dict[str, Array]:
    """Each node in C gives what it gives in NumPy; returns that."""
    library, cases = compiled
    env = {**graph.constants, **feeds, **run(graph, feeds)}
    for node in (n for n in graph.nodes if n in cases):
        data = [None if v is None else env[v.name] for v in node.inputs]
        outputs = [Buffer(v.type.nbytes) for v in node.outputs]
        invoke(library.function(cases[node]), cases[node], data, outputs)
        for buffer, v in zip(outputs, node.outputs, strict=True):
            assert_same_bits(buffer.array(v.type), env[v.name])
    return env


@every_op
def test_c_has_the_bits_of_numpy(op: str, compiled: tuple[Library, dict[Node, Case]]) -> None:
    """Forward and each node of the gradients; and in float32 they are near those in float64."""
    for example in examples(op)[:IN_C]:
        feeds = example.feeds(np.float32)
        env = check_c(example.graph, feeds, compiled)
        wide = {k: a.astype("f8") if a.dtype == np.float32 else a for k, a in feeds.items()}
        exact = run(example.graph, wide)
        for gradient in example.gradients.values():
            got, want = env[gradient.name], exact[gradient.name]
            assert np.abs(got - want).max() <= 2e-4 * max(1.0, np.abs(want).max()), example.drawn


@every_loss
def test_loss_in_c(name: LossName, compiled: tuple[Library, dict[Node, Case]]) -> None:
    for case in losses(name)[:IN_C]:
        check_c(case.graph, case.feeds | {"x": case.feeds["x"].astype("f4")}, compiled)
