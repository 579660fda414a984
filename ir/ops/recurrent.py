"""What recurrent layers share, and the gradient of their recurrent weights.

A layer of one direction is two nodes. The product of all steps with the input weights, biases
included, is an ordinary Gemm: it trains by parts, quantizes and streams as any other. The recurrent
node takes its result ``x`` ``[steps, batch, gates x size]``, adds the product of the recurrent
weights ``[gates x size, size]`` with the state of the step before, and loops over the steps. The
gates are those of ONNX, in its order.

One looped node instead of an unrolled graph: 28 steps of an LSTM would be some 400 forward nodes,
each with a call and a descriptor in flash and slots in the planner's timeline. The planner chooses
all the same whether ``x``, the largest tensor that backward reads, is kept or computed again from
the layer's input, because the Gemm is a node of its own.

Back-propagation through time (Werbos 1990) runs over all steps, or stops every ``bptt`` steps,
counted from the last one, as if the states were constants there (Williams and Peng 1990). The
gradient nodes compute the
gates again from ``x`` and the states ``y``, which the gradient of the recurrent weights and mostly
the next layer read as well: one more product with the recurrent weights, instead of 5 numbers per
cell that forward would save (an LSTM's gates and cell).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..autodiff import GradBuilder
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, array, f32_operand, register
from .gemm import chain, get, product_work

T = TensorType
SOURCE = "odtplan_recurrent"
STRUCT = "odtplan_recurrent_t"


# --- what recurrent layers share ------------------------------------------------------------------


def dims(node: Node, gates: int, at: int = 0, weight_at: int = 1) -> tuple[int, int, int]:
    """Steps, batch and size of a layer; ``x`` and the recurrent weights are these operands.

    Raises:
        GraphError: The two don't fit each other.
    """
    x, r = f32_operand(node, at), f32_operand(node, weight_at)
    if len(r.shape) != 2 or r.shape[0] != gates * r.shape[1]:
        raise GraphError(f"the recurrent weights {r} are not {gates} square matrices")
    size = r.shape[1]
    if len(x.shape) != 3 or x.shape[2] != gates * size:
        raise GraphError(f"the input {x} is not [steps, batch, {gates * size}]")
    return x.shape[0], x.shape[1], size


def check_state(node: Node, index: int, batch: int, size: int) -> None:
    """An optional initial state has the shape ``[1, batch, size]``.

    Raises:
        GraphError: It has another one.
    """
    if index < len(node.inputs) and node.inputs[index] is not None:
        state = f32_operand(node, index)
        if state.shape != (1, batch, size):
            raise GraphError(f"the initial state {state} is not [1, {batch}, {size}]")


def check_operand(node: Node, index: int, wanted: tuple[int, ...]) -> TensorType:
    """The type of an operand of a gradient, which must have this shape.

    Raises:
        GraphError: It has another one.
    """
    t = f32_operand(node, index)
    if t.shape != wanted:
        raise GraphError(f"operand {index}, {t}, is not {list(wanted)}")
    return t


def order(node: Node, steps: int) -> Sequence[int]:
    """Positions of the steps in the order in which the layer takes them."""
    return range(steps)[::-1] if node.int_attr("reverse") else range(steps)


def state(x: Array, first: Array | None, size: int) -> Array:
    """The state before the first step, ``[batch, size]``; zeros where none is given."""
    return np.zeros((x.shape[1], size), x.dtype) if first is None else first[0]


def before(node: Node, y: Array, first: Array) -> Array:
    """The states before each step, by position, from those behind it and the first one."""
    if node.int_attr("reverse"):
        return np.concatenate((y[1:], first[None]))
    return np.concatenate((first[None], y[:-1]))


def truncated(builder: GradBuilder, node: Node) -> dict[str, Attr]:
    """Attributes of the gradient of a layer."""
    return node.attrs if builder.bptt is None else {**node.attrs, "bptt": builder.bptt}


def stops(node: Node, done: int) -> bool:
    """The gradient of the state goes no further once it has passed so many steps."""
    bptt = node.int_attr("bptt", 0)
    return bptt > 0 and done % bptt == 0


def params(node: Node, steps: int, batch: int, size: int, option: int) -> dict[str, Attr]:
    """Fields of ``odtplan_recurrent_t``."""
    return {
        "steps": steps,
        "batch": batch,
        "size": size,
        "reverse": node.int_attr("reverse"),
        "option": option,
        "bptt": node.int_attr("bptt", 0),
    }


def carried_work(node: Node, steps: int, batch: int, size: int, gates: int) -> tuple[Work, ...]:
    """Products that carry the gradient of a state back to the step before; none from the first."""
    carried = sum(not stops(node, done) for done in range(1, steps))
    return (product_work(carried * batch, size, (gates * size,)),) if carried else ()


def weight_gradient(
    builder: GradBuilder, node: Node, gates: Value, first: Value | None, hidden: Value | None = None
) -> Value:
    """Gradient of the recurrent weights of a layer.

    Args:
        builder: Builder.
        node: The layer.
        gates: Gradient of ``x``.
        first: Initial state of the layer, if it has one.
        hidden: Of a GRU: what its third block of weights needs (``ir/ops/gru.py``).
    """
    y = node.out
    attrs: dict[str, Attr] = {
        "reverse": node.int_attr("reverse"),
        "initial": int(first is not None),
        "linear_before_reset": node.int_attr("linear_before_reset", 0),
    }
    if first is not None:
        y = _with_first(builder, node, first)
    return builder.add("RecurrentGradWeight", (gates, y, hidden), attrs, suffix="grad_weight")


def _with_first(builder: GradBuilder, node: Node, first: Value) -> Value:
    """The states before each step as a tensor of its own."""
    steps, batch, size = node.out.type.shape[-3:]
    if steps == 1:
        return first
    rank, back = len(node.out.type.shape), node.int_attr("reverse")
    begin: dict[str, Attr] = {
        "starts": (*(0,) * (rank - 3), back, 0, 0),
        "sizes": (*(1,) * (rank - 3), steps - 1, batch, size),
        "steps": (1,) * rank,
    }
    rest = builder.add("Slice", (node.out,), begin, suffix="states")
    if rank > 3:
        shape: dict[str, Attr] = {"shape": (steps - 1, batch, size)}
        rest = builder.add("Reshape", (rest,), shape, suffix="states_flat")
    parts = (rest, first) if back else (first, rest)
    return builder.add("Concat", parts, {"axis": 0}, suffix="states_before")


# --- gradient of recurrent weights ----------------------------------------------------------------
#
# Rows of it are sums over steps and batch of a gate's gradient times the state before the step.
# ``initial``: operand 1 holds these states; without it they are the layer's results of the step
# before, and of the first step there is nothing, because its state was zero. Operand 2 belongs to
# the last third of the rows of a GRU: if ``linear_before_reset``, it takes the place of the gate's
# gradient, else that of the states.


def _grad_weight_dims(node: Node) -> tuple[int, int, int, int]:
    """Steps, batch, rows and size."""
    gates, states = f32_operand(node, 0), f32_operand(node, 1)
    if len(gates.shape) != 3 or len(states.shape) < 3:
        raise GraphError(f"gradient {gates} or states {states} have too few axes")
    steps, batch, rows = gates.shape
    size = states.shape[-1]
    if states.shape[-3:-1] != (steps, batch) or rows % size:
        raise GraphError(f"gradient {gates} and states {states} don't belong together")
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        check_operand(node, 2, (steps, batch, size))
        if rows != 3 * size:
            raise GraphError(f"gradient {gates} and states {states} are not those of a GRU")
    return steps, batch, rows, size


def _grad_weight_rows(node: Node, inputs: Sequence[Array | None], begin: int, end: int) -> Array:
    gates, states, hidden = array(inputs, 0), array(inputs, 1), get(inputs, 2)
    steps, _, rows, size = _grad_weight_dims(node)
    states = states.reshape(-1, *states.shape[-3:])[0]
    back = node.int_attr("reverse")
    here, ahead = slice(1 - back, steps - back), slice(back, steps - 1 + back)
    if node.int_attr("initial"):
        here = ahead = slice(0, steps)
    own = rows if hidden is None else rows - size
    parts = [(gates[here, :, begin : min(end, own)], states[ahead])]
    if hidden is not None and node.int_attr("linear_before_reset", 0):
        parts.append((hidden[here, :, max(begin - own, 0) : max(end - own, 0)], states[ahead]))
    elif hidden is not None:
        parts.append((gates[:, :, max(begin, own) : max(end, own)], hidden))
    sums = []
    for d, h in parts:
        d, h = d.reshape(-1 if d.size else 0, d.shape[2]), h.reshape(-1, size)
        sums.append(chain(np.zeros((d.shape[1], size), d.dtype), d.T, h))
    return np.concatenate(sums)


def _grad_weight_params(node: Node) -> dict[str, Attr]:
    steps, batch, rows, size = _grad_weight_dims(node)
    shift, back = batch * (1 - node.int_attr("initial")), node.int_attr("reverse")
    return {
        "all": steps * batch,
        "terms": steps * batch - shift,
        "rows": rows,
        "size": size,
        "gates_at": 0 if back else shift,
        "states_at": shift if back else 0,
        "linear_before_reset": node.int_attr("linear_before_reset", 0),
    }


def _grad_weight_work(node: Node) -> Work:
    steps, batch, rows, size = _grad_weight_dims(node)
    return product_work(rows, size, (steps * batch,), "gemm_grad_weight")


def _grad_weight_samples() -> Iterator[Sample]:
    for reverse in (0, 1):
        attrs: dict[str, Attr] = {"reverse": reverse, "initial": 0}
        yield Sample((T((3, 2, 20)), T((3, 2, 5))), attrs)
        yield Sample((T((3, 1, 5)), T((3, 1, 5))), {**attrs, "initial": 1})
        for linear in (0, 1):
            types = (T((3, 2, 15)), T((3, 2, 5)), T((3, 2, 5)))
            yield Sample(types, {**attrs, "initial": linear, "linear_before_reset": linear})
            yield Sample(types, {**attrs, "linear_before_reset": linear})
    yield Sample((T((2, 1, 8)), T((2, 2, 1, 2))), {"reverse": 0, "initial": 0})
    yield Sample((T((1, 1, 8)), T((1, 1, 2))), {"reverse": 0, "initial": 0})


register(
    OpDef(
        "RecurrentGradWeight",
        infer=lambda node: [T(_grad_weight_dims(node)[2:])],
        kernel=lambda node, inputs: [_grad_weight_rows(node, inputs, 0, node.out.type.shape[0])],
        rows_kernel=_grad_weight_rows,
        work=_grad_weight_work,
        c=CKernel(
            "odtplan_recurrent_grad_weight_f32",
            "odtplan_recurrent_grad_weight_t",
            SOURCE,
            _grad_weight_params,
            operands=3,
        ),
        samples=_grad_weight_samples,
    )
)
