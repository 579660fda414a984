"""Rows of numbers with mean 0 and deviation 1: what the normalizations have in common.

With the mean ``m`` of a row and ``r = 1 / sqrt(sum((x - m)**2) / count + epsilon)``,

    ``xhat = (x - m) * r``,   and for the gradient ``g`` of ``xhat``
    ``dx = (g - mean(g) - xhat * (sum(g * xhat) / count)) * r``;

rows that are not centred have ``m = 0`` and no ``mean(g)``. Each sum is one chain along the row.
The C twin is backends/c/kernels/odtplan_statistics.h.
"""

from __future__ import annotations

import numpy as np

from ..graph import Array
from .elementary import sqrt32


def chain(rows: Array) -> Array:
    """Sum of each row, strictly in its order; ``[rows, 1]``."""
    return np.asarray(np.add.accumulate(rows, axis=1)[:, -1:])


def statistics(rows: Array, *, centred: bool = True, count: int | None = None) -> tuple[Array, ...]:
    """Rows less their mean, the mean, and the variance.

    Args:
        rows: ``[rows, size]``.
        centred: False: the mean counts as 0.
        count: Divisor of the sum of squares; None: the size of a row.

    Returns:
        ``[rows, size]``, ``[rows, 1]``, ``[rows, 1]``.
    """
    number = rows.dtype.type
    mean = chain(rows) / number(rows.shape[1]) if centred else np.zeros_like(rows[:, :1])
    less = rows - mean
    return less, mean, chain(less * less) / number(count or rows.shape[1])


def standardized(
    rows: Array, epsilon: float, *, centred: bool = True, count: int | None = None
) -> tuple[Array, Array]:
    """``xhat`` and ``r`` of rows."""
    less, _, variance = statistics(rows, centred=centred, count=count)
    number = rows.dtype.type
    inverse = number(1.0) / sqrt32(variance + number(epsilon))
    return less * inverse, inverse


def gradient(
    g: Array, xhat: Array, inverse: Array, *, centred: bool = True, count: int | None = None
) -> Array:
    """Gradient of rows from that of ``xhat``."""
    number = g.dtype.type
    mean = chain(g) / number(g.shape[1]) if centred else number(0.0)
    products = chain(g * xhat) / number(count or g.shape[1])
    return np.asarray((g - mean - xhat * products) * inverse)
