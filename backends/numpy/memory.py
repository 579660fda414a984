"""The memory of a plan as NumPy buffers: an arena and a state of exactly the planned bytes.

Where the plan has several RAM regions, each of them has arrays of its own.

Bytes of arena and storage that no live buffer covers are poisoned with 0xFF (a NaN in every float
type), so that a read of a dead range shows in the results. The padding of the state is zero, as on
the device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from ...ir.graph import Array, TensorType
from ...planner.plan import ALIGNMENT_BYTES, Buffer, Part, Plan, part_of

#: Every float made of these bytes is a NaN.
POISON = 0xFF

Span = tuple[int, int]


class Memory:
    """Arena, state and storage of a plan.

    Attributes:
        arena: Transient bytes, an array per RAM region.
        state: Bytes that survive a step, an array per RAM region.
        storage: Bytes on external storage.
        homes: Optimizer tensor that lives in storage -> its buffer there.
        views: Buffer id -> array over its bytes, in storage form; arena, state and storage only.
    """

    def __init__(self, plan: Plan, homes: Collection[str] = ()) -> None:
        """Allocate the planned bytes; those that do not survive a step are poisoned.

        Args:
            plan: The plan.
            homes: Optimizer tensors that live in storage, by value name.
        """
        arena, state = plan.parts("arena"), plan.parts("state")
        self.arena = [_poisoned(end - begin) for _, begin, end in arena]
        self.state = [np.zeros(end - begin, np.uint8) for _, begin, end in state]
        self.storage = _poisoned(plan.claims.storage_bytes)
        self.views: dict[str, Array] = {}
        for b in plan.buffers:
            if b.space == "storage":
                self.views[b.id] = _view(self.storage, b, 0)
            elif b.space in ("arena", "state"):
                parts = arena if b.space == "arena" else state
                arrays = self.arena if b.space == "arena" else self.state
                r = part_of(parts, b.offset, b.offset + b.bytes)
                self.views[b.id] = _view(arrays[r], b, parts[r].begin)
        self._dead = _dead_spans(plan, arena)
        self.homes = {b.value: b.id for b in plan.buffers if _is_home(b, homes)}
        kept = [_span(b) for b in plan.buffers if _is_home(b, homes)]
        self._passing = _without((0, len(self.storage)), kept)

    def clear(self) -> None:
        """Poison arena and storage but for state: nothing of an earlier micro-step may be seen."""
        for memory in self.arena:
            memory[:] = POISON
        for begin, end in self._passing:
            self.storage[begin:end] = POISON

    def retire(self, index: int) -> None:
        """Poison the arena bytes whose buffers die with a step."""
        for memory, begin, end in self._dead[index]:
            self.arena[memory][begin:end] = POISON


def _is_home(b: Buffer, homes: Collection[str]) -> bool:
    return b.space == "storage" and b.value in homes


def _poisoned(n_bytes: int) -> Array:
    return np.full(n_bytes, POISON, np.uint8)


def _view(memory: Array, b: Buffer, begin: int) -> Array:
    """The bytes of a buffer in the array of a part that begins there."""
    t, at = TensorType(b.shape, b.dtype), b.offset - begin
    return memory[at : at + b.bytes].view(t.np_dtype).reshape(t.storage_shape)


def _span(b: Buffer) -> Span:
    size = -(-b.bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return b.offset, b.offset + size


def _dead_spans(plan: Plan, parts: Sequence[Part]) -> list[list[tuple[int, int, int]]]:
    """Ranges of the arena that no buffer needs any more, by the step after which they die.

    A range is the index of a part, and its first byte and the one after its last within that.
    """
    arena = [b for b in plan.buffers if b.space == "arena"]
    dying: list[list[Buffer]] = [[] for _ in plan.steps]
    for b in arena:
        dying[b.last].append(b)
    result = []
    for index, buffers in enumerate(dying):
        living = [_span(b) for b in arena if b.first <= index < b.last] if buffers else ()
        dead: list[tuple[int, int, int]] = []
        for b in buffers:
            r = part_of(parts, *_span(b))
            begin = parts[r].begin
            dead += [(r, low - begin, high - begin) for low, high in _without(_span(b), living)]
        result.append(dead)
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
