"""The table of supported ONNX operators: how each one is written in IR nodes.

Differences between opsets (attributes that became operands, Softmax's axis) end here. Axes are
made positive, padding explicit, shapes static, so that the IR has one form of everything.
"""

from __future__ import annotations

from math import inf, prod

import numpy as np

from . import onnx_math
from . import onnx_shapes as shapes
from .graph import Attr, Value
from .onnx_convert import RejectedError, Rule, Site
from .onnx_einsum import EINSUM_RULES
from .onnx_index import INDEX_RULES
from .onnx_losses import LOSS_RULES
from .onnx_quantize import (
    dequantize_linear,
    qlinear_operands,
    qlinear_result,
    quantize_linear,
)
from .onnx_recurrent import RECURRENT_RULES
from .onnx_reduce import REDUCE_RULES
from .onnx_shapes import positive_axis

# -- windows ---------------------------------------------------------------------------------------


def _geometry(s: Site, sizes: tuple[int, ...], kernel: tuple[int, ...]) -> dict[str, Attr]:
    """Strides, dilations and explicit pads of a convolution or pool."""
    rank = len(sizes)
    if rank not in (1, 2):
        raise RejectedError(f"{rank} spatial axes; 1 and 2 are supported")
    strides = s.integers("strides", (1,) * rank)
    dilations = s.integers("dilations", (1,) * rank)
    pads = s.integers("pads", (0,) * (2 * rank))
    if not len(kernel) == len(strides) == len(dilations) == rank or len(pads) != 2 * rank:
        raise RejectedError(f"strides, dilations, pads or kernel do not fit {rank} spatial axes")
    if min(strides) < 1 or min(dilations) < 1:
        raise RejectedError("strides and dilations must be positive")
    if min(pads) < 0:
        raise RejectedError(f"negative pads {list(pads)} are not supported")
    mode = s.text("auto_pad", "NOTSET")
    if mode == "VALID":
        pads = (0,) * (2 * rank)
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        begins, ends = [], []
        for n, k, step, d in zip(sizes, kernel, strides, dilations, strict=True):
            total = max(0, (-(-n // step) - 1) * step + (k - 1) * d + 1 - n)
            small = total // 2
            begins.append(small if mode == "SAME_UPPER" else total - small)
            ends.append(total - begins[-1])
        pads = (*begins, *ends)
    elif mode != "NOTSET":
        raise RejectedError(f"auto_pad {mode} is not known")
    return {"strides": strides, "dilations": dilations, "pads": pads}


def _conv(s: Site) -> Value:
    return _convolution(s, s.value(0), s.value(1), s.optional(2))


def _qlinear_conv(s: Site) -> Value:
    return qlinear_result(s, _convolution(s, *qlinear_operands(s, 0)))


def _convolution(s: Site, x: Value, w: Value, bias: Value | None) -> Value:
    if len(x.type.shape) < 3 or len(w.type.shape) != len(x.type.shape):
        raise RejectedError(f"input {x.type} and weight {w.type} do not fit a convolution")
    kernel = w.type.shape[2:]
    stated = s.integers("kernel_shape", kernel)
    if stated != kernel:
        raise RejectedError(f"kernel_shape {stated} is not the weight's {kernel}")
    attrs = _geometry(s, x.type.shape[2:], kernel) | {"group": s.integer("group", 1)}
    return s.emit("Conv", (x, w, bias), attrs)


def _pool(op: str) -> Rule:
    def rule(s: Site) -> Value:
        if s.wanted(1):
            raise RejectedError("the index output is not supported")
        x, kernel = s.value(0), s.integers("kernel_shape")
        attrs = _geometry(s, x.type.shape[2:], kernel) | {"kernel_shape": kernel}
        same = s.text("auto_pad", "NOTSET").startswith("SAME")
        attrs["ceil_mode"] = 0 if same else s.integer("ceil_mode")
        if op == "AveragePool":
            attrs["count_include_pad"] = s.integer("count_include_pad")
        return s.emit(op, (x,), attrs)

    return rule


# -- matrix products -------------------------------------------------------------------------------


def _gemm(s: Site) -> Value:
    a, b = s.value(0), s.value(1)
    if len(a.type.shape) != 2 or len(b.type.shape) != 2:
        raise RejectedError(f"operands {a.type} and {b.type} are not matrices")
    alpha, beta, trans_b = s.real("alpha", 1.0), s.real("beta", 1.0), s.integer("transB")
    if s.integer("transA"):
        a = s.emit("Transpose", (a,), {"perm": (1, 0)}, "trans_a")
    if alpha != 1.0:
        data = s.data(1)
        if data is not None:
            b = s.derived(1, data * np.float32(alpha), "alpha")
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
        data = data * np.float32(beta) if beta != 1.0 else data
        if shape in ((1, n), (1, 1)):
            bias = np.broadcast_to(data.reshape(shape), (1, n)).reshape(n)
            return s.emit("Gemm", (a, b, s.derived(2, bias, "bias")), attrs)
        c = s.derived(2, data, "beta")
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


def _batchnorm(s: Site) -> Value:
    if s.integer("training_mode") or any(map(s.wanted, range(1, 5))):
        raise RejectedError(
            "is in training mode; export the model in inference mode (frozen statistics)"
        )
    if s.integer("spatial", 1) != 1:
        raise RejectedError("spatial=0 is not supported")
    operands = [s.value(i) for i in range(5)]
    return s.emit("BatchNormalization", operands, {"epsilon": s.real("epsilon", 1e-5)})


def _layernorm(s: Site) -> Value:
    if s.wanted(1) or s.wanted(2):
        names = ", ".join(n for n in s.node.outputs[1:] if n)
        raise RejectedError(f"the results Mean and InvStdDev ({names}) are not supported")
    if s.integer("stash_type", 1) != 1:
        raise RejectedError("stash_type must be 1: mean and deviation are float32")
    x = s.value(0)
    axis = positive_axis(s.integer("axis", -1), len(x.type.shape))
    row = x.type.shape[axis:]
    operands = [x, _of_shape(s, 1, row), _of_shape(s, 2, row) if s.present(2) else None]
    attrs: dict[str, Attr] = {"axis": -len(row), "epsilon": s.real("epsilon", 1e-5)}
    return s.emit("LayerNormalization", operands, attrs)


def _of_shape(s: Site, index: int, shape: tuple[int, ...]) -> Value:
    """An operand that must broadcast to ``shape``; a constant is written out."""
    v, data = s.value(index), s.data(index)
    if v.type.shape == shape:
        return v
    lead = len(v.type.shape) - len(shape)
    if data is not None and set(data.shape[: max(lead, 0)]) <= {1}:
        try:
            whole = np.broadcast_to(data.reshape(data.shape[max(lead, 0) :]), shape)
        except ValueError:
            pass
        else:
            return s.derived(index, whole, "row")
    raise RejectedError(f"operand {index}, {v.type}, is not of the normalized shape {list(shape)}")


# -- nothing at inference --------------------------------------------------------------------------


def _dropout(s: Site) -> Value:
    if s.wanted(1):
        raise RejectedError("the mask output is not supported")
    if s.present(2) and s.scalar(2, "training_mode", 0.0):
        raise RejectedError("is in training mode; export the model in inference mode")
    return s.value(0)


#: Element types of a Cast that changes nothing: TensorProto.FLOAT; INT32 and INT64, which are i32.
_FLOAT, _INTEGERS = (1,), (6, 7)


def _constant(s: Site) -> Value:
    raise RejectedError("its value is not a dense numeric tensor, or can't be read")


#: ONNX operator of the standard domain -> its rule.
RULES: dict[str, Rule] = {
    **onnx_math.RULES,
    "AveragePool": _pool("AveragePool"),
    "BatchNormalization": _batchnorm,
    "Clip": _clip,
    "Concat": shapes.concat,
    "Constant": _constant,
    "Conv": _conv,
    "DequantizeLinear": dequantize_linear,
    "Dropout": _dropout,
    "Flatten": shapes.flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _plain("GlobalAveragePool", 1),
    "Identity": lambda s: s.value(0),
    "LayerNormalization": _layernorm,
    "MatMul": _matmul,
    "MaxPool": _pool("MaxPool"),
    "Pad": shapes.pad,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": lambda s: qlinear_result(s, s.emit("MatMul", qlinear_operands(s, -1)[:2])),
    "QuantizeLinear": quantize_linear,
    "Reshape": shapes.reshape,
    "Slice": shapes.slice_,
    "Softmax": _softmax,
    "Squeeze": shapes.squeeze,
    "Transpose": shapes.transpose,
    "Unsqueeze": shapes.unsqueeze,
    **RECURRENT_RULES,
    **EINSUM_RULES,
    **INDEX_RULES,
    **LOSS_RULES,
    **REDUCE_RULES,
}
