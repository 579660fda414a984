"""Conditions as packed bits, and the choice between two operands: Where, Greater, And and kin.

A condition is a ``bits`` tensor, one bit per element, computed by a comparison or constant. It has
no gradient; that of Where goes to the operand that was taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, operand, register
from .activation_grad import SHAPES, pack_bits, unpack_bits, work
from .elementwise import broadcast_shape, broadcast_strides, merge_axes, sum_to

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

SOURCE = "odtplan_where"
T = TensorType


def _bits_operand(node: Node, index: int) -> TensorType:
    t = operand(node, index)
    if t.dtype != "bits":
        raise GraphError(f"operand {index} is {t}; a condition is needed here")
    return t


# --- Where ----------------------------------------------------------------------------------------


def _choices(node: Node) -> list[TensorType]:
    return [f32_operand(node, i) for i in (1, 2) if node.inputs[i] is not None]


def _infer_where(node: Node) -> list[TensorType]:
    if len(node.inputs) != 3:
        raise GraphError(f"{len(node.inputs)} operands; a condition and two choices are needed")
    types = (_bits_operand(node, 0), *_choices(node))
    return [T(broadcast_shape(*(t.shape for t in types)))]


def _fill(node: Node, index: int) -> float:
    """The number that stands for an absent operand."""
    return node.float_attr(("on", "off")[index - 1])


def _where(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    shape = node.out.type.shape
    present = [x for x in inputs[1:] if x is not None]
    dtype = present[0].dtype if present else np.dtype(np.float32)
    a, b = (np.asarray(_fill(node, i), dtype) if (x := inputs[i]) is None else x for i in (1, 2))
    condition = unpack_bits(array(inputs, 0), operand(node, 0).shape)
    return [np.array(np.broadcast_to(np.where(condition, a, b), shape), order="C")]


def _where_walk(node: Node) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    shape = node.out.type.shape
    steps = [
        (0,) * len(shape) if v is None else broadcast_strides(v.type.shape, shape)
        for v in node.inputs
    ]
    return merge_axes(shape, *steps)


def _where_params(node: Node) -> dict[str, Attr]:
    dims, (c, a, b) = _where_walk(node)
    fills = {
        name: _fill(node, i) if node.inputs[i] is None else 0.0
        for i, name in ((1, "on"), (2, "off"))
    }
    strides = {"c_strides": c, "a_strides": a, "b_strides": b}
    return {"rank": len(dims), "dims": dims, **strides, **fills}


def _vjp_where(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    condition, a, b = node.inputs
    grads: list[Value | None] = [None, None, None]
    if need[1] and a is not None:
        part = builder.add("Where", (condition, dy, None), {"off": 0.0}, suffix="part_a")
        grads[1] = sum_to(builder, part, a, "grad_a")
    if need[2] and b is not None:
        part = builder.add("Where", (condition, None, dy), {"on": 0.0}, suffix="part_b")
        grads[2] = sum_to(builder, part, b, "grad_b")
    return grads


def _where_samples() -> Iterator[Sample]:
    for c, a, b in (
        ((2, 3, 3, 3), (2, 3, 3, 3), (2, 3, 3, 3)),
        ((3, 3), (2, 3, 3), ()),
        ((2, 1, 3), (4, 1), (3,)),
        ((), (3, 5), (3, 1)),
        ((5, 7), (1,), (7,)),
    ):
        yield Sample((T(c, "bits"), T(a), T(b)))
    yield Sample((T((1, 3, 3), "bits"), None, T((2, 3, 3))), {"on": -np.inf}, differentiable=())
    yield Sample((T((3, 3), "bits"), T((2, 3, 3)), None), {"off": -1e4})
    yield Sample((T((11,), "bits"), None, None), {"on": 1.0, "off": 0.0})


register(
    OpDef(
        name="Where",
        infer=_infer_where,
        kernel=_where,
        work=lambda node: Work(
            "elementwise", node.out.type.size, loops=int(np.prod(_where_walk(node)[0][:-1]))
        ),
        c=CKernel("odtplan_where_f32", "odtplan_where_t", SOURCE, _where_params),
        samples=_where_samples,
        vjp=_vjp_where,
        inplace=(1, 2),
    )
)


# --- comparisons and logic ------------------------------------------------------------------------


def _flags_work(node: Node) -> Work:
    dims, _ = merge_axes(node.out.type.shape, *_steps(node))
    return Work("elementwise", node.out.type.size, loops=int(np.prod(dims[:-1])))


def _steps(node: Node) -> list[tuple[int, ...]]:
    shape = node.out.type.shape
    return [broadcast_strides(operand(node, i).shape, shape) for i in (0, 1)]


def _flags_params(node: Node) -> dict[str, Attr]:
    dims, (a, b) = merge_axes(node.out.type.shape, *_steps(node))
    return {"rank": len(dims), "dims": dims, "a_strides": a, "b_strides": b}


_PAIRS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((2, 3, 3, 3), (2, 3, 3, 3)),
    ((3, 5), ()),
    ((2, 1, 3), (4, 1)),
    ((), ()),
)


def _register_flags(
    name: str, function: Callable[[Array, Array], Array], kind: str, symbol: str
) -> None:
    """Register a function of two tensors of dtype ``kind`` whose result is a condition."""
    check = f32_operand if kind == "f32" else _bits_operand

    def kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
        data = [array(inputs, i) for i in (0, 1)]
        if kind == "bits":
            data = [unpack_bits(d, operand(node, i).shape) for i, d in enumerate(data)]
        return [pack_bits(np.asarray(function(*data)))]

    register(
        OpDef(
            name=name,
            infer=lambda node: [
                T(broadcast_shape(check(node, 0).shape, check(node, 1).shape), "bits")
            ],
            kernel=kernel,
            work=_flags_work,
            c=CKernel(symbol, "odtplan_flags_t", SOURCE, _flags_params),
            samples=lambda: (Sample((T(a, kind), T(b, kind))) for a, b in _PAIRS),
        )
    )


_register_flags("Greater", np.greater, "f32", "odtplan_greater_f32")
_register_flags("GreaterOrEqual", np.greater_equal, "f32", "odtplan_greater_or_equal_f32")
_register_flags("Equal", np.equal, "f32", "odtplan_equal_f32")
_register_flags("And", np.logical_and, "bits", "odtplan_and_bits")
_register_flags("Or", np.logical_or, "bits", "odtplan_or_bits")
_register_flags("Xor", np.logical_xor, "bits", "odtplan_xor_bits")


def _not(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    return [pack_bits(~unpack_bits(array(inputs, 0), operand(node, 0).shape))]


register(
    OpDef(
        name="Not",
        infer=lambda node: [_bits_operand(node, 0)],
        kernel=_not,
        work=work("elementwise"),
        c=CKernel(
            "odtplan_not_bits",
            "odtplan_count_t",
            SOURCE,
            lambda node: {"count": operand(node, 0).size},
        ),
        samples=lambda: (Sample((T(s, "bits"),)) for s in SHAPES),
        inplace=(0,),
    )
)
