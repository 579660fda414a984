"""Arena bytes over the slots of a timeline: which column of a program occupies them, and when.

A row of the program per slot would do. But most slots need no more than a neighbour in any case,
whatever is decided: only where bytes come right before, and some go right after, is there a peak.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


@dataclass
class Occupancy:
    """Ranges of slots during which a column holds bytes.

    Attributes:
        slots: Length of the timeline.
    """

    slots: int
    _begin: list[int] = field(default_factory=list)
    _end: list[int] = field(default_factory=list)
    _column: list[int] = field(default_factory=list)
    _bytes: list[float] = field(default_factory=list)
    _rises: set[int] = field(default_factory=set)
    _falls: set[int] = field(default_factory=set)

    def add(
        self, begin: int, end: int, column: int, size: float, *, continues: bool = False
    ) -> None:
        """A column times ``size`` bytes during slots ``begin`` to ``end``.

        Args:
            begin: First slot.
            end: Last slot; nothing is added where it is before the first.
            column: Column of the program.
            size: Bytes, also negative.
            continues: What the slot before holds for the same tensor is no less in any case.
        """
        if size == 0 or begin > end:
            return
        self._begin.append(begin)
        self._end.append(end + 1)
        self._column.append(column)
        self._bytes.append(size)
        up, down = (self._rises, self._falls) if size > 0 else (self._falls, self._rises)
        if not continues:
            up.add(begin)
        down.add(end + 1)

    def peaks(self) -> _Ints:
        """Slots that can need more than their neighbours, in order."""
        rises = np.zeros(self.slots + 1, bool)
        falls = np.zeros(self.slots + 1, bool)
        rises[[k for k in self._rises if k < self.slots]] = True
        falls[list(self._falls)] = True
        rises[0] = falls[self.slots] = True
        falls |= ~rises  # the same bytes as in the slot before: that one is kept
        result: _Ints = np.flatnonzero(rises[:-1] & falls[1:])
        return result

    def changes(self, slots: _Ints) -> tuple[_Ints, _Ints, _Floats]:
        """What these slots hold more than the one before of them: (position, column, bytes)."""
        first = np.searchsorted(slots, self._begin)
        last = np.searchsorted(slots, self._end)
        seen = first < last
        rows = np.concatenate([first[seen], last[seen]])
        columns = np.tile(np.asarray(self._column, np.int64)[seen], 2)
        size = np.asarray(self._bytes, np.float64)[seen]
        return _merged(rows, columns, np.concatenate([size, -size]), len(slots))

    def held(self, slots: _Ints) -> tuple[_Ints, _Ints, _Floats]:
        """What each of these slots holds: (position, column, bytes)."""
        first = np.searchsorted(slots, self._begin)
        count = np.searchsorted(slots, self._end) - first
        start = np.repeat(first - (np.cumsum(count) - count), count)
        rows = start + np.arange(count.sum())
        columns = np.repeat(np.asarray(self._column, np.int64), count)
        return _merged(rows, columns, np.repeat(np.asarray(self._bytes), count), len(slots))

    def live(self, values: _Floats) -> _Floats:
        """Bytes at every slot, given the value of each column."""
        size = np.asarray(self._bytes) * values[self._column]
        change = np.zeros(self.slots + 1)
        np.add.at(change, self._begin, size)
        np.add.at(change, self._end, -size)
        result: _Floats = np.cumsum(change)[:-1]
        return result


def _merged(
    rows: _Ints, columns: _Ints, values: _Floats, row_count: int
) -> tuple[_Ints, _Ints, _Floats]:
    """Sums per (row, column), without zeros, sorted; rows from ``row_count`` on are left out."""
    inside = rows < row_count
    rows, columns, values = rows[inside], columns[inside], values[inside]
    width = int(columns.max(initial=0)) + 1
    keys, place = np.unique(rows * width + columns, return_inverse=True)
    total = np.zeros(len(keys))
    np.add.at(total, place, values)
    keep = total != 0
    return keys[keep] // width, keys[keep] % width, total[keep]
