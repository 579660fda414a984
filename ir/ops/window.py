"""Geometry of sliding windows: which taps of which windows lie inside the tensor.

Convolutions and pools share it. Everything is two-dimensional: a 1-D window gets a leading axis of
length 1. Taps that fall into padding are skipped, never multiplied by zero, in NumPy as in C.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node

#: Taps, distances and padding of a window; beyond it is a damaged file.
LARGEST = 2**16
#: A tap's number, the windows whose tap lies inside the input, and the inputs that they meet.
Tap = tuple[int, tuple[slice, ...], tuple[slice, ...]]


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a sliding window.

    Attributes:
        size: Elements of the input.
        out: Number of windows.
        kernel: Taps of a window.
        stride: Distance of two windows.
        begin: Padding before the first element.
        end: Padding after the last element.
        dilation: Distance of two taps.
    """

    size: int
    out: int
    kernel: int
    stride: int
    begin: int
    end: int
    dilation: int

    def span(self, tap: int, begin: int = 0, end: int = 0) -> tuple[int, int]:
        """Windows ``lo..hi`` whose tap lies inside the input widened by ``begin`` and ``end``."""
        first = tap * self.dilation - self.begin
        lo = max(0, -((first + begin) // self.stride))
        hi = min(self.out, (self.size + end - 1 - first) // self.stride + 1)
        return lo, max(lo, hi)

    @cached_property
    def slices(self) -> tuple[tuple[slice, slice], ...]:
        """By tap: windows whose tap is inside the input, and the inputs that those taps meet."""
        return tuple(map(self._slices, range(self.kernel)))

    def _slices(self, tap: int) -> tuple[slice, slice]:
        lo, hi = self.span(tap)
        start = lo * self.stride + tap * self.dilation - self.begin
        if lo == hi:
            return slice(0, 0), slice(0, 0)
        return slice(lo, hi), slice(start, start + (hi - lo - 1) * self.stride + 1, self.stride)

    def padded(self) -> int:
        """Elements from the first padding in front to the last tap or element of the input."""
        last = (self.out - 1) * self.stride + (self.kernel - 1) * self.dilation
        return max(last, self.begin + self.size - 1) + 1

    def taps(self) -> int:
        """Taps inside the input, over all windows."""
        return sum(hi - lo for lo, hi in map(self.span, range(self.kernel)))

    def counts(self, padded: bool) -> Array:
        """Taps of each window inside the input; with ``padded`` those in explicit padding too."""
        result = np.zeros(self.out, np.int64)
        for tap in range(self.kernel):
            lo, hi = self.span(tap, self.begin, self.end) if padded else self.span(tap)
            result[lo:hi] += 1
        return result


@dataclass(frozen=True)
class Window:
    """A two-dimensional sliding window."""

    y: Axis
    x: Axis

    def taps(self) -> int:
        """Taps inside the input, over all windows of one channel."""
        return self.y.taps() * self.x.taps()

    def lines(self) -> int:
        """Lines of taps inside the input, over all windows of one channel."""
        return self.y.taps() * sum(1 for n in self.x.counts(padded=False) if n)

    def is_pointwise(self) -> bool:
        """Every window is one element of the input, and the other way round."""
        axes = (self.x, self.y)
        return all(a.kernel == a.stride == 1 and a.begin == a.end == 0 for a in axes)

    def keeps_size(self) -> bool:
        """Neighbouring windows, as many as elements."""
        return all(a.stride == a.dilation == 1 and a.out == a.size for a in (self.x, self.y))

    def walk(self, reverse: bool = False) -> Iterator[Tap]:
        """Taps in order ``(ky, kx)`` or backwards: tap number, windows, the inputs they meet."""
        count = self.y.kernel * self.x.kernel
        for tap in reversed(range(count)) if reverse else range(count):
            ky, kx = divmod(tap, self.x.kernel)
            (oy, iy), (ox, ix) = self.y.slices[ky], self.x.slices[kx]
            yield tap, (..., oy, ox), (..., iy, ix)  # type: ignore[misc]  # Ellipsis indexes too

    def out_shape(self, rank: int) -> tuple[int, ...]:
        """Spatial result shape of a tensor with so many spatial axes."""
        return (self.y.out, self.x.out)[2 - rank :]

    def params(self) -> dict[str, Attr]:
        """The fields that the C structs share."""
        y, x = self.y, self.x
        return {
            "in_size": (y.size, x.size),
            "out_size": (y.out, x.out),
            "kernel": (y.kernel, x.kernel),
            "stride": (y.stride, x.stride),
            "pad": (y.begin, x.begin),
            "dilation": (y.dilation, x.dilation),
        }


def window(node: Node, spatial: Sequence[int], kernel: Sequence[int]) -> Window:
    """The window of a node with attributes strides, pads, dilations and ceil_mode.

    Args:
        node: Convolution or pool, or one of their gradients.
        spatial: Spatial shape of the forward input, 1 or 2 axes.
        kernel: Taps per axis.

    Raises:
        GraphError: Attributes that do not fit the rank, or an empty result.
    """
    ones, zeros = (1,) * len(spatial), (0,) * (2 * len(spatial))
    return _window(
        tuple(spatial),
        tuple(kernel),
        node.ints_attr("strides", ones),
        node.ints_attr("dilations", ones),
        node.ints_attr("pads", zeros),
        bool(node.int_attr("ceil_mode", 0)),
    )


@lru_cache(1024)  # a session in NumPy asks for the same ones at every step
def _window(
    spatial: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    pads: tuple[int, ...],
    ceil: bool,
) -> Window:
    rank = len(spatial)
    if rank not in (1, 2):
        raise GraphError(f"{rank} spatial axes; 1 and 2 are supported")
    if not len(kernel) == len(strides) == len(dilations) == len(pads) // 2 == rank:
        raise GraphError(
            f"kernel {kernel}, strides {strides}, dilations {dilations}, pads {pads}"
            f" do not fit {rank} spatial axes"
        )
    if min(*kernel, *strides, *dilations) < 1 or min(pads) < 0:
        raise GraphError(
            f"kernel {kernel}, strides {strides}, dilations {dilations} must be positive,"
            f" pads {pads} not negative"
        )
    if max(*kernel, *strides, *dilations, *pads) > LARGEST:
        raise GraphError(
            f"kernel {kernel}, strides {strides}, dilations {dilations}, pads {pads} exceed"
            f" {LARGEST}"
        )
    axes = [Axis(1, 1, 1, 1, 0, 0, 1)] * (2 - rank)
    for i, (n, k) in enumerate(zip(spatial, kernel, strict=True)):
        begin, end = pads[i], pads[i + rank]
        room = n + begin + end - dilations[i] * (k - 1) - 1
        if room < 0:
            raise GraphError(f"window of {k} taps is larger than the padded input of {n}")
        out = room // strides[i] + 1
        if ceil and room % strides[i] and out * strides[i] < n + begin:
            out += 1  # the last window starts inside the input or its leading padding
        axes.append(Axis(n, out, k, strides[i], begin, end, dilations[i]))
    return Window(axes[0], axes[1])


def planes(a: Array) -> Array:
    """View ``[N, C, spatial...]`` with one or two spatial axes as ``[N, C, H, W]``."""
    return a.reshape(*a.shape[:2], *(1,) * (4 - a.ndim), *a.shape[2:])
