"""Products, softmax, reductions, losses and optimizers against oracles of other people."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import Array

from odt_plan.ir.errors import GraphError
from odt_plan.ir.graph import Attr, Graph, TensorType
from odt_plan.ir.interpreter import run
from odt_plan.ir.opdef import get_op

T = TensorType


def apply(op: str, data: Iterable[Array | None], **attrs: Attr) -> list[Array]:
    """Results of an operator on arrays."""
    graph, feeds, inputs = Graph(op), {}, []
    for i, array in enumerate(data):
        inputs.append(None)
        if array is not None:
            feeds[f"x{i}"] = np.asarray(array)
            dtype = {"f": "f32", "i": "i32"}[np.asarray(array).dtype.kind]
            inputs[i] = graph.add_input(f"x{i}", T(np.asarray(array).shape, dtype))
    node = graph.add_node(op, inputs, attrs, name="y")
    env = run(graph, feeds)
    return [env[v.name] for v in node.outputs]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


# --- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_is_one_chain_from_the_bias(trans_b: int) -> None:
    a, w, c = normal(2, 9), normal(9, 5), normal(5)
    (got,) = apply("Gemm", (a, w.T.copy() if trans_b else w, c), trans_b=trans_b)
    for i in range(2):
        for j in range(5):
            acc = c[j]
            for k in range(9):
                acc = np.float32(acc + np.float32(a[i, k] * w[k, j]))
            assert got[i, j] == acc
    torch.testing.assert_close(
        torch.from_numpy(got),
        torch.addmm(torch.from_numpy(c), torch.from_numpy(a), torch.from_numpy(w)),
    )


@pytest.mark.parametrize("hot", [1, 4, 8])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_a_split_weight_gives_the_bits_of_the_whole(trans_b: int, hot: int) -> None:
    a, w, c, dy = normal(3, 9), normal(9, 6), normal(6), normal(3, 6, seed=1)
    w = np.ascontiguousarray(w.T) if trans_b else w
    left, right = np.split(w, [hot], axis=trans_b)
    whole = apply("Gemm", (a, w, c), trans_b=trans_b)[0]
    assert np.array_equal(apply("Gemm", (a, left, c, right), trans_b=trans_b)[0], whole)
    back = apply("GemmGradInput", (dy, w), trans_b=trans_b)[0]
    assert np.array_equal(apply("GemmGradInput", (dy, left, right), trans_b=trans_b)[0], back)
    full = apply("GemmGradWeight", (a, dy), trans_b=trans_b)[0]
    part = apply("GemmGradWeight", (a[:, :hot].copy(), dy), trans_b=trans_b)[0]
    assert np.array_equal(part, np.split(full, [hot], axis=trans_b)[0])
    if not trans_b:
        product = apply("MatMul", (a, w))[0]
        assert np.array_equal(apply("MatMul", (a, left, right))[0], product)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_matmul_broadcasts_like_numpy(data: st.DataObject) -> None:
    m, k, n = (data.draw(st.integers(1, 4)) for _ in range(3))
    batch = data.draw(st.lists(st.integers(1, 3), max_size=4))
    shapes = []
    for rows, columns in ((m, k), (k, n)):
        own = batch[data.draw(st.integers(0, len(batch))) :]
        own = [1 if data.draw(st.booleans()) else d for d in own]
        shapes.append((*own, rows, columns))
    a, b = (normal(*s, seed=i) for i, s in enumerate(shapes))
    flip_a, flip_b = data.draw(st.booleans()), data.draw(st.booleans())
    operands = [
        np.ascontiguousarray(x.swapaxes(-1, -2)) if flip else x
        for x, flip in ((a, flip_a), (b, flip_b))
    ]
    (got,) = apply("MatMul", operands, trans_a=int(flip_a), trans_b=int(flip_b))
    want = np.matmul(a.astype(np.float64), b.astype(np.float64))
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "shapes", "attrs", "message"),
    [
        ("Gemm", [(2, 3), (4, 5)], {"trans_b": 0}, "has 3 features, the weight 4"),
        ("Gemm", [(2, 3), (5, 3), (4,)], {"trans_b": 1}, r"bias f32\[4\] must have the shape \(5"),
        ("Gemm", [(3,), (3, 5)], {}, "the input must have 2 axes"),
        ("Gemm", [(2, 5), (3, 4), None, (2, 5)], {}, "has 5 outputs, the hot one 4"),
        ("MatMul", [(2, 3), (4, 5)], {}, "has 3 columns, the other operand 4 rows"),
        ("MatMul", [(3,), (3, 5)], {}, "at least 2 axes"),
        ("MatMul", [(2, 1, 3), (3, 3, 5)], {}, "do not broadcast"),
        ("MatMul", [(1,) * 5 + (2, 3), (3, 4)], {}, "5 leading axes; at most 4"),
        ("MatMul", [(2, 3, 4), (2, 3, 5), (1, 5)], {}, "does not continue the weight"),
        ("GemmGradInput", [(2, 3), (4, 5)], {"trans_b": 1}, "must have 4 features"),
        ("GemmGradWeight", [(2, 3), (3, 4)], {}, "agree in all axes but the last"),
        ("Softmax", [(2, 3)], {"axis": 2}, "axis 2 of a tensor with 2 axes"),
        ("ReduceMean", [(2, 3)], {"axes": (0, -2)}, "axes"),
        ("ReduceMean", [(1,) * 7], {}, "7 axes; at most 6"),
        ("ReduceSumTo", [(2, 3)], {"shape": (2,)}, "can't be summed"),
        ("ReduceSumTo", [(3,)], {"shape": (2, 3)}, "can't be summed"),
        ("ExpandScale", [(2,)], {"shape": (2, 3), "axes": (0,), "scale": 1.0}, "not expand"),
        ("SGD", [(2, 3), (3, 2), (2,)], {}, "operand 1 is"),
        ("Adam", [(3,)] * 4 + [(2,)], {}, "hyper must have"),
        ("CrossEntropy", [(2, 3), (2,)], {}, r"labels must be i32\[2\]"),
        ("MSE", [(2, 3), (3, 2)], {}, "differ"),
    ],
)
def test_operands_that_do_not_fit_are_named(
    op: str, shapes: list[tuple[int, ...] | None], attrs: dict[str, Attr], message: str
) -> None:
    graph = Graph("bad")
    inputs = [None if s is None else graph.add_input(f"x{i}", T(s)) for i, s in enumerate(shapes)]
    with pytest.raises(GraphError, match=message) as e:
        graph.add_node(op, inputs, attrs, name="layer7")
    assert str(e.value).startswith(f"node layer7 ({op}): ")
    assert graph.nodes == []


def test_missing_operand_is_an_error() -> None:
    graph = Graph("bad")
    with pytest.raises(GraphError, match="operand 1 is missing"):
        graph.add_node("Gemm", (graph.add_input("x", T((1, 2))), None), name="layer")


# --- softmax, reductions --------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_softmax_equals_torch(axis: int) -> None:
    x = 5 * normal(3, 4, 5)
    (got,) = apply("Softmax", (x,), axis=axis)
    want = torch.softmax(torch.from_numpy(x).double(), axis).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=6), data=st.data())
def test_reductions_equal_numpy(shape: list[int], data: st.DataObject) -> None:
    x = normal(*shape)
    axes = tuple(data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)))
    wide = x.astype(np.float64)
    for keep in (0, 1):
        (mean,) = apply("ReduceMean", (x,), axes=axes, keepdims=keep)
        want = wide.mean(axis=axes, keepdims=bool(keep))
        assert mean.shape == want.shape
        np.testing.assert_allclose(mean, want, rtol=1e-5, atol=1e-6)
    kept = tuple(1 if i in axes else d for i, d in enumerate(shape))
    (total,) = apply("ReduceSumTo", (x,), shape=kept)
    np.testing.assert_allclose(total, wide.sum(axis=axes, keepdims=True), rtol=1e-5, atol=1e-5)
    (spread,) = apply("ExpandScale", (total,), shape=tuple(shape), axes=axes, scale=0.5)
    assert np.array_equal(spread, np.broadcast_to(total * np.float32(0.5), shape))


def test_sums_are_sequential() -> None:
    x = normal(1, 5000)
    acc = np.float32(0)
    for v in x[0]:
        acc = np.float32(acc + v)
    assert apply("ReduceSumTo", (x,), shape=(1, 1))[0][0, 0] == acc
    assert acc != x.sum(), "pairwise summation would not be told apart"


# --- losses ---------------------------------------------------------------------------------------


def test_cross_entropy_equals_torch() -> None:
    logits = torch.from_numpy(4 * normal(6, 5)).requires_grad_()
    labels = np.array([0, 4, 2, 2, 1, 3], np.int32)
    want = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels).long())
    want.backward()
    probs = apply("Softmax", (logits.detach().numpy(),), axis=1)[0]
    loss = apply("CrossEntropy", (probs, labels))[0]
    assert loss.shape == ()
    np.testing.assert_allclose(loss, want.detach(), rtol=1e-6)
    assert logits.grad is not None
    gradient = apply("SoftmaxCrossEntropyGrad", (probs, labels))[0]
    np.testing.assert_allclose(gradient, logits.grad, rtol=1e-5, atol=1e-8)


def test_mean_squared_error_equals_torch() -> None:
    prediction = torch.from_numpy(normal(3, 4)).requires_grad_()
    target = normal(3, 4, seed=1)
    want = torch.nn.functional.mse_loss(prediction, torch.from_numpy(target))
    want.backward()
    data = (prediction.detach().numpy(), target)
    np.testing.assert_allclose(apply("MSE", data)[0], want.detach(), rtol=1e-6)
    assert prediction.grad is not None
    np.testing.assert_allclose(apply("MSEGrad", data)[0], prediction.grad, rtol=1e-6)


# --- optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("kind", ["SGD", "Momentum", "Adagrad", "Adam"])
def test_five_steps_equal_torch(kind: str, scale: float) -> None:
    w = normal(4, 3)
    parameter = torch.from_numpy(w.copy()).requires_grad_()
    rate, attrs, states = 0.05, {"gradient_scale": scale}, []
    if kind == "SGD":
        optimizer: torch.optim.Optimizer = torch.optim.SGD([parameter], rate)
    elif kind == "Momentum":
        optimizer = torch.optim.SGD([parameter], rate, momentum=0.8)
        attrs["momentum"], states = 0.8, [np.zeros_like(w)]
    elif kind == "Adagrad":
        optimizer = torch.optim.Adagrad([parameter], rate, eps=1e-3)
        attrs["epsilon"], states = 1e-3, [np.zeros_like(w)]
    else:
        optimizer = torch.optim.Adam([parameter], rate, betas=(0.8, 0.95), eps=1e-6)
        attrs |= {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6}
        states = [np.zeros_like(w), np.zeros_like(w)]
    for t in range(1, 6):
        g = normal(4, 3, seed=t)
        parameter.grad = torch.from_numpy(g * np.float32(scale))
        optimizer.step()
        hyper = [rate, 1.0, t]
        if kind == "Adam":
            hyper = [rate, 1 / np.sqrt(1 - 0.95**t), t, rate / (1 - 0.8**t)]
        w, *states = apply(kind, (w, g, *states, np.array(hyper, np.float32)), **attrs)
        np.testing.assert_allclose(w, parameter.detach(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["SGD", "Momentum", "Adagrad", "Adam", "Accumulate"])
def test_updates_by_rows_are_the_update(kind: str) -> None:
    """Optimizers are called on runs of rows of a streamed gradient."""
    sample = next(iter(get_op(kind).samples()))
    count = len(sample.types) - (kind != "Accumulate")
    data = [abs(normal(6, 3, seed=i)) for i in range(count)]
    hyper = [0.1, 1.5, 1.0, 0.2][: 4 if kind == "Adam" else 3]
    rest = [] if kind == "Accumulate" else [np.array(hyper, np.float32)]
    whole = apply(kind, [*data, *rest], **sample.attrs)
    for begin in range(0, 6, 2):
        rows = slice(begin, begin + 2)
        part = apply(kind, [*(d[rows] for d in data), *rest], **sample.attrs)
        for p, w in zip(part, whole, strict=True):
            assert np.array_equal(p, w[rows])
