"""ONNX operators of sliding windows, of spatial axes and of neighbouring channels, in IR nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from .graph import Attr, Value
from .onnx_convert import RejectedError, Rule, Site
from .onnx_quantize import qlinear_operands, qlinear_result
from .provenance import Moved

Sizes = tuple[int, ...]


def _geometry(s: Site, sizes: tuple[int, ...], kernel: tuple[int, ...]) -> dict[str, Sizes]:
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
    x, w = s.value(0), s.value(1)
    if len(x.type.shape) == len(w.type.shape) == 5:
        return _conv_of_volumes(s, x, w)
    return _convolution(s, x, w, s.optional(2))


def _conv_of_volumes(s: Site, x: Value, w: Value) -> Value:
    """A convolution over three axes: one over two of them, of the planes that a window holds.

    The planes of each channel stand beside each other, as the weight has them; windows along the
    first axis are samples.
    """
    filters, depth, taps, *kernel = w.type.shape
    stated = s.integers("kernel_shape", w.type.shape[2:])
    if stated != w.type.shape[2:]:
        raise RejectedError(f"kernel_shape {stated} is not the weight's {w.type.shape[2:]}")
    geometry = _geometry(s, x.type.shape[2:], w.type.shape[2:])
    (step, *strides), (dilation, *dilations) = geometry["strides"], geometry["dilations"]
    pads = geometry["pads"]
    if pads[0] or pads[3]:
        begins, ends = (0, 0, pads[0], 0, 0), (0, 0, pads[3], 0, 0)
        x = s.emit("Pad", (x,), {"begins": begins, "ends": ends, "value": 0.0}, "padded")
    n, c, size, *plane = x.type.shape
    windows = (size - (taps - 1) * dilation - 1) // step + 1
    if windows < 1:
        raise RejectedError(f"a window of {taps} planes does not fit {x.type}")
    x = s.emit("Transpose", (x,), {"perm": (0, 2, 1, 3, 4)}, "planes")
    planes = []
    for tap in range(taps):
        cut: dict[str, Attr] = {
            "starts": (0, tap * dilation, 0, 0, 0),
            "sizes": (n, windows, c, *plane),
            "steps": (1, step, 1, 1, 1),
        }
        part = x if windows == size else s.emit("Slice", (x,), cut, f"plane{tap}")
        planes.append(s.reshape(part, (n * windows, c, 1, *plane), f"tap{tap}"))
    x = planes[0] if taps == 1 else s.emit("Concat", planes, {"axis": 2}, "window")
    x = s.reshape(x, (n * windows, c * taps, *plane), "samples")
    shape = (filters, depth * taps, *kernel)
    if s.data(1) is None:
        w = s.reshape(w, shape, "weight")
    else:
        w = s.derived(1, "planes", Moved(lambda data: data.reshape(shape)))
    attrs: dict[str, Attr] = {"strides": tuple(strides), "dilations": tuple(dilations)}
    attrs |= {"pads": (*pads[1:3], *pads[4:]), "group": s.integer("group", 1)}
    y = s.emit("Conv", (x, w, s.optional(2)), attrs, "convolved")
    y = s.reshape(y, (n, windows, *y.type.shape[1:]), "volumes")
    return s.emit("Transpose", (y,), {"perm": (0, 2, 1, 3, 4)})


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
    group: dict[str, Attr] = {"group": s.integer("group", 1)}
    return s.emit("Conv", (x, w, bias), group | _geometry(s, x.type.shape[2:], kernel))


def _pool(op: str) -> Rule:
    def rule(s: Site) -> Value:
        if s.wanted(1):
            raise RejectedError("the index output is not supported")
        x, kernel = s.value(0), s.integers("kernel_shape")
        if len(x.type.shape) < 3:
            raise RejectedError(f"input {x.type} has no spatial axis")
        attrs: dict[str, Attr] = {"kernel_shape": kernel}
        attrs |= _geometry(s, x.type.shape[2:], kernel)
        same = s.text("auto_pad", "NOTSET").startswith("SAME")
        attrs["ceil_mode"] = 0 if same else s.integer("ceil_mode")
        if op == "AveragePool":
            attrs["count_include_pad"] = s.integer("count_include_pad")
        return s.emit(op, (x,), attrs) if len(kernel) < 3 else _pool_merged(s, op, x, attrs)

    return rule


def _pool_merged(s: Site, op: str, x: Value, attrs: dict[str, Attr]) -> Value:
    """A pool of three axes and more; neighbours that it leaves alone are seen as one.

    PyTorch writes the sums of LocalResponseNorm as such a pool over channels. Where that leaves too
    many axes, the last ones are pooled first: a maximum is one of maxima, of equal ones the first
    in row-major order, and a mean one of means, as each axis has its own count of elements.
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
        moving = [i - 1 for i, alone in enumerate(stays) if not alone]
        half = len(moving) // 2
        x = _pool_merged(s, op, x, _only(attrs, moving[half:]))
        return _pool_merged(s, op, x, _only(attrs, moving[:half]))
    merged = (shape[0], *(prod(shape[1 + i] for i in g) for g in groups))
    *lists, begins, ends = zip(*(columns[g[0] - 1] for g in groups[1:]), strict=True)
    attrs = attrs | dict(zip(window, lists, strict=True)) | {"pads": (*begins, *ends)}
    over = "x".join(str(i - 1) for i, alone in enumerate(stays) if not alone)
    y = s.emit(op, (s.reshape(x, merged, f"merged{over}"),), attrs, f"pooled{over}")
    sizes = {g[0]: n for g, n in zip(groups[1:], y.type.shape[2:], strict=True) if len(g) == 1}
    result = (shape[0], *(sizes.get(i, n) for i, n in enumerate(shape[1:])))
    return s.reshape(y, result, f"axes{over}")


def _only(attrs: Mapping[str, Attr], axes: Sequence[int]) -> dict[str, Attr]:
    """A pool that leaves all spatial axes but some alone."""
    result = dict(attrs)
    for key, value in attrs.items():
        if isinstance(value, tuple):
            alone = 0 if key == "pads" else 1
            rank = len(value) // 2 if key == "pads" else len(value)
            result[key] = tuple(v if i % rank in axes else alone for i, v in enumerate(value))
    return result


def _lp_pool(s: Site) -> Value:
    """LpPool: the root of the sum of powers over each window, which is its mean times its taps."""
    x, kernel = s.value(0), s.integers("kernel_shape")
    sizes = x.type.shape[2:]
    if not sizes:
        raise RejectedError(f"input {x.type} has no spatial axis")
    geometry = _geometry(s, sizes, kernel)
    if s.integer("ceil_mode") and not s.text("auto_pad", "NOTSET").startswith("SAME"):
        geometry["pads"] = _filled_up(sizes, kernel, geometry)
    attrs: dict[str, Attr] = {"kernel_shape": kernel, "ceil_mode": 0, "count_include_pad": 1}
    attrs |= geometry
    p = _norm_order(s)
    powers = _power(s, x, p)
    if len(kernel) < 3:
        mean = s.emit("AveragePool", (powers,), attrs, "mean")
    else:
        mean = _pool_merged(s, "AveragePool", powers, attrs)
    taps = s.conversion.constant(f"{s.node.name}/taps", np.array(prod(kernel), np.float32))
    return _root(s, s.emit("Mul", (mean, taps), None, "sum" if p > 1 else ""), p)


def _filled_up(
    sizes: Sizes, kernel: Sizes, geometry: Mapping[str, Sizes]
) -> Sizes:
    """Pads with which windows that start inside and reach beyond the end fit in."""
    strides, dilations, pads = (geometry[k] for k in ("strides", "dilations", "pads"))
    rank = len(sizes)
    ends = []
    for i, (n, k, step, d) in enumerate(zip(sizes, kernel, strides, dilations, strict=True)):
        begin, end, window = pads[i], pads[rank + i], (k - 1) * d + 1
        windows = -(-(begin + n + end - window) // step) + 1
        if (windows - 1) * step >= begin + n:  # it would lie in the padding alone
            windows -= 1
        ends.append(max(end, (windows - 1) * step + window - begin - n))
    return (*pads[:rank], *ends)


def _global_lp_pool(s: Site) -> Value:
    x, p = s.value(0), _norm_order(s)
    if len(x.type.shape) < 3:
        raise RejectedError(f"input {x.type} has no spatial axis")
    n, c, *sizes = x.type.shape
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
