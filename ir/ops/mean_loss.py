"""Losses that are the mean over all elements of a function of prediction and target.

Each row of the table is an operator and a second one named ``<name>Grad``: the slope of the
function, divided by the number of elements. Their C twins are in ``odtplan_loss.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType
from ..opdef import CKernel, CostClass, OpDef, Sample, Work, array, operand, register
from .activation_grad import scalar
from .elementary import sigmoid32, softplus32
from .elementwise import count_params

T = TensorType
#: Of prediction, target and attributes.
Function = Callable[..., Any]


@dataclass(frozen=True)
class MeanLoss:
    """A row of the table.

    Attributes:
        name: Operator.
        symbol: Stem of the C names.
        terms: Of prediction, target and the attributes, one per element.
        slope: Derivative of a term by the prediction.
        attrs: Positive numbers, in the order of the functions' arguments and of the C struct.
        values: Those of the samples.
        cost_class: Of terms and slope.
    """

    name: str
    symbol: str
    terms: Function
    slope: Function
    attrs: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    cost_class: CostClass = "elementwise"

    def checked(self, node: Node) -> TensorType:
        """Type of the prediction.

        Raises:
            GraphError: The target is of another type, or an attribute is not positive.
        """
        prediction, target = operand(node, 0), operand(node, 1)
        if prediction != target:
            raise GraphError(f"prediction {prediction} and target {target} differ")
        for name in self.attrs:
            if not node.float_attr(name) > 0:
                raise GraphError(f"{name} must be positive, not {node.float_attr(name)}")
        return prediction

    def evaluate(self, f: Function, node: Node, inputs: Sequence[Array | None]) -> Array:
        """``f`` of prediction, target and attributes."""
        x = array(inputs, 0)
        attrs = (scalar(x, node.float_attr(a)) for a in self.attrs)
        with np.errstate(all="ignore"):
            return np.asarray(f(x, array(inputs, 1), *attrs))

    def kernel(self, node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
        """The terms added up one after the other, divided by their number."""
        terms = self.evaluate(self.terms, node, inputs).reshape(-1)
        return (np.asarray(np.add.accumulate(terms)[-1] / terms.dtype.type(terms.size)),)

    def grad_kernel(self, node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
        """The slope of each term, divided by their number."""
        slope = self.evaluate(self.slope, node, inputs)
        return (np.asarray(slope / slope.dtype.type(slope.size)),)

    def c(self, suffix: str) -> CKernel:
        """The C function; its struct is the count and then the attributes."""

        def params(node: Node) -> dict[str, Attr]:
            return count_params(node) | {a: node.float_attr(a) for a in self.attrs}

        struct = f"{self.symbol}_t" if self.attrs else "odtplan_count_t"
        return CKernel(f"{self.symbol}{suffix}_f32", struct, "odtplan_loss", params)

    def samples(self) -> Iterator[Sample]:
        """Matrices and more axes."""
        attrs: dict[str, Attr] = dict(zip(self.attrs, self.values, strict=True))
        yield Sample((T((2, 5)), T((2, 5))), attrs, low=-2.0, high=2.0)
        yield Sample((T((1, 2, 3)), T((1, 2, 3))), attrs, low=-2.0, high=2.0)


def _register(row: MeanLoss) -> None:
    def work(node: Node) -> Work:
        return Work(row.cost_class, operand(node, 0).size)

    def infer(node: Node) -> Sequence[TensorType]:
        return (T((), row.checked(node).dtype),)

    register(OpDef(row.name, infer, row.kernel, work, row.c(""), row.samples))
    register(
        OpDef(
            f"{row.name}Grad",
            infer=lambda node: (row.checked(node),),
            kernel=row.grad_kernel,
            work=work,
            c=row.c("_grad"),
            samples=row.samples,
            inplace=(0,),
        )
    )


def _mse(x: Array, t: Array) -> Any:
    d = x - t
    return d * d


def _mse_slope(x: Array, t: Array) -> Any:
    d = x - t
    return d + d


def _huber(x: Array, t: Array, delta: Any) -> Any:
    half: Any = scalar(x, 0.5)
    d = x - t
    a = np.abs(d)
    return np.where(a <= delta, half * d * d, delta * (a - half * delta))


def _huber_slope(x: Array, t: Array, delta: Any) -> Any:
    d = x - t
    return np.where(d > delta, delta, np.where(d < -delta, -delta, d))


def _bce(x: Array, t: Array) -> Any:
    """-t log(p) - (1 - t) log(1 - p) of p = sigmoid(x), without overflow on either side."""
    zero = scalar(x, 0.0)
    return (np.where(x > zero, x, zero) - x * t) + softplus32(-np.abs(x))


for _row in (
    MeanLoss("MSE", "odtplan_mse", _mse, _mse_slope),
    MeanLoss("Huber", "odtplan_huber", _huber, _huber_slope, ("delta",), (0.75,)),
    MeanLoss(
        "BCEWithLogits",
        "odtplan_bce",
        _bce,
        lambda x, t: sigmoid32(x) - t,
        cost_class="transcendental",
    ),
):
    _register(_row)
