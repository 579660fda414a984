"""Smooth functions of one operand: a table of the function and its slope.

Each row is an operator and, where it has a slope, a second one named ``<name>Grad`` that multiplies
the gradient by it. The slope is told by the RESULT wherever that determines it: then the function
can run in place, and the next layer often saves its operand, which is that result, anyway. Else
backward saves the operand and computes the function's parts again.

The C twins are the rows of ``backends/c/kernels/odtplan_unary.c``. Functions that cast a kink into
one bit per element (Relu and kin) are in ``activation.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..axes import same_axes
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, CostClass, OpDef, Sample, Vjp, array, f32_operand, register
from .activation_grad import SHAPES, scalar, work
from .elementary import (
    cos32,
    erf32,
    exp32,
    expm1_32,
    log32,
    sigmoid32,
    sin32,
    softplus32,
    sqrt32,
    tanh32,
)
from .elementwise import count_params, infer_like
from .trigonometry import (
    acos32,
    acosh32,
    asin32,
    asinh32,
    atan32,
    atanh32,
    cosh32,
    sinh32,
)

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

SOURCE = "odtplan_unary"
#: Of an array and the attributes as numbers of its dtype.
Function = Callable[..., Any]


@dataclass(frozen=True)
class Unary:
    """A row of the table.

    Attributes:
        name: Operator.
        function: Its meaning, of the operand and the attributes.
        slope: Its derivative, of what is saved and the attributes; None: no gradient.
        saved: What the slope is a function of.
        attrs: Names of the attributes in the order of the functions' arguments and of the C struct.
        check: Raises GraphError for attributes that don't do.
        values: Attributes of the samples, one tuple each.
        low: Smallest operand of the samples.
        high: Largest.
        kinks: Where the samples keep away from.
        cost_class: Of the function; ``grad_class`` is that of the slope.
    """

    name: str
    function: Function
    slope: Function | None = None
    saved: Literal["operand", "result"] = "operand"
    attrs: tuple[str, ...] = ()
    check: Callable[[Node], None] = lambda _: None
    values: tuple[tuple[float, ...], ...] = ((),)
    low: float = -4.0
    high: float = 4.0
    kinks: tuple[float, ...] = ()
    cost_class: CostClass = "transcendental"
    grad_class: CostClass = field(default="elementwise")

    @property
    def symbol(self) -> str:
        """Stem of the C names."""
        return f"odtplan_{self.name.lower()}"

    def evaluate(self, f: Function, node: Node, x: Array) -> Array:
        """``f`` of an array and the node's attributes; overflow gives inf, as in C."""
        with np.errstate(all="ignore"):
            return np.asarray(f(x, *(scalar(x, node.float_attr(a)) for a in self.attrs)))

    def c(self, suffix: str) -> CKernel:
        """The C function; its struct is the count and then the attributes."""

        def params(node: Node) -> dict[str, Attr]:
            return count_params(node) | {a: node.float_attr(a) for a in self.attrs}

        struct = f"{self.symbol}_t" if self.attrs else "odtplan_count_t"
        return CKernel(f"{self.symbol}{suffix}_f32", struct, SOURCE, params)

    def samples(self, operands: int) -> Iterator[Sample]:
        """Each set of attributes with each shape."""
        for values in self.values:
            for shape in SHAPES:
                yield Sample(
                    (TensorType(shape),) * operands,
                    dict(zip(self.attrs, values, strict=True)),
                    low=self.low,
                    high=self.high,
                    kinks=self.kinks,
                    gap=1e-2 if self.kinks else 0.0,
                )


def _register(row: Unary) -> None:
    def infer(node: Node) -> list[TensorType]:
        row.check(node)
        return infer_like(node)

    def vjp(
        builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
    ) -> list[Value | None]:
        saved = node.out if row.saved == "result" else node.inputs[0]
        attrs = {a: node.attrs[a] for a in row.attrs}
        grad = (
            builder.add(f"{row.name}Grad", (dy, saved), attrs, suffix="grad") if need[0] else None
        )
        return [grad]

    rule: Vjp | None = vjp if row.slope is not None else None
    register(
        OpDef(
            name=row.name,
            infer=infer,
            kernel=lambda node, inputs: [row.evaluate(row.function, node, array(inputs, 0))],
            work=work(row.cost_class),
            c=row.c(""),
            samples=lambda: row.samples(1),
            vjp=rule,
            inplace=(0,),
            axes=same_axes,
        )
    )
    if row.slope is None:
        return
    slope = row.slope

    def gradient(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
        dy = array(inputs, 0)
        with np.errstate(all="ignore"):
            return [np.asarray(dy * row.evaluate(slope, node, array(inputs, 1)))]

    register(
        OpDef(
            name=f"{row.name}Grad",
            infer=_infer_pair,
            kernel=gradient,
            work=work(row.grad_class),
            c=row.c("_grad"),
            samples=lambda: row.samples(2),
            inplace=(0, 1),
        )
    )


def _infer_pair(node: Node) -> list[TensorType]:
    dy, other = f32_operand(node, 0), f32_operand(node, 1)
    if dy != other:
        raise GraphError(f"gradient {dy} does not fit {other}")
    return [dy]


# --- functions and slopes of some length ----------------------------------------------------------

_CUBE = 0.044715
_ROOT = math.sqrt(2 / math.pi)
_HALF_ROOT = math.sqrt(0.5)
_DENSITY = 1 / math.sqrt(2 * math.pi)


def _gelu_tanh(x: Array) -> Array:
    cubed = x + scalar(x, _CUBE) * (x * x * x)
    return tanh32(np.asarray(scalar(x, _ROOT) * cubed))


def _gelu(x: Array) -> Any:
    """GELU in its form with tanh (Hendrycks and Gimpel 2016)."""
    return scalar(x, 0.5) * x * (scalar(x, 1.0) + _gelu_tanh(x))


def _gelu_slope(x: Array) -> Any:
    half, one = scalar(x, 0.5), scalar(x, 1.0)
    t = _gelu_tanh(x)
    inner = scalar(x, _ROOT) * (one + scalar(x, 3 * _CUBE) * (x * x))
    return half * (one + t) + half * x * ((one - t * t) * inner)


def _normal(x: Array) -> Any:
    """Twice the cumulative normal distribution."""
    return scalar(x, 1.0) + erf32(np.asarray(x * scalar(x, _HALF_ROOT)))


def _gelu_erf_slope(x: Array) -> Any:
    half = scalar(x, 0.5)
    density = scalar(x, _DENSITY) * exp32(np.asarray(scalar(x, -0.5) * (x * x)))
    return half * _normal(x) + x * density


def _mish_parts(x: Array) -> tuple[Any, Any]:
    """``e = exp(min(x, 20))`` and ``n = e * (e + 2)``, of which tanh(softplus(x)) is n / (n + 2).

    Beyond 20 that is 1, and the square of e would overflow.
    """
    e = exp32(np.asarray(np.where(x > 20, scalar(x, 20), x)))
    return e, e * (e + scalar(x, 2))


def _mish(x: Array) -> Any:
    """Mish, x * tanh(softplus(x)) (Misra 2019)."""
    _, n = _mish_parts(x)
    return x * (n / (n + scalar(x, 2)))


def _mish_slope(x: Array) -> Any:
    e, n = _mish_parts(x)
    d = n + scalar(x, 2)
    return n / d + x * ((scalar(x, 4) * e) / d * ((e + scalar(x, 1)) / d))


def _swish_slope(x: Array, alpha: Any) -> Any:
    s = sigmoid32(np.asarray(x * alpha))
    return s + (x * alpha) * (s * (scalar(x, 1) - s))


def _elu(x: Array, gamma: Any, alpha: Any, rate: Any) -> Any:
    """Elu, Selu and Celu: gamma * x above zero, alpha * (exp(rate * x) - 1) below."""
    return np.where(x > 0, x * gamma, alpha * expm1_32(np.asarray(x * rate)))


def _elu_slope(y: Array, gamma: Any, alpha: Any, rate: Any) -> Any:
    return np.where(y > 0, gamma, rate * (y + alpha))


def _check_elu(node: Node) -> None:
    for name in ("gamma", "alpha", "rate"):
        v = node.float_attr(name)
        if not 0 <= v < math.inf:  # below 0 the result's sign would not tell the operand's
            raise GraphError(f"{name} = {v:g}; only finite numbers >= 0 are supported")


def _hard_swish(x: Array) -> Any:
    """HardSwish, x * clip(x / 6 + 1/2, 0, 1)."""
    t = x * scalar(x, 1 / 6) + scalar(x, 0.5)
    t = np.where(t < 0, scalar(x, 0), t)
    return x * np.where(t > 1, scalar(x, 1), t)


def _hard_swish_slope(x: Array) -> Any:
    middle = x * scalar(x, 1 / 3) + scalar(x, 0.5)
    middle = np.where(x >= 3, scalar(x, 1), middle)
    return np.where(x <= -3, scalar(x, 0), middle)


def _softsign_slope(y: Array) -> Any:
    rest = scalar(y, 1) - np.abs(y)
    return rest * rest


def _arc_slope(x: Array) -> Any:
    """Slope of the inverse sine; that of the inverse cosine is its negative."""
    one = scalar(x, 1)
    return one / sqrt32(np.asarray((one - x) * (one + x)))


def _asinh_slope(x: Array) -> Any:
    one = scalar(x, 1)
    return one / sqrt32(np.asarray(x * x + one))


def _acosh_slope(x: Array) -> Any:
    one = scalar(x, 1)
    return one / sqrt32(np.asarray((x - one) * (x + one)))


def _atanh_slope(x: Array) -> Any:
    one = scalar(x, 1)
    return one / ((one - x) * (one + x))


def _sign(x: Array) -> Any:
    """-1, 0 or 1; NaN stays."""
    below = np.where(x < 0, scalar(x, -1), np.where(x == 0, scalar(x, 0), x))
    return np.where(x > 0, scalar(x, 1), below)


# --- the table ------------------------------------------------------------------------------------

TABLE = (
    Unary(
        "Sqrt", sqrt32, lambda y: scalar(y, 0.5) / y, "result", low=0.1, cost_class="elementwise"
    ),
    Unary(
        "Reciprocal",
        lambda x: scalar(x, 1) / x,
        lambda y: -(y * y),
        "result",
        low=0.2,
        cost_class="elementwise",
    ),
    Unary("Exp", exp32, lambda y: y, "result"),
    Unary("Log", log32, lambda x: scalar(x, 1) / x, low=0.1),
    Unary("Sin", sin32, cos32, low=-9.0, high=9.0, grad_class="transcendental"),
    Unary("Cos", cos32, lambda x: -sin32(x), low=-9.0, high=9.0, grad_class="transcendental"),
    Unary("Atan", atan32, lambda x: scalar(x, 1) / (x * x + scalar(x, 1))),
    Unary("Asin", asin32, _arc_slope, low=-0.95, high=0.95),
    Unary("Acos", acos32, lambda x: -_arc_slope(x), low=-0.95, high=0.95),
    Unary("Sinh", sinh32, cosh32, grad_class="transcendental"),
    Unary("Cosh", cosh32, sinh32, grad_class="transcendental"),
    Unary("Asinh", asinh32, _asinh_slope),
    Unary("Acosh", acosh32, _acosh_slope, low=1.1, high=9.0),
    Unary("Atanh", atanh32, _atanh_slope, low=-0.9, high=0.9),
    Unary(
        "Erf",
        erf32,
        lambda x: scalar(x, 2 / math.sqrt(math.pi)) * exp32(np.asarray(-(x * x))),
        grad_class="transcendental",
    ),
    Unary("Sigmoid", sigmoid32, lambda y: y * (scalar(y, 1) - y), "result"),
    Unary("Tanh", tanh32, lambda y: scalar(y, 1) - y * y, "result"),
    Unary(
        "Softplus",
        softplus32,
        lambda y: -expm1_32(np.asarray(-y)),
        "result",
        grad_class="transcendental",
    ),
    Unary(
        "Softsign",
        lambda x: x / (scalar(x, 1) + np.abs(x)),
        _softsign_slope,
        "result",
        cost_class="elementwise",
    ),
    Unary(
        "Elu",
        _elu,
        _elu_slope,
        "result",
        ("gamma", "alpha", "rate"),
        _check_elu,
        ((1.0, 0.7, 1.0), (1.05, 1.76, 1.0), (1.0, 2.0, 0.5)),
        kinks=(0.0,),
    ),
    Unary("Gelu", _gelu, _gelu_slope, grad_class="transcendental"),
    Unary(
        "GeluErf",
        lambda x: scalar(x, 0.5) * x * _normal(x),
        _gelu_erf_slope,
        grad_class="transcendental",
    ),
    Unary("Mish", _mish, _mish_slope, low=-8.0, high=25.0, grad_class="transcendental"),
    Unary(
        "Swish",
        lambda x, alpha: x * sigmoid32(np.asarray(x * alpha)),
        _swish_slope,
        attrs=("alpha",),
        values=((1.0,), (1.702,), (-0.5,)),
        grad_class="transcendental",
    ),
    Unary(
        "HardSwish",
        _hard_swish,
        _hard_swish_slope,
        low=-5.0,
        high=5.0,
        kinks=(-3.0, 3.0),
        cost_class="elementwise",
    ),
    Unary("Sign", _sign, cost_class="elementwise"),
    Unary("Floor", np.floor, cost_class="elementwise"),
    Unary("Ceil", np.ceil, cost_class="elementwise"),
    Unary("Round", np.rint, cost_class="elementwise"),
)
for _row in TABLE:
    _register(_row)
