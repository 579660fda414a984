"""Elementary functions whose fp32 results are the same bits as those of the C kernels.

C libraries and NumPy disagree in the last bits of exp, log and tanh, so float32 arrays take fixed
polynomials, evaluated in a fixed order of single roundings, of which
``backends/c/kernels/odtplan_math.h`` is the twin. float64 arrays take NumPy's functions, so that
gradient checks are exact. The coefficients are minimax fits made for this project (weighted to the
relative error); the error against double is below 1 ulp for exp and log, 2 ulp for tanh, 3 ulp for
sigmoid (tests/test_ops.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..graph import Array

_F = np.float32
_F32 = NDArray[np.float32]

#: ln 2 in two parts; the high one has 9 significant bits, so its product with an exponent is exact.
_LN2_HI = _F(0.693359375)
_LN2_LO = _F(-2.12194440e-4)
_LOG2_E = _F(1.44269504)
#: 1.5 * 2**23: adding and subtracting it rounds a small float to an integer, ties to even.
_ROUND = _F(12582912.0)
#: (exp(r) - 1 - r) / r**2 on |r| <= ln(2) / 2, lowest power first.
_EXP = tuple(map(_F, (0.49999994, 0.166665196, 0.0416683927, 0.00836878084, 0.00138144649)))
#: (log(1 + f) - f + f**2 / 2) / f**3 on sqrt(1/2) - 1 <= f <= sqrt(2) - 1, lowest power first.
_LOG = tuple(
    map(
        _F,
        (
            0.333333313,
            -0.250008225,
            0.200012267,
            -0.166233569,
            0.142017618,
            -0.131601945,
            0.127615497,
            -0.0763442963,
        ),
    )
)
#: (tanh(x) / x - 1) / x**2 over x**2 on |x| < 0.625, lowest power first.
_TANH = tuple(map(_F, (-0.333332807, 0.133314416, -0.0537397116, 0.0206390787, -0.00570497848)))
_SQRT_HALF_BITS = 0x3F3504F3


def exp32(x: Array) -> Array:
    """Exponential function, overflowing to inf and underflowing gradually."""
    if x.dtype != np.float32:
        return _as_array(np.exp(x))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        clamped = np.clip(x, _F(-104.0), _F(89.0))
        n = (clamped * _LOG2_E + _ROUND) - _ROUND
        r = (clamped - n * _LN2_HI) - n * _LN2_LO
        y = (r * r) * _horner(_EXP, r) + r + _F(1.0)
        k = np.where(np.isnan(n), _F(0.0), n).astype(np.int32)
        half = k >> 1  # two factors, because 2**k itself can leave the range of normal numbers
        return _as_array((y * _power_of_two(half)) * _power_of_two(k - half))


def log32(x: Array) -> Array:
    """Natural logarithm; -inf at zero, NaN below."""
    if x.dtype != np.float32:
        return _as_array(np.log(x))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        subnormal = x < _F(1.17549435e-38)
        scaled = np.where(subnormal, x * _F(8388608.0), x).astype(np.float32)
        bits = scaled.view(np.int32)
        k = (bits - np.int32(_SQRT_HALF_BITS)) >> 23
        f = (bits - (k << 23)).astype(np.int32).view(np.float32) - _F(1.0)
        n = np.where(subnormal, k - 23, k).astype(np.float32)
        z = f * f
        y = (f * z) * _horner(_LOG, f) + n * _LN2_LO
        y = y - _F(0.5) * z
        y = (f + y) + n * _LN2_HI
        y = np.where(x == _F(0.0), _F(-np.inf), y)
        y = np.where(x < _F(0.0), _F(np.nan), y)
        finite = np.isfinite(x)
        return _as_array(np.where(finite | (x < _F(0.0)), y, x))


def tanh32(x: Array) -> Array:
    """Hyperbolic tangent."""
    if x.dtype != np.float32:
        return _as_array(np.tanh(x))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        a = np.abs(x)
        z = x * x
        small = x + (x * z) * _horner(_TANH, z)
        large = _F(1.0) - _F(2.0) / (exp32(_as_array(a + a)) + _F(1.0))
        return _as_array(np.where(a < _F(0.625), small, np.where(x < _F(0.0), -large, large)))


def sigmoid32(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow on either side."""
    if x.dtype != np.float32:
        e = np.exp(-np.abs(x))
        return _as_array(np.where(x < 0, e / (1.0 + e), 1.0 / (1.0 + e)))
    e = exp32(_as_array(-np.abs(x)))
    with np.errstate(under="ignore", invalid="ignore"):
        d = e + _F(1.0)
        return _as_array(np.where(x < _F(0.0), e / d, _F(1.0) / d))


def sqrt32(x: Array) -> Array:
    """Square root, correctly rounded as IEEE 754 asks; NaN below zero."""
    with np.errstate(invalid="ignore"):
        return _as_array(np.sqrt(x))


def _horner(coefficients: tuple[np.float32, ...], x: Array) -> Any:
    y: Any = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        y = y * x + c
    return y


def _power_of_two(k: Any) -> _F32:
    return np.asarray((k + 127) << 23, np.int32).view(np.float32)


def _as_array(x: Any) -> Array:
    return np.asarray(x)
