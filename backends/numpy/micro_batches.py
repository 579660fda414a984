"""Labelled samples as the micro-batches of a training graph that no plan runs."""

from __future__ import annotations

import numpy as np

from ...ir.errors import UsageError
from ...ir.graph import Array
from ...ir.sample import Samples
from ...ir.training import TrainingGraph, TrainingSpec
from .data import checked_samples, checked_targets


def plain(spec: TrainingSpec) -> TrainingSpec:
    """Plain SGD on the same loss, one micro-batch per update."""
    return TrainingSpec(loss=spec.loss, delta=spec.delta, margin=spec.margin, bptt=spec.bptt)


def feeds(training: TrainingGraph, x: Samples, y: Array) -> list[dict[str, Array]]:
    """Inputs of each full micro-batch: samples and target.

    Raises:
        UsageError: The data do not fit the model, or there are fewer than a micro-batch.
    """
    samples = checked_samples(training, x)
    count = len(next(iter(samples.values())))
    y = checked_targets(training, y, count)
    size = training.sample.type.shape[0]
    if count < size:
        raise UsageError(f"there are {count} samples, fewer than a micro-batch of {size}")
    given = {v.name: a for v, a in zip(training.samples, samples.values(), strict=True)}
    given[training.target.name] = y
    return [
        {name: np.ascontiguousarray(a[i : i + size]) for name, a in given.items()}
        for i in range(0, count - size + 1, size)
    ]
