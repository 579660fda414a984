"""Training from the replay cache: each micro-batch passes the frozen front once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...ir.graph import Array
from ...planner.plan import Replay
from .data import chosen_of
from .runtime import Runtime


class Replayed:
    """A runtime with a cache of exactly the planned bytes.

    Attributes:
        captured: Micro-batches in the cache.
        replayed: Micro-steps that were trained from what was there before.
    """

    def __init__(self, runtime: Runtime, replay: Replay) -> None:
        """An empty cache.

        Args:
            runtime: Of a plan with replay.
            replay: That of the plan.
        """
        self.captured = self.replayed = 0
        self._runtime, self._replay = runtime, replay
        self._memory = np.zeros(replay.cache_bytes, np.uint8)
        self._index: dict[tuple[int, ...], int] = {}
        self._like = np.zeros(0)

    def train(
        self, chosen: list[int], x: Mapping[str, Array], y: Mapping[str, Array], lr: float
    ) -> float:
        """One micro-step; the same bits as ``Runtime.train_step``.

        A micro-batch that finds no room in the cache passes all steps.

        Args:
            chosen: Numbers of the samples.
            x: All samples, by name of their array.
            y: All targets, by name of their array.
            lr: Step size.
        """
        key = tuple(chosen)
        if key in self._index:
            self.replayed += 1
        elif self.captured < self._replay.entries:
            entry = self._runtime.capture(chosen_of(x, chosen))
            self._like = entry
            self._bytes(self.captured)[:] = entry.reshape(-1).view(np.uint8)
            self._index[key] = self.captured
            self.captured += 1
        else:
            return self._runtime.train_step(chosen_of(x, chosen), chosen_of(y, chosen), lr)
        stored = self._bytes(self._index[key]).view(self._like.dtype).reshape(self._like.shape)
        return self._runtime.train_cached(stored, chosen_of(y, chosen), lr)

    def _bytes(self, index: int) -> Array:
        begin = index * self._replay.stride
        return self._memory[begin : begin + self._replay.entry_bytes]
