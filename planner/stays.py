"""Buffers of a schedule under construction: who holds which bytes, from which step to which.

Every write opens a *stay*, a buffer of the plan. Views and in-place results continue the *block* of
bytes of their operand; a block lives from its first write to its last read.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..ir.graph import Node, TensorType, Value
from ..ir.opdef import get_op
from .blocks import Block, live_bytes
from .plan import Buffer, Space
from .tensors import Storage, aligned


@dataclass
class _Stay:
    """A buffer under construction; ``block`` is the index of the bytes that it is part of.

    ``in_place`` is a result that overwrites its operand.
    """

    id: str
    value: str
    type: TensorType
    block: int
    first: int
    last: int
    in_place: bool = False


@dataclass
class _Bytes:
    size: int
    first: int
    last: int


class Share(NamedTuple):
    """What of a block a buffer touches.

    Attributes:
        block: Index in the blocks of the arena, then those of the state.
        bytes: Size of the buffer.
    """

    block: int
    bytes: int


class Stays:
    """All buffers of a schedule; steps are named by their position in it.

    Attributes:
        state_bytes: Size of the state space.
    """

    def __init__(self, storage: Storage) -> None:
        """Enter what lives from the first step to the last: constants, state, caller's data."""
        self._storage = storage
        self._stays: list[_Stay] = []
        self._blocks: list[_Bytes] = []
        self._current: dict[Value, _Stay] = {}
        self._fixed: list[tuple[Value, Space, int]] = []
        self.state_bytes = 0
        for v, space in storage.space.items():
            if v.producer is None and space in ("flash", "io"):
                self._fixed.append((v, space, 0))
        for u in storage.training.updates:
            for v in u.resident:
                self._fixed.append((v, "state", self.state_bytes))
                self.state_bytes += aligned(v.type.nbytes)
        self._ids = {v.name for v, _, _ in self._fixed}

    def open(self, value: Value, step: int) -> str:
        """A buffer with bytes of its own, written by a step; returns its id."""
        self._blocks.append(_Bytes(self._storage.of[value].bytes, step, step))
        return self._add(value, len(self._blocks) - 1, step)

    def write(self, value: Value, step: int) -> str:
        """A buffer for a result: the bytes of its operand if it takes them over, else new ones."""
        source = self._storage.aliases.get(value)
        if source is None:
            return self.open(value, step)
        block = self._current[source].block
        self._blocks[block].last = max(self._blocks[block].last, step)
        name = self._add(value, block, step)
        producer = value.producer
        self._current[value].in_place = producer is not None and not get_op(producer.op).view
        return name

    def read(self, value: Value | None, step: int) -> str | None:
        """The id of the buffer that a step reads; None for an absent operand."""
        if value is None or value not in self._storage.of:
            return None if value is None else value.name
        self.hold(value, step)
        return self._current[value].id

    def hold(self, value: Value, step: int) -> None:
        """Keep the present buffer of a value up to a step."""
        stay = self._current[value]
        stay.last = step
        self._blocks[stay.block].last = max(self._blocks[stay.block].last, step)

    def scratch(self, kind: str, node: Node, size: int, step: int) -> str | None:
        """Bytes that only one step uses, named ``<kind>:<node>``; None where it needs none."""
        if size == 0:
            return None
        value = f"{kind}:{node.name}"
        self._blocks.append(_Bytes(aligned(size), step, step))
        t = TensorType((size,), "u8")
        stay = _Stay(self._unique(value, step), value, t, len(self._blocks) - 1, step, step)
        self._stays.append(stay)
        return stay.id

    def blocks(self) -> list[Block]:
        """What is to be placed in the arena."""
        return [Block(b.size, b.first, b.last) for b in self._blocks]

    def state_blocks(self, steps: int) -> list[Block]:
        """The tensors of the state, which live in all of so many steps."""
        return [
            Block(aligned(v.type.nbytes), 0, steps - 1)
            for v, space, _ in self._fixed
            if space == "state"
        ]

    def in_ram(self) -> dict[str, Share]:
        """Id of a buffer in arena or state -> the bytes that it is part of."""
        arena, count = len(self._blocks), 0
        found = {s.id: Share(s.block, s.type.nbytes) for s in self._stays}
        for v, space, _ in self._fixed:
            if space == "state":
                found[v.name] = Share(arena + count, v.type.nbytes)
                count += 1
        return found

    def move_state(self, offsets: Sequence[int]) -> None:
        """Put the tensors of the state elsewhere, an offset each."""
        places = iter(offsets)
        self._fixed = [
            (v, space, next(places) if space == "state" else offset)
            for v, space, offset in self._fixed
        ]

    def apart(self, steps: int, room: int) -> Stays:
        """The same buffers, with in-place results beside their operands wherever room is left.

        A chain of in-place results lies at one address for as long as all of it lives, and that may
        leave no layout for what else lives then.

        Args:
            steps: Number of steps.
            room: Live bytes that no step may exceed.
        """
        result = copy(self)
        result._blocks = [replace(b) for b in self._blocks]
        result._stays, result._current = [replace(s) for s in self._stays], {}
        live = live_bytes(self.blocks(), steps)
        now: dict[int, int] = {}  # block -> the one that its bytes are in by now
        for s in result._stays:
            block = now.get(s.block, s.block)
            size = result._blocks[block].size
            if s.in_place and live[s.first] + size <= room:
                live[s.first] += size
                last, result._blocks[block].last = result._blocks[block].last, s.first
                result._blocks.append(_Bytes(size, s.first, last))
                now[s.block] = block = len(result._blocks) - 1
            s.block = block
        return result

    def buffers(self, steps: int, offsets: Sequence[int]) -> list[Buffer]:
        """The buffers of a plan of so many steps, with an arena offset per block."""
        fixed = [
            Buffer(
                id=v.name, value=v.name, space=space, dtype=v.type.dtype, shape=v.type.shape,
                bytes=v.type.nbytes, offset=offset, first=0, last=steps - 1,
            )
            for v, space, offset in self._fixed
        ]  # fmt: skip
        return fixed + [
            Buffer(
                id=s.id, value=s.value, space="arena", dtype=s.type.dtype, shape=s.type.shape,
                bytes=s.type.nbytes, offset=offsets[s.block], first=s.first, last=s.last,
            )
            for s in self._stays
        ]  # fmt: skip

    def _add(self, value: Value, block: int, step: int) -> str:
        name = self._unique(value.name, step)
        stay = _Stay(name, value.name, value.type, block, step, step)
        self._stays.append(stay)
        self._current[value] = stay
        return name

    def _unique(self, name: str, step: int) -> str:
        if name in self._ids:
            name = f"{name}@{step}"
        self._ids.add(name)
        return name
