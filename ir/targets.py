"""What a training target may hold, as told by the operators that read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .errors import UsageError
from .graph import Array, Graph, Value
from .indices import MOVES
from .opdef import operand
from .sample import Samples, by_name
from .training import TrainingGraph


@dataclass(frozen=True)
class Bounds:
    """Numbers that a target may hold.

    Attributes:
        low: Smallest.
        high: Largest.
        ignored: A label that is allowed as well.
    """

    low: int | float
    high: int | float
    ignored: int | None = None


def target_names(training: TrainingGraph) -> tuple[str, ...]:
    """What arrays of targets are called: ``y``; of several outputs ``y_`` and the output's name."""
    if len(training.targets) == 1:
        return ("y",)
    return tuple(f"y_{v.name}" for v in training.predictions)


def by_target(training: TrainingGraph, y: Samples) -> list[tuple[str, Value, ArrayLike]]:
    """What each target gets, with the name of its array; as ``ir.sample.by_input``."""
    return by_name(target_names(training), training.targets, y, ("y", "targets", "those wanted"))


def bounds_of(graph: Graph, target: Value) -> Bounds | None:
    """What limits the elements of a target; None: nothing does.

    Args:
        graph: A training graph.
        target: Its input of labels or wanted values.
    """
    same = {target}
    for node in graph.nodes:
        if node.op in MOVES and node.inputs[0] in same:
            same.add(node.out)
        if len(node.inputs) < 2 or node.inputs[1] not in same:
            continue
        if node.op in ("CrossEntropy", "NegativeLogLikelihood"):
            ignored = node.int_attr("ignore_index") if "ignore_index" in node.attrs else None
            return Bounds(0, operand(node, 0).shape[1] - 1, ignored)
        if node.op == "BCEWithLogits":
            return Bounds(0.0, 1.0)
    return None


def check_bounds(data: Array, bounds: Bounds | None, what: str) -> None:
    """Demand a target within its bounds.

    Raises:
        UsageError: It is not.
    """
    if bounds is None:
        return
    judged = data if bounds.ignored is None else data[data != bounds.ignored]
    if not judged.size or (judged.min() >= bounds.low and judged.max() <= bounds.high):
        return
    held = f"from {judged.min():g} to {judged.max():g}"
    if np.issubdtype(data.dtype, np.floating):
        raise UsageError(
            f"{what} has values {held}, but binary cross entropy takes"
            f" {bounds.low:g} to {bounds.high:g}"
        )
    raise UsageError(f"{what} has labels {held}, but the model has classes 0 to {bounds.high}")


def random_target(graph: Graph, target: Value, rng: np.random.Generator) -> Array:
    """A target within its bounds."""
    bounds, kind = bounds_of(graph, target), target.type
    if kind.dtype == "i32":
        low, high = (0, 1) if bounds is None else (int(bounds.low), int(bounds.high))
        return rng.integers(low, high, kind.shape, dtype=np.int32, endpoint=True)
    if bounds is not None:
        return rng.uniform(bounds.low, bounds.high, kind.shape).astype(np.float32)
    return rng.standard_normal(kind.shape).astype(np.float32)
