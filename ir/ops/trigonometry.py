"""Inverse trigonometric functions, hyperbolic ones and their inverses, with the bits of C.

As in ``elementary``, float32 arrays take fixed polynomials in a fixed order of roundings, of which
``backends/c/kernels/odtplan_trigonometry.h`` is the twin, and float64 arrays NumPy's functions. The
error against double is below 4 ulp for all of them (tests/test_ops.py), next to zero, next to the
ends of a domain and up to the largest number. Outside the domain the result is NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..graph import Array
from .elementary import exp32, horner, log32, sqrt32

_F = np.float32
#: (atan(r) / r - 1) / r**2 over r**2 on |r| <= tan(pi / 8), lowest power first.
_ATAN = tuple(map(_F, (-0.333329499, 0.199776977, -0.138775378, 0.0805323422)))
#: (sinh(x) / x - 1) / x**2 over x**2 on |x| < 1, lowest power first.
_SINH = tuple(map(_F, (0.166667163, 0.00833028369, 0.000203721938)))
_PI_2, _PI_4, _LN2 = _F(1.57079637), _F(0.785398185), _F(0.693147182)
#: tan(pi / 8) and its reciprocal: arguments between them are taken relative to 1.
_NEAR, _FAR = _F(0.414213568), _F(2.41421366)
#: From here on exp(x) may overflow where half of it does not.
_HALVED = _F(88.0)
#: From here on sqrt(x**2 + 1) is x to the last bit, and asinh(x) is log(2 * x).
_LOGARITHM = _F(4096.0)
#: From here on 1 + x loses nothing that its logarithm would show.
_UNIT_LOST = _F(33554432.0)


def atan32(x: Array) -> Array:
    """Inverse tangent, -pi/2 to pi/2."""
    if x.dtype != np.float32:
        return np.asarray(np.arctan(x))
    a = np.abs(x)
    far, middle = a > _FAR, a > _NEAR
    with np.errstate(all="ignore"):
        r = np.where(far, _F(-1.0) / a, np.where(middle, (a - _F(1.0)) / (a + _F(1.0)), a))
        base = np.where(far, _PI_2, np.where(middle, _PI_4, _F(0.0)))
        z = r * r
        y = base + (r + (r * z) * horner(_ATAN, z))
        return np.asarray(np.where(np.signbit(x), -y, y))


def asin32(x: Array) -> Array:
    """Inverse sine of -1 to 1, -pi/2 to pi/2."""
    if x.dtype != np.float32:
        return _quiet(np.arcsin, x)
    with np.errstate(all="ignore"):
        cosine = sqrt32(np.asarray((_F(1.0) - x) * (_F(1.0) + x)))
        return atan32(np.asarray(x / cosine))


def acos32(x: Array) -> Array:
    """Inverse cosine of -1 to 1, pi to 0: twice the angle whose tangent is that of the half."""
    if x.dtype != np.float32:
        return _quiet(np.arccos, x)
    with np.errstate(all="ignore"):
        tangent = sqrt32(np.asarray((_F(1.0) - x) / (_F(1.0) + x)))
        return np.asarray(_F(2.0) * atan32(tangent))


def sinh32(x: Array) -> Array:
    """Hyperbolic sine."""
    if x.dtype != np.float32:
        return _quiet(np.sinh, x)
    with np.errstate(all="ignore"):
        z = x * x
        small = x + (x * z) * horner(_SINH, z)
        large, rest = _exponentials(x)
        large = large - rest
        return np.asarray(np.where(np.abs(x) < 1, small, np.where(x < 0, -large, large)))


def cosh32(x: Array) -> Array:
    """Hyperbolic cosine."""
    if x.dtype != np.float32:
        return _quiet(np.cosh, x)
    with np.errstate(all="ignore"):
        large, rest = _exponentials(x)
        return np.asarray(large + rest)


def _exponentials(x: Array) -> tuple[Any, Any]:
    """exp(|x|) / 2 and exp(-|x|) / 2, or 0 where that is lost beside the other."""
    a = np.abs(x)
    halved = a >= _HALVED
    e = exp32(np.asarray(np.where(halved, _F(0.5) * a, a)))
    half = _F(0.5) * e
    return np.where(halved, half * e, half), np.where(halved, _F(0.0), _F(0.5) / e)


def asinh32(x: Array) -> Array:
    """Inverse hyperbolic sine."""
    if x.dtype != np.float32:
        return np.asarray(np.arcsinh(x))
    a = np.abs(x)
    with np.errstate(all="ignore"):
        z = a * a
        near = log1p32(np.asarray(a + z / (_F(1.0) + sqrt32(np.asarray(z + _F(1.0))))))
        y = np.where(a > _LOGARITHM, log32(a) + _LN2, near)
        return np.asarray(np.where(np.signbit(x), -y, y))


def acosh32(x: Array) -> Array:
    """Inverse hyperbolic cosine of numbers from 1 on."""
    if x.dtype != np.float32:
        return _quiet(np.arccosh, x)
    with np.errstate(all="ignore"):
        t = x - _F(1.0)
        near = log1p32(np.asarray(t + sqrt32(np.asarray(t * (x + _F(1.0))))))
        y = np.where(x > _LOGARITHM, log32(x) + _LN2, near)
        return np.asarray(np.where(x < 1, _F(np.nan), y))


def atanh32(x: Array) -> Array:
    """Inverse hyperbolic tangent of -1 to 1, where it is infinite."""
    if x.dtype != np.float32:
        return _quiet(np.arctanh, x)
    a = np.abs(x)
    with np.errstate(all="ignore"):
        y = _F(0.5) * log1p32(np.asarray((a + a) / (_F(1.0) - a)))
        y = np.where(a > 1, _F(np.nan), y)
        return np.asarray(np.where(np.signbit(x), -y, y))


def log1p32(x: Array) -> Array:
    """log(1 + x) of numbers >= 0; the last term returns what rounding 1 + x has lost."""
    if x.dtype != np.float32:
        return _quiet(np.log1p, x)
    with np.errstate(all="ignore"):
        u = x + _F(1.0)
        lost = ((u - _F(1.0)) - x) / u
        log = log32(np.asarray(u))
        return np.asarray(np.where(x > _UNIT_LOST, log, log - lost))


def _quiet(f: np.ufunc, x: Array) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(f(x))
