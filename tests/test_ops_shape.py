"""Operators that move elements: against PyTorch autograd on random shapes and attributes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import forward_and_gradients

from odt_plan.ir.errors import GraphError
from odt_plan.ir.graph import Attr, Graph, TensorType
from odt_plan.ir.opdef import get_op
from odt_plan.ir.ops.shape import MAX_CONCAT

torch = pytest.importorskip("torch")

FAST = settings(max_examples=50, deadline=None, derandomize=True, database=None)
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def against_torch(
    op: str, shapes: list[tuple[int, ...]], attrs: dict[str, Attr], function: Any
) -> None:
    """Forward and all gradients equal PyTorch's exactly: elements only move."""
    rng = np.random.default_rng(1)
    data = [rng.uniform(-1, 1, s) for s in shapes]
    y, dy, gradients = forward_and_gradients(op, data, attrs)
    leaves = [torch.tensor(a, requires_grad=True) for a in data]
    expected = function(*leaves)
    expected.backward(torch.tensor(dy))
    np.testing.assert_array_equal(y, expected.detach().numpy())
    for leaf, gradient in zip(leaves, gradients, strict=True):
        np.testing.assert_array_equal(gradient, leaf.grad.numpy())


@FAST
@given(SHAPES, st.data())
def test_transpose(shape: tuple[int, ...], data: st.DataObject) -> None:
    perm = tuple(data.draw(st.permutations(range(len(shape)))))
    against_torch("Transpose", [shape], {"perm": perm}, lambda x: x.permute(perm))


@FAST
@given(SHAPES, st.data())
def test_reshape(shape: tuple[int, ...], data: st.DataObject) -> None:
    target = tuple(data.draw(st.permutations(shape)))
    against_torch("Reshape", [shape], {"shape": target}, lambda x: x.reshape(target))


@st.composite
def slices(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, Attr]]:
    shape = draw(SHAPES)
    starts = tuple(draw(st.integers(0, d - 1)) for d in shape)
    steps = tuple(draw(st.integers(1, 3)) for _ in shape)
    sizes = tuple(
        draw(st.integers(1, (d - a - 1) // s + 1))
        for d, a, s in zip(shape, starts, steps, strict=True)
    )
    return shape, {"starts": starts, "sizes": sizes, "steps": steps}


@FAST
@given(slices())
def test_slice(case: tuple[tuple[int, ...], dict[str, Any]]) -> None:
    shape, attrs = case
    window = tuple(
        slice(a, a + n * s, s)
        for a, n, s in zip(attrs["starts"], attrs["sizes"], attrs["steps"], strict=True)
    )
    # torch clips a slice's end at the axis, so the last element is the size-th at most
    against_torch("Slice", [shape], attrs, lambda x: x[window])


@FAST
@given(SHAPES, st.data())
def test_pad(shape: tuple[int, ...], data: st.DataObject) -> None:
    amounts = st.lists(st.integers(0, 3), min_size=len(shape), max_size=len(shape)).map(tuple)
    begins, ends = data.draw(amounts), data.draw(amounts)
    value = data.draw(st.sampled_from((0.0, -1.5, -math.inf)))
    pairs = [p for ab in reversed(list(zip(begins, ends, strict=True))) for p in ab]
    attrs: dict[str, Attr] = {"begins": begins, "ends": ends, "value": value}
    against_torch("Pad", [shape], attrs, lambda x: torch.nn.functional.pad(x, pairs, value=value))


@FAST
@given(SHAPES, st.data())
def test_concat(shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    at = axis % len(shape)
    shapes = [(*shape[:at], n, *shape[at + 1 :]) for n in lengths]
    against_torch("Concat", shapes, {"axis": axis}, lambda *x: torch.cat(x, axis))


def test_reshape_is_free() -> None:
    op = get_op("Reshape")
    assert op.view
    assert op.c is None


def _add(op: str, shapes: list[tuple[int, ...]], attrs: dict[str, Attr]) -> None:
    graph = Graph("bad")
    inputs = [graph.add_input(f"x{i}", TensorType(s)) for i, s in enumerate(shapes)]
    graph.add_node(op, inputs, attrs, name="node")


@pytest.mark.parametrize(
    ("op", "shapes", "attrs", "message"),
    [
        ("Reshape", [(2, 3)], {"shape": (5,)}, "6 elements"),
        ("Reshape", [(2, 3)], {"shape": (-2, -3)}, "6 elements"),
        ("Transpose", [(2, 3)], {"perm": (0, 0)}, "permutation of the 2 axes"),
        ("Transpose", [(1,) * 7], {"perm": tuple(range(7))}, "7 dimensions, at most 6"),
        ("Slice", [(4,)], {"starts": (2,), "sizes": (2,), "steps": (2,)}, "leaves axis 0"),
        ("Slice", [(4,)], {"starts": (0,), "sizes": (2,), "steps": (-1,)}, "steps = "),
        ("Slice", [(4, 4)], {"starts": (0,), "sizes": (2, 2), "steps": (1, 1)}, "starts = "),
        ("SliceGrad", [(3,)], {"shape": (4,), "starts": (2,), "steps": (1,)}, "leaves axis 0"),
        ("SliceGrad", [(3,)], {"shape": (4, 4), "starts": (0,), "steps": (1,)}, "no slice of"),
        ("Pad", [(3,)], {"begins": (-1,), "ends": (0,)}, "begins = "),
        ("Pad", [(3,)], {"begins": (1, 1), "ends": (0,)}, "begins = "),
        ("Concat", [(2, 3), (3, 3)], {"axis": 1}, "differ outside axis 1"),
        ("Concat", [(2, 3), (2, 3)], {"axis": 2}, "axis = 2 is not an axis of rank 2"),
        ("Concat", [(1,)] * (MAX_CONCAT + 1), {"axis": 0}, "17 operands; 1 to 16"),
    ],
)
def test_attributes_are_checked(
    op: str, shapes: list[tuple[int, ...]], attrs: dict[str, Attr], message: str
) -> None:
    with pytest.raises(GraphError, match=message):
        _add(op, shapes, attrs)
