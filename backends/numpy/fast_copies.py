"""The copies that make matrices of the planes of a convolution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...ir.graph import Array
from ...ir.ops.window import Window
from .fast_window import LONG, Area
from .scratch import Run

#: Targets and sources.
Copies = Sequence[tuple[Array, Array]]


def copy(copies: Copies) -> None:
    """Do them in their order."""
    for target, source in copies:
        np.copyto(target, source)


def by_rows(target: Array, source: Array) -> tuple[Array, Array]:
    """The same copy with a row as one item where it can be; short ones are then much faster."""
    size = target.itemsize
    if target.strides[-1] != size or source.strides[-1] != size or target.size == 0:
        return target, source
    row = np.dtype((np.void, target.shape[-1] * size))
    return target.view(row)[..., 0], source.view(row)[..., 0]


def filled(targets: Sequence[tuple[Array, Area]], operand: Array) -> list[tuple[Array, Array]]:
    """The copies that fill padded planes from ``[N, C, H, W]``."""
    return [by_rows(target, operand[..., y, x]) for target, (y, x) in targets]


def columns_of(
    columns: Array,
    runs: Sequence[Array],
    areas: Sequence[Area],
    kernel: tuple[int, int],
    groups: int,
    lines: int,
) -> tuple[Array, list[tuple[Array, Array]]]:
    """The runs of all taps as lines of matrices.

    Args:
        columns: Memory for them.
        runs: Runs [channel, ky, kx, run] of groups of taps.
        areas: Which taps those are.
        kernel: Taps along y and x.
        groups: Groups of channels.
        lines: Lines of a group; those beyond its taps are left alone.

    Returns:
        The matrices [group, line, run], and the copies that make them.
    """
    run = runs[0].shape[-1]
    by_group = [v.reshape(groups, -1, *v.shape[1:]) for v in runs]
    if kernel == (1, 1):
        return by_group[0].reshape(groups, -1, run), []  # they are lines already
    whole = columns[: groups * lines * run].reshape(groups, lines, run)
    depth = by_group[0].shape[1]
    taps = whole[:, : depth * kernel[0] * kernel[1]].reshape(groups, depth, *kernel, run)
    return whole, [(taps[:, :, y, x], v) for (y, x), v in zip(areas, by_group, strict=True)]


def is_direct(win: Window, samples: int) -> bool:
    """Planes are matrices already, and long ones."""
    return win.is_pointwise() and (samples == 1 or win.y.out * win.x.out >= LONG // 2)


def in_order(runs: Sequence[Run]) -> Run:
    """One step of several."""
    if len(runs) == 1:
        return runs[0]

    def step() -> None:
        for run in runs:
            run()

    return step
