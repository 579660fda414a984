"""Sums and means over axes, and the broadcast that is their gradient.

Every result is one chain over its operands in row-major order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

import numpy as np

from ..autodiff import GradBuilder
from ..axes import Tie
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, operand, register

#: ODTPLAN_MAX_RANK of the C kernels.
_MAX_RANK = 6

T = TensorType


def _axes(node: Node, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The attribute ``axes`` (default: all of ``shape``) as ascending non-negative numbers."""
    rank = len(shape)
    if rank > _MAX_RANK:
        raise GraphError(f"{rank} axes; at most {_MAX_RANK} are supported")
    axes = node.ints_attr("axes", tuple(range(rank)))
    if any(not -rank <= a < rank for a in axes) or len({a % rank for a in axes}) < len(axes):
        raise GraphError(f"axes {axes} of a tensor with {rank} axes")
    return tuple(sorted(a % rank for a in axes))


def _reduced(shape: tuple[int, ...], axes: tuple[int, ...], keep: bool) -> tuple[int, ...]:
    if keep:
        return tuple(1 if i in axes else d for i, d in enumerate(shape))
    return tuple(d for i, d in enumerate(shape) if i not in axes)


def _chain(x: Array, axes: tuple[int, ...]) -> Array:
    """Sum over ``axes``, one sequential chain per result; the other axes stay in order."""
    kept = tuple(i for i in range(x.ndim) if i not in axes)
    shape = tuple(x.shape[i] for i in kept)
    lanes = x.transpose(*axes, *kept).reshape(-1, *shape)
    return np.asarray(np.add.accumulate(lanes, axis=0)[-1])


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _reduce_params(shape: tuple[int, ...], axes: tuple[int, ...], divisor: int) -> dict[str, Attr]:
    """Kept and reduced axes of a reduction, each filled up in front with axes of size 1."""
    kept = tuple(i for i in range(len(shape)) if i not in axes)
    strides = _strides(shape)
    params: dict[str, Attr] = {}
    for name, group in (("kept", kept), ("reduced", axes)):
        fill = _MAX_RANK - len(group)
        params[f"{name}_dims"] = (1,) * fill + tuple(shape[i] for i in group)
        params[f"{name}_strides"] = (0,) * fill + tuple(strides[i] for i in group)
    params["divisor"] = float(divisor)
    return params


# --- ReduceMean, ReduceSum -----------------------------------------------------------------------


def _reduce_infer(node: Node) -> Sequence[TensorType]:
    x = operand(node, 0)
    keep = bool(node.int_attr("keepdims", 1))
    return (T(_reduced(x.shape, _axes(node, x.shape), keep), x.dtype),)


def _count(node: Node) -> int:
    shape = operand(node, 0).shape
    return prod(shape[a] for a in _axes(node, shape))


def _reduce_axes(node: Node) -> Iterator[Tie]:
    """Reduced axes may run in any order, the others in that of the result."""
    (x,) = node.operands()
    gone, keep = _axes(node, x.type.shape), bool(node.int_attr("keepdims", 1))
    kept = 0
    for axis in range(len(x.type.shape)):
        if axis in gone:
            yield ((x, axis),)
        else:
            yield (x, axis), (node.out, axis if keep else kept)
            kept += 1


def _reduce_samples() -> Iterator[Sample]:
    yield Sample((T((2, 3, 4, 5)),), {"axes": (2, 3), "keepdims": 1})
    yield Sample((T((2, 3, 4)),), {"axes": (0, -1), "keepdims": 0})
    yield Sample((T((3, 4)),), {"keepdims": 0})


def _register_reduce(name: str, divisor: Callable[[Node], int]) -> None:
    """A sum over axes, divided by ``divisor``."""

    def kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
        x = inputs[0]
        assert x is not None
        total = _chain(x, _axes(node, x.shape)) / x.dtype.type(divisor(node))
        return (np.asarray(total).reshape(node.out.type.shape),)

    def vjp(
        builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
    ) -> Sequence[Value | None]:
        if not need[0]:
            return (None,)
        shape = operand(node, 0).shape
        attrs: dict[str, Attr] = {
            "shape": shape,
            "axes": _axes(node, shape),
            "scale": 1.0 / divisor(node),
        }
        return (builder.add("ExpandScale", (dy,), attrs, suffix="grad"),)

    register(
        OpDef(
            name,
            infer=_reduce_infer,
            kernel=kernel,
            work=lambda node: Work("elementwise", operand(node, 0).size),
            c=CKernel(
                "odtplan_reduce_f32",
                "odtplan_reduce_t",
                "odtplan_reduce",
                lambda node: _reduce_params(
                    operand(node, 0).shape, _axes(node, operand(node, 0).shape), divisor(node)
                ),
            ),
            samples=_reduce_samples,
            vjp=vjp,
            axes=_reduce_axes,
        )
    )


_register_reduce("ReduceMean", _count)
_register_reduce("ReduceSum", lambda _: 1)


# --- ExpandScale: gradient of a mean or sum ------------------------------------------------------


def _expand_source(node: Node) -> tuple[int, ...]:
    """Shape of the operand with the repeated axes at size 1."""
    shape = node.ints_attr("shape")
    return _reduced(shape, _axes(node, shape), True)


def _expand_infer(node: Node) -> Sequence[TensorType]:
    x, shape = operand(node, 0), node.ints_attr("shape")
    source, axes = _expand_source(node), _axes(node, shape)
    if x.shape not in (source, _reduced(shape, axes, False)):
        raise GraphError(f"{x} does not expand to {shape} along {axes}")
    return (T(shape, x.dtype),)


def _expand_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    x = inputs[0]
    assert x is not None
    scaled = x.reshape(_expand_source(node)) * x.dtype.type(node.float_attr("scale"))
    return (np.ascontiguousarray(np.broadcast_to(scaled, node.ints_attr("shape"))),)


def _expand_params(node: Node) -> dict[str, Attr]:
    shape, source = node.ints_attr("shape"), _expand_source(node)
    axes, fill = _axes(node, shape), _MAX_RANK - len(shape)
    strides = tuple(0 if i in axes else s for i, s in enumerate(_strides(source)))
    return {
        "dims": (1,) * fill + shape,
        "strides": (0,) * fill + strides,
        "scale": node.float_attr("scale"),
    }


def _expand_samples() -> Iterator[Sample]:
    yield Sample((T((2, 1, 3)),), {"shape": (2, 4, 3), "axes": (1,), "scale": 0.25})
    yield Sample((T((3,)),), {"shape": (2, 3, 5), "axes": (0, 2), "scale": 0.1})
    yield Sample((T(()),), {"shape": (2, 3), "axes": (0, 1), "scale": 0.5})


register(
    OpDef(
        "ExpandScale",
        infer=_expand_infer,
        kernel=_expand_kernel,
        work=lambda node: Work("elementwise", node.out.type.size),
        c=CKernel("odtplan_expand_scale_f32", "odtplan_expand_t", "odtplan_reduce", _expand_params),
        samples=_expand_samples,
    )
)


# --- ReduceSumTo: gradient of a broadcast ---------------------------------------------------------


def _sum_axes(node: Node) -> tuple[int, ...]:
    """Axes of the operand that broadcasting ``shape`` to it has added or repeated."""
    source, shape = operand(node, 0).shape, node.ints_attr("shape")
    lead = len(source) - len(shape)
    if lead < 0 or len(source) > _MAX_RANK:
        raise GraphError(f"{operand(node, 0)} can't be summed to {shape}")
    axes = list(range(lead))
    for i, d in enumerate(shape):
        if d != source[lead + i]:
            if d != 1:
                raise GraphError(f"{operand(node, 0)} can't be summed to {shape}")
            axes.append(lead + i)
    return tuple(axes)


def _sum_infer(node: Node) -> Sequence[TensorType]:
    _sum_axes(node)
    return (T(node.ints_attr("shape"), operand(node, 0).dtype),)


def _sum_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    x = inputs[0]
    assert x is not None
    return (_chain(x, _sum_axes(node)).reshape(node.ints_attr("shape")),)


def _sum_samples() -> Iterator[Sample]:
    yield Sample((T((2, 3, 4)),), {"shape": (3, 1)})
    yield Sample((T((2, 3)),), {"shape": ()})
    yield Sample((T((2, 3, 2, 4)),), {"shape": (1, 3, 1, 1)})


register(
    OpDef(
        "ReduceSumTo",
        infer=_sum_infer,
        kernel=_sum_kernel,
        work=lambda node: Work("elementwise", operand(node, 0).size),
        c=CKernel(
            "odtplan_reduce_f32",
            "odtplan_reduce_t",
            "odtplan_reduce",
            lambda node: _reduce_params(operand(node, 0).shape, _sum_axes(node), 1),
        ),
        samples=_sum_samples,
    )
)
