"""How real numbers are stored as 8-bit integers, and the fixed-point arithmetic between scales.

``real = scale * (stored - zero_point)``. Activations have one scale and any zero point; weights are
symmetric (zero point 0), with one scale or one per index of ``axis``. Between scales an int32
accumulator is multiplied by a real factor, held as a Q31 multiplier and a shift::

    y = clamp(((acc * multiplier + 2**(shift - 1)) >> shift) + zero_point)

with a 64-bit product, an arithmetic shift and therefore one single rounding, to nearest, ties up.
NumPy and C do just this, so results are equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp, isfinite, isinf
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import GraphError

if TYPE_CHECKING:
    from .graph import Array

#: Range of a stored value.
LOW, HIGH = -128, 127
#: Largest shift of a fixed-point factor: the rounding constant and the product fit 64 bits.
MAX_SHIFT = 62


@dataclass(frozen=True)
class Quantization:
    """The meaning of an i8 tensor.

    Attributes:
        scale: Real value of one step: one number, or one per index of ``axis``.
        zero_point: The stored value that means 0; in -128..127, and 0 if there is an axis.
        axis: Axis that the scales run along; None: one scale for the whole tensor.
    """

    scale: tuple[float, ...]
    zero_point: int = 0
    axis: int | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            GraphError: A scale is not a positive finite number, the zero point is out of range, or
                scales and axis do not fit each other.
        """
        if not self.scale:
            raise GraphError("a quantization has no scale")
        for i, s in enumerate(self.scale):
            if not (isfinite(s) and s > 0.0):
                where = f" of index {i}" if len(self.scale) > 1 else ""
                raise GraphError(f"scale {s}{where} is not a positive finite number")
        if not LOW <= self.zero_point <= HIGH:
            raise GraphError(f"zero point {self.zero_point} is not in {LOW}..{HIGH}")
        if self.axis is None and len(self.scale) != 1:
            raise GraphError(f"{len(self.scale)} scales, but no axis that they run along")
        if self.axis is not None and (self.axis < 0 or self.zero_point != 0):
            raise GraphError(
                f"axis {self.axis}, zero point {self.zero_point}: scales per channel need an axis"
                " >= 0 and the zero point 0"
            )

    def scales(self, channels: int) -> NDArray[np.float64]:
        """The scales, one per channel."""
        return np.broadcast_to(np.array(self.scale, np.float64), (channels,))

    def factor(self, rank: int) -> NDArray[np.float64]:
        """The scales in a shape that broadcasts against a tensor of ``rank`` axes."""
        shape = [1] * rank
        if self.axis is not None:
            shape[self.axis] = len(self.scale)
        return np.array(self.scale, np.float64).reshape(shape if self.axis is not None else ())

    def fits(self, shape: tuple[int, ...]) -> bool:
        """The scales fit a tensor of this shape."""
        return self.axis is None or (
            self.axis < len(shape) and shape[self.axis] == len(self.scale)
        )

    def quantize(self, real: Array) -> NDArray[np.int8]:
        """Stored values: rounded to nearest, ties to even (as QuantizeLinear), saturated."""
        steps = np.rint(np.asarray(real, np.float64) / self.factor(np.ndim(real)))
        return np.asarray(np.clip(steps + self.zero_point, LOW, HIGH), np.int8)

    def dequantize(self, stored: Array) -> NDArray[np.float32]:
        """Real values, in one fp32 product each (as DequantizeLinear)."""
        steps = (np.asarray(stored).astype(np.int32) - self.zero_point).astype(np.float32)
        return np.asarray(steps * self.factor(np.ndim(stored)).astype(np.float32))

    def bounds(self) -> tuple[float, float]:
        """Smallest and largest real value of a tensor with one scale."""
        return (LOW - self.zero_point) * self.scale[0], (HIGH - self.zero_point) * self.scale[0]

    def permuted(self, perm: tuple[int, ...]) -> Quantization:
        """The meaning of the tensor after a transposition."""
        if self.axis is None:
            return self
        return Quantization(self.scale, self.zero_point, perm.index(self.axis))

    def __str__(self) -> str:
        """As ``0.0235+3`` or ``16 scales on axis 0``."""
        if self.axis is not None:
            return f"{len(self.scale)} scales on axis {self.axis}"
        return f"{self.scale[0]:.6g}{self.zero_point:+d}"


def fixed_point(real: float) -> tuple[int, int]:
    """A positive factor as ``multiplier / 2**shift``, relative error at most 2**-31.

    Factors below 2**-32 keep the largest shift and lose bits of the multiplier: they make less than
    half a step of any int32 accumulator.

    Returns:
        The multiplier, 0 <= m < 2**31, and the shift, 1 <= s <= 62.

    Raises:
        GraphError: Not a finite number >= 0, or 2**30 and more.
    """
    if real < 0.0 or real != real or isinf(real):
        raise GraphError(f"factor {real} between scales is not a finite number >= 0")
    if real == 0.0:
        return 0, 1
    fraction, exponent = frexp(real)  # fraction in [0.5, 1)
    multiplier, shift = round(fraction * 2**31), 31 - exponent
    if multiplier == 2**31:
        multiplier, shift = 2**30, shift - 1
    if shift > MAX_SHIFT:
        multiplier, shift = round(real * 2.0**MAX_SHIFT), MAX_SHIFT
    if shift < 1:
        raise GraphError(f"factor {real:.6g} between scales is 2**30 or more")
    return multiplier, shift


def fixed_points(reals: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """``fixed_point`` of each element: multipliers and shifts."""
    pairs = [fixed_point(float(r)) for r in reals.reshape(-1)]
    multipliers = np.array([m for m, _ in pairs], np.int32).reshape(reals.shape)
    return multipliers, np.array([s for _, s in pairs], np.int32).reshape(reals.shape)


def rescale(acc: NDArray[Any], multiplier: Array, shift: Array) -> NDArray[np.int64]:
    """``(acc * multiplier + 2**(shift - 1)) >> shift`` in 64 bits, elementwise with broadcasting.

    Args:
        acc: int32 accumulators (or sums of products that fit 64 bits together with the multiplier).
        multiplier: From ``fixed_point``.
        shift: From ``fixed_point``.
    """
    s = np.asarray(shift).astype(np.int64)
    product = acc.astype(np.int64) * np.asarray(multiplier).astype(np.int64)
    return np.asarray((product + (np.int64(1) << (s - 1))) >> s)
