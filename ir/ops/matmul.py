"""MatMul: NumPy's batched matrix product, and a layer without bias where b is a 2-D parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..autodiff import GradBuilder
from ..axes import Tie
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, ParamSlot, Sample, Work, operand, register
from .gemm import chain, get, joined, layer_gradients, needed, optional, product_work

#: ODTPLAN_MAX_RANK of the C kernels less the two matrix axes.
_BATCH_AXES = 4

T = TensorType


def _transposed(node: Node) -> tuple[bool, bool]:
    return bool(node.int_attr("trans_a", 0)), bool(node.int_attr("trans_b", 0))


def _layer(node: Node) -> bool:
    """Whether this is x[..., K] times a 2-D weight[K, N]."""
    return len(operand(node, 1).shape) == 2 and not any(_transposed(node))


def _dims(node: Node) -> tuple[int, int, int, int]:
    """Rows m, columns n, hot and cold part of the contracted axis k."""
    a, b, cold = operand(node, 0), operand(node, 1), optional(node, 2)
    trans_a, trans_b = _transposed(node)
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise GraphError(f"both operands need at least 2 axes, not {a} and {b}")
    m, k = a.shape[-2:][::-1] if trans_a else a.shape[-2:]
    hot, n = b.shape[-2:][::-1] if trans_b else b.shape[-2:]
    rest = 0
    if cold is not None:
        if not _layer(node) or len(cold.shape) != 2 or cold.shape[1] != n:
            raise GraphError(f"the cold weight {cold} does not continue the weight {b}")
        rest = cold.shape[0]
    if k != hot + rest:
        raise GraphError(f"{a} has {k} columns, the other operand {hot + rest} rows")
    return m, n, hot, rest


def _batch(node: Node) -> tuple[int, ...]:
    a, b = operand(node, 0), operand(node, 1)
    count = max(len(a.shape), len(b.shape)) - 2
    if count > _BATCH_AXES:
        raise GraphError(f"{count} leading axes; at most {_BATCH_AXES} are supported")
    try:
        return np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise GraphError(f"the leading axes of {a} and {b} do not broadcast") from None


def _infer(node: Node) -> Sequence[TensorType]:
    m, n, _, _ = _dims(node)
    return (T((*_batch(node), m, n), operand(node, 0).dtype),)


def _kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    trans_a, trans_b = _transposed(node)
    a, b = needed(inputs, 0), joined(needed(inputs, 1), get(inputs, 2), 0)
    a = a.swapaxes(-1, -2) if trans_a else a
    b = b.swapaxes(-1, -2) if trans_b else b
    return (chain(np.zeros(node.out.type.shape, a.dtype), a, b),)


def _work(node: Node) -> Work:
    _, n, hot, cold = _dims(node)
    rows = node.out.type.size // n
    return product_work(rows, n, (hot, cold) if cold else (hot,))


def _vjp(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> Sequence[Value | None]:
    result: list[Value | None] = [None] * len(node.inputs)
    if _layer(node):
        result[:2] = layer_gradients(builder, node, dy, need, 2)
        return result
    a, b = node.inputs[0], node.inputs[1]
    assert a is not None, node.name
    assert b is not None, node.name
    trans_a, trans_b = _transposed(node)
    if need[0]:
        left, right, flip = (b, dy, (trans_b, True)) if trans_a else (dy, b, (False, not trans_b))
        result[0] = _product(builder, left, right, flip, a, "grad_a")
    if need[1]:
        left, right, flip = (dy, a, (True, trans_a)) if trans_b else (a, dy, (not trans_a, False))
        result[1] = _product(builder, left, right, flip, b, "grad_b")
    return result


def _product(
    builder: GradBuilder,
    left: Value,
    right: Value,
    flip: tuple[bool, bool],
    like: Value,
    suffix: str,
) -> Value:
    """A MatMul, summed over the axes along which the operand ``like`` was broadcast."""
    attrs: dict[str, Attr] = {"trans_a": int(flip[0]), "trans_b": int(flip[1])}
    value = builder.add("MatMul", (left, right), attrs, suffix=suffix)
    if value.type.shape == like.type.shape:
        return value
    shape: dict[str, Attr] = {"shape": like.type.shape}
    return builder.add("ReduceSumTo", (value,), shape, suffix=f"{suffix}/sum")


def _strides(shape: tuple[int, ...], batch: tuple[int, ...]) -> tuple[int, ...]:
    """Elements to the next matrix of an operand along each batch axis; 0 where it is repeated."""
    step, result = shape[-2] * shape[-1], []
    for axis in range(len(batch)):
        own = len(shape) - 3 - axis
        size = shape[own] if own >= 0 else 1
        result.append(0 if size == 1 else step)
        step *= size
    return tuple(result[::-1])


def _params(node: Node) -> dict[str, Attr]:
    m, n, hot, cold = _dims(node)
    trans_a, trans_b = _transposed(node)
    a, b, batch = operand(node, 0).shape, operand(node, 1).shape, _batch(node)
    fill = _BATCH_AXES - len(batch)
    return {
        "m": m,
        "n": n,
        "hot": hot,
        "cold": cold,
        "trans_a": int(trans_a),
        "trans_b": int(trans_b),
        "batch": (1,) * fill + batch,
        "a_strides": (0,) * fill + _strides(a, batch),
        "b_strides": (0,) * fill + _strides(b, batch),
    }


def _axes(node: Node) -> Iterator[Tie]:
    """Of the matrices; the axes in front of them keep their order."""
    a, b = node.operands()
    (rows, left), (right, columns) = ((-1, -2) if flip else (-2, -1) for flip in _transposed(node))
    y = node.out
    for tie in (((a, rows), (y, -2)), ((a, left), (b, right)), ((b, columns), (y, -1))):
        yield tuple((v, len(v.type.shape) + axis) for v, axis in tie)


def _samples() -> Iterator[Sample]:
    yield Sample((T((2, 5)), T((5, 6))))
    yield Sample((T((2, 3, 5)), T((5, 4))))
    yield Sample((T((3, 7)), T((2, 6)), T((5, 6))), differentiable=(0,))
    yield Sample((T((2, 1, 3, 4)), T((5, 4, 2))))
    yield Sample((T((2, 4, 3)), T((2, 4, 5))), {"trans_a": 1})
    yield Sample((T((3, 4)), T((2, 5, 4))), {"trans_b": 1})
    yield Sample((T((4, 3)), T((5, 4))), {"trans_a": 1, "trans_b": 1})


register(
    OpDef(
        "MatMul",
        infer=_infer,
        kernel=_kernel,
        work=_work,
        c=CKernel("odtplan_matmul_f32", "odtplan_matmul_t", "odtplan_gemm", _params),
        samples=_samples,
        vjp=_vjp,
        params=(
            ParamSlot(1, "weight", lambda node: 0 if _layer(node) else None, 2, compressible=True),
        ),
        axes=_axes,
    )
)
