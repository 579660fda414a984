"""Host memory beside the arena, which the fast steps use over and over."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

from ...ir.graph import Array

#: What a step does when it runs.
Run = Callable[[], object]
#: Bytes of the copies that a step works on at a time: enough for products of matrices to be fast
#: even where the arena is tiny, and no more than the processor's second level cache holds.
LEAST, MOST = 1 << 18, 1 << 19
#: Floats that arrays begin at multiples of: a line of the processor's cache.
LINE = 16


class Scratch:
    """One f32 buffer that all steps share; nothing in it outlives a step.

    Steps are prepared twice: how much they take is known after the first time.

    Attributes:
        room: Floats that the copies of a step should make do with.
    """

    def __init__(self, arena_bytes: int) -> None:
        """Room of an eighth of the arena, within ``LEAST`` and ``MOST``."""
        self.room = min(max(arena_bytes // 8, LEAST), MOST) // 4
        self._buffer: Array | None = None
        self._used = self._most = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def begin(self) -> None:
        """Prepare another step: it may use all of the buffer."""
        self._used = 0

    def take(self, *shape: int) -> Array:
        """An f32 array, not initialized, that no other array of this step overlaps."""
        begin, size = self._used, prod(shape)
        self._used += -(-size // LINE) * LINE
        if self._buffer is None:
            self._most = max(self._most, self._used)
            return np.empty(shape, np.float32)
        return self._buffer[begin : begin + size].reshape(shape)

    def allocate(self) -> None:
        """Make the buffer, after all steps have been prepared once."""
        self._buffer = np.zeros(self._most, np.float32)
