"""Blocks of bytes with fixed lifetimes, and what any layout of them needs at least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np


@dataclass(frozen=True)
class Block:
    """Bytes that are occupied from step ``first`` to step ``last``, both inclusive.

    Attributes:
        alignment: Its offset is a multiple of this many bytes.
    """

    bytes: int
    first: int
    last: int
    alignment: int = 1

    def meets(self, other: Block) -> bool:
        """Lifetimes overlap."""
        return self.first <= other.last and other.first <= self.last


def live_bytes(blocks: Sequence[Block], steps: int) -> list[int]:
    """Sum of the bytes that live at each step: the lower bound of any layout is its maximum."""
    change = [0] * (steps + 1)
    for b in blocks:
        change[b.first] += b.bytes
        change[b.last + 1] -= b.bytes
    total, result = 0, []
    for d in change[:steps]:
        total += d
        result.append(total)
    return result


def peak_bytes(blocks: Sequence[Block]) -> int:
    """The most bytes that live at one time, whatever numbers the steps have."""
    ends = [(b.last + 1, -b.bytes) for b in blocks]
    total = peak = 0
    for _, change in sorted(ends + [(b.first, b.bytes) for b in blocks]):
        total += change
        peak = max(peak, total)
    return peak


def arena_bytes(blocks: Sequence[Block], offsets: Sequence[int]) -> int:
    """Size of the arena that holds all blocks."""
    return max((o + b.bytes for b, o in zip(blocks, offsets, strict=True)), default=0)


def unit_bytes(blocks: Sequence[Block]) -> int:
    """Greatest common divisor of sizes and alignments: bottom-justified offsets are multiples."""
    return gcd(*(b.bytes for b in blocks), *(b.alignment for b in blocks if b.alignment > 1)) or 1


def components(blocks: Sequence[Block]) -> list[list[int]]:
    """Indices of blocks, grouped so that blocks of different groups never live at one time."""
    groups: list[list[int]] = []
    reach = -1
    for i in sorted(range(len(blocks)), key=lambda i: (blocks[i].first, i)):
        if not groups or blocks[i].first > reach:
            groups.append([])
        groups[-1].append(i)
        reach = max(reach, blocks[i].last)
    return groups


def best_fit(
    blocks: Sequence[Block], order: Sequence[int], ceiling: int | None = None
) -> list[int]:
    """Place in this order, each block into the smallest gap that takes it, else on top.

    Args:
        blocks: What to place.
        order: Indices of the blocks, each at most once.
        ceiling: Leave out blocks that would end above it.

    Returns:
        Offset per block, -1 for those that are left out.
    """
    first = np.array([b.first for b in blocks], np.int64)
    last = np.array([b.last for b in blocks], np.int64)
    offsets = np.full(len(blocks), -1, np.int64)
    for i in order:
        b = blocks[i]
        below = np.nonzero((first <= b.last) & (b.first <= last) & (offsets >= 0))[0]
        best_gap, spot, top = None, 0, 0
        for begin, j in sorted(zip(offsets[below].tolist(), below.tolist(), strict=True)):
            gap, end = begin - top, begin + blocks[j].bytes
            if gap >= b.bytes and (best_gap is None or gap < best_gap):
                best_gap, spot = gap, top
            top = max(top, end + -end % b.alignment)
        offset = spot if best_gap is not None else top
        if ceiling is None or offset + b.bytes <= ceiling:
            offsets[i] = offset
    return [int(o) for o in offsets]
