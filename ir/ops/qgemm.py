"""Integer fully connected layer and the fp32 gradients of its input and weight.

``QGemm(x i8[m,k], w i8[n,k], bias i32 | None, multiplier i32[n], shift i32[n], cold i8 | None)``;
see ``qconv``. A partly updated weight comes as its hot leading in-features and the cold rest. The
gradient of the weight is ``[n,k]`` if ``trans_b``, else ``[k,n]``: the layouts of a float weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    Work,
    array,
    f32_operand,
    operand,
    register,
)
from ..quantization import rescale
from .gemm import chain, get, grad_weight_rows, grad_weight_type, joined, optional
from .qclip import through_clamp
from .qconv import COLD
from .qconv_grad import dequantized, real_steps
from .qtypes import (
    activation,
    check_accumulators,
    check_depth,
    check_factors,
    clamped,
    exact_dtype,
    i8,
    out_fields,
    result,
    scales_constant,
    weight,
)

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder


#: Operand of the gradient of the input that takes the frozen rest of a partly updated weight.
_GRAD_COLD = 3


def _dims(node: Node, cold: int) -> tuple[int, int, int]:
    """Outputs, hot and cold in-features of the weight.

    Raises:
        GraphError: Weight and frozen rest are no quantized matrices that fit together.
    """
    w, rest = weight(node, 1)[0], optional(node, cold)
    if rest is not None:
        weight(node, cold)
    if len(w.shape) != 2 or (rest is not None and rest.shape[:-1] != w.shape[:1]):
        raise GraphError(f"weight {w} and its frozen rest {rest} must be [n, hot] and [n, cold]")
    return w.shape[0], w.shape[1], 0 if rest is None else rest.shape[1]


def _infer(node: Node) -> list[TensorType]:
    (x, _), (n, hot, cold) = activation(node, 0), _dims(node, COLD)
    if len(x.shape) != 2 or x.shape[1] != hot + cold:
        raise GraphError(f"input {x} and weight {(n, hot + cold)} must be [m, k] and [n, k]")
    check_depth(x.shape[1])
    check_factors(node, 3, n)
    return [result(node, (x.shape[0], n))]


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    _, quant = activation(node, 0)
    w, bias = joined(array(inputs, 1), get(inputs, COLD), 1), inputs[2]
    dtype = exact_dtype(w.shape[1])
    x = array(inputs, 0).astype(dtype) - dtype.type(quant.zero_point)
    acc = (x @ w.astype(dtype).T).astype(np.int64)
    if bias is not None:
        acc += bias.astype(np.int64)
    check_accumulators(node, acc)
    return [clamped(node, rescale(acc, array(inputs, 3), array(inputs, 4)))]


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    x, w = node.inputs[:2]
    assert x is not None
    assert w is not None
    cold = node.inputs[COLD] if len(node.inputs) > COLD else None
    grads: list[Value | None] = [None] * len(node.inputs)
    if not any(need):
        return grads
    inner = through_clamp(b, node, dy)
    if need[0]:
        inputs = (inner, w, scales_constant(b.graph, w), cold)
        grads[0] = b.add("QGemmGradInput", inputs, suffix="grad_input")
    if need[1]:
        leading = b.leading_channels(x, 1)
        grads[1] = b.add("QGemmGradWeight", (leading, inner), {"trans_b": 1}, suffix="grad_weight")
    if len(need) > 2 and need[2]:
        grads[2] = b.add("GemmGradBias", (inner,), suffix="grad_bias")
    return grads


def _work(node: Node) -> Work:
    """Two rows of the weight at a time, four products of each."""
    (n, hot, cold), m = _dims(node, COLD), operand(node, 0).shape[0]
    pairs, taps = m * -(-n // 2), (hot, cold) if cold else (hot,)
    return Work(
        "gemm",
        pairs * 2 * (hot + cold),
        loops=pairs * len(taps),
        passes=pairs * sum(k % 4 for k in taps),
        outputs=m * n,
        dtype="i8",
    )


def _c_params(node: Node) -> dict[str, Attr]:
    n, hot, cold = _dims(node, COLD)
    sizes: dict[str, Attr] = {"m": operand(node, 0).shape[0], "n": n, "hot": hot, "cold": cold}
    return {**sizes, "x_zero": activation(node, 0)[1].zero_point, **out_fields(node)}


# -- gradient of the input -------------------------------------------------------------------------


def _infer_grad(node: Node) -> list[TensorType]:
    dy, scale, (n, hot, cold) = f32_operand(node, 0), f32_operand(node, 2), _dims(node, _GRAD_COLD)
    if len(dy.shape) != 2 or dy.shape[1] != n:
        raise GraphError(f"gradient {dy} and weight {(n, hot + cold)} must be [m, n] and [n, k]")
    if scale.shape != (n,):
        raise GraphError(f"scales {scale} do not fit {n} outputs")
    return [TensorType((dy.shape[0], hot + cold), dy.dtype)]


def _kernel_grad(_: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy = array(inputs, 0)
    stored = joined(array(inputs, 1), get(inputs, _GRAD_COLD), 1)
    w = dequantized(stored, array(inputs, 2), dy)
    return [chain(np.zeros((dy.shape[0], w.shape[1]), dy.dtype), dy, w)]


def _work_grad(node: Node) -> tuple[Work, ...]:
    """Four results at a time."""
    (n, *parts), m = _dims(node, _GRAD_COLD), operand(node, 0).shape[0]
    blocks = [m * (outs // 4 + outs % 4) for outs in parts if outs]
    counts = zip(blocks, [p for p in parts if p], strict=True)
    return tuple(
        Work("gemm", m * n * outs, loops=b, passes=b * n, outputs=m * outs) for b, outs in counts
    )


def _c_params_grad(node: Node) -> dict[str, Attr]:
    n, hot, cold = _dims(node, _GRAD_COLD)
    return {"m": operand(node, 0).shape[0], "n": n, "hot": hot, "cold": cold}


# -- gradient of the weight ------------------------------------------------------------------------


def _infer_weight(node: Node) -> list[TensorType]:
    x, _ = activation(node, 0)
    return [grad_weight_type(node, x, f32_operand(node, 1))]


def _rows_weight(node: Node, inputs: Sequence[Array | None], begin: int, end: int) -> Array:
    (_, quant), dy = activation(node, 0), array(inputs, 1)
    sums = grad_weight_rows(node, (real_steps(array(inputs, 0), quant, dy), dy), begin, end)
    return np.asarray(sums * sums.dtype.type(np.float32(quant.scale[0])))


def _c_params_weight(node: Node) -> dict[str, Attr]:
    (x, quant), dy = activation(node, 0), operand(node, 1)
    return {
        "m": prod(x.shape[:-1]),
        "n": dy.shape[-1],
        "k": x.shape[-1],
        "trans_b": node.int_attr("trans_b", 0),
        "x_zero": quant.zero_point,
        "x_scale": quant.scale[0],
    }


# -- samples ---------------------------------------------------------------------------------------

_SHAPES = ((2, 5, 6), (1, 64, 10), (3, 19, 1), (1, 3, 4), (2, 32, 7))
#: Rows, outputs, hot and cold in-features.
_PARTIAL = ((2, 6, 3, 4), (1, 7, 8, 24), (2, 1, 1, 1), (2, 5, 5, 12))


def _samples() -> Iterator[Sample]:
    for i, (m, k, n) in enumerate(_SHAPES):
        outs = TensorType((n,), "i32")
        scale = [0.01 * (j + 1) for j in range(n)] if i % 2 else 0.02
        yield Sample(
            (i8((m, k), 0.05, 3 * i - 7), i8((n, k), scale), outs if i % 3 else None, outs, outs),
            {
                "out_scale": 0.1,
                "out_zero_point": -5 * i,
                "clamp": (-5 * i, 90) if i % 2 else (-128, 127),
            },
            differentiable=(),
            ranges={
                2: (-3000, 3000),
                3: (2**19, 2**22) if i == 2 else (2**30, 2**31 - 1),
                4: (28, 34) if i == 2 else (38, 41),
            },
        )
    for m, n, hot, cold in _PARTIAL:
        outs = TensorType((n,), "i32")
        x, w, rest = i8((m, hot + cold), 0.05, 9), i8((n, hot), 0.02), i8((n, cold), 0.02)
        yield Sample(
            (x, w, outs, outs, outs, rest),
            {"out_scale": 0.1, "out_zero_point": 4},
            differentiable=(),
            ranges={2: (-3000, 3000), 3: (2**30, 2**31 - 1), 4: (38, 41)},
        )


def _samples_grad() -> Iterator[Sample]:
    for m, k, n in _SHAPES:
        scale = [0.01 * (j + 1) for j in range(n)]
        types = (TensorType((m, n)), i8((n, k), scale), TensorType((n,)))
        yield Sample(types, differentiable=(), low=-0.1, high=0.1)
    for m, n, hot, cold in _PARTIAL:
        parts = (i8((n, hot), 0.02), TensorType((n,)), i8((n, cold), 0.02))
        yield Sample((TensorType((m, n)), *parts), differentiable=(), low=-0.1, high=0.1)


def _samples_weight() -> Iterator[Sample]:
    for i, (m, k, n) in enumerate(_SHAPES):
        types = (i8((m, k), 0.05, 3 * i - 7), TensorType((m, n)))
        yield Sample(types, differentiable=())
        yield Sample(types, {"trans_b": 0}, differentiable=())


register(
    OpDef(
        name="QGemm",
        infer=_infer,
        kernel=_kernel,
        work=_work,
        c=CKernel("odtplan_qgemm", "odtplan_qgemm_t", "odtplan_qgemm", _c_params, operands=6),
        samples=_samples,
        vjp=_vjp,
        params=(ParamSlot(1, "weight", lambda node: 1, cold_index=COLD), ParamSlot(2, "bias")),
    )
)
register(
    OpDef(
        name="QGemmGradInput",
        infer=_infer_grad,
        kernel=_kernel_grad,
        work=_work_grad,
        c=CKernel(
            "odtplan_qgemm_grad_input",
            "odtplan_qgemm_grad_t",
            "odtplan_qgemm",
            _c_params_grad,
            operands=4,
        ),
        samples=_samples_grad,
    )
)
register(
    OpDef(
        name="QGemmGradWeight",
        infer=_infer_weight,
        kernel=lambda node, inputs: [_rows_weight(node, inputs, 0, node.out.type.shape[0])],
        rows_kernel=_rows_weight,
        work=lambda node: Work(
            "gemm_grad_weight",
            operand(node, 0).size * operand(node, 1).shape[-1],
            loops=node.out.type.shape[0],
        ),
        c=CKernel(
            "odtplan_qgemm_grad_weight",
            "odtplan_qgemm_grad_weight_t",
            "odtplan_qgemm",
            _c_params_weight,
        ),
        samples=_samples_weight,
    )
)
