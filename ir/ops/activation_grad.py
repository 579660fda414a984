"""What the gradients of piecewise linear activations are made of: packed masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType
from ..opdef import CKernel, CostClass, OpDef, Sample, Work, array, f32_operand, operand, register
from .elementwise import count_params

SOURCE = "odtplan_activation"
#: Shapes of the samples: several axes, an odd count, whole bytes of bits, a scalar.
SHAPES: tuple[tuple[int, ...], ...] = ((2, 3, 3, 3), (11,), (1, 8), ())


def scalar(x: Array, value: float) -> np.generic:
    """An attribute as a scalar of the data's own dtype, rounded once like the C parameter."""
    return x.dtype.type(value)  # type: ignore[no-any-return]


def pack_bits(flags: Array) -> Array:
    """A ``bits`` tensor: 8 elements per byte, the first in the lowest bit, zeros at the end."""
    return np.packbits(flags.reshape(-1), bitorder="little")


def unpack_bits(bits: Array, shape: tuple[int, ...]) -> Array:
    """The flags of a ``bits`` tensor of the given shape as a boolean array."""
    flags = np.unpackbits(bits, count=math.prod(shape), bitorder="little")
    return flags.reshape(shape).astype(np.bool_)


def work(cost_class: CostClass) -> Callable[[Node], Work]:
    """One unit of ``cost_class`` per element of the result."""
    return lambda node: Work(cost_class, node.out.type.size)


def _register_mask(
    name: str, flags: Callable[[Node, Array], Array], attrs: tuple[str, ...], symbol: str
) -> None:
    struct = f"{symbol}_t" if attrs else "odtplan_count_t"

    def params(node: Node) -> dict[str, Attr]:
        return count_params(node) | {a: node.float_attr(a) for a in attrs}

    def samples() -> Iterator[Sample]:
        values: dict[str, Attr] = dict(zip(attrs, (-0.5, 0.5), strict=False))
        return iter([Sample((TensorType(s),), values) for s in SHAPES])

    register(
        OpDef(
            name=name,
            infer=lambda node: [f32_operand(node, 0).with_dtype("bits")],
            kernel=lambda node, inputs: [pack_bits(flags(node, array(inputs, 0)))],
            work=work("elementwise"),
            c=CKernel(f"{symbol}_f32", struct, SOURCE, params),
            samples=samples,
        )
    )


def _inside(node: Node, y: Array) -> Array:
    low, high = (scalar(y, node.float_attr(k)) for k in ("min", "max"))
    return np.asarray((y > low) & (y < high))


_register_mask("ReluMask", lambda _, y: np.asarray(y > 0), (), "odtplan_relu_mask")
_register_mask("ClipMask", _inside, ("min", "max"), "odtplan_clip_mask")


def _infer_mask_mul(node: Node) -> list[TensorType]:
    dy, mask = f32_operand(node, 0), operand(node, 1)
    if mask != dy.with_dtype("bits"):
        raise GraphError(f"mask {mask} does not fit the gradient {dy}")
    return [dy]


def _mask_mul(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy = array(inputs, 0)
    mask = unpack_bits(array(inputs, 1), dy.shape)
    inside, outside = (node.float_attr(k) for k in ("inside", "outside"))
    zero = scalar(dy, 0)
    with np.errstate(all="ignore"):
        # A factor 0 selects zero instead of multiplying, so that it also stops inf and nan.
        on = dy * scalar(dy, inside)
        off = dy * scalar(dy, outside) if outside != 0 else zero
    return [np.asarray(np.where(mask, on, off))]


def _mask_params(node: Node) -> dict[str, Attr]:
    return count_params(node) | {k: node.float_attr(k) for k in ("inside", "outside")}


register(
    OpDef(
        name="MaskMul",
        infer=_infer_mask_mul,
        kernel=_mask_mul,
        work=work("elementwise"),
        c=CKernel("odtplan_mask_mul_f32", "odtplan_mask_mul_t", SOURCE, _mask_params),
        samples=lambda: iter(
            [
                Sample((TensorType(s), TensorType(s, "bits")), {"inside": a, "outside": b})
                for s in SHAPES
                for a, b in ((1.0, 0.0), (1.0, 0.1), (0.2, 0.0))
            ]
        ),
        inplace=(0,),
    )
)
