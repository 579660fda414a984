"""Decisions about a problem, free of any solver: active slots and page-ins."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.training import Candidate
from .problem import ALWAYS, Problem, Slot


@dataclass(frozen=True)
class Solution:
    """What is decided; residency and lifetimes follow from it.

    Attributes:
        active: Indices of the activities that hold.
        loads: (tensor index, slot index) of page-ins right before a slot. A tensor with a load is
            paged out once, right after it is first complete.
    """

    active: frozenset[int]
    loads: frozenset[tuple[int, int]] = frozenset()

    def runs(self, slot: Slot) -> bool:
        """The slot is active."""
        return slot.activity == ALWAYS or slot.activity in self.active

    def read_loads(self, problem: Problem) -> frozenset[tuple[int, int]]:
        """Page-ins that are read; decisions that were cut short may hold others."""
        needed: set[tuple[int, int]] = set()
        unread: dict[int, tuple[int, int]] = {}
        loads = sorted(self.loads, key=lambda load: load[1])
        for slot in problem.slots if loads else ():
            while loads and loads[0][1] <= slot.index:
                load = loads.pop(0)
                unread[load[0]] = load
            if self.runs(slot):
                needed |= {unread.pop(t.index) for t in slot.reads if t.index in unread}
                for t in slot.writes:
                    unread.pop(t.index, None)
        return frozenset(needed)

    def candidates(self, problem: Problem) -> list[Candidate]:
        """The chosen update of each parameter, in graph order."""
        return [
            u.candidate
            for u in problem.training.updates
            for a in problem.activities
            if u in a.updates and a.index in self.active
        ]

    def gain(self, problem: Problem) -> int:
        """Summed importance."""
        return sum(g for a, g in problem.gain.items() if a in self.active or a == ALWAYS)
