"""Update rules as in torch.optim, and the accumulation of gradients over micro-batches.

All are elementwise: a back end may call them on any run of rows, with ``count`` set to the number
of elements. Results lie in place: the new weight on the weight, each new moment on its moment (of
which ``OpDef.inplace`` names only the weight). ``hyper`` is that of ``TrainingGraph``: Adam takes
four numbers, and the others the first three of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType
from ..opdef import CKernel, OpDef, Sample, Work, operand, register
from .elementary import sqrt32

T = TensorType


def check_hyper(node: Node, states: int) -> None:
    """Demand enough hyper-parameters for an optimizer of so many tensors.

    Raises:
        GraphError: There are too few.
    """
    t = operand(node, 2 + states)
    known = ((4,),) if states == 2 else ((3,), (4,))
    if t.dtype != "f32" or t.shape not in known:
        raise GraphError(f"hyper must have the shape {' or '.join(map(str, known))}, not {t}")


def _infer(states: int) -> Callable[[Node], Sequence[TensorType]]:
    """Weight, gradient, ``states`` optimizer tensors of one type, and the hyper-parameters."""

    def infer(node: Node) -> Sequence[TensorType]:
        weight = operand(node, 0)
        for i in range(1, 2 + states):
            if operand(node, i) != weight:
                raise GraphError(f"operand {i} is {operand(node, i)}, the weight {weight}")
        check_hyper(node, states)
        return (weight,) * (1 + states)

    return infer


def _arrays(inputs: Sequence[Array | None]) -> list[Array]:
    result = [x for x in inputs if x is not None]
    assert len(result) == len(inputs)
    return result


def scaled(node: Node, g: Array) -> Array:
    """The gradient times the attribute ``gradient_scale``."""
    return np.asarray(g * g.dtype.type(node.float_attr("gradient_scale", 1.0)))


def _sgd_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    w, g, hyper = _arrays(inputs)
    return (np.asarray(w - hyper[0] * scaled(node, g)),)


def _momentum_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    w, g, m, hyper = _arrays(inputs)
    m = np.asarray(m.dtype.type(node.float_attr("momentum")) * m + scaled(node, g))
    return np.asarray(w - hyper[0] * m), m


def _adagrad_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    w, g, total, hyper = _arrays(inputs)
    g = scaled(node, g)
    total = np.asarray(total + g * g)
    epsilon = w.dtype.type(node.float_attr("epsilon"))
    return np.asarray(w - (hyper[0] * g) / (sqrt32(total) + epsilon)), total


def _adam_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    w, g, m, v, hyper = _arrays(inputs)
    beta1, rest1, beta2, rest2, epsilon = map(w.dtype.type, adam_attrs(node).values())
    g = scaled(node, g)
    m = np.asarray(beta1 * m + rest1 * g)
    v = np.asarray(beta2 * v + (rest2 * g) * g)
    return np.asarray(w - (hyper[3] * m) / (sqrt32(v) * hyper[1] + epsilon)), m, v


def adam_attrs(node: Node) -> dict[str, float]:
    """Coefficients; 1 - beta is formed in double and rounded once."""
    beta1, beta2 = node.float_attr("beta1"), node.float_attr("beta2")
    return {
        "beta1": beta1,
        "rest1": 1.0 - beta1,
        "beta2": beta2,
        "rest2": 1.0 - beta2,
        "epsilon": node.float_attr("epsilon"),
    }


def _count(node: Node) -> dict[str, Attr]:
    return {
        "count": operand(node, 0).size,
        "gradient_scale": node.float_attr("gradient_scale", 1.0),
    }


def _samples(states: int, attrs: dict[str, Attr]) -> Callable[[], Iterator[Sample]]:
    def samples() -> Iterator[Sample]:
        for shape in ((3, 4), (5,)):
            for scale in (1.0, 0.25):
                yield Sample(
                    (*(T(shape),) * (2 + states), T((4 if states == 2 else 3,))),
                    {**attrs, "gradient_scale": scale},
                    low=0.1,  # the second moment of Adam can't be negative
                )

    return samples


register(
    OpDef(
        "SGD",
        infer=_infer(0),
        kernel=_sgd_kernel,
        work=lambda node: Work("elementwise", operand(node, 0).size),
        c=CKernel("odtplan_sgd_f32", "odtplan_sgd_t", "odtplan_optimizer", _count),
        samples=_samples(0, {}),
        inplace=(0,),
    )
)

register(
    OpDef(
        "Momentum",
        infer=_infer(1),
        kernel=_momentum_kernel,
        work=lambda node: Work("elementwise", 2 * operand(node, 0).size),
        c=CKernel(
            "odtplan_momentum_f32",
            "odtplan_momentum_t",
            "odtplan_optimizer",
            lambda node: {**_count(node), "momentum": node.float_attr("momentum")},
        ),
        samples=_samples(1, {"momentum": 0.9}),
        inplace=(0,),
    )
)

register(
    OpDef(
        "Adagrad",
        infer=_infer(1),
        kernel=_adagrad_kernel,
        work=lambda node: Work("elementwise", 3 * operand(node, 0).size),
        c=CKernel(
            "odtplan_adagrad_f32",
            "odtplan_adagrad_t",
            "odtplan_optimizer",
            lambda node: {**_count(node), "epsilon": node.float_attr("epsilon")},
        ),
        samples=_samples(1, {"epsilon": 1e-8}),
        inplace=(0,),
    )
)

register(
    OpDef(
        "Adam",
        infer=_infer(2),
        kernel=_adam_kernel,
        work=lambda node: Work("elementwise", 4 * operand(node, 0).size),
        c=CKernel(
            "odtplan_adam_f32",
            "odtplan_adam_t",
            "odtplan_optimizer",
            lambda node: {**_count(node), **adam_attrs(node)},
        ),
        samples=_samples(2, {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}),
        inplace=(0,),
    )
)


def _accumulate_infer(node: Node) -> Sequence[TensorType]:
    if operand(node, 0) != operand(node, 1):
        raise GraphError(f"accumulator {operand(node, 0)} and gradient {operand(node, 1)} differ")
    return (operand(node, 0),)


def _accumulate_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    total, g = _arrays(inputs)
    return (np.asarray(total + g),)


def _accumulate_samples() -> Iterator[Sample]:
    yield Sample((T((3, 4)), T((3, 4))))
    yield Sample((T((5,)), T((5,))))


register(
    OpDef(
        "Accumulate",
        infer=_accumulate_infer,
        kernel=_accumulate_kernel,
        work=lambda node: Work("elementwise", operand(node, 0).size),
        c=CKernel(
            "odtplan_accumulate_f32",
            "odtplan_count_t",
            "odtplan_optimizer",
            lambda node: {"count": operand(node, 0).size},
        ),
        samples=_accumulate_samples,
        inplace=(0,),
    )
)
