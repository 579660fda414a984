"""Contribution analysis: what is gained where one tensor, or a part of it, is trained alone.

Tiny Training Engine (NeurIPS'22) trains one tensor at a time from the same start and takes what
accuracy gains as its score. Here it is what the loss of held-out samples falls by, which moves
before accuracy does, after one pass of plain SGD with the best of a few step sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...ir.autodiff import build_training
from ...ir.graph import Array, Graph
from ...ir.interpreter import run
from ...ir.training import Candidate, TrainingGraph, TrainingSpec
from .micro_batches import plain

#: Step sizes that are tried.
RATES = (0.001, 0.003, 0.01, 0.03)
#: Every so many samples one is held out, to measure the gain on.
HELD_OUT = 4
#: Updates at most.
UPDATES = 200


Feeds = Sequence[Mapping[str, Array]]


def contribution(
    forward: Graph,
    spec: TrainingSpec,
    candidates: Sequence[Candidate],
    learned: Feeds,
    held_out: Feeds,
) -> float:
    """What the mean loss of the held-out samples falls by, 0 where it rises.

    Args:
        forward: Imported graph; integer layers are trained as the float ones that they stand for.
        spec: The loss.
        candidates: What is trained alone: a tensor, or both of an adapter.
        learned: Micro-batches that it is trained on, see ``micro_batches.feeds``.
        held_out: Those that the gain is measured on.
    """
    training = build_training(forward, plain(spec), candidates)
    before = _loss(training, {}, held_out)
    after = min(_loss(training, _trained(training, learned, rate), held_out) for rate in RATES)
    return max(0.0, before - after)


def _trained(training: TrainingGraph, learned: Feeds, rate: float) -> dict[str, Array]:
    """The updated parameters after one pass."""
    results = {u.apply_node.out.name: u.value.name for u in training.updates}
    values = {name: training.graph.constants[name] for name in results.values()}
    with np.errstate(all="ignore"):  # too large a step ends in NaN, and gains nothing
        for i, fed in enumerate(learned[:UPDATES], 1):
            hyper = np.array([rate, 1.0, i], np.float32)
            env = run(training.graph, {**fed, training.hyper.name: hyper, **values}, {*results})
            values = {name: env[result] for result, name in results.items()}
    return values


def _loss(training: TrainingGraph, state: Mapping[str, Array], held_out: Feeds) -> float:
    """Mean loss of the held-out micro-batches; infinite where it is none."""
    wanted = training.loss.name
    with np.errstate(all="ignore"):
        losses = [run(training.graph, {**f, **state}, {wanted})[wanted] for f in held_out]
    mean = float(np.mean(losses))
    return mean if np.isfinite(mean) else np.inf
