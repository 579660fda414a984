"""Elementary functions whose fp32 results are the same bits as those of the C kernels.

C libraries and NumPy disagree in the last bits of exp, log and tanh, so float32 arrays take fixed
polynomials, evaluated in a fixed order of single roundings, of which
``backends/c/kernels/odtplan_math.h`` is the twin. float64 arrays take NumPy's functions, so that
gradient checks are exact. The coefficients are minimax fits made for this project (weighted to the
relative error); the error against double is below 1 ulp for exp and log, 2 ulp for tanh and erf,
3 ulp for sigmoid, softplus, sine and cosine, 4 ulp for expm1 (tests/test_ops.py); ``pow32`` tells
its own.
"""

from __future__ import annotations

import math
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
#: erf(x) / x - 1 over x**2 on |x| < 0.875, lowest power first.
_ERF = tuple(
    map(
        _F,
        (0.128379151, -0.376125067, 0.112819605, -0.0267720427, 0.00500137592, -0.000603366003),
    )
)
#: -log(erfc(x)) on 0.875 <= x <= 4, weighted to the relative error of erf, lowest power first.
_ERFC = tuple(
    map(
        _F,
        (
            0.000133573456,
            1.12793612,
            0.636737227,
            0.104327537,
            -0.0224202629,
            0.00309231505,
            -0.000201000061,
        ),
    )
)
#: (sin(r) / r - 1) / r**2 and (cos(r) - 1 + r**2 / 2) / r**4 over r**2 on |r| <= pi / 4.
_SIN = tuple(map(_F, (-0.166666552, 0.0083321901, -0.000195184082)))
_COS = tuple(map(_F, (0.0416666456, -0.00138873013, 2.44306611e-05)))
#: 32 zeros and the first 224 bits of 2 / pi behind the point.
_TWO_OVER_PI = np.array(
    (0, 0xA2F9836E, 0x4E441529, 0xFC2757D1, 0xF534DDC0, 0xDB629599, 0x3C439041, 0xFE5163AB),
    np.uint64,
)
#: pi / 2 in units of 2**-62 turns of a quarter.
_QUARTER = _F(np.pi * 2.0**-63)
#: Largest exponent that ``pow32`` multiplies out.
_MULTIPLIED = _F(16.0)


def exp32(x: Array) -> Array:
    """Exponential function, overflowing to inf and underflowing gradually."""
    if x.dtype != np.float32:
        return _as_array(np.exp(x))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        clamped = np.clip(x, _F(-104.0), _F(89.0))
        n = (clamped * _LOG2_E + _ROUND) - _ROUND
        r = (clamped - n * _LN2_HI) - n * _LN2_LO
        y = (r * r) * horner(_EXP, r) + r + _F(1.0)
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
        y = (f * z) * horner(_LOG, f) + n * _LN2_LO
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
        small = x + (x * z) * horner(_TANH, z)
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


def expm1_32(x: Array) -> Array:
    """exp(x) - 1, exact to the last bits also where x is near zero."""
    if x.dtype != np.float32:
        return _as_array(np.expm1(x))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        small = (x * x) * horner(_EXP, x) + x
        return _as_array(np.where(np.abs(x) < _F(0.34375), small, exp32(x) - _F(1.0)))


def softplus32(x: Array) -> Array:
    """log(1 + exp(x)), without overflow; the last term returns what rounding 1 + e has lost."""
    if x.dtype != np.float32:
        return _as_array(np.logaddexp(x, 0.0))
    with np.errstate(under="ignore", invalid="ignore"):
        e = exp32(_as_array(-np.abs(x)))
        u = e + _F(1.0)
        lost = ((u - _F(1.0)) - e) / u
        return _as_array(np.where(x < _F(0.0), _F(0.0), x) + (log32(_as_array(u)) - lost))


def erf32(x: Array) -> Array:
    """Error function; the absolute error is below 1e-7."""
    if x.dtype != np.float32:
        return _as_array(_erf64(x))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        z = x * x
        small = x + x * horner(_ERF, z)
        a = np.abs(x)
        q = horner(_ERFC, np.where(a > _F(4.0), _F(4.0), a))
        large = _F(1.0) - exp32(_as_array(-q))
        return _as_array(np.where(a < _F(0.875), small, np.where(x < _F(0.0), -large, large)))


_erf64 = np.vectorize(math.erf, otypes=[np.float64])


def sin32(x: Array) -> Array:
    """Sine of any finite number; NaN of an infinite one."""
    return _as_array(np.sin(x)) if x.dtype != np.float32 else _sine(x, 0)


def cos32(x: Array) -> Array:
    """Cosine of any finite number; NaN of an infinite one."""
    return _as_array(np.cos(x)) if x.dtype != np.float32 else _sine(x, 1)


def _sine(x: Array, quarters: int) -> Array:
    """sin(x) for 0, cos(x) = sin(abs(x) + quarter of a turn) for 1.

    From pi / 4 on, x * 2 / pi is formed in integers, modulo 4 and with 62 bits behind the point
    (Payne and Hanek 1983): the mantissa times 96 bits of 2 / pi, of which those that make multiples
    of 4 are left out.
    """
    a = np.abs(x)
    large = a >= _F(0.785398185)
    bits = np.where(large & np.isfinite(x), a, _F(1.0)).astype(np.float32).view(np.uint32)
    mantissa = ((bits & np.uint32(0x7FFFFF)) | np.uint32(0x800000)).astype(np.uint64)
    at = (bits >> np.uint32(23)).astype(np.int64) - 120
    word, left = at >> 5, (at & 31).astype(np.uint64)
    low32, s32, s62 = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(62)

    def window(k: int) -> Any:
        pair = (_TWO_OVER_PI[word + k] << s32) | _TWO_OVER_PI[word + k + 1]
        return (pair >> (s32 - left)) & low32

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        turned = ((mantissa * window(0)) << s32) + mantissa * window(1)
        turned = turned + ((mantissa * window(2)) >> s32)
        nearest = (turned + np.uint64(1 << 61)) >> s62
        rest = (turned - (nearest << s62)).astype(np.int64).astype(np.float32)
        r = np.where(large, rest * _QUARTER, a).astype(np.float32)
        k = np.where(large, nearest, np.uint64(0)) + np.uint64(quarters)
        z = r * r
        sine = r + (r * z) * horner(_SIN, z)
        cosine = (_F(1.0) - _F(0.5) * z) + (z * z) * horner(_COS, z)
        y = np.where((k & np.uint64(1)) != 0, cosine, sine)
        y = np.where((k & np.uint64(2)) != 0, -y, y)
        if quarters == 0:
            y = np.where(np.signbit(x), -y, y)
        return _as_array(np.where(np.isfinite(x), y, _F(np.nan)))


def pow32(x: Array, p: Array) -> Array:
    """x**p elementwise, with broadcasting.

    Integer exponents up to 16 are multiplied out by repeated squaring (error below |p| ulp), others
    are ``exp(p * log(abs(x)))`` (relative error below ``(2 + abs(p * log(x))) * 2**-23``). A
    negative base has a power if the exponent is an integer; NaN otherwise. x**0 is 1.
    """
    if x.dtype != np.float32:
        return _as_array(np.power(x, p))
    x, p = np.broadcast_arrays(x, p)
    size = np.abs(p)
    with np.errstate(all="ignore"):
        whole = p == np.trunc(p)
        multiplied = whole & (size <= _MULTIPLIED)
        count = np.where(multiplied, size, _F(0.0)).astype(np.int32)
        product, square = np.ones_like(x), x
        for bit in range(5):
            product = np.where((count >> bit) & 1 != 0, product * square, product)
            square = square * square
        product = np.where(p < _F(0.0), _F(1.0) / product, product)
        y = exp32(_as_array(p * log32(_as_array(np.abs(x)))))
        odd = whole & (size < _F(16777216.0))
        odd = odd & (np.where(odd, size, _F(0.0)).astype(np.int32) & 1 != 0)
        y = np.where(x < _F(0.0), np.where(whole, np.where(odd, -y, y), _F(np.nan)), y)
        return _as_array(np.where(multiplied, product, y))


def horner(coefficients: tuple[np.float32, ...], x: Array) -> Any:
    """A polynomial of ``x``, lowest power first, each step rounded to fp32."""
    y: Any = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        y = y * x + c
    return y


def _power_of_two(k: Any) -> _F32:
    return np.asarray((k + 127) << 23, np.int32).view(np.float32)


def _as_array(x: Any) -> Array:
    return np.asarray(x)
