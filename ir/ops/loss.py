"""Cross entropy and its gradient with respect to the prediction.

The gradient of softmax followed by cross entropy needs nothing but the probabilities, so the two
are differentiated as one (``SoftmaxCrossEntropyGrad``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..errors import GraphError, UsageError
from ..graph import Array, Attr, Node, TensorType
from ..opdef import CKernel, OpDef, Sample, Work, operand, register
from .elementary import log32

#: Probabilities below this count as this much: FLT_MIN, the smallest normal fp32 number.
SMALLEST_PROBABILITY = np.float32(1.17549435e-38)

T = TensorType


def _check_labels(node: Node) -> TensorType:
    probs, labels = operand(node, 0), operand(node, 1)
    if len(probs.shape) != 2:
        raise GraphError(f"probabilities must be [batch, classes], not {probs}")
    if labels != T(probs.shape[:1], "i32"):
        raise GraphError(f"labels must be i32[{probs.shape[0]}], not {labels}")
    return probs


def _operands(node: Node, inputs: Sequence[Array | None]) -> tuple[Array, Array]:
    probs, labels = inputs
    assert probs is not None
    assert labels is not None
    bad = (labels < 0) | (labels >= probs.shape[1])
    if bad.any():
        raise UsageError(
            f"node {node.name}: label {int(labels[bad][0])} of sample {int(bad.argmax())} is not in"
            f" 0..{probs.shape[1] - 1}; give labels of the model's classes"
        )
    return probs, labels


def _cross_entropy_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    probs, labels = _operands(node, inputs)
    picked = probs[np.arange(len(labels)), labels]
    terms = log32(np.maximum(picked, picked.dtype.type(SMALLEST_PROBABILITY)))
    total = np.add.accumulate(terms)[-1]
    return (np.asarray(-total / probs.dtype.type(len(labels))),)


def _cross_entropy_grad_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    probs, labels = _operands(node, inputs)
    one_hot = np.zeros_like(probs)
    one_hot[np.arange(len(labels)), labels] = 1.0
    return ((probs - one_hot) / probs.dtype.type(len(labels)),)


def _label_params(node: Node) -> dict[str, Attr]:
    batch, classes = operand(node, 0).shape
    return {"batch": batch, "classes": classes}


def _label_samples() -> Iterator[Sample]:
    """Tests draw integer operands from 0 and 1, which are classes in all of these."""
    yield Sample((T((3, 4)), T((3,), "i32")), low=0.05, high=1.0)
    yield Sample((T((1, 10)), T((1,), "i32")), low=0.05, high=1.0)


def _cross_entropy_infer(node: Node) -> Sequence[TensorType]:
    return (T((), _check_labels(node).dtype),)


register(
    OpDef(
        "CrossEntropy",
        infer=_cross_entropy_infer,
        kernel=_cross_entropy_kernel,
        work=lambda node: Work("transcendental", operand(node, 0).shape[0]),
        c=CKernel(
            "odtplan_cross_entropy_f32",
            "odtplan_cross_entropy_t",
            "odtplan_loss",
            _label_params,
        ),
        samples=_label_samples,
    )
)

register(
    OpDef(
        "SoftmaxCrossEntropyGrad",
        infer=lambda node: (_check_labels(node),),
        kernel=_cross_entropy_grad_kernel,
        work=lambda node: Work("elementwise", 2 * operand(node, 0).size),
        c=CKernel(
            "odtplan_softmax_cross_entropy_grad_f32",
            "odtplan_cross_entropy_t",
            "odtplan_loss",
            _label_params,
        ),
        samples=_label_samples,
        inplace=(0,),
    )
)
