"""Integer fully connected layer and the fp32 gradient of its input.

``QGemm(x i8[m,k], w i8[n,k], bias i32 | None, multiplier i32[n], shift i32[n])``; see ``qconv``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, operand, register
from ..quantization import rescale
from .gemm import chain
from .qconv import dequantized
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
    through_clamp,
    weight,
)

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder


def _infer(node: Node) -> list[TensorType]:
    (x, _), (w, _) = activation(node, 0), weight(node, 1)
    if len(x.shape) != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[1]:
        raise GraphError(f"input {x} and weight {w} must be [m, k] and [n, k]")
    check_depth(x.shape[1])
    check_factors(node, 3, w.shape[0])
    return [result(node, (x.shape[0], w.shape[0]))]


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    _, quant = activation(node, 0)
    w, bias = array(inputs, 1), inputs[2]
    dtype = exact_dtype(w.shape[1])
    x = array(inputs, 0).astype(dtype) - dtype.type(quant.zero_point)
    acc = (x @ w.astype(dtype).T).astype(np.int64)
    if bias is not None:
        acc += bias.astype(np.int64)
    check_accumulators(node, acc)
    return [clamped(node, rescale(acc, array(inputs, 3), array(inputs, 4)))]


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    w = node.inputs[1]
    assert w is not None
    grads: list[Value | None] = [None] * len(node.inputs)
    if any(need[1:]):
        raise GraphError(f"node {node.name}: a quantized layer is frozen; make it f32 to train it")
    if need[0]:
        inputs = (through_clamp(b, node, dy), w, scales_constant(b, w, w.type.shape[0]))
        grads[0] = b.add("QGemmGradInput", inputs, suffix="grad_input")
    return grads


def _sizes(node: Node) -> dict[str, Attr]:
    n, k = operand(node, 1).shape
    return {"m": operand(node, 0).shape[0], "n": n, "k": k}


def _c_params(node: Node) -> dict[str, Attr]:
    return {**_sizes(node), "x_zero": activation(node, 0)[1].zero_point, **out_fields(node)}


def _infer_grad(node: Node) -> list[TensorType]:
    dy, (w, _), scale = f32_operand(node, 0), weight(node, 1), f32_operand(node, 2)
    if len(dy.shape) != 2 or len(w.shape) != 2 or dy.shape[1] != w.shape[0]:
        raise GraphError(f"gradient {dy} and weight {w} must be [m, n] and [n, k]")
    if scale.shape != w.shape[:1]:
        raise GraphError(f"scales {scale} do not fit {w.shape[0]} outputs")
    return [TensorType((dy.shape[0], w.shape[1]), dy.dtype)]


def _kernel_grad(_: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy = array(inputs, 0)
    w = dequantized(array(inputs, 1), array(inputs, 2), dy)
    return [chain(np.zeros((dy.shape[0], w.shape[1]), dy.dtype), dy, w)]


_SHAPES = ((2, 5, 6), (1, 64, 10), (3, 19, 1), (1, 3, 4), (2, 32, 7))


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


def _samples_grad() -> Iterator[Sample]:
    for m, k, n in _SHAPES:
        scale = [0.01 * (j + 1) for j in range(n)]
        types = (TensorType((m, n)), i8((n, k), scale), TensorType((n,)))
        yield Sample(types, differentiable=(), low=-0.1, high=0.1)


register(
    OpDef(
        name="QGemm",
        infer=_infer,
        kernel=_kernel,
        work=lambda node: Work("gemm", operand(node, 0).size * node.out.type.shape[1], dtype="i8"),
        c=CKernel("odtplan_qgemm", "odtplan_qgemm_t", "odtplan_qgemm", _c_params, operands=5),
        samples=_samples,
        vjp=_vjp,
    )
)
register(
    OpDef(
        name="QGemmGradInput",
        infer=_infer_grad,
        kernel=_kernel_grad,
        work=lambda node: Work("gemm_grad_input", operand(node, 0).size * node.out.type.shape[1]),
        c=CKernel("odtplan_qgemm_grad_input", "odtplan_qgemm_grad_t", "odtplan_qgemm", _sizes),
        samples=_samples_grad,
    )
)
