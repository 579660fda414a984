"""A fast plan: evict the result that is cheapest to have back per byte and stage of idleness.

The rule of DTR (arXiv 2006.09616), offline: the next use is known.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from .cells import needed
from .instance import Instance, Kind, Step, trace

#: A use that never comes.
NEVER = 1 << 40


@dataclass(frozen=True)
class Rule:
    """How to score a candidate for eviction: cost of having it back / (bytes^b * idle^i).

    Attributes:
        bytes_power: Exponent of its bytes.
        idle_power: Exponent of the stages until its next use.
        chain: Count what has to be computed again for it, too.
        noise: Scores are multiplied by a random factor in [1, 1 + noise].
    """

    bytes_power: float = 1.0
    idle_power: float = 1.0
    chain: bool = True
    noise: float = 0.0


#: Rules of which at least one came close to the best of a grid of 40 on each graph of others.
RULES = (
    Rule(0.5, 0.25),
    Rule(0.0, 0.5),
    Rule(1.5, 0.25),
    Rule(0.5, 0.0),
    Rule(1.0, 0.25, chain=False),
    Rule(0.0, 1.0),
    Rule(0.5, 0.25, chain=False),
    Rule(0.0, 0.0, chain=False),
    Rule(1.0, 0.0, chain=False),
    Rule(0.5, 1.0, chain=False),
)


def greedy(instance: Instance, rule: Rule, seed: int = 0) -> list[Step] | None:
    """A plan within the budget, or None where the rule leads to a dead end."""
    return _Run(instance, rule, random.Random(seed)).run()


@dataclass
class _Run:
    instance: Instance
    rule: Rule
    rng: random.Random
    resident: set[int] = field(default_factory=set)
    stored: set[int] = field(default_factory=set)
    steps: list[Step] = field(default_factory=list)
    used: int = 0

    def run(self) -> list[Step] | None:
        x = self.instance
        self.cost = x.cost.tolist()
        self.size = x.size_bytes.tolist()
        self.scratch = x.scratch_bytes.tolist()
        self.last_stage = x.last_stage.tolist()
        self.keep, self.lazy = x.keep.tolist(), x.lazy.tolist()
        self.latest = [max(users, default=-1) for users in x.users]
        self.page_in = x.page_in_cost.tolist() if x.page_in_cost is not None else None
        self.page_out = x.page_out_cost.tolist() if x.page_out_cost is not None else None
        for stage in range(x.nodes):
            if not self.lazy[stage] and not self._stage(stage, [stage]):
                return None
        kept = [v for v in range(x.nodes) if self.keep[v] and v not in self.resident]
        if kept and not self._stage(x.nodes - 1, kept):
            return None
        return self.steps

    def _stage(self, stage: int, targets: list[int]) -> bool:
        x = self.instance
        plan = self._missing(stage, targets)
        if plan is None:
            return False
        room = x.budget_bytes - int(x.load_bytes[stage])
        until: dict[int, int] = {}
        for i, (kind, v) in enumerate(plan):
            if kind == "compute":
                for p in x.preds[v]:
                    until[p] = i
        for v in targets:
            until[v] = len(plan)
        for i, (kind, v) in enumerate(plan):
            extra = self.size[v] + (self.scratch[v] if kind == "compute" else 0)
            if self.used + extra > room:
                locked = {p for p, end in until.items() if end >= i}
                if not self._evict(stage, self.used + extra - room, locked):
                    return False
            self.steps.append(Step(stage, kind, v))
            self.resident.add(v)
            self.used += self.size[v]
        self._drop_dead(stage)
        return True

    def _missing(self, stage: int, targets: list[int]) -> list[tuple[Kind, int]] | None:
        """What has to be computed or loaded, in node order."""
        found: dict[int, Kind] = {}
        stack = list(targets)
        while stack:
            v = stack.pop()
            if v in found or v in self.resident:
                continue
            if v in self.stored:
                found[v] = "load"
                continue
            if stage > self.last_stage[v] and v != stage:
                return None
            found[v] = "compute"
            stack += self.instance.preds[v]
        return [(found[v], v) for v in sorted(found)]

    def _evict(self, stage: int, excess: int, locked: set[int]) -> bool:
        next_use = self._next_uses(stage)
        candidates = [v for v in self.resident if v not in locked]
        scored = []
        for v in candidates:
            price = self._price(stage, v, next_use[v])
            if price is None:
                continue
            idle = max(next_use[v] - stage, 1)
            score = price[0] / (self.size[v] ** self.rule.bytes_power or 1.0)
            score /= idle**self.rule.idle_power
            if self.rule.noise:
                score *= 1 + self.rng.random() * self.rule.noise
            if self.size[v]:
                scored.append((score, v, price[1]))
        scored.sort()
        out = []
        for entry in scored:
            if excess <= 0:
                break
            out.append(entry)
            excess -= self.size[entry[1]]
        if excess > 0:
            return False
        for entry in sorted(out, key=lambda e: -self.size[e[1]]):  # undo what was not needed
            _, v, page = entry
            if excess + self.size[v] <= 0 and next_use[v] < NEVER:
                excess += self.size[v]
                continue
            self.resident.discard(v)
            self.used -= self.size[v]
            if page:
                self.stored.add(v)
        return True

    def _price(self, stage: int, v: int, next_use: int) -> tuple[float, bool] | None:
        """Cost of having ``v`` back at its next use and whether by storage; None: impossible."""
        if next_use >= NEVER:
            return 0.0, False
        best: tuple[float, bool] | None = None
        if next_use <= self.last_stage[v]:
            cost = float(self.cost[v])
            if self.rule.chain:
                stack, seen = list(self.instance.preds[v]), {v}
                while stack:
                    p = stack.pop()
                    if p in seen or p in self.resident:
                        continue
                    seen.add(p)
                    if p in self.stored and self.page_in is not None:
                        cost += self.page_in[p]
                        continue
                    cost += self.cost[p]
                    stack += self.instance.preds[p]
            best = cost, False
        if self.page_in is not None and self.page_out is not None:
            paged = float(self.page_in[v]) + (0 if v in self.stored else self.page_out[v])
            if best is None or paged < best[0]:
                best = paged, True
        return best

    def _next_uses(self, stage: int) -> list[int]:
        """Stage of each node's next use; an evicted node passes on its own."""
        x = self.instance
        result = [NEVER] * x.nodes
        for v in range(x.nodes - 1, -1, -1):
            best = x.nodes if self.keep[v] else NEVER
            for u in x.users[v]:
                if u > stage and not self.lazy[u]:
                    best = min(best, u)
                elif (u not in self.resident and u not in self.stored) and result[u] < best:
                    best = result[u]
            result[v] = best
        return result

    def _drop_dead(self, stage: int) -> None:
        dead = [
            v
            for v in self.resident
            if self.latest[v] <= stage
            and not self.keep[v]
            and all(map(self._useless, self.instance.users[v]))
        ]
        for v in dead:
            self.resident.discard(v)
            self.used -= self.size[v]

    def _useless(self, u: int) -> bool:
        """An earlier reader that will not be computed again."""
        return u in self.resident or u in self.stored or not self.instance.users[u]


def polish(instance: Instance, steps: Sequence[Step]) -> list[Step]:
    """Drop steps that nobody needs or that holding the copy before them makes superfluous."""
    best = needed(instance, steps)
    while True:
        shorter = _hold(instance, best)
        if shorter is None:
            return best
        best = needed(instance, shorter)


def _hold(instance: Instance, steps: list[Step]) -> list[Step] | None:
    """Without one repetition, the dearest whose earlier copy can be held; None: there is none."""
    now = trace(instance, steps)
    room = instance.budget_bytes - now.live_bytes
    previous: dict[int, int] = {}
    found: list[tuple[int, int]] = []
    for i, s in enumerate(steps):
        before = previous.get(s.node)
        if before is not None:
            begin = now.last_use[before] + 1
            if begin >= i or room[begin:i].min() >= instance.size_bytes[s.node]:
                value = instance.cost if s.kind == "compute" else instance.page_in_cost
                assert value is not None
                found.append((-int(value[s.node]), i))
        previous[s.node] = i
    if not found:
        return None
    i = min(found)[1]
    return [*steps[:i], *steps[i + 1 :]]
