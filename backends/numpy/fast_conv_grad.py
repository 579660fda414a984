"""Gradients of a convolution's weight and bias by BLAS, see ``fast_conv``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from ...ir.graph import Array, Node
from ...ir.ops.conv_grad import grad_weight_window
from ...ir.ops.window import planes
from .fast_copies import Copies, by_rows, columns_of, copy, filled, in_order, is_direct
from .fast_window import blocks, ranges, windows
from .scratch import Run, Scratch


def grad_weight(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run | None:
    """A step of ConvGradWeight; None where a group's filters are updated in part."""
    x, dy = inputs
    assert x is not None
    assert dy is not None
    win, shape = grad_weight_window(node), node.ints_attr("weight_shape")
    filters = int(dy.shape[1]) // node.int_attr("group", 1)
    depth, groups = shape[1], shape[0] // filters
    if shape[0] % filters:
        return None
    x, dy = planes(x)[:, : groups * depth], planes(dy)[:, : groups * filters]
    kernel = (win.y.kernel, win.x.kernel)
    dw = planes(outputs[0]).reshape(groups, filters, depth, *kernel)
    if is_direct(win, len(x)):
        return _grad_direct(x, dy, dw[..., 0, 0], scratch)

    single = filters * depth == 1  # each tap is a product of two runs, which need no copies
    taps = kernel[0] * kernel[1]
    copied = 0 if single or taps == 1 else depth * taps

    def cost(n: int, g: int, rows: int) -> int:
        grid = windows(win, n, 0, rows)
        return grid.floats(g * depth) + g * (filters * grid.slots + copied * grid.run)

    length = windows(win, 1, 0, win.y.out).run
    n, g, rows = blocks(len(x), groups, win.y.out, length, scratch.room, cost)
    largest = windows(win, n, 0, rows)
    memory = scratch.take(largest.floats(g * depth))
    lines = scratch.take(g * filters * largest.slots)
    columns = scratch.take(g * copied * largest.run)
    once = n == len(x) and rows == win.y.out  # no sum is made in parts
    part = None if once else scratch.take(g, *dw.shape[1:])

    tiles = list(product(ranges(len(x), n), ranges(groups, g)))

    def block(begin: int, end: int) -> Run:
        grid = windows(win, n, begin, end - begin)
        targets, runs = grid.targets(memory, g * depth), grid.runs(memory, g * depth)
        line = lines[: g * filters * grid.slots]
        valid = grid.results(line, g * filters)
        left = line.reshape(g, filters, grid.slots)[..., : grid.run]
        areas = [t[0] for t in grid.taps]
        gathers: Copies = ()
        if single:
            left = left[:, None, None]
            tapped = zip(runs, areas, strict=True)
            products = [(v[..., None], (slice(None), *area)) for v, area in tapped]
            shape: tuple[int, ...] = (g, *kernel, 1, 1)
        else:
            right, gathers = columns_of(columns, runs, areas, kernel, g, depth * taps)
            products = [(right.swapaxes(1, 2), (slice(None),) * 3)]
            shape = (g, filters, depth * taps)
        work = []
        for (a, b), (c, d) in tiles:
            fills = filled(targets, x[a:b, c * depth : d * depth])
            fills.append(by_rows(valid, dy[a:b, c * filters : d * filters, begin:end]))
            sums = (dw[c:d] if part is None else part).reshape(shape)
            work.append((fills, [(v, sums[which]) for v, which in products], dw[c:d]))

        def run() -> None:
            memory.fill(0)
            lines.fill(0)
            for fills, products, total in work:
                copy(fills)
                copy(gathers)
                for right, out in products:
                    np.matmul(left, right, out=out)
                if part is not None:
                    np.add(total, part, out=total)

        return run

    runs = [block(begin, end) for begin, end in ranges(win.y.out, rows)]
    return in_order(runs if part is None else [lambda: dw.fill(0), *runs])


def _grad_direct(x: Array, dy: Array, dw: Array, scratch: Scratch) -> Run:
    groups, filters, depth = dw.shape
    left = dy.reshape(len(dy), groups, filters, -1)
    right = x.reshape(len(x), groups, depth, -1).swapaxes(2, 3)
    if len(x) == 1:
        return lambda: np.matmul(left[0], right[0], out=dw)
    part = scratch.take(*dw.shape)

    def step() -> None:
        np.matmul(left[0], right[0], out=dw)
        for a, b in zip(left[1:], right[1:], strict=True):
            np.matmul(a, b, out=part)
            np.add(dw, part, out=dw)

    return step


def grad_bias(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of ConvGradBias."""
    dy, db = inputs[0], outputs[0]
    assert dy is not None
    rows = dy.reshape(*dy.shape[:2], -1)
    ones, sums = scratch.take(rows.shape[2], 1), scratch.take(*dy.shape[:2], 1)

    def step() -> None:  # a product with ones is several times as fast as np.add.reduce
        ones.fill(1)
        np.matmul(rows, ones, out=sums)
        np.add.reduce(sums[..., 0], axis=0, out=db)

    return step
