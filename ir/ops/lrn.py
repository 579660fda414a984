"""Local response normalization across channels (Krizhevsky et al. 2012, section 3.3).

With ``d[c] = bias + alpha / size * sum of x[k]**2`` over the ``size`` channels around ``c`` (the
shorter half before it), and ``p = d**-beta``,

    ``y[c] = x[c] * p[c]``,
    ``dx[c] = dy[c] * p[c] - 2 * beta * alpha / size * x[c] * sum of dy[k] * x[k] * p[k] / d[k]``

over the channels ``k`` that have ``c`` around them. Sums run over ascending channels. Backward
saves ``x`` and finds ``d`` and ``p`` again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, operand, register
from .elementary import exp32, log32

if TYPE_CHECKING:
    from ..autodiff import GradBuilder

T = TensorType


def _reach(node: Node) -> tuple[int, int]:
    """Channels before and behind a channel that it is normalized by, where there are so many."""
    size, last = node.int_attr("size"), operand(node, 0).shape[1] - 1
    if size < 1:
        raise GraphError(f"size {size} is not positive")
    return min((size - 1) // 2, last), min(size // 2, last)


def _infer(node: Node) -> list[TensorType]:
    x = f32_operand(node, 0)
    if len(x.shape) < 3:
        raise GraphError(f"input {x} has no spatial axis")
    _reach(node)
    return [x]


def _factor(node: Node) -> float:
    return node.float_attr("alpha", 1e-4) / node.int_attr("size")


def _window_sums(a: Array, before: int, behind: int) -> Array:
    """Sums along axis 1 over the channels from ``before`` in front of each one to ``behind`` it."""
    total = np.zeros_like(a)
    channels = a.shape[1]
    for shift in range(-before, behind + 1):
        lo, hi = max(0, -shift), min(channels, channels - shift)
        if lo < hi:
            total[:, lo:hi] += a[:, lo + shift : hi + shift]
    return total


def _bases(node: Node, x: Array) -> tuple[Array, Array]:
    """``d`` and ``p``."""
    number = x.dtype.type
    before, behind = _reach(node)
    sums = _window_sums(x * x, before, behind)
    d = number(node.float_attr("bias", 1.0)) + number(_factor(node)) * sums
    return d, exp32(number(-node.float_attr("beta", 0.75)) * log32(d))


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x = array(inputs, 0)
    return [x * _bases(node, x)[1]]


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    if not need[0]:
        return [None]
    keys = ("size", "alpha", "beta", "bias")
    attrs: dict[str, Attr] = {k: node.attrs[k] for k in keys if k in node.attrs}
    return [b.add("LRNGrad", (dy, node.inputs[0]), attrs, suffix="grad_input")]


def _infer_grad(node: Node) -> list[TensorType]:
    x = _infer(node)[0]
    if f32_operand(node, 1) != x:
        raise GraphError(f"gradient {x} is not of the type {operand(node, 1)} of the input")
    return [x]


def _slope(node: Node) -> float:
    return 2.0 * node.float_attr("beta", 0.75) * _factor(node)


def _kernel_grad(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy, x = array(inputs, 0), array(inputs, 1)
    d, p = _bases(node, x)
    before, behind = _reach(node)
    scaled = dy * p
    sums = _window_sums(scaled * x / d, behind, before)
    return [scaled - x.dtype.type(_slope(node)) * x * sums]


def _params(node: Node) -> dict[str, Attr]:
    x = operand(node, 0)
    before, behind = _reach(node)
    return {
        "batch": x.shape[0],
        "channels": x.shape[1],
        "spatial": x.size // (x.shape[0] * x.shape[1]),
        "before": before,
        "behind": behind,
        "factor": _factor(node),
        "bias": node.float_attr("bias", 1.0),
        "exponent": -node.float_attr("beta", 0.75),
        "slope": _slope(node),
    }


def _work(node: Node, runs: int) -> tuple[Work, ...]:
    """Windows are summed ``runs`` times; each element takes a logarithm and an exponential."""
    x = operand(node, 0)
    before, behind = _reach(node)
    taps = sum(min(x.shape[1], c + behind + 1) - max(0, c - before) for c in range(x.shape[1])) * (
        x.size // x.shape[1]
    )
    return Work("elementwise", runs * taps, loops=runs * x.size), Work("transcendental", 2 * x.size)


def _cases() -> Iterator[tuple[TensorType, dict[str, Attr]]]:
    yield T((2, 7, 2, 3)), {"size": 5, "alpha": 0.9, "beta": 0.75, "bias": 1.5}
    yield T((1, 6, 4)), {"size": 4, "alpha": 0.5, "beta": 0.5}
    yield T((1, 2, 3, 2)), {"size": 9, "bias": 2.0}


register(
    OpDef(
        name="LRN",
        infer=_infer,
        kernel=_kernel,
        work=lambda node: _work(node, 1),
        c=CKernel("odtplan_lrn_f32", "odtplan_lrn_t", "odtplan_lrn", _params),
        samples=lambda: (Sample((x,), attrs) for x, attrs in _cases()),
        vjp=_vjp,
    )
)
register(
    OpDef(
        name="LRNGrad",
        infer=_infer_grad,
        kernel=_kernel_grad,
        work=lambda node: _work(node, 2),
        c=CKernel("odtplan_lrn_grad_f32", "odtplan_lrn_t", "odtplan_lrn", _params),
        samples=lambda: (Sample((x, x), a, differentiable=()) for x, a in _cases()),
        inplace=(0, 1),
        workspace=lambda node: 12 * operand(node, 0).shape[1],
    )
)
