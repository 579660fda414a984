"""How good a model is on a data set: loss, accuracy, squared error, area under the ROC curve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...ir.errors import UsageError
from ...ir.graph import Array
from ...ir.targets import bounds_of
from ...ir.training import TrainingGraph
from .data import DataSet, chosen_of
from .runtime import Runtime

MetricName = Literal["accuracy", "mse", "auc", "loss"]


@dataclass(frozen=True)
class Evaluation:
    """What a model reached on a data set.

    Attributes:
        metric: What ``value`` is.
        value: Accuracy and AUC from 0 to 1, a squared error, or the loss.
        loss: Mean loss over whole micro-batches; a rest that fills none does not count.
    """

    metric: MetricName
    value: float
    loss: float

    def better_than(self, other: Evaluation) -> bool:
        """Whether the value is better, or as good at a smaller loss; a NaN is worst."""
        return self._rank > other._rank

    def worse_than(self, other: Evaluation) -> bool:
        """Whether the value itself is worse."""
        return self._rank[0] < other._rank[0]

    @property
    def _rank(self) -> tuple[float, float]:
        value = self.value if self.metric in ("accuracy", "auc") else -self.value
        return tuple(-math.inf if math.isnan(v) else v for v in (value, -self.loss))  # type: ignore[return-value]


def metric_of(training: TrainingGraph) -> MetricName:
    """What the loss suggests: accuracy of classes, squared error of numbers, else the loss."""
    if training.spec.loss in ("mse", "huber"):
        return "mse"
    return "accuracy" if _class_axis(training) is not None else "loss"


def check_metric(training: TrainingGraph, metric: MetricName, data: DataSet) -> None:
    """Demand a data set that a metric can be computed on.

    Raises:
        UsageError: The model has no classes, no prediction like its target or its input, there are
            no binary labels, or there are fewer samples than a micro-batch holds.
    """
    size = training.sample.type.shape[0]
    predicted = training.prediction.type
    if data.count < size:
        raise UsageError(
            f"{data.name} has {data.count} samples, fewer than a batch of {size}; give more"
        )
    if metric == "accuracy" and _class_axis(training) is None:
        raise UsageError("--metric accuracy: the model does not predict classes; use loss")
    if metric == "mse" and predicted.shape != training.target.type.shape:
        raise UsageError(
            f"--metric mse: the prediction is {predicted}, the target {training.target.type}"
        )
    if metric == "auc":
        if len(training.samples) > 1 or predicted.size != training.sample.type.size:
            raise UsageError(
                f"--metric auc: the prediction, {predicted}, is no reconstruction of the input"
            )
        if data.anomalous is None:
            raise UsageError(f"--metric auc: {data.name} has no binary labels")
        if len(np.unique(data.anomalous)) < 2:
            raise UsageError(
                f"--metric auc: {data.name} has labels of one kind only; it takes 0 and 1"
            )


def evaluate(runtime: Runtime, data: DataSet, metric: MetricName) -> Evaluation:
    """Score a data set that ``check_metric`` has accepted; nothing of the state changes.

    The last micro-batch is filled from the first samples, which are not scored again.

    Args:
        runtime: Between two updates.
        data: At least one micro-batch of samples.
        metric: What to compute beside the loss.
    """
    size, losses, scores = runtime.plan.model.batch, [], []
    for begin in range(0, data.count, size):
        chosen = np.arange(begin, begin + size) % data.count
        new = min(size, data.count - begin)
        x, y = chosen_of(data.x, chosen), data.y[chosen]
        predicted, loss = runtime.evaluate(x, y)
        if new == size:
            losses.append(loss)
        if metric == "accuracy":
            scores.append(_hits(runtime.training, predicted, y)[:new].ravel())
        elif metric != "loss":
            error = (predicted.reshape(size, -1) - y.reshape(size, -1)).astype(np.float64)
            scores.append((error**2).mean(axis=1)[:new])
    mean_loss = float(np.mean(losses))
    if metric == "loss":
        return Evaluation(metric, mean_loss, mean_loss)
    each = np.concatenate(scores)
    if metric == "auc":
        assert data.anomalous is not None, data.name
        return Evaluation(metric, roc_auc(each, data.anomalous == 1), mean_loss)
    if metric == "accuracy":
        each = each[~np.isnan(each)]  # labels that count nothing
    return Evaluation(metric, float(each.mean()) if each.size else math.nan, mean_loss)


def roc_auc(scores: Array, positive: Array) -> float:
    """Area under the ROC curve: how often a positive sample has a higher score than a negative one.

    Ties count one half (Mann and Whitney, 1947).

    Args:
        scores: One number per sample [count].
        positive: bool [count], with at least one of each.

    Returns:
        From 0 to 1; NaN if a score is.
    """
    if np.isnan(scores).any():
        return math.nan
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


def _class_axis(training: TrainingGraph) -> int | None:
    """Axis of the prediction that holds the classes which the target numbers; None: none does."""
    bounds = bounds_of(training.graph, training.target)
    shape, labels = training.prediction.type.shape, training.target.type
    if bounds is None or labels.dtype != "i32":
        return None
    for axis in (1, len(shape) - 1):
        rest = (*shape[:axis], *shape[axis + 1 :])
        if shape[axis : axis + 1] == (bounds.high + 1,) and rest == labels.shape:
            return axis
    return None


def _hits(training: TrainingGraph, predicted: Array, labels: Array) -> Array:
    """1 where the most likely class is the label, NaN where the label counts nothing."""
    axis, bounds = _class_axis(training), bounds_of(training.graph, training.target)
    assert axis is not None
    assert bounds is not None
    hits = (predicted.argmax(axis) == labels).astype(np.float64)
    return hits if bounds.ignored is None else np.where(labels == bounds.ignored, np.nan, hits)
