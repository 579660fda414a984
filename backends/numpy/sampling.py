"""Which samples a micro-batch holds: a function of seed and number, so that any run can resume."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ...ir.graph import Array


@dataclass(frozen=True)
class Sampler:
    """Numbers the micro-batches of a run without end.

    Attributes:
        count: Samples in the data set.
        size: Samples per micro-batch.
        seed: Of the order.
        shuffled: Each pass in a new order; else all in the order of the data.
        fixed: Micro-batches are made of the same samples in each pass, in a new order; the last is
            filled from the first.
        weights: Probability of each sample, drawn with replacement; None: each once per pass.
    """

    count: int
    size: int
    seed: int = 0
    shuffled: bool = True
    fixed: bool = False
    weights: Array | None = None
    _orders: dict[int, Array] = field(default_factory=dict, compare=False, repr=False)

    def batch(self, number: int) -> list[int]:
        """Samples of a micro-batch, counted from 0."""
        if self.fixed and self.size > 1:
            batches = self._batches
            return [int(i) for i in batches[self._at(number, len(batches))]]
        first = number * self.size
        return [self._at(i, self.count) for i in range(first, first + self.size)]

    @cached_property
    def _batches(self) -> Array:
        mixed = np.random.default_rng(self.seed).permutation(self.count)
        return np.resize(mixed, (-(-self.count // self.size), self.size))

    def _at(self, place: int, count: int) -> int:
        """What stands at a place of all passes one behind the other."""
        turn, within = divmod(place, count)
        if not self.shuffled:
            return within
        if turn not in self._orders:
            rng = np.random.default_rng((self.seed, turn))
            while len(self._orders) > 1:  # a micro-batch may lie across the end of a pass
                del self._orders[min(self._orders)]
            self._orders[turn] = (
                rng.permutation(count)
                if self.weights is None
                else rng.choice(count, count, p=self.weights)
            )
        return int(self._orders[turn][within])


def balancing(labels: Array) -> Array:
    """Probabilities that make every class as likely as any other: inverse class frequency.

    Args:
        labels: One integer per sample.
    """
    _, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weights = 1.0 / (len(counts) * counts[which])
    return np.asarray(weights / weights.sum())
