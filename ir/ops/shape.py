"""Operators that rearrange whole tensors: Reshape (a view), Transpose, Expand, Concat."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..axes import Tie, kept_axes, reshaped_axes, same_axes
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Vjp, Work, array, f32_operand, operand, register
from ..quantization import Quantization
from .elementwise import (
    broadcast_shape,
    broadcast_strides,
    check_rank,
    contiguous_strides,
    merge_axes,
    sum_to,
)

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

SOURCE = "odtplan_shape"
#: ODTPLAN_MAX_CONCAT of backends/c/kernels/odtplan_types.h.
MAX_CONCAT = 16
#: A sample of stored integers.
_I8 = TensorType((2, 3, 4, 5), "i8", Quantization((0.05,), 3))
#: A sample of indices.
_I32 = TensorType((2, 3, 4), "i32")


def movable(node: Node, index: int) -> TensorType:
    """Type of an operand whose elements are moved as they are: f32, indices, or i8 of one scale.

    Raises:
        GraphError: The operand is missing or of another kind.
    """
    t = operand(node, index)
    if t.dtype == "i32" or (t.dtype == "i8" and (t.quant is None or t.quant.axis is None)):
        return t
    return f32_operand(node, index)


# --- Reshape -------------------------------------------------------------------------------------


def _infer_reshape(node: Node) -> list[TensorType]:
    x, shape = movable(node, 0), node.ints_attr("shape")
    if math.prod(shape) != x.size or any(d <= 0 for d in shape):
        raise GraphError(f"{x} has {x.size} elements; it can't be reshaped to {shape}")
    return [TensorType(shape, x.dtype, x.quant)]


def _vjp_reshape(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    attrs: dict[str, Attr] = {"shape": movable(node, 0).shape}
    return [builder.add("Reshape", (dy,), attrs, suffix="grad") if need[0] else None]


register(
    OpDef(
        name="Reshape",
        infer=_infer_reshape,
        kernel=lambda node, inputs: [array(inputs, 0).reshape(node.ints_attr("shape"))],
        work=lambda _: Work("copy", 0),
        c=None,
        samples=lambda: iter(
            [
                Sample((TensorType((2, 3, 4)),), {"shape": (4, 6)}),
                Sample((TensorType((1,)),), {"shape": ()}),
                Sample((_I8,), {"shape": (24, 5)}, differentiable=()),
                Sample((_I32,), {"shape": (3, 8)}, differentiable=()),
            ]
        ),
        vjp=_vjp_reshape,
        view=True,
        axes=reshaped_axes,
    )
)


# --- Transpose ----------------------------------------------------------------------------------


def register_read(
    name: str,
    infer: Callable[[Node], list[TensorType]],
    kernel: Callable[[Node, Array], Array],
    walk: Callable[[Node], tuple[int, tuple[int, ...]]],
    vjp: Vjp,
    samples: Sequence[Sample],
    axes: Callable[[Node], Iterator[Tie]] | None = None,
) -> None:
    """Register a strided read, the loop nest in C that Transpose, Slice and Expand have in common.

    Args:
        name: Operator.
        infer: Its type rule.
        kernel: Its NumPy meaning; a view is fine.
        walk: The first element read and the operand's stride per axis of the result.
        vjp: Its gradient rule.
        samples: Its samples.
        axes: Its rule for the order of axes; None: all keep theirs.
    """

    def params(node: Node) -> dict[str, Attr]:
        offset, strides = walk(node)
        dims, (merged,) = merge_axes(node.out.type.shape, strides)
        return {"rank": len(dims), "offset": offset, "dims": dims, "strides": merged}

    register(
        OpDef(
            name=name,
            infer=infer,
            kernel=lambda node, inputs: [np.array(kernel(node, array(inputs, 0)), order="C")],
            work=lambda node: Work("copy", node.out.type.nbytes),
            c=CKernel(
                "odtplan_read_strided_f32",
                "odtplan_read_strided_t",
                SOURCE,
                params,
                variants={"i8": "odtplan_read_strided_i8", "i32": "odtplan_read_strided_i32"},
            ),
            samples=lambda: iter(samples),
            vjp=vjp,
            axes=axes,
        )
    )


def _infer_transpose(node: Node) -> list[TensorType]:
    x, perm = movable(node, 0), node.ints_attr("perm")
    check_rank(x.shape)
    if sorted(perm) != list(range(len(x.shape))):
        raise GraphError(f"perm = {perm} is not a permutation of the {len(x.shape)} axes")
    return [TensorType(tuple(x.shape[i] for i in perm), x.dtype, x.quant)]


def _walk_transpose(node: Node) -> tuple[int, tuple[int, ...]]:
    strides = contiguous_strides(movable(node, 0).shape)
    return 0, tuple(strides[i] for i in node.ints_attr("perm"))


def _vjp_transpose(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    perm = node.ints_attr("perm")
    inverse = tuple(perm.index(i) for i in range(len(perm)))
    if not need[0]:
        return [None]
    return [builder.add("Transpose", (dy,), {"perm": inverse}, suffix="grad")]


def _axes_transpose(node: Node) -> Iterator[Tie]:
    (x,) = node.operands()
    for i, axis in enumerate(node.ints_attr("perm")):
        yield (x, axis), (node.out, i)


register_read(
    "Transpose",
    _infer_transpose,
    lambda node, x: x.transpose(node.ints_attr("perm")),
    _walk_transpose,
    _vjp_transpose,
    [
        Sample((TensorType((2, 3, 4, 5)),), {"perm": (0, 2, 3, 1)}),
        Sample((TensorType((2, 3, 4, 5)),), {"perm": (0, 3, 1, 2)}),
        Sample((TensorType((4, 3)),), {"perm": (1, 0)}),
        Sample((TensorType((2, 3, 4)),), {"perm": (0, 1, 2)}),
        Sample((TensorType((1, 2, 2, 3, 2, 2)),), {"perm": (5, 4, 3, 2, 1, 0)}),
        Sample((TensorType(()),), {"perm": ()}),
        Sample((_I8,), {"perm": (0, 3, 1, 2)}, differentiable=()),
        Sample((_I8,), {"perm": (1, 0, 2, 3)}, differentiable=()),
        Sample((_I32,), {"perm": (2, 0, 1)}, differentiable=()),
    ],
    _axes_transpose,
)


# --- Expand ---------------------------------------------------------------------------------------


def _infer_expand(node: Node) -> list[TensorType]:
    x, shape = movable(node, 0), node.ints_attr("shape")
    if broadcast_shape(x.shape, shape) != shape:
        raise GraphError(f"{x} does not expand to {shape}")
    return [TensorType(shape, x.dtype, x.quant)]


def _vjp_expand(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    x = node.inputs[0]
    assert x is not None
    return [sum_to(builder, dy, x, "grad") if need[0] else None]


register_read(
    "Expand",
    _infer_expand,
    lambda node, x: np.broadcast_to(x, node.ints_attr("shape")),
    lambda node: (0, broadcast_strides(movable(node, 0).shape, node.ints_attr("shape"))),
    _vjp_expand,
    [
        Sample((TensorType((3, 1)),), {"shape": (2, 3, 4)}),
        Sample((TensorType(()),), {"shape": (2, 3)}),
        Sample((TensorType((2, 1, 4)),), {"shape": (2, 3, 4)}),
        Sample((TensorType((2, 3)),), {"shape": (2, 3)}),
        Sample((_I8,), {"shape": (2, 2, 3, 4, 5)}, differentiable=()),
        Sample((_I32,), {"shape": (2, 2, 3, 4)}, differentiable=()),
    ],
    same_axes,
)


# --- Concat --------------------------------------------------------------------------------------


def _concat_axis(node: Node) -> int:
    """The axis, counted from the front."""
    rank, axis = len(f32_operand(node, 0).shape), node.int_attr("axis")
    if not -rank <= axis < rank:
        raise GraphError(f"axis = {axis} is not an axis of rank {rank}")
    return axis % rank


def _infer_concat(node: Node) -> list[TensorType]:
    if not 1 <= len(node.inputs) <= MAX_CONCAT:
        raise GraphError(f"{len(node.inputs)} operands; 1 to {MAX_CONCAT} can be concatenated")
    axis = _concat_axis(node)
    types = [f32_operand(node, i) for i in range(len(node.inputs))]
    first = types[0].shape
    for t in types:
        if t.shape[:axis] + t.shape[axis + 1 :] != first[:axis] + first[axis + 1 :]:
            raise GraphError(f"{t} and {types[0]} differ outside axis {axis}")
    length = sum(t.shape[axis] for t in types)
    return [TensorType((*first[:axis], length, *first[axis + 1 :]), types[0].dtype)]


def _concat_params(node: Node) -> dict[str, Attr]:
    axis = _concat_axis(node)
    shapes = [f32_operand(node, i).shape for i in range(len(node.inputs))]
    return {
        "operands": len(shapes),
        "outer": math.prod(shapes[0][:axis]),
        "run": tuple(math.prod(s[axis:]) for s in shapes),
    }


def _vjp_concat(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    axis, at = _concat_axis(node), 0
    rank = len(dy.type.shape)
    result: list[Value | None] = []
    for i, wanted in enumerate(need):
        shape = f32_operand(node, i).shape
        starts = tuple(at if a == axis else 0 for a in range(rank))
        attrs: dict[str, Attr] = {"starts": starts, "sizes": shape, "steps": (1,) * rank}
        result.append(builder.add("Slice", (dy,), attrs, suffix=f"grad{i}") if wanted else None)
        at += shape[axis]
    return result


def _concat_samples() -> Iterator[Sample]:
    for shapes, axis in (
        (((2, 3, 4), (2, 1, 4), (2, 5, 4)), 1),
        (((3, 2), (3, 4)), -1),
        (((2, 3), (1, 3)), 0),
        (((5,),), 0),
    ):
        yield Sample(tuple(map(TensorType, shapes)), {"axis": axis})


register(
    OpDef(
        name="Concat",
        infer=_infer_concat,
        kernel=lambda node, inputs: [
            np.concatenate([array(inputs, i) for i in range(len(inputs))], _concat_axis(node))
        ],
        work=lambda node: Work("copy", node.out.type.nbytes),
        c=CKernel("odtplan_concat_f32", "odtplan_concat_t", SOURCE, _concat_params, variadic=True),
        samples=_concat_samples,
        vjp=_vjp_concat,
        axes=kept_axes,
    )
)
