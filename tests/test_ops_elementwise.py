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
from odt_plan.ir.interpreter import run
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
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Fmod": torch.fmod,
    "Mod": torch.remainder,
}
UNARY: dict[str, tuple[dict[str, Attr], Callable[[torch.Tensor], torch.Tensor]]] = {
    "Neg": ({}, torch.neg),
    "Relu": ({}, torch.relu),
    "LeakyRelu": ({"alpha": 0.2}, lambda x: torch.nn.functional.leaky_relu(x, 0.2)),
    "Clip": ({"min": -1.0, "max": 2.0}, lambda x: torch.clamp(x, -1.0, 2.0)),
    "Shrink": ({"lambd": 1.5, "bias": 1.5}, lambda x: torch.nn.functional.softshrink(x, 1.5)),
    "Sigmoid": ({}, torch.sigmoid),
    "Tanh": ({}, torch.tanh),
    "HardSigmoid": ({"alpha": 1 / 6, "beta": 0.5}, lambda x: torch.clamp(x / 6 + 0.5, 0, 1)),
    "HardSwish": ({}, torch.nn.functional.hardswish),
    "Gelu": ({}, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    "GeluErf": ({}, torch.nn.functional.gelu),
    "Abs": ({}, torch.abs),
    "ThresholdedRelu": ({"alpha": 0.7}, lambda x: torch.nn.functional.threshold(x, 0.7, 0.0)),
    "Exp": ({}, torch.exp),
    "Sin": ({}, torch.sin),
    "Cos": ({}, torch.cos),
    "Erf": ({}, torch.erf),
    "Atan": ({}, torch.atan),
    "Sinh": ({}, torch.sinh),
    "Cosh": ({}, torch.cosh),
    "Asinh": ({}, torch.asinh),
    "Softplus": ({}, torch.nn.functional.softplus),
    "Softsign": ({}, torch.nn.functional.softsign),
    "Mish": ({}, torch.nn.functional.mish),
    "Reciprocal": ({}, torch.reciprocal),
    "Swish": ({"alpha": 1.0}, torch.nn.functional.silu),
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


@pytest.mark.parametrize("op", ["Fmod", "Mod"])
def test_rest_of_a_large_quotient_like_torch(op: str) -> None:
    """What the gradient of the divisor takes for the quotient is next to a whole number."""
    rng = np.random.default_rng(0)
    data = [rng.uniform(-1000, 1000, 400), rng.uniform(0.1, 1, 400) * rng.choice((-1, 1), 400)]
    against_torch(op, data, BINARY[op])


@pytest.mark.parametrize("op", UNARY)
@FAST
@given(shape=SHAPES, seed=SEEDS)
def test_unary_like_torch(op: str, shape: tuple[int, ...], seed: int) -> None:
    attrs, function = UNARY[op]
    x = np.random.default_rng(seed).uniform(-5, 5, shape)
    against_torch(op, [x], function, attrs)


@pytest.mark.parametrize(("op", "function"), [("Sqrt", torch.sqrt), ("Log", torch.log)])
@FAST
@given(shape=SHAPES, seed=SEEDS)
def test_positive_operand_like_torch(
    op: str, function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], seed: int
) -> None:
    against_torch(op, [np.random.default_rng(seed).uniform(0.01, 5, shape)], function)


@pytest.mark.parametrize(
    ("op", "function", "low", "high"),
    [
        ("Asin", torch.asin, -1, 1),
        ("Acos", torch.acos, -1, 1),
        ("Acosh", torch.acosh, 1, 20),
        ("Atanh", torch.atanh, -1, 1),
    ],
)
@FAST
@given(shape=SHAPES, seed=SEEDS)
def test_operand_of_a_domain_like_torch(
    op: str,
    function: Callable[[torch.Tensor], torch.Tensor],
    low: float,
    high: float,
    shape: tuple[int, ...],
    seed: int,
) -> None:
    against_torch(op, [np.random.default_rng(seed).uniform(low, high, shape)], function)


@FAST
@given(shape=SHAPES, seed=SEEDS, alpha=st.floats(0.0625, 4, width=32))
def test_elu_family_like_torch(shape: tuple[int, ...], seed: int, alpha: float) -> None:
    x = np.random.default_rng(seed).uniform(-5, 5, shape)
    f = torch.nn.functional  # its celu rounds alpha to 32 bits
    elu: dict[str, Attr] = {"gamma": 1.0, "alpha": alpha, "rate": 1.0}
    against_torch("Elu", [x], lambda t: f.elu(t, alpha), elu)
    celu: dict[str, Attr] = {"gamma": 1.0, "alpha": alpha, "rate": 1.0 / alpha}
    against_torch("Elu", [x], lambda t: f.celu(t, alpha), celu)
    gamma, gain = 1.0507009873554805, 1.6732632423543772
    against_torch("Elu", [x], f.selu, {"gamma": gamma, "alpha": gamma * gain, "rate": 1.0})


@FAST
@given(shape=SHAPES, seed=SEEDS, alpha=st.floats(-3, 3))
def test_swish_like_torch(shape: tuple[int, ...], seed: int, alpha: float) -> None:
    x = np.random.default_rng(seed).uniform(-5, 5, shape)
    against_torch("Swish", [x], lambda t: t * torch.sigmoid(alpha * t), {"alpha": alpha})


@FAST
@given(shape=SHAPES, seed=SEEDS, alpha=st.floats(-2, 2))
def test_thresholded_relu_like_torch(shape: tuple[int, ...], seed: int, alpha: float) -> None:
    x = np.random.default_rng(seed).uniform(-5, 5, shape)
    attrs: dict[str, Attr] = {"alpha": alpha}
    against_torch(
        "ThresholdedRelu", [x], lambda t: torch.nn.functional.threshold(t, alpha, 0.0), attrs
    )
    _, dy, (dx,) = forward_and_gradients("ThresholdedRelu", [np.array([0.0])], {"alpha": -1.0})
    assert dx == dy  # a result of 0 above the threshold


@FAST
@given(shape=SHAPES, seed=SEEDS, lambd=st.floats(0, 3, width=32))
def test_shrink_like_torch(shape: tuple[int, ...], seed: int, lambd: float) -> None:
    x = np.random.default_rng(seed).uniform(-5, 5, shape)
    f = torch.nn.functional
    against_torch("Shrink", [x], lambda t: f.softshrink(t, lambd), {"lambd": lambd, "bias": lambd})
    against_torch("Shrink", [x], lambda t: f.hardshrink(t, lambd), {"lambd": lambd, "bias": 0.0})


@FAST
@given(shapes=broadcast_pairs(), seed=SEEDS, integers=st.booleans())
def test_pow_like_torch(shapes: tuple[tuple[int, ...], ...], seed: int, integers: bool) -> None:
    rng = np.random.default_rng(seed)
    x, p = rng.uniform(0.2, 3, shapes[0]), rng.uniform(-3, 3, shapes[1])
    against_torch("Pow", [x, np.rint(p) if integers else p], torch.pow)


def test_pow_at_zero_like_torch() -> None:
    against_torch("Pow", [np.zeros(3), np.array([0.0, 1.0, 2.0])], torch.pow)


@FAST
@given(shape=st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple), seed=SEEDS)
def test_prelu_like_torch(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-5, 5, shape)
    for slope in (rng.uniform(-1, 1, 1), rng.uniform(-1, 1, (shape[1], *(1,) * (len(shape) - 2)))):
        against_torch("PRelu", [x, slope], lambda t, w: torch.nn.functional.prelu(t, w.reshape(-1)))


@FAST
@given(shapes=broadcast_pairs(), flags=st.booleans(), seed=SEEDS)
def test_where_like_torch(shapes: tuple[tuple[int, ...], ...], flags: bool, seed: int) -> None:
    """The condition broadcasts as well, and has no gradient; so do choices of one number."""
    rng = np.random.default_rng(seed)
    a, b = (rng.uniform(-2, 2, s) for s in shapes)
    condition = np.asarray(rng.random(shapes[1]) < 0.5)
    graph = Graph("where")
    c = graph.add_constant("c", pack_bits(condition), "bits", shape=condition.shape)
    inputs = [graph.add_input(n, TensorType(v.shape)) for n, v in (("a", a), ("b", b))]
    choices = [inputs[0], None] if flags else inputs
    attrs: dict[str, Attr] = {"off": -1.5} if flags else {}
    node = graph.add_node("Where", (c, *choices), attrs, name="y")
    dy = graph.add_input("dy", node.out.type)
    vjp = get_op("Where").vjp
    assert vjp is not None
    grads = vjp(GradBuilder(graph, node, {}), node, dy, [True, True, True])
    feeds = {"a": a, "b": b, "dy": rng.uniform(-1, 1, node.out.type.shape)}
    env = run(graph, feeds)
    leaves = [torch.tensor(v, requires_grad=True) for v in (a, b)]
    second = torch.tensor(-1.5, dtype=torch.float64) if flags else leaves[1]
    want = torch.where(torch.tensor(condition), leaves[0], second)
    want.backward(torch.tensor(feeds["dy"]))
    np.testing.assert_array_equal(env["y"], want.detach().numpy())
    assert grads[0] is None
    for leaf, grad in zip(leaves, grads[1:], strict=True):
        assert (grad is None) == (leaf.grad is None)
        if grad is not None:
            np.testing.assert_allclose(env[grad.name], leaf.grad.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", ["Greater", "GreaterOrEqual", "Equal", "And", "Or", "Xor"])
@FAST
@given(shapes=broadcast_pairs(), seed=SEEDS)
def test_conditions_like_numpy(op: str, shapes: tuple[tuple[int, ...], ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    logic = op in ("And", "Or", "Xor")
    data = [rng.integers(0, 2 if logic else 3, s).astype(bool if logic else "f4") for s in shapes]
    graph = Graph(op)
    kind = "bits" if logic else "f32"
    inputs = [graph.add_input(f"x{i}", TensorType(a.shape, kind)) for i, a in enumerate(data)]
    node = graph.add_node(op, inputs, name="y")
    (got,) = get_op(op).kernel(node, [pack_bits(a) if logic else a for a in data])
    numpy = {"GreaterOrEqual": "greater_equal", "And": "logical_and", "Or": "logical_or"}
    numpy["Xor"] = "logical_xor"
    want = getattr(np, numpy.get(op, op.lower()))(*data)
    assert np.array_equal(unpack_bits(got, node.out.type.shape), want)


@FAST
@given(shapes=broadcast_pairs(), seed=SEEDS)
def test_expand_like_torch(shapes: tuple[tuple[int, ...], ...], seed: int) -> None:
    x = np.random.default_rng(seed).uniform(-1, 1, shapes[0])
    whole = np.broadcast_shapes(*shapes)
    against_torch("Expand", [x], lambda t: t.expand(whole), {"shape": whole})


@pytest.mark.parametrize("op", ["Relu", "LeakyRelu", "HardSwish"])
def test_slope_at_the_kink_is_torchs(op: str) -> None:
    attrs, function = UNARY[op]
    against_torch(op, [np.array([0.0, -3.0, 3.0])], function, attrs)


def test_clip_has_no_slope_at_its_bounds() -> None:
    _, _, (dx,) = forward_and_gradients(
        "Clip", [np.array([-1.0, 0.0, 6.0, 7.0, 3.0])], {"min": 0.0, "max": 6.0}
    )
    assert (dx != 0).tolist() == [False, False, False, False, True]


@pytest.mark.parametrize("op", ["Relu", "LeakyRelu", "Clip", "HardSigmoid", "ThresholdedRelu"])
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
        ("Elu", {"gamma": 1.0, "alpha": -0.1, "rate": 1.0}, "alpha = -0.1"),
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
