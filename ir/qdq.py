"""Quantization parameters of a model file: scale, zero point and axis beside the stored tensor.

8-bit tensors become i8 (uint8 is shifted by 128), int32 stands for biases. Everything else (int4,
float8, 16 bits, blocks) is named as unsupported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .graph import Array
from .provenance import Dequantized
from .quantization import Quantization

#: Stored dtypes that can be read, and what to subtract from a stored value to make it i8.
STORED = {"int8": 0, "uint8": 128, "int32": 0}


@dataclass(frozen=True)
class Stored:
    """How an 8-bit value of the file relates to real numbers.

    Attributes:
        quant: Its meaning as i8.
        shift: 128 if the file has uint8; i8 = file - shift.
    """

    quant: Quantization
    shift: int = 0

    def real(self, stored: float) -> float:
        """Real number of a value as the file stores it."""
        return float((stored - self.shift - self.quant.zero_point) * self.quant.scale[0])


class QuantizationError(ValueError):
    """Quantization parameters that can't be used; the text is the reason."""


def check_stored(dtype: np.dtype[Any] | str, what: str) -> str:
    """Name of a stored dtype.

    Raises:
        QuantizationError: Not int8, uint8 or int32.
    """
    name = dtype if isinstance(dtype, str) else dtype.name
    if name not in STORED:
        raise QuantizationError(
            f"{what} is {name}; only int8 and uint8 (and int32 for biases) are supported"
        )
    return name


def read_quantization(
    attrs: Mapping[str, Any], dtype: str, shape: tuple[int, ...], scale: Array, zero: Array | None
) -> tuple[Quantization | None, Array, Array]:
    """Parameters of a QuantizeLinear or DequantizeLinear.

    Args:
        attrs: Attributes ``axis`` (default 1) and ``block_size``.
        dtype: Name of the stored dtype.
        shape: Shape of the tensor.
        scale: One number, or one per index of the axis.
        zero: Like ``scale``, of the stored dtype; None: 0.

    Returns:
        The meaning as i8, None where i8 can't hold it (int32, or a zero point per channel that is
        not 0); scales and zero points (int64) in a shape that broadcasts against the tensor.

    Raises:
        QuantizationError: Scales that are not positive and finite, parameters that fit neither each
            other nor the tensor, or a dtype that is not supported.
    """
    check_stored(dtype, "the quantized tensor")
    if attrs.get("block_size") or scale.ndim > 1:
        raise QuantizationError("has scales per block; quantize per tensor or per channel")
    if scale.dtype != np.float32:
        raise QuantizationError(f"its scale is {scale.dtype}; only float32 is supported")
    bad = ~(np.isfinite(scale) & (scale > 0))
    if bad.any():
        first = float(scale.reshape(-1)[np.flatnonzero(bad.reshape(-1))[0]])
        count = f" ({int(bad.sum())} of {scale.size} are so)" if scale.size > 1 else ""
        raise QuantizationError(f"its scale {first:g} is not a positive finite number{count}")
    if zero is not None and zero.dtype.name != dtype:
        info = np.iinfo(dtype)
        text = f"its zero point is {zero.dtype} for a tensor of {dtype}"
        if zero.dtype.kind in "iu" and (wrong := zero[(zero < info.min) | (zero > info.max)]).size:
            text = f"its zero point {int(wrong.flat[0])} is out of range of {dtype}"
        raise QuantizationError(text)
    if zero is not None and zero.size != scale.size:
        raise QuantizationError(f"it has {scale.size} scales, but {zero.size} zero points")
    zeros = np.zeros(scale.shape, np.int64) if zero is None else zero.astype(np.int64)
    axis: int | None = None
    if scale.size > 1:
        axis = int(attrs.get("axis", 1))
        if not -len(shape) <= axis < len(shape):
            raise QuantizationError(f"axis {axis} does not exist in a tensor of rank {len(shape)}")
        axis %= len(shape)
        if shape[axis] != scale.size:
            raise QuantizationError(
                f"{scale.size} scales do not fit axis {axis} of length {shape[axis]}"
            )
    form = tuple(-1 if i == axis else 1 for i in range(len(shape))) if axis is not None else ()
    return (
        None if dtype == "int32" else _as_i8(scale, zeros - STORED[dtype], axis),
        scale.reshape(form),
        zeros.reshape(form),
    )


def _as_i8(scale: Array, zeros: Array, axis: int | None) -> Quantization | None:
    if axis is None:
        quant = Quantization((float(scale.reshape(())),), int(zeros.reshape(())))
        return quant
    if zeros.any():
        return None
    return Quantization(tuple(map(float, scale)), 0, axis)


def dequantization(
    attrs: Mapping[str, Any], stored: Array, scale: Array, zero: Array | None
) -> tuple[Dequantized, Quantization | None]:
    """What gives a stored constant its real values, and its meaning.

    Raises:
        QuantizationError: See ``read_quantization``.
    """
    dtype = check_stored(stored.dtype, "the quantized tensor")
    quant, scales, zeros = read_quantization(attrs, dtype, stored.shape, scale, zero)
    return Dequantized(scales, zeros), quant


def moved(quant: Quantization, op: str, attrs: Mapping[str, Any], rank: int) -> Quantization | None:
    """Meaning of a constant after an operator that only moves data; None if it is lost."""
    if quant.axis is None and op in ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity"):
        return quant
    if op == "Identity":
        return quant
    if op == "Transpose":
        return quant.permuted(tuple(attrs.get("perm", tuple(range(rank))[::-1])))
    return None
