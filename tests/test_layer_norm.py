"""Layer normalization against PyTorch, and where its numbers are hard."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_cases import Array, forward_and_gradients

from odt_plan.ir.errors import GraphError
from odt_plan.ir.graph import Graph, TensorType
from odt_plan.ir.interpreter import run


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((4, 7), -1), ((2, 5, 6), 2), ((2, 3, 4, 5), 1), ((2, 3, 4), 0), ((1, 1, 3), -2)],
)
def test_equals_torch(shape: tuple[int, ...], axis: int, bias: bool) -> None:
    rng = np.random.default_rng(0)
    row = shape[axis:]
    data = [rng.standard_normal(s) for s in (shape, row, row)[: 3 if bias else 2]]
    attrs = {"axis": axis, "epsilon": 1e-3}
    y, dy, gradients = forward_and_gradients("LayerNormalization", data, attrs)
    leaves = [torch.tensor(a, requires_grad=True) for a in data]
    want = torch.nn.functional.layer_norm(leaves[0], row, *leaves[1:], eps=1e-3)
    want.backward(torch.tensor(dy))
    np.testing.assert_allclose(y, want.detach().numpy(), rtol=1e-12, atol=1e-12)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-10, atol=1e-12)


def test_constant_rows_and_large_offsets() -> None:
    """Deviations are taken from the mean before they are squared: an offset loses no digits."""
    ones, zeros = np.ones(8, np.float32), np.zeros(8, np.float32)
    graph = Graph("rows")
    x, scale, bias = (
        graph.add_input(n, TensorType(s))
        for n, s in (("x", (4, 8)), ("scale", (8,)), ("bias", (8,)))
    )
    graph.add_node("LayerNormalization", (x, scale, bias), {"axis": -1}, name="y")

    def normalized(x: Array) -> Array:
        return run(graph, {"x": x, "scale": ones, "bias": zeros})["y"]

    assert (normalized(np.full((4, 8), 3.0, np.float32)) == 0).all()
    rows = np.random.default_rng(1).integers(-8, 8, (4, 8)).astype(np.float32)
    near, far = normalized(rows), normalized(rows + np.float32(4096))
    np.testing.assert_allclose(far, near, rtol=1e-5, atol=1e-6)


def test_scales_that_do_not_fit_a_row() -> None:
    graph = Graph("bad")
    x = graph.add_input("x", TensorType((2, 3, 4)))
    scale = graph.add_input("scale", TensorType((3,)))
    with pytest.raises(GraphError, match=r"node n.*f32\[3\], is not a row of \(4,\)"):
        graph.add_node("LayerNormalization", (x, scale), {"axis": -1}, name="n")
    with pytest.raises(GraphError, match="axis 3 of a tensor with 3 axes"):
        graph.add_node("LayerNormalization", (x, scale), {"axis": 3}, name="n")
