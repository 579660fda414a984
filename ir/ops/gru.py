"""Gated recurrent unit (Cho et al. 2014) of one direction.

With the gates ``z, r = sigmoid(...)`` of ``x + R h``, in ONNX's order ``z, r, n``:

    ``n = tanh(x + R (r h))``, or ``n = tanh(x + r (R h + b))`` with ``linear_before_reset``,
    ``h' = (1 - z) n + z h``.

``b`` is the only bias that can't be part of ``x``. Backward computes ``n`` with it, so it has the
role of a scale: it is updated after the gradient of its node, not before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..autodiff import GradBuilder
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, ParamSlot, Sample, Work, array, register
from .elementary import sigmoid32, tanh32
from .gemm import chain, get, optional, product_work
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
GATES = 3


def _linear(node: Node) -> bool:
    return bool(node.int_attr("linear_before_reset"))


def _check_bias(node: Node, index: int, size: int) -> None:
    if optional(node, index) is not None:
        check_operand(node, index, (size,))
        if not _linear(node):
            raise GraphError("a recurrent bias needs linear_before_reset")


def _step(
    node: Node, x: Array, h: Array, r: Array, bias: Array | None
) -> tuple[Array, Array, Array, Array]:
    """``z``, ``r``, ``n`` and the inner product ``R h + b`` or state ``r h``."""
    size = h.shape[-1]
    gates = sigmoid32(chain(x[..., : 2 * size], h, r[: 2 * size].T))
    z, reset = gates[..., :size], gates[..., size:]
    last, weights = x[..., 2 * size :], r[2 * size :].T
    if _linear(node):
        start = np.zeros_like(h) if bias is None else np.zeros_like(h) + bias
        inner = chain(start, h, weights)
        return z, reset, tanh32(last + reset * inner), inner
    inner = reset * h
    return z, reset, tanh32(chain(last, inner, weights)), inner


def _infer(node: Node) -> list[TensorType]:
    shape = dims(node, GATES)
    _check_bias(node, 2, shape[2])
    check_state(node, 3, *shape[1:])
    return [T(shape)]


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x, r = array(inputs, 0), array(inputs, 1)
    h = state(x, get(inputs, 3), r.shape[1])
    y = np.empty((len(x), *h.shape), x.dtype)
    for t in order(node, len(x)):
        z, _, n, _ = _step(node, x[t], h, r, get(inputs, 2))
        y[t] = h = (1 - z) * n + z * h
    return [y]


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    x, r, bias, first = (*node.inputs, None, None)[:4]
    grads: list[Value | None] = [None] * len(node.inputs)
    operands = (dy, x, r, node.out, bias, first)
    gates = b.add("GRUGrad", operands, truncated(b, node), suffix="grad_gates")
    assert gates.producer is not None
    hidden = gates.producer.outputs[1]
    if need[0]:
        grads[0] = gates
    if need[1]:
        grads[1] = weight_gradient(b, node, gates, first, hidden)
    if len(need) > 2 and need[2]:
        grads[2] = b.add("GemmGradBias", (hidden,), suffix="grad_bias")
    return grads


def _work(node: Node) -> tuple[Work, ...]:
    steps, batch, size = dims(node, GATES)
    rows = steps * batch
    return (
        product_work(rows, GATES * size, (size,)),
        Work("transcendental", 3 * rows * size),
        Work("elementwise", 2 * rows * size),
    )


def _samples() -> Iterator[Sample]:
    for reverse in (0, 1):
        for linear in (0, 1):
            attrs: dict[str, Attr] = {"reverse": reverse, "linear_before_reset": linear}
            yield Sample((T((3, 2, 15)), T((15, 5))), attrs)
            bias = T((3,)) if linear else None
            types = (T((3, 2, 9)), T((9, 3)), bias, T((1, 2, 3)))
            yield Sample(types, attrs, differentiable=(0, 1, 2)[: 2 + linear])
    yield Sample((T((1, 1, 6)), T((6, 2)), T((2,))), {"reverse": 0, "linear_before_reset": 1})


register(
    OpDef(
        "GRU",
        infer=_infer,
        kernel=_kernel,
        work=_work,
        c=CKernel(
            "odtplan_gru_f32",
            STRUCT,
            SOURCE,
            lambda node: params(node, *dims(node, GATES), int(_linear(node))),
            operands=4,
        ),
        samples=_samples,
        vjp=_vjp,
        workspace=lambda node: 4 * 5 * node.out.type.shape[2],  # zeros, gates, inner
        params=(ParamSlot(1, "weight"), ParamSlot(2, "scale")),
    )
)


# --- gradient of x: operands dy, x, R, y, b, initial state ----------------------------------------
#
# The second result is what the last third of the rows of R needs, [steps, batch, size]: the
# gradient of R h + b with linear_before_reset, else the state r h.


def _grad_infer(node: Node) -> list[TensorType]:
    shape = dims(node, GATES, 1, 2)
    for index in (0, 3):
        check_operand(node, index, shape)
    _check_bias(node, 4, shape[2])
    check_state(node, 5, *shape[1:])
    return [T((*shape[:2], GATES * shape[2])), T(shape)]


def _grad_kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy, x, r, y = (array(inputs, i) for i in range(4))
    steps, _, size = dims(node, GATES, 1, 2)
    earlier = before(node, y, state(x, get(inputs, 5), size))
    z, reset, n, inner = _step(node, x, earlier, r, get(inputs, 4))
    dx, hidden = np.empty_like(x), np.empty_like(y)
    dh = zero = np.zeros_like(y[0])
    upper, lower = r[: 2 * size], r[2 * size :]
    for done, t in enumerate(order(node, steps)[::-1], 1):
        total = dy[t] + dh
        dn = (total * (1 - z[t])) * (1 - n[t] * n[t])
        dz = (total * (earlier[t] - n[t])) * (z[t] * (1 - z[t]))
        slope = reset[t] * (1 - reset[t])
        if _linear(node):
            dr = (dn * inner[t]) * slope
            hidden[t] = dn * reset[t]
            direct = chain(zero, hidden[t], lower)
        else:
            back = chain(zero, dn, lower)
            dr = (back * earlier[t]) * slope
            hidden[t] = inner[t]
            direct = back * reset[t]
        dx[t] = np.concatenate((dz, dr, dn), axis=-1)
        dh = zero
        if not stops(node, done):
            dh = (total * z[t] + chain(zero, dx[t, :, : 2 * size], upper)) + direct
    return [dx, hidden]


def _grad_work(node: Node) -> tuple[Work, ...]:
    steps, batch, size = dims(node, GATES, 1, 2)
    rows = steps * batch
    return (
        product_work(rows, GATES * size, (size,)),
        *carried_work(node, steps, batch, size, GATES),
        Work("transcendental", 3 * rows * size),
        Work("elementwise", 4 * rows * size),
    )


def _grad_workspace(node: Node) -> int:
    """A zero row, two sums of a row, and the gradient of the state of a batch."""
    _, batch, size = dims(node, GATES, 1, 2)
    return 4 * size * (3 + batch)


def _grad_samples() -> Iterator[Sample]:
    for s in _samples():
        x, r, *rest = s.types
        assert x is not None
        assert r is not None
        y = T((*x.shape[:2], r.shape[1]))
        for bptt in ({}, {"bptt": 2}):
            yield Sample((y, x, r, y, *rest), {**s.attrs, **bptt})


register(
    OpDef(
        "GRUGrad",
        infer=_grad_infer,
        kernel=_grad_kernel,
        work=_grad_work,
        c=CKernel(
            "odtplan_gru_grad_f32",
            STRUCT,
            SOURCE,
            lambda node: params(node, *dims(node, GATES, 1, 2), int(_linear(node))),
            operands=6,
        ),
        samples=_grad_samples,
        inplace=(1,),
        workspace=_grad_workspace,
    )
)
