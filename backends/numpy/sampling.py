"""Which samples a micro-batch holds: a function of seed and number, so that any run can resume."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...ir.graph import Array


@dataclass
class Sampler:
    """Numbers the micro-batches of a run without end.

    Passes are drawn one after the other from one generator; an earlier one is found again by
    starting anew.

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

    def __post_init__(self) -> None:
        """Before the first pass."""
        self._start()

    def batch(self, number: int) -> list[int]:
        """Samples of a micro-batch, counted from 0."""
        items = self.items(number)
        return items if self._batches is None else [int(i) for i in self._batches[items[0]]]

    def items(self, number: int) -> list[int]:
        """What the order of a pass tells of a micro-batch: its samples, or which fixed one it is.

        Fixed ones take the samples of ``arranged`` one after the other.
        """
        if self._batches is not None:
            return [self._at(number, len(self._batches))]
        first = number * self.size
        return [self._at(i, self.count) for i in range(first, first + self.size)]

    @property
    def arranged(self) -> Array:
        """All samples as fixed micro-batches hold them; in the order of the data where none is."""
        if self._batches is None:
            return np.arange(self.count)
        return self._batches.reshape(-1)[: self.count]

    def _start(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._orders: dict[int, Array] = {}
        self._drawn = 0
        self._batches: Array | None = None
        if self.fixed and self.size > 1:
            mixed = self._rng.permutation(self.count)
            self._batches = np.resize(mixed, (-(-self.count // self.size), self.size))

    def _at(self, place: int, count: int) -> int:
        """What stands at a place of all passes one behind the other."""
        turn, within = divmod(place, count)
        return int(self._order(turn, count)[within]) if self.shuffled else within

    def _order(self, turn: int, count: int) -> Array:
        if turn < self._drawn and turn not in self._orders:
            self._start()
        while self._drawn <= turn:
            self._orders.pop(self._drawn - 2, None)  # a micro-batch may lie across the end of one
            self._orders[self._drawn] = (
                self._rng.permutation(count)
                if self.weights is None
                else self._rng.choice(count, count, p=self.weights)
            )
            self._drawn += 1
        return self._orders[turn]


def balancing(labels: Array) -> Array:
    """Probabilities that make every class as likely as any other: inverse class frequency.

    Args:
        labels: One integer per sample.
    """
    _, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weights = 1.0 / (len(counts) * counts[which])
    return np.asarray(weights / weights.sum())
