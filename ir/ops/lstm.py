"""Long short-term memory (Hochreiter & Schmidhuber 1997) of one direction, without peepholes.

With the gates ``i, o, f = sigmoid(...)`` and ``g = tanh(...)`` of ``x + R h``, in ONNX's order:

    ``c' = f c + i g``,   ``h' = o tanh(c')``.

The attribute ``cells`` makes the result ``[2, steps, batch, size]``: all ``h'``, then all ``c'``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..autodiff import GradBuilder
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, ParamSlot, Sample, Work, array, register
from .elementary import sigmoid32, tanh32
from .gemm import chain, get, product_work
from .recurrent import (
    SOURCE,
    STRUCT,
    before,
    carried_work,
    check_operand,
    check_state,
    dims,
    order,
    params,
    state,
    stops,
    truncated,
    weight_gradient,
)

T = TensorType
GATES = 4


def _result(node: Node, shape: tuple[int, int, int]) -> tuple[int, ...]:
    return (2, *shape) if node.int_attr("cells") else shape


def _activated(gates: Array) -> tuple[Array, Array, Array, Array]:
    i, o, f, g = np.split(gates, GATES, axis=-1)
    return sigmoid32(i), sigmoid32(o), sigmoid32(f), tanh32(g)


def _infer(node: Node) -> list[TensorType]:
    steps, batch, size = dims(node, GATES)
    for index in (2, 3):
        check_state(node, index, batch, size)
    return [T(_result(node, (steps, batch, size)))]


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x, r = array(inputs, 0), array(inputs, 1)
    h, c = (state(x, get(inputs, i), r.shape[1]) for i in (2, 3))
    y = np.empty((2, len(x), *h.shape), x.dtype)
    for t in order(node, len(x)):
        i, o, f, g = _activated(chain(x[t], h, r.T))
        c = f * c + i * g
        h = o * tanh32(c)
        y[0, t], y[1, t] = h, c
    return [y if node.int_attr("cells") else y[0]]


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    x, r, h0, c0 = (*node.inputs, None, None)[:4]
    grads: list[Value | None] = [None] * len(node.inputs)
    operands = (dy, x, r, node.out, h0, c0)
    gates = b.add("LSTMGrad", operands, truncated(b, node), suffix="grad_gates")
    if need[0]:
        grads[0] = gates
    if need[1]:
        grads[1] = weight_gradient(b, node, gates, h0)
    return grads


def _work(node: Node) -> tuple[Work, ...]:
    steps, batch, size = dims(node, GATES)
    rows = steps * batch
    return (
        product_work(rows, GATES * size, (size,)),
        Work("transcendental", 5 * rows * size),
        Work("elementwise", rows * size),
    )


def _workspace(node: Node) -> int:
    """A zero row, the gates of a step and the cells of a batch."""
    _, batch, size = dims(node, GATES)
    return 4 * size * (1 + GATES + batch)


def _samples() -> Iterator[Sample]:
    for reverse in (0, 1):
        attrs: dict[str, Attr] = {"reverse": reverse, "cells": reverse}
        yield Sample((T((3, 2, 20)), T((20, 5))), attrs)
        first = (T((1, 2, 3)),) * 2
        types = (T((3, 2, 12)), T((12, 3)), *first)
        yield Sample(types, {**attrs, "cells": 1 - reverse}, differentiable=(0, 1))
    yield Sample((T((1, 1, 8)), T((8, 2)), T((1, 1, 2))), {"reverse": 0, "cells": 1}, (0, 1))
    yield Sample((T((2, 1, 8)), T((8, 2)), T((1, 1, 2))), {"reverse": 0, "cells": 1}, (0, 1))


register(
    OpDef(
        "LSTM",
        infer=_infer,
        kernel=_kernel,
        work=_work,
        c=CKernel(
            "odtplan_lstm_f32",
            STRUCT,
            SOURCE,
            lambda node: params(node, *dims(node, GATES), node.int_attr("cells")),
            operands=4,
        ),
        samples=_samples,
        vjp=_vjp,
        workspace=_workspace,
        params=(ParamSlot(1, "weight"),),
    )
)


# --- gradient of x: operands dy, x, R, the result, initial states ---------------------------------


def _grad_infer(node: Node) -> list[TensorType]:
    shape = dims(node, GATES, 1, 2)
    for index in (0, 3):
        check_operand(node, index, _result(node, shape))
    for index in (4, 5):
        check_state(node, index, *shape[1:])
    return [T((*shape[:2], GATES * shape[2]))]


def _grad_kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy, x, r, y = (array(inputs, i) for i in range(4))
    steps, _, size = dims(node, GATES, 1, 2)
    dcells = None
    if node.int_attr("cells"):
        y, (dy, dcells) = y[0], dy
    h, c = (state(x, get(inputs, i), size) for i in (4, 5))
    i, o, f, g = _activated(chain(x, before(node, y, h), r.T))
    cells = np.empty_like(i)
    for t in order(node, steps):
        cells[t] = c = f[t] * c + i[t] * g[t]
    earlier = before(node, cells, state(x, get(inputs, 5), size))
    dx, dh, dc = np.empty_like(x), np.zeros_like(c), np.zeros_like(c)
    for done, t in enumerate(order(node, steps)[::-1], 1):
        out, squashed = dy[t] + dh, tanh32(cells[t])
        if dcells is not None:
            dc = dc + dcells[t]
        dc = dc + (out * o[t]) * (1 - squashed * squashed)
        dx[t] = np.concatenate(
            (
                (dc * g[t]) * (i[t] * (1 - i[t])),
                (out * squashed) * (o[t] * (1 - o[t])),
                (dc * earlier[t]) * (f[t] * (1 - f[t])),
                (dc * i[t]) * (1 - g[t] * g[t]),
            ),
            axis=-1,
        )
        if stops(node, done):
            dc, dh = np.zeros_like(dc), np.zeros_like(dh)
        else:
            dc, dh = dc * f[t], chain(np.zeros_like(dh), dx[t], r)
    return [dx]


def _grad_work(node: Node) -> tuple[Work, ...]:
    steps, batch, size = dims(node, GATES, 1, 2)
    rows = steps * batch
    return (
        product_work(rows, GATES * size, (size,)),
        *carried_work(node, steps, batch, size, GATES),
        Work("transcendental", 5 * rows * size),
        Work("elementwise", 3 * rows * size),
    )


def _grad_workspace(node: Node) -> int:
    """A zero row, all cells, and the gradients of state and cells of a batch."""
    steps, batch, size = dims(node, GATES, 1, 2)
    return 4 * size * (1 + batch * (steps + 2))


def _grad_samples() -> Iterator[Sample]:
    for s in _samples():
        x, r, *first = s.types
        assert x is not None
        assert r is not None
        y = T((*(2,) * bool(s.attrs["cells"]), *x.shape[:2], r.shape[1]))
        for bptt in ({}, {"bptt": 2}):
            yield Sample((y, x, r, y, *first), {**s.attrs, **bptt})


register(
    OpDef(
        "LSTMGrad",
        infer=_grad_infer,
        kernel=_grad_kernel,
        work=_grad_work,
        c=CKernel(
            "odtplan_lstm_grad_f32",
            STRUCT,
            SOURCE,
            lambda node: params(node, *dims(node, GATES, 1, 2), node.int_attr("cells")),
            operands=6,
        ),
        samples=_grad_samples,
        inplace=(1,),
        workspace=_grad_workspace,
    )
)
