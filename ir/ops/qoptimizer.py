"""Update rules for integer parameters: the real step of ``optimizer``, rounded to stored steps.

``QSGD, QMomentum, QAdagrad, QAdam (w i8 | i32, g f32, *states f32, hyper f32, scales f32[rows])``:
g is the gradient with respect to the real weight, ``d`` the step that the float rule subtracts from
it, and ``scales`` the real value of one stored step of each row of axis 0. Then ::

    w' = saturate(w + round(-d / scale))        (attribute qas = 1: the real weight moves by -d)
    w' = saturate(w + round(-d * scale))        (qas = 0: plain descent on the stored integers)

The first is quantization-aware scaling: the gradient of the integers, times ``scale ** -2``.

Rounding is ``stochastic`` (up in magnitude with the probability of the fraction, so the mean is
the real step) or ``nearest`` (of w', ties to even). The random number of an element is a hash of
``hyper[2]`` (number of the update), the attribute ``stream`` (of the parameter) and the element's
index in the whole tensor: results don't depend on tiles, machine or order. It has 24 bits, so
steps of less than 2**-24 are never taken.

i8 saturates at -128..127. A bias saturates at -2**30..2**30, which leaves the other half of the
accumulator to the products; one that is beyond stays or moves inwards. A NaN leaves w as it is
(the moments keep it), an infinite step saturates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType
from ..opdef import (
    CKernel,
    OpDef,
    RunKernel,
    Sample,
    Work,
    array,
    f32_operand,
    operand,
    register,
)
from .elementary import sqrt32
from .optimizer import adam_attrs, check_hyper, scaled
from .qtypes import i8

T = TensorType
#: Bounds of an updated parameter.
BOUNDS: dict[str, tuple[int, int]] = {"i8": (-128, 127), "i32": (-(2**30), 2**30)}
#: Largest step, in stored steps.
_LARGEST = 2**30
ROUNDINGS = ("stochastic", "nearest")


def _infer(states: int) -> Callable[[Node], Sequence[TensorType]]:
    def infer(node: Node) -> Sequence[TensorType]:
        w = operand(node, 0)
        if w.dtype not in BOUNDS or not w.shape:
            raise GraphError(f"operand 0 is {w}; i8 and i32 tensors with rows are updated here")
        for i in range(1, 2 + states):
            if f32_operand(node, i).shape != w.shape:
                raise GraphError(f"operand {i} is {operand(node, i)}, the weight {w}")
        check_hyper(node, states)
        scales = f32_operand(node, 3 + states)
        if scales.shape != w.shape[:1]:
            raise GraphError(f"scales {scales} do not fit the {w.shape[0]} rows of {w}")
        if node.attrs["rounding"] not in ROUNDINGS:
            raise GraphError(f"rounding {node.attrs['rounding']!r} is not one of {ROUNDINGS}")
        node.int_attr("stream")
        moment = TensorType(w.shape)
        return (w, *(moment,) * states)

    return infer


# -- random numbers --------------------------------------------------------------------------------


def _mix(x: Array, key: Array | None = None) -> Array:
    """A bijection of 32 bits in which every bit of x changes every bit with probability 1/2.

    Two rounds, found by C. Wellons' search (hash-prospector, bias 0.107). A key in the second round
    keeps sequences of neighbouring x apart that would overlap otherwise.
    """
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x21F0AAAD)
    x = x ^ (x >> np.uint32(15)) ^ (np.uint32(0) if key is None else key)
    x = x * np.uint32(0x735A2D97)
    return np.asarray(x ^ (x >> np.uint32(15)))


def uniform(update: int, stream: int, index: Array) -> Array:
    """Random numbers of elements in one update: odd multiples of 2**-24 between 0 and 1, f32.

    Args:
        update: Number of the update, 0..2**24.
        stream: Tells parameters apart.
        index: uint32 places in the whole tensor.
    """
    word = np.array([update, stream], np.int64).astype(np.uint32)
    key = _mix(_mix(word[1:]) + word[:1])
    bits = _mix(index + key, key) >> np.uint32(8)
    return np.asarray((bits | np.uint32(1)).astype(np.float32) * np.float32(2.0**-24))


# -- the step --------------------------------------------------------------------------------------


def _moved(node: Node, w: Array, d: Array, hyper: Array, scales: Array, first_row: int) -> Array:
    """The stored weights after the real step -d."""
    scale = scales.reshape(-1, *(1,) * (w.ndim - 1)).astype(d.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        step = d / scale if node.int_attr("qas", 1) else d * scale
    size = np.abs(step)
    size = np.where(np.isnan(size), 0, np.minimum(size, d.dtype.type(_LARGEST)))
    whole = size.astype(np.int64)
    fraction = size - whole.astype(d.dtype)
    if node.attrs["rounding"] == "nearest":
        odd = (w.astype(np.int64) ^ whole) & 1
        up = (fraction > 0.5) | ((fraction == 0.5) & (odd == 1))
    else:
        begin = first_row * (w.size // w.shape[0])
        index = np.arange(begin, begin + w.size, dtype=np.int64).astype(np.uint32)
        update = int(hyper[2])
        up = uniform(update, node.int_attr("stream"), index).reshape(w.shape) <= fraction
    steps = whole + up
    old = w.astype(np.int64)
    low, high = BOUNDS["i8" if w.dtype == np.int8 else "i32"]
    new = np.where(step > 0, old - steps, old + steps)
    return np.asarray(np.clip(new, np.minimum(old, low), np.maximum(old, high)), w.dtype)


def _sgd(node: Node, inputs: Sequence[Array | None], first_row: int) -> Sequence[Array]:
    w, g, hyper, scales = (array(inputs, i) for i in range(4))
    return (_moved(node, w, hyper[0] * scaled(node, g), hyper, scales, first_row),)


def _momentum(node: Node, inputs: Sequence[Array | None], first_row: int) -> Sequence[Array]:
    w, g, m, hyper, scales = (array(inputs, i) for i in range(5))
    m = np.asarray(m.dtype.type(node.float_attr("momentum")) * m + scaled(node, g))
    return _moved(node, w, hyper[0] * m, hyper, scales, first_row), m


def _adagrad(node: Node, inputs: Sequence[Array | None], first_row: int) -> Sequence[Array]:
    w, g, total, hyper, scales = (array(inputs, i) for i in range(5))
    g = scaled(node, g)
    total = np.asarray(total + g * g)
    epsilon = g.dtype.type(node.float_attr("epsilon"))
    d = (hyper[0] * g) / (sqrt32(total) + epsilon)
    return _moved(node, w, d, hyper, scales, first_row), total


def _adam(node: Node, inputs: Sequence[Array | None], first_row: int) -> Sequence[Array]:
    w, g, m, v, hyper, scales = (array(inputs, i) for i in range(6))
    beta1, rest1, beta2, rest2, epsilon = map(g.dtype.type, adam_attrs(node).values())
    g = scaled(node, g)
    m = np.asarray(beta1 * m + rest1 * g)
    v = np.asarray(beta2 * v + (rest2 * g) * g)
    d = (hyper[3] * m) / (sqrt32(v) * hyper[1] + epsilon)
    return _moved(node, w, d, hyper, scales, first_row), m, v


# -- the records -----------------------------------------------------------------------------------


def _fields(node: Node) -> dict[str, Attr]:
    w = operand(node, 0)
    return {
        "rows": w.shape[0],
        "row": w.size // w.shape[0],
        "gradient_scale": node.float_attr("gradient_scale", 1.0),
        "qas": node.int_attr("qas", 1),
        "nearest": int(node.attrs["rounding"] == "nearest"),
        "stream": node.int_attr("stream"),
    }


def _base(node: Node) -> dict[str, Attr]:
    return {f"base.{k}": v for k, v in _fields(node).items()}


def _samples(states: int, attrs: dict[str, Attr]) -> Callable[[], Iterator[Sample]]:
    def samples() -> Iterator[Sample]:
        weights = (i8((3, 4), (0.03, 0.05, 0.2)), i8((5, 2, 3, 3), 0.1), T((5,), "i32"))
        for i, w in enumerate(weights):
            for scale, rounding in ((1.0, "stochastic"), (0.25, "nearest")):
                moments = (T(w.shape),) * (1 + states)
                yield Sample(
                    (w, *moments, T((4 if states == 2 else 3,)), T(w.shape[:1])),
                    {
                        **attrs,
                        "gradient_scale": scale,
                        "qas": (i + 1) % 3 and 1,
                        "rounding": rounding,
                        "stream": 7 * i,
                    },
                    differentiable=(),
                    low=0.02,  # the second moment of Adam can't be negative
                    ranges={0: (-128, 127) if w.dtype == "i8" else (-(2**30), 2**30)},
                )

    return samples


def _whole(kernel: RunKernel) -> Callable[[Node, Sequence[Array | None]], Sequence[Array]]:
    return lambda node, inputs: kernel(node, inputs, 0)


def _register(
    name: str,
    states: int,
    kernel: RunKernel,
    fields: Callable[[Node], dict[str, Attr]],
    attrs: dict[str, Attr],
) -> None:
    stem = f"odtplan_{name.lower()}"
    register(
        OpDef(
            name,
            infer=_infer(states),
            kernel=_whole(kernel),
            run_kernel=kernel,
            work=lambda node: Work("elementwise", (4 + states) * operand(node, 0).size),
            c=CKernel(
                f"{stem}_i8",
                f"{stem}_t",
                "odtplan_qoptimizer",
                fields,
                variants={"i32": f"{stem}_i32"},
            ),
            samples=_samples(states, attrs),
            inplace=(0,),
        )
    )


_register("QSGD", 0, _sgd, _fields, {})
_register(
    "QMomentum",
    1,
    _momentum,
    lambda node: {**_base(node), "momentum": node.float_attr("momentum")},
    {"momentum": 0.9},
)
_register(
    "QAdagrad",
    1,
    _adagrad,
    lambda node: {**_base(node), "epsilon": node.float_attr("epsilon")},
    {"epsilon": 1e-8},
)
_register(
    "QAdam",
    2,
    _adam,
    lambda node: {**_base(node), **adam_attrs(node)},
    {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
)
