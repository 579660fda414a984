"""Which axes of a node's operands and results can run in another order, and which of them together.

An operator's rule (``OpDef.axes``) lists ties. If all axes of a tie are permuted alike, the node
computes the same results, permuted where the tie has an axis of them; sums of floats may be added
up in another order. An axis in no tie has to keep its order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .graph import Node, Value

#: A value and one of its axes.
Axis = tuple[Value, int]
#: Axes of one length.
Tie = tuple[Axis, ...]


@dataclass(frozen=True)
class Split:
    """An axis that runs over several, the outermost first: ``[C*H*W]`` over ``[C]``, ``[H], [W]``.

    Attributes:
        whole: The axis.
        parts: Those that it runs over.
    """

    whole: Axis
    parts: tuple[Axis, ...]


def same_axes(node: Node) -> Iterator[Tie]:
    """Of a function of elements: operands are aligned with the result from the last axis on."""
    shape = node.out.type.shape
    for back in range(1, len(shape) + 1):
        values = (node.out, *node.operands())
        yield tuple(
            (v, len(v.type.shape) - back)
            for v in values
            if len(v.type.shape) >= back and v.type.shape[-back] == shape[-back]
        )


def kept_axes(node: Node) -> Iterator[Tie]:
    """Of what cuts, fills or joins along some axes: those whose length is the same everywhere."""
    values = (*node.operands(), node.out)
    for axis, size in enumerate(node.out.type.shape):
        if all(v.type.shape[axis] == size for v in values):
            yield tuple((v, axis) for v in values)


def first_axes(node: Node) -> Iterator[Tie]:
    """Of a pool: samples and channels, each by itself."""
    (x,) = node.operands()
    for axis in (0, 1):
        yield (x, axis), (node.out, axis)


def channel_vectors(node: Node) -> Iterator[Tie]:
    """Of ``[N, C, ...]`` with a number per channel in each further operand."""
    x, *vectors = node.operands()
    for axis in range(len(x.type.shape)):
        along = [(v, 0) for v in vectors] if axis == 1 else []
        yield (x, axis), (node.out, axis), *along


def reshaped_axes(node: Node) -> Iterator[Tie | Split]:
    """Of a Reshape: axes that stay, that become one, or that one becomes."""
    (x,) = node.operands()
    for before, after in _runs(x.type.shape, node.out.type.shape):
        left, right = ([(v, i) for i in axes] for v, axes in ((x, before), (node.out, after)))
        if len(left) == len(right) == 1:
            yield left[0], right[0]
        elif len(left) == 1:
            yield Split(left[0], tuple(right))
        elif len(right) == 1:
            yield Split(right[0], tuple(left))


def _runs(
    before: tuple[int, ...], after: tuple[int, ...]
) -> Iterator[tuple[list[int], list[int]]]:
    """The shortest runs of axes longer than 1 that hold the same number of elements."""
    left = [i for i, n in enumerate(before) if n > 1]
    right = [i for i, n in enumerate(after) if n > 1]
    while left and right:
        sizes = [1, 1]
        runs: tuple[list[int], list[int]] = ([], [])
        while not runs[0] or sizes[0] != sizes[1]:
            side = 0 if sizes[0] <= sizes[1] else 1
            axis = (left, right)[side].pop(0)
            runs[side].append(axis)
            sizes[side] *= (before, after)[side][axis]
        yield runs
