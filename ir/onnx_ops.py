"""The table of supported ONNX operators: how each one is written in IR nodes.

Differences between opsets (attributes that became operands, Softmax's axis) end here. Axes are
made positive, padding explicit, shapes static, so that the IR has one form of everything.
"""

from __future__ import annotations

from functools import partial
from math import inf, prod

import numpy as np

from . import onnx_math
from . import onnx_shapes as shapes
from .graph import Attr, Value
from .onnx_convert import RejectedError, Rule, Site
from .onnx_einsum import EINSUM_RULES
from .onnx_index import INDEX_RULES
from .onnx_losses import LOSS_RULES
from .onnx_norm import NORM_RULES
from .onnx_quantize import (
    dequantize_linear,
    qlinear_operands,
    qlinear_result,
    quantize_linear,
)
from .onnx_recurrent import RECURRENT_RULES
from .onnx_reduce import REDUCE_RULES
from .onnx_resize import RESIZE_RULES
from .onnx_select import SELECT_RULES
from .onnx_shapes import positive_axis
from .onnx_spatial import SPATIAL_RULES
from .provenance import Affine, Moved, spread_out

# -- matrix products -------------------------------------------------------------------------------


def _gemm(s: Site) -> Value:
    a, b = s.value(0), s.value(1)
    if len(a.type.shape) != 2 or len(b.type.shape) != 2:
        raise RejectedError(f"operands {a.type} and {b.type} are not matrices")
    alpha, beta, trans_b = s.real("alpha", 1.0), s.real("beta", 1.0), s.integer("transB")
    if s.integer("transA"):
        a = s.emit("Transpose", (a,), {"perm": (1, 0)}, "trans_a")
    if alpha != 1.0:
        if s.data(1) is not None:
            b = s.derived(1, "alpha", Affine(np.array(alpha, np.float32)))
        else:
            factor = s.conversion.constant(f"{s.node.name}/alpha", np.array(alpha, np.float32))
            a = s.emit("Mul", (a, factor), None, "scaled")
    n = b.type.shape[0 if trans_b else 1]
    attrs: dict[str, Attr] = {"trans_b": int(trans_b != 0)}
    if not s.present(2) or beta == 0.0:
        return s.emit("Gemm", (a, b, None), attrs)
    data = s.data(2)
    if data is not None:
        shape = (1,) * (2 - data.ndim) + data.shape
        scaled = Affine(np.array(beta, np.float32))
        if shape in ((1, n), (1, 1)):
            bias = s.derived(2, "bias", scaled, Moved(partial(spread_out, n)))
            return s.emit("Gemm", (a, b, bias), attrs)
        c = s.derived(2, "beta", scaled)
    else:
        c = s.value(2)
        if beta != 1.0:
            factor = s.conversion.constant(f"{s.node.name}/beta", np.array(beta, np.float32))
            c = s.emit("Mul", (c, factor), None, "beta")
        if c.type.shape == (n,):
            return s.emit("Gemm", (a, b, c), attrs)
    product = s.emit("Gemm", (a, b, None), attrs, "product")
    return s.emit("Add", (product, c))


def _matmul(s: Site) -> Value:
    a, b = s.value(0), s.value(1)
    left, right = a.type.shape, b.type.shape
    if not left or not right:
        raise RejectedError(f"operands {a.type} and {b.type}: a scalar is not a matrix")
    if len(left) > 1 and len(right) > 1:
        return s.emit("MatMul", (a, b))
    if len(left) == 1:
        a = s.reshape(a, (1, *left), "row")
    if len(right) == 1:
        b = s.reshape(b, (*right, 1), "column")
    y = s.emit("MatMul", (a, b), None, "product")
    shape = list(y.type.shape)
    if len(right) == 1:
        del shape[-1]
    if len(left) == 1:
        del shape[-1 if len(right) == 1 else -2]
    return s.reshape(y, tuple(shape))


# -- elementwise and normalization -----------------------------------------------------------------


def _plain(op: str, operands: int) -> Rule:
    return lambda s: s.emit(op, [s.value(i) for i in range(operands)])


def _clip(s: Site) -> Value:
    if s.opset < 11:
        low, high = s.real("min", -inf), s.real("max", inf)
    else:
        low, high = s.scalar(1, "min", -inf), s.scalar(2, "max", inf)
    limit = float(np.finfo(np.float32).max)  # old exporters write "no bound" as the largest float
    low, high = (-inf if low <= -limit else low), (inf if high >= limit else high)
    low = min(low, high)  # ONNX: where min > max, everything becomes max
    if low == -inf and high == inf:
        return s.value(0)
    if low == 0.0 and high == inf:
        return s.emit("Relu", (s.value(0),))
    return s.emit("Clip", (s.value(0),), {"min": low, "max": high})


def _softmax(s: Site) -> Value:
    x = s.value(0)
    shape, rank = x.type.shape, len(x.type.shape)
    axis = positive_axis(s.integer("axis", 1 if s.opset < 13 else -1), rank)
    if axis == rank - 1:
        return s.emit("Softmax", (x,), {"axis": -1})
    if s.opset < 13 or all(d == 1 for d in shape[axis + 1 :]):  # one row per leading index
        rows = s.reshape(x, (prod(shape[:axis]), prod(shape[axis:])), "rows")
        return s.reshape(s.emit("Softmax", (rows,), {"axis": -1}, "softmax"), shape)
    perm = tuple(rank - 1 if i == axis else axis if i == rank - 1 else i for i in range(rank))
    last = s.emit("Transpose", (x,), {"perm": perm}, "axis_last")
    y = s.emit("Softmax", (last,), {"axis": -1}, "softmax")
    return s.emit("Transpose", (y,), {"perm": perm})


# -- nothing at inference --------------------------------------------------------------------------


def _dropout(s: Site) -> Value:
    if s.wanted(1):
        raise RejectedError("the mask output is not supported")
    if s.present(2) and s.scalar(2, "training_mode", 0.0):
        raise RejectedError("is in training mode; export the model in inference mode")
    return s.value(0)


def _constant(s: Site) -> Value:
    raise RejectedError("its value is not a dense numeric tensor, or can't be read")


#: ONNX operator of the standard domain -> its rule.
RULES: dict[str, Rule] = {
    **onnx_math.RULES,
    "Clip": _clip,
    "Concat": shapes.concat,
    "Constant": _constant,
    "DequantizeLinear": dequantize_linear,
    "Dropout": _dropout,
    "Flatten": shapes.flatten,
    "Gemm": _gemm,
    "Identity": lambda s: s.value(0),
    "MatMul": _matmul,
    "Pad": shapes.pad,
    "QLinearMatMul": lambda s: qlinear_result(s, s.emit("MatMul", qlinear_operands(s, -1)[:2])),
    "QuantizeLinear": quantize_linear,
    "Reshape": shapes.reshape,
    "Slice": shapes.slice_,
    "Softmax": _softmax,
    "Squeeze": shapes.squeeze,
    "Transpose": shapes.transpose,
    "Unsqueeze": shapes.unsqueeze,
    **NORM_RULES,
    **RECURRENT_RULES,
    **RESIZE_RULES,
    **SPATIAL_RULES,
    **EINSUM_RULES,
    **INDEX_RULES,
    **LOSS_RULES,
    **REDUCE_RULES,
    **SELECT_RULES,
}
