"""Resizing of one or two trailing axes by nearest elements or linear interpolation.

Where each result lies in the operand is operand 1, ``positions``: one number for each index of the
result, axis after axis, between 0 and the last index of the operand. So the coordinate modes of
files are the importer's business (``ir.onnx_resize``). Nearest takes the element at the whole part;
linear weighs it with the next one by the fraction ``f``, ``a * (1 - f) + b * f``, columns before
rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ..axes import Tie
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, CostClass, OpDef, Sample, Work, array, f32_operand, operand, register

if TYPE_CHECKING:
    from ..autodiff import GradBuilder

T = TensorType


def _sizes(node: Node, shape: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heights and widths before and after; a single axis is a width."""
    sizes = node.ints_attr("sizes")
    if len(sizes) not in (1, 2) or len(shape) < len(sizes) or min(sizes) < 1:
        raise GraphError(f"sizes {sizes} do not fit the last axes of {tuple(shape)}")
    if f32_operand(node, 1).shape != (sum(sizes),):
        raise GraphError(f"positions {operand(node, 1)} are not one per index of {sizes}")
    if node.attrs.get("mode") not in ("nearest", "linear"):
        raise GraphError(f"mode {node.attrs.get('mode')} is neither nearest nor linear")
    before = tuple(shape[len(shape) - len(sizes) :])
    if len(sizes) == 1:
        return (1, before[0]), (1, sizes[0])
    return (before[0], before[1]), (sizes[0], sizes[1])


def _linear(node: Node) -> bool:
    return node.attrs["mode"] == "linear"


def _infer(node: Node) -> list[TensorType]:
    x = f32_operand(node, 0)
    _sizes(node, x.shape)
    sizes = node.ints_attr("sizes")
    return [T((*x.shape[: len(x.shape) - len(sizes)], *sizes), x.dtype)]


@dataclass(frozen=True)
class _Axis:
    """Both neighbours of each index of the result, and their weights."""

    first: Array
    second: Array
    near: Array
    far: Array


def _axes(node: Node, shape: Sequence[int], positions: Array) -> tuple[_Axis, _Axis]:
    before, after = _sizes(node, shape)
    lines = positions[: len(positions) - after[1]]
    if len(lines) == 0:
        lines = np.zeros(1, positions.dtype)
    result = []
    for size, at in zip(before, (lines, positions[len(positions) - after[1] :]), strict=True):
        first = at.astype(np.int64)
        far = at - first.astype(at.dtype)
        second = np.minimum(first + 1, size - 1)
        result.append(_Axis(first, second, at.dtype.type(1.0) - far, far))
    return result[0], result[1]


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x, positions = array(inputs, 0), array(inputs, 1)
    planes = x.reshape(-1, *_sizes(node, x.shape)[0])
    y, c = _axes(node, x.shape, positions)
    if not _linear(node):
        return [planes[:, y.first[:, None], c.first].reshape(node.out.type.shape)]
    columns = planes[:, :, c.first] * c.near + planes[:, :, c.second] * c.far
    result = columns[:, y.first] * y.near[:, None] + columns[:, y.second] * y.far[:, None]
    return [result.reshape(node.out.type.shape)]


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    x, positions = node.inputs
    assert x is not None
    if not need[0]:
        return [None, None]
    attrs = {k: node.attrs[k] for k in ("sizes", "mode")} | {"shape": x.type.shape}
    return [b.add("ResizeGrad", (dy, positions), attrs, suffix="grad_input"), None]


def _infer_grad(node: Node) -> list[TensorType]:
    dy, shape, sizes = f32_operand(node, 0), node.ints_attr("shape"), node.ints_attr("sizes")
    _sizes(node, shape)
    if dy.shape != (*shape[: len(shape) - len(sizes)], *sizes):
        raise GraphError(f"gradient {dy} does not belong to {shape} resized to {sizes}")
    return [T(shape, dy.dtype)]


def _kernel_grad(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy, positions, shape = array(inputs, 0), array(inputs, 1), node.ints_attr("shape")
    (height, width), after = _sizes(node, shape)
    y, c = _axes(node, shape, positions)
    given = dy.reshape(-1, *after)
    dx = np.zeros((len(given), height * width), dy.dtype)
    if _linear(node):
        rows, columns = (np.stack([a.first, a.second], axis=1) for a in (y, c))
        by_row, by_column = (np.stack([a.near, a.far], axis=1) for a in (y, c))
        # axes: plane, y, x, row tap, column tap
        parts = given[:, :, :, None] * by_row[:, None]
        terms = parts[..., None] * by_column[:, None]
        at = rows[:, None, :, None] * width + columns[None, :, None, :]
    else:
        terms, at = given, y.first[:, None] * width + c.first
    for plane, values in zip(dx, terms.reshape(len(given), -1), strict=True):
        np.add.at(plane, at.reshape(-1), values)
    return [dx.reshape(shape)]


def _params(node: Node, shape: Sequence[int]) -> dict[str, Attr]:
    before, after = _sizes(node, shape)
    return {
        "planes": prod(shape) // prod(before),
        "in_size": before,
        "out_size": after,
        "columns": sum(node.ints_attr("sizes")) - after[1],
        "linear": int(_linear(node)),
    }


def _work(node: Node, shape: Sequence[int], results: int) -> Work:
    """Bytes that are moved, or operations on the four elements that a result is made from."""
    _, after = _sizes(node, shape)
    cost_class: CostClass = "elementwise" if _linear(node) else "copy"
    return Work(cost_class, 4 * results, loops=results // after[1])


def _work_grad(node: Node) -> tuple[Work, ...]:
    shape = node.ints_attr("shape")
    return (
        _work(node, shape, operand(node, 0).size),
        Work("copy", 4 * prod(shape), outputs=0),
    )


#: Operand, sizes: larger, smaller and larger, one axis, rank 2.
_CASES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((2, 3, 4, 4), (8, 7)),
    ((1, 2, 4, 4), (3, 9)),
    ((2, 2, 4), (9,)),
    ((4, 4), (3, 2)),
)


def _samples(gradient: bool) -> Iterator[Sample]:
    for mode in ("nearest", "linear"):
        for x, sizes in _CASES:
            attrs: dict[str, Attr] = {"sizes": sizes, "mode": mode}
            positions = T((sum(sizes),))
            if gradient:
                dy = T((*x[: len(x) - len(sizes)], *sizes))
                attrs["shape"] = x
                yield Sample((dy, positions), attrs, differentiable=(), low=0.0, high=3.0)
            else:
                yield Sample((T(x), positions), attrs, differentiable=(0,), low=0.0, high=3.0)


def _planes(node: Node) -> Iterator[Tie]:
    """All axes but the two that are resized."""
    x = next(node.operands())
    for axis in range(len(x.type.shape) - 2):
        yield (x, axis), (node.out, axis)


register(
    OpDef(
        name="Resize",
        infer=_infer,
        kernel=_kernel,
        work=lambda node: _work(node, operand(node, 0).shape, node.out.type.size),
        c=CKernel(
            "odtplan_resize_f32",
            "odtplan_resize_t",
            "odtplan_resize",
            lambda node: _params(node, operand(node, 0).shape),
        ),
        samples=lambda: _samples(False),
        vjp=_vjp,
        axes=_planes,
    )
)
register(
    OpDef(
        name="ResizeGrad",
        infer=_infer_grad,
        kernel=_kernel_grad,
        work=_work_grad,
        c=CKernel(
            "odtplan_resize_grad_f32",
            "odtplan_resize_t",
            "odtplan_resize",
            lambda node: _params(node, node.ints_attr("shape")),
        ),
        samples=lambda: _samples(True),
    )
)
