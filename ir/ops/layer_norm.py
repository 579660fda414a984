"""Layer (Ba et al. 2016) and RMS normalization (Zhang and Sennrich 2019), and their gradients.

A tensor is seen as ``outer`` rows of ``size`` elements, the axes from ``axis`` on. With the mean
``m`` and ``r = 1 / sqrt(mean((x - m)**2) + epsilon)`` of a row,

    ``xhat = (x - m) * r``,   ``y = xhat * scale + bias``,   and for ``g = dy * scale``
    ``dx = (g - mean(g) - xhat * mean(g * xhat)) * r``,   ``dscale = sum over rows of dy * xhat``.

RMS normalization is the same with ``m = 0`` and without ``mean(g)``: the attribute ``centred`` of
its gradients is 0.

Backward saves ``x`` and nothing else; it finds ``m`` and ``r`` again, by the same operations. That
is two more passes over ``x``, about 1 % of the product with a square weight that reads ``y``.
``xhat`` instead of ``x`` would need as many bytes and ``r`` besides. ``y`` alone, which the next
layer often saves anyway (``xhat = (y - bias) / scale``, In-Place ABN, Rota Bulo et al. 2018), is
wrong where a scale is or becomes zero, inexact where it is small, and reads a bias that is updated
before. Where RAM is short the planner rebuilds ``x`` from what other layers save.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ..axes import same_axes
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, ParamSlot, Sample, Work, array, f32_operand, operand, register
from .standardize import gradient, standardized

if TYPE_CHECKING:
    from ..autodiff import GradBuilder

T = TensorType


def _normalized(node: Node, index: int) -> tuple[int, ...]:
    """The axes of operand ``index`` that make a row."""
    shape = operand(node, index).shape
    axis = node.int_attr("axis", -1)
    if not -len(shape) <= axis < len(shape):
        raise GraphError(f"axis {axis} of a tensor with {len(shape)} axes")
    return shape[axis % len(shape) :]


def _epsilon(node: Node) -> float:
    return node.float_attr("epsilon", 1e-5)


def _rows(node: Node, x: Array) -> Array:
    return x.reshape(-1, prod(_normalized(node, 0)))


def _centred(node: Node) -> bool:
    return node.op != "RMSNormalization" and bool(node.int_attr("centred", 1))


def _standardized(node: Node, x: Array) -> tuple[Array, Array]:
    """``xhat`` and ``r`` of the rows of ``x``."""
    return standardized(_rows(node, x), _epsilon(node), centred=_centred(node))


def _params(node: Node) -> dict[str, Attr]:
    shape = _normalized(node, 0)
    size = prod(shape)
    return {
        "outer": operand(node, 0).size // size,
        "size": size,
        "line": size // shape[0],
        "centred": int(_centred(node)),
        "epsilon": _epsilon(node),
    }


def _row_count(node: Node) -> int:
    return operand(node, 0).size // prod(_normalized(node, 0))


def _work(node: Node) -> Work:
    return Work("elementwise", operand(node, 0).size, loops=_row_count(node))


def _infer(node: Node) -> list[TensorType]:
    x, shape = f32_operand(node, 0), _normalized(node, 0)
    for i in range(1, len(node.inputs)):
        if node.inputs[i] is not None and f32_operand(node, i).shape != shape:
            raise GraphError(f"operand {i}, {operand(node, i)}, is not a row of {shape}")
    operand(node, 1)
    return [x]


def _infer_rms(node: Node) -> list[TensorType]:
    if len(node.inputs) > 2:
        raise GraphError("operand 2: there is no bias")
    return _infer(node)


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x, scale = array(inputs, 0), array(inputs, 1)
    bias = inputs[2] if len(inputs) > 2 else None
    y = _standardized(node, x)[0] * scale.reshape(-1)
    return [(y if bias is None else y + bias.reshape(-1)).reshape(x.shape)]


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    x, scale = node.inputs[:2]
    shape = _normalized(node, 0)
    grads: list[Value | None] = [None] * len(node.inputs)
    attrs: dict[str, Attr] = {"axis": len(dy.type.shape) - len(shape), "epsilon": _epsilon(node)}
    if not _centred(node):
        attrs["centred"] = 0
    if need[0]:
        grads[0] = b.add("LayerNormGradInput", (dy, x, scale), attrs, suffix="grad_input")
    if need[1]:
        grads[1] = b.add("LayerNormGradScale", (dy, x), attrs, suffix="grad_scale")
    if len(need) > 2 and need[2]:
        if len(shape) == 1:  # the sum over rows, the other one's loops in the faster order
            grads[2] = b.add("GemmGradBias", (dy,), suffix="grad_bias")
        else:
            grads[2] = b.add("ReduceSumTo", (dy,), {"shape": shape}, suffix="grad_bias")
    return grads


def _same(node: Node) -> TensorType:
    dy, x = f32_operand(node, 0), f32_operand(node, 1)
    if x != dy:
        raise GraphError(f"gradient {dy} is not of the type {x} of the input")
    return x


def _infer_grad_input(node: Node) -> list[TensorType]:
    dx, shape = _same(node), _normalized(node, 0)
    if f32_operand(node, 2).shape != shape:
        raise GraphError(f"operand 2, {operand(node, 2)}, is not a row of {shape}")
    return [dx]


def _kernel_grad_input(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy, x, scale = (array(inputs, i) for i in range(3))
    xhat, inverse = _standardized(node, x)
    g = _rows(node, dy) * scale.reshape(-1)
    return [gradient(g, xhat, inverse, centred=_centred(node)).reshape(x.shape)]


def _infer_grad_scale(node: Node) -> list[TensorType]:
    return [T(_normalized(node, 0), _same(node).dtype)]


def _rows_grad_scale(node: Node, inputs: Sequence[Array | None], begin: int, end: int) -> Array:
    dy, x = array(inputs, 0), array(inputs, 1)
    shape = _normalized(node, 0)
    line = prod(shape[1:])
    part = slice(begin * line, end * line)
    xhat, _ = _standardized(node, x)
    terms = _rows(node, dy)[:, part] * xhat[:, part]
    return np.asarray(np.add.accumulate(terms, axis=0)[-1]).reshape(end - begin, *shape[1:])


def _tiled_work(node: Node, tile_rows: int) -> tuple[Work, ...]:
    """Every tile goes through all of ``x`` for the statistics of its rows."""
    tiles = -(-node.out.type.shape[0] // tile_rows)
    size = operand(node, 0).size
    return (Work("elementwise", size * tiles, loops=_row_count(node) * tiles, passes=size),)


def _samples() -> Iterator[Sample]:
    yield Sample((T((2, 3, 5)), T((5,)), T((5,))), {"axis": -1, "epsilon": 1e-3})
    yield Sample((T((2, 3, 2, 4)), T((3, 2, 4)), T((3, 2, 4))), {"axis": 1})
    yield Sample((T((2, 1, 3, 4)), T((3, 4))), {"axis": -2, "epsilon": 0.1})
    yield Sample((T((7,)), T((7,)), T((7,))), {"axis": 0})


def _rms_samples() -> Iterator[Sample]:
    yield Sample((T((2, 3, 5)), T((5,))), {"axis": -1, "epsilon": 1e-3})
    yield Sample((T((3, 2, 4)), T((2, 4))), {"axis": 1})


def _cases() -> Iterator[Sample]:
    yield from _samples()
    yield from (replace(s, attrs=s.attrs | {"centred": 0}) for s in _rms_samples())


def _samples_grad_input() -> Iterator[Sample]:
    for s in _cases():
        yield Sample((s.types[0], *s.types[:2]), s.attrs, differentiable=())


def _samples_grad_scale() -> Iterator[Sample]:
    for s in _cases():
        yield Sample((s.types[0],) * 2, s.attrs, differentiable=())


def _c(symbol: str, operands: int | None = None) -> CKernel:
    return CKernel(symbol, "odtplan_layer_norm_t", "odtplan_layer_norm", _params, operands)


register(
    OpDef(
        name="LayerNormalization",
        infer=_infer,
        kernel=_kernel,
        work=_work,
        c=_c("odtplan_layer_norm_f32"),
        samples=_samples,
        vjp=_vjp,
        inplace=(0,),
        params=(ParamSlot(1, "scale"), ParamSlot(2, "bias")),
        axes=same_axes,
    )
)
register(
    OpDef(
        name="RMSNormalization",
        infer=_infer_rms,
        kernel=_kernel,
        work=lambda node: replace(_work(node), operator="LayerNormalization"),
        c=_c("odtplan_layer_norm_f32", operands=3),
        samples=_rms_samples,
        vjp=_vjp,
        inplace=(0,),
        params=(ParamSlot(1, "scale"),),
        axes=same_axes,
    )
)
register(
    OpDef(
        name="LayerNormGradInput",
        infer=_infer_grad_input,
        kernel=_kernel_grad_input,
        work=_work,
        c=_c("odtplan_layer_norm_grad_input_f32"),
        samples=_samples_grad_input,
        inplace=(0, 1),
    )
)
register(
    OpDef(
        name="LayerNormGradScale",
        infer=_infer_grad_scale,
        kernel=lambda node, inputs: [_rows_grad_scale(node, inputs, 0, node.out.type.shape[0])],
        rows_kernel=_rows_grad_scale,
        work=lambda node: _tiled_work(node, node.out.type.shape[0])[0],
        tiled_work=_tiled_work,
        c=_c("odtplan_layer_norm_grad_scale_f32"),
        samples=_samples_grad_scale,
    )
)
