"""Products of matrices by BLAS; sums have no fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...ir.graph import Array, Node
from .scratch import Run, Scratch


def gemm(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of Gemm."""
    a, hot, bias, cold = (*inputs, None, None)[:4]
    y = outputs[0]
    assert a is not None
    by_part = _by_part(node, a, hot, cold)
    summand = scratch.take(*(y.shape if len(by_part) > 1 else (0,)))

    def run() -> None:
        np.matmul(*by_part[0], out=y)
        for columns, w in by_part[1:]:
            np.matmul(columns, w, out=summand)
            np.add(y, summand, out=y)
        if bias is not None:
            np.add(y, bias, out=y)

    return run


def _by_part(
    node: Node, a: Array, hot: Array | None, cold: Array | None
) -> list[tuple[Array, Array]]:
    """Columns of ``a`` and the part of the weight, [in, out], that they meet."""
    pairs, at = [], 0
    for part in (hot, cold):
        if part is not None:
            w = part.T if node.int_attr("trans_b", 0) else part
            pairs.append((a[..., at : at + len(w)], w))
            at += len(w)
    return pairs


def grad_input(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of GemmGradInput."""
    dy, hot, cold = (*inputs, None)[:3]
    assert dy is not None
    rows, dx = dy.reshape(-1, dy.shape[-1]), outputs[0].reshape(-1, outputs[0].shape[-1])
    parts = [(w.T, columns) for columns, w in _by_part(node, dx, hot, cold)]

    def run() -> None:
        for w, columns in parts:
            np.matmul(rows, w, out=columns)

    return run


def grad_weight(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of GemmGradWeight."""
    x, dy = (a.reshape(-1, a.shape[-1]) for a in inputs if a is not None)
    left, right = (dy, x) if node.int_attr("trans_b", 0) else (x, dy)
    # a partial update has the leading in-features only
    dw = outputs[0]
    left, right = left[:, : dw.shape[0]], right[:, : dw.shape[1]]
    return lambda: np.matmul(left.T, right, out=dw)


def grad_bias(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of GemmGradBias."""
    (dy,), db = inputs, outputs[0]
    assert dy is not None
    rows = dy.reshape(-1, dy.shape[-1])
    return lambda: np.add.reduce(rows, axis=0, out=db)


def matmul(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run | None:
    """A step of MatMul; None for a partly updated weight."""
    a, b, cold = (*inputs, None)[:3]
    assert a is not None
    assert b is not None
    if cold is not None:
        return None
    a = a.swapaxes(-1, -2) if node.int_attr("trans_a", 0) else a
    b = b.swapaxes(-1, -2) if node.int_attr("trans_b", 0) else b
    y = outputs[0]
    return lambda: np.matmul(a, b, out=y)
