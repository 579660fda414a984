"""Step size by the number of the update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """How the step size changes over a run.

    After the warm-up ``linear`` falls to 0 on a straight line and ``cosine`` on half a cosine
    (Loshchilov and Hutter, "SGDR", 2017, eq. 5, one period, least value 0); 0 itself is the step
    size of the update after the last.

    Attributes:
        name: The shape.
        lr: Step size at its largest.
        total: Updates of the run.
        warmup: First updates, over which the step size rises on a straight line to ``lr``.
    """

    name: ScheduleName
    lr: float
    total: int
    warmup: int = 0

    def rate(self, update: int) -> float:
        """Step size of an update, counted from 0."""
        if update < self.warmup:
            return self.lr * (update + 1) / self.warmup
        if self.name == "constant":
            return self.lr
        done = (update - self.warmup) / max(1, self.total - self.warmup)
        if self.name == "linear":
            return self.lr * (1 - done)
        return self.lr * (1 + math.cos(math.pi * done)) / 2
