"""The simple recurrent layer (Elman 1990) of one direction: ``h' = f(x + R h)``, f tanh or ReLU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..autodiff import GradBuilder
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, CostClass, OpDef, ParamSlot, Sample, Work, array, register
from .elementary import tanh32
from .gemm import chain, get, product_work
from .recurrent import (
    SOURCE,
    STRUCT,
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


def _activation(node: Node) -> str:
    name = node.attrs["activation"]
    if name not in ("Tanh", "Relu"):
        raise GraphError(f"activation {name}; Tanh and Relu are supported")
    return str(name)


def _infer(node: Node) -> list[TensorType]:
    steps, batch, size = dims(node, 1)
    _activation(node)
    check_state(node, 2, batch, size)
    return [T((steps, batch, size))]


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    x, r = array(inputs, 0), array(inputs, 1)
    relu = _activation(node) == "Relu"
    h, y = state(x, get(inputs, 2), r.shape[1]), np.empty_like(x)
    for t in order(node, len(x)):
        h = chain(x[t], h, r.T)
        h = np.where(h < 0, h.dtype.type(0), h) if relu else tanh32(h)
        y[t] = h
    return [y]


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    r, first = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    grads: list[Value | None] = [None] * len(node.inputs)
    gates = b.add("RNNGrad", (dy, r, node.out), truncated(b, node), suffix="grad_gates")
    if need[0]:
        grads[0] = gates
    if need[1]:
        grads[1] = weight_gradient(b, node, gates, first)
    return grads


def _work(node: Node) -> tuple[Work, ...]:
    steps, batch, size = dims(node, 1)
    rows = steps * batch
    relu = _activation(node) == "Relu"
    kind: CostClass = "elementwise" if relu else "transcendental"
    return product_work(rows, size, (size,)), Work(kind, rows * size)


def _params(node: Node) -> dict[str, Attr]:
    steps, batch, size = node.out.type.shape
    return params(node, steps, batch, size, int(_activation(node) == "Relu"))


def _samples() -> Iterator[Sample]:
    for reverse in (0, 1):
        for activation in ("Tanh", "Relu"):
            attrs: dict[str, Attr] = {"reverse": reverse, "activation": activation}
            types = (T((3, 2, 5)), T((5, 5)), T((1, 2, 5)) if reverse else None)
            yield Sample(types, attrs, differentiable=(0, 1))
    yield Sample((T((1, 1, 4)), T((4, 4))), {"reverse": 0, "activation": "Tanh"})


register(
    OpDef(
        "RNN",
        infer=_infer,
        kernel=_kernel,
        work=_work,
        c=CKernel("odtplan_rnn_f32", STRUCT, SOURCE, _params, operands=3),
        samples=_samples,
        vjp=_vjp,
        inplace=(0,),
        workspace=lambda node: 4 * node.out.type.shape[2],
        params=(ParamSlot(1, "weight"),),
    )
)


# --- gradient of x: operands dy, R, y -------------------------------------------------------------


def _grad_infer(node: Node) -> list[TensorType]:
    shape = dims(node, 1)
    check_operand(node, 2, shape)
    return [T(shape)]


def _grad_kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy, r, y = (array(inputs, i) for i in range(3))
    relu = _activation(node) == "Relu"
    dx, dh = np.empty_like(dy), np.zeros_like(dy[0])
    for done, t in enumerate(order(node, len(dy))[::-1], 1):
        total = dy[t] + dh
        if relu:
            dx[t] = np.where(y[t] > 0, total, total.dtype.type(0))
        else:
            dx[t] = total * (1 - y[t] * y[t])
        dh = np.zeros_like(dh) if stops(node, done) else chain(np.zeros_like(dh), dx[t], r)
    return [dx]


def _grad_work(node: Node) -> tuple[Work, ...]:
    steps, batch, size = node.out.type.shape
    return *carried_work(node, steps, batch, size, 1), Work("elementwise", steps * batch * size)


def _grad_samples() -> Iterator[Sample]:
    for reverse, activation in ((0, "Tanh"), (1, "Tanh"), (0, "Relu")):
        attrs: dict[str, Attr] = {"reverse": reverse, "activation": activation}
        yield Sample((T((3, 2, 5)), T((5, 5)), T((3, 2, 5))), attrs)
        yield Sample((T((5, 2, 3)), T((3, 3)), T((5, 2, 3))), {**attrs, "bptt": 2})


register(
    OpDef(
        "RNNGrad",
        infer=_grad_infer,
        kernel=_grad_kernel,
        work=_grad_work,
        c=CKernel("odtplan_rnn_grad_f32", STRUCT, SOURCE, _params),
        samples=_grad_samples,
        inplace=(0,),
        workspace=lambda node: 4 * node.out.type.size // node.out.type.shape[0],
    )
)
