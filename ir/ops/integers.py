"""Integers that are computed at run time: f32 numbers that hold them exactly, and back to indices.

``ToReal(x i32; limit) -> f32``, of integers from ``-limit`` to ``limit``, and ``ToIndex(x f32;
size) -> i32``, which stays within ``-size`` and ``size - 1``. Neither has a gradient. In between
ordinary f32 operators compare and add; the importer sees to it that no number is larger than
``EXACT``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, operand, register
from .activation_grad import SHAPES
from .index import SOURCE

#: All integers up to it, and their sums below it, are f32 numbers.
EXACT = 2**24


def _work(node: Node) -> Work:
    return Work("elementwise", node.out.type.size)


def _count(node: Node) -> dict[str, Attr]:
    return {"count": node.out.type.size}


def _infer_real(node: Node) -> list[TensorType]:
    x = operand(node, 0)
    if x.dtype != "i32" or not 0 < node.int_attr("limit") <= EXACT + 1:
        raise GraphError(f"operand 0 is {x}; only i32 up to {EXACT} is supported here")
    return [x.with_dtype("f32")]


def _kernel_real(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    return [array(inputs, 0).astype(np.float32)]


def _samples_real() -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((TensorType(shape, "i32"),), {"limit": EXACT}, ranges={0: (-EXACT, EXACT)})


def _size(node: Node) -> int:
    size = node.int_attr("size")
    if not 0 < size <= EXACT:
        raise GraphError(f"an axis of {size} entries; 1 to {EXACT} are supported")
    return size


def _infer_index(node: Node) -> list[TensorType]:
    _size(node)
    return [f32_operand(node, 0).with_dtype("i32")]


def _kernel_index(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x, size = array(inputs, 0), _size(node)
    inside = np.where(x >= -size, np.minimum(x, size - 1), -size)  # NaN is the first
    return [inside.astype(np.int32)]


def _params_index(node: Node) -> dict[str, Attr]:
    return _count(node) | {"size": _size(node)}


def _samples_index() -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((TensorType(shape),), {"size": 7}, low=-12.0, high=12.0)


register(
    OpDef(
        name="ToReal",
        infer=_infer_real,
        kernel=_kernel_real,
        work=_work,
        c=CKernel("odtplan_index_to_f32", "odtplan_count_t", SOURCE, _count),
        samples=_samples_real,
    )
)
register(
    OpDef(
        name="ToIndex",
        infer=_infer_index,
        kernel=_kernel_index,
        work=_work,
        c=CKernel("odtplan_f32_to_index", "odtplan_to_index_t", SOURCE, _params_index),
        samples=_samples_index,
    )
)
