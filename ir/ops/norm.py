"""Batch normalization with frozen statistics, and its gradients.

``y = (x - mean) * factor + bias`` with ``factor = scale / sqrt(var + epsilon)``, each operation
rounded. The statistics never change, so backward is as cheap as forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..axes import channel_vectors
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, ParamSlot, Sample, Work, array, f32_operand, operand, register
from .elementary import sqrt32

if TYPE_CHECKING:
    from ..autodiff import GradBuilder


def _epsilon(node: Node) -> float:
    return node.float_attr("epsilon", 1e-5)


def _check(node: Node, per_channel: Sequence[int]) -> TensorType:
    x = f32_operand(node, 0)
    if len(x.shape) < 2:
        raise GraphError(f"input {x} has no channel axis")
    for i in per_channel:
        if f32_operand(node, i).shape != x.shape[1:2]:
            raise GraphError(f"operand {i}, {operand(node, i)}, does not fit {x.shape[1]} channels")
    return x


def _along(v: Array, rank: int) -> Array:
    """A per-channel vector that broadcasts against ``[N, C, ...]``."""
    return v.reshape(-1, *(1,) * (rank - 2))


def _root(var: Array, epsilon: float) -> Array:
    return sqrt32(var + var.dtype.type(epsilon))


def _params(node: Node) -> dict[str, Attr]:
    x = operand(node, 0)
    n, c = x.shape[:2]
    return {"batch": n, "channels": c, "spatial": x.size // (n * c), "epsilon": _epsilon(node)}


def _work(node: Node) -> Work:
    x = operand(node, 0)
    return Work("elementwise", x.size, loops=x.shape[0] * x.shape[1])


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x, scale, bias, mean, var = (array(inputs, i) for i in range(5))
    factor = scale / _root(var, _epsilon(node))
    return [(x - _along(mean, x.ndim)) * _along(factor, x.ndim) + _along(bias, x.ndim)]


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    x, scale, _, mean, var = node.inputs
    grads: list[Value | None] = [None] * 5
    attrs: dict[str, Attr] = {"epsilon": _epsilon(node)}
    if need[0]:
        grads[0] = b.add("BatchNormGradInput", (dy, scale, var), attrs, suffix="grad_input")
    if need[1]:
        grads[1] = b.add("BatchNormGradScale", (dy, x, mean, var), attrs, suffix="grad_scale")
    if need[2]:
        grads[2] = b.add("ConvGradBias", (dy,), suffix="grad_bias")  # the sum over each channel
    return grads


def _kernel_grad_input(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy, scale, var = (array(inputs, i) for i in range(3))
    return [dy * _along(scale / _root(var, _epsilon(node)), dy.ndim)]


def _infer_grad_scale(node: Node) -> list[TensorType]:
    dy, x = _check(node, (2, 3)), f32_operand(node, 1)
    if x != dy:
        raise GraphError(f"gradient {dy} is not of the type {x} of the input")
    return [TensorType(dy.shape[1:2], dy.dtype)]


def _rows_grad_scale(node: Node, inputs: Sequence[Array | None], begin: int, end: int) -> Array:
    dy, x, mean, var = (array(inputs, i) for i in range(4))
    root = _root(var[begin:end], _epsilon(node))
    centred = x[:, begin:end] - _along(mean[begin:end], x.ndim)
    terms = np.swapaxes(dy[:, begin:end] * centred, 0, 1).reshape(end - begin, -1)
    return np.asarray(np.add.accumulate(terms, axis=1)[:, -1] / root)


def _types(rank4: bool) -> tuple[TensorType, TensorType]:
    return TensorType((2, 3, 4, 5) if rank4 else (3, 4)), TensorType((3,) if rank4 else (4,))


def _samples() -> Iterator[Sample]:
    for rank4 in (True, False):
        x, c = _types(rank4)
        yield Sample(
            (x, c, c, c, c), {"epsilon": 1e-3}, differentiable=(0, 1, 2), low=0.1, high=2.0
        )


def _samples_grad_input() -> Iterator[Sample]:
    for rank4 in (True, False):
        x, c = _types(rank4)
        yield Sample((x, c, c), {"epsilon": 1e-3}, differentiable=(), low=0.1, high=2.0)


def _samples_grad_scale() -> Iterator[Sample]:
    for rank4 in (True, False):
        x, c = _types(rank4)
        yield Sample((x, x, c, c), {"epsilon": 1e-3}, differentiable=(), low=0.1, high=2.0)


register(
    OpDef(
        name="BatchNormalization",
        infer=lambda node: [_check(node, (1, 2, 3, 4))],
        kernel=_kernel,
        work=_work,
        c=CKernel("odtplan_batch_norm_f32", "odtplan_norm_t", "odtplan_norm", _params),
        samples=_samples,
        vjp=_vjp,
        inplace=(0,),
        params=(ParamSlot(1, "scale"), ParamSlot(2, "bias")),
        axes=channel_vectors,
    )
)
register(
    OpDef(
        name="BatchNormGradInput",
        infer=lambda node: [_check(node, (1, 2))],
        kernel=_kernel_grad_input,
        work=_work,
        c=CKernel("odtplan_batch_norm_grad_input_f32", "odtplan_norm_t", "odtplan_norm", _params),
        samples=_samples_grad_input,
        inplace=(0,),
    )
)
register(
    OpDef(
        name="BatchNormGradScale",
        infer=_infer_grad_scale,
        kernel=lambda node, inputs: [_rows_grad_scale(node, inputs, 0, node.out.type.shape[0])],
        rows_kernel=_rows_grad_scale,
        work=_work,
        c=CKernel("odtplan_batch_norm_grad_scale_f32", "odtplan_norm_t", "odtplan_norm", _params),
        samples=_samples_grad_scale,
    )
)
