"""Convolutions as products of matrices by BLAS; sums have no fixed order.

Blocks of samples, groups and rows are worked on at a time, so that their copies fit the scratch.
Padding takes part in sums as zeros here: where a weight or a gradient is infinite, results near the
border are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from ...ir.graph import Array, Node
from ...ir.ops.conv_grad import grad_input_window
from ...ir.ops.window import planes, window
from .fast_copies import by_rows, columns_of, copy, filled, in_order, is_direct
from .fast_window import blocks, inside, pairs, ranges, span, spreads, windows
from .scratch import Run, Scratch


def _weight(
    node: Node, hot: Array, cold: Array | None, scratch: Scratch
) -> tuple[Array, list[Run]]:
    """The whole weight as [group, filter, channel, ky, kx], and what makes it anew."""
    group, whole = node.int_attr("group", 1), hot
    make: list[Run] = []
    if cold is not None:
        axis, parts = 1 if group == 1 else 0, (hot, cold)
        shape = list(hot.shape)
        shape[axis] += cold.shape[axis]
        joined = whole = scratch.take(*shape)
        make = [lambda: np.concatenate(parts, axis, out=joined)]
    return planes(whole).reshape(group, -1, *planes(whole).shape[1:]), make


def conv(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of Conv."""
    x, hot, bias, cold = (*inputs, None, None)[:4]
    assert x is not None
    assert hot is not None
    weight, first = _weight(node, hot, cold, scratch)
    win = window(node, x.shape[2:], hot.shape[2:])
    x, y = planes(x), planes(outputs[0])
    groups, filters, depth = (int(n) for n in weight.shape[:3])
    column = None if bias is None else bias.reshape(-1, 1, 1)
    matrix = weight.reshape(groups, filters, -1)
    add_bias: list[Run] = []
    if column is not None:
        starts = column
        add_bias.append(lambda: np.add(y, starts, out=y))
    if is_direct(win, len(x)):
        xs = x.reshape(len(x), groups, depth, -1)
        ys = y.reshape(len(y), groups, filters, -1)
        return in_order([*first, lambda: np.matmul(matrix, xs, out=ys), *add_bias])
    kernel = (win.y.kernel, win.x.kernel)
    taps = kernel[0] * kernel[1]
    gathers, lines = taps > 1, depth * taps
    if gathers and bias is not None:  # the bias is the weight of a line of ones
        lines += 1
        given, matrix = matrix, scratch.take(groups, filters, lines)
        weights, biases = matrix[..., :-1], matrix[..., -1]
        by_group, column = bias.reshape(groups, filters), None
        first += [lambda: np.copyto(weights, given), lambda: np.copyto(biases, by_group)]

    def cost(n: int, g: int, rows: int) -> int:
        grid = windows(win, n, 0, rows)
        copied = lines * grid.run if gathers else 0
        return grid.floats(g * depth) + g * (copied + filters * grid.slots)

    length = windows(win, 1, 0, win.y.out).run
    n, g, rows = blocks(len(x), groups, win.y.out, length, scratch.room, cost)
    largest = windows(win, n, 0, rows)
    memory = scratch.take(largest.floats(g * depth))
    columns = scratch.take(g * lines * largest.run) if gathers else memory
    results = scratch.take(g * filters * largest.slots)

    tiles = list(product(ranges(len(x), n), ranges(groups, g)))

    def block(begin: int, end: int) -> Run:
        grid = windows(win, n, begin, end - begin)
        areas, runs = [t[0] for t in grid.taps], grid.runs(memory, g * depth)
        right, gathers = columns_of(columns, runs, areas, kernel, g, lines)
        ones = right[:, depth * taps :]
        out = results[: g * filters * grid.slots]
        made = out.reshape(g, filters, grid.slots)[..., : grid.run]
        valid, targets = grid.results(out, g * filters), grid.targets(memory, g * depth)
        work = []
        for (a, b), (c, d) in tiles:
            part, low, high = x[a:b, c * depth : d * depth], c * filters, d * filters
            result = y[a:b, low:high, begin:end]
            start = None if column is None else column[low:high]
            fills, last = filled(targets, part), by_rows(result, valid)
            work.append((fills, matrix[c:d], start, result, last))

        def run() -> None:
            memory.fill(0)
            ones.fill(1)
            for fills, w, start, result, last in work:
                copy(fills)
                copy(gathers)
                np.matmul(w, right, out=made)
                if start is None:
                    np.copyto(*last)
                else:
                    np.add(valid, start, out=result)

        return run

    return in_order([*first, *(block(begin, end) for begin, end in ranges(win.y.out, rows))])


def grad_input(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of ConvGradInput."""
    dy, hot, cold = (*inputs, None)[:3]
    assert dy is not None
    assert hot is not None
    weight, first = _weight(node, hot, cold, scratch)
    win = grad_input_window(node)
    dy, dx = planes(dy), planes(outputs[0])
    groups, filters, depth = (int(n) for n in weight.shape[:3])
    if is_direct(win, len(dy)):
        turned = weight.reshape(groups, filters, depth).swapaxes(1, 2)
        dys = dy.reshape(len(dy), groups, filters, -1)
        dxs = dx.reshape(len(dx), groups, depth, -1)
        return in_order([*first, lambda: np.matmul(turned, dys, out=dxs)])
    # the weights of each phase as [group, channel, filter x taps]
    matrices: list[Array] = []
    turns: list[tuple[Array, Array]] = []
    for py, px in pairs(win):
        taken = weight[..., py.taps, px.taps].transpose(0, 2, 1, 3, 4)
        matrix = scratch.take(*taken.shape)
        turns.append((matrix, taken))
        matrices.append(matrix.reshape(groups, depth, -1))
    most = max(matrix.shape[2] for matrix in matrices)  # filters x taps
    copied = most if most > filters else 0
    sparse = len(matrices) < win.y.stride * win.x.stride
    (low, high), (left, right_end) = span(win.y), span(win.x)

    def cost(n: int, g: int, rows: int) -> int:
        grid = spreads(win, n, low, rows)
        return grid.floats(g * filters) + g * (copied * grid.run + depth * grid.slots)

    length = spreads(win, 1, low, high - low).run
    n, g, rows = blocks(len(dy), groups, high - low, length, scratch.room, cost)
    largest = spreads(win, n, low, rows)
    memory = scratch.take(largest.floats(g * filters))
    columns = scratch.take(g * copied * largest.run)
    results = scratch.take(g * depth * largest.slots)

    tiles = list(product(ranges(len(dy), n), ranges(groups, g)))
    everything = (slice(None), slice(None))

    def block(begin: int, end: int) -> Run:
        grid = spreads(win, n, begin, end - begin)
        targets, runs = grid.targets(memory, g * filters), grid.runs(memory, g * filters)
        out = results[: g * depth * grid.slots]
        made = out.reshape(g, depth, grid.slots)[..., : grid.run]
        valid, by_phase = grid.results(out, g * depth), []
        for (py, px), view, matrix in zip(pairs(win), runs, matrices, strict=True):
            ky, kx = view.shape[1:3]
            lines = filters * ky * kx
            right, gathers = columns_of(columns, [view], [everything], (ky, kx), g, lines)
            oy, iy = inside(win.y, py.remainder, begin, end)
            ox, ix = inside(win.x, px.remainder, left, right_end)
            by_phase.append((gathers, matrix, right, valid[..., oy, ox], (iy, ix)))
        work = []
        for (a, b), (c, d) in tiles:
            fills = filled(targets, dy[a:b, c * filters : d * filters])
            result = dx[a:b, c * depth : d * depth]
            products = [
                (gathers, matrix[c:d], right, by_rows(result[..., y, x], area))
                for gathers, matrix, right, area, (y, x) in by_phase
            ]
            work.append((fills, products))

        def run() -> None:
            memory.fill(0)
            for fills, products in work:
                copy(fills)
                for gathers, w, right, last in products:
                    copy(gathers)
                    np.matmul(w, right, out=made)
                    np.copyto(*last)

        return run

    before: list[Run] = [*first, lambda: copy(turns)]
    if sparse:
        before.append(lambda: dx.fill(0))
    return in_order([*before, *(block(low + a, low + b) for a, b in ranges(high - low, rows))])
