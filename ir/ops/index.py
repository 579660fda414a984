"""Operators with computed or stored indices: Gather, its gradient, Scatter.

An index counts from the end where it is negative, as ONNX and NumPy have it. Indices that lie
outside raise an error here; the C kernels read and write nothing for them, and a Gather gives NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError, UsageError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, ParamSlot, Sample, Work, array, f32_operand, operand, register

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

SOURCE = "odtplan_index"

T = TensorType


def _index_operand(node: Node) -> TensorType:
    """Type of the indices."""
    t = operand(node, 1)
    if t.dtype != "i32":
        raise GraphError(f"operand 1 is {t}; indices must be i32")
    return t


def _axis(node: Node, shape: Sequence[int]) -> int:
    """The indexed axis, counted from the front."""
    axis = node.int_attr("axis", 0)
    if not -len(shape) <= axis < len(shape):
        raise GraphError(f"axis {axis} of a tensor with {len(shape)} axes")
    return axis % len(shape)


def positions(node: Node, index: Array, size: int) -> Array:
    """Indices counted from the front, in row-major order.

    Raises:
        UsageError: One lies outside.
    """
    flat = index.reshape(-1)
    bad = (flat < -size) | (flat >= size)
    if bad.any():
        raise UsageError(
            f"node {node.name}: index {int(flat[bad][0])} at position {int(bad.argmax())} is not in"
            f" {-size}..{size - 1}; give indices of the {size} entries that the table has"
        )
    return np.where(flat < 0, flat + size, flat)


def _fields(shape: Sequence[int], axis: int, count: int) -> dict[str, Attr]:
    """Fields of ``odtplan_index_t``: the table seen as [outer, size, inner]."""
    return {
        "outer": prod(shape[:axis]),
        "size": shape[axis],
        "inner": prod(shape[axis + 1 :]),
        "count": count,
        "per_row": prod(shape[1:axis]) if axis else 0,
    }


# --- Gather --------------------------------------------------------------------------------------


def _gathered(node: Node, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the entries that a table of ``shape`` gives for the indices."""
    axis = _axis(node, shape)
    return (*shape[:axis], *_index_operand(node).shape, *shape[axis + 1 :])


def _infer_gather(node: Node) -> list[TensorType]:
    return [T(_gathered(node, f32_operand(node, 0).shape))]


def _kernel_gather(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x, index = array(inputs, 0), array(inputs, 1)
    axis = _axis(node, x.shape)
    at = positions(node, index, x.shape[axis])
    return [x.take(at, axis=axis).reshape(node.out.type.shape)]


def _params_gather(node: Node) -> dict[str, Attr]:
    shape = operand(node, 0).shape
    return _fields(shape, _axis(node, shape), operand(node, 1).size)


def _vjp_gather(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    if not need[0]:
        return [None, None]
    shape, index = operand(node, 0).shape, node.inputs[1]
    attrs: dict[str, Attr] = {"axis": _axis(node, shape), "shape": shape}
    return [builder.add("GatherGrad", (dy, index), attrs, suffix="grad_table"), None]


def _work_gather(node: Node) -> Work:
    fields = _params_gather(node)
    outer, count = fields["outer"], fields["count"]
    assert isinstance(outer, int)
    assert isinstance(count, int)
    return Work("copy", node.out.type.nbytes, loops=outer * count)


#: Table, indices, axis.
_CASES: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...] = (
    ((7, 3), (2, 5), 0),
    ((5,), (4,), 0),
    ((6, 2, 2), (), 0),
    ((3, 5, 2), (4,), 1),
    ((2, 3, 4), (2, 3), -1),
    ((2, 3, 1, 5), (6,), 2),
)


def _gather_samples() -> Iterator[Sample]:
    for shape, index, axis in _CASES:
        types = (T(shape), T(index, "i32"))
        size = shape[axis]
        yield Sample(types, {"axis": axis}, ranges={1: (-size, size - 1)})


register(
    OpDef(
        name="Gather",
        infer=_infer_gather,
        kernel=_kernel_gather,
        work=_work_gather,
        c=CKernel("odtplan_take_f32", "odtplan_index_t", SOURCE, _params_gather),
        samples=_gather_samples,
        vjp=_vjp_gather,
        params=(ParamSlot(0, "weight"),),
    )
)


# --- GatherGrad: gradients added up in the entries that were read --------------------------------


def _infer_grad(node: Node) -> list[TensorType]:
    dy, shape = f32_operand(node, 0), node.ints_attr("shape")
    if dy.shape != _gathered(node, shape):
        raise GraphError(f"{dy} is no gradient of entries of {shape}")
    return [T(shape)]


def _rows_grad(node: Node, inputs: Sequence[Array | None], begin: int, end: int) -> Array:
    dy, index = array(inputs, 0), array(inputs, 1)
    shape = node.ints_attr("shape")
    axis = _axis(node, shape)
    at = positions(node, index, shape[axis])
    dy = dy.reshape(*shape[:axis], len(at), *shape[axis + 1 :])
    if axis == 0:
        inside = (begin <= at) & (at < end)
        dy, at = dy[inside], at[inside] - begin
    else:
        dy = dy[begin:end]
    dx = np.zeros((end - begin, *shape[1:]), dy.dtype)
    np.add.at(np.moveaxis(dx, axis, 0), at, np.moveaxis(dy, axis, 0))
    return dx


def _params_grad(node: Node) -> dict[str, Attr]:
    shape = node.ints_attr("shape")
    return _fields(shape, _axis(node, shape), operand(node, 1).size)


def _work_grad(node: Node, tile_rows: int) -> tuple[Work, ...]:
    """Clearing, and one addition per element; each tile of axis 0 looks at all indices of it."""
    shape, count = node.ints_attr("shape"), operand(node, 1).size
    axis = _axis(node, shape)
    looks = -(-shape[0] // tile_rows) if axis == 0 else prod(shape[:axis])
    return (
        Work("copy", 4 * prod(shape), outputs=0),
        Work("elementwise", operand(node, 0).size, loops=looks * count, outputs=0),
    )


def _grad_samples() -> Iterator[Sample]:
    for sample in _gather_samples():
        x, index = sample.types
        assert x is not None
        assert index is not None
        axis = sample.attrs["axis"]
        assert isinstance(axis, int)
        axis %= len(x.shape)
        dy = T((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))
        yield Sample((dy, index), {"axis": axis, "shape": x.shape}, ranges=sample.ranges)


register(
    OpDef(
        name="GatherGrad",
        infer=_infer_grad,
        kernel=lambda node, inputs: [_rows_grad(node, inputs, 0, node.out.type.shape[0])],
        work=lambda node: _work_grad(node, node.out.type.shape[0]),
        c=CKernel("odtplan_take_grad_f32", "odtplan_index_t", SOURCE, _params_grad),
        samples=_grad_samples,
        rows_kernel=_rows_grad,
        tiled_work=_work_grad,
    )
)


# --- Scatter: rows of a tensor replaced, or added to ----------------------------------------------


def _infer_scatter(node: Node) -> list[TensorType]:
    x = f32_operand(node, 0)
    if not x.shape:
        raise GraphError("a scalar has no rows")
    rows = (*_index_operand(node).shape, *x.shape[1:])
    if len(node.inputs) != 3:
        raise GraphError("operands are the tensor, the indices and the new rows (or none: zeros)")
    if node.inputs[2] is not None and f32_operand(node, 2).shape != rows:
        raise GraphError(f"{operand(node, 2)} holds no rows of {x}: they are {rows}")
    return [x]


def _kernel_scatter(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x, index, rows = array(inputs, 0), array(inputs, 1), inputs[2]
    at = positions(node, index, len(x))
    y = x.copy()
    new = np.zeros((len(at), *x.shape[1:]), x.dtype)
    if rows is not None:
        new = rows.reshape(new.shape)
    if node.int_attr("add", 0):
        np.add.at(y, at, new)
    else:
        for i, row in zip(at.tolist(), new, strict=True):  # the last of equal indices remains
            y[i] = row
    return [y]


def _vjp_scatter(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    """Rows that were replaced twice are not differentiated: the importer refuses them."""
    index = node.inputs[1]
    dx = drows = None
    if need[0]:
        dx = dy
        if not node.int_attr("add", 0):
            dx = builder.add("Scatter", (dy, index, None), {"add": 0}, suffix="grad_input")
    if need[2]:
        drows = builder.add("Gather", (dy, index), {"axis": 0}, suffix="grad_rows")
    return [dx, None, drows]


def _params_scatter(node: Node) -> dict[str, Attr]:
    fields = _fields(operand(node, 0).shape, 0, operand(node, 1).size)
    del fields["outer"], fields["per_row"]
    return fields | {"add": node.int_attr("add", 0)}


def _work_scatter(node: Node) -> tuple[Work, ...]:
    shape, count = operand(node, 0).shape, operand(node, 1).size
    moved = Work("elementwise", count * prod(shape[1:]), loops=count, outputs=0)
    return Work("copy", node.out.type.nbytes, outputs=0), moved


def _scatter_samples() -> Iterator[Sample]:
    five, indices = T((5, 2, 3)), T((4,), "i32")
    inside = {1: (-5, 4)}
    yield Sample((five, indices, T((4, 2, 3))), {"add": 1}, ranges=inside)
    yield Sample((five, T((1,), "i32"), T((1, 2, 3))), {"add": 0}, ranges=inside)
    yield Sample((five, indices, T((4, 2, 3))), {"add": 0}, (0,), ranges=inside)
    yield Sample((T((9,)), T((2, 2), "i32"), None), {"add": 0}, ranges={1: (-9, 8)})


register(
    OpDef(
        name="Scatter",
        infer=_infer_scatter,
        kernel=_kernel_scatter,
        work=_work_scatter,
        c=CKernel("odtplan_scatter_f32", "odtplan_scatter_t", SOURCE, _params_scatter),
        samples=_scatter_samples,
        vjp=_vjp_scatter,
        inplace=(0,),
    )
)
