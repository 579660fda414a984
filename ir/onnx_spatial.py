"""ONNX operators of sliding windows, of spatial axes and of neighbouring channels, in IR nodes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from .graph import Attr, Value
from .onnx_convert import RejectedError, Rule, Site
from .onnx_quantize import qlinear_operands, qlinear_result


def _geometry(s: Site, sizes: tuple[int, ...], kernel: tuple[int, ...]) -> dict[str, Attr]:
    """Strides, dilations and explicit pads of a convolution or pool."""
    rank = len(sizes)
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
    if len(kernel) > 2:
        raise RejectedError(f"{len(kernel)} spatial axes; 1 and 2 are supported")
    attrs = _geometry(s, x.type.shape[2:], kernel) | {"group": s.integer("group", 1)}
    return s.emit("Conv", (x, w, bias), attrs)


def _pool(op: str) -> Rule:
    def rule(s: Site) -> Value:
        if s.wanted(1):
            raise RejectedError("the index output is not supported")
        x, kernel = s.value(0), s.integers("kernel_shape")
        if len(x.type.shape) < 3:
            raise RejectedError(f"input {x.type} has no spatial axis")
        attrs = _geometry(s, x.type.shape[2:], kernel) | {"kernel_shape": kernel}
        same = s.text("auto_pad", "NOTSET").startswith("SAME")
        attrs["ceil_mode"] = 0 if same else s.integer("ceil_mode")
        if op == "AveragePool":
            attrs["count_include_pad"] = s.integer("count_include_pad")
        return s.emit(op, (x,), attrs) if len(kernel) < 3 else _pool_merged(s, op, x, attrs)

    return rule


def _pool_merged(s: Site, op: str, x: Value, attrs: dict[str, Attr]) -> Value:
    """A pool of three axes and more; neighbours that it leaves alone are seen as one.

    PyTorch writes the sums of LocalResponseNorm as such a pool over channels.
    """
    shape, rank = x.type.shape, len(x.type.shape) - 2
    window = {k: v for k, v in attrs.items() if isinstance(v, tuple)}
    pads = window.pop("pads")
    columns = list(zip(*window.values(), pads[:rank], pads[rank:], strict=True))
    stays = [True, *({*c[:-2]} == {1} and not any(c[-2:]) for c in columns)]  # channels first
    groups: list[list[int]] = []
    for i, alone in enumerate(stays):
        if i and alone and stays[i - 1]:
            groups[-1].append(i)
        else:
            groups.append([i])
    if len(groups) > 3:
        raise RejectedError(f"{len(groups) - 1} spatial axes; 1 and 2 are supported")
    merged = (shape[0], *(prod(shape[1 + i] for i in g) for g in groups))
    *lists, begins, ends = zip(*(columns[g[0] - 1] for g in groups[1:]), strict=True)
    attrs = attrs | dict(zip(window, lists, strict=True)) | {"pads": (*begins, *ends)}
    y = s.emit(op, (s.reshape(x, merged, "merged"),), attrs, "pooled")
    sizes = {g[0]: n for g, n in zip(groups[1:], y.type.shape[2:], strict=True) if len(g) == 1}
    return s.reshape(y, (shape[0], *(sizes.get(i, n) for i, n in enumerate(shape[1:]))))


def _lp_pool(s: Site) -> Value:
    """LpPool: the root of the sum of powers over each window, which is its mean times its taps."""
    x, kernel = s.value(0), s.integers("kernel_shape")
    sizes = x.type.shape[2:]
    attrs = _geometry(s, sizes, kernel)
    if s.integer("ceil_mode") and not s.text("auto_pad", "NOTSET").startswith("SAME"):
        attrs["pads"] = _filled_up(sizes, kernel, attrs)
    attrs |= {"kernel_shape": kernel, "ceil_mode": 0, "count_include_pad": 1}
    if len(kernel) not in (1, 2):
        raise RejectedError(f"{len(kernel)} spatial axes; 1 and 2 are supported")
    p = _norm_order(s)
    mean = s.emit("AveragePool", (_power(s, x, p),), attrs, "mean")
    taps = s.conversion.constant(f"{s.node.name}/taps", np.array(prod(kernel), np.float32))
    return _root(s, s.emit("Mul", (mean, taps), None, "sum" if p > 1 else ""), p)


def _filled_up(
    sizes: tuple[int, ...], kernel: tuple[int, ...], attrs: Mapping[str, Attr]
) -> tuple[int, ...]:
    """Pads with which windows that start inside and reach beyond the end fit in."""
    strides, dilations, pads = (attrs[k] for k in ("strides", "dilations", "pads"))
    assert isinstance(strides, tuple)
    assert isinstance(dilations, tuple)
    assert isinstance(pads, tuple)
    rank = len(sizes)
    ends = []
    for i, (n, k, step, d) in enumerate(zip(sizes, kernel, strides, dilations, strict=True)):
        begin, end = int(pads[i]), int(pads[rank + i])
        window = (k - 1) * int(d) + 1
        windows = -(-(begin + n + end - window) // int(step)) + 1
        if (windows - 1) * int(step) >= begin + n:  # it would lie in the padding alone
            windows -= 1
        ends.append(max(end, (windows - 1) * int(step) + window - begin - n))
    return (*(int(b) for b in pads[:rank]), *ends)


def _global_lp_pool(s: Site) -> Value:
    x, p = s.value(0), _norm_order(s)
    n, c, *sizes = x.type.shape
    if not sizes:
        raise RejectedError(f"input {x.type} has no spatial axis")
    rows, last = s.reshape(x, (n, c, prod(sizes)), "rows"), (n, c, *(1 for _ in sizes))
    if p <= 2:
        y = s.emit("ReduceL1" if p == 1 else "ReduceL2", (rows,), {"axis": 2}, "norm")
        return s.reshape(y, last)
    attrs: dict[str, Attr] = {"axes": (2,), "keepdims": 0}
    total = s.emit("ReduceSum", (_power(s, rows, p),), attrs, "sum")
    return _root(s, s.reshape(total, last, "total"), p)


def _norm_order(s: Site) -> int:
    p = s.integer("p", 2)
    if p < 1:
        raise RejectedError(f"p is {p}; only norms of order 1 and above are supported")
    return p


def _power(s: Site, x: Value, p: int) -> Value:
    """|x|**p."""
    if p == 2:
        return s.emit("Mul", (x, x), None, "square")
    absolute = s.emit("Abs", (x,), None, "absolute")
    if p == 1:
        return absolute
    exponent = s.conversion.constant(f"{s.node.name}/p", np.array(p, np.float32))
    return s.emit("Pow", (absolute, exponent), None, "power")


def _root(s: Site, x: Value, p: int) -> Value:
    """x**(1 / p) of x >= 0; the Relu, which changes nothing, stops the infinite slope at 0."""
    if p == 1:
        return x
    x = s.emit("Relu", (x,), None, "positive")
    if p == 2:
        return s.emit("Sqrt", (x,))
    root = s.conversion.constant(f"{s.node.name}/1_p", np.array(1 / p, np.float32))
    return s.emit("Pow", (x, root))


def _conv_transpose(s: Site) -> Value:
    x, w = s.value(0), s.value(1)
    sizes, kernel = x.type.shape[2:], w.type.shape[2:]
    rank = len(sizes)
    if rank not in (1, 2):
        raise RejectedError(f"{rank} spatial axes; 1 and 2 are supported")
    if len(kernel) != rank:
        raise RejectedError(f"input {x.type} and weight {w.type} differ in rank")
    stated = s.integers("kernel_shape", kernel)
    if stated != kernel:
        raise RejectedError(f"kernel_shape {stated} is not the weight's {kernel}")
    strides = s.integers("strides", (1,) * rank)
    dilations = s.integers("dilations", (1,) * rank)
    extra = s.integers("output_padding", (0,) * rank)
    pads = s.integers("pads", (0,) * (2 * rank))
    if not len(strides) == len(dilations) == len(extra) == len(pads) // 2 == rank:
        raise RejectedError(
            f"strides, dilations, output_padding or pads do not fit {rank} spatial axes"
        )
    mode = s.text("auto_pad", "NOTSET")
    if mode not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise RejectedError(f"auto_pad {mode} is not known")
    same = mode.startswith("SAME")
    if same or s.has("output_shape"):
        default = tuple(n * k for n, k in zip(sizes, strides, strict=True))
        wanted = s.integers("output_shape", default)[-rank:]
        begins, ends, more = [], [], []
        for i, want in enumerate(wanted):
            whole = strides[i] * (sizes[i] - 1) + extra[i] + (kernel[i] - 1) * dilations[i] + 1
            cut = max(0, whole - want)
            begins.append(cut // 2 if mode == "SAME_UPPER" else cut - cut // 2)
            ends.append(cut - begins[-1])
            more.append(extra[i] + max(0, want - whole))
        pads, extra = (*begins, *ends), tuple(more)
    elif mode == "VALID":
        pads = (0,) * (2 * rank)
    attrs: dict[str, Attr] = {"strides": strides, "dilations": dilations, "pads": pads}
    attrs |= {"output_padding": extra, "group": s.integer("group", 1)}
    return s.emit("ConvTranspose", (x, w, s.optional(2)), attrs)


#: Taps of a MaxPool: its gradient names the one that holds the maximum in a byte.
_MAX_TAPS = 256


def _global_max_pool(s: Site) -> Value:
    """One window over everything, or windows over the maxima of windows where they are too large.

    The first of equal maxima is the first in row-major order in either case.
    """
    y = s.value(0)
    rank = len(y.type.shape) - 2
    if rank not in (1, 2):
        raise RejectedError(f"{rank} spatial axes; 1 and 2 are supported")
    while True:
        sizes = y.type.shape[2:]
        last = prod(sizes) <= _MAX_TAPS
        # along the last axis first, so that rows stay in order
        kernel = sizes if last else (*(1,) * (rank - 1), min(sizes[-1], _MAX_TAPS))
        if not last and sizes[-1] == 1:
            kernel = (min(sizes[0], _MAX_TAPS), 1)
        attrs: dict[str, Attr] = {"kernel_shape": kernel, "strides": kernel, "ceil_mode": 1}
        y = s.emit("MaxPool", (y,), attrs, "" if last else f"part{'x'.join(map(str, sizes))}")
        if last:
            return y


def _lrn(s: Site) -> Value:
    """Local response normalization (Krizhevsky et al. 2012)."""
    attrs: dict[str, Attr] = {
        "size": s.integer("size"),
        "alpha": s.real("alpha", 1e-4),
        "beta": s.real("beta", 0.75),
        "bias": s.real("bias", 1.0),
    }
    return s.emit("LRN", (s.value(0),), attrs)


SPATIAL_RULES: dict[str, Rule] = {
    "AveragePool": _pool("AveragePool"),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "GlobalAveragePool": lambda s: s.emit("GlobalAveragePool", (s.value(0),)),
    "GlobalLpPool": _global_lp_pool,
    "GlobalMaxPool": _global_max_pool,
    "LRN": _lrn,
    "LpPool": _lp_pool,
    "MaxPool": _pool("MaxPool"),
    "QLinearConv": _qlinear_conv,
}
