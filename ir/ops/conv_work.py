"""Work of the convolution kernels: how often each of their loops runs.

The C kernels take four pixels and four channels at a time, single ones at borders and at the end of
an odd number. So a convolution's cost is not its multiply-accumulates times a rate. The functions
here count blocks, passes and starts of inner loops as those in backends/c/kernels run them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from ..opdef import Work
from .window import Axis, Window

#: Pixels, and channels, of a block.
BLOCK = 4
#: ODTPLAN_MARGIN_ROOM of odtplan_margin.h: elements of a plane with margins.
_MARGIN_ROOM = 352
#: ``setup`` units of finding the taps of a line or a patch, and of clearing the copy with margins.
_FIND, _CLEAR = 3, 10


def _up(n: int) -> int:
    return -(-n // BLOCK)


def _ceil(a: int, b: int) -> int:
    """As odtplan_ceil_div: 0 where a is negative."""
    return -(-a // b) if a > 0 else 0


@dataclass(frozen=True)
class _Line:
    """One axis of a gather, as odtplan_axis_t of odtplan_gather.h.

    Attributes:
        size: Pixels of the destination.
        source: Pixels of the source.
        period: Pixels this far apart use the same taps.
        step: Distance of the sources of two such pixels.
        begin: First pixel whose taps are all inside the source.
        end: Behind the last one.
        taps: Taps inside, of each pixel.
        gap: Distance of two taps of a pixel in the kernel.
        spread: Source elements that the windows of all pixels span.
        full: Taps of each pixel if the source had margins.
    """

    size: int
    source: int
    period: int
    step: int
    begin: int
    end: int
    taps: tuple[int, ...]
    gap: int
    spread: int
    full: tuple[int, ...]

    def widened(self) -> _Line:
        """With margins on both sides: all taps are inside."""
        return replace(self, begin=0, end=self.size, taps=self.full)

    def runs(self) -> list[tuple[int, int]]:
        """Runs of pixels that use the same taps: their number, and that of the taps."""
        result = []
        for t in range(min(self.period, self.size)):
            while t < self.size:
                inside = self.begin <= t < self.end
                pixels = _ceil(self.end - t, self.period) if inside else 1
                result.append((pixels, self.taps[t]))
                t += pixels * self.period
        return result


@cache
def _line(a: Axis, backward: bool) -> _Line:
    reach = (a.kernel - 1) * a.dilation
    if not backward:
        taps = tuple(int(n) for n in a.counts(padded=False))
        end = min(a.out, _ceil(a.size + a.begin - reach, a.stride))
        last = a.begin + (a.out - 1) * a.stride - a.begin + reach
        spread = max(last + 1, a.begin + a.size)
        begin, full = _ceil(a.begin, a.stride), (a.kernel,) * a.out
        return _Line(a.out, a.size, 1, a.stride, begin, end, taps, 1, spread, full)
    inside, everywhere = [0] * a.size, [0] * a.size
    for tap in range(a.kernel):
        for t in range(a.size):
            window, rest = divmod(t + a.begin - tap * a.dilation, a.stride)
            everywhere[t] += rest == 0
            inside[t] += rest == 0 and 0 <= window < a.out
    gap = next(k for k in range(1, a.stride + 1) if k * a.dilation % a.stride == 0)
    begin, end = max(0, reach - a.begin), min(a.size, (a.out - 1) * a.stride - a.begin + 1)
    before = max(0, reach - a.begin) // a.stride
    spread = before + max((a.size - 1 + a.begin) // a.stride + 1, a.out)
    return _Line(
        a.size, a.out, a.stride, 1, begin, end, tuple(inside), gap, spread, tuple(everywhere)
    )


# -- sums of products in blocks: odtplan_sums.c ----------------------------------------------------


def _add_block(
    n: Counter[str], times: int, rows: int, columns: int, loops: int, taps: int, run: bool | None
) -> None:
    """Count a block of rows x columns (1 or 4 each) that sums ``loops`` times ``taps`` products.

    ``run``: the products are runs of memory on both sides, None: they are a line of three that is
    written out. Indices of other loops cost as much as a pass.
    """
    block = rows * columns
    if run is None:
        passes = 0
    elif run:
        passes = taps // 4 + taps % 4 if block == BLOCK * BLOCK else taps
    else:
        passes = 2 * taps
    n["amount"] += times * block * loops * taps
    n["passes"] += times * loops * passes
    n["loops"] += times * loops
    n["outputs"] += times


@cache
def _gather(win: Window, backward: bool, channels: int, depth: int) -> Counter[str]:
    """Generic convolution of odtplan_conv.c: ``channels`` results, ``depth`` source channels."""
    y, x, n = _line(win.y, backward), _line(win.x, backward), Counter[str]()
    rows = [(r, k) for r, k in ((BLOCK, channels // BLOCK), (1, channels % BLOCK)) if k]
    lines = sum(k for _, k in rows)

    def add(columns: int, down: bool, ty: int, tx: int, times: int = 1) -> None:
        apart = y.step * x.source if down else x.step
        for r, k in rows:
            run: bool | None = not backward and win.x.dilation == 1 and ty * tx > 1
            if r * columns == BLOCK * BLOCK and apart == 1:
                run = None if x.gap == 1 and tx == 3 else False
            if ty * tx == 1:
                _add_block(n, times * k, r, columns, 1, depth, run)
            else:
                _add_block(n, times * k, r, columns, depth * ty if tx else 0, tx, run)

    for phase in range(x.period):
        first = phase + _ceil(x.begin - phase, x.period) * x.period
        fours = _ceil(x.end - first, x.period) // BLOCK * BLOCK
        n["setup"] += _FIND * lines * y.size
        for t in y.taps if fours > 0 else ():
            add(BLOCK, False, t, x.taps[first], fours // BLOCK)
        for column in range(phase, x.size, x.period):
            if fours > 0 and first <= column < first + fours * x.period:
                continue
            for start in range(min(y.period, y.size)):
                n["setup"] += _FIND * lines
                for pixels, taps in _down(y, start):
                    add(pixels, True, taps, x.taps[column])
    return n


def _down(y: _Line, t: int) -> list[tuple[int, int]]:
    """Blocks of one column from pixel t on: their pixels and taps."""
    result = []
    while t < y.size:
        four = y.begin <= t < y.end and y.end - t > (BLOCK - 1) * y.period
        result.append((BLOCK if four else 1, y.taps[t]))
        t += (BLOCK if four else 1) * y.period
    return result


# -- depthwise: odtplan_depthwise.c ----------------------------------------------------------------


def _margins(y: _Line, x: _Line, possible: bool = True) -> tuple[_Line, _Line, bool]:
    """The axes as the copy of a plane with margins has them, and whether there is one."""
    needed = x.spread > x.source or y.spread > y.source
    if not (possible and needed and y.source * x.spread <= _MARGIN_ROOM):
        return y, x, False
    return (y.widened() if y.spread * x.spread <= _MARGIN_ROOM else y), x.widened(), True


@cache
def _depthwise(win: Window, backward: bool) -> Counter[str]:
    """One channel."""
    n = Counter[str]()
    y, x, copied = _margins(_line(win.y, backward), _line(win.x, backward))
    n["copied"] = 4 * y.source * x.source if copied else 0
    known = all(a.begin == 0 and a.end == a.size and a.period <= a.size for a in (y, x))
    patch = 1 if known and y.period * x.period <= 4 else _FIND
    for lines, ty in y.runs():
        for pixels, tx in x.runs():
            n["setup"] += patch
            if pixels < BLOCK:
                blocks, size, passes, loops = lines * pixels, 1, ty * tx, ty
            else:
                nine = ty == tx == 3 and y.gap == x.gap == 1
                whole = nine or tx in (5, 7) or (backward and x.period == 2 and tx <= BLOCK)
                blocks, size = lines * _up(pixels), BLOCK
                passes, loops = 0 if whole else ty * tx, 0 if nine else ty
            n["amount"] += blocks * size * ty * tx
            n["passes"] += blocks * passes
            n["loops"] += blocks * loops
            n["outputs"] += blocks
    return n


# -- works -----------------------------------------------------------------------------------------


def _parts(n: Counter[str], cost_class: str, times: int) -> tuple[Work, ...]:
    """The counts, so many times."""
    main = Work(
        cost_class,  # type: ignore[arg-type]
        times * n["amount"],
        loops=times * n["loops"],
        passes=times * n["passes"],
        outputs=times * n["outputs"],
    )
    rest = [Work("setup", times * n["setup"], outputs=0)] if n["setup"] else []
    rest += [Work("copy", times * n["copied"], outputs=0)] if n["copied"] else []
    return (main, *rest)


def depthwise(win: Window, backward: bool, planes: int, calls: int = 1) -> tuple[Work, ...]:
    """Depthwise convolution in fp32, or the gradient of its input.

    Args:
        win: Window of the convolution.
        backward: The gradient.
        planes: Channels of all images.
        calls: Runs of channels, each of which makes margins anew.
    """
    n = _depthwise(win, backward)
    works = _parts(n, "depthwise", planes)
    return (*works, Work("setup", calls * _CLEAR, outputs=0)) if n["copied"] else works


def convolve(
    win: Window, backward: bool, channels: Sequence[int], depths: Sequence[int], times: int
) -> tuple[Work, ...]:
    """Convolution in fp32, or the gradient of its input.

    Args:
        win: Window of the convolution.
        backward: The gradient.
        channels: Channels of the result, by run of the kernel.
        depths: Channels that are summed over, by part of the weight.
        times: Images times groups.
    """
    total = Counter[str]()
    pixels = win.y.size * win.x.size
    pointwise = win.is_pointwise() and pixels >= BLOCK and min(channels) >= BLOCK
    for c in channels:
        if pointwise:
            blocks = _up(c) * _up(pixels)
            total["amount"] += BLOCK * BLOCK * blocks * sum(depths)
            total["outputs"] += blocks * len(depths)
            total["setup"] += _up(c)
        else:
            for i, d in enumerate(depths):
                part = _gather(win, backward, c, d)
                once = ("setup", "outputs")  # the parts add to the same sums
                total.update({k: n for k, n in part.items() if i == 0 or k not in once})
    return _parts(total, "pointwise" if pointwise else "conv", times)


def grad_weight(
    win: Window, batch: int, rows: Sequence[int], depth: int, *, converted: bool = False
) -> tuple[Work, ...]:
    """Gradient of the weight of a convolution that is not depthwise.

    Args:
        win: Window of the convolution.
        batch: Images.
        rows: Filters that are computed together, of each run of the kernel.
        depth: Input channels of a filter.
        converted: The input is i8; passes are then its conversions, one for all rows of a block,
            and the loop of a single result.
    """
    n = Counter[str]()
    taps = [(ky, kx) for ky in range(win.y.kernel) for kx in range(win.x.kernel)]
    for count, times in Counter(rows).items():
        for ky, kx in taps:
            n["setup"] += _FIND * times
            loops, terms, run = _tap(win, batch, ky, kx)
            if not converted:
                for r, i in _blocks(count):
                    for c, j in _blocks(depth):
                        _add_block(n, times * i * j, r, c, loops, terms, run)
                continue
            columns, across = _blocks(depth)[0]
            for r, i in _rows(count) if run and loops == 1 else _blocks(count):
                i, r = (i, r) if columns == BLOCK and (run or r == BLOCK) else (i * r, 1)
                blocks = times * i * across
                n["amount"] += blocks * r * columns * loops * terms
                n["passes"] += blocks * max(columns, 2) * loops * terms
                n["loops"] += blocks * loops
                n["outputs"] += blocks
    return _parts(n, "conv_grad_weight", 1)


def grad_weight_strips(
    win: Window, batch: int, rows: Sequence[int], depth: int, lines: int
) -> tuple[Work, ...]:
    """Gradient of the weight from an input that is widened by strips of lines.

    Args:
        win: Window of the convolution.
        batch: Images.
        rows: Filters that are computed together, of each run of the kernel.
        depth: Input channels of a filter.
        lines: Of the result, in a strip.
    """
    n = Counter[str]()
    columns, across = _blocks(depth)[0]
    y, x, widened = win.y, win.x, 0
    for begin in range(0, y.out, lines):
        end = min(begin + lines, y.out)
        first = max(0, begin * y.stride - y.begin)
        last = min(y.size, (end - 1) * y.stride - y.begin + (y.kernel - 1) * y.dilation + 1)
        widened += max(0, last - first) * x.size
        for ky, kx in product(range(y.kernel), range(x.kernel)):
            (lo, hi), (left, right) = y.span(ky), x.span(kx)
            high, w = min(hi, end) - max(lo, begin), right - left
            if high > 0:
                n["setup"] += _FIND * len(rows) * batch * across
                joined = w == x.out and y.stride * x.size == w * x.stride
                loops, terms = (1, high * w) if joined or high == 1 else (high, w)
                for count, times in Counter(rows).items():
                    for r, i in ((BLOCK, count // BLOCK), (1, count % BLOCK)):
                        run = x.stride == 1
                        _add_block(n, times * i * across * batch, r, columns, loops, terms, run)
    widened *= len(rows) * batch * across * columns
    sums = (replace(w, operator="ConvGradWeight") for w in _parts(n, "conv_grad_weight", 1))
    return (*sums, Work("elementwise", widened, outputs=0))


def columns_of(depth: int) -> int:
    """Channels of a block of a gradient of the weight with so many."""
    return _blocks(depth)[0][0]


def _rows(count: int) -> tuple[tuple[int, int], ...]:
    """Size and number of blocks of 4; less than 4 are one block."""
    return _blocks(count) if count >= BLOCK else ((count, 1),)


def _blocks(count: int) -> tuple[tuple[int, int], ...]:
    """Size and number of blocks; the last of 4 may overlap the one before."""
    return ((BLOCK, _up(count)),) if count >= BLOCK else ((1, count),)


def _tap(win: Window, batch: int, ky: int, kx: int) -> tuple[int, int, bool]:
    """Loops, their products, and whether these are runs, of what one tap of the filter sums."""
    y, x = (b - a for a, b in (win.y.span(ky), win.x.span(kx)))
    run = win.x.stride == 1
    if y == x == 1:
        return 1, batch, False
    if x == win.x.out and win.y.stride * win.x.size == x * win.x.stride:
        return batch, y * x, run
    return (batch * y if x else 0), x, run


def depthwise_grad_weight(
    win: Window, batch: int, filters: int, calls: int, copied: int | None = None
) -> tuple[Work, ...]:
    """Gradient of the weight of a depthwise convolution: taps of a line are summed together.

    Args:
        win: Window of the convolution.
        batch: Images.
        filters: Rows of the gradient.
        calls: Kernel calls, each of which makes margins anew.
        copied: Elements with margins that each plane is copied to in any case; None: the kernel
            decides.
    """
    n = _depthwise_grad_weight(win, copied is not None)
    works = _parts(n, "depthwise_grad_weight", batch * filters)
    if copied is not None:
        return (*works, Work("copy", 4 * copied * calls, outputs=0))
    return (*works, Work("setup", calls * 2 * _CLEAR, outputs=0)) if n["copied"] else works


@cache
def _depthwise_grad_weight(win: Window, always: bool) -> Counter[str]:
    """One filter and image; ``always``: of a copy with margins."""
    n = Counter[str]()
    y, x, copied = _margins(_line(win.y, False), _line(win.x, False), win.x.dilation == 1)
    if always:
        y, x, copied = y.widened(), x.widened(), True
    n["copied"] = 4 * y.source * x.source if copied else 0
    n["outputs"] = win.y.kernel * win.x.kernel
    all_x = win.x.dilation == 1 and (copied or (win.x.begin == 0 and x.end == x.size))
    all_y = y.taps == y.full
    together = all_x and win.x.kernel in (3, 5, 7) and win.x.stride <= 2
    for ky in range(win.y.kernel):
        lo, hi = (0, win.y.out) if all_y else win.y.span(ky)
        spans = [(0, win.x.out) if all_x else win.x.span(kx) for kx in range(win.x.kernel)]
        n["setup"] += 1 if together else win.x.kernel
        for i, (a, b) in enumerate(spans):
            n["amount"] += (hi - lo) * (b - a)
            if i == 0 or not together:
                n["passes"] += (hi - lo) * ((b - a) // 4 + (b - a) % 4)
                n["loops"] += hi - lo
    return n


# -- integers: odtplan_qconv.c and odtplan_qdepthwise.c --------------------------------------------


def integer(win: Window, filters: int, depth: int, times: int) -> tuple[Work, ...]:
    """Integer convolution: taps of four pixels are gathered, then meet two filters at a time.

    Args:
        win: Window of the convolution.
        filters: Filters of a group.
        depth: Input channels of a group.
        times: Images times groups.
    """
    pixels, taps = win.y.out * win.x.out, win.y.kernel * win.x.kernel
    blocks, pairs, terms = times * _up(pixels), -(-filters // 2), depth * taps
    pointwise = win.is_pointwise() and pixels >= BLOCK
    sums = Work(
        "pointwise" if pointwise else "conv",
        blocks * pairs * 2 * BLOCK * terms,
        loops=blocks * _up(terms),
        passes=blocks * pairs * (terms % 4),
        outputs=blocks * filters,
        dtype="i8",
    )
    if pointwise:
        return (sums,)
    y, x = _line(win.y, False), _line(win.x, False)
    inside = max(0, y.end - y.begin) * max(0, x.end - x.begin)
    lines = depth * win.y.kernel
    gathered = Work(
        "copy",
        blocks * BLOCK * terms,
        loops=blocks * BLOCK * lines,
        passes=times * (pixels - inside) * terms,
        outputs=blocks * BLOCK,
        dtype="i8",
    )
    return (sums, gathered)


def integer_depthwise(win: Window, planes: int) -> tuple[Work, ...]:
    """Integer depthwise convolution: four results at a time, from lines copied with padding.

    Args:
        win: Window of the convolution.
        planes: Filters of all images.
    """
    y, x = win.y, win.x
    blocks, wide = planes * y.out * _up(x.out), _up(x.kernel)
    packed = x.dilation == 1 and x.out >= BLOCK and x.stride <= 2
    written_out = packed and x.stride == 1 and y.kernel == 3 and wide == 1
    taps = y.kernel * (BLOCK * wide if packed else x.kernel)
    fresh = min(y.stride, y.kernel) if y.dilation == 1 else y.kernel
    lines = y.kernel + (y.out - 1) * fresh
    sums = Work(
        "depthwise",
        blocks * BLOCK * taps,
        loops=planes * y.out,
        passes=0 if written_out else blocks * (y.kernel * wide if packed else taps * BLOCK),
        outputs=blocks,
        dtype="i8",
    )
    copied = Work("copy", planes * lines * x.size, loops=planes * lines, outputs=planes, dtype="i8")
    return (sums, copied)
