"""What computing hides of page transfers, in the joint model (docs/design.md, Transfers).

For a transfer j of d cycles and a slot k, y(j,k) is the part of it that runs while k computes:

    sum_j y(j,k) <= t(k) A(k);   sum_k y(j,k) <= d P(j);   y(j,k) = 0 unless its buffer is live

and all y come off the latency. A buffer that lives for a transfer only takes RAM: D(j,k) = 1. That
parts of transfers may alternate within a slot makes it a relaxation, so the bound holds for every
order of transfers; what a schedule takes comes from its clocks (``planner.transfers``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING

from .problem import Retention

if TYPE_CHECKING:
    from .milp import Milp

#: A transfer has columns for each slot near to it, until these compute so many times as long as it
#: takes, at most for so many slots; what is further away is one column without a row per slot.
REACH, NEAR = 2, 24
#: Such slots of all transfers together, but for two of each: larger programs take too long.
MANY = 1200
#: Hidden cycles count in units, so that no column exceeds this: solvers count in whole units.
LARGEST = 1_000_000


@dataclass(frozen=True)
class _Part:
    """A range of slots in which a transfer may run.

    Attributes:
        slot: The slot; None: all that are further away.
        needs: Columns of which one must be 1; empty: its buffer is live anyway.
    """

    slot: int | None
    needs: tuple[int, ...]


@dataclass
class Overlap:
    """Columns and rows of all transfers of a program.

    Attributes:
        terms: What hiding takes off the cycles.
    """

    program: Milp
    terms: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Add columns for all transfers; to be called before the rows of memory are made."""
        milp = self.program
        self._by_slot: dict[int | None, list[int]] = {}
        self._sure = [
            s.cycles
            if milp.a[s.activity] == milp.one and s.mixed is None and s.index not in milp.block_of
            else 0
            for s in milp.problem.slots
        ]
        paged = [(i, r) for i, r in enumerate(milp.problem.retentions) if milp.loaded[i]]
        transfers = sum(1 + len(milp.loaded[i]) for i, _ in paged)
        self._most_near = min(NEAR, max(2, MANY // max(1, transfers)))
        states = milp.problem.paged_states
        of_states = [s.cycles for s in states]
        longest = max(
            [*of_states, *(max(self._out_cycles(r), self._in_cycles(r)) for _, r in paged)],
            default=0,
        )
        self._unit = max(1, ceil(longest / LARGEST))
        for i, r in paged:
            stored = milp.stored[i]
            assert stored is not None
            self._transfer(stored, self._out_cycles(r), list(self._out(i, r)))
            for j, load in milp.loaded[i].items():
                self._transfer(load, self._in_cycles(r), list(self._in(i, r, j)))
        for s in states:  # by anything, whatever that takes of RAM: a bound, no more
            self._transfer(milp.a[s.activity], s.cycles, [_Part(None, ())])
        self._one_at_a_time()

    def _out_cycles(self, r: Retention) -> int:
        """Cycles of a training step that a page-out is under way."""
        p = self.program.problem
        return p.micro_batches * p.cost.write_cycles(r.tensor.bytes)

    def _in_cycles(self, r: Retention) -> int:
        p = self.program.problem
        return p.micro_batches * p.cost.read_cycles(r.tensor.bytes)

    # -- where a transfer may run -----------------------------------------------------------------

    def _out(self, i: int, r: Retention) -> Iterator[_Part]:
        """From where the tensor is complete to its first page-in."""
        milp, size = self.program, r.tensor.bytes
        if r.window is None:
            k = next(e.begin for e in r.events if e.writes) + 1
        else:
            first, last = r.window
            for slot in range(first + bool(r.tensor.writers), last + 1):
                yield _Part(slot, ())
            k = last + 1
        last = r.events[max(milp.loaded[i])].slot
        near = self._near(range(k, last), self._out_cycles(r))
        stored, event = milp.stored[i], 0
        assert stored is not None
        before: tuple[int, ...] = (stored,)
        for slot in near:
            while event < len(r.events) - 1 and r.events[event].slot < slot:
                event += 1
            # Where the tensor is held anyway, it takes its bytes once.
            before = (self._buffer(slot, size, *before), milp.held[i][event])
            yield _Part(slot, before)
        if len(near) < last - k:
            yield _Part(None, tuple(dict.fromkeys((*before, *milp.held[i]))))

    def _in(self, i: int, r: Retention, j: int) -> Iterator[_Part]:
        """From where the tensor is dropped to the event that needs it."""
        milp, size, end = self.program, r.tensor.bytes, r.events[j].slot
        begin = r.events[0].begin if r.window is None else r.window[1] + 1
        previous = milp.loaded[i][j]
        near = self._near(range(end - 1, begin - 1, -1), self._in_cycles(r))
        for slot in near:
            previous = self._buffer(slot, size, previous)
            yield _Part(slot, (previous,))
        if len(near) < end - begin:
            yield _Part(None, (previous,))

    def _near(self, slots: range, cycles: int) -> Sequence[int]:
        """The first of these slots, as far as columns of their own are worth it."""
        total = 0
        for n, slot in enumerate(slots):
            if n == self._most_near or total >= REACH * cycles:
                return slots[:n]
            total += self._sure[slot]
        return slots

    def _buffer(self, slot: int, size: int, *neighbour: int) -> int:
        """D: the buffer is live in a slot for its transfer only; if so, then in the one beside."""
        milp = self.program
        column = milp.c.column(integer=True)
        milp.c.row([*((c, 1.0) for c in neighbour), (column, -1.0)], lower=0.0)
        milp.occupancy.add(slot, slot, column, size)
        return column

    # -- rows -------------------------------------------------------------------------------------

    def _transfer(self, takes_place: int, cycles: int, parts: Sequence[_Part]) -> None:
        milp, whole, hidden = self.program, self._units(cycles), []
        for part in parts:
            most = whole
            if part.slot is not None:
                capacity = sum(max(0, a) for _, a in self._capacity(part.slot))
                most = min(whole, capacity)
            if most == 0:
                continue
            y = milp.c.column(integer=False, upper=float(most))
            hidden.append(y)
            self._by_slot.setdefault(part.slot, []).append(y)
            if part.needs:
                milp.c.row([*((c, float(most)) for c in part.needs), (y, -1.0)], lower=0.0)
        milp.c.row([(takes_place, float(whole)), *((y, -1.0) for y in hidden)], lower=0.0)
        self.terms += [(y, -float(self._unit)) for y in hidden]

    def _one_at_a_time(self) -> None:
        """Transfers during a slot take no longer than it, and all of them no longer than all."""
        milp = self.program
        for slot, hidden in self._by_slot.items():
            if slot is not None:
                terms = [(c, float(a)) for c, a in self._capacity(slot)]
                milp.c.row([*terms, *((y, -1.0) for y in hidden)], lower=0.0)
        every = [y for hidden in self._by_slot.values() for y in hidden]
        terms = [(c, float(a)) for s in milp.problem.slots for c, a in self._capacity(s.index)]
        milp.c.row([*terms, *((y, -1.0) for y in every)], lower=0.0)

    def _capacity(self, slot: int) -> list[tuple[int, int]]:
        """Units that a slot computes; rounded up, term by term."""
        return [(c, self._units(a)) for c, a in self.program.slot_cycles(slot)]

    def _units(self, cycles: float) -> int:
        return ceil(cycles / self._unit)
