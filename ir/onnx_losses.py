"""Conversion rules of the losses that a model file may hold."""

from __future__ import annotations

import numpy as np

from .graph import Attr, Value
from .onnx_convert import RejectedError, Rule, Site


def _negative_log_likelihood(s: Site) -> Value:
    return _loss(s, s.value(0))


def _softmax_cross_entropy(s: Site) -> tuple[Value, ...]:
    """Negative log likelihood of LogSoftmax, which is the second result."""
    log_probabilities = s.emit("LogSoftmax", (s.value(0),), {"axis": 1}, "log_probabilities")
    return _loss(s, log_probabilities), log_probabilities


def _loss(s: Site, log_probabilities: Value) -> Value:
    attrs: dict[str, Attr] = {"reduction": s.text("reduction", "mean")}
    if s.has("ignore_index"):
        attrs["ignore_index"] = s.integer("ignore_index")
    operands = (log_probabilities, _labels(s), s.optional(2))
    return s.emit("NegativeLogLikelihood", operands, attrs)


def _labels(s: Site) -> Value:
    """The labels as i32, whatever integers the file has."""
    data = s.data(1)
    if data is None:
        return s.value(1)
    bounds = np.iinfo(np.int32)
    if data.dtype.kind not in "iu" or data.min() < bounds.min or data.max() > bounds.max:
        raise RejectedError(f"labels {s.node.inputs[1]} are {data.dtype}, not int32")
    return s.indices(data)


#: ONNX operator of the standard domain -> its rule.
LOSS_RULES: dict[str, Rule] = {
    "NegativeLogLikelihoodLoss": _negative_log_likelihood,
    "SoftmaxCrossEntropyLoss": _softmax_cross_entropy,
}
