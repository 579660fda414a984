"""Elementwise steps that write in place, with the bits of the operators' own kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod

import numpy as np

from ...ir.graph import Array, Node
from ...ir.ops.loss import SMALLEST_PROBABILITY
from .fast_window import ranges
from .scratch import Run, Scratch

#: Elements of a block; several passes over one stay in the processor's cache. A multiple of 8.
BLOCK = 1 << 15


def _operands(inputs: Sequence[Array | None]) -> list[Array]:
    found = [a for a in inputs if a is not None]
    assert len(found) == len(inputs)
    return found


def relu(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of Relu."""
    return _limited(inputs, outputs, np.float32(0), np.float32(np.inf))


def clip(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of Clip."""
    low, high = (np.float32(node.float_attr(k)) for k in ("min", "max"))
    return _limited(inputs, outputs, low, high)


def _limited(
    inputs: Sequence[Array | None], outputs: Sequence[Array], low: np.float32, high: np.float32
) -> Run:
    (x,), y = _operands(inputs), outputs[0]
    # the method is one pass, several times as fast as np.maximum with a scalar
    return lambda: x.clip(low, high, out=y)


def relu_mask(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of ReluMask."""
    (y,), zero = _operands(inputs), np.float32(0)
    return _mask(y, outputs[0], scratch, lambda a, flags, _: np.greater(a, zero, out=flags))


def clip_mask(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of ClipMask."""
    (y,) = _operands(inputs)
    low, high = (np.float32(node.float_attr(k)) for k in ("min", "max"))

    def inside(a: Array, flags: Array, more: Array) -> None:
        np.greater(a, low, out=flags)
        np.less(a, high, out=more)
        np.logical_and(flags, more, out=flags)

    return _mask(y, outputs[0], scratch, inside)


def _mask(
    y: Array, bits: Array, scratch: Scratch, test: Callable[[Array, Array, Array], object]
) -> Run:
    flags, more = (scratch.take(BLOCK // 4).view(np.bool_) for _ in range(2))
    flat = y.reshape(-1)
    parts = [
        (flat[a:b], flags[: b - a], more[: b - a], bits[a // 8 : -(-b // 8)])
        for a, b in ranges(flat.size, BLOCK)
    ]

    def run() -> None:
        for a, first, second, target in parts:
            test(a, first, second)
            target[...] = np.packbits(first, bitorder="little")

    return run


@cache
def _selectors() -> Array:
    """For each byte of a mask 8 integers i32, all ones where its bit is set."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return -bits.astype(np.int32)


def mask_mul(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run | None:
    """A step of MaskMul that selects; None where something is multiplied."""
    (dy, bits), dx = _operands(inputs), outputs[0]
    if (node.float_attr("inside"), node.float_attr("outside")) != (1.0, 0.0):
        return None
    source, target = (a.reshape(-1).view(np.int32) for a in (dy, dx))
    index = scratch.take(BLOCK // 4).view(np.intp)
    chosen = scratch.take(BLOCK).view(np.int32)
    parts = []
    for a, b in ranges(source.size, BLOCK):
        taken = bits[a // 8 : -(-b // 8)]
        rows = chosen[: 8 * taken.size].reshape(-1, 8)
        parts.append((taken, index[: taken.size], rows, chosen[: b - a], source[a:b], target[a:b]))
    table = _selectors()

    def run() -> None:
        for taken, numbers, rows, flat, given, result in parts:
            np.copyto(numbers, taken)
            np.take(table, numbers, axis=0, out=rows, mode="clip")
            np.bitwise_and(given, flat, out=result)

    return run


def add(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of Add."""
    a, b = _operands(inputs)
    y = outputs[0]
    return lambda: np.add(a, b, out=y)


def global_average(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of GlobalAveragePool; its sums have no fixed order."""
    (x,), y = _operands(inputs), outputs[0].reshape(-1)
    rows, count = x.reshape(y.size, -1), np.float32(x.size // y.size)

    def run() -> None:
        np.add.reduce(rows, axis=1, out=y)
        np.divide(y, count, out=y)

    return run


def global_average_grad(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of GlobalAveragePoolGrad."""
    (dy,), dx = _operands(inputs), outputs[0]
    column = dy.reshape(*dy.shape[:2], *(1,) * (dx.ndim - 2))
    count = np.float32(prod(dx.shape[2:]))
    return lambda: np.divide(column, count, out=dx)


def sgd(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run | None:
    """A step of SGD; None where the gradient is scaled."""
    w, g, hyper = _operands(inputs)
    if node.float_attr("gradient_scale", 1.0) != 1.0:
        return None
    new, rate = outputs[0].reshape(-1), hyper[:1]
    old, slope, change = w.reshape(-1), g.reshape(-1), scratch.take(min(BLOCK, w.size))
    parts = [(old[a:b], slope[a:b], new[a:b], change[: b - a]) for a, b in ranges(new.size, BLOCK)]

    def run() -> None:
        for weights, slopes, target, product in parts:
            np.multiply(slopes, rate, out=product)
            np.subtract(weights, product, out=target)

    return run


def softmax(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of Softmax, by the C library's exponential."""
    (x,), y, axis = _operands(inputs), outputs[0], node.int_attr("axis", -1)
    lanes = scratch.take(*np.expand_dims(y.take(0, axis), axis).shape)

    def run() -> None:
        np.maximum.reduce(x, axis=axis, keepdims=True, out=lanes)
        np.subtract(x, lanes, out=y)
        np.exp(y, out=y)
        np.add.reduce(y, axis=axis, keepdims=True, out=lanes)
        np.divide(y, lanes, out=y)

    return run


def cross_entropy(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of CrossEntropy, by the C library's logarithm; the labels are checked already."""
    (probs, labels), loss = _operands(inputs), outputs[0]
    first = np.arange(0, probs.size, probs.shape[1])
    index, picked = np.empty_like(first), scratch.take(len(labels))
    flat, count = probs.reshape(-1), -np.float32(len(labels))

    def run() -> None:
        np.add(first, labels, out=index)
        np.take(flat, index, out=picked, mode="clip")
        np.maximum(picked, SMALLEST_PROBABILITY, out=picked)
        np.log(picked, out=picked)
        np.add.reduce(picked, out=loss)
        np.divide(loss, count, out=loss)

    return run


def cross_entropy_grad(
    node: Node, inputs: Sequence[Array | None], outputs: Sequence[Array], scratch: Scratch
) -> Run:
    """A step of SoftmaxCrossEntropyGrad; the labels are checked already."""
    (probs, labels), dx = _operands(inputs), outputs[0]
    rows, count = np.arange(len(labels)), np.float32(len(labels))

    def run() -> None:
        np.copyto(dx, probs)
        dx[rows, labels] -= np.float32(1)
        np.divide(dx, count, out=dx)

    return run
