"""Negative log likelihood with class weights, ignored labels and reductions, as ONNX defines it.

``NegativeLogLikelihood (x f32[N, C, *D], labels i32[N, *D], weights f32[C] or none)`` is, per label
``c`` at ``(n, *d)``, ``-x[n, c, *d] * weights[c]``, or 0 where the label is ignored. Its attribute
``reduction`` is ``none`` (result ``[N, *D]``), ``sum``, or ``mean``: the sum over that of the
weights, labels that are ignored left out; NaN if all of them are.

Sums are one chain in the order of the labels. The gradient needs labels and weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from ..autodiff import GradBuilder
from ..errors import GraphError, UsageError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, array, operand, register

T = TensorType
#: Values of the attribute ``reduction``, in the C kernel's order.
REDUCTIONS = ("none", "sum", "mean")


def _labels(node: Node, classes: int) -> TensorType:
    """Type of the labels; checks them, the weights and the attributes."""
    labels = operand(node, 1)
    if labels.dtype != "i32" or not labels.shape:
        raise GraphError(f"labels must be i32[batch, ...], not {labels}")
    if node.attrs["reduction"] not in REDUCTIONS:
        raise GraphError(f"reduction {node.attrs['reduction']!r} is not one of {REDUCTIONS}")
    weights = node.inputs[2] if len(node.inputs) > 2 else None
    if weights is not None and weights.type != T((classes,), operand(node, 0).dtype):
        raise GraphError(f"class weights {weights.type} do not fit {classes} classes")
    return labels


def _infer(node: Node) -> Sequence[TensorType]:
    x = operand(node, 0)
    if len(x.shape) < 2:
        raise GraphError(f"log probabilities must be [batch, classes, ...], not {x}")
    labels = _labels(node, x.shape[1])
    if labels.shape != (x.shape[0], *x.shape[2:]):
        raise GraphError(f"labels {labels} do not fit the log probabilities {x}")
    return (_result(node, x.dtype),)


def _result(node: Node, dtype: str) -> TensorType:
    return T(operand(node, 1).shape if node.attrs["reduction"] == "none" else (), dtype)


def _grad_infer(node: Node) -> Sequence[TensorType]:
    dy, classes = operand(node, 0), node.int_attr("classes")
    labels = _labels(node, classes)
    if dy != _result(node, dy.dtype):
        raise GraphError(f"gradient {dy} does not fit the labels {labels}")
    return (T((labels.shape[0], classes, *labels.shape[1:]), dy.dtype),)


def _picked(node: Node, inputs: Sequence[Array | None], classes: int) -> tuple[Array, Array]:
    """Index of each label's class, and the label's weight: 0 where it is ignored.

    Raises:
        UsageError: A label is neither a class nor ignored.
    """
    like, labels = array(inputs, 0), array(inputs, 1)
    weights = inputs[2] if len(inputs) > 2 else None
    ignored = labels == node.attrs["ignore_index"] if "ignore_index" in node.attrs else False
    bad = ((labels < 0) | (labels >= classes)) & ~np.asarray(ignored)
    if bad.any():
        raise UsageError(
            f"node {node.name}: label {int(labels[bad][0])} is not in 0..{classes - 1}; give labels"
            " of the model's classes"
        )
    index = np.where(ignored, 0, labels)
    each = np.ones_like(index, like.dtype) if weights is None else weights[index]
    return index, np.where(ignored, like.dtype.type(0), each)


def _total(terms: Array) -> Array:
    return np.asarray(np.add.accumulate(terms.reshape(-1))[-1])


def _kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    x = array(inputs, 0)
    index, weight = _picked(node, inputs, x.shape[1])
    picked = np.take_along_axis(x, np.expand_dims(index, 1), 1).squeeze(1)
    terms = np.where(weight == 0, weight, picked * weight)  # an infinite ignored one is 0
    if node.attrs["reduction"] == "none":
        return (-terms,)
    total = _total(terms)
    if node.attrs["reduction"] == "mean":
        with np.errstate(invalid="ignore", divide="ignore"):
            total = np.asarray(total / _total(weight))
    return (np.asarray(-total),)


def _grad_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    dy, (out,) = array(inputs, 0), _grad_infer(node)
    index, weight = _picked(node, inputs, out.shape[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        if node.attrs["reduction"] == "mean":
            dy = np.asarray(dy / _total(weight))
        step = np.where(weight == 0, weight, dy * weight)
    dx = np.zeros(out.shape, dy.dtype)
    np.put_along_axis(dx, np.expand_dims(index, 1), np.expand_dims(dy.dtype.type(0) - step, 1), 1)
    return (dx,)


def _vjp(
    builder: GradBuilder, node: Node, dy: Value, need: Sequence[bool]
) -> Sequence[Value | None]:
    if any(need[1:]):
        raise GraphError(f"node {node.name}: class weights have no gradient")
    if not need[0]:
        return (None,) * len(node.inputs)
    attrs = {**node.attrs, "classes": operand(node, 0).shape[1]}
    dx = builder.add("NegativeLogLikelihoodGrad", (dy, *node.inputs[1:]), attrs, suffix="grad")
    return (dx, *(None,) * (len(node.inputs) - 1))


def _params(node: Node) -> dict[str, Attr]:
    grad = node.op == "NegativeLogLikelihoodGrad"
    shape = (node.out.type if grad else operand(node, 0)).shape
    return {
        "batch": shape[0],
        "classes": shape[1],
        "inner": prod(shape[2:]),
        "reduction": REDUCTIONS.index(str(node.attrs["reduction"])),
        "ignores": int("ignore_index" in node.attrs),
        "ignore_index": node.int_attr("ignore_index", 0),
    }


def _samples() -> Iterator[Sample]:
    for i, reduction in enumerate(REDUCTIONS):
        types = (T((4, 5)), T((4,), "i32"), T((5,)))
        yield Sample(types, {"reduction": reduction}, (0,), low=0.1, ranges={1: (0, 4)})
        types = (T((2, 3, 2, 2)), T((2, 2, 2), "i32"), T((3,)))
        attrs: dict[str, Attr] = {"reduction": reduction, "ignore_index": (-1, 2, 0)[i]}
        low = -1 if i == 0 else 0
        yield Sample(types[:2], attrs, (0,), low=0.1, ranges={1: (low, 2)})
        yield Sample(types, attrs, (0,), low=0.1, ranges={1: (low, 2)})


def _grad_samples() -> Iterator[Sample]:
    for s in _samples():
        x, labels = s.types[:2]
        assert x is not None
        assert labels is not None
        dy = labels.with_dtype("f32") if s.attrs["reduction"] == "none" else T(())
        yield Sample(
            (dy, *s.types[1:]),
            {**s.attrs, "classes": x.shape[1]},
            (0,),
            0.1,
            1.0,
            0.0,
            (),
            s.ranges,
        )


register(
    OpDef(
        "NegativeLogLikelihood",
        infer=_infer,
        kernel=_kernel,
        work=lambda node: Work("elementwise", 2 * operand(node, 1).size),
        c=CKernel("odtplan_nll_f32", "odtplan_nll_t", "odtplan_nll", _params, operands=3),
        samples=_samples,
        vjp=_vjp,
    )
)

register(
    OpDef(
        "NegativeLogLikelihoodGrad",
        infer=_grad_infer,
        kernel=_grad_kernel,
        work=lambda node: (
            Work("copy", node.out.type.nbytes),
            Work("elementwise", 2 * operand(node, 1).size),
        ),
        c=CKernel("odtplan_nll_grad_f32", "odtplan_nll_t", "odtplan_nll", _params, operands=3),
        samples=_grad_samples,
    )
)
