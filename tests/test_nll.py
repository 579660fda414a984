"""Negative log likelihood against PyTorch: weights, ignored labels, reductions, gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_files import model, node, save

from odt_plan.ir.errors import GraphError, UnsupportedModelError, UsageError
from odt_plan.ir.graph import Attr, Graph, TensorType
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.ops.nll import REDUCTIONS

T = TensorType


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    classes=st.integers(1, 5),
    places=st.lists(st.integers(1, 3), max_size=2),
    reduction=st.sampled_from(REDUCTIONS),
    ignored=st.none() | st.integers(-2, 6),
    weighted=st.booleans(),
    seed=st.integers(0, 999),
)
def test_equals_torch(
    batch: int,
    classes: int,
    places: list[int],
    reduction: str,
    ignored: int | None,
    weighted: bool,
    seed: int,
) -> None:
    """Value and gradient, by the operator and its gradient's operator."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, classes, *places)).astype(np.float32)
    labels = rng.integers(0, classes, (batch, *places)).astype(np.int32)
    if ignored is not None:
        labels[rng.random(labels.shape) < 0.3] = ignored
    weights = rng.uniform(0.1, 2, classes).astype(np.float32) if weighted else None
    attrs: dict[str, Attr] = {"reduction": reduction}
    if ignored is not None:
        attrs["ignore_index"] = ignored

    leaf = torch.from_numpy(x).requires_grad_()
    want = torch.nn.functional.nll_loss(
        leaf,
        torch.from_numpy(labels).long(),
        weight=None if weights is None else torch.from_numpy(weights),
        reduction=reduction,
        ignore_index=-100 if ignored is None else ignored,
    )
    dy = rng.standard_normal(want.shape).astype(np.float32)
    want.backward(torch.from_numpy(dy))

    g = Graph("nll")
    data = {"x": x, "labels": labels, "dy": dy}
    values = {
        k: g.add_input(k, T(a.shape, "i32" if k == "labels" else "f32")) for k, a in data.items()
    }
    w = None if weights is None else g.add_constant("weights", weights)
    loss = g.add_node(
        "NegativeLogLikelihood", (values["x"], values["labels"], w), attrs, name="loss"
    )
    grad = g.add_node(
        "NegativeLogLikelihoodGrad",
        (values["dy"], values["labels"], w),
        {**attrs, "classes": classes},
        name="grad",
    )
    env = run(g, data)
    np.testing.assert_allclose(env[loss.out.name], want.detach(), rtol=1e-5, atol=1e-6)
    assert leaf.grad is not None
    np.testing.assert_allclose(env[grad.out.name], leaf.grad, rtol=1e-5, atol=1e-6)


def _graph(labels: TensorType, weights: int = 3, reduction: str = "mean") -> Graph:
    g = Graph("nll")
    inputs = [g.add_input("x", T((2, 3))), g.add_input("labels", labels)]
    inputs.append(g.add_input("weights", T((weights,))))
    g.add_node("NegativeLogLikelihood", inputs, {"reduction": reduction}, name="loss")
    return g


def test_what_does_not_fit() -> None:
    with pytest.raises(GraphError, match="labels must be i32"):
        _graph(T((2,)))
    with pytest.raises(GraphError, match=r"labels i32\[3\] do not fit"):
        _graph(T((3,), "i32"))
    with pytest.raises(GraphError, match=r"class weights f32\[4\] do not fit 3 classes"):
        _graph(T((2,), "i32"), 4)
    with pytest.raises(GraphError, match="reduction 'max' is not one of"):
        _graph(T((2,), "i32"), 3, "max")
    feeds = {"x": np.zeros((2, 3), np.float32), "weights": np.ones(3, np.float32)}
    with pytest.raises(UsageError, match=r"node loss: label 3 is not in 0\.\.2"):
        run(_graph(T((2,), "i32")), {**feeds, "labels": np.array([0, 3], np.int32)})


def test_a_file_with_its_loss(tmp_path: Path) -> None:
    """Labels that the file holds; other numbers than integers are refused."""
    nodes = [node("NegativeLogLikelihoodLoss", "x labels", "y", ignore_index=1)]
    labels = np.array([2, 1], np.int64)
    graph = import_model(save(model(nodes, {"x": [2, 3]}, ["y"], {"labels": labels}), tmp_path))
    x = np.log(np.array([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]], np.float32))
    loss = run(graph, {"x": x})[graph.outputs[0].name]
    assert loss == pytest.approx(-np.log(0.7))
    for wrong in (np.array([0.0, 1.0], np.float32), np.array([0, 2**40])):
        path = save(model(nodes, {"x": [2, 3]}, ["y"], {"labels": wrong}), tmp_path)
        with pytest.raises(UnsupportedModelError, match=r"NegativeLogLikelihoodLoss"):
            import_model(path)
