"""BatchNormalization in training mode: against PyTorch over steps, and what files say of it."""

from __future__ import annotations

from pathlib import Path

import nets
import numpy as np
import plans
import pytest
import torch
from onnx_files import Array, floats, model, node, outputs, save
from op_cases import forward_and_gradients
from torch.nn import functional as f

from odt_plan.backends.numpy import Runtime
from odt_plan.ir.autodiff import build_training
from odt_plan.ir.errors import UnsupportedModelError
from odt_plan.ir.graph import Graph
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.training import Candidate, TrainingSpec

MOMENTUM, EPSILON, RATE = 0.8, 1e-3, 0.05


class Torch:
    """``nets.batch_normalized`` in PyTorch, with running variances as onnx has them."""

    def __init__(self, graph: Graph) -> None:
        self.params = {
            k: torch.tensor(a, requires_grad=k.rpartition(".")[2] not in ("mean", "var"))
            for k, a in graph.constants.items()
        }

    def loss(self, x: Array, labels: Array, share: float) -> torch.Tensor:
        p, y = self.params, torch.tensor(x)
        for i in range(2):
            y = f.conv2d(y, p[f"conv{i}.weight"], p[f"conv{i}.bias"], padding=1)
            with torch.no_grad():
                seen = {"mean": y.mean((0, 2, 3)), "var": y.var((0, 2, 3), unbiased=False)}
                for name, v in seen.items():
                    running = p[f"bn{i}.{name}"]
                    running += (1 - MOMENTUM) * share * v
            y = f.batch_norm(
                y, None, None, p[f"bn{i}.scale"], p[f"bn{i}.bias"], training=True, eps=EPSILON
            )
            y = f.relu(y)
        logits = y.flatten(1) @ p["fc.weight"].T + p["fc.bias"]
        return f.cross_entropy(logits, torch.tensor(labels).long())

    def step(self, xs: list[Array], labels: list[Array]) -> float:
        """SGD by the mean over micro-batches; an average moves once, by the mean of theirs."""
        learned = [v for v in self.params.values() if v.requires_grad]
        for name, v in self.params.items():
            if not v.requires_grad:
                assert name.endswith(("mean", "var"))
                v *= MOMENTUM
        losses = [self.loss(x, t, 1 / len(xs)) for x, t in zip(xs, labels, strict=True)]
        total = torch.stack(losses).mean()
        for v, d in zip(learned, torch.autograd.grad(total, learned), strict=True):
            with torch.no_grad():
                v -= RATE * d
        return float(total.detach())


@pytest.mark.parametrize("micro", [1, 2])
def test_steps_equal_torch(micro: int) -> None:
    graph = nets.batch_normalized(batch=4 // micro)
    reference = Torch(graph)
    training = build_training(graph, TrainingSpec(micro_batches=micro), plans.whole(graph))
    assert {u.candidate.param for u in training.updates} == set(graph.constants)
    runtime = Runtime(plans.keep_all(training), training)
    rng = np.random.default_rng(1)
    for _ in range(4):
        x, labels = floats(rng, 4, 2, 5, 5) + 1, rng.integers(0, 3, 4).astype(np.int32)
        parts = [np.split(a, micro) for a in (x, labels)]
        want = reference.step(*parts)
        losses = [runtime.train_step(*part, RATE) for part in zip(*parts, strict=True)]
        assert np.mean(losses) == pytest.approx(want, rel=1e-5)
    got = runtime.params()
    for name, v in reference.params.items():
        if not name.startswith("conv") or "weight" in name:  # a shift before the mean is taken off
            assert np.abs(got[name] - graph.constants[name]).max() > 1e-4, f"{name} has not moved"
        np.testing.assert_allclose(got[name], v.detach().numpy(), rtol=2e-4, atol=2e-5)


def test_frozen_statistics_of_a_trained_layer_stay() -> None:
    """Each running statistic is a parameter of its own; no gradient is computed for one."""
    graph = nets.batch_normalized()
    chosen = [Candidate("bn0.mean"), Candidate("fc.bias")]
    training = build_training(graph, TrainingSpec(optimizer="adam"), chosen)
    backward = [n.op for n in training.graph.nodes if n.phase == "backward"]
    assert sorted(backward) == ["BatchMean", "GemmGradBias", "SoftmaxCrossEntropyGrad"]
    assert [len(u.states) for u in training.updates if u.candidate.param == "bn0.mean"] == [0]
    alone = build_training(graph, TrainingSpec(), chosen[:1])
    runtime = Runtime(plans.keep_all(alone), alone)
    runtime.train_step(np.ones((4, 2, 5, 5), np.float32), np.zeros(4, np.int32), RATE)
    moved = {k for k, a in runtime.params().items() if not np.array_equal(a, graph.constants[k])}
    assert moved == {"bn0.mean"}


def test_one_number_per_channel_has_no_deviation(tmp_path: Path) -> None:
    nodes = [node("BatchNormalization", "x s b m v", "y r t", training_mode=1)]
    constants = {k: floats(np.random.default_rng(0), 4) for k in "sbmv"}
    path = save(model(nodes, {"x": ("N", 4)}, ["y"], constants), tmp_path)
    with pytest.raises(UnsupportedModelError, match="train with a larger batch"):
        import_model(path)
    assert [n.op for n in import_model(path, ImportOptions(batch=3)).nodes] == ["BatchNormTraining"]


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (6, 4)])
def test_gradients_equal_torch(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    data = [rng.standard_normal(s) for s in (shape, *((4,),) * 4)]
    graph_y, dy, gradients = _through(data)
    leaves = [torch.tensor(a, requires_grad=True) for a in data[:3]]
    want = f.batch_norm(leaves[0], None, None, *leaves[1:], training=True, eps=EPSILON)
    want.backward(torch.tensor(dy))
    np.testing.assert_allclose(graph_y, want.detach().numpy(), rtol=1e-11, atol=1e-12)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-9, atol=1e-11)


def _through(data: list[Array]) -> tuple[Array, Array, list[Array]]:
    return forward_and_gradients("BatchNormTraining", data, {"epsilon": EPSILON})


@pytest.mark.parametrize(("opset", "mode"), [(15, {"training_mode": 1}), (9, {})])
def test_running_results_of_a_file(tmp_path: Path, opset: int, mode: dict[str, int]) -> None:
    """They can be results of the file as well. Old files tell the mode by naming results."""
    rng = np.random.default_rng(0)
    constants = {k: floats(rng, 4) for k in "sbm"} | {"v": np.abs(floats(rng, 4))}
    names = "y rm rv" if mode else "y rm rv saved.m saved.v"
    nodes = [node("BatchNormalization", "x s b m v", names, momentum=0.7, **mode)]
    graph = import_model(
        save(model(nodes, {"x": (2, 4, 3)}, ["y", "rm", "rv"], constants, opset=opset), tmp_path)
    )
    x = floats(rng, 2, 4, 3) * 2 + 3
    y, mean, var = outputs(graph, {"x": x})
    m, v = x.mean((0, 2)), x.var((0, 2))
    c = constants
    scale, bias, m1, v1 = (a.reshape(-1, 1) for a in (c["s"], c["b"], m, v))
    np.testing.assert_allclose(y, (x - m1) / np.sqrt(v1 + 1e-5) * scale + bias, atol=1e-5)
    np.testing.assert_allclose(mean, 0.7 * c["m"] + 0.3 * m, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, 0.7 * c["v"] + 0.3 * v, rtol=1e-5, atol=1e-6)
