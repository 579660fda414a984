"""Symbolic memory of the checker: byte ranges and what they hold.

Part of the checker (see ``planner.check``). A symbol is ``(value, age)``. The age of a tensor that
was computed in this training step is the micro-step that computed it; of an accumulator, the number
of gradients in it; of a parameter or an optimizer tensor, the number of updates applied to it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from ..ir.graph import TensorType
from .check_program import occupied
from .plan import Buffer

Symbol = tuple[str, int]
#: The age of what a transfer is still moving; no reader asks for it.
MOVING = -1


@dataclass
class Range:
    """Bytes ``begin`` to ``end`` and what they hold; a view holds several values at once."""

    begin: int
    end: int
    holds: dict[Symbol, TensorType] = field(default_factory=dict)

    def __str__(self) -> str:
        """The symbols, for messages."""
        return " and ".join(
            f"{name} ({'still moving' if age == MOVING else f'version {age}'})"
            for name, age in self.holds
        )


class SymbolicMemory:
    """What the writable spaces hold. A write erases everything that it overlaps."""

    def __init__(self) -> None:
        """Nothing is held."""
        self._ranges: dict[str, list[Range]] = {"arena": [], "state": [], "storage": []}

    def forget(self, space: str, keep: Collection[str] = ()) -> None:
        """Erase a space but for these values."""
        self._ranges[space] = [
            r for r in self._ranges[space] if any(name in keep for name, _ in r.holds)
        ]

    def at(self, b: Buffer) -> Range | None:
        """What lies at exactly the bytes of a buffer; None if nothing whole does."""
        for r in self._ranges.get(b.space, ()):
            if r.begin == b.offset and r.end == b.offset + b.bytes:
                return r
        return None

    def erase(self, b: Buffer) -> None:
        """Forget everything that overlaps a buffer, its padding included."""
        begin, end = b.offset, b.offset + occupied(b.bytes)
        ranges = self._ranges[b.space]
        self._ranges[b.space] = [r for r in ranges if r.end <= begin or end <= r.begin]

    def write(self, b: Buffer, symbol: Symbol, t: TensorType) -> None:
        """Put a symbol at the bytes of a buffer."""
        self.erase(b)
        self._ranges[b.space].append(Range(b.offset, b.offset + b.bytes, {symbol: t}))
