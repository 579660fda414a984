"""Sliding windows as runs of a padded copy, so that a convolution is one product of matrices.

The planes of an operand are copied into padded ones, one per phase of the stride. In these every
tap of all windows is a run of consecutive floats; what stands between two rows of results is
computed for nothing and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import gcd

from numpy.lib.stride_tricks import as_strided

from ...ir.graph import Array
from ...ir.ops.window import Axis, Window

#: Rows and columns of a plane.
Area = tuple[slice, slice]
#: Floats of a run from which on another sample in it makes it no faster.
LONG = 1024


@dataclass(frozen=True)
class Phase:
    """The taps of an axis that meet elements of one remainder by the stride.

    Attributes:
        remainder: Of the padded positions.
        taps: Which taps.
        count: How many.
        first: Distance of the first tap from the begin of the window, in elements of the phase.
        step: Distance of two taps.
    """

    remainder: int
    taps: slice
    count: int
    first: int
    step: int


def phases(axis: Axis) -> list[Phase]:
    """The phases of an axis that have taps."""
    common = gcd(axis.stride, axis.dilation)
    apart, found = axis.stride // common, []
    for first in range(min(apart, axis.kernel)):
        at, remainder = divmod(first * axis.dilation, axis.stride)
        taps = slice(first, axis.kernel, apart)
        count = len(range(first, axis.kernel, apart))
        found.append(Phase(remainder, taps, count, at, axis.dilation // common))
    return found


def pairs(win: Window) -> list[tuple[Phase, Phase]]:
    """The phases of a window."""
    return list(product(phases(win.y), phases(win.x)))


def reach(axis: Axis) -> int:
    """Distance of the last tap of a window from its begin, in elements of a phase."""
    return (axis.kernel - 1) * axis.dilation // axis.stride


def span(axis: Axis) -> tuple[int, int]:
    """Elements of a phase, padding counted, that some element of the operand belongs to."""
    return axis.begin // axis.stride, (axis.begin + axis.size - 1) // axis.stride + 1


def inside(axis: Axis, remainder: int, begin: int, end: int) -> Area:
    """Elements ``begin..end`` of a phase that lie in the operand, counted from ``begin``.

    Returns:
        Which of them, and where they are in the operand.
    """
    s, shift = axis.stride, axis.begin - remainder
    low = max(begin, -(-shift // s))
    high = max(low, min(end, (axis.size - 1 + shift) // s + 1))
    return slice(low - begin, high - begin), slice(low * s - shift, max(high * s - shift, 0), s)


@dataclass(frozen=True)
class Grid:
    """Padded planes of some samples, and the runs in them.

    Zeros behind a row are those before the next one as far as there are both; so with the rows of
    two samples.

    Attributes:
        samples: Samples.
        rows: Rows of results of a sample.
        valid: Results of a row.
        height: Rows from a sample to the next one.
        width: Floats from a row to the next one.
        reach: Rows and floats that the last result takes from beyond.
        fills: For each plane which part of a sample to fill, and from where.
        taps: Groups of taps: which ones, their plane, where the first begins, the distance of two,
            their numbers, each along y and x.
    """

    samples: int
    rows: int
    valid: int
    height: int
    width: int
    reach: tuple[int, int]
    fills: tuple[tuple[Area, Area], ...]
    taps: tuple[tuple[Area, int, tuple[int, int], tuple[int, int], tuple[int, int]], ...]

    @property
    def run(self) -> int:
        """Floats from the first result of the first sample to the last row's end of the last."""
        return ((self.samples - 1) * self.height + self.rows) * self.width

    @property
    def slots(self) -> int:
        """Floats for the results of a channel and what stands between them."""
        return self.samples * self.height * self.width

    @property
    def lines(self) -> int:
        """Rows of a plane."""
        return (self.samples - 1) * self.height + self.rows + self.reach[0]

    def floats(self, channels: int) -> int:
        """Floats of the planes of so many channels."""
        return channels * len(self.fills) * self.lines * self.width + self.reach[1]

    def targets(self, memory: Array, channels: int) -> list[tuple[Array, Area]]:
        """Views ``[N, C, rows, floats]`` to fill, and what of ``[..., H, W]`` to copy there."""
        item = memory.itemsize
        row = item * self.width
        plane = self.lines * row
        strides = (self.height * row, plane * len(self.fills), row, item)
        shape = (self.samples, channels, min(self.height, self.lines), self.width)
        result = []
        for i, ((y, x), source) in enumerate(self.fills):
            whole = as_strided(memory[i * plane // item :], shape, strides)
            result.append((whole[..., y, x], source))
        return result

    def runs(self, memory: Array, channels: int) -> list[Array]:
        """Views ``[C, taps y, taps x, run]``, one for each group of taps."""
        item = memory.itemsize
        row = item * self.width
        channel = len(self.fills) * self.lines * row
        result = []
        for _, plane, (y, x), (down, along), counts in self.taps:
            begin = (plane * self.lines + y) * self.width + x
            shape, strides = (
                (channels, *counts, self.run),
                (channel, down * row, along * item, item),
            )
            result.append(as_strided(memory[begin:], shape, strides))
        return result

    def results(self, memory: Array, channels: int) -> Array:
        """Results ``[N, C, rows, valid]`` of memory with ``slots`` for each channel."""
        shape = (channels, self.samples, self.height, self.width)
        return memory.reshape(shape).swapaxes(0, 1)[:, :, : self.rows, : self.valid]


def _shared(fills: list[tuple[slice, slice]], length: int, most: int) -> int:
    """Zeros that are at both ends of all phases of an axis, of so many positions."""
    targets = [to for to, _ in fills if to.start < to.stop]
    ends = [min(int(to.start), length - int(to.stop)) for to in targets]
    return min([most, *ends])


def _grid(
    samples: int,
    rows: int,
    valid: int,
    reached: tuple[int, int],
    axes: tuple[list[tuple[slice, slice]], list[tuple[slice, slice]]],
    taps: list[tuple[Area, int, tuple[int, int], tuple[int, int], tuple[int, int]]],
) -> Grid:
    height, width = rows + reached[0], valid + reached[1]
    fills = tuple(((ty, tx), (fy, fx)) for (ty, fy), (tx, fx) in product(*axes))
    return Grid(
        samples,
        rows,
        valid,
        height - _shared(axes[0], height, reached[0]),
        width - _shared(axes[1], width, reached[1]),
        reached,
        fills,
        tuple(taps),
    )


def windows(win: Window, samples: int, first: int, rows: int) -> Grid:
    """What the taps of rows of windows meet in a convolution's input.

    Args:
        win: Window.
        samples: Samples.
        first: First row of windows.
        rows: Rows of windows.
    """
    over, along = reach(win.y), reach(win.x)
    axes = (
        [inside(win.y, p.remainder, first, first + rows + over) for p in phases(win.y)],
        [inside(win.x, p.remainder, 0, win.x.out + along) for p in phases(win.x)],
    )
    taps = [
        ((y.taps, x.taps), i, (y.first, x.first), (y.step, x.step), (y.count, x.count))
        for i, (y, x) in enumerate(pairs(win))
    ]
    return _grid(samples, rows, win.x.out, (over, along), axes, taps)


def spreads(win: Window, samples: int, first: int, rows: int) -> Grid:
    """The results of a convolution that elements of its input have a part in.

    Rows of results are rows of a phase of the input here, one group of taps for each phase.

    Args:
        win: Window of the convolution.
        samples: Samples.
        first: First row of the phases; see ``span``.
        rows: Rows.
    """
    over, along = reach(win.y), reach(win.x)
    low, high = span(win.x)

    def part(axis: Axis, begin: int, end: int) -> Area:
        a, b = max(begin, 0), max(max(begin, 0), min(end, axis.out))
        return slice(a - begin, b - begin), slice(a, b)

    axes = ([part(win.y, first - over, first + rows)], [part(win.x, low - along, high)])
    taps = [
        (
            (y.taps, x.taps),
            0,
            (over - y.first, along - x.first),
            (-y.step, -x.step),
            (y.count, x.count),
        )
        for y, x in pairs(win)
    ]
    return _grid(samples, rows, high - low, (over, along), axes, taps)


def blocks(
    samples: int,
    groups: int,
    rows: int,
    run: int,
    room: int,
    cost: Callable[[int, int, int], int],
) -> tuple[int, int, int]:
    """Samples, groups and rows that are worked on at a time.

    As many samples as make a run long; as many groups and then as many samples as there is room
    for. Rows are divided where nothing else fits.

    Args:
        samples: Samples.
        groups: Groups of channels.
        rows: Rows of results.
        run: Floats of a run of one sample.
        room: Floats for a block.
        cost: Floats of a block of samples, groups and rows.

    Returns:
        Divisors of samples and groups, and rows.
    """
    parts = [d for d in range(1, samples + 1) if samples % d == 0]
    wanted = next((d for d in parts if d * run >= LONG), samples)
    n = max((d for d in parts if d <= wanted and cost(d, 1, rows) <= room), default=0)
    if n == 0:
        while rows > 1 and cost(1, 1, rows) > room:
            rows = (rows + 1) // 2
        return 1, 1, rows
    g = max(d for d in range(1, groups + 1) if groups % d == 0 and cost(n, d, rows) <= room)
    if g == groups:
        n = max(d for d in parts if cost(d, g, rows) <= room)
    return n, g, rows


def ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    """``(begin, end)`` of runs of ``step``; the last may be shorter."""
    for begin in range(0, count, step):
        yield begin, min(begin + step, count)
