"""Forward tensors that may be held, made again or loaded while updates are still to be chosen."""

from __future__ import annotations

import numpy as np

from .problem import Problem


class Held:
    """Forward tensors that backward may read, or that those may be made again from, by index.

    Attributes:
        tensors: The tensors.
        at: Their indices.
        auxiliary: Those that are made for backward alone, and the slots of forward that do.
        order: Positions of their last writers.
        made: Last slot of forward that writes or reads it; from there on it is held or not.
        reads: Slots behind that which may read it, with their activities.
        operands: What it is made from.
        in_place: (Operand, result) that may share a buffer unless one of these activities holds.
        taken: Slot -> the first such pair of its: that shares a buffer where it may.
        changes: Slots after which it can't be made again if their updates are chosen.
    """

    def __init__(self, problem: Problem) -> None:
        """Collect the arrays."""
        p, storage = problem, problem.storage
        windows = {t: end for _, end, t in p.fixed}
        windows |= {r.tensor: r.window[1] for r in p.retentions if r.window is not None}
        self.auxiliary = {
            t: s.index
            for s in p.slots
            if p.activities[s.activity].kind == "auxiliary"
            for t in s.writes
        }
        windows |= self.auxiliary
        for r in p.retentions:  # of adapters, made if they are chosen
            early = [e.slot for e in r.events if p.slots[e.slot].node.phase == "forward"]
            early = [k for k in early if not p.slots[k].rebuild]
            if r.tensor not in windows and r.events[-1].slot not in early:
                windows[r.tensor] = early[-1]
        events = {r.tensor: r.events for r in p.retentions}
        self.tensors = [t for t in storage.tensors if t in windows]
        self.at = {t: i for i, t in enumerate(self.tensors)}
        self.made = np.array([windows[t] for t in self.tensors], np.int64)
        position = {node: k for k, node in enumerate(p.training.graph.nodes)}
        self.order = [position[t.writers[-1]] if t.writers else -1 for t in self.tensors]
        self.reads = [
            [(e.slot, e.activity) for e in events.get(t, ()) if not e.writes] for t in self.tensors
        ]
        self.operands = [
            sorted(
                {
                    self.at[u]
                    for w in t.writers
                    for v in w.operands()
                    if (u := storage.of.get(v)) in self.at and u is not t
                }
            )
            for t in self.tensors
        ]
        self.in_place: dict[tuple[int, int], tuple[int, ...]] = {}
        self.taken: dict[int, tuple[int, int]] = {}
        for o in p.overwrites:
            for t in p.slots[o.slot].writes:
                if o.operand in self.at and t in self.at:
                    pair = self.at[o.operand], self.at[t]
                    self.in_place[pair] = o.unless
                    self.taken.setdefault(o.slot, pair)
        changed: dict[str, list[tuple[int, int]]] = {}
        for s in p.slots:
            if s.update is not None and s.node is s.update.apply_node:
                changed.setdefault(s.update.candidate.param, []).append((s.index, s.activity))
        self.changes = [
            [c for w in t.writers for v in w.operands() for c in changed.get(v.name, ())]
            for t in self.tensors
        ]

    def used(self) -> list[int]:
        """What may be read, and what that is made from."""
        found = {i for i, reads in enumerate(self.reads) if reads}
        stack = list(found)
        while stack:
            i = stack.pop()
            if self.tensors[i].rebuildable:
                more = set(self.operands[i]) - found
                found |= more
                stack += more
        return sorted(found)
