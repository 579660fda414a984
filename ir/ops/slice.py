"""Operators on windows of a tensor: Slice, SliceGrad, Pad.

Slice is a strided read like Transpose; SliceGrad and Pad are the same strided write into a filled
buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..axes import Tie, kept_axes
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Vjp, Work, array, f32_operand, register
from ..quantization import Quantization
from .elementwise import check_rank, contiguous_strides, merge_axes
from .shape import SOURCE, movable, register_read

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder


def _axes_attr(node: Node, key: str, rank: int, low: int) -> tuple[int, ...]:
    """An attribute with one integer >= ``low`` per axis."""
    values = node.ints_attr(key)
    if len(values) != rank or any(v < low for v in values):
        raise GraphError(f"{key} = {values} is not {rank} integers >= {low}, one per axis")
    return values


def _window(node: Node, sizes: Sequence[int]) -> tuple[slice, ...]:
    """The index expression of a slice."""
    starts, steps = node.ints_attr("starts"), node.ints_attr("steps")
    return tuple(
        slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, sizes, steps, strict=True)
    )


def _check_window(
    node: Node, whole: Sequence[int], sizes: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Starts and steps of a slice of ``sizes`` that lies inside ``whole``."""
    starts = _axes_attr(node, "starts", len(whole), 0)
    steps = _axes_attr(node, "steps", len(whole), 1)
    for axis, (a, n, s, d) in enumerate(zip(starts, sizes, steps, whole, strict=True)):
        if a + (n - 1) * s >= d:
            raise GraphError(
                f"slice of {n} elements from {a} with step {s} leaves axis {axis} of {tuple(whole)}"
            )
    return starts, steps


def _infer_slice(node: Node) -> list[TensorType]:
    x = movable(node, 0)
    check_rank(x.shape)
    sizes = _axes_attr(node, "sizes", len(x.shape), 1)
    _check_window(node, x.shape, sizes)
    return [TensorType(sizes, x.dtype, x.quant)]


def _walk_slice(node: Node) -> tuple[int, tuple[int, ...]]:
    return _walk_window(node, movable(node, 0).shape)


def _walk_window(node: Node, whole: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    strides = contiguous_strides(whole)
    offset = sum(a * s for a, s in zip(node.ints_attr("starts"), strides, strict=True))
    return offset, tuple(k * s for k, s in zip(node.ints_attr("steps"), strides, strict=True))


def _vjp_slice(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    attrs: dict[str, Attr] = {
        "shape": movable(node, 0).shape,
        "starts": node.ints_attr("starts"),
        "steps": node.ints_attr("steps"),
    }
    return [builder.add("SliceGrad", (dy,), attrs, suffix="grad") if need[0] else None]


_WINDOWS: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...] = (
    ((2, 5, 4), (0, 1, 0), (2, 3, 4), (1, 1, 1)),
    ((2, 5, 4), (1, 0, 1), (1, 3, 2), (1, 2, 2)),
    ((1, 6, 3, 3), (0, 0, 0, 0), (1, 2, 3, 3), (1, 1, 1, 1)),
    ((7,), (2,), (2,), (3,)),
)

register_read(
    "Slice",
    _infer_slice,
    lambda node, x: x[_window(node, node.ints_attr("sizes"))],
    _walk_slice,
    _vjp_slice,
    [
        Sample((TensorType(shape),), {"starts": starts, "sizes": sizes, "steps": steps})
        for shape, starts, sizes, steps in _WINDOWS
    ]
    + [
        Sample(
            (TensorType((2, 5, 4), "i8", Quantization((0.05,), 3)),),
            {"starts": (0, 1, 0), "sizes": (2, 3, 4), "steps": (1, 1, 1)},
            differentiable=(),
        ),
        Sample(
            (TensorType((4, 6), "i32"),),
            {"starts": (1, 0), "sizes": (3, 2), "steps": (1, 3)},
            differentiable=(),
        ),
    ],
    kept_axes,
)


# --- SliceGrad, Pad -------------------------------------------------------------------------------


def _register_write(
    name: str,
    infer: Callable[[Node], list[TensorType]],
    kernel: Callable[[Node, Array], Array],
    walk: Callable[[Node], tuple[int, tuple[int, ...]]],
    fill: Callable[[Node], float],
    vjp: Vjp | None,
    samples: Sequence[Sample],
    axes: Callable[[Node], Iterator[Tie]] | None = None,
) -> None:
    """``walk`` gives the first element written and the result's stride per operand axis."""

    def params(node: Node) -> dict[str, Attr]:
        offset, strides = walk(node)
        dims, (merged,) = merge_axes(f32_operand(node, 0).shape, strides)
        return {
            "rank": len(dims),
            "offset": offset,
            "count": node.out.type.size,
            "dims": dims,
            "strides": merged,
            "fill": fill(node),
        }

    register(
        OpDef(
            name=name,
            infer=infer,
            kernel=lambda node, inputs: [kernel(node, array(inputs, 0))],
            work=lambda node: Work("copy", node.out.type.nbytes + f32_operand(node, 0).nbytes),
            c=CKernel("odtplan_write_strided_f32", "odtplan_write_strided_t", SOURCE, params),
            samples=lambda: iter(samples),
            vjp=vjp,
            axes=axes,
        )
    )


def _infer_slice_grad(node: Node) -> list[TensorType]:
    dy, shape = f32_operand(node, 0), node.ints_attr("shape")
    check_rank(shape)
    if len(shape) != len(dy.shape):
        raise GraphError(f"{dy} is no slice of {shape}")
    _check_window(node, shape, dy.shape)
    return [TensorType(shape, dy.dtype)]


def _slice_grad(node: Node, dy: Array) -> Array:
    dx = np.zeros(node.ints_attr("shape"), dy.dtype)
    dx[_window(node, dy.shape)] = dy
    return dx


_register_write(
    "SliceGrad",
    _infer_slice_grad,
    _slice_grad,
    lambda node: _walk_window(node, node.ints_attr("shape")),
    lambda _: 0.0,
    None,
    [
        Sample((TensorType(sizes),), {"shape": shape, "starts": starts, "steps": steps})
        for shape, starts, sizes, steps in _WINDOWS
    ],
)


def _infer_pad(node: Node) -> list[TensorType]:
    x = f32_operand(node, 0)
    check_rank(x.shape)
    begins = _axes_attr(node, "begins", len(x.shape), 0)
    ends = _axes_attr(node, "ends", len(x.shape), 0)
    shape = tuple(a + d + b for a, d, b in zip(begins, x.shape, ends, strict=True))
    return [TensorType(shape, x.dtype)]


def _pad(node: Node, x: Array) -> Array:
    begins, ends = node.ints_attr("begins"), node.ints_attr("ends")
    value = x.dtype.type(node.float_attr("value", 0.0))
    return np.pad(x, list(zip(begins, ends, strict=True)), constant_values=value)


def _walk_pad(node: Node) -> tuple[int, tuple[int, ...]]:
    strides = contiguous_strides(node.out.type.shape)
    return sum(a * s for a, s in zip(node.ints_attr("begins"), strides, strict=True)), strides


def _vjp_pad(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    shape = f32_operand(node, 0).shape
    attrs: dict[str, Attr] = {
        "starts": node.ints_attr("begins"),
        "sizes": shape,
        "steps": (1,) * len(shape),
    }
    return [builder.add("Slice", (dy,), attrs, suffix="grad") if need[0] else None]


_register_write(
    "Pad",
    _infer_pad,
    _pad,
    _walk_pad,
    lambda node: node.float_attr("value", 0.0),
    _vjp_pad,
    [
        Sample(
            (TensorType((2, 3, 4, 5)),),
            {"begins": (0, 0, 1, 2), "ends": (0, 0, 3, 0), "value": 0.0},
        ),
        Sample((TensorType((2, 3)),), {"begins": (1, 0), "ends": (0, 2), "value": -1.5}),
        Sample((TensorType((4,)),), {"begins": (2,), "ends": (1,), "value": -math.inf}),
    ],
    kept_axes,
)
