"""Gemm, a layer with weight and bias, and the gradients of layers with a two-dimensional weight.

Every output element is one chain over ascending k that starts at the bias (or zero). A partly
updated weight comes as two operands, its hot leading in-features and the cold rest; the chain runs
over the hot part first, which is the order of the whole weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from ..autodiff import GradBuilder
from ..axes import Tie
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, CostClass, OpDef, ParamSlot, Sample, Work, operand, register

T = TensorType


def optional(node: Node, index: int) -> TensorType | None:
    """Type of an optional operand, None where it is absent."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else value.type


def get(inputs: Sequence[Array | None], index: int) -> Array | None:
    """An optional operand's array, None where it is absent."""
    return inputs[index] if index < len(inputs) else None


def needed(inputs: Sequence[Array | None], index: int) -> Array:
    """A required operand's array."""
    value = inputs[index]
    assert value is not None, index
    return value


def joined(hot: Array, cold: Array | None, axis: int) -> Array:
    """The whole of a partly updated weight."""
    return hot if cold is None else np.concatenate((hot, cold), axis=axis)


def chain(start: Array, left: Array, right: Array) -> Array:
    """The sum start + left @ right over the last two axes, one sequential chain per element."""
    acc = start
    for k in range(left.shape[-1]):
        acc = acc + left[..., :, k : k + 1] * right[..., k : k + 1, :]
    return acc


def weight_dims(b: TensorType, cold: TensorType | None, trans_b: bool) -> tuple[int, int, int]:
    """Outputs n, hot and cold in-features of a stored weight."""
    if len(b.shape) != 2:
        raise GraphError(f"the weight must have 2 axes, not {b}")
    n, hot = b.shape if trans_b else b.shape[::-1]
    if cold is None:
        return n, hot, 0
    if len(cold.shape) != 2:
        raise GraphError(f"the cold weight must have 2 axes, not {cold}")
    cold_n, rest = cold.shape if trans_b else cold.shape[::-1]
    if cold_n != n:
        raise GraphError(f"the cold weight {cold} has {cold_n} outputs, the hot one {n}")
    return n, hot, rest


def _layer_dims(node: Node, cold_index: int) -> tuple[int, int, int, int]:
    """Rows m, outputs n, hot and cold in-features of a product with a 2-D weight."""
    x = operand(node, 0)
    trans_b = bool(node.int_attr("trans_b", 0))
    n, hot, rest = weight_dims(operand(node, 1), optional(node, cold_index), trans_b)
    return prod(x.shape[:-1]), n, hot, rest


# --- Gemm ----------------------------------------------------------------------------------------


def _gemm_infer(node: Node) -> Sequence[TensorType]:
    a, c = operand(node, 0), optional(node, 2)
    if len(a.shape) != 2:
        raise GraphError(f"the input must have 2 axes, not {a}")
    m, n, hot, cold = _layer_dims(node, 3)
    if a.shape[1] != hot + cold:
        raise GraphError(f"the input {a} has {a.shape[1]} features, the weight {hot + cold}")
    if c is not None and c.shape != (n,):
        raise GraphError(f"the bias {c} must have the shape ({n},)")
    return (T((m, n), a.dtype),)


def _gemm_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    a, b, c = needed(inputs, 0), needed(inputs, 1), get(inputs, 2)
    trans_b = node.int_attr("trans_b", 0)
    w = joined(b, get(inputs, 3), trans_b)
    w = w.T if trans_b else w
    start = np.zeros((a.shape[0], w.shape[1]), a.dtype)
    return (chain(start if c is None else start + c, a, w),)


def _gemm_vjp(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> Sequence[Value | None]:
    result: list[Value | None] = [None] * len(node.inputs)
    result[:2] = layer_gradients(builder, node, dy, need, 3)
    if len(need) > 2 and need[2]:
        result[2] = builder.add("GemmGradBias", (dy,), suffix="grad_bias")
    return result


def layer_gradients(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool], cold_index: int
) -> list[Value | None]:
    """Gradients of input and weight of a product with a 2-D weight."""
    x, w = node.inputs[0], node.inputs[1]
    assert x is not None, node.name
    attrs: dict[str, Attr] = {"trans_b": node.int_attr("trans_b", 0)}
    result: list[Value | None] = [None, None]
    if need[0]:
        cold = node.inputs[cold_index] if len(node.inputs) > cold_index else None
        result[0] = builder.add("GemmGradInput", (dy, w, cold), attrs, suffix="grad_input")
    if need[1]:
        kept = builder.kept_input(x, len(x.type.shape) - 1)
        op = {"f16": "HGemmGradWeight", "i8": "QGemmGradWeight"}.get(kept.type.dtype)
        result[1] = builder.add(op or "GemmGradWeight", (kept, dy), attrs, suffix="grad_weight")
    return result


def product_work(
    rows: int, outs: int, taps: Sequence[int], cost_class: CostClass = "gemm"
) -> Work:
    """Work of rows of results, which the C kernel makes in fours, of fours of taps.

    Args:
        rows: Rows.
        outs: Results of a row.
        taps: Products of a result, by part of the weight.
        cost_class: Cost class.
    """
    fours, ones = divmod(outs, 4)
    return Work(
        cost_class,
        rows * outs * sum(taps),
        passes=rows * sum(fours * (k // 4 + k % 4) + ones * k for k in taps),
        loops=rows * (fours + ones) * len(taps),
        outputs=rows * outs,
    )


def _gemm_work(node: Node) -> Work:
    m, n, hot, cold = _layer_dims(node, 3)
    return product_work(m, n, (hot, cold) if cold else (hot,))


def _grad_input_work(node: Node) -> tuple[Work, ...]:
    m, n, hot, cold = _layer_dims(node, 2)
    return tuple(product_work(m, outs, (n,)) for outs in (hot, cold) if outs)


def _grad_weight_work(node: Node) -> Work:
    (rows, outs), m = node.out.type.shape, prod(operand(node, 0).shape[:-1])
    return product_work(rows, outs, (m,), "gemm_grad_weight")


def _gemm_params(node: Node) -> dict[str, Attr]:
    m, n, hot, cold = _layer_dims(node, 3)
    return {"m": m, "n": n, "hot": hot, "cold": cold, "trans_b": node.int_attr("trans_b", 0)}


def _gemm_axes(node: Node) -> Iterator[Tie]:
    x, w, *bias = node.operands()
    ins = 1 if node.int_attr("trans_b", 0) else 0
    yield (x, 0), (node.out, 0)
    yield (x, 1), (w, ins)
    yield (node.out, 1), (w, 1 - ins), *((b, 0) for b in bias)


def _gemm_samples() -> Iterator[Sample]:
    yield Sample((T((2, 5)), T((6, 5)), T((6,))), {"trans_b": 1})
    yield Sample((T((3, 4)), T((4, 7)), T((7,))), {"trans_b": 0})
    yield Sample((T((1, 3)), T((3, 4))), {"trans_b": 0})
    yield Sample((T((2, 7)), T((5, 3)), T((5,)), T((5, 4))), {"trans_b": 1}, (0, 2))
    yield Sample((T((2, 7)), T((2, 5)), None, T((5, 5))), {"trans_b": 0}, (0,))


register(
    OpDef(
        "Gemm",
        infer=_gemm_infer,
        kernel=_gemm_kernel,
        work=_gemm_work,
        c=CKernel("odtplan_gemm_f32", "odtplan_gemm_t", "odtplan_gemm", _gemm_params),
        samples=_gemm_samples,
        vjp=_gemm_vjp,
        params=(
            ParamSlot(
                1,
                "weight",
                lambda node: 1 if node.int_attr("trans_b", 0) else 0,
                3,
                compressible=True,
            ),
            ParamSlot(2, "bias"),
        ),
        axes=_gemm_axes,
    )
)


# --- gradients of a layer with a 2-D weight -------------------------------------------------------


def _grad_input_infer(node: Node) -> Sequence[TensorType]:
    dy = operand(node, 0)
    _, n, hot, cold = _layer_dims(node, 2)
    if not dy.shape or dy.shape[-1] != n:
        raise GraphError(f"the gradient {dy} must have {n} features")
    return (T((*dy.shape[:-1], hot + cold), dy.dtype),)


def _grad_input_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    dy, b = needed(inputs, 0), needed(inputs, 1)
    trans_b = node.int_attr("trans_b", 0)
    w = joined(b, get(inputs, 2), trans_b)
    w = w if trans_b else w.T
    rows = dy.reshape(-1, dy.shape[-1])
    dx = chain(np.zeros((rows.shape[0], w.shape[1]), dy.dtype), rows, w)
    return (dx.reshape(*dy.shape[:-1], w.shape[1]),)


def _grad_input_params(node: Node) -> dict[str, Attr]:
    m, n, hot, cold = _layer_dims(node, 2)
    return {"m": m, "n": n, "hot": hot, "cold": cold, "trans_b": node.int_attr("trans_b", 0)}


def _grad_input_samples() -> Iterator[Sample]:
    yield Sample((T((2, 6)), T((6, 5))), {"trans_b": 1})
    yield Sample((T((2, 3, 7)), T((4, 7))), {"trans_b": 0})
    yield Sample((T((2, 5)), T((5, 3)), T((5, 4))), {"trans_b": 1})
    yield Sample((T((2, 5)), T((2, 5)), T((6, 5))), {"trans_b": 0})


register(
    OpDef(
        "GemmGradInput",
        infer=_grad_input_infer,
        kernel=_grad_input_kernel,
        work=_grad_input_work,
        c=CKernel(
            "odtplan_gemm_grad_input_f32",
            "odtplan_gemm_t",
            "odtplan_gemm",
            _grad_input_params,
            operands=3,
        ),
        samples=_grad_input_samples,
    )
)


def grad_weight_type(node: Node, x: TensorType, dy: TensorType) -> TensorType:
    """Type of the gradient of the weight, in the layout of the stored weight.

    Raises:
        GraphError: Input and gradient of the result do not belong together.
    """
    if len(x.shape) < 2 or x.shape[:-1] != dy.shape[:-1]:
        raise GraphError(f"input {x} and gradient {dy} must agree in all axes but the last")
    k, n = x.shape[-1], dy.shape[-1]
    return T((n, k) if node.int_attr("trans_b", 0) else (k, n), dy.dtype)


def grad_weight_rows(node: Node, inputs: Sequence[Array | None], begin: int, end: int) -> Array:
    """Rows of the gradient of the weight, from x and dy."""
    x, dy = needed(inputs, 0), needed(inputs, 1)
    rows, columns = (dy, x) if node.int_attr("trans_b", 0) else (x, dy)
    rows = rows.reshape(-1, rows.shape[-1])[:, begin:end]
    columns = columns.reshape(-1, columns.shape[-1])
    return chain(np.zeros((end - begin, columns.shape[1]), x.dtype), rows.T, columns)


def grad_weight_product_params(node: Node) -> dict[str, Attr]:
    """Fields of ``odtplan_gemm_t`` for the gradient of the weight."""
    x, dy = operand(node, 0), operand(node, 1)
    m, k, n = prod(x.shape[:-1]), x.shape[-1], dy.shape[-1]
    return {"m": m, "n": n, "hot": k, "cold": 0, "trans_b": node.int_attr("trans_b", 0)}


def grad_weight_product_samples() -> Iterator[Sample]:
    """Gradients of both layouts of the weight."""
    yield Sample((T((3, 5)), T((3, 6))), {"trans_b": 1})
    yield Sample((T((1, 7)), T((1, 4))), {"trans_b": 0})
    yield Sample((T((2, 3, 5)), T((2, 3, 2))), {"trans_b": 0})


register(
    OpDef(
        "GemmGradWeight",
        infer=lambda node: (grad_weight_type(node, operand(node, 0), operand(node, 1)),),
        kernel=lambda node, inputs: (grad_weight_rows(node, inputs, 0, node.out.type.shape[0]),),
        rows_kernel=grad_weight_rows,
        work=_grad_weight_work,
        c=CKernel(
            "odtplan_gemm_grad_weight_f32",
            "odtplan_gemm_t",
            "odtplan_gemm",
            grad_weight_product_params,
        ),
        samples=grad_weight_product_samples,
    )
)


def _grad_bias_infer(node: Node) -> Sequence[TensorType]:
    dy = operand(node, 0)
    if not dy.shape:
        raise GraphError("the gradient of a layer's output has at least 1 axis")
    return (T(dy.shape[-1:], dy.dtype),)


def _grad_bias_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    dy = needed(inputs, 0)
    rows = dy.reshape(-1, dy.shape[-1])
    acc = np.zeros(rows.shape[1:], dy.dtype)
    for row in rows:
        acc = acc + row
    return (acc,)


def _grad_bias_params(node: Node) -> dict[str, Attr]:
    dy = operand(node, 0)
    return {"m": prod(dy.shape[:-1]), "n": dy.shape[-1], "hot": 0, "cold": 0, "trans_b": 0}


def _grad_bias_samples() -> Iterator[Sample]:
    yield Sample((T((3, 5)),))
    yield Sample((T((2, 2, 4)),))


register(
    OpDef(
        "GemmGradBias",
        infer=_grad_bias_infer,
        kernel=_grad_bias_kernel,
        work=lambda node: Work("elementwise", operand(node, 0).size),
        c=CKernel(
            "odtplan_gemm_grad_bias_f32", "odtplan_gemm_t", "odtplan_gemm", _grad_bias_params
        ),
        samples=_grad_bias_samples,
    )
)
