"""Flash in the joint model: kernels and weights count once if anything uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .plan import CODE_BYTES_PER_KERNEL, CODE_BYTES_PER_STEP
from .problem import ALWAYS

if TYPE_CHECKING:
    from .milp import Milp


@dataclass
class _Uses:
    """What reads or calls something.

    Attributes:
        plain: Activities that do if they hold.
        unless: (activity, columns): only where the columns are 0.
        mixed: (activity, choice of a layer): only where both hold.
        columns: Columns that do if they are 1.
    """

    plain: set[int] = field(default_factory=set)
    unless: set[tuple[int, tuple[int, ...]]] = field(default_factory=set)
    mixed: set[tuple[int, int]] = field(default_factory=set)
    columns: list[int] = field(default_factory=list)

    def add(self, activity: int, absent: Sequence[int] = ()) -> None:
        if absent:
            self.unless.add((activity, tuple(absent)))
        else:
            self.plain.add(activity)


def flash_terms(milp: Milp) -> list[tuple[int, float]]:
    """Bytes per column of a program: weights, and code of the kernels and steps that are used.

    Adds columns and rows for what several activities use.
    """
    p = milp.problem
    terms: list[tuple[int, float]] = []
    kernels: dict[str, _Uses] = {}
    for s in p.slots:
        steps = CODE_BYTES_PER_STEP * (1 + len(p.storage.followers.get(s.node, ())))
        terms += milp.of_slot(s, steps, None)
        streamed = [milp.block_of[s.index]] if s.index in milp.block_of else []
        for symbol in s.kernels:
            absent = list(streamed)
            if s.mixed is not None and symbol not in s.mixed.kernels:
                absent.append(milp.a[s.mixed.choice])
            kernels.setdefault(symbol, _Uses()).add(s.activity, absent)
        for symbol in () if s.mixed is None else s.mixed.kernels:
            assert s.mixed is not None
            kernels.setdefault(symbol, _Uses()).mixed.add((s.activity, s.mixed.choice))
    for late, s in milp.late:  # in a slot of its own, wherever
        terms.append((late, CODE_BYTES_PER_STEP))
        for symbol in s.kernels if s.mixed is None else ():
            kernels[symbol].columns.append(late)
    for b in p.streams:
        terms.append((milp.a[b.activity], CODE_BYTES_PER_STEP))
        for symbol in b.kernels:
            kernels.setdefault(symbol, _Uses()).add(b.activity)
    terms += [(_any(milp, uses), CODE_BYTES_PER_KERNEL) for uses in kernels.values()]
    for c in p.constants:
        uses = _Uses()
        for a in c.readers:
            uses.add(a, () if c.absent is None else (milp.a[c.absent],))
        terms.append((_any(milp, uses), float(c.bytes)))
    terms += [(milp.a[m.activity], float(m.flash_bytes)) for m in p.mixed_layers]
    terms += [(milp.a[a], float(b)) for a, b in p.flash_bytes.items()]
    terms += [
        (milp.both(u.activity, u.choice), float(u.flash_bytes))
        for u in p.mixed_updates
        if u.flash_bytes
    ]
    for stored, loads, r in zip(milp.stored, milp.loaded, p.retentions, strict=True):
        moves = p.cost.steps_per_transfer
        views = p.storage.followers.get(r.tensor.source, ())  # a load shows them again
        steps = moves + len(views)
        terms += [(v, CODE_BYTES_PER_STEP * steps) for v in loads.values()]
        if stored is not None:
            terms.append((stored, CODE_BYTES_PER_STEP * moves))
    terms += [(milp.a[s.activity], float(CODE_BYTES_PER_STEP * s.steps)) for s in p.paged_states]
    views = [v for x in p.training.samples for v in p.storage.followers.get(x, ())]
    fixed = CODE_BYTES_PER_STEP * len(views)
    return [*terms, (milp.one, float(fixed))]


def _any(milp: Milp, uses: _Uses) -> int:
    """1 where one of the uses takes place."""
    plain = uses.plain | {choice for a, choice in uses.mixed if a == ALWAYS}
    if ALWAYS in plain:
        return milp.one
    known = sum(1 << a for a in plain)
    # What is left, summed up over the candidates of a parameter, of which one is chosen.
    groups: dict[tuple[str | int, tuple[int, ...]], list[int]] = {}
    for a, absent in sorted(uses.unless):
        if not milp.implied[a] & known:
            groups.setdefault((milp.parameter.get(a, a), absent), []).append(milp.a[a])
    for a, choice in sorted(uses.mixed):
        if a != ALWAYS and not (milp.implied[a] | 1 << choice) & known:
            key = (milp.parameter.get(a, a), (-choice,))
            groups.setdefault(key, []).append(milp.both(a, choice))
    weakest = milp.weakest(sorted(plain))
    if len(weakest) == 1 and not (groups or uses.columns):
        return milp.a[weakest[0]]
    result = milp.c.column(integer=False)
    milp.at_least(result, weakest)
    for column in uses.columns:
        milp.c.row([(result, 1.0), (column, -1.0)], lower=0.0)
    for (_, absent), columns in groups.items():
        terms = [(result, 1.0), *((c, -1.0) for c in columns)]
        milp.c.row([*terms, *((c, 1.0) for c in absent if c >= 0)], lower=0.0)
    return result
