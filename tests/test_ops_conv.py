"""Convolution: against PyTorch autograd, and the C kernels against NumPy bit for bit."""

from __future__ import annotations

import ctypes
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
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
from odt_plan.ir.errors import GraphError
from odt_plan.ir.graph import Attr, Graph, Node, TensorType
from odt_plan.ir.opdef import get_op, works

KERNELS = Path(odt_plan.__file__).parent / "backends" / "c" / "kernels"
CONV_FILES = ("conv", "conv_grad", "depthwise", "depthwise_grad", "gather", "margin")
CONV_FILES += ("pointwise", "simd", "sums", "wide_depthwise", "wide_grad")
#: Vectors as the compiler has them for any processor and for this one, none, and those of others.
OPTIMISE = ("-O2", "-O3 -march=native")
OPTIMISE += tuple(f"-O2 -Wno-psabi -DODTPLAN_LANES={n}" for n in (0, 8, 16))
Array = np.ndarray[Any, Any]


def flags_of(optimise: str) -> list[str]:
    """Those of one of ``OPTIMISE``; the bits are the same with all of them."""
    given = optimise.split()
    return lane.OPTIMISED if given == ["-O2"] else [*given, *lane.BITS]


FAST = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Case:
    """A convolution; ``hot`` leading channels are trained, None: all."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    attrs: dict[str, Attr]
    hot: int | None
    bias: bool
    seed: int

    @property
    def axis(self) -> int:
        return 1 if self.attrs["group"] == 1 else 0


@st.composite
def cases(draw: st.DrawFn, max_size: int = 11) -> Case:
    rank = draw(st.sampled_from((1, 2, 2, 2)))
    kind = draw(st.sampled_from(("plain", "plain", "grouped", "depthwise", "multiplied")))
    group = 1 if kind == "plain" else draw(st.integers(2, 6 if kind == "depthwise" else 3))
    depth = 1 if kind in ("depthwise", "multiplied") else draw(st.integers(1, 9))
    filters = 1 if kind == "depthwise" else draw(st.integers(2, 9))
    axes = []
    for _ in range(rank):
        k, d = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        begin, end = draw(st.integers(0, 4)), draw(st.integers(0, 4))
        least = max(1, d * (k - 1) + 1 - begin - end)
        axes.append(
            (
                draw(st.integers(least, max(least, max_size))),
                k,
                draw(st.integers(1, 3)),
                d,
                begin,
                end,
            )
        )
    attrs: dict[str, Attr] = {
        "group": group,
        "strides": tuple(a[2] for a in axes),
        "dilations": tuple(a[3] for a in axes),
        "pads": (*(a[4] for a in axes), *(a[5] for a in axes)),
    }
    partial = {"plain": depth, "depthwise": group}.get(kind, 0)
    hot = draw(st.integers(1, partial - 1)) if partial > 1 and draw(st.booleans()) else None
    return Case(
        (draw(st.integers(1, 2)), group * depth, *(a[0] for a in axes)),
        (filters * group, depth, *(a[1] for a in axes)),
        attrs,
        hot,
        draw(st.booleans()),
        draw(st.integers(0, 99)),
    )


@dataclass
class Run:
    """Nodes of a case with their operands and NumPy results."""

    nodes: dict[str, tuple[Node, list[Array | None]]]
    results: dict[str, Array]
    tensors: tuple[Array, Array, Array | None, Array]


def _left_over(case: Case) -> Iterator[int]:
    """Elements at the end of each axis that no window reaches."""
    a, rank = case.attrs, len(case.x) - 2
    for i in range(rank):
        reach = a["dilations"][i] * (case.w[2 + i] - 1) + 1
        yield (case.x[2 + i] + a["pads"][i] + a["pads"][rank + i] - reach) % a["strides"][i]


def run(case: Case, dtype: str) -> Run:
    """Forward and the three gradients by the registry's NumPy kernels."""
    rng = np.random.default_rng(case.seed)
    real = np.float64 if dtype == "f64" else np.float32
    x, w, b = (rng.standard_normal(s).astype(real) for s in (case.x, case.w, case.w[:1]))
    bias = b if case.bias else None
    hot, cold = w, None
    if case.hot is not None:
        hot, cold = np.split(w, [case.hot], axis=case.axis)
        hot, cold = np.ascontiguousarray(hot), np.ascontiguousarray(cold)
    graph, values = Graph("case"), {}

    def add(op: str, operands: Sequence[tuple[str, Array | None]], attrs: dict[str, Attr]) -> Array:
        for name, a in operands:
            if a is not None and name not in values:
                values[name] = graph.add_input(name, TensorType(a.shape))
        inputs = [None if a is None else values[name] for name, a in operands]
        node = graph.add_node(op, inputs, attrs, name=op)
        arrays = [a for _, a in operands]
        (y,) = get_op(op).kernel(node, arrays)
        assert y.dtype == real
        assert y.shape == node.out.type.shape
        nodes[op], results[op] = (node, arrays), y
        return y

    nodes: dict[str, tuple[Node, list[Array | None]]] = {}
    results: dict[str, Array] = {}
    y = add("Conv", [("x", x), ("w", hot), ("b", bias), ("cold", cold)], case.attrs)
    dy = rng.standard_normal(y.shape).astype(real)
    add("ConvGradInput", [("dy", dy), ("w", hot), ("cold", cold)], {**case.attrs, "shape": case.x})
    shape = list(case.w)
    if case.hot is not None:
        shape[case.axis] = case.hot
    part = np.ascontiguousarray(x[:, : case.hot])
    operands = [("part", part), ("dy", dy)]
    add("ConvGradWeight", operands, {**case.attrs, "weight_shape": tuple(shape)})
    add("ConvGradBias", [("dy", dy)], {})
    if case.hot is None:  # the gradient of the input with a bias
        shift = rng.standard_normal(case.x[1]).astype(real) if case.bias else None
        operands = [("dy", dy), ("w", w), ("shift", shift)]
        extra = {"output_padding": tuple(_left_over(case))}
        add("ConvTranspose", operands, {**case.attrs, **extra})
    return Run(nodes, results, (x, w, bias, dy))


@FAST
@given(cases())
def test_conv_and_gradients_equal_torch(case: Case) -> None:
    """In float64 against autograd, with every attribute and partial weights."""
    ours = run(case, "f64")
    x, w, b, dy = (None if a is None else torch.tensor(a) for a in ours.tensors)
    assert x is not None
    assert w is not None
    assert dy is not None
    for t in (x, w):
        t.requires_grad_()
    rank = len(case.x) - 2
    pads = case.attrs["pads"]
    sides = [(pads[i], pads[i + rank]) for i in reversed(range(rank))]
    padded = f.pad(x, [p for side in sides for p in side])
    conv = f.conv1d if rank == 1 else f.conv2d
    a = case.attrs
    y = conv(padded, w, b, a["strides"], 0, a["dilations"], a["group"])
    y.backward(dy)
    got = ours.results
    np.testing.assert_allclose(got["Conv"], y.detach().numpy(), rtol=1e-12, atol=1e-12)
    assert x.grad is not None
    assert w.grad is not None
    np.testing.assert_allclose(got["ConvGradInput"], x.grad.numpy(), rtol=1e-12, atol=1e-12)
    if "ConvTranspose" in got:
        shift = ours.nodes["ConvTranspose"][1][2]
        start = 0.0 if shift is None else shift.reshape(-1, *(1,) * rank)
        np.testing.assert_allclose(
            got["ConvTranspose"], x.grad.numpy() + start, rtol=1e-12, atol=1e-12
        )
    grad = np.take(w.grad.numpy(), range(case.hot or case.w[case.axis]), case.axis)
    np.testing.assert_allclose(got["ConvGradWeight"], grad, rtol=1e-12, atol=1e-12)
    axes = (0, *range(2, 2 + rank))
    np.testing.assert_allclose(got["ConvGradBias"], dy.numpy().sum(axes), rtol=1e-12, atol=1e-12)


@FAST
@given(cases())
def test_work_counts_the_taps_inside(case: Case) -> None:
    """The claimed multiply-accumulates are those of a convolution of ones, and of whole blocks."""
    ones = torch.ones(case.x, dtype=torch.float64)
    weight = torch.ones(case.w, dtype=torch.float64)
    rank, a = len(case.x) - 2, case.attrs
    sides = [(a["pads"][i], a["pads"][i + rank]) for i in reversed(range(rank))]
    conv = f.conv1d if rank == 1 else f.conv2d
    padded = f.pad(ones, [p for side in sides for p in side])
    y = conv(padded, weight, None, a["strides"], 0, a["dilations"], a["group"])
    macs, padding_too = int(y.sum()), y.numel() * math.prod(case.w[1:])
    nodes = run(case, "f32").nodes
    work = {op: works(node)[0] for op, (node, _) in nodes.items()}
    whole = case.w[case.axis]
    parts = {"Conv": whole, "ConvGradInput": whole, "ConvGradWeight": case.hot or whole}
    for op, part in parts.items():
        needed = macs * part // whole
        most = 16 * padding_too  # blocks may overlap, depthwise planes are copied with margins
        assert needed <= work[op].amount <= (needed if work[op].cost_class == "conv" else most)
    depthwise = case.w[1] == 1 and case.w[0] == case.x[1] == a["group"] > 1
    assert (work["Conv"].cost_class == "depthwise") == depthwise


def test_rows_of_the_weight_gradient_equal_the_whole() -> None:
    """A streamed gradient is the same bit for bit."""
    for group, w in ((1, (7, 6, 3, 3)), (3, (9, 2, 3, 3)), (6, (6, 1, 3, 3))):
        attrs: dict[str, Attr] = {
            "group": group,
            "strides": (2, 1),
            "pads": (1, 1, 1, 1),
            "dilations": (1, 1),
        }
        r = run(Case((2, 6, 7, 8), w, attrs, None, True, 3), "f32")
        for op in ("ConvGradWeight", "ConvGradBias"):
            node, inputs = r.nodes[op]
            rows = get_op(op).rows_kernel
            assert rows is not None
            for step in (1, 2, 5):
                cuts = range(0, w[0], step)
                parts = [rows(node, inputs, i, min(w[0], i + step)) for i in cuts]
                np.testing.assert_array_equal(np.concatenate(parts), r.results[op])


def test_both_ways_to_sum_a_weight_gradient_give_the_same_bits() -> None:
    """The whole gradient of a wide layer is summed pixel by pixel, a row of it by running sums."""
    attrs: dict[str, Attr] = {"group": 1, "strides": (1, 1), "pads": (1,) * 4, "dilations": (1, 1)}
    r = run(Case((2, 32, 4, 5), (33, 32, 3, 3), attrs, None, True, 5), "f32")
    node, inputs = r.nodes["ConvGradWeight"]
    rows = get_op("ConvGradWeight").rows_kernel
    assert rows is not None
    parts = [rows(node, inputs, i, i + 1) for i in range(33)]
    np.testing.assert_array_equal(np.concatenate(parts), r.results["ConvGradWeight"])


@pytest.mark.parametrize(
    ("x", "w", "attrs", "reason"),
    [
        ((1, 3, 5, 5), (4, 2, 3, 3), {}, "does not fit 3 channels"),
        ((1, 3, 5, 5), (4, 3, 7, 3), {}, "larger than the padded input of 5"),
        ((1, 3, 5, 5), (4, 3, 3), {}, "differ in rank"),
        ((1, 3, 5, 5, 5), (4, 3, 3, 3, 3), {}, "1 and 2 are supported"),
        ((1, 3, 5, 5), (4, 3, 3, 3), {"strides": (0, 1)}, "must be positive"),
        ((1, 3, 5, 5), (4, 3, 3, 3), {"pads": (1, 1)}, "do not fit 2 spatial axes"),
        ((1, 3, 5, 5), (4, 3, 3, 3), {"group": 2}, "in 2 groups does not fit"),
    ],
)
def test_operands_that_do_not_fit(
    x: tuple[int, ...], w: tuple[int, ...], attrs: dict[str, Attr], reason: str
) -> None:
    graph = Graph("bad")
    operands = [graph.add_input("x", TensorType(x)), graph.add_input("w", TensorType(w))]
    with pytest.raises(GraphError, match=f"node c1.*{reason}"):
        graph.add_node("Conv", operands, attrs, name="c1")


# -- C ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=OPTIMISE)
def kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    """The convolution's sources as a shared object."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    out = tmp_path_factory.mktemp("conv") / "libconv.so"
    sources = [KERNELS / f"odtplan_{f}.c" for f in CONV_FILES]
    command = [compiler, *lane.STRICT, *flags_of(request.param)]
    return ctypes.CDLL(str(link(command, sources, ["-shared"], out)))


def call(lib: ctypes.CDLL, node: Node, inputs: Sequence[Array | None], rows: int) -> Array:
    """Run a node's C kernel; gradients of parameters in tiles of ``rows``."""
    op = get_op(node.op)
    assert op.c is not None
    assert op.c.operands in (None, 4, 3)
    fields = op.c.params(node)
    ints = [v for f in fields.values() for v in (f if isinstance(f, tuple) else (f,))]
    params = (ctypes.c_int32 * len(ints))(*ints)
    pointers = [None if a is None else a.ctypes.data_as(ctypes.c_void_p) for a in inputs]
    function = getattr(lib, op.c.symbol)
    shape = node.out.type.shape
    if op.rows_kernel is None:
        y = np.full(shape, np.nan, np.float32)
        function(params, *pointers, y.ctypes.data_as(ctypes.c_void_p))
        return y
    tiles = []
    for i in range(0, shape[0], rows):
        end = min(shape[0], i + rows)
        tile = np.full((end - i, *shape[1:]), np.nan, np.float32)
        out = tile.ctypes.data_as(ctypes.c_void_p)
        function(params, *pointers, out, ctypes.c_int32(i), ctypes.c_int32(end))
        tiles.append(tile)
    return np.concatenate(tiles)


@settings(FAST, max_examples=150)
@given(case=cases(max_size=16), rows=st.integers(1, 9))
def test_c_equals_numpy_bit_for_bit(kernels: ctypes.CDLL, case: Case, rows: int) -> None:
    r = run(case, "f32")
    for op, (node, inputs) in r.nodes.items():
        np.testing.assert_array_equal(call(kernels, node, inputs, rows), r.results[op], op)


def test_one_tap_with_padding_at_the_end(kernels: ctypes.CDLL) -> None:
    """Pixels without a source are no pixels of a matrix product."""
    attrs: dict[str, Attr] = {"group": 2, "strides": (1,), "pads": (0, 1), "dilations": (1,)}
    r = run(Case((1, 2, 3), (8, 1, 1), attrs, None, True, 0), "f32")
    for op, (node, inputs) in r.nodes.items():
        np.testing.assert_array_equal(call(kernels, node, inputs, 4), r.results[op], op)


@pytest.mark.parametrize("k", [1, 3])
def test_c_equals_numpy_for_partly_trained_layers(kernels: ctypes.CDLL, k: int) -> None:
    """The channels that are trained lie apart from the others."""
    attrs: dict[str, Attr] = {
        "group": 1,
        "strides": (1, 1),
        "pads": (k // 2,) * 4,
        "dilations": (1, 1),
    }
    r = run(Case((2, 12, 8, 9), (9, 12, k, k), attrs, 5, True, k), "f32")
    for op, (node, inputs) in r.nodes.items():
        np.testing.assert_array_equal(call(kernels, node, inputs, 4), r.results[op], op)


@pytest.mark.parametrize(
    ("x", "k", "pad", "stride"),
    [((100, 100), 3, 1, 1), ((150, 120), 5, 2, 2), ((2, 200), 1, 1, 1)],
)
def test_c_equals_numpy_for_large_depthwise_planes(
    kernels: ctypes.CDLL, x: tuple[int, int], k: int, pad: int, stride: int
) -> None:
    """Planes of which vectors take some lines at a time."""
    attrs: dict[str, Attr] = {
        "group": 3,
        "strides": (stride, stride),
        "pads": (pad,) * 4,
        "dilations": (1, 1),
    }
    r = run(Case((2, 3, *x), (3, 1, k, k), attrs, None, True, k), "f32")
    for op, (node, inputs) in r.nodes.items():
        np.testing.assert_array_equal(call(kernels, node, inputs, 3), r.results[op], op)


def test_c_equals_numpy_for_usual_layers(kernels: ctypes.CDLL) -> None:
    """Sizes at which all block kernels and depthwise windows run, with and without remainder.

    Vectors have several parts of packed weights, and strips of lines.
    """
    small = product((4, 6), (1, 3), (1, 2), (9, 12), (False, True))
    windows = product((4,), (3, 5, 7), (1, 2), (3, 4, 7, 16, 21), (True,))
    many = product((37, 150), (1, 2, 3), (1, 2), (8, 9), (False,))
    large = ((19, 3, 1, 36, False), (19, 3, 2, 36, True), (3, 3, 1, 180, False))
    for channels, k, stride, size, depthwise in chain(small, windows, many, large):
        p = k // 2
        attrs: dict[str, Attr] = {
            "group": channels if depthwise else 1,
            "strides": (stride, stride),
            "pads": (p, p, p, p),
            "dilations": (1, 1),
        }
        w = (channels, 1, k, k) if depthwise else (channels + 3, channels, k, k)
        r = run(Case((2, channels, size, size + 1), w, attrs, None, True, k), "f32")
        for op, (node, inputs) in r.nodes.items():
            got = call(kernels, node, inputs, 4)
            np.testing.assert_array_equal(got, r.results[op], op)


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize(
    ("x", "w", "stride", "pads"),
    [
        ((2, 3, 36, 37), (20, 3, 3, 3), (2, 2), (0, 0, 1, 1)),
        ((2, 1, 49, 10), (64, 1, 10, 4), (2, 2), (4, 1, 5, 1)),
        ((1, 2, 20, 21), (19, 2, 7, 7), (1, 1), (3, 3, 3, 3)),
        ((1, 3, 180, 181), (16, 3, 3, 3), (1, 1), (1, 1, 1, 1)),
        ((2, 3, 30, 40), (33, 3, 1, 1), (1, 1), (0, 0, 0, 0)),
    ],
)
def test_c_equals_numpy_for_first_layers(
    kernels: ctypes.CDLL,
    x: tuple[int, ...],
    w: tuple[int, ...],
    stride: tuple[int, int],
    pads: tuple[int, ...],
    rows: int,
) -> None:
    """Few channels and many filters, in large tiles: lanes of the weight's gradient are filters."""
    attrs: dict[str, Attr] = {"group": 1, "strides": stride, "pads": pads, "dilations": (1, 1)}
    r = run(Case(x, w, attrs, None, True, 1), "f32")
    for op, (node, inputs) in r.nodes.items():
        np.testing.assert_array_equal(call(kernels, node, inputs, rows), r.results[op], op)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(3, 1), (1, 3), (5, 1), (1, 5), (3, 5), (2, 4)])
@pytest.mark.parametrize("dilation", [1, 2, 5])
def test_c_equals_numpy_for_narrow_windows(
    kernels: ctypes.CDLL, kernel: tuple[int, int], stride: int, dilation: int
) -> None:
    """Depthwise windows that are not square, with and without gaps, one of them per direction."""
    attrs: dict[str, Attr] = {
        "group": 3,
        "strides": (stride, stride),
        "pads": (1, 1, 1, 1),
        "dilations": (1, dilation),
    }
    for size in (4, 22):
        x = (1, 3, size, size + (kernel[1] - 1) * dilation)
        r = run(Case(x, (3, 1, *kernel), attrs, None, True, 7), "f32")
        for op, (node, inputs) in r.nodes.items():
            np.testing.assert_array_equal(call(kernels, node, inputs, 4), r.results[op], op)
