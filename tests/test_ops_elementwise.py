"""Binary operators and activations: against NumPy and PyTorch autograd on random shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from op_cases import Array, forward_and_gradients

from odt_plan.ir.errors import GraphError
from odt_plan.ir.grad_builder import GradBuilder
from odt_plan.ir.graph import Attr, Graph, Node, TensorType, Value
from odt_plan.ir.opdef import get_op
from odt_plan.ir.ops.activation_grad import pack_bits, unpack_bits
from odt_plan.ir.ops.elementwise import contiguous_strides, merge_axes

torch = pytest.importorskip("torch")

FAST = settings(max_examples=40, deadline=None, derandomize=True, database=None)
SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=4).map(tuple)
SEEDS = st.integers(0, 2**32 - 1)

BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
}
UNARY: dict[str, tuple[dict[str, Attr], Callable[[torch.Tensor], torch.Tensor]]] = {
    "Neg": ({}, torch.neg),
    "Relu": ({}, torch.relu),
    "LeakyRelu": ({"alpha": 0.2}, lambda x: torch.nn.functional.leaky_relu(x, 0.2)),
    "Clip": ({"min": -1.0, "max": 2.0}, lambda x: torch.clamp(x, -1.0, 2.0)),
    "Sigmoid": ({}, torch.sigmoid),
    "Tanh": ({}, torch.tanh),
    "HardSigmoid": ({"alpha": 1 / 6, "beta": 0.5}, lambda x: torch.clamp(x / 6 + 0.5, 0, 1)),
    "HardSwish": ({}, torch.nn.functional.hardswish),
    "Gelu": ({}, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
}


def against_torch(
    op: str,
    data: Sequence[Array],
    function: Callable[..., torch.Tensor],
    attrs: dict[str, Attr] | None = None,
) -> None:
    """Forward and all gradients in float64 equal PyTorch's."""
    y, dy, gradients = forward_and_gradients(op, data, attrs or {})
    leaves = [torch.tensor(a, requires_grad=True) for a in data]
    expected = function(*leaves)
    expected.backward(torch.tensor(dy))
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-12, atol=1e-12)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad is not None
        assert gradient.shape == tuple(leaf.shape)
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-9, atol=1e-12)


@st.composite
def broadcast_pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that broadcast: axes of the result are dropped or set to 1 in each."""
    shape = draw(SHAPES)
    pair = []
    for _ in range(2):
        kept = draw(st.integers(0, len(shape)))
        pair.append(tuple(d if draw(st.booleans()) else 1 for d in shape[kept:]))
    return pair[0], pair[1]


@pytest.mark.parametrize("op", BINARY)
@FAST
@given(shapes=broadcast_pairs(), seed=SEEDS)
def test_binary_like_torch(op: str, shapes: tuple[tuple[int, ...], ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = [rng.uniform(0.5, 2, s) * rng.choice((-1, 1), s) for s in shapes]
    against_torch(op, data, BINARY[op])


@pytest.mark.parametrize("op", UNARY)
@FAST
@given(shape=SHAPES, seed=SEEDS)
def test_unary_like_torch(op: str, shape: tuple[int, ...], seed: int) -> None:
    attrs, function = UNARY[op]
    x = np.random.default_rng(seed).uniform(-5, 5, shape)
    against_torch(op, [x], function, attrs)


@pytest.mark.parametrize("op", ["Relu", "LeakyRelu", "HardSwish"])
def test_slope_at_the_kink_is_torchs(op: str) -> None:
    attrs, function = UNARY[op]
    against_torch(op, [np.array([0.0, -3.0, 3.0])], function, attrs)


def test_clip_has_no_slope_at_its_bounds() -> None:
    _, _, (dx,) = forward_and_gradients(
        "Clip", [np.array([-1.0, 0.0, 6.0, 7.0, 3.0])], {"min": 0.0, "max": 6.0}
    )
    assert (dx != 0).tolist() == [False, False, False, False, True]


@pytest.mark.parametrize("op", ["Relu", "LeakyRelu", "Clip", "HardSigmoid"])
def test_backward_keeps_one_bit_per_element(op: str) -> None:
    """What crosses from forward to backward is a mask made of the RESULT, 32 times smaller."""
    attrs, _ = UNARY[op]
    graph = Graph(op)
    x = graph.add_input("x", TensorType((4, 16)))
    node = graph.add_node(op, (x,), attrs, name="node")
    gradient = op_gradient(graph, node)
    crossing = {
        v
        for n in graph.nodes
        if n.phase == "backward"
        for v in n.operands()
        if v.producer is not None and v.producer.phase == "forward"
    }
    assert [v.type.nbytes for v in crossing] == [4 * 16 // 8]
    (mask,) = crossing
    assert mask.producer is not None
    assert mask.producer.inputs == (node.out,)
    assert gradient.producer is not None
    assert gradient.producer.op == "MaskMul"


def op_gradient(graph: Graph, node: Node) -> Value:
    dy = graph.add_input("dy", node.out.type)
    vjp = get_op(node.op).vjp
    assert vjp is not None
    (gradient,) = vjp(GradBuilder(graph, node, {}), node, dy, [True])
    assert gradient is not None
    return gradient


@FAST
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bits_round_trip(flags: list[bool]) -> None:
    packed = pack_bits(np.array(flags))
    assert packed.nbytes == TensorType((len(flags),), "bits").nbytes
    assert unpack_bits(packed, (len(flags),)).tolist() == flags
    assert packed[0] & 1 == flags[0]  # the first element is the lowest bit


def test_mask_stops_what_is_not_finite() -> None:
    graph = Graph("mask")
    dy = graph.add_input("dy", TensorType((3,)))
    mask = graph.add_input("mask", TensorType((3,), "bits"))
    node = graph.add_node("MaskMul", (dy, mask), {"inside": 1.0, "outside": 0.0}, name="m")
    data = np.array([math.inf, math.nan, 2.0], np.float32)
    (dx,) = get_op("MaskMul").kernel(node, [data, pack_bits(np.array([False, False, True]))])
    assert dx.tolist() == [0, 0, 2]


@FAST
@given(
    st.lists(st.integers(1, 3), min_size=0, max_size=5).map(tuple),
    st.lists(st.booleans(), min_size=5, max_size=5),
    st.permutations(range(5)),
)
def test_merged_axes_walk_the_same_elements(
    dims: tuple[int, ...], repeats: list[bool], order: list[int]
) -> None:
    perm = [i for i in order if i < len(dims)]
    strides = contiguous_strides(dims)
    walk_a = tuple(strides[i] for i in perm)
    walked = tuple(dims[i] for i in perm)
    walk_b = tuple(0 if r else s for r, s in zip(repeats, contiguous_strides(walked), strict=False))
    merged, (a, b) = merge_axes(walked, walk_a, walk_b)

    def offsets(shape: Sequence[int], step: Sequence[int]) -> list[int]:
        return [sum(i * s for i, s in zip(at, step, strict=True)) for at in np.ndindex(*shape)]

    assert offsets(merged, a) == offsets(walked, walk_a)
    assert offsets(merged, b) == offsets(walked, walk_b)
    assert 1 <= len(merged) <= max(1, len(dims))
    assert len(merged) == 1 or 1 not in merged


def test_merging_finds_the_fast_loops() -> None:
    assert merge_axes((2, 3, 4), (12, 4, 1), (12, 4, 1)) == ((24,), ((1,), (1,)))
    assert merge_axes((2, 3, 4), (12, 4, 1), (0, 0, 0)) == ((24,), ((1,), (0,)))
    assert merge_axes((1, 3, 2, 2), (12, 4, 2, 1), (0, 1, 0, 0)) == ((3, 4), ((4, 1), (1, 0)))


@given(SHAPES, SHAPES)
@FAST
def test_shapes_that_do_not_broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    pairs = zip(reversed(a), reversed(b), strict=False)
    assume(any(x != y and 1 not in (x, y) for x, y in pairs))
    graph = Graph("bad")
    values = [graph.add_input(n, TensorType(s)) for n, s in (("a", a), ("b", b))]
    with pytest.raises(GraphError, match=r"node sum \(Add\): shapes .* do not broadcast"):
        graph.add_node("Add", values, name="sum")


@pytest.mark.parametrize(
    ("op", "attrs", "message"),
    [
        ("Clip", {"min": 1.0, "max": 0.0}, "min = 1 is not <= max = 0"),
        ("Clip", {"min": math.nan, "max": 0.0}, "min = nan is not <= max = 0"),
        ("LeakyRelu", {"alpha": -0.1}, "alpha = -0.1"),
    ],
)
def test_attributes_are_checked(op: str, attrs: dict[str, Attr], message: str) -> None:
    graph = Graph("bad")
    x = graph.add_input("x", TensorType((2,)))
    with pytest.raises(GraphError, match=message):
        graph.add_node(op, (x,), attrs, name="node")


def test_only_fp32() -> None:
    graph = Graph("bad")
    x = graph.add_input("x", TensorType((2,), "i32"))
    with pytest.raises(GraphError, match="only f32"):
        graph.add_node("Relu", (x,), name="node")


def test_nan_passes_through_activations() -> None:
    """A diverged training must not look healthy."""
    for op, (attrs, _) in UNARY.items():
        graph = Graph(op)
        x = graph.add_input("x", TensorType((1,)))
        node = graph.add_node(op, (x,), attrs, name="node")
        (y,) = get_op(op).kernel(node, [np.array([math.nan], np.float32)])
        assert np.isnan(y).all(), op
