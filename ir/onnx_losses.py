"""Conversion rules of the losses that a model file may hold."""

from __future__ import annotations

import numpy as np

from .graph import Attr, Value
from .onnx_convert import RejectedError, Site


def negative_log_likelihood(s: Site) -> Value:
    """NegativeLogLikelihoodLoss."""
    return _loss(s, s.value(0))


def _loss(s: Site, log_probabilities: Value) -> Value:
    attrs: dict[str, Attr] = {"reduction": s.text("reduction", "mean")}
    if s.has("ignore_index"):
        attrs["ignore_index"] = s.integer("ignore_index")
    return s.emit("NegativeLogLikelihood", (log_probabilities, _labels(s), s.optional(2)), attrs)


def _labels(s: Site) -> Value:
    """The labels as i32, whatever integers the file has."""
    data = s.data(1)
    if data is None:
        return s.value(1)
    bounds = np.iinfo(np.int32)
    if data.dtype.kind not in "iu" or data.min() < bounds.min or data.max() > bounds.max:
        raise RejectedError(f"labels {s.node.inputs[1]} are {data.dtype}, not int32")
    name = f"{s.node.name}/labels"
    return s.conversion.graph.add_constant(name, data.astype(np.int32))
