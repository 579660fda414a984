"""Transposed convolution, normalizations and resizing against PyTorch autograd, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import Array, forward_and_gradients
from torch.nn import functional as f

from odt_plan.ir.errors import GraphError
from odt_plan.ir.graph import Attr, Graph, TensorType
from odt_plan.ir.interpreter import run

FAST = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def _agree(op: str, data: list[Array], attrs: dict[str, Attr], reference: Any, free: int) -> None:
    """Result and the gradients of the first ``free`` operands equal PyTorch's."""
    y, dy, gradients = forward_and_gradients(op, data, attrs)
    leaves = [torch.tensor(a, requires_grad=i < free) for i, a in enumerate(data)]
    want = reference(*leaves)
    want.backward(torch.tensor(dy))
    np.testing.assert_allclose(y, want.detach().numpy(), rtol=1e-11, atol=1e-12)
    assert len(gradients) == free
    for leaf, gradient in zip(leaves, gradients, strict=False):
        assert leaf.grad is not None
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-9, atol=1e-11)


# -- ConvTranspose ---------------------------------------------------------------------------------


@st.composite
def transposed(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], dict[str, Any]]:
    """Shapes of x, weight and bias, and all attributes."""
    rank, group = draw(st.integers(1, 2)), draw(st.sampled_from((1, 1, 2, 3)))
    before, after = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    sizes, kernel, strides, dilations, pads, extra = [], [], [], [], [], []
    for _ in range(rank):
        n, k, d, step = (draw(st.integers(1, m)) for m in (5, 4, 3, 3))
        most = (step * (n - 1) + d * (k - 1)) // 2  # leave an element
        sizes.append(n)
        kernel.append(k)
        strides.append(step)
        dilations.append(d)
        pads.append(draw(st.integers(0, most)))
        extra.append(draw(st.integers(0, step - 1)))
    shapes = [
        (draw(st.integers(1, 2)), group * before, *sizes),
        (group * before, after, *kernel),
        (group * after,),
    ]
    return shapes, {
        "strides": tuple(strides),
        "dilations": tuple(dilations),
        "pads": (*pads, *pads),
        "output_padding": tuple(extra),
        "group": group,
    }


@FAST
@given(transposed(), st.booleans(), st.integers(0, 9))
def test_transposed_convolution(
    case: tuple[list[tuple[int, ...]], dict[str, Any]], bias: bool, seed: int
) -> None:
    shapes, attrs = case
    rng = np.random.default_rng(seed)
    data = [rng.standard_normal(s) for s in (shapes if bias else shapes[:2])]
    rank = len(shapes[0]) - 2
    function = f.conv_transpose1d if rank == 1 else f.conv_transpose2d

    def reference(x: Any, w: Any, b: Any = None) -> Any:
        return function(
            x,
            w,
            b,
            stride=attrs["strides"],
            padding=attrs["pads"][:rank],
            output_padding=attrs["output_padding"],
            groups=attrs["group"],
            dilation=attrs["dilations"],
        )

    _agree("ConvTranspose", data, attrs, reference, len(data))


@pytest.mark.parametrize(
    ("x", "w", "attrs", "reason"),
    [
        ((1, 3, 5, 5), (4, 3, 3, 3), {}, "do not fit"),
        ((1, 4, 5, 5), (4, 3, 3, 3), {"group": 3}, "in 3 groups do not fit"),
        ((1, 4, 2, 2), (4, 3, 2, 2), {"pads": (2, 0, 1, 0)}, "leave nothing of the result"),
        ((1, 4, 2, 2), (4, 3, 2, 2), {"output_padding": (2, 0)}, "not smaller than the stride"),
        ((1, 4, 2, 2), (4, 3, 2, 2), {"output_padding": (-1, 0)}, "is negative"),
        ((1, 4, 2, 2), (4, 3, 2, 2), {"strides": (2,)}, "do not fit 2 spatial axes"),
        ((1, 4, 2, 2, 2), (4, 3, 2, 2, 2), {}, "1 and 2 are supported"),
    ],
)
def test_transposed_operands_that_do_not_fit(
    x: tuple[int, ...], w: tuple[int, ...], attrs: dict[str, Attr], reason: str
) -> None:
    graph = Graph("bad")
    operands = [graph.add_input("x", TensorType(x)), graph.add_input("w", TensorType(w))]
    with pytest.raises(GraphError, match=f"node up.*{reason}"):
        graph.add_node("ConvTranspose", operands, attrs, name="up")


# -- normalizations --------------------------------------------------------------------------------


@FAST
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(1, 4), max_size=2)
)
def test_group_normalization(batch: int, groups: int, width: int, spatial: list[int]) -> None:
    channels = groups * width
    shape = (batch, channels, *(n + 1 for n in spatial), 2)
    rng = np.random.default_rng(channels)
    data = [rng.standard_normal(s) for s in (shape, (channels,), (channels,))]
    attrs: dict[str, Attr] = {"num_groups": groups, "epsilon": 1e-3}
    _agree(
        "GroupNormalization", data, attrs, lambda *v: f.group_norm(v[0], groups, *v[1:], 1e-3), 3
    )
    _agree("GroupNormalization", data[:1], attrs, lambda x: f.group_norm(x, groups, eps=1e-3), 1)


def test_group_normalization_with_a_scale_per_group() -> None:
    rng = np.random.default_rng(0)
    data = [rng.standard_normal(s) for s in ((2, 6, 3, 4), (2,), (2,))]

    def reference(x: Any, scale: Any, bias: Any) -> Any:
        wide = [v.repeat_interleave(3) for v in (scale, bias)]
        return f.group_norm(x, 2, *wide, 1e-3)

    attrs: dict[str, Attr] = {"num_groups": 2, "epsilon": 1e-3}
    _agree("GroupNormalization", data, attrs, reference, 3)


@pytest.mark.parametrize(("shape", "axis"), [((3, 7), -1), ((2, 3, 4, 5), 2), ((2, 3, 4), 0)])
def test_rms_normalization(shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(0)
    row = shape[axis:]
    data = [rng.standard_normal(s) for s in (shape, row)]

    def reference(x: Any, scale: Any) -> Any:
        return f.rms_norm(x, row, scale, 1e-3)

    _agree("RMSNormalization", data, {"axis": axis, "epsilon": 1e-3}, reference, 2)


def test_euclidean_normalization() -> None:
    data = [np.random.default_rng(0).standard_normal((4, 6))]
    _agree("LpNormalization", data, {"epsilon": 1e-24}, lambda x: f.normalize(x, dim=1), 1)


def test_rows_of_zeros_stay_zeros() -> None:
    graph = Graph("zeros")
    x = graph.add_input("x", TensorType((2, 3)))
    graph.add_node("LpNormalization", (x,), {"epsilon": 1e-24}, name="y")
    y = run(graph, {"x": np.array([[0, 0, 0], [3, 0, 4]], np.float32)})["y"]
    np.testing.assert_allclose(y, [[0, 0, 0], [0.6, 0, 0.8]], rtol=1e-6)


@FAST
@given(st.integers(1, 7), st.integers(1, 9), st.floats(0.3, 2.0), st.integers(0, 9))
def test_local_response_normalization(channels: int, size: int, beta: float, seed: int) -> None:
    if size % 2 == 0:
        size += 1  # PyTorch puts the longer half of an even window in front, onnx behind
    data = [np.random.default_rng(seed).standard_normal((2, channels, 3, 2))]
    attrs: dict[str, Attr] = {"size": size, "alpha": 0.7, "beta": beta, "bias": 1.3}
    _agree("LRN", data, attrs, lambda x: f.local_response_norm(x, size, 0.7, beta, 1.3), 1)


def test_an_even_number_of_channels_reaches_further_behind() -> None:
    """As onnx defines the window; its runtime takes odd ones only."""
    x = np.random.default_rng(0).standard_normal((1, 5, 2))
    attrs: dict[str, Attr] = {"size": 4, "alpha": 0.8, "beta": 0.5, "bias": 2.0}
    y, _, _ = forward_and_gradients("LRN", [x], attrs)
    for c in range(5):
        around = x[:, max(0, c - 1) : c + 3]
        want = x[:, c] / np.sqrt(2.0 + 0.2 * (around**2).sum(axis=1))
        np.testing.assert_allclose(y[:, c], want, rtol=1e-12)


def test_windows_wider_than_the_channels() -> None:
    """A window of any size is one of all channels, and takes no longer."""
    x = np.random.default_rng(0).standard_normal((1, 3, 2))
    attrs: dict[str, Attr] = {"alpha": 0.5, "beta": 0.5, "bias": 1.0, "size": 2**40}
    y, _, (dx,) = forward_and_gradients("LRN", [x], attrs)
    same = {**attrs, "size": 9, "alpha": 0.5 * 9 / 2**40}
    want, _, (want_dx,) = forward_and_gradients("LRN", [x], same)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(dx, want_dx)


def test_groups_that_do_not_fit() -> None:
    graph = Graph("bad")
    x, scale = graph.add_input("x", TensorType((2, 6, 4))), graph.add_input("s", TensorType((4,)))
    with pytest.raises(GraphError, match="6 channels are not 4 groups of one size"):
        graph.add_node("GroupNormalization", (x,), {"num_groups": 4}, name="n")
    with pytest.raises(GraphError, match="4 scales fit neither 6 channels nor 3 groups"):
        graph.add_node("GroupNormalization", (x, scale), {"num_groups": 3}, name="n")


# -- Resize ----------------------------------------------------------------------------------------


@FAST
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=2),
    st.booleans(),
    st.integers(0, 9),
)
def test_linear_interpolation(axes: list[tuple[int, int]], align: bool, seed: int) -> None:
    """At the positions of either of PyTorch's modes."""
    sizes = tuple(out for _, out in axes)
    x = np.random.default_rng(seed).standard_normal((2, 3, *(n for n, _ in axes)))
    positions = []
    for n, out in axes:
        at = np.arange(out)
        if align:
            positions.append(at * (n - 1) / max(1, out - 1))
        else:
            positions.append(np.clip((at + 0.5) * n / out - 0.5, 0, n - 1))
    mode = "linear" if len(axes) == 1 else "bilinear"
    attrs: dict[str, Attr] = {"sizes": sizes, "mode": "linear"}
    _agree(
        "Resize",
        [x, np.concatenate(positions)],
        attrs,
        lambda v, _: f.interpolate(v, sizes, mode=mode, align_corners=align),
        1,
    )


@FAST
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=2))
def test_nearest_elements(axes: list[tuple[int, int]]) -> None:
    sizes = tuple(out for _, out in axes)
    x = np.random.default_rng(0).standard_normal((2, 3, *(n for n, _ in axes)))
    positions = np.concatenate([np.arange(out) * n // out for n, out in axes]).astype(np.float64)
    attrs: dict[str, Attr] = {"sizes": sizes, "mode": "nearest"}
    _agree("Resize", [x, positions], attrs, lambda v, _: f.interpolate(v, sizes), 1)


def test_resizing_that_does_not_fit() -> None:
    graph = Graph("bad")
    x, at = graph.add_input("x", TensorType((1, 4, 4))), graph.add_input("at", TensorType((9,)))
    for attrs, reason in (
        ({"sizes": (5, 5), "mode": "linear"}, r"positions f32\[9\] are not one per index"),
        ({"sizes": (5, 4), "mode": "cubic"}, "cubic is neither nearest nor linear"),
        ({"sizes": (2, 2, 2, 3), "mode": "linear"}, "do not fit the last axes"),
    ):
        with pytest.raises(GraphError, match=reason):
            graph.add_node("Resize", (x, at), attrs, name="n")
