"""``--objective``: one figure, or several weighed against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from typing import get_args

from ..ir.errors import UsageError
from .plan import ObjectiveName


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of figures, each relative to its reference; always minimized.

    A figure ``x`` counts ``weight * x / reference``, importance counts by what is forgone:
    ``weight * (1 - x / reference)``.

    Attributes:
        weights: Figure -> weight, above 0.
        references: Figure -> what it is with plain training: all updates, everything kept.
    """

    weights: Mapping[ObjectiveName, float]
    references: Mapping[ObjectiveName, float]

    def value(self, figures: Mapping[ObjectiveName, float]) -> float:
        """The sum for these figures."""
        total = 0.0
        for name, weight in self.weights.items():
            part = figures[name] / self.references[name]
            total += weight * (1.0 - part if name == "learn" else part)
        return total


#: What a solve optimizes.
Goal = ObjectiveName | Weighted


def wants(goal: Goal, *names: ObjectiveName) -> bool:
    """One of these figures is part of a goal."""
    if isinstance(goal, Weighted):
        return any(name in goal.weights for name in names)
    return goal in names


def parse_objective(text: str) -> ObjectiveName | dict[ObjectiveName, float]:
    """Read ``latency`` or ``latency=1,energy=0.5``.

    Raises:
        UsageError: An unknown name (the nearest is told), a name given twice, or a weight that is
            no number above 0.
    """
    names = get_args(ObjectiveName)
    weights: dict[ObjectiveName, float] = {}
    items = [i.strip() for i in text.split(",")]
    for item in items:
        typed, equals, number = (part.strip() for part in item.partition("="))
        name = next((n for n in names if n == typed), None)
        if name is None:
            near = get_close_matches(typed, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(names)}"
            raise UsageError(f"--objective: {typed!r} is not known; {hint}")
        if name in weights:
            raise UsageError(f"--objective: {name} is given twice")
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            weight = float("nan")
        if not (isfinite(weight) and weight > 0):
            raise UsageError(
                f"--objective: weight {number!r} of {name} is no number above 0; write for example"
                " latency=1,energy=0.5"
            )
        weights[name] = weight
    if len(weights) == 1:
        return next(iter(weights))
    return weights
