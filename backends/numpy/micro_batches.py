"""Labelled samples as the micro-batches of a training graph that no plan runs."""

from __future__ import annotations

import numpy as np

from ...ir.autodiff import build_training
from ...ir.candidates import param_slots
from ...ir.errors import UsageError
from ...ir.graph import Array, Graph
from ...ir.sample import Samples, array_names
from ...ir.targets import target_names
from ...ir.training import Candidate, TrainingGraph, TrainingSpec
from .data import checked_samples, checked_targets


def plain(spec: TrainingSpec) -> TrainingSpec:
    """Plain SGD on the same loss, one micro-batch per update."""
    return TrainingSpec(
        loss=spec.loss,
        delta=spec.delta,
        margin=spec.margin,
        bptt=spec.bptt,
        losses=spec.losses,
        loss_weights=spec.loss_weights,
    )


def array_names_of(forward: Graph, spec: TrainingSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What arrays of samples, and of targets, are called in a file."""
    first = next(iter(param_slots(forward)))
    training = build_training(forward, plain(spec), [Candidate(first)])
    return array_names(training.samples), target_names(training)


def feeds(training: TrainingGraph, x: Samples, y: Samples) -> list[dict[str, Array]]:
    """Inputs of each full micro-batch: samples and targets.

    Raises:
        UsageError: The data do not fit the model, or there are fewer than a micro-batch.
    """
    samples = checked_samples(training, x)
    count = len(next(iter(samples.values())))
    targets = checked_targets(training, y, count)
    size = training.sample.type.shape[0]
    if count < size:
        raise UsageError(f"there are {count} samples, fewer than a micro-batch of {size}")
    given = {v.name: a for v, a in zip(training.samples, samples.values(), strict=True)}
    given |= {v.name: a for v, a in zip(training.targets, targets.values(), strict=True)}
    return [
        {name: np.ascontiguousarray(a[i : i + size]) for name, a in given.items()}
        for i in range(0, count - size + 1, size)
    ]
