"""GELU in its form with tanh (Hendrycks and Gimpel 2016), and its gradient.

``y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))``. The result does not determine the
slope, so backward saves ``x``, and computes tanh again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..graph import Array, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, register
from .activation_grad import SHAPES, scalar
from .elementary import tanh32
from .elementwise import count_params, infer_like

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

_CUBE = 0.044715
_ROOT = math.sqrt(2 / math.pi)


def _tanh(x: Array) -> Array:
    cubed = x + scalar(x, _CUBE) * (x * x * x)
    return tanh32(np.asarray(scalar(x, _ROOT) * cubed))


def gelu(x: Array) -> Array:
    """The function, of f32 or f64 arrays."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(scalar(x, 0.5) * x * (scalar(x, 1.0) + _tanh(x)))


def _gradient(dy: Array, x: Array) -> Array:
    half, one = scalar(x, 0.5), scalar(x, 1.0)
    with np.errstate(over="ignore", invalid="ignore"):
        t = _tanh(x)
        inner = scalar(x, _ROOT) * (one + scalar(x, 3 * _CUBE) * (x * x))
        return np.asarray(dy * (half * (one + t) + half * x * ((one - t * t) * inner)))


def _infer_grad(node: Node) -> list[TensorType]:
    dy, x = f32_operand(node, 0), f32_operand(node, 1)
    if dy != x:
        raise GraphError(f"gradient {dy} is not of the type {x} of the operand")
    return [x]


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    return [b.add("GeluGrad", (dy, node.inputs[0]), suffix="grad") if need[0] else None]


def _samples(operands: int) -> Callable[[], Iterator[Sample]]:
    return lambda: iter([Sample((TensorType(s),) * operands, low=-4.0, high=4.0) for s in SHAPES])


def _work(node: Node) -> Work:
    return Work("transcendental", node.out.type.size)


def _c(symbol: str) -> CKernel:
    return CKernel(symbol, "odtplan_count_t", "odtplan_gelu", count_params)


register(
    OpDef(
        name="Gelu",
        infer=infer_like,
        kernel=lambda _, inputs: [gelu(array(inputs, 0))],
        work=_work,
        c=_c("odtplan_gelu_f32"),
        samples=_samples(1),
        vjp=_vjp,
        inplace=(0,),
    )
)
register(
    OpDef(
        name="GeluGrad",
        infer=_infer_grad,
        kernel=lambda _, inputs: [_gradient(array(inputs, 0), array(inputs, 1))],
        work=_work,
        c=_c("odtplan_gelu_grad_f32"),
        samples=_samples(2),
        inplace=(0, 1),
    )
)
