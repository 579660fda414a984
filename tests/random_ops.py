"""Operators with a gradient, each with random shapes, attributes and data, and in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from op_cases import Array

from odt_plan.ir.graph import Attr, TensorType
from odt_plan.ir.ops.activation_grad import pack_bits

torch = pytest.importorskip("torch")
f = torch.nn.functional

Attrs = dict[str, Attr]
#: Distance that data keep from kinks: far more than the step of central differences.
GAP = 1e-3


@dataclass(frozen=True, eq=False)
class Drawn:
    """An operator with attributes and data.

    Attributes:
        op: Operator.
        data: Operands: float64, int32, or bool for conditions; None: absent.
        attrs: Attributes.
        reference: The result in PyTorch, of all operands.
        differentiable: Operands that have a gradient.
    """

    op: str
    data: Sequence[Array | None]
    attrs: Attrs
    reference: Callable[..., Any]
    differentiable: tuple[int, ...] = (0,)

    @property
    def types(self) -> tuple[TensorType | None, ...]:
        """Of the operands."""
        kinds = {"f": "f32", "i": "i32", "b": "bits"}
        return tuple(
            None if a is None else TensorType(a.shape, kinds[a.dtype.kind]) for a in self.data
        )

    def stored(self, real: type) -> list[Array | None]:
        """Operands as kernels take them, real numbers in ``real``."""
        return [None if a is None else _stored(a, real) for a in self.data]


def _stored(a: Array, real: type) -> Array:
    return pack_bits(a) if a.dtype == bool else a.astype(real) if a.dtype.kind == "f" else a


Strategy = st.SearchStrategy[Drawn]
SEEDS = st.integers(0, 2**32 - 1).map(np.random.default_rng)
EPSILONS = st.sampled_from((1e-5, 1e-3, 0.1))


def shapes(low: int = 0, high: int = 4, size: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of so many axes."""
    return st.lists(st.integers(1, size), min_size=low, max_size=high).map(tuple)


def spaced(rng: np.random.Generator, *counts: int) -> list[Array]:
    """Lists of numbers between -2 and 2, all of them far from each other and from 0."""
    count = sum(counts)
    values = -2 + 4 * (rng.permutation(count) + rng.uniform(0.3, 0.45)) / count
    return np.split(values, np.cumsum(counts)[:-1])


# -- element by element ----------------------------------------------------------------------------


@st.composite
def _unary(
    draw: st.DrawFn,
    op: str,
    function: Callable[..., Any],
    low: float = -4,
    high: float = 4,
    kinks: Callable[[Attrs], Sequence[float]] = lambda _: (),
    **attributes: st.SearchStrategy[Any],
) -> Drawn:
    """``function`` takes the operand, and the attributes by name."""
    attrs: Attrs = {k: draw(s) for k, s in attributes.items()}
    x = draw(SEEDS).uniform(low, high, draw(shapes()))
    for kink in kinks(attrs):
        x = np.where(np.abs(x - kink) < GAP, kink + 2 * GAP, x)
    return Drawn(op, [x], attrs, lambda t: function(t, **attrs))


@st.composite
def _pairs(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Two shapes that broadcast to at most this one."""
    pair = []
    for _ in range(2):
        kept = draw(st.integers(0, len(shape)))
        pair.append(tuple(d if draw(st.booleans()) else 1 for d in shape[kept:]))
    return pair


@st.composite
def _binary(
    draw: st.DrawFn, op: str, function: Callable[..., Any], low: float, high: float
) -> Drawn:
    """Of numbers between these, and of those with the other sign."""
    a, b = draw(_pairs(draw(shapes())))
    rng = draw(SEEDS)
    if op in ("Max", "Min"):
        x, y = (v.reshape(s) for v, s in zip(spaced(rng, prod(a), prod(b)), (a, b), strict=True))
    else:
        x, y = (rng.uniform(low, high, s) * rng.choice((-1, 1), s) for s in (a, b))
    if op in ("Mod", "Fmod"):
        assume((np.abs(x / y - np.rint(x / y)) > GAP / 10).all())
    return Drawn(op, [x, y], {}, function, (0, 1))


@st.composite
def _pow(draw: st.DrawFn) -> Drawn:
    a, b = draw(_pairs(draw(shapes())))
    rng = draw(SEEDS)
    x, p = rng.uniform(0.2, 3, a), rng.uniform(-3, 3, b)
    return Drawn("Pow", [x, p], {}, torch.pow, (0, 1))


@st.composite
def _prelu(draw: st.DrawFn) -> Drawn:
    shape = draw(shapes(1))
    slopes = tuple(d if draw(st.booleans()) else 1 for d in shape[draw(st.integers(0, 3)) :])
    rng = draw(SEEDS)
    x = rng.uniform(GAP, 3, shape) * rng.choice((-1, 1), shape)
    data = [x, rng.uniform(-1, 1, slopes)]
    return Drawn("PRelu", data, {}, lambda t, w: torch.where(t > 0, t, w * t), (0, 1))


@st.composite
def _where(draw: st.DrawFn) -> Drawn:
    shape = draw(shapes())
    (a, b), (c, _), rng = draw(_pairs(shape)), draw(_pairs(shape)), draw(SEEDS)
    data = [rng.random(c) < 0.5, rng.normal(size=a), rng.normal(size=b)]
    return Drawn("Where", data, {}, torch.where, (1, 2))


def _hard_sigmoid_kinks(attrs: Attrs) -> list[float]:
    alpha, beta = attrs["alpha"], attrs["beta"]
    assert isinstance(alpha, float)
    assert isinstance(beta, float)
    return [-beta / alpha, (1 - beta) / alpha]


def _real(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


def _elu(x: Any, gamma: float, alpha: float, rate: float) -> Any:
    return torch.where(x > 0, gamma * x, alpha * torch.expm1(torch.clamp(x, max=0) * rate))


def _shrunk(x: Any, lambd: float, bias: float) -> Any:
    return torch.where(x > lambd, x - bias, torch.where(x < -lambd, x + bias, 0 * x))


UNARY: dict[str, Strategy] = {
    "Neg": _unary("Neg", torch.neg),
    "Relu": _unary("Relu", torch.relu, kinks=lambda _: (0.0,)),
    "LeakyRelu": _unary(
        "LeakyRelu", lambda x, alpha: f.leaky_relu(x, alpha), kinks=lambda _: (0.0,),
        alpha=_real(0, 2),
    ),
    "Abs": _unary("Abs", torch.abs, kinks=lambda _: (0.0,)),
    "Clip": _unary(
        "Clip", lambda x, **bounds: torch.clamp(x, **bounds),
        kinks=lambda a: (a["min"], a["max"]), min=_real(-3, 0), max=_real(0, 3),
    ),
    "Shrink": _unary(
        "Shrink", _shrunk, kinks=lambda a: (a["lambd"], -a["lambd"]),
        lambd=_real(0, 3), bias=_real(-1, 2),
    ),
    "ThresholdedRelu": _unary(
        "ThresholdedRelu", lambda x, alpha: f.threshold(x, alpha, 0.0),
        kinks=lambda a: (a["alpha"],), alpha=_real(-2, 2),
    ),
    "HardSigmoid": _unary(
        "HardSigmoid", lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1),
        kinks=_hard_sigmoid_kinks, alpha=_real(0.0625, 2), beta=_real(-1, 2),
    ),
    "HardSwish": _unary("HardSwish", f.hardswish, kinks=lambda _: (-3.0, 3.0)),
    "Elu": _unary(
        "Elu", _elu, kinks=lambda _: (0.0,),
        gamma=_real(0.5, 2), alpha=_real(0.0625, 3), rate=_real(0.25, 2),
    ),
    "Swish": _unary("Swish", lambda x, alpha: x * torch.sigmoid(alpha * x), alpha=_real(-3, 3)),
    "Gelu": _unary("Gelu", lambda x: f.gelu(x, approximate="tanh")),
    "GeluErf": _unary("GeluErf", f.gelu),
    "Mish": _unary("Mish", f.mish),
    "Softplus": _unary("Softplus", f.softplus),
    "Softsign": _unary("Softsign", f.softsign, kinks=lambda _: (0.0,)),
    "Sigmoid": _unary("Sigmoid", torch.sigmoid),
    "Tanh": _unary("Tanh", torch.tanh),
    "Erf": _unary("Erf", torch.erf),
    "Exp": _unary("Exp", torch.exp),
    "Log": _unary("Log", torch.log, 0.1),
    "Sqrt": _unary("Sqrt", torch.sqrt, 0.1),
    "Reciprocal": _unary("Reciprocal", torch.reciprocal, 0.2),
    "Sin": _unary("Sin", torch.sin, -9, 9),
    "Cos": _unary("Cos", torch.cos, -9, 9),
    "Atan": _unary("Atan", torch.atan),
    "Asin": _unary("Asin", torch.asin, -0.95, 0.95),
    "Acos": _unary("Acos", torch.acos, -0.95, 0.95),
    "Sinh": _unary("Sinh", torch.sinh),
    "Cosh": _unary("Cosh", torch.cosh),
    "Asinh": _unary("Asinh", torch.asinh),
    "Acosh": _unary("Acosh", torch.acosh, 1.1, 9),
    "Atanh": _unary("Atanh", torch.atanh, -0.9, 0.9),
}  # fmt: skip
BINARY: dict[str, Strategy] = {
    "Add": _binary("Add", torch.add, 0, 2),
    "Sub": _binary("Sub", torch.sub, 0, 2),
    "Mul": _binary("Mul", torch.mul, 0, 2),
    "Div": _binary("Div", torch.div, 0.5, 2),
    "Max": _binary("Max", torch.maximum, 0, 2),
    "Min": _binary("Min", torch.minimum, 0, 2),
    "Mod": _binary("Mod", torch.remainder, 0.5, 3),
    "Fmod": _binary("Fmod", torch.fmod, 0.5, 3),
    "Pow": _pow(),
    "PRelu": _prelu(),
    "Where": _where(),
}


# -- axes ------------------------------------------------------------------------------------------


@st.composite
def _lanes(
    draw: st.DrawFn,
    op: str,
    function: Callable[..., Any],
    apart: bool = False,
    **attributes: st.SearchStrategy[int],
) -> Drawn:
    """``function`` takes the operand, its axis, and the attributes by name."""
    shape, rng = draw(shapes(1, size=5)), draw(SEEDS)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    more = {k: draw(s) for k, s in attributes.items()}
    x = spaced(rng, prod(shape))[0].reshape(shape) if apart else rng.uniform(-2, 2, shape)
    return Drawn(op, [x], {"axis": axis, **more}, lambda t: function(t, axis, **more))


def _cumsum(x: Any, axis: int, exclusive: int, reverse: int) -> Any:
    x = x.flip(axis) if reverse else x
    y = x.cumsum(axis)
    y = y - x if exclusive else y
    return y.flip(axis) if reverse else y


@st.composite
def _axes(draw: st.DrawFn, op: str, function: Callable[..., Any]) -> Drawn:
    shape = draw(shapes(1))
    axes = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1).map(sorted).map(tuple))
    keep = draw(st.integers(0, 1))
    x = draw(SEEDS).normal(size=shape)
    attrs: Attrs = {"axes": axes, "keepdims": keep}
    return Drawn(op, [x], attrs, lambda t: function(t, axes, keepdim=bool(keep)))


@st.composite
def _trilu(draw: st.DrawFn) -> Drawn:
    x, upper = draw(SEEDS).normal(size=draw(shapes(2))), draw(st.integers(0, 1))
    k = draw(st.integers(-5, 5))
    function = torch.triu if upper else torch.tril
    return Drawn("Trilu", [x], {"upper": upper, "k": k}, lambda t: function(t, k))


@st.composite
def _gather(draw: st.DrawFn) -> Drawn:
    shape, at, rng = draw(shapes(1)), draw(shapes(0, 2)), draw(SEEDS)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    index = rng.integers(-shape[axis], shape[axis], at).astype(np.int32)

    def reference(x: Any, i: Any) -> Any:
        taken = x.index_select(axis, i.reshape(-1) % shape[axis])
        place = axis % len(shape)
        return taken.reshape(shape[:place] + at + shape[place + 1 :])

    return Drawn("Gather", [rng.normal(size=shape), index], {"axis": axis}, reference)


@st.composite
def _scatter(draw: st.DrawFn) -> Drawn:
    """Rows that are replaced once each, or added to."""
    shape, rng, add = draw(shapes(1)), draw(SEEDS), draw(st.integers(0, 1))
    count = draw(st.integers(1, shape[0] if add == 0 else 2 * shape[0]))
    at = rng.permutation(shape[0])[:count] if add == 0 else rng.integers(0, shape[0], count)
    index = np.where(rng.random(count) < 0.5, at, at - shape[0]).astype(np.int32)
    rows = rng.normal(size=(count, *shape[1:]))

    def reference(x: Any, i: Any, new: Any) -> Any:
        i = i % shape[0]
        return x.index_add(0, i, new) if add else x.index_copy(0, i, new)

    data = [rng.normal(size=shape), index, rows]
    return Drawn("Scatter", data, {"add": add}, reference, (0, 2))


@st.composite
def _take_lanes(draw: st.DrawFn) -> Drawn:
    shape, rng = draw(shapes(1)), draw(SEEDS)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    place, size = axis % len(shape), shape[axis]
    taken = (*shape[:place], draw(st.integers(1, 5)), *shape[place + 1 :])
    index = rng.integers(-size, size, taken).astype(np.int32)
    data = [rng.normal(size=shape), index]
    return Drawn("TakeLanes", data, {"axis": axis}, lambda x, i: x.gather(axis, i % size))


@st.composite
def _reshape(draw: st.DrawFn) -> Drawn:
    shape = draw(shapes())
    parts = draw(st.permutations(shape))
    cut = draw(st.integers(0, len(parts)))
    target = (prod(parts[:cut]), *parts[cut:])
    x = draw(SEEDS).normal(size=shape)
    return Drawn("Reshape", [x], {"shape": target}, lambda t: t.reshape(target))


@st.composite
def _transpose(draw: st.DrawFn) -> Drawn:
    shape = draw(shapes())
    perm = tuple(draw(st.permutations(range(len(shape)))))
    x = draw(SEEDS).normal(size=shape)
    return Drawn("Transpose", [x], {"perm": perm}, lambda t: t.permute(perm))


@st.composite
def _expand(draw: st.DrawFn) -> Drawn:
    whole = draw(shapes())
    (part, _) = draw(_pairs(whole))
    x = draw(SEEDS).normal(size=part)
    return Drawn("Expand", [x], {"shape": whole}, lambda t: t.expand(whole))


@st.composite
def _concat(draw: st.DrawFn) -> Drawn:
    shape, rng = draw(shapes(1)), draw(SEEDS)
    axis = draw(st.integers(0, len(shape) - 1))
    sizes = draw(shapes(1, 5))
    data = [rng.normal(size=(*shape[:axis], n, *shape[axis + 1 :])) for n in sizes]
    every = tuple(range(len(data)))
    return Drawn("Concat", data, {"axis": axis}, lambda *t: torch.cat(t, axis), every)


@st.composite
def _slice(draw: st.DrawFn) -> Drawn:
    shape = draw(shapes(1, size=6))
    starts = tuple(draw(st.integers(0, d - 1)) for d in shape)
    steps = tuple(draw(st.integers(1, 3)) for _ in shape)
    ranges = zip(shape, starts, steps, strict=True)
    sizes = tuple(draw(st.integers(1, (d - a - 1) // s + 1)) for d, a, s in ranges)
    window = tuple(
        slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(starts, steps, sizes, strict=True)
    )
    x = draw(SEEDS).normal(size=shape)
    attrs: Attrs = {"starts": starts, "sizes": sizes, "steps": steps}
    return Drawn("Slice", [x], attrs, lambda t: t[window])


@st.composite
def _pad(draw: st.DrawFn) -> Drawn:
    shape = draw(shapes(1))
    begins, ends = (tuple(draw(st.integers(0, 3)) for _ in shape) for _ in range(2))
    value = draw(_real(-2, 2))
    x = draw(SEEDS).normal(size=shape)
    sides = [n for pair in reversed(list(zip(begins, ends, strict=True))) for n in pair]
    attrs: Attrs = {"begins": begins, "ends": ends, "value": value}
    return Drawn("Pad", [x], attrs, lambda t: f.pad(t, sides, value=value))


AXES: dict[str, Strategy] = {
    "ReduceMax": _lanes("ReduceMax", torch.amax, apart=True),
    "ReduceMin": _lanes("ReduceMin", torch.amin, apart=True),
    "ReduceL1": _lanes("ReduceL1", lambda x, i: x.abs().sum(i), apart=True),
    "ReduceL2": _lanes("ReduceL2", lambda x, i: x.norm(dim=i)),
    "ReduceSumSquare": _lanes("ReduceSumSquare", lambda x, i: (x * x).sum(i)),
    "ReduceLogSumExp": _lanes("ReduceLogSumExp", torch.logsumexp),
    "ReduceProd": _lanes("ReduceProd", torch.prod),
    "ReduceMean": _axes("ReduceMean", torch.mean),
    "ReduceSum": _axes("ReduceSum", torch.sum),
    "Softmax": _lanes("Softmax", torch.softmax),
    "LogSoftmax": _lanes("LogSoftmax", torch.log_softmax),
    "CumSum": _lanes("CumSum", _cumsum, exclusive=st.integers(0, 1), reverse=st.integers(0, 1)),
    "Trilu": _trilu(),
    "Gather": _gather(),
    "Scatter": _scatter(),
    "TakeLanes": _take_lanes(),
    "Reshape": _reshape(),
    "Transpose": _transpose(),
    "Expand": _expand(),
    "Concat": _concat(),
    "Slice": _slice(),
    "Pad": _pad(),
}


# -- products and windows --------------------------------------------------------------------------


@st.composite
def _gemm(draw: st.DrawFn) -> Drawn:
    m, k, n = (draw(st.integers(1, 7)) for _ in range(3))
    flip, rng = draw(st.integers(0, 1)), draw(SEEDS)
    data = [rng.normal(size=s) for s in ((m, k), (n, k) if flip else (k, n), (n,))]
    data = data[: draw(st.integers(2, 3))]

    def reference(x: Any, w: Any, b: Any = 0.0) -> Any:
        return x @ (w.T if flip else w) + b

    return Drawn("Gemm", data, {"trans_b": flip}, reference, tuple(range(len(data))))


@st.composite
def _matmul(draw: st.DrawFn) -> Drawn:
    """A layer, or a product of matrices of batches that broadcast, either one transposed."""
    m, k, n = (draw(st.integers(1, 5)) for _ in range(3))
    rng, batch = draw(SEEDS), draw(shapes(0, 2, 3))
    if draw(st.booleans()):
        data = [rng.normal(size=(*batch, m, k)), rng.normal(size=(k, n))]
        return Drawn("MatMul", data, {}, torch.matmul, (0, 1))
    (left, right), flips = draw(_pairs(batch)), [draw(st.integers(0, 1)) for _ in range(2)]
    a, b = ((m, k)[:: -1 if flips[0] else 1], (k, n)[:: -1 if flips[1] else 1])
    data = [rng.normal(size=(*left, *a)), rng.normal(size=(*right, *b))]

    def reference(x: Any, y: Any) -> Any:
        return (x.mT if flips[0] else x) @ (y.mT if flips[1] else y)

    return Drawn("MatMul", data, {"trans_a": flips[0], "trans_b": flips[1]}, reference, (0, 1))


@st.composite
def _conv(draw: st.DrawFn) -> Drawn:
    rank, group = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    depth, filters = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, strides, dilations, begins, ends, sizes = (list[int]() for _ in range(6))
    for _ in range(rank):
        k, d = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        begin, end = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        least = max(1, d * (k - 1) + 1 - begin - end)
        kernel.append(k)
        dilations.append(d)
        strides.append(draw(st.integers(1, 3)))
        sizes.append(least + draw(st.integers(0, 5)))
        begins.append(begin)
        ends.append(end)
    rng = draw(SEEDS)
    shape = (draw(st.integers(1, 2)), group * depth, *sizes)
    weight = (group * filters, depth, *kernel)
    data = [rng.normal(size=s) for s in (shape, weight, weight[:1])][: draw(st.integers(2, 3))]
    sides = [n for pair in reversed(list(zip(begins, ends, strict=True))) for n in pair]
    function = f.conv1d if rank == 1 else f.conv2d

    def reference(x: Any, w: Any, b: Any = None) -> Any:
        return function(f.pad(x, sides), w, b, strides, 0, dilations, group)

    attrs: Attrs = {
        "strides": tuple(strides), "dilations": tuple(dilations), "pads": (*begins, *ends),
        "group": group,
    }  # fmt: skip
    return Drawn("Conv", data, attrs, reference, tuple(range(len(data))))


@st.composite
def _conv_transpose(draw: st.DrawFn) -> Drawn:
    rank, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    before, after = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    axes = []
    for _ in range(rank):
        size, k = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        stride, d = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        extra = draw(st.integers(0, stride - 1))
        most = min(2, (stride * (size - 1) + d * (k - 1) + extra) // 2)
        axes.append((size, k, stride, d, draw(st.integers(0, most)), extra))
    sizes, kernel, strides, dilations, pads, extras = zip(*axes, strict=True)
    rng = draw(SEEDS)
    shape = (draw(st.integers(1, 2)), group * before, *sizes)
    weight = (group * before, after, *kernel)
    data = [rng.normal(size=s) for s in (shape, weight, (group * after,))]
    data = data[: draw(st.integers(2, 3))]
    function = f.conv_transpose1d if rank == 1 else f.conv_transpose2d

    def reference(x: Any, w: Any, b: Any = None) -> Any:
        return function(x, w, b, strides, pads, extras, group, dilations)

    attrs: Attrs = {
        "strides": strides, "dilations": dilations, "pads": pads + pads, "output_padding": extras,
        "group": group,
    }  # fmt: skip
    return Drawn("ConvTranspose", data, attrs, reference, tuple(range(len(data))))


@st.composite
def _pool(draw: st.DrawFn, op: str) -> Drawn:
    """Pools that PyTorch has: pads of equal sides, at most half a window."""
    rank, maximum = draw(st.integers(1, 2)), op == "MaxPool"
    axes = []
    for _ in range(rank):
        k, d = draw(st.integers(1, 3)), draw(st.integers(1, 2)) if maximum else 1
        pad = draw(st.integers(0, k // 2))
        least = d * (k - 1) + 1
        axes.append((least + draw(st.integers(0, 4)), k, draw(st.integers(1, 3)), d, pad))
    sizes, kernel, strides, dilations, pads = zip(*axes, strict=True)
    ceil = draw(st.integers(0, 1))
    attrs: Attrs = {
        "kernel_shape": kernel, "strides": strides, "pads": pads + pads, "ceil_mode": ceil,
    }  # fmt: skip
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), *sizes)
    x = spaced(draw(SEEDS), prod(shape))[0].reshape(shape)
    if maximum:
        attrs["dilations"] = dilations
        pool = f.max_pool1d if rank == 1 else f.max_pool2d
        given = (kernel, strides, pads, dilations, bool(ceil))
        return Drawn(op, [x], attrs, lambda t: pool(t, *given))
    attrs["count_include_pad"] = draw(st.integers(0, 1))
    pool, rest = f.avg_pool1d if rank == 1 else f.avg_pool2d, bool(attrs["count_include_pad"])
    return Drawn(op, [x], attrs, lambda t: pool(t, kernel, strides, pads, bool(ceil), rest))


@st.composite
def _global_pool(draw: st.DrawFn) -> Drawn:
    x = draw(SEEDS).normal(size=draw(shapes(3)))
    axes = tuple(range(2, x.ndim))
    return Drawn("GlobalAveragePool", [x], {}, lambda t: t.mean(axes, keepdim=True))


@st.composite
def _resize(draw: st.DrawFn) -> Drawn:
    before = draw(shapes(1, 2, 6))
    after = tuple(draw(st.integers(1, 9)) for _ in before)
    pairs = list(zip(before, after, strict=True))
    x = draw(SEEDS).normal(size=(*draw(shapes(2, 2)), *before))
    if draw(st.booleans()):
        positions = np.concatenate([np.arange(out) * n // out for n, out in pairs]).astype("f8")
        attrs: Attrs = {"sizes": after, "mode": "nearest"}
        return Drawn("Resize", [x, positions], attrs, lambda t, _: f.interpolate(t, after))
    centres = [np.clip((np.arange(out) + 0.5) * n / out - 0.5, 0, n - 1) for n, out in pairs]
    mode = "linear" if len(before) == 1 else "bilinear"
    return Drawn(
        "Resize", [x, np.concatenate(centres)], {"sizes": after, "mode": "linear"},
        lambda t, _: f.interpolate(t, after, mode=mode),
    )  # fmt: skip


PRODUCTS: dict[str, Strategy] = {
    "Gemm": _gemm(),
    "MatMul": _matmul(),
    "Conv": _conv(),
    "ConvTranspose": _conv_transpose(),
    "MaxPool": _pool("MaxPool"),
    "AveragePool": _pool("AveragePool"),
    "GlobalAveragePool": _global_pool(),
    "Resize": _resize(),
}


# -- normalizations, a loss, recurrent layers ------------------------------------------------------


@st.composite
def _batch_norm(draw: st.DrawFn, op: str) -> Drawn:
    shape, rng, epsilon = draw(shapes(2)), draw(SEEDS), draw(EPSILONS)
    training = op == "BatchNormTraining"
    if training:
        shape = (shape[0] + 1, *shape[1:])
    data = [rng.normal(size=shape), *(rng.uniform(0.3, 2, shape[1]) for _ in range(4))]

    def reference(x: Any, scale: Any, bias: Any, mean: Any, var: Any) -> Any:
        mean, var = mean.detach().clone(), var.detach().clone()
        return f.batch_norm(x, mean, var, scale, bias, training, 0.1, epsilon)

    return Drawn(op, data, {"epsilon": epsilon}, reference, (0, 1, 2))


@st.composite
def _group_norm(draw: st.DrawFn) -> Drawn:
    groups, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    channels, epsilon, rng = groups * width, draw(EPSILONS), draw(SEEDS)
    shape = (draw(st.integers(1, 2)), channels, *draw(shapes(0, 2)), 2)
    scales = draw(st.sampled_from((groups, channels)))
    data = [rng.normal(size=s) for s in (shape, (scales,), (scales,))]
    data = data[: draw(st.sampled_from((1, 3)))]

    def reference(x: Any, *affine: Any) -> Any:
        wide = [v.repeat_interleave(channels // scales) for v in affine]
        return f.group_norm(x, groups, *wide, eps=epsilon)

    attrs: Attrs = {"num_groups": groups, "epsilon": epsilon}
    return Drawn("GroupNormalization", data, attrs, reference, tuple(range(len(data))))


@st.composite
def _layer_norm(draw: st.DrawFn, op: str) -> Drawn:
    shape, rng = (*draw(shapes(0, 3)), draw(st.integers(2, 6))), draw(SEEDS)
    epsilon = draw(EPSILONS)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    row = shape[axis:]
    count = 2 if op == "RMSNormalization" else draw(st.integers(2, 3))
    data = [rng.normal(size=s) for s in (shape, row, row)][:count]
    function = f.rms_norm if op == "RMSNormalization" else f.layer_norm

    def reference(x: Any, *affine: Any) -> Any:
        return function(x, row, *affine, eps=epsilon)

    return Drawn(op, data, {"axis": axis, "epsilon": epsilon}, reference, tuple(range(count)))


@st.composite
def _lp_norm(draw: st.DrawFn) -> Drawn:
    """To length 1, in each sample of the first axis."""
    shape, rng, epsilon = draw(shapes(2)), draw(SEEDS), draw(st.sampled_from((1e-24, 1e-3)))
    x = rng.uniform(0.2, 1, shape) * rng.choice((-1, 1), shape)

    def reference(t: Any) -> Any:
        rows = t.reshape(len(t), -1)
        return (rows / (rows.square().sum(1, keepdim=True) + epsilon).sqrt()).reshape(t.shape)

    return Drawn("LpNormalization", [x], {"epsilon": epsilon}, reference)


@st.composite
def _lrn(draw: st.DrawFn) -> Drawn:
    """Of odd windows: in even ones PyTorch's longer half is the other."""
    size, alpha, beta = 2 * draw(st.integers(0, 4)) + 1, draw(_real(0, 1)), draw(_real(0.25, 2))
    bias = draw(_real(0.5, 2))
    x = draw(SEEDS).normal(size=draw(shapes(3)))
    attrs: Attrs = {"size": size, "alpha": alpha, "beta": beta, "bias": bias}
    return Drawn("LRN", [x], attrs, lambda t: f.local_response_norm(t, size, alpha, beta, bias))


@st.composite
def _nll(draw: st.DrawFn) -> Drawn:
    batch, classes, places = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(shapes(0, 2, 3))
    reduction, rng = draw(st.sampled_from(("none", "mean", "sum"))), draw(SEEDS)
    ignored = draw(st.none() | st.integers(-2, 6))
    labels = rng.integers(0, classes, (batch, *places)).astype(np.int32)
    if ignored is not None:
        labels[rng.random(labels.shape) < 0.3] = ignored
        assume(reduction != "mean" or (labels != ignored).any())
    data = [rng.normal(size=(batch, classes, *places)), labels, rng.uniform(0.1, 2, classes)]
    data = data[: draw(st.integers(2, 3))]
    attrs: Attrs = {"reduction": reduction}
    if ignored is not None:
        attrs["ignore_index"] = ignored
    other = -100 if ignored is None else ignored

    def reference(x: Any, y: Any, w: Any = None) -> Any:
        return f.nll_loss(x, y, w, ignore_index=other, reduction=reduction)

    return Drawn("NegativeLogLikelihood", data, attrs, reference)


def _states(op: str, attrs: Attrs, x: Any, r: Any, *rest: Any) -> Any:
    """All states of a recurrent layer, step by step, as ONNX defines them."""
    size, steps = r.shape[1], range(len(x))
    *other, last = (None, None, *rest)
    bias, state, cells = {
        "LSTM": (None, other[-1], last), "GRU": (other[-1], last, None), "RNN": (None, last, None)
    }[op]  # fmt: skip
    h = x.new_zeros(x.shape[1], size) if state is None else state[0]
    c = x.new_zeros(x.shape[1], size) if cells is None else cells[0]
    found = []
    for step in reversed(steps) if attrs["reverse"] else steps:
        if op == "LSTM":
            i, o, forget, g = (x[step] + h @ r.T).chunk(4, -1)
            c = torch.sigmoid(forget) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        elif op == "GRU":
            (to_z, to_q, to_n), (rz, rq, rn) = x[step].chunk(3, -1), r.chunk(3)
            z, q = torch.sigmoid(to_z + h @ rz.T), torch.sigmoid(to_q + h @ rq.T)
            if attrs["linear_before_reset"]:
                n = torch.tanh(to_n + q * (h @ rn.T + (0.0 if bias is None else bias)))
            else:
                n = torch.tanh(to_n + (q * h) @ rn.T)
            h = (1 - z) * n + z * h
        else:
            activation = torch.tanh if attrs["activation"] == "Tanh" else torch.relu
            h = activation(x[step] + h @ r.T)
        found.append((h, c))
    found = found[::-1] if attrs["reverse"] else found
    states, kept = (torch.stack(v) for v in zip(*found, strict=True))
    return torch.stack([states, kept]) if attrs.get("cells") else states


@st.composite
def _recurrent(draw: st.DrawFn, op: str, gates: int) -> Drawn:
    steps, batch, size = (draw(st.integers(1, 4)) for _ in range(3))
    rng, flag, begun = draw(SEEDS), st.integers(0, 1), draw(st.booleans())
    state = (1, batch, size)
    data: list[Array | None] = [rng.normal(size=(steps, batch, gates * size))]
    data.append(rng.normal(size=(gates * size, size)))
    attrs: Attrs = {"reverse": draw(flag)}
    every: tuple[int, ...] = (0, 1)
    if op == "LSTM":
        attrs["cells"] = draw(flag)
        data += [rng.normal(size=state) if begun else None for _ in range(2)]
    elif op == "RNN":
        attrs["activation"] = draw(st.sampled_from(("Tanh", "Relu")))
        data.append(rng.normal(size=state) if begun else None)
    else:
        attrs["linear_before_reset"] = linear = draw(flag)
        biased = linear == 1 and draw(st.booleans())
        every = (0, 1, 2) if biased else (0, 1)
        data.append(rng.normal(size=size) if biased else None)
        data.append(rng.normal(size=state) if begun else None)
    return Drawn(op, data, attrs, lambda *t: _states(op, attrs, *t), every)


LAYERS: dict[str, Strategy] = {
    "BatchNormalization": _batch_norm("BatchNormalization"),
    "BatchNormTraining": _batch_norm("BatchNormTraining"),
    "GroupNormalization": _group_norm(),
    "LayerNormalization": _layer_norm("LayerNormalization"),
    "RMSNormalization": _layer_norm("RMSNormalization"),
    "LpNormalization": _lp_norm(),
    "LRN": _lrn(),
    "NegativeLogLikelihood": _nll(),
    "LSTM": _recurrent("LSTM", 4),
    "GRU": _recurrent("GRU", 3),
    "RNN": _recurrent("RNN", 1),
}
STRATEGIES: dict[str, Strategy] = UNARY | BINARY | AXES | PRODUCTS | LAYERS
