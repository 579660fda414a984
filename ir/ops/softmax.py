"""Softmax along one axis, and its gradient.

The sum of a lane is one chain over ascending positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..autodiff import GradBuilder
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, operand, register
from .elementary import exp32
from .lanes import lane_params, lane_sum

T = TensorType


def _axis(node: Node) -> int:
    rank = len(operand(node, 0).shape)
    axis = node.int_attr("axis", -1)
    if not -rank <= axis < rank:
        raise GraphError(f"axis {axis} of a tensor with {rank} axes")
    return axis % rank


def _infer(node: Node) -> Sequence[TensorType]:
    _axis(node)
    return (operand(node, 0),)


def _kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    x, axis = inputs[0], _axis(node)
    assert x is not None
    with np.errstate(invalid="ignore"):
        e = exp32(x - x.max(axis=axis, keepdims=True))
        return (e / lane_sum(e, axis),)


def _vjp(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> Sequence[Value | None]:
    if not need[0]:
        return (None,)
    attrs: dict[str, Attr] = {"axis": _axis(node)}
    return (builder.add("SoftmaxGrad", (node.out, dy), attrs, suffix="grad"),)


def _grad_infer(node: Node) -> Sequence[TensorType]:
    y, dy = operand(node, 0), operand(node, 1)
    _axis(node)
    if y != dy:
        raise GraphError(f"probabilities {y} and gradient {dy} differ")
    return (y,)


def _grad_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    y, dy = inputs
    assert y is not None
    assert dy is not None
    return (y * (dy - lane_sum(y * dy, _axis(node))),)


def _params(node: Node) -> dict[str, Attr]:
    return lane_params(operand(node, 0).shape, _axis(node))


def _samples() -> Iterator[Sample]:
    yield Sample((T((3, 5)),), {"axis": -1}, low=-4.0, high=4.0)
    yield Sample((T((2, 3, 4)),), {"axis": 1}, low=-4.0, high=4.0)
    yield Sample((T((4,)),), {"axis": 0})


def _grad_samples() -> Iterator[Sample]:
    for sample in _samples():
        yield Sample(sample.types * 2, sample.attrs)


register(
    OpDef(
        "Softmax",
        infer=_infer,
        kernel=_kernel,
        work=lambda node: Work("transcendental", operand(node, 0).size),
        c=CKernel("odtplan_softmax_f32", "odtplan_softmax_t", "odtplan_softmax", _params),
        samples=_samples,
        vjp=_vjp,
        inplace=(0,),
    )
)

register(
    OpDef(
        "SoftmaxGrad",
        infer=_grad_infer,
        kernel=_grad_kernel,
        work=lambda node: Work("elementwise", 3 * operand(node, 0).size),
        c=CKernel("odtplan_softmax_grad_f32", "odtplan_softmax_t", "odtplan_softmax", _params),
        samples=_grad_samples,
        inplace=(0, 1),
    )
)
