"""Page transfers beside the core: what they take, and where each is started and waited for.

Two clocks. The core's runs through the steps; the bus carries one transfer at a time, in the order
of their starts. A start costs the core nothing: its transfer begins at once, or when the one before
has ended. A wait costs what is left of its transfer.

Places are *positions*: ``p`` lies before the p-th step that computes. At a position come first the
waits for page-outs, then the starts, then the waits for page-ins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

#: Rounds of moving one transfer after the other; each ends at a local optimum in practice.
ROUNDS = 8
_Bytes = NDArray[np.int64]


@dataclass(frozen=True)
class Transfer:
    """A page transfer and where it may run.

    Attributes:
        tensor: Index of the tensor.
        out: A page-out, else a page-in.
        cycles: On the bus, in one micro-step.
        bytes: Of the arena that it occupies while it runs.
        home: Position where the tensor is complete (out) or needed (in).
        free: Position up to which a page-out's source lives anyway, or from which on a page-in's
            target has no other stay: its earliest start.
        latest: Latest wait of a page-out: where another stay begins.
    """

    tensor: int
    out: bool
    cycles: int
    bytes: int
    home: int
    free: int
    latest: int


@dataclass(frozen=True)
class Placed:
    """Positions of a transfer's start and wait."""

    start: int
    wait: int


Placement = tuple[Placed, ...]


@dataclass(frozen=True)
class Clocks:
    """What a micro-step takes.

    Attributes:
        cycles: Of the core, waits included.
        waits: Cycles that each transfer is waited for.
    """

    cycles: int
    waits: tuple[int, ...]


def run(compute: Sequence[int], transfers: Sequence[Transfer], places: Placement) -> Clocks:
    """Let both clocks run through a micro-step.

    Args:
        compute: Cycles of each step that computes.
        transfers: The transfers, in the order in which starts at one position come.
        places: Their positions.
    """
    done = [0, *accumulate(compute)]
    return _run(done, transfers, places)


def _run(done: Sequence[int], transfers: Sequence[Transfer], places: Placement) -> Clocks:
    """``done``: cycles of all steps before each position."""
    stalled = free = 0
    finish, waits = [0] * len(transfers), [0] * len(transfers)
    for position, kind, i in sorted(_events(transfers, places)):
        now = done[position] + stalled
        if kind == _START:
            free = finish[i] = max(now, free) + transfers[i].cycles
        else:
            waits[i] = max(0, finish[i] - now)
            stalled += waits[i]
    return Clocks(done[-1] + stalled, tuple(waits))


_WAIT_OUT, _START, _WAIT_IN, _WAIT_AT_ONCE = 0, 1, 2, 3


def _events(transfers: Sequence[Transfer], places: Placement) -> Iterator[tuple[int, int, int]]:
    """(position, rank, transfer) of starts and waits; sorted they are the order of the steps."""
    for i, (t, p) in enumerate(zip(transfers, places, strict=True)):
        yield p.start, _START, i
        if not t.out:
            yield p.wait, _WAIT_IN, i
        else:
            yield p.wait, _WAIT_OUT if p.wait > p.start else _WAIT_AT_ONCE, i


def order(transfers: Sequence[Transfer], places: Placement) -> Iterator[tuple[int, int, bool]]:
    """(position, transfer, it is a start) of all starts and waits, in the order of the steps."""
    for position, kind, i in sorted(_events(transfers, places)):
        yield position, i, kind == _START


def synchronous(transfers: Sequence[Transfer]) -> Placement:
    """Every transfer is waited for where it is started."""
    return tuple(Placed(t.home, t.home) for t in transfers)


class Hiding:
    """Looks for positions at which computing hides as much of the transfers as RAM allows."""

    def __init__(
        self,
        micro_steps: Sequence[tuple[int, Sequence[int]]],
        transfers: Sequence[Transfer],
        live: Sequence[int],
        limit: int,
    ) -> None:
        """State the problem.

        Args:
            micro_steps: (how many, cycles of each step in them): the steps that compute, those
                that are left out of a micro-step with 0 cycles.
            transfers: By home.
            live: Arena bytes that each of these steps needs anyway.
            limit: Arena bytes that no step may exceed by transfers; where it needs more anyway,
                nothing is added.
        """
        self._clocks = [(n, [0, *accumulate(cycles)]) for n, cycles in micro_steps if n]
        self._transfers = transfers
        self._steps = len(live)
        self._spare: _Bytes = np.maximum(limit - np.asarray(live, np.int64), 0)

    def cycles(self, places: Placement) -> int:
        """Cycles of a training step."""
        return sum(n * _run(done, self._transfers, places).cycles for n, done in self._clocks)

    def place(self) -> Placement:
        """Positions of all transfers."""
        best = synchronous(self._transfers)
        for first in (False, True):
            found = self._improved(synchronous(self._transfers), backwards=first)
            if self.cycles(found) < self.cycles(best):
                best = found
        return best

    def _improved(self, places: Placement, *, backwards: bool) -> Placement:
        """Move one transfer after the other to where it hides most, then no further than that."""
        order = list(range(len(places)))
        if backwards:
            order.reverse()
        value = self.cycles(places)
        for _ in range(ROUNDS):
            for i in order:
                places = self._best_of(places, i)
            for i in order:
                places = self._shortest(places, i)
            before, value = value, self.cycles(places)
            if value == before:
                break
        return places

    def _best_of(self, places: Placement, i: int) -> Placement:
        """The best positions of one transfer, the others as they are."""
        t, at = self._transfers[i], places[i]
        low, high = self._range(places, i)
        if t.out:
            return _with(places, i, Placed(at.start, high))
        # Starting earlier helps but for the order on the bus: one place between any two others.
        others = {p.start for p in places} | {p.start + 1 for p in places}
        starts = sorted({low, t.home, *(s for s in others if low <= s <= high)})
        found = [_with(places, i, Placed(s, t.home)) for s in starts]
        return min(found, key=self.cycles)

    def _shortest(self, places: Placement, i: int) -> Placement:
        """One transfer no longer than it takes for the same time."""
        t, at, value = self._transfers[i], places[i], self.cycles(places)

        def same(position: int) -> bool:
            place = Placed(at.start, position) if t.out else Placed(position, at.wait)
            return self.cycles(_with(places, i, place)) <= value

        if t.out:
            wait = _bisect(t.free if t.free <= at.wait else at.wait, at.wait, same)
            return _with(places, i, Placed(at.start, wait))
        start = -_bisect(-t.home, -at.start, lambda x: same(-x))
        return _with(places, i, Placed(start, at.wait))

    def _range(self, places: Placement, i: int) -> tuple[int, int]:
        """Earliest start of a page-in and ``home``; ``home`` and latest wait of a page-out."""
        t = self._transfers[i]
        spare = self._spare.copy()
        for j, (other, p) in enumerate(zip(self._transfers, places, strict=True)):
            if j != i:
                begin, end = _added(other, p)
                spare[begin:end] -= other.bytes
        full = spare < t.bytes
        if t.out:
            starts = [
                p.start
                for u, p in zip(self._transfers, places, strict=True)
                if u.tensor == t.tensor and not u.out
            ]
            latest = min([t.latest, *starts])
            blocked = np.flatnonzero(full[t.free : latest])
            return t.home, t.free + int(blocked[0]) if len(blocked) else latest
        earliest = max(
            [t.free]
            + [
                p.wait
                for u, p in zip(self._transfers, places, strict=True)
                if u.tensor == t.tensor and u.out
            ]
        )
        blocked = np.flatnonzero(full[earliest : t.home])
        return earliest + int(blocked[-1]) + 1 if len(blocked) else earliest, t.home


def _added(t: Transfer, p: Placed) -> tuple[int, int]:
    """Steps that hold the tensor for its transfer only."""
    return (t.free, max(p.wait, t.free)) if t.out else (p.start, t.home)


def _with(places: Placement, i: int, place: Placed) -> Placement:
    return (*places[:i], place, *places[i + 1 :])


def _bisect(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The least position from ``low`` on where it holds; it does at ``high``."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return high
