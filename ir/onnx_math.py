"""Conversion rules of elementwise functions, comparisons and choices.

Where an operator is a special case of a cheaper one, the cheaper one is written: Max with a number
is a Clip, a square is a product, a mask of two values that is added is a choice.
"""

from __future__ import annotations

from collections.abc import Callable
from math import copysign, inf, isfinite

import numpy as np

from .errors import GraphError
from .graph import Array, Attr, Value
from .onnx_convert import INTEGER_TYPES, RejectedError, Site
from .ops.activation_grad import pack_bits
from .ops.elementwise import broadcast_shape
from .provenance import Cast, Masked, Moved

Rule = Callable[[Site], Value]

#: Defaults of Selu in ONNX (Klambauer et al. 2017).
_SELU_ALPHA, _SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875
#: Adding a number at least this far below zero gives that number, whatever finite activation it is
#: added to (less than half a step of it in magnitude, 3e22).
_MASKED = -1e30
_LARGEST = float(np.finfo(np.float32).max)


def _plain(op: str, operands: int = 1) -> Rule:
    return lambda s: s.emit(op, [s.value(i) for i in range(operands)])


def _with_reals(op: str, **defaults: float) -> Rule:
    return lambda s: s.emit(op, (s.value(0),), {k: s.real(k, d) for k, d in defaults.items()})


def _number(s: Site, value: float, what: str) -> Value:
    """A constant number that the rule adds."""
    return s.conversion.constant(f"{s.node.name}/{what}", np.array(value, np.float32))


# -- one operand -----------------------------------------------------------------------------------


def _gelu(s: Site) -> Value:
    form = s.text("approximate", "none")
    if form not in ("none", "tanh"):
        raise RejectedError(f"approximate {form} is not known; there are none and tanh")
    return s.emit("Gelu" if form == "tanh" else "GeluErf", (s.value(0),))


def _elu(s: Site) -> Value:
    attrs: dict[str, Attr] = {"gamma": 1.0, "alpha": s.real("alpha", 1.0), "rate": 1.0}
    return s.emit("Elu", (s.value(0),), attrs)


def _selu(s: Site) -> Value:
    gamma, alpha = s.real("gamma", _SELU_GAMMA), s.real("alpha", _SELU_ALPHA)
    attrs: dict[str, Attr] = {"gamma": gamma, "alpha": gamma * alpha, "rate": 1.0}
    return s.emit("Elu", (s.value(0),), attrs)


def _celu(s: Site) -> Value:
    alpha = s.real("alpha", 1.0)
    if alpha == 0.0:
        raise RejectedError("alpha is 0, which it divides by")
    attrs: dict[str, Attr] = {"gamma": 1.0, "alpha": alpha, "rate": 1.0 / alpha}
    return s.emit("Elu", (s.value(0),), attrs)


def _tan(s: Site) -> Value:
    """Sine by cosine; both are exact to the last bits, next to the zeros of the cosine too."""
    x = s.value(0)
    return s.emit("Div", (s.emit("Sin", (x,), None, "sine"), s.emit("Cos", (x,), None, "cosine")))


# -- several operands ------------------------------------------------------------------------------


def _chain(s: Site, op: str, suffix: str = "") -> Value:
    """Operands are joined one after the other; ``suffix`` names the last result."""
    total = s.value(0)
    for i in range(1, len(s.node.inputs)):
        last = i == len(s.node.inputs) - 1
        total = s.emit(op, (total, s.value(i)), None, suffix if last else f"partial{i}")
    return total


def _mean(s: Site) -> Value:
    count = len(s.node.inputs)
    if count == 1:
        return s.value(0)
    return s.emit("Div", (_chain(s, "Add", "sum"), _number(s, count, "count")))


def _extremum(op: str, bound: str) -> Rule:
    """Max or Min; with one number it is a Clip, and a Relu if that is 0."""

    def rule(s: Site) -> Value:
        numbers = [s.data(i) for i in range(len(s.node.inputs))]
        for i, data in enumerate(numbers):
            if len(numbers) == 2 and data is not None and data.size == 1:
                x, limit = s.value(1 - i), float(data.reshape(()))
                if len(data.shape) > len(x.type.shape) or not isfinite(limit):
                    break
                if op == "Max" and limit == 0.0:
                    return s.emit("Relu", (x,))
                return s.emit("Clip", (x,), {"min": -inf, "max": inf, bound: limit})
        return _chain(s, op)

    return rule


def _pow(s: Site) -> Value:
    x, power = s.value(0), s.data(1)
    if power is None:
        return s.emit("Pow", (x, s.value(1)))
    if power.dtype.kind not in "fiu" or not np.isfinite(power).all():
        raise RejectedError(f"the exponent {s.node.inputs[1]} is not finite numbers")
    if power.size != 1 or power.ndim > len(x.type.shape):
        return s.emit("Pow", (x, _real_constant(s, 1, power)))
    p = float(power.reshape(()))
    if p == 1.0:
        return x
    if p == 2.0:
        return s.emit("Mul", (x, x))
    if p == 0.5:
        return s.emit("Sqrt", (x,))
    if p == -0.5:
        return s.emit("Reciprocal", (s.emit("Sqrt", (x,), None, "root"),))
    if p == -1.0:
        return s.emit("Reciprocal", (x,))
    return s.emit("Pow", (x, _real_constant(s, 1, power)))


def _mod(s: Site) -> Value:
    """The rest of a division: with the sign of the divisor, or with ``fmod`` the dividend's."""
    return s.emit("Fmod" if s.integer("fmod") else "Mod", (s.value(0), s.value(1)))


def _real_constant(s: Site, index: int, data: Array) -> Value:
    """A constant that the file may hold in another type, which the operator allows."""
    if data.dtype == np.float32:
        return s.value(index)
    name = s.node.inputs[index]
    origin = s.conversion.file.origin(name).then(Cast())
    return s.conversion.constant(f"{name}/f32", data.astype(np.float32), origin)


def _prelu(s: Site) -> Value:
    """PRelu; before opset 7 a slope of [C] is one number per channel, which is no broadcast."""
    x, slope, data = s.value(0), s.value(1), s.data(1)
    shape, old = x.type.shape, slope.type.shape
    if data is not None and old == shape[1:2] and old[0] not in (1, shape[-1]):
        channels = (-1, *(1,) * (len(shape) - 2))
        slope = s.derived(1, "channels", Moved(lambda d: d.reshape(channels)))
    return s.emit("PRelu", (x, slope))


def _add(s: Site) -> Value:
    """Add; one hugely negative number in a constant is a mask, and zeros beside it are no bias."""
    for i in (0, 1):
        data = s.data(i)
        if data is None or data.dtype != np.float32 or data.size == 1:
            continue
        masked = data <= _MASKED
        off = np.unique(data[masked])
        if len(off) != 1 or masked.all():
            continue
        name, x = s.node.inputs[i], s.value(1 - i)
        if data[~masked].any():
            rest = s.conversion.constant(f"{name}/rest", *s.made(i, [Masked(~masked)]))
            x = s.emit("Add", (x, rest) if i else (rest, x), None, "rest")
        kept = _bits(s, f"{name}/kept", ~masked)
        return s.emit("Where", (kept, x, None), {"off": float(off[0])})
    return s.emit("Add", (s.value(0), s.value(1)))


# -- conditions ------------------------------------------------------------------------------------


def _bits(s: Site, name: str, flags: Array) -> Value:
    """The constant condition of this name."""
    known = s.conversion.graph.values.get(name)
    if known is not None:
        return known
    return s.conversion.graph.add_constant(name, pack_bits(flags), "bits", shape=flags.shape)


def _condition(s: Site, index: int) -> Value:
    """A condition, constant or computed.

    Raises:
        RejectedError: The operand is no condition.
    """
    data = s.data(index)
    if data is not None:
        if data.dtype != np.bool_:
            raise RejectedError(f"operand {index} is {data.dtype}, not boolean")
        return _bits(s, s.node.inputs[index], data)
    v = s.value(index)
    if v.type.dtype != "bits":
        raise RejectedError(f"operand {index} is {v.type}, not boolean")
    return v


def _compare(op: str, *, swapped: bool = False) -> Rule:
    def rule(s: Site) -> Value:
        a, b = s.value(0), s.value(1)
        return s.emit(op, (b, a) if swapped else (a, b))

    return rule


def _equal(s: Site) -> Value:
    """Equal, also of conditions, and with an infinite number, which no constant holds."""
    data = [s.data(i) for i in (0, 1)]
    values = [s.value(i) for i in (0, 1) if data[i] is None]
    if any(v.type.dtype == "bits" for v in values):
        differ = s.emit("Xor", (_condition(s, 0), _condition(s, 1)), None, "differ")
        return s.emit("Not", (differ,))
    for i in (0, 1):
        number = data[i]
        if number is not None and number.size == 1 and np.isinf(number).all():
            x = s.value(1 - i)
            if number.ndim <= len(x.type.shape):
                return _infinite(s, x, float(number.reshape(())))
    return s.emit("Equal", (s.value(0), s.value(1)))


def _is_nan(s: Site) -> Value:
    x = s.value(0)
    return s.emit("Not", (s.emit("Equal", (x, x), None, "itself"),))


def _is_inf(s: Site) -> Value:
    x = s.value(0)
    above, below = s.integer("detect_positive", 1), s.integer("detect_negative", 1)
    if above and below:
        return _infinite(s, s.emit("Abs", (x,), None, "absolute"), inf)
    if above or below:
        return _infinite(s, x, inf if above else -inf)
    return s.emit("Greater", (x, x))  # nowhere


def _infinite(s: Site, x: Value, kind: float) -> Value:
    """Where ``x`` is ``inf`` or ``-inf``: beyond the largest number on that side."""
    limit = _number(s, copysign(_LARGEST, kind), "largest")
    return s.emit("Greater", (x, limit) if kind > 0 else (limit, x))


def _logic(op: str, operands: int) -> Rule:
    return lambda s: s.emit(op, [_condition(s, i) for i in range(operands)])


def _where(s: Site) -> Value:
    """Where; a constant number among the choices, which may be infinite, becomes an attribute."""
    condition = _condition(s, 0)
    choices: list[Value | None] = []
    attrs: dict[str, Attr] = {}
    for i, fill in ((1, "on"), (2, "off")):
        data = s.data(i)
        if data is not None and data.size == 1 and data.dtype == np.float32:
            attrs[fill] = float(data.reshape(()))
            choices.append(None)
        else:
            choices.append(s.value(i))
    y = s.emit("Where", (condition, *choices), attrs)
    known = s.conversion.file.types.get(s.node.outputs[0])
    if known is not None and known.shape != y.type.shape:  # numbers of more axes than the rest
        return s.emit("Expand", (y,), {"shape": known.shape}, "expanded")
    return y


def _cast(s: Site) -> Value:
    """Casts between float32, conditions and integers, but of fractions to integers."""
    to, x = s.integer("to"), s.value(0)
    real, flag = 1, 9  # TensorProto.FLOAT and BOOL
    counted = s.node.inputs[0] in s.conversion.spans
    if to in INTEGER_TYPES and (counted or x.type.dtype == "i32"):
        return x
    if (
        to not in (real, flag, *INTEGER_TYPES)
        or (x.type.dtype == "i32" and not counted)
        or (to in INTEGER_TYPES and x.type.dtype == "f32")
    ):
        raise RejectedError(
            "only casts between float32, bool and integers are supported outside constants, and"
            " none that may drop a fraction"
        )
    if x.type.dtype == "i32":
        x = s.integers_as_real(0)
    if x.type.dtype == ("bits" if to == flag else "f32"):
        return x
    if to != flag:
        return s.emit("Where", (x, None, None), {"on": 1.0, "off": 0.0})
    zero = s.emit("Equal", (x, _number(s, 0.0, "zero")), None, "zero")
    return s.emit("Not", (zero,))


def _cast_like(s: Site) -> Value:
    """CastLike is written as Cast before it gets here, unless it is not known to what."""
    raise RejectedError("the element type of its operand 1 is not known")


def _expand(s: Site) -> Value:
    x, shape = s.value(0), s.ints(1, "shape")
    if shape is None:
        raise RejectedError("the target shape is missing")
    try:
        whole = broadcast_shape(x.type.shape, shape)
    except GraphError as e:
        raise RejectedError(f"{x.type} does not expand to {list(shape)}: {e}") from None
    if whole == x.type.shape:
        return x
    return s.emit("Expand", (x,), {"shape": whole})


RULES: dict[str, Rule] = {
    "Abs": _plain("Abs"),
    "Acos": _plain("Acos"),
    "Acosh": _plain("Acosh"),
    "Add": _add,
    "And": _logic("And", 2),
    "Asin": _plain("Asin"),
    "Asinh": _plain("Asinh"),
    "Atan": _plain("Atan"),
    "Atanh": _plain("Atanh"),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _plain("Ceil"),
    "Celu": _celu,
    "Cos": _plain("Cos"),
    "Cosh": _plain("Cosh"),
    "Div": _plain("Div", 2),
    "Elu": _elu,
    "Equal": _equal,
    "Erf": _plain("Erf"),
    "Exp": _plain("Exp"),
    "Expand": _expand,
    "Floor": _plain("Floor"),
    "Gelu": _gelu,
    "Greater": _compare("Greater"),
    "GreaterOrEqual": _compare("GreaterOrEqual"),
    "HardSigmoid": _with_reals("HardSigmoid", alpha=0.2, beta=0.5),
    "HardSwish": _plain("HardSwish"),
    "IsInf": _is_inf,
    "IsNaN": _is_nan,
    "LeakyRelu": _with_reals("LeakyRelu", alpha=0.01),
    "Less": _compare("Greater", swapped=True),
    "LessOrEqual": _compare("GreaterOrEqual", swapped=True),
    "Log": _plain("Log"),
    "Max": _extremum("Max", "min"),
    "Mean": _mean,
    "Min": _extremum("Min", "max"),
    "Mish": _plain("Mish"),
    "Mod": _mod,
    "Mul": _plain("Mul", 2),
    "Neg": _plain("Neg"),
    "Not": _logic("Not", 1),
    "Or": _logic("Or", 2),
    "PRelu": _prelu,
    "Pow": _pow,
    "Reciprocal": _plain("Reciprocal"),
    "Relu": _plain("Relu"),
    "Round": _plain("Round"),
    "Selu": _selu,
    "Shrink": _with_reals("Shrink", lambd=0.5, bias=0.0),
    "Sigmoid": _plain("Sigmoid"),
    "Sign": _plain("Sign"),
    "Sin": _plain("Sin"),
    "Sinh": _plain("Sinh"),
    "Softplus": _plain("Softplus"),
    "Softsign": _plain("Softsign"),
    "Sqrt": _plain("Sqrt"),
    "Sub": _plain("Sub", 2),
    "Sum": lambda s: _chain(s, "Add"),
    "Swish": _with_reals("Swish", alpha=1.0),
    "Tanh": _plain("Tanh"),
    "Tan": _tan,
    "ThresholdedRelu": _with_reals("ThresholdedRelu", alpha=1.0),
    "Where": _where,
    "Xor": _logic("Xor", 2),
}
