"""Gradients through the clamp of an i8 result: QClipMask, QInward.

Inside the network a gradient passes where the stored result is strictly inside its bounds, which
costs one bit per element. At its end there is no layer behind that would bring a saturated value
back: once all logits are at their bounds no gradient passes any more, and the network answers the
same for ever. There a gradient also passes where a step against it leads back inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, operand, register
from .activation_grad import pack_bits, scalar
from .qtypes import SOURCE, activation, clamp_of, i8

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

_SHAPES: tuple[tuple[int, ...], ...] = ((2, 3, 3, 3), (11,), (1, 8), ())
_BOUNDS = ((-128, 127), (-100, 90))


def through_clamp(b: GradBuilder, node: Node, dy: Value) -> Value:
    """Gradient before the clamp of a stored result; see the module docstring."""
    low, high = clamp_of(node)
    bounds: dict[str, Attr] = {"low": low, "high": high}
    if node.out in b.ends:
        return b.add("QInward", (dy, node.out), bounds, suffix="clamped")
    mask = b.aux("QClipMask", (node.out,), bounds, suffix="mask")
    return b.add("MaskMul", (dy, mask), {"inside": 1.0, "outside": 0.0}, suffix="clamped")


def _bounds(node: Node) -> tuple[int, int]:
    return node.int_attr("low"), node.int_attr("high")


def _fields(node: Node) -> dict[str, Attr]:
    low, high = _bounds(node)
    return {"count": operand(node, 0).size, "low": low, "high": high}


# -- QClipMask: y -> one bit per element, strictly inside ------------------------------------------


def _infer_mask(node: Node) -> list[TensorType]:
    return [activation(node, 0)[0].with_dtype("bits")]


def _kernel_mask(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    y, (low, high) = array(inputs, 0), _bounds(node)
    return [pack_bits((y > low) & (y < high))]


def _samples_mask() -> Iterator[Sample]:
    for shape in _SHAPES:
        for low, high in _BOUNDS:
            yield Sample((i8(shape),), {"low": low, "high": high})


register(
    OpDef(
        name="QClipMask",
        infer=_infer_mask,
        kernel=_kernel_mask,
        work=lambda node: Work("elementwise", operand(node, 0).size, dtype="i8"),
        c=CKernel("odtplan_q_clip_mask", "odtplan_q_clip_mask_t", SOURCE, _fields),
        samples=_samples_mask,
    )
)


# -- QInward: dy, y -> dy, 0 where it leads outwards from a bound ----------------------------------


def _infer_inward(node: Node) -> list[TensorType]:
    dy, (y, _) = f32_operand(node, 0), activation(node, 1)
    if dy.shape != y.shape:
        raise GraphError(f"gradient {dy} does not fit {y}")
    return [dy]


def _kernel_inward(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy, y, (low, high) = array(inputs, 0), array(inputs, 1), _bounds(node)
    zero = scalar(dy, 0)
    passes = ((y > low) | (dy < zero)) & ((y < high) | (dy > zero))
    return [np.asarray(np.where(passes, dy, zero))]


def _samples_inward() -> Iterator[Sample]:
    for shape in _SHAPES:
        for low, high in _BOUNDS:
            yield Sample((TensorType(shape), i8(shape)), {"low": low, "high": high})


register(
    OpDef(
        name="QInward",
        infer=_infer_inward,
        kernel=_kernel_inward,
        work=lambda node: Work("elementwise", operand(node, 0).size, dtype="i8"),
        c=CKernel("odtplan_q_inward", "odtplan_q_inward_t", SOURCE, _fields),
        samples=_samples_inward,
        inplace=(0,),
    )
)
