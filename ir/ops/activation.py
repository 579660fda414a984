"""Piecewise linear activations, with gradients written for memory.

They keep one bit per element for backward. Where the RESULT tells it, the mask is computed from
that, right after the node, so that the activation can run in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..axes import same_axes
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Vjp, array, register
from .activation_grad import SHAPES, SOURCE, scalar, work
from .elementwise import count_params, infer_like

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder


def _register(
    name: str,
    kernel: Callable[[Node, Array], Array],
    vjp: Vjp,
    samples: Sequence[Sample],
    *,
    attrs: tuple[str, ...] = (),
    check: Callable[[Node], None] = lambda _: None,
) -> None:
    """Register a unary activation; the C struct is ``count`` and then ``attrs``."""
    symbol = f"odtplan_{name.lower()}"
    struct = f"{symbol}_t" if attrs else "odtplan_count_t"

    def infer(node: Node) -> list[TensorType]:
        check(node)
        return infer_like(node)

    def params(node: Node) -> dict[str, Attr]:
        return count_params(node) | {a: node.float_attr(a) for a in attrs}

    def run(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
        with np.errstate(all="ignore"):
            return [np.asarray(kernel(node, array(inputs, 0)))]

    register(
        OpDef(
            name=name,
            infer=infer,
            kernel=run,
            work=work("elementwise"),
            c=CKernel(f"{symbol}_f32", struct, SOURCE, params),
            samples=lambda: iter(samples),
            vjp=vjp,
            inplace=(0,),
            axes=same_axes,
        )
    )


def _masked(
    builder: GradBuilder, dy: Value, mask: Value, inside: float, outside: float
) -> list[Value | None]:
    attrs: dict[str, Attr] = {"inside": inside, "outside": outside}
    return [builder.add("MaskMul", (dy, mask), attrs, suffix="grad")]


# --- Relu, LeakyRelu: the sign of the result is the sign of the operand --------------------------


def _vjp_relu(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    if not need[0]:
        return [None]
    return _masked(builder, dy, builder.aux("ReluMask", (node.out,), suffix="mask"), 1.0, 0.0)


def _leaky_relu(node: Node, x: Array) -> Array:
    return np.where(x < 0, x * scalar(x, node.float_attr("alpha")), x)


def _vjp_leaky_relu(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    if not need[0]:
        return [None]
    mask = builder.aux("ReluMask", (node.out,), suffix="mask")
    return _masked(builder, dy, mask, 1.0, node.float_attr("alpha"))


def _check_leaky_relu(node: Node) -> None:
    alpha = node.float_attr("alpha")
    if not 0 <= alpha < math.inf:  # below 0 the result's sign would not tell the operand's
        raise GraphError(f"alpha = {alpha:g}; only finite alpha >= 0 is supported")


_KINK_AT_0 = [Sample((TensorType(s),), kinks=(0.0,), gap=1e-2) for s in SHAPES]

_register("Relu", lambda _, x: np.where(x < 0, scalar(x, 0), x), _vjp_relu, _KINK_AT_0)
_register(
    "LeakyRelu",
    _leaky_relu,
    _vjp_leaky_relu,
    [Sample(s.types, {"alpha": 0.1}, kinks=s.kinks, gap=s.gap) for s in _KINK_AT_0],
    attrs=("alpha",),
    check=_check_leaky_relu,
)


# --- Shrink ---------------------------------------------------------------------------------------


def _shrink(node: Node, x: Array) -> Array:
    """Numbers beyond ``lambd`` come ``bias`` closer to zero, others become zero; NaN stays."""
    lambd, bias = (scalar(x, node.float_attr(k)) for k in ("lambd", "bias"))
    size = np.abs(x)
    kept = np.where(x > lambd, x - bias, np.where(size > lambd, x + bias, x))
    return np.where(size <= lambd, scalar(x, 0), kept)


def _vjp_shrink(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    """0 strictly between the bounds, else 1: at a bound one of the subgradients."""
    x, lambd = node.inputs[0], node.float_attr("lambd")
    assert x is not None
    if not need[0]:
        return [None]
    attrs: dict[str, Attr] = {"min": -lambd, "max": lambd}
    return _masked(builder, dy, builder.aux("ClipMask", (x,), attrs, suffix="mask"), 0.0, 1.0)


def _check_shrink(node: Node) -> None:
    lambd, bias = node.float_attr("lambd"), node.float_attr("bias")
    if not (0 <= lambd < math.inf and math.isfinite(bias)):
        raise GraphError(f"lambd = {lambd:g}, bias = {bias:g}: give finite ones, lambd >= 0")


_register(
    "Shrink",
    _shrink,
    _vjp_shrink,
    [
        Sample(
            (TensorType(s),), {"lambd": lambd, "bias": bias}, kinks=(-lambd, lambd), gap=1e-2
        )
        for s in SHAPES
        for lambd, bias in ((0.5, 0.0), (0.5, 0.5), (1.5, -0.25))
    ],
    attrs=("lambd", "bias"),
    check=_check_shrink,
)


# --- Abs, ThresholdedRelu -------------------------------------------------------------------------


def _vjp_abs(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    """1 above 0, else -1: at 0 itself one of the subgradients, where torch.abs has 0."""
    x = node.inputs[0]
    assert x is not None
    if not need[0]:
        return [None]
    return _masked(builder, dy, builder.aux("ReluMask", (x,), suffix="mask"), 1.0, -1.0)


def _vjp_thresholded_relu(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    x, alpha = node.inputs[0], node.float_attr("alpha")
    assert x is not None
    if not need[0]:
        return [None]
    if alpha >= 0:
        mask = builder.aux("ReluMask", (node.out,), suffix="mask")
    else:  # a result of 0 may be an operand of 0, which is above alpha
        attrs: dict[str, Attr] = {"min": alpha, "max": math.inf}
        mask = builder.aux("ClipMask", (x,), attrs, suffix="mask")
    return _masked(builder, dy, mask, 1.0, 0.0)


_register("Abs", lambda _, x: np.where(x <= 0, scalar(x, 0) - x, x), _vjp_abs, _KINK_AT_0)
_register(
    "ThresholdedRelu",
    lambda node, x: np.where(x <= scalar(x, node.float_attr("alpha")), scalar(x, 0), x),
    _vjp_thresholded_relu,
    [
        Sample((TensorType(s),), {"alpha": alpha}, kinks=(alpha,), gap=1e-2)
        for s in SHAPES
        for alpha in (0.3, 0.0, -0.5)
    ],
    attrs=("alpha",),
)


# --- Clip, HardSigmoid: the slope is not zero where the result is strictly inside its range ------


def _clip(x: Array, low: float, high: float) -> Array:
    raised = np.where(x < scalar(x, low), scalar(x, low), x)
    return np.where(raised > scalar(x, high), scalar(x, high), raised)


def _vjp_clip(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    """1 strictly between the bounds, else 0.

    torch.clamp has slope 1 at an operand that equals a bound; the result can't tell it from a
    clipped one, and it is one point in a continuum.
    """
    if not need[0]:
        return [None]
    attrs: dict[str, Attr] = {k: node.float_attr(k) for k in ("min", "max")}
    mask = builder.aux("ClipMask", (node.out,), attrs, suffix="mask")
    return _masked(builder, dy, mask, 1.0, 0.0)


def _check_clip(node: Node) -> None:
    low, high = node.float_attr("min"), node.float_attr("max")
    if not low <= high:
        raise GraphError(f"min = {low:g} is not <= max = {high:g}")


def _hard_sigmoid(node: Node, x: Array) -> Array:
    alpha, beta = (scalar(x, node.float_attr(k)) for k in ("alpha", "beta"))
    return _clip(x * alpha + beta, 0.0, 1.0)


def _vjp_hard_sigmoid(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    if not need[0]:
        return [None]
    mask = builder.aux("ClipMask", (node.out,), {"min": 0.0, "max": 1.0}, suffix="mask")
    return _masked(builder, dy, mask, node.float_attr("alpha"), 0.0)


_CLIPS: tuple[tuple[float, float], ...] = ((0.0, 6.0), (-1.0, 0.5), (0.25, math.inf))
_register(
    "Clip",
    lambda node, x: _clip(x, node.float_attr("min"), node.float_attr("max")),
    _vjp_clip,
    [
        Sample(
            (TensorType(s),),
            {"min": low, "max": high},
            low=-2.0,
            high=8.0,
            kinks=tuple(v for v in (low, high) if math.isfinite(v)),
            gap=1e-2,
        )
        for s in SHAPES
        for low, high in _CLIPS
    ],
    attrs=("min", "max"),
    check=_check_clip,
)
_register(
    "HardSigmoid",
    _hard_sigmoid,
    _vjp_hard_sigmoid,
    [
        Sample(
            (TensorType(s),),
            {"alpha": 0.2, "beta": 0.5},
            low=-5.0,
            high=5.0,
            kinks=(-2.5, 2.5),
            gap=1e-2,
        )
        for s in SHAPES
    ],
    attrs=("alpha", "beta"),
)
