"""Pooling and batch normalization: against PyTorch autograd, and C against NumPy bit for bit."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from board import lane
from board.objects import link
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as f

import odt_plan
from odt_plan.backends.c.emit import kernel_files
from odt_plan.ir.errors import GraphError
from odt_plan.ir.graph import Attr, Graph, Node, TensorType
from odt_plan.ir.opdef import get_op

KERNELS = Path(odt_plan.__file__).parent / "backends" / "c" / "kernels"
Array = np.ndarray[Any, Any]
FAST = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Case:
    """A pool with padding that PyTorch can express (equal sides, at most half a window)."""

    x: tuple[int, ...]
    attrs: dict[str, Attr]
    levels: int  #: distinct input values; few make ties
    seed: int

    @property
    def torch_args(self) -> tuple[Any, Any, Any]:
        a = self.attrs
        return a["kernel_shape"], a["strides"], a["pads"][: len(self.x) - 2]


@st.composite
def cases(draw: st.DrawFn, dilated: bool = True) -> Case:
    rank = draw(st.sampled_from((1, 2, 2)))
    axes = []
    for _ in range(rank):
        k, d = draw(st.integers(1, 4)), draw(st.integers(1, 3)) if dilated else 1
        pad = draw(st.integers(0, k // 2))
        least = max(1, d * (k - 1) + 1 - 2 * pad)
        size = draw(st.integers(least, 12))
        if d > 1 and size <= d:  # a window could lie wholly in padding
            size = least + d * k
        axes.append((size, k, draw(st.integers(1, 3)), d, pad))
    attrs: dict[str, Attr] = {
        "kernel_shape": tuple(a[1] for a in axes),
        "strides": tuple(a[2] for a in axes),
        "dilations": tuple(a[3] for a in axes),
        "pads": tuple(a[4] for a in axes) * 2,
        "ceil_mode": draw(st.integers(0, 1)),
    }
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), *(a[0] for a in axes))
    return Case(shape, attrs, draw(st.sampled_from((2, 1000))), draw(st.integers(0, 99)))


class Runner:
    """Runs operators of the registry in NumPy and remembers the nodes."""

    def __init__(self) -> None:
        self.graph = Graph("case")
        self.calls: list[tuple[Node, list[Array], Array]] = []

    def __call__(self, op: str, inputs: Sequence[Array], attrs: dict[str, Attr]) -> Array:
        names = {np.dtype("f4"): "f32", np.dtype("f8"): "f32", np.dtype("u1"): "u8"}
        i = len(self.calls)
        values = [
            self.graph.add_input(f"{op}.{i}.{j}", TensorType(a.shape, names[a.dtype]))
            for j, a in enumerate(inputs)
        ]
        node = self.graph.add_node(op, values, attrs, name=op)
        (y,) = get_op(op).kernel(node, list(inputs))
        assert y.shape == node.out.type.shape
        assert y.dtype == (inputs[0].dtype if node.out.type.dtype == "f32" else np.uint8)
        self.calls.append((node, list(inputs), y))
        return y


def data(case: Case, dtype: str) -> tuple[Array, np.random.Generator]:
    rng = np.random.default_rng(case.seed)
    levels = rng.standard_normal(case.levels)
    return rng.choice(levels, case.x).astype(dtype), rng


def gradient(y: torch.Tensor, x: torch.Tensor, dy: Array) -> Array:
    y.backward(torch.tensor(dy))
    assert x.grad is not None
    return x.grad.numpy()


@FAST
@given(cases())
def test_max_pool_equals_torch_with_ties(case: Case) -> None:
    run, (x, rng) = Runner(), data(case, "f8")
    y, index = run("MaxPool", [x], case.attrs), run("MaxPoolIndex", [x], case.attrs)
    tx = torch.tensor(x, requires_grad=True)
    pool = f.max_pool1d if x.ndim == 3 else f.max_pool2d
    a = case.attrs
    ty = pool(tx, *case.torch_args, a["dilations"], ceil_mode=bool(a["ceil_mode"]))
    np.testing.assert_array_equal(y, ty.detach().numpy())
    dy = rng.standard_normal(y.shape)
    dx = run("MaxPoolGrad", [dy, index], {**a, "shape": x.shape})
    np.testing.assert_allclose(dx, gradient(ty, tx, dy), rtol=1e-12, atol=1e-12)


@FAST
@given(cases(dilated=False), st.booleans())
def test_average_pool_equals_torch(case: Case, padded: bool) -> None:
    run, (x, rng) = Runner(), data(case, "f8")
    attrs: dict[str, Attr] = {**case.attrs, "count_include_pad": int(padded)}
    y = run("AveragePool", [x], attrs)
    tx = torch.tensor(x, requires_grad=True)
    pool = f.avg_pool1d if x.ndim == 3 else f.avg_pool2d
    ty = pool(tx, *case.torch_args, bool(attrs["ceil_mode"]), padded)
    np.testing.assert_allclose(y, ty.detach().numpy(), rtol=1e-12, atol=1e-12)
    dy = rng.standard_normal(y.shape)
    dx = run("AveragePoolGrad", [dy], {**attrs, "shape": x.shape})
    np.testing.assert_allclose(dx, gradient(ty, tx, dy), rtol=1e-12, atol=1e-12)


def test_average_pool_of_dilated_uneven_windows() -> None:
    """Attributes that PyTorch lacks, against a direct definition."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 2, 9))
    attrs: dict[str, Attr] = {
        "kernel_shape": (3,),
        "strides": (2,),
        "dilations": (2,),
        "pads": (3, 1),
    }
    for padded in (0, 1):
        y = Runner()("AveragePool", [x], {**attrs, "count_include_pad": padded})
        for o in range(y.shape[2]):
            taps = [o * 2 - 3 + 2 * k for k in range(3)]
            inside = [t for t in taps if 0 <= t < 9]
            counted = [t for t in taps if -3 <= t < 10] if padded else inside
            np.testing.assert_allclose(y[0, :, o], x[0][:, inside].sum(1) / len(counted))


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 2, 7)])
def test_global_average_pool_equals_torch(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    run, x = Runner(), rng.standard_normal(shape)
    tx = torch.tensor(x, requires_grad=True)
    ty = tx.mean(tuple(range(2, len(shape))), keepdim=True)
    y = run("GlobalAveragePool", [x], {})
    np.testing.assert_allclose(y, ty.detach().numpy(), rtol=1e-12)
    dy = rng.standard_normal(y.shape)
    dx = run("GlobalAveragePoolGrad", [dy], {"shape": shape})
    np.testing.assert_allclose(dx, gradient(ty, tx, dy), rtol=1e-12)


def norm_operands(shape: tuple[int, ...], dtype: str) -> list[Array]:
    rng = np.random.default_rng(2)
    x, *vectors = (rng.standard_normal(s).astype(dtype) for s in (shape, *(shape[1:2],) * 4))
    vectors[3] = np.abs(vectors[3])  # a variance
    return [x, *vectors]


def run_norm(run: Runner, operands: Sequence[Array]) -> tuple[Array, ...]:
    """Result, its gradient, and the gradients of x, scale and bias."""
    x, scale, _, mean, var = operands
    attrs: dict[str, Attr] = {"epsilon": 1e-3}
    y = run("BatchNormalization", operands, attrs)
    dy = np.random.default_rng(3).standard_normal(y.shape).astype(x.dtype)
    dx = run("BatchNormGradInput", [dy, scale, var], attrs)
    dscale = run("BatchNormGradScale", [dy, x, mean, var], attrs)
    return y, dy, dx, dscale, run("ConvGradBias", [dy], {})


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (3, 4, 7), (4, 5)])
def test_batch_norm_equals_torch(shape: tuple[int, ...]) -> None:
    operands = norm_operands(shape, "f8")
    y, dy, dx, dscale, dbias = run_norm(Runner(), operands)
    tx, scale, bias, mean, var = (torch.tensor(a) for a in operands)
    for t in (tx, scale, bias):
        t.requires_grad_()
    ty = f.batch_norm(tx, mean, var, scale, bias, training=False, eps=1e-3)
    np.testing.assert_allclose(y, ty.detach().numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dx, gradient(ty, tx, dy), rtol=1e-12, atol=1e-12)
    assert scale.grad is not None
    assert bias.grad is not None
    np.testing.assert_allclose(dscale, scale.grad.numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dbias, bias.grad.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("op", "attrs", "reason"),
    [
        ("MaxPool", {"kernel_shape": (3,)}, "do not fit 2 spatial axes"),
        ("MaxPool", {"kernel_shape": (1, 1), "pads": (1, 0, 0, 0)}, "wholly in the padding"),
        ("AveragePool", {"kernel_shape": (9, 2)}, "larger than the padded input of 6"),
        ("MaxPoolIndex", {"kernel_shape": (17, 16), "pads": (8, 8, 8, 8)}, "272 taps"),
    ],
)
def test_windows_that_do_not_fit(op: str, attrs: dict[str, Attr], reason: str) -> None:
    graph = Graph("bad")
    x = graph.add_input("x", TensorType((1, 2, 6, 6)))
    with pytest.raises(GraphError, match=f"node p1.*{reason}"):
        graph.add_node(op, (x,), attrs, name="p1")


# -- C ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Pools, normalization and the bias gradient as a shared object."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    out = tmp_path_factory.mktemp("pool") / "libpool.so"
    stems = [f"odtplan_{f}" for f in ("pool", "norm", "conv_grad")]
    sources = [KERNELS / f for f in kernel_files(stems) if f.endswith(".c")]
    command = [compiler, *lane.STRICT, *lane.OPTIMISED]
    return ctypes.CDLL(str(link(command, sources, ["-shared"], out)))


def call(lib: ctypes.CDLL, node: Node, inputs: Sequence[Array], *, in_place: bool) -> Array:
    op = get_op(node.op)
    assert op.c is not None
    words = b""
    for field in op.c.params(node).values():
        for v in field if isinstance(field, tuple) else (field,):
            words += np.array(v, np.int32 if isinstance(v, int) else np.float32).tobytes()
    arrays = [a.copy() for a in inputs]
    y = np.full(node.out.type.shape, 77, node.out.type.np_dtype)
    if in_place:
        y = arrays[op.inplace[0]]
    rows = () if op.rows_kernel is None else (ctypes.c_int32(0), ctypes.c_int32(y.shape[0]))
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (*arrays, y)]
    getattr(lib, op.c.symbol)(ctypes.c_char_p(words), *pointers, *rows)
    return y


def check_all(lib: ctypes.CDLL, run: Runner) -> None:
    for node, inputs, y in run.calls:
        for in_place in (False, True)[: 1 + bool(get_op(node.op).inplace)]:
            got = call(lib, node, inputs, in_place=in_place)
            np.testing.assert_array_equal(got, y, f"{node} in place: {in_place}")


@settings(FAST, max_examples=100)
@given(case=cases(), padded=st.booleans())
def test_c_pools_equal_numpy_bit_for_bit(kernels: ctypes.CDLL, case: Case, padded: bool) -> None:
    run, (x, rng) = Runner(), data(case, "f4")
    y, index = run("MaxPool", [x], case.attrs), run("MaxPoolIndex", [x], case.attrs)
    dy = rng.standard_normal(y.shape).astype("f4")
    run("MaxPoolGrad", [dy, index], {**case.attrs, "shape": x.shape})
    attrs: dict[str, Attr] = {**case.attrs, "count_include_pad": int(padded)}
    run("AveragePool", [x], attrs)
    run("AveragePoolGrad", [dy], {**attrs, "shape": x.shape})
    pooled = run("GlobalAveragePool", [x], {})
    run("GlobalAveragePoolGrad", [pooled], {"shape": x.shape})
    check_all(kernels, run)


def test_c_max_pool_gradient_survives_a_corrupt_index(kernels: ctypes.CDLL) -> None:
    """Taps that no window has, or that lie in padding, are ignored as in NumPy."""
    rng, run = np.random.default_rng(4), Runner()
    dy = rng.standard_normal((1, 2, 4, 4)).astype("f4")
    index = rng.integers(0, 256, dy.shape).astype("u1")
    index[0, 0] = rng.integers(0, 9, (4, 4))
    attrs: dict[str, Attr] = {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}
    run("MaxPoolGrad", [dy, index], {**attrs, "shape": (1, 2, 7, 7)})
    check_all(kernels, run)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (3, 4, 7), (4, 5)])
def test_c_batch_norm_equals_numpy_bit_for_bit(
    kernels: ctypes.CDLL, shape: tuple[int, ...]
) -> None:
    run = Runner()
    run_norm(run, norm_operands(shape, "f4"))
    check_all(kernels, run)
