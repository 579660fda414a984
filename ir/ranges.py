"""From the values that a tensor was seen to take to its scale and zero point."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .graph import Array
from .quantization import HIGH, LOW, Quantization

Method = Literal["minmax", "percentile", "mse"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse")

#: Bins of a histogram on each side of zero.
BINS = 4096
#: Scale of a tensor that is always zero.
_IDLE_SCALE = 2.0**-7
#: Parts of the full range that the search for the least squared error tries.
_SHARES = np.linspace(1.0, 0.2, 81)


@dataclass(eq=False)
class Histogram:
    """Counts of values, symmetric around zero; the range doubles when a value lies outside.

    Attributes:
        counts: ``2 * BINS`` counts from ``-limit`` to ``limit``.
        limit: 0 until a value differs from 0.
        low: Smallest value, at most 0.
        high: Largest value, at least 0.
    """

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2 * BINS, np.int64))
    limit: float = 0.0
    low: float = 0.0
    high: float = 0.0

    def add(self, values: Array) -> None:
        """Count finite values."""
        low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high)
        if largest == 0.0 and self.limit == 0.0:
            return
        if self.limit == 0.0:
            self.limit = largest
        while self.limit < largest:
            pairs = self.counts.reshape(BINS, 2).sum(axis=1)
            self.counts = np.zeros(2 * BINS, np.int64)
            self.counts[BINS // 2 : BINS // 2 + BINS] = pairs
            self.limit *= 2.0
        steps = np.floor(values.reshape(-1).astype(np.float64) * (BINS / self.limit))
        index = np.clip(steps.astype(np.int64) + BINS, 0, 2 * BINS - 1)
        self.counts += np.bincount(index, minlength=2 * BINS)

    @property
    def centers(self) -> NDArray[np.float64]:
        """Middle of each bin."""
        return (np.arange(2 * BINS, dtype=np.float64) - BINS + 0.5) * (self.limit / BINS)

    def inner(self, percentile: float) -> tuple[float, float]:
        """The range without the outermost values on each side, ``percentile`` of them left."""
        total = np.cumsum(self.counts)
        cut = (1.0 - percentile / 100.0) * int(total[-1])
        width = self.limit / BINS
        first = int(np.searchsorted(total, cut, side="right"))
        last = int(np.searchsorted(total, total[-1] - cut, side="left"))
        return max(self.low, (first - BINS) * width), min(self.high, (last + 1 - BINS) * width)

    def least_error(self) -> tuple[float, float]:
        """The range whose quantization has the least mean squared error."""
        used = np.flatnonzero(self.counts)
        x, n = self.centers[used], self.counts[used]

        def error(low: float, high: float) -> float:
            quant = from_range(low, high)
            return float((n * (quant.dequantize(quant.quantize(x)) - x) ** 2).sum())

        low, high = self.low, self.high
        for sides in ((1, 1), (0, 1), (1, 0)):  # both together, then each by itself
            ranges = [
                (low * (s if sides[0] else 1.0), high * (s if sides[1] else 1.0)) for s in _SHARES
            ]
            low, high = min(ranges, key=lambda r: error(*r))
        return low, high

    def quantization(self, method: Method, percentile: float) -> Quantization:
        """The scale and zero point that a method chooses."""
        if self.limit == 0.0:
            return Quantization((_IDLE_SCALE,))
        if method == "percentile":
            return from_range(*self.inner(percentile))
        return from_range(*(self.least_error() if method == "mse" else (self.low, self.high)))


def from_range(low: float, high: float) -> Quantization:
    """The quantization that covers a range; 0 is always exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32((high - low) / (HIGH - LOW)))
    if not scale > 0.0:
        return Quantization((_IDLE_SCALE,))
    return Quantization((scale,), int(np.clip(round(LOW - low / scale), LOW, HIGH)))


def weight_scales(
    weight: Array, axis: int, least: NDArray[np.float64], method: Method
) -> Quantization:
    """Symmetric scales per output channel, -127..127.

    Args:
        weight: The weight.
        axis: Its axis of output channels.
        least: Smallest allowed scale per channel: the accumulator must hold the bias.
        method: ``mse`` searches for the least squared error per channel; else the largest element.
    """
    rows: NDArray[Any] = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    rows = rows.astype(np.float64)
    full = np.abs(rows).max(axis=1) / HIGH
    scale = np.maximum(full, least)
    if method == "mse":
        best = np.full(len(rows), np.inf)
        for share in _SHARES:
            tried = np.maximum(full * share, np.maximum(least, np.finfo(np.float32).tiny))
            steps = np.clip(np.rint(rows / tried[:, None]), -HIGH, HIGH)
            error = ((steps * tried[:, None] - rows) ** 2).sum(axis=1)
            scale, best = np.where(error < best, tried, scale), np.minimum(error, best)
    idle = scale < np.finfo(np.float32).tiny
    scale = np.where(idle, np.median(scale[~idle]) if (~idle).any() else _IDLE_SCALE, scale)
    rounded = scale.astype(np.float32)
    rounded = np.where(rounded < scale, np.nextafter(rounded, np.float32(np.inf)), rounded)
    return Quantization(tuple(float(s) for s in rounded), 0, axis)
