"""Page transfers beside the core: what they take, and where each is started and waited for.

Two clocks. The core's runs through the steps; the bus carries one transfer at a time, in the order
of their starts. A start costs the core nothing: its transfer begins at once, or when the one before
has ended. A wait costs what is left of its transfer.

Places are *positions*: ``p`` lies before the p-th step that computes. At a position come first the
waits for page-outs, then the starts of page-outs (and their waits, if they are waited for at once),
then the starts of page-ins, then the waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations

import numpy as np
from numpy.typing import NDArray

#: Rounds of moving transfers; fewer are enough in practice.
ROUNDS = 8
#: Up to so many transfers, any two of them are moved at once, else those of one tensor.
FEW = 6
#: A range of at most so many positions is tried out.
DENSE = 16
#: Work of a search, in transfers that clocks meet: a second or two.
WORK = 1_000_000
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
        last_micro: It takes place in the last micro-step only.
    """

    tensor: int
    out: bool
    cycles: int
    bytes: int
    home: int
    free: int
    latest: int
    last_micro: bool = False


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


def run(
    compute: Sequence[int],
    transfers: Sequence[Transfer],
    places: Placement,
    *,
    last: bool = True,
) -> Clocks:
    """Let both clocks run through a micro-step.

    Args:
        compute: Cycles of each step that computes.
        transfers: The transfers, in the order in which starts at one position come.
        places: Their positions.
        last: It is the last micro-step.
    """
    done = [0, *accumulate(compute)]
    return _run(done, transfers, places, last=last)


def _run(
    done: Sequence[int], transfers: Sequence[Transfer], places: Placement, *, last: bool
) -> Clocks:
    """``done``: cycles of all steps before each position."""
    stalled = free = 0
    finish, waits = [0] * len(transfers), [0] * len(transfers)
    for position, kind, i in sorted(_events(transfers, places)):
        if transfers[i].last_micro and not last:
            continue
        now = done[position] + stalled
        if kind in (_START_OUT, _START_IN):
            free = finish[i] = max(now, free) + transfers[i].cycles
        else:
            waits[i] = max(0, finish[i] - now)
            stalled += waits[i]
    return Clocks(done[-1] + stalled, tuple(waits))


_WAIT_OUT, _START_OUT, _WAIT_AT_ONCE, _START_IN, _WAIT_IN = range(5)


def _events(transfers: Sequence[Transfer], places: Placement) -> Iterator[tuple[int, int, int]]:
    """(position, rank, transfer) of starts and waits; sorted they are the order of the steps."""
    for i, (t, p) in enumerate(zip(transfers, places, strict=True)):
        yield p.start, _START_OUT if t.out else _START_IN, i
        if not t.out:
            yield p.wait, _WAIT_IN, i
        else:
            yield p.wait, _WAIT_OUT if p.wait > p.start else _WAIT_AT_ONCE, i


def order(transfers: Sequence[Transfer], places: Placement) -> Iterator[tuple[int, int, bool]]:
    """(position, transfer, it is a start) of all starts and waits, in the order of the steps."""
    for position, kind, i in sorted(_events(transfers, places)):
        yield position, i, kind in (_START_OUT, _START_IN)


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
                that are left out of a micro-step with 0 cycles. The last micro-step comes first.
            transfers: By home.
            live: Arena bytes that each of these steps needs anyway.
            limit: Arena bytes that no step may exceed by transfers; where it needs more anyway,
                nothing is added.
        """
        self._clocks = [
            (n, [0, *accumulate(cycles)], i == 0) for i, (n, cycles) in enumerate(micro_steps) if n
        ]
        self._transfers = transfers
        self._least = sum(n * done[-1] for n, done, _ in self._clocks)
        self._tries = WORK // max(1, len(transfers))
        self._spare: _Bytes = np.maximum(limit - np.asarray(live, np.int64), 0)

    def cycles(self, places: Placement) -> int:
        """Cycles of a training step."""
        self._tries -= 1
        return sum(n * found.cycles for n, found in self._runs(places))

    def _runs(self, places: Placement) -> Iterator[tuple[int, Clocks]]:
        """How often there is which micro-step, and what it takes."""
        for n, done, last in self._clocks:
            yield n, _run(done, self._transfers, places, last=last)

    def _waited(self, places: Placement) -> list[int]:
        """Cycles of a training step that each transfer is waited for."""
        runs = list(self._runs(places))
        return [sum(n * found.waits[i] for n, found in runs) for i in range(len(places))]

    def place(self) -> Placement:
        """Positions of all transfers: a local optimum of moving one of them, or two at once."""
        best = places = synchronous(self._transfers)
        n = len(places)
        pairs = [
            (i, j)
            for i, j in combinations(range(n), 2)
            if n <= FEW or self._transfers[i].tensor == self._transfers[j].tensor
        ]
        for order in (range(n), range(n - 1, -1, -1)):
            found = self._improved(places, order, pairs)
            if self.cycles(found) < self.cycles(best):
                best = found
            if self.cycles(best) == self._least:
                break
        return best

    def _improved(
        self, places: Placement, order: Sequence[int], pairs: Sequence[tuple[int, int]]
    ) -> Placement:
        """Move transfers to where they hide most, then leave them no longer than that takes."""
        value = self.cycles(places)
        for _ in range(ROUNDS):
            before = value
            for i in order:
                if self._waited(places)[i]:
                    places = self._best(places, i)
            for i in order:
                places = self._shortest(places, i)
            value = self.cycles(places)
            if value == before:
                for i, j in pairs:
                    waited = self._waited(places)
                    if waited[i] or waited[j]:
                        places = self._best(places, i, j)
                value = self.cycles(places)
            if value in (before, self._least) or self._tries <= 0:
                break
        return places

    def _best(self, places: Placement, i: int, *others: int) -> Placement:
        """The best positions of some transfers, the rest as they are."""
        best, value = places, self.cycles(places)
        home = self._transfers[i].home
        for place in self._candidates(_with(places, i, Placed(home, home)), i):
            found = _with(places, i, place)
            for j in others:
                if not self._fits(found):
                    t = self._transfers[j]
                    found = _with(found, j, Placed(t.home, t.home))
                found = self._best(found, j)
            takes = self.cycles(found)
            if takes < value and self._fits(found):
                best, value = found, takes
            if value == self._least or self._tries <= 0:
                break
        return best

    def _fits(self, places: Placement) -> bool:
        """RAM is enough, and a tensor is read back only after it has been written."""
        spare = self._spare.copy()
        written: dict[int, int] = {}
        for t, p in zip(self._transfers, places, strict=True):
            begin, end = _added(t, p)
            spare[begin:end] -= t.bytes
            if t.out:
                written[t.tensor] = p.wait
            elif p.start < written.get(t.tensor, 0):  # state is there from the step before
                return False
        return bool((spare >= 0).all())

    def _candidates(self, places: Placement, i: int) -> list[Placed]:
        """Positions of one transfer that are worth a try."""
        t = self._transfers[i]
        low, high = self._range(places, i)
        tried: Sequence[int] = range(low, high + 1)
        if len(tried) > DENSE:
            near = {q + d for p in places for q in (p.start, p.wait) for d in (0, 1)}
            even = range(low, high + 1, -(-len(tried) // DENSE))
            tried = sorted({low, high, *even, *(q for q in near if low <= q <= high)})
        return [Placed(t.home, q) if t.out else Placed(q, t.home) for q in tried]

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
                if u.tensor == t.tensor and not u.out and u.home >= t.home
            ]
            latest = min([t.latest, *starts])
            blocked = np.flatnonzero(full[t.free : latest])
            return t.home, t.free + int(blocked[0]) if len(blocked) else latest
        earliest = max(
            [t.free]
            + [
                p.wait
                for u, p in zip(self._transfers, places, strict=True)
                if u.tensor == t.tensor and u.out and u.home <= t.home
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
