"""Binary arithmetic with NumPy broadcasting: Add, Sub, Mul, Div; and Neg.

The C kernels walk the broadcast in merged axes, so equal shapes are one loop, a scalar operand is
one loop with stride 0, and a channel operand ``[C,1,1]`` is two loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import (
    CKernel,
    OpDef,
    ParamSlot,
    Sample,
    Vjp,
    Work,
    array,
    f32_operand,
    register,
)

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

#: ODTPLAN_MAX_RANK of backends/c/kernels/odtplan_types.h.
MAX_RANK = 6


def check_rank(shape: Sequence[int]) -> None:
    """Reject a shape that the C kernels can't walk.

    Raises:
        GraphError: More than ``MAX_RANK`` dimensions.
    """
    if len(shape) > MAX_RANK:
        raise GraphError(f"shape {tuple(shape)} has {len(shape)} dimensions, at most {MAX_RANK}")


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    return tuple(strides)


def merge_axes(
    dims: Sequence[int], *strides: Sequence[int]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Drop axes of length 1 and join neighbours that every stride tuple walks as one.

    Args:
        dims: Lengths of a nested loop, outermost first.
        *strides: One stride per axis, for each tensor that the loop walks.

    Returns:
        The shortest equivalent loop (at least one axis): its lengths and strides.
    """
    axes: list[tuple[int, tuple[int, ...]]] = []
    for i, d in enumerate(dims):
        if d == 1:
            continue
        step = tuple(s[i] for s in strides)
        if axes and axes[-1][1] == tuple(s * d for s in step):
            axes[-1] = (axes[-1][0] * d, step)
        else:
            axes.append((d, step))
    if not axes:
        axes = [(1, (1,) * len(strides))]
    return tuple(d for d, _ in axes), tuple(zip(*(s for _, s in axes), strict=True))


def _infer_binary(node: Node) -> list[TensorType]:
    a, b = f32_operand(node, 0), f32_operand(node, 1)
    try:
        shape = np.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        raise GraphError(f"shapes {a.shape} and {b.shape} do not broadcast") from None
    check_rank(shape)
    return [TensorType(shape, a.dtype)]


def _broadcast_strides(shape: tuple[int, ...], out: tuple[int, ...]) -> tuple[int, ...]:
    """Strides that walk an operand of ``shape`` in the order of ``out``; 0 where it repeats."""
    padded = (1,) * (len(out) - len(shape)) + shape
    strides = contiguous_strides(padded)
    return tuple(0 if d == 1 else s for d, s in zip(padded, strides, strict=True))


def _walks(node: Node) -> list[tuple[int, ...]]:
    """Strides of both operands in the order of the result."""
    return [_broadcast_strides(f32_operand(node, i).shape, node.out.type.shape) for i in (0, 1)]


def _binary_params(node: Node) -> dict[str, Attr]:
    dims, (a, b) = merge_axes(node.out.type.shape, *_walks(node))
    return {"rank": len(dims), "dims": dims, "a_strides": a, "b_strides": b}


def _binary_work(node: Node) -> Work:
    """One operation per element, a loop per run along the innermost merged axis."""
    *outer, _ = merge_axes(node.out.type.shape, *_walks(node))[0]
    return Work("elementwise", node.out.type.size, loops=prod(outer))


def _sum_to(builder: GradBuilder, d: Value, operand: Value, suffix: str) -> Value:
    """Sum the gradient of a broadcast operand over the repeated elements."""
    if d.type.shape == operand.type.shape:
        return d
    return builder.add("ReduceSumTo", (d,), {"shape": operand.type.shape}, suffix=suffix)


def _operands(node: Node) -> tuple[Value, Value]:
    a, b = node.inputs
    assert a is not None
    assert b is not None
    return a, b


def _vjp_add(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    a, b = _operands(node)
    return [
        _sum_to(builder, dy, a, "grad_a") if need[0] else None,
        _sum_to(builder, dy, b, "grad_b") if need[1] else None,
    ]


def _vjp_sub(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    a, b = _operands(node)
    db = None
    if need[1]:
        db = builder.add("Neg", (_sum_to(builder, dy, b, "sum_b"),), suffix="grad_b")
    return [_sum_to(builder, dy, a, "grad_a") if need[0] else None, db]


def _vjp_mul(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    a, b = _operands(node)
    da = db = None
    if need[0]:
        da = _sum_to(builder, builder.add("Mul", (dy, b), suffix="dy_b"), a, "grad_a")
    if need[1]:
        db = _sum_to(builder, builder.add("Mul", (dy, a), suffix="dy_a"), b, "grad_b")
    return [da, db]


def _vjp_div(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    a, b = _operands(node)
    da = db = None
    if need[0] or need[1]:
        quotient = builder.add("Div", (dy, b), suffix="dy_b")
        if need[0]:
            da = _sum_to(builder, quotient, a, "grad_a")
        if need[1]:  # d(a/b)/db = -(1/b) * y: needs the result, never the dividend
            product = builder.add("Mul", (quotient, node.out), suffix="dy_y")
            db = builder.add("Neg", (_sum_to(builder, product, b, "sum_b"),), suffix="grad_b")
    return [da, db]


def _binary_samples(low: float) -> Callable[[], Iterator[Sample]]:
    def samples() -> Iterator[Sample]:
        shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
            ((2, 3, 4, 5), (2, 3, 4, 5)),
            ((2, 3, 4, 5), (1,)),
            ((), (3, 2)),
            ((1, 4, 3, 3), (4, 1, 1)),
            ((2, 1, 3), (4, 1)),
            ((7,), (5, 7)),
            ((), ()),
        ]
        for a, b in shapes:
            yield Sample((TensorType(a), TensorType(b)), low=low, high=2.0)
        yield Sample((TensorType((2, 3, 2, 2)), TensorType((3, 1, 1))), low=low, high=2.0)

    return samples


def _register_binary(
    name: str,
    function: Callable[[Array, Array], Array],
    vjp: Vjp,
    params: tuple[ParamSlot, ...] = (),
    low: float = -2.0,
) -> None:
    def kernel(_: Node, inputs: Sequence[Array | None]) -> list[Array]:
        # Like the C kernel: overflow and division by zero give inf and nan, not an exception.
        with np.errstate(all="ignore"):
            return [np.asarray(function(array(inputs, 0), array(inputs, 1)))]

    symbol = f"odtplan_{name.lower()}_f32"
    register(
        OpDef(
            name=name,
            infer=_infer_binary,
            kernel=kernel,
            work=_binary_work,
            c=CKernel(symbol, "odtplan_binary_t", "odtplan_elementwise", _binary_params),
            samples=_binary_samples(low),
            vjp=vjp,
            inplace=(0, 1),
            params=params,
        )
    )


_register_binary("Add", np.add, _vjp_add, (ParamSlot(0, "bias"), ParamSlot(1, "bias")))
_register_binary("Sub", np.subtract, _vjp_sub)
_register_binary("Mul", np.multiply, _vjp_mul, (ParamSlot(0, "scale"), ParamSlot(1, "scale")))
_register_binary("Div", np.divide, _vjp_div, low=0.5)


def infer_like(node: Node) -> list[TensorType]:
    """Result type of a unary operator: that of operand 0, which must be fp32."""
    return [f32_operand(node, 0)]


def count_params(node: Node) -> dict[str, Attr]:
    """C parameters of an elementwise kernel without attributes."""
    return {"count": f32_operand(node, 0).size}


register(
    OpDef(
        name="Neg",
        infer=infer_like,
        kernel=lambda _, inputs: [np.negative(array(inputs, 0))],
        work=lambda node: Work("elementwise", node.out.type.size),
        c=CKernel("odtplan_neg_f32", "odtplan_count_t", "odtplan_elementwise", count_params),
        samples=lambda: iter([Sample((TensorType((2, 7)),)), Sample((TensorType(()),))]),
        vjp=lambda builder, _, dy, need: [
            builder.add("Neg", (dy,), suffix="grad") if need[0] else None
        ],
        inplace=(0,),
    )
)
