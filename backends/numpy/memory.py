"""The memory of a plan as NumPy buffers: an arena and a state of exactly the planned bytes.

Bytes of arena and storage that no live buffer covers are poisoned with 0xFF (a NaN in every float
type), so that a read of a dead range shows in the results. The padding of the state is zero, as on
the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ...ir.graph import Array, TensorType
from ...planner.plan import ALIGNMENT_BYTES, Buffer, Plan

#: Every float made of these bytes is a NaN.
POISON = 0xFF

Span = tuple[int, int]


class Memory:
    """Arena, state and storage of a plan.

    Attributes:
        arena: Transient bytes.
        state: Bytes that survive a step.
        storage: Bytes on external storage.
        views: Buffer id -> array over its bytes, in storage form; arena, state and storage only.
    """

    def __init__(self, plan: Plan) -> None:
        """Allocate the planned bytes; those that do not survive a step are poisoned."""
        ram = plan.claims.ram_bytes
        self.arena = _poisoned(ram.arena)
        self.state = np.zeros(ram.weights + ram.optimizer + ram.accumulators, np.uint8)
        self.storage = _poisoned(plan.claims.storage_bytes)
        spaces = {"arena": self.arena, "state": self.state, "storage": self.storage}
        self.views = {b.id: _view(spaces[b.space], b) for b in plan.buffers if b.space in spaces}
        self._dead = _dead_spans(plan)

    def clear(self) -> None:
        """Poison the arena and the storage: nothing of an earlier micro-step may be seen."""
        self.arena[:] = POISON
        self.storage[:] = POISON

    def retire(self, index: int) -> None:
        """Poison the arena bytes whose buffers die with a step."""
        for begin, end in self._dead[index]:
            self.arena[begin:end] = POISON


def _poisoned(n_bytes: int) -> Array:
    return np.full(n_bytes, POISON, np.uint8)


def _view(memory: Array, b: Buffer) -> Array:
    t = TensorType(b.shape, b.dtype)
    return memory[b.offset : b.offset + b.bytes].view(t.np_dtype).reshape(t.storage_shape)


def _span(b: Buffer) -> Span:
    size = -(-b.bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return b.offset, b.offset + size


def _dead_spans(plan: Plan) -> list[list[Span]]:
    """Byte ranges of the arena that no buffer needs any more, by the step after which they die."""
    arena = [b for b in plan.buffers if b.space == "arena"]
    dying: list[list[Buffer]] = [[] for _ in plan.steps]
    for b in arena:
        dying[b.last].append(b)
    result = []
    for index, buffers in enumerate(dying):
        living = [_span(b) for b in arena if b.first <= index < b.last] if buffers else ()
        result.append([s for b in buffers for s in _without(_span(b), living)])
    return result


def _without(span: Span, others: Iterable[Span] | Sequence[Span]) -> list[Span]:
    """The parts of a span that no other span covers."""
    parts = [span]
    for begin, end in others:
        parts = [
            (a, b)
            for low, high in parts
            for a, b in ((low, min(high, begin)), (max(low, end), high))
            if a < b
        ]
    return parts
