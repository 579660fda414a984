"""Binary arithmetic with NumPy broadcasting: Add to Div, Max, Min, Mod, Fmod, Pow, PRelu; and Neg.

The C kernels walk the broadcast in merged axes, so equal shapes are one loop, a scalar operand is
one loop with stride 0, and a channel operand ``[C,1,1]`` is two loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..axes import same_axes
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import (
    CKernel,
    CostClass,
    OpDef,
    ParamSlot,
    Sample,
    Vjp,
    Work,
    array,
    f32_operand,
    operand,
    register,
)
from .elementary import log32, pow32

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

#: ODTPLAN_MAX_RANK of backends/c/kernels/odtplan_types.h.
MAX_RANK = 6


def check_rank(shape: Sequence[int]) -> None:
    """Reject a shape that the C kernels can't walk.

    Raises:
        GraphError: More than ``MAX_RANK`` dimensions.
    """
    if len(shape) > MAX_RANK:
        raise GraphError(f"shape {tuple(shape)} has {len(shape)} dimensions, at most {MAX_RANK}")


def broadcast_shape(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that operands of these shapes broadcast to.

    Raises:
        GraphError: They don't broadcast, or one has more than ``MAX_RANK`` dimensions.
    """
    for shape in shapes:
        check_rank(shape)  # first: NumPy takes 32 dimensions at most, and says so in another way
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        raise GraphError(f"shapes {' and '.join(map(str, shapes))} do not broadcast") from None


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    return tuple(strides)


def merge_axes(
    dims: Sequence[int], *strides: Sequence[int]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Drop axes of length 1 and join neighbours that every stride tuple walks as one.

    Args:
        dims: Lengths of a nested loop, outermost first.
        *strides: One stride per axis, for each tensor that the loop walks.

    Returns:
        The shortest equivalent loop (at least one axis): its lengths and strides.
    """
    axes: list[tuple[int, tuple[int, ...]]] = []
    for i, d in enumerate(dims):
        if d == 1:
            continue
        step = tuple(s[i] for s in strides)
        if axes and axes[-1][1] == tuple(s * d for s in step):
            axes[-1] = (axes[-1][0] * d, step)
        else:
            axes.append((d, step))
    if not axes:
        axes = [(1, (1,) * len(strides))]
    return tuple(d for d, _ in axes), tuple(zip(*(s for _, s in axes), strict=True))


def _infer_binary(node: Node) -> list[TensorType]:
    a, b = f32_operand(node, 0), f32_operand(node, 1)
    return [TensorType(broadcast_shape(a.shape, b.shape), a.dtype)]


def broadcast_strides(shape: tuple[int, ...], out: tuple[int, ...]) -> tuple[int, ...]:
    """Strides that walk an operand of ``shape`` in the order of ``out``; 0 where it repeats."""
    padded = (1,) * (len(out) - len(shape)) + shape
    strides = contiguous_strides(padded)
    return tuple(0 if d == 1 else s for d, s in zip(padded, strides, strict=True))


def _walks(node: Node) -> list[tuple[int, ...]]:
    """Strides of both operands in the order of the result."""
    return [broadcast_strides(f32_operand(node, i).shape, node.out.type.shape) for i in (0, 1)]


def _binary_params(node: Node) -> dict[str, Attr]:
    dims, (a, b) = merge_axes(node.out.type.shape, *_walks(node))
    return {"rank": len(dims), "dims": dims, "a_strides": a, "b_strides": b}


def _binary_work(node: Node, cost_class: CostClass) -> Work:
    """One operation per element, a loop per run along the innermost merged axis."""
    *outer, _ = merge_axes(node.out.type.shape, *_walks(node))[0]
    return Work(cost_class, node.out.type.size, loops=prod(outer))


def sum_to(builder: GradBuilder, d: Value, operand: Value, suffix: str) -> Value:
    """Sum the gradient of a broadcast operand over the repeated elements."""
    if d.type.shape == operand.type.shape:
        return d
    return builder.add("ReduceSumTo", (d,), {"shape": operand.type.shape}, suffix=suffix)


def _operands(node: Node) -> tuple[Value, Value]:
    a, b = node.inputs
    assert a is not None
    assert b is not None
    return a, b


def _vjp_add(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    a, b = _operands(node)
    return [
        sum_to(builder, dy, a, "grad_a") if need[0] else None,
        sum_to(builder, dy, b, "grad_b") if need[1] else None,
    ]


def _vjp_sub(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    a, b = _operands(node)
    db = None
    if need[1]:
        db = builder.add("Neg", (sum_to(builder, dy, b, "sum_b"),), suffix="grad_b")
    return [sum_to(builder, dy, a, "grad_a") if need[0] else None, db]


def _vjp_mul(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    a, b = _operands(node)
    da = db = None
    if need[0]:
        da = sum_to(builder, builder.add("Mul", (dy, b), suffix="dy_b"), a, "grad_a")
    if need[1]:
        db = sum_to(builder, builder.add("Mul", (dy, a), suffix="dy_a"), b, "grad_b")
    return [da, db]


def _vjp_div(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    a, b = _operands(node)
    da = db = None
    if need[0] or need[1]:
        quotient = builder.add("Div", (dy, b), suffix="dy_b")
        if need[0]:
            da = sum_to(builder, quotient, a, "grad_a")
        if need[1]:  # d(a/b)/db = -(1/b) * y: needs the result, never the dividend
            product = builder.add("Mul", (quotient, node.out), suffix="dy_y")
            db = builder.add("Neg", (sum_to(builder, product, b, "sum_b"),), suffix="grad_b")
    return [da, db]


def _vjp_extremum(above: tuple[int, int]) -> Vjp:
    """Gradient of Max and Min: to operand 0 where it alone is taken, else to operand 1.

    One bit per element is saved, made of the result and operand 1, so that the node can run in
    place of operand 0. Where both are equal torch halves the gradient.

    Args:
        above: Which of (result, operand 1) is compared with which.
    """

    def vjp(
        builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
    ) -> list[Value | None]:
        a, b = _operands(node)
        pair = (node.out, b)
        first = builder.aux("Greater", [pair[i] for i in above], suffix="first")
        grads: list[Value | None] = [None, None]
        if need[0]:
            part = builder.add("Where", (first, dy, None), {"off": 0.0}, suffix="part_a")
            grads[0] = sum_to(builder, part, a, "grad_a")
        if need[1]:
            part = builder.add("Where", (first, None, dy), {"on": 0.0}, suffix="part_b")
            grads[1] = sum_to(builder, part, b, "grad_b")
        return grads

    return vjp


def _vjp_prelu(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    """The operand's gradient needs its sign alone, one bit per element; the slope's the operand."""
    x, slope = _operands(node)
    positive = builder.aux("ReluMask", (x,), suffix="mask")
    dx = dslope = None
    if need[0]:
        steep = builder.add("Mul", (dy, slope), suffix="dy_slope")
        dx = builder.add("Where", (positive, dy, steep), suffix="grad_x")
    if need[1]:
        product = builder.add("Mul", (dy, x), suffix="dy_x")
        part = builder.add("Where", (positive, None, product), {"on": 0.0}, suffix="part_slope")
        dslope = sum_to(builder, part, slope, "grad_slope")
    return [dx, dslope]


def _vjp_pow(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    a, b = _operands(node)
    da = db = None
    if need[0]:
        slope = builder.add("PowSlope", (a, b), suffix="slope")
        da = sum_to(builder, builder.add("Mul", (dy, slope), suffix="dy_slope"), a, "grad_a")
    if need[1]:
        log = builder.add("PowLog", (node.out, a), suffix="log")
        db = sum_to(builder, builder.add("Mul", (dy, log), suffix="dy_log"), b, "grad_b")
    return [da, db]


def _vjp_mod(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> list[Value | None]:
    """Of y = a - n * b with a whole number n, which is that next to (a - y) / b."""
    a, b = _operands(node)
    da = db = None
    if need[0]:
        da = sum_to(builder, dy, a, "grad_a")
    if need[1]:
        multiple = builder.add("Sub", (a, node.out), suffix="multiple")
        quotient = builder.add("Div", (multiple, b), suffix="quotient")
        whole = builder.add("Round", (quotient,), suffix="whole")
        product = builder.add("Mul", (dy, whole), suffix="dy_whole")
        db = builder.add("Neg", (sum_to(builder, product, b, "sum_b"),), suffix="grad_b")
    return [da, db]


def _binary_samples(low: float) -> Callable[[], Iterator[Sample]]:
    def samples() -> Iterator[Sample]:
        shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
            ((2, 3, 4, 5), (2, 3, 4, 5)),
            ((2, 3, 4, 5), (1,)),
            ((), (3, 2)),
            ((1, 4, 3, 3), (4, 1, 1)),
            ((2, 1, 3), (4, 1)),
            ((7,), (5, 7)),
            ((), ()),
        ]
        for a, b in shapes:
            yield Sample((TensorType(a), TensorType(b)), low=low, high=2.0)
        yield Sample((TensorType((2, 3, 2, 2)), TensorType((3, 1, 1))), low=low, high=2.0)

    return samples


def _register_binary(
    name: str,
    function: Callable[[Array, Array], Array],
    vjp: Vjp | None,
    params: tuple[ParamSlot, ...] = (),
    low: float = -2.0,
    *,
    infer: Callable[[Node], list[TensorType]] = _infer_binary,
    samples: Callable[[], Iterator[Sample]] | None = None,
    cost_class: CostClass = "elementwise",
) -> None:
    def kernel(_: Node, inputs: Sequence[Array | None]) -> list[Array]:
        # Like the C kernel: overflow and division by zero give inf and nan, not an exception.
        with np.errstate(all="ignore"):
            return [np.asarray(function(array(inputs, 0), array(inputs, 1)))]

    symbol = f"odtplan_{name.lower()}_f32"
    register(
        OpDef(
            name=name,
            infer=infer,
            kernel=kernel,
            work=lambda node: _binary_work(node, cost_class),
            c=CKernel(symbol, "odtplan_binary_t", "odtplan_elementwise", _binary_params),
            samples=samples or _binary_samples(low),
            vjp=vjp,
            inplace=(0, 1),
            params=params,
            axes=same_axes,
        )
    )


def _either(role: Literal["bias", "scale"]) -> tuple[ParamSlot, ...]:
    return tuple(ParamSlot(i, role, single=False) for i in (0, 1))


_register_binary("Add", np.add, _vjp_add, _either("bias"))
_register_binary("Sub", np.subtract, _vjp_sub)
_register_binary("Mul", np.multiply, _vjp_mul, _either("scale"))
_register_binary("Div", np.divide, _vjp_div, low=0.5)
# Not np.maximum, whose choice between 0 and -0 differs from machine to machine.
_register_binary("Max", lambda a, b: np.where((a > b) | np.isnan(a), a, b), _vjp_extremum((0, 1)))
_register_binary("Min", lambda a, b: np.where((a < b) | np.isnan(a), a, b), _vjp_extremum((1, 0)))


def _mod(a: Array, b: Array) -> Array:
    """The rest of a division that rounds down: it has the sign of the divisor."""
    rest = np.fmod(a, b)
    return np.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


# Rests are exact but for the sum above: no rounding of a quotient enters them.
_register_binary("Fmod", np.fmod, _vjp_mod, low=0.5, cost_class="transcendental")
_register_binary("Mod", _mod, _vjp_mod, low=0.5, cost_class="transcendental")


def _infer_prelu(node: Node) -> list[TensorType]:
    (out,) = _infer_binary(node)
    if out != f32_operand(node, 0):
        raise GraphError(f"slope {operand(node, 1)} does not broadcast to {operand(node, 0)}")
    return [out]


def _prelu_samples() -> Iterator[Sample]:
    for x, slope in (((2, 3, 2, 2), (3, 1, 1)), ((4, 5), (1,)), ((4, 5), (5,)), ((6,), (6,))):
        yield Sample((TensorType(x), TensorType(slope)), kinks=(0.0,), gap=1e-2)


_register_binary(
    "PRelu",
    lambda x, slope: np.where(x < 0, x * slope, x),
    _vjp_prelu,
    (ParamSlot(1, "scale"),),
    infer=_infer_prelu,
    samples=_prelu_samples,
)


# --- Pow ------------------------------------------------------------------------------------------


def _pow_slope(x: Array, power: Array) -> Array:
    """Derivative of x**power by x; 0 for the power 0, as torch has it."""
    one = power.dtype.type(1)
    slope = power * pow32(x, np.asarray(power - one))
    return np.where(power == 0, power.dtype.type(0), slope)


def _pow_log(y: Array, x: Array) -> Array:
    """Derivative of y = x**power by the power; 0 for x = 0 and power >= 0, as torch has it."""
    return np.where((x == 0) & (y <= _LARGEST), y.dtype.type(0), y * log32(x))


_LARGEST = np.finfo(np.float32).max

_register_binary("Pow", pow32, _vjp_pow, low=0.3, cost_class="transcendental")
_register_binary("PowSlope", _pow_slope, None, low=0.3, cost_class="transcendental")
_register_binary("PowLog", _pow_log, None, low=0.3, cost_class="transcendental")


# --- Neg ------------------------------------------------------------------------------------------


def infer_like(node: Node) -> list[TensorType]:
    """Result type of a unary operator: that of operand 0, which must be fp32."""
    return [f32_operand(node, 0)]


def count_params(node: Node) -> dict[str, Attr]:
    """C parameters of an elementwise kernel without attributes."""
    return {"count": f32_operand(node, 0).size}


register(
    OpDef(
        name="Neg",
        infer=infer_like,
        kernel=lambda _, inputs: [np.negative(array(inputs, 0))],
        work=lambda node: Work("elementwise", node.out.type.size),
        c=CKernel("odtplan_neg_f32", "odtplan_count_t", "odtplan_elementwise", count_params),
        samples=lambda: iter([Sample((TensorType((2, 7)),)), Sample((TensorType(()),))]),
        vjp=lambda builder, _, dy, need: [
            builder.add("Neg", (dy,), suffix="grad") if need[0] else None
        ],
        inplace=(0,),
        axes=same_axes,
    )
)
