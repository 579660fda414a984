"""How good a model is on a data set: loss, accuracy, squared error, area under the ROC curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...ir.errors import UsageError
from ...ir.graph import Array
from ...ir.targets import bounds_of, target_names
from ...ir.training import TrainingGraph
from .data import DataSet, chosen_of, reconstructs
from .runtime import Runtime

MetricName = Literal["accuracy", "mse", "auc", "loss"]


@dataclass(frozen=True)
class Score:
    """What one output of several reached on a data set.

    Attributes:
        output: Its name.
        metric: What ``value`` is.
        value: Accuracy, or a squared error.
    """

    output: str
    metric: MetricName
    value: float


@dataclass(frozen=True)
class Evaluation:
    """What a model reached on a data set.

    Attributes:
        metric: What ``value`` is.
        value: Accuracy and AUC from 0 to 1, a squared error, or the loss. Of several outputs the
            mean over those that the metric suits.
        loss: Mean loss over whole micro-batches; a rest that fills none does not count. Of several
            outputs the weighted sum that they are trained by.
        scores: Of several outputs those that ``value`` is the mean of; where that is the loss, what
            each output's own loss suggests.
    """

    metric: MetricName
    value: float
    loss: float
    scores: tuple[Score, ...] = ()

    def better_than(self, other: Evaluation) -> bool:
        """Whether the value is better, or as good at a smaller loss; a NaN is worst."""
        return self._rank > other._rank

    def worse_than(self, other: Evaluation) -> bool:
        """Whether the value itself is worse."""
        return self._rank[0] < other._rank[0]

    @property
    def _rank(self) -> tuple[float, float]:
        value = self.value if self.metric in ("accuracy", "auc") else -self.value
        return _known(value), _known(-self.loss)


def _known(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def metric_of(training: TrainingGraph) -> MetricName:
    """What the loss suggests: accuracy of classes, squared error of numbers, else the loss.

    Of several outputs it is the loss, which alone tells what they are trained by.
    """
    return _own(training, 0) if len(training.targets) == 1 else "loss"


def _own(training: TrainingGraph, output: int) -> MetricName:
    """What the loss of one output suggests."""
    if training.spec.loss_of(training.predictions[output].name) in ("mse", "huber"):
        return "mse"
    return "accuracy" if _suits(training, "accuracy", output) else "loss"


def _suits(training: TrainingGraph, metric: MetricName, output: int) -> bool:
    """Whether accuracy or squared error of an output can be computed."""
    if metric == "accuracy":
        return class_axis(training, output) is not None
    predicted, target = training.predictions[output], training.targets[output]
    return target.type.dtype == "f32" and predicted.type.shape == target.type.shape


def class_axis(training: TrainingGraph, output: int) -> int | None:
    """Axis of a prediction that holds the classes which its target numbers; None: none does."""
    bounds = bounds_of(training.graph, training.targets[output])
    shape, labels = training.predictions[output].type.shape, training.targets[output].type
    if bounds is None or labels.dtype != "i32":
        return None
    for axis in (1, len(shape) - 1):
        rest = (*shape[:axis], *shape[axis + 1 :])
        if shape[axis : axis + 1] == (bounds.high + 1,) and rest == labels.shape:
            return axis
    return None


def check_metric(training: TrainingGraph, metric: MetricName, data: DataSet) -> None:
    """Demand a data set that a metric can be computed on.

    Raises:
        UsageError: The model has no classes, no prediction like its target or its input, there are
            no binary labels, or there are fewer samples than a micro-batch holds.
    """
    size, predicted = training.sample.type.shape[0], training.prediction.type
    suited = any(_suits(training, metric, i) for i in range(len(training.targets)))
    if data.count < size:
        raise UsageError(
            f"{data.name} has {data.count} samples, fewer than a batch of {size}; give more"
        )
    if metric == "accuracy" and not suited:
        raise UsageError("--metric accuracy: the model does not predict classes; use loss")
    if metric == "mse" and not suited:
        pairs = zip(training.predictions, training.targets, strict=True)
        found = "; ".join(f"the prediction is {p.type}, the target {t.type}" for p, t in pairs)
        raise UsageError(f"--metric mse: {found}")
    if metric == "auc":
        if not reconstructs(training):
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
    training, size = runtime.training, runtime.plan.model.batch
    scored = _scored(training, metric)
    losses: list[float] = []
    each: dict[int, list[Array]] = {output: [] for output in scored}
    names = target_names(training)
    for begin in range(0, data.count, size):
        chosen = np.arange(begin, begin + size) % data.count
        new = min(size, data.count - begin)
        x, y = chosen_of(data.x, chosen), chosen_of(data.y, chosen)
        predictions, loss = runtime.evaluate(x, y)
        if new == size:
            losses.append(loss)
        for output, kind in scored.items():
            predicted, wanted = predictions[training.predictions[output].name], y[names[output]]
            if kind == "accuracy":
                hits = _hits(training, output, predicted, wanted)[:new]
                each[output].append(hits[~np.isnan(hits)])  # without labels that count nothing
            else:
                error = (predicted.reshape(size, -1) - wanted.reshape(size, -1)).astype(np.float64)
                each[output].append((error**2).mean(axis=1)[:new])
    mean_loss = float(np.mean(losses))
    if metric == "auc":
        assert data.anomalous is not None, data.name
        (errors,) = each.values()
        return Evaluation(metric, roc_auc(np.concatenate(errors), data.anomalous == 1), mean_loss)
    scores = tuple(
        Score(training.predictions[output].name, kind, _mean(each[output]))
        for output, kind in scored.items()
    )
    value = mean_loss if metric == "loss" else float(np.mean([s.value for s in scores]))
    return Evaluation(metric, value, mean_loss, scores if len(names) > 1 else ())


def batch_losses(runtime: Runtime, data: DataSet) -> Array:
    """Loss of each whole micro-batch, f64; nothing of the state changes.

    Args:
        runtime: Between two updates.
        data: Samples; a rest that fills no micro-batch is left out.
    """
    size = runtime.plan.model.batch
    losses = []
    for begin in range(0, data.count - size + 1, size):
        chosen = np.arange(begin, begin + size)
        losses.append(runtime.evaluate(chosen_of(data.x, chosen), chosen_of(data.y, chosen))[1])
    return np.array(losses, np.float64)


def _scored(training: TrainingGraph, metric: MetricName) -> Mapping[int, MetricName]:
    """Numbers of the outputs that get a score of their own, and which."""
    outputs = range(len(training.targets))
    if metric == "auc":
        return {0: metric}
    if metric != "loss":
        return {i: metric for i in outputs if _suits(training, metric, i)}
    if len(outputs) == 1:
        return {}
    own = {i: _own(training, i) for i in outputs}
    return {i: kind for i, kind in own.items() if kind != "loss"}


def _mean(parts: Sequence[Array]) -> float:
    """Mean over all parts; NaN where there is nothing in them."""
    each = np.concatenate(parts)
    return float(each.mean()) if each.size else math.nan


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


def _hits(training: TrainingGraph, output: int, predicted: Array, labels: Array) -> Array:
    """1 where the most likely class is the label, NaN where the label counts nothing."""
    axis = class_axis(training, output)
    bounds = bounds_of(training.graph, training.targets[output])
    assert axis is not None
    assert bounds is not None
    hits = (predicted.argmax(axis) == labels).astype(np.float64)
    return hits if bounds.ignored is None else np.where(labels == bounds.ignored, np.nan, hits)
