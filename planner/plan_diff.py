"""What differs between two plans: settings, figures, and decisions by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .plan import Plan, UpdateDecision

Unit = Literal["B", "s", "J", "cycles", "steps", ""]
Subject = Literal["update", "precision", "saved", "streamed"]
#: What a plan was made by; figures and decisions are compared on their own.
_SETTINGS = {"odt_plan_version", "model", "training", "device", "status", "asked", "solver"}
#: Parts of these that are measured, or that take time.
_LEFT_OUT = {
    *("asked.noise", "asked.importance", "model.channels", "solver.time_s", "solver.stopped"),
}


@dataclass(frozen=True)
class Setting:
    """A field of what the plans were made by; None: it is not given."""

    field: str
    before: object
    after: object


@dataclass(frozen=True)
class Figure:
    """A figure of both plans.

    Attributes:
        name: Of the figure.
        unit: Its unit; empty: a score or a count.
        before: In the first plan; None: it has none.
        after: In the second.
    """

    name: str
    unit: Unit
    before: float | None
    after: float | None

    @property
    def differs(self) -> bool:
        """Not the same in both."""
        return self.before != self.after

    @property
    def change(self) -> float | None:
        """``after - before``, where both have it."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def relative(self) -> float | None:
        """The change as a part of ``before``, where that is not 0."""
        return self.change / self.before if self.change is not None and self.before else None


@dataclass(frozen=True)
class Decision:
    """A decision that differs; None: the plan has nothing of that name."""

    subject: Subject
    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class PlanDiff:
    """All differences.

    Attributes:
        same_model: Both plans are of the same file, imported the same way.
        settings: Those that differ.
        figures: All figures that one of them has.
        decisions: Those that differ.
        peaks: Where the most bytes are live, in each.
        steps: Number of steps of each.
        order: How many nodes that both have run at another place among them.
        addresses: How many buffers that both have lie elsewhere.
    """

    same_model: bool
    settings: tuple[Setting, ...]
    figures: tuple[Figure, ...]
    decisions: tuple[Decision, ...]
    peaks: tuple[str, str]
    steps: tuple[int, int]
    order: int
    addresses: int

    @property
    def same(self) -> bool:
        """The plans differ in nothing but the time that they took."""
        changed = self.settings or self.decisions or any(f.differs for f in self.figures)
        return not (changed or self.order or self.addresses or self.steps[0] != self.steps[1])


def compare_plans(a: Plan, b: Plan) -> PlanDiff:
    """What is different in ``b``."""
    return PlanDiff(
        same_model=(a.model.sha256, a.model.importing) == (b.model.sha256, b.model.importing),
        settings=tuple(_settings(a, b)),
        figures=tuple(_figures(a, b)),
        decisions=tuple(d for s in _DECIDED for d in _decisions(s, _DECIDED[s](a), _DECIDED[s](b))),
        peaks=(_peak(a), _peak(b)),
        steps=(len(a.steps), len(b.steps)),
        order=_moved(a, b),
        addresses=_elsewhere(a, b),
    )


def update_words(u: UpdateDecision) -> str:
    """``50.0% (8 channels), input kept as i8, state paged``, or ``frozen``."""
    if not u.ratio:
        return "frozen"
    channels = f" ({u.channels} channels)" if u.channels else ""
    kept = f", input kept as {u.saved}" if u.saved != "f32" else ""
    state = {"keep": "", "paged": ", state paged", "sgd": ", plain SGD"}[u.state]
    return f"{u.ratio:.1%}{channels}{kept}{state}"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        field = prefix + name
        if field in _LEFT_OUT:
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{field}.")
        else:
            yield field, value


def _settings(a: Plan, b: Plan) -> Iterator[Setting]:
    before, after = (dict(_leaves(p.model_dump(mode="json", include=_SETTINGS))) for p in (a, b))
    before["importance"] = a.decisions.importance_source
    after["importance"] = b.decisions.importance_source
    if a.model.channels != b.model.channels:
        before["order of channels"], after["order of channels"] = map(_order_words, (a, b))
    for field in {**before, **after}:
        if before.get(field) != after.get(field):
            yield Setting(field, before.get(field), after.get(field))


def _order_words(plan: Plan) -> str:
    axes = len(plan.model.channels)
    return f"by score on {axes} ax{'i' if axes == 1 else 'e'}s" if axes else "as in the file"


def _figures(a: Plan, b: Plan) -> Iterator[Figure]:
    before, after = _figures_of(a), _figures_of(b)
    for name, unit in {**before, **after}:
        yield Figure(name, unit, before.get((name, unit)), after.get((name, unit)))


def _figures_of(plan: Plan) -> dict[tuple[str, Unit], float | None]:
    c, updates = plan.claims, plan.decisions.updates
    found: dict[tuple[str, Unit], float | None] = {
        ("RAM", "B"): c.ram_bytes.total,
        ("RAM: arena", "B"): c.ram_bytes.arena,
        ("RAM: weights", "B"): c.ram_bytes.weights,
        ("RAM: optimizer", "B"): c.ram_bytes.optimizer,
        ("RAM: accumulators", "B"): c.ram_bytes.accumulators,
        ("RAM: replay", "B"): plan.replay_bytes("ram"),
        ("RAM: live peak", "B"): c.ram_bytes.live_peak,
    }
    for r in plan.regions:
        found[f"RAM: in {r.name}", "B"] = r.arena + r.state
    found |= {
        ("flash", "B"): c.flash_bytes.total,
        ("flash: weights", "B"): c.flash_bytes.weights,
        ("flash: code (estimated)", "B"): c.flash_bytes.code,
        ("storage", "B"): c.storage_bytes + plan.replay_bytes("storage"),
        ("life of the storage", "steps"): c.life_steps,
        ("latency", "s"): c.latency_s,
        ("energy", "J"): c.energy_j,
        ("cycles", "cycles"): c.cycles,
        ("importance", ""): sum(u.importance for u in updates),
        ("trained tensors", ""): sum(u.ratio > 0 for u in updates),
        ("noise avoided", ""): plan.decisions.noise_avoided,
    }
    if plan.replay is not None:
        found["latency with replay", "s"] = plan.replay.latency_s
    return found


def _updates(plan: Plan) -> dict[str, str]:
    return {u.param: update_words(u) for u in plan.decisions.updates}


def _saved(plan: Plan) -> dict[str, str]:
    return {d.value: d.action for d in plan.decisions.activations}


def _precisions(plan: Plan) -> dict[str, str]:
    return dict(plan.decisions.precision)


def _streamed(plan: Plan) -> dict[str, str]:
    return dict.fromkeys(plan.decisions.streamed, "row by row")


_DECIDED: dict[Subject, Callable[[Plan], dict[str, str]]] = {
    "update": _updates,
    "precision": _precisions,
    "saved": _saved,
    "streamed": _streamed,
}


def _decisions(
    subject: Subject, before: Mapping[str, str], after: Mapping[str, str]
) -> Iterator[Decision]:
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            yield Decision(subject, name, before.get(name), after.get(name))


def _peak(plan: Plan) -> str:
    ram = plan.claims.ram_bytes
    step = plan.steps[ram.peak_step]
    label = step.nodes[0] if step.nodes else next(filter(None, step.reads), "")
    return f"step {ram.peak_step} of {len(plan.steps)}: {step.kind} {label}".rstrip()


def _moved(a: Plan, b: Plan) -> int:
    """Nodes that stand at another place in the order of those that both plans run."""
    orders = [list(dict.fromkeys(n for s in p.steps for n in s.nodes)) for p in (a, b)]
    common = set(orders[0]) & set(orders[1])
    first, second = ([n for n in order if n in common] for order in orders)
    return sum(x != y for x, y in zip(first, second, strict=True))


def _elsewhere(a: Plan, b: Plan) -> int:
    where = {(x.id, x.space): x.offset for x in a.buffers}
    return sum(where.get((x.id, x.space), x.offset) != x.offset for x in b.buffers)
