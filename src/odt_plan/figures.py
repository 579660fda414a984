"""What the reports of a plan tell, as lines, meters and tables: the same on terminal and page.

Figures are predictions unless their text says what they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .ir.graph import PHASES
from .ir.training import TrainingGraph
from .planner.device import GENERIC_DEVICE, Device
from .planner.plan import Plan, Trial
from .planner.plan_diff import update_words
from .planner.sizes import format_bytes, format_joules, format_seconds
from .planner.store import SLOTS, plan_store

if TYPE_CHECKING:
    from .backends.c import Built
    from .planner.check import CheckReport
    from .planner.pipeline import PlannedModel

#: Names of a list that are shown.
_SHOWN = 6
_DAYS_OF_A_YEAR = 365.25
_UNITS = {"learn": " of importance", "latency": " cycles", "ram": " B", "flash": " B"}
#: Parts of a training step, in the order in which they are told.
PARTS = (*PHASES, "recompute", "paging")


@dataclass(frozen=True)
class Budgeted:
    """Which budgets the user gave; None: the device's memory less its reserve.

    Attributes:
        given_regions: RAM was given per region.
    """

    ram_bytes: int | None
    flash_bytes: int | None
    given_regions: bool = False


class Line(NamedTuple):
    """A label and what it tells; an empty label goes on with the line before."""

    label: str
    text: str


@dataclass(frozen=True)
class Meter:
    """How much of a budget is used, in bytes, and by what."""

    label: str
    used: int
    limit: int
    parts: tuple[tuple[str, int], ...]

    @property
    def share(self) -> float:
        """Used part of the budget; 1 where there is none."""
        return self.used / self.limit if self.limit else 1.0

    @property
    def text(self) -> str:
        """Exact bytes of the budget."""
        return f"{self.used:,} B of {format_bytes(self.limit)}"

    @property
    def sum(self) -> str:
        """The parts, which make up all that is used."""
        return "= " + " + ".join(f"{name} {n:,}" for name, n in self.parts)


class Cell(NamedTuple):
    """A cell of a table; ``value`` is the number that its text writes."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Grid:
    """A table."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, which stand right."""
        return any(row[column].value is not None for row in self.rows)


# -- heading ------------------------------------------------------------------------------------


def heading(planned: PlannedModel, budgeted: Budgeted) -> list[Line]:
    """Model, device, budget and training."""
    plan, device = planned.plan, planned.device
    t, m = plan.training, plan.model
    forward = sum(n.phase == "forward" for n in planned.training.graph.nodes)
    predictions = ", ".join(str(v.type) for v in planned.training.predictions)
    samples = ", ".join(str(v.type) for v in planned.training.samples)
    shapes = f"{samples} -> {predictions}"
    lines = [Line("model", f"{m.file} ({m.name}): {shapes}, {forward} nodes in forward")]
    lines += [Line("", note) for note in planned.notes]
    clock = f"{device.clock_hz.value / 1e6:g} MHz"
    lines.append(Line("device", f"{device.id}: {device.name}, {device.core}, {clock}"))
    if device.id == GENERIC_DEVICE:
        stand_in = "stands in where no device is named; its times and energies are estimates"
        lines.append(Line("", stand_in))
    own = plan.device.budget
    limits = [
        _ram_budget(plan, device, budgeted),
        f"flash {format_bytes(own.flash_bytes)}{_origin(budgeted.flash_bytes, device.flash_bytes)}",
    ]
    if own.latency_s is not None:
        limits.append(f"latency {format_seconds(own.latency_s)}")
    if own.energy_j is not None:
        limits.append(f"energy {format_joules(own.energy_j)}")
    storage = plan.device.storage
    limits.append(f"paging to {storage}" if storage else "no paging")
    if storage and own.min_steps is not None:
        limits[-1] += f" that lasts {own.min_steps:,} steps"
    lines.append(Line("budget", ", ".join(limits)))
    batches = f"batch {m.batch}" + (f" x {t.micro_batches}" if t.micro_batches > 1 else "")
    fold = ", BatchNormalization folded" if m.fold_batchnorm else ""
    fold += f", a fresh head for {m.head} classes" if m.head else ""
    fold += f", adapters of rank {m.lora.rank} times {m.lora.scale:g} offered" if m.lora else ""
    if (lite := m.lite_residual) is not None:
        fold += f", lite residual modules of {lite.kernel}x{lite.kernel} offered"
    if plan.asked is not None and plan.asked.freeze_before:
        fold += f", nothing before {', '.join(plan.asked.freeze_before)}"
    loss = _losses(planned.training)
    what = ", ".join((loss, t.optimizer, batches, _updated_types(planned)))
    lines.append(Line("training", f"{what}{fold}"))
    return lines


def _losses(training: TrainingGraph) -> str:
    """What is trained by; of several outputs the sum, with names and weights."""
    spec = training.spec
    parts = []
    for v in training.predictions:
        loss = spec.loss_of(v.name)
        text = "loss of the file" if loss == "output" else loss.replace("_", "-")
        if (weight := spec.loss_weights.get(v.name, 1.0)) != 1.0:
            text = f"{weight:g} x {text}"
        parts.append(text if len(training.predictions) == 1 else f"{text} of {v.name}")
    return " + ".join(parts)


def _updated_types(planned: PlannedModel) -> str:
    """Which kinds of weights are updated, and how integers are."""
    t = planned.plan.training
    integer = {u.value.type.dtype != "f32" for u in planned.training.updates}
    if integer == {False}:
        return "f32"
    how = f"i8 {'with' if t.qas else 'without'} QAS, {t.rounding} rounding"
    return how if integer == {True} else f"f32 and {how}"


def _ram_budget(plan: Plan, device: Device, budgeted: Budgeted) -> str:
    """The RAM budget, region by region where there are several, and where it comes from."""
    ram = format_bytes(plan.device.budget.ram_bytes)
    if not plan.regions:
        return f"RAM {ram}{_origin(budgeted.ram_bytes, device.ram_region()[1])}"
    parts = " + ".join(f"{r.name} {r.budget:,}" for r in plan.regions)
    return f"RAM {ram} = {parts} {'as given' if budgeted.given_regions else 'after the reserve'}"


def _origin(given: int | None, device_bytes: int) -> str:
    """Where a budget comes from; a given one may exceed the device (memory added to the board)."""
    if given is None:
        return " after the reserve"
    more = f", more than the device's {device_bytes:,} B" if given > device_bytes else ""
    return f" as given{more}"


# -- memory -------------------------------------------------------------------------------------


def ram_meter(plan: Plan, device: Device, budgeted: Budgeted) -> Meter:
    """RAM of the plan and what the device reserves beside it."""
    ram = plan.claims.ram_bytes
    given = budgeted.ram_bytes is not None or budgeted.given_regions
    kept = 0 if given else device.reserve.ram_bytes
    parts = [
        ("arena", ram.arena),
        ("weights", ram.weights),
        ("optimizer", ram.optimizer),
        ("accumulators", ram.accumulators),
        *([("replay", replay)] if (replay := plan.replay_bytes("ram")) else []),
        ("reserve", kept),
    ]
    return Meter("RAM", ram.total + kept, plan.device.budget.ram_bytes + kept, tuple(parts))


def flash_meter(plan: Plan, device: Device, budgeted: Budgeted) -> Meter:
    """Flash of the plan and what the device reserves beside it."""
    flash = plan.claims.flash_bytes
    kept = device.reserve.flash_bytes if budgeted.flash_bytes is None else 0
    parts = (("weights", flash.weights), ("code (estimated)", flash.code), ("reserve", kept))
    return Meter("flash", flash.total + kept, plan.device.budget.flash_bytes + kept, parts)


def built_lines(plan: Plan, device: Device, built: Built | None) -> list[Line]:
    """What a compiler made of the emitted C, beside what the plan says; what it exceeds."""
    if built is None:
        return []
    flash, ram = plan.claims.flash_bytes, plan.claims.ram_bytes
    code = f"code {built.code_bytes:,} B (estimated {flash.code:,})"
    arrays = f"arrays {built.array_bytes:,} B of RAM (planned {ram.total:,})"
    stack = f"stack {built.stack_bytes:,} B at most (of the reserve)"
    told = f"{code}, {arrays}, {stack}; measured: {built.compiler}"
    lines = [Line("built", told), Line("", "C library, software floats and callbacks come on top")]
    for more, what in (
        (flash.weights + built.code_bytes - plan.device.budget.flash_bytes, "flash budget"),
        (built.stack_bytes - device.reserve.ram_bytes, "reserve of RAM"),
    ):
        if more > 0:
            lines.append(Line("", f"the {what} is {more:,} B too small for it"))
    return lines


def region_lines(plan: Plan) -> list[Line]:
    """What lies in each RAM region that is in use."""
    return [
        Line(
            "",
            f"{r.name} {used:,} B of {format_bytes(r.budget)}:"
            f" arena {r.arena:,} + state {r.state:,}",
        )
        for r in plan.regions
        if (used := r.arena + r.state)
    ]


def storage_lines(plan: Plan) -> list[Line]:
    """What lies in the storage, and what wears it."""
    paged = plan.claims.storage_bytes
    if kept := plan.replay_bytes("storage"):
        assert plan.replay is not None
        size = format_bytes(paged + kept)
        return [
            Line("storage", f"{size} of {plan.replay.place} = paged {paged:,} + replay {kept:,}")
        ]
    if plan.device.storage:
        size = format_bytes(paged)
        return [Line("storage", f"{size} of {plan.device.storage}{_wear(plan)}")]
    return []


def store_line(planned: PlannedModel) -> Line:
    """What keeping all that was learned takes of the chip's flash, and how long that lasts."""
    store, device = plan_store(planned.plan, planned.training, planned.device), planned.device
    told, slots = f"a save of what was learned takes {store.saved_bytes:,} B", store.slots
    if slots is None:
        return Line("store", f"{told}; sectors of {device.id} for two of them are not known")
    both, region = SLOTS * slots.slot_bytes, slots.region
    told += f", two slots {format_bytes(both)} in the last {slots.sectors} sectors of {region.name}"
    if not store.fits:
        return Line("store", f"{told}, where plan and reserve leave just {store.free_bytes:,} B")
    if slots.saves is None:
        return Line("store", f"{told}; how often these can be erased is not known")
    hourly, daily = (slots.saves / (n * _DAYS_OF_A_YEAR) for n in (24, 1))
    lasts = f"{hourly:,.1f} years of one an hour, {daily:,.0f} of one a day (predicted)"
    return Line("store", f"{told}; {slots.saves:,} saves wear them out: {lasts}")


def _wear(plan: Plan) -> str:
    c = plan.claims
    if c.life_steps is None:
        return ""
    worn = f"a training step wears {c.worn_bytes:,} B"
    return f"; {worn}, so it is worn out after {c.life_steps:,} steps (predicted)"


# -- time and energy ----------------------------------------------------------------------------


def peak_text(report: CheckReport) -> str:
    """How many bytes are live at most, and at which step."""
    step = report.steps[report.peak_step]
    return (
        f"{report.live_peak_bytes:,} B live in the arena at step {report.peak_step} of"
        f" {len(report.steps)}: {step.kind} {step.label} ({step.phase})"
    )


def spent_parts(report: CheckReport) -> list[tuple[str, int]]:
    """Parts of a training step that take time, with their cycles."""
    return [(p, n) for p in PARTS if (n := report.phase_cycles.get(p, 0))]


def time_lines(report: CheckReport, device: Device, storage: str | None) -> list[Line]:
    """Peak, latency, what of paging is hidden, and energy, with what they are made of."""
    split = ", ".join(f"{p} {n / report.cycles:.1%}" for p, n in spent_parts(report))
    latency = f"{format_seconds(report.latency_s)} predicted per training step"
    lines = [
        Line("peak", peak_text(report)),
        Line("latency", f"{latency} ({report.cycles:,} cycles): {split}"),
    ]
    if report.transfer_cycles:
        hidden = 1 - report.phase_cycles["paging"] / report.transfer_cycles
        clock = report.cycles / report.latency_s
        moving = f"{format_seconds(report.transfer_cycles / clock)} of transfers"
        beside = f"{hidden:.1%} of it beside the computation (predicted)"
        lines.append(Line("paging", f"{moving}, {beside}"))
    parts = part_grid(report, device, storage).rows
    split = ", ".join(f"{row[0].text} {row[4].text}" for row in parts)
    energy = f"{format_joules(report.energy_j)} predicted per training step"
    return [*lines, Line("energy", f"{energy}: {split}")]


def part_grid(report: CheckReport, device: Device, storage: str | None) -> Grid:
    """Time and energy of each part of a training step.

    The core takes its power all the time, as ``check_claims.measure`` has it; the storage takes its
    own while it moves bytes, beside computation, too, so it has a row of its own.
    """
    clock, power = report.cycles / report.latency_s, device.power_w.value
    rows = [(p, n / clock, power * n / clock) for p, n in spent_parts(report)]
    if storage is not None and report.transfer_cycles:
        moving = report.transfer_cycles / clock
        rows.append(("storage", 0.0, device.find_storage(storage).power_w.value * moving))
    return Grid(
        ("part", "latency", "of it", "energy", "of it"),
        tuple(
            (
                Cell(name),
                Cell(format_seconds(s), s),
                Cell(f"{s / report.latency_s:.1%}", s),
                Cell(format_joules(j), j),
                Cell(f"{j / report.energy_j:.1%}", j),
            )
            for name, s, j in rows
        ),
    )


def replay_lines(plan: Plan) -> list[Line]:
    """What is kept per sample, where, and what it saves."""
    r = plan.replay
    if r is None:
        return []
    where = f"RAM{f' ({r.region})' if r.region else ''}" if r.place == "ram" else r.place
    each = f"{r.entry_bytes:,} B per {'sample' if plan.model.batch == 1 else 'micro-batch'}"
    kept = f"{r.samples:,} samples as {r.value} in {where}, {each}, {r.cache_bytes:,} B"
    once = f"the first {r.front} of {len(plan.steps)} steps run once per sample"
    clock = plan.claims.cycles / plan.claims.latency_s
    times = [format_seconds(c / clock) for c in (r.capture_cycles, r.cached_cycles)]
    share = f"{r.average_cycles / plan.claims.cycles:.1%} of a step without"
    gap = (r.average_cycles - r.bound) / r.average_cycles
    average = f"{format_seconds(r.latency_s)}, {format_joules(r.energy_j)} per training step"
    return [
        Line("replay", f"{kept}; {once}"),
        Line("", f"{times[0]} predicted to capture, {times[1]} per cached training step"),
        Line("", f"on average of {r.epochs} epochs {average}: {share}, gap {gap:.3%}"),
    ]


# -- decisions ----------------------------------------------------------------------------------


def trained_line(plan: Plan) -> Line:
    """How many tensors are updated, and what chose them."""
    updates = plan.decisions.updates
    trained = f"{sum(u.ratio > 0 for u in updates)} of {len(updates)} tensors"
    return Line("trained", f"{trained}; importance: {plan.decisions.importance_source}")


def update_grid(plan: Plan) -> Grid:
    """The updated tensors."""
    rows = []
    for u in plan.decisions.updates:
        if u.ratio == 0:
            continue
        part = Cell(update_words(u), u.ratio)
        worth = Cell(f"{u.importance:,.0f}", u.importance)
        rows.append((Cell(u.node), Cell(u.param), Cell(u.role), part, worth))
    return Grid(("layer", "tensor", "role", "updated", "importance"), tuple(rows))


def trial_line(trial: Trial) -> Line:
    """What the loss of a trial was measured on."""
    how = (
        f"{trial.samples:,} samples of {trial.file}, each held out of one of {trial.folds}"
        f" trainings of {trial.epochs} passes, seed {trial.seed}"
    )
    return Line("trial", f"loss measured on {how}; before training {_loss(trial.before)}")


def trial_grid(trial: Trial) -> Grid:
    """What the update sets learned that were tried."""
    rows = []
    for t in trial.tried:
        mark = " (chosen)" if trial.chosen in t.names else ""
        more = "-" if t.more is None else f"{t.more:.4f} ± {t.error or 0:.4f}"
        rows.append(
            (
                Cell(", ".join(t.names) + mark),
                Cell(_loss(t.loss), t.loss),
                Cell(more, t.more),
                Cell(f"{t.ram_bytes:,} B", t.ram_bytes),
                Cell(str(t.updated), t.updated),
                Cell(f"{t.lr:g}", t.lr),
            )
        )
    first = f"more than {trial.tried[0].names[0]}"
    return Grid(("tried", "loss", first, "RAM", "tensors", "step size"), tuple(rows))


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def saved_line(plan: Plan) -> Line:
    """What happens to the tensors that backward reads."""
    count, size = Counter[str](), Counter[str]()
    for a in plan.decisions.activations:
        count[a.action] += 1
        size[a.action] += a.bytes
    told = [f"{a} {count[a]} ({size[a]:,} B)" for a in ("keep", "recompute", "page")]
    return Line("saved", f"tensors that backward reads: {', '.join(told)}")


def precision_lines(planned: PlannedModel) -> list[Line]:
    """How many layers run in which precision, and which blocks row by row."""
    if not planned.scales:
        return []
    decided = planned.plan.decisions
    count = Counter(decided.precision.values())
    told = f"{count['i8']} layers i8, {count['mixed']} mixed (f32 weights), {count['f32']} f32"
    lines = [Line("precision", f"{told}; {planned.scales}")]
    if decided.streamed:
        few = _few(decided.streamed)
        lines.append(Line("", f"{len(decided.streamed)} blocks run row by row: {few}"))
    return lines


def _few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def solver_lines(plan: Plan) -> list[Line]:
    """What was optimized, how near to the best it is, and what ended the run."""
    lines = []
    for o in plan.objective:
        value, bound = amount(o.name, o.value), amount(o.name, o.bound)
        lines.append(Line("objective", f"{o.name} {value}, bound {bound}, gap {o.gap:.3%}"))
        for t in o.terms:
            what = "of forgone importance" if t.name == "learn" else f"of {t.name}"
            whole = amount(t.name, t.reference)
            share = f"  + {t.weight:g} x share {what}, where plain training takes {whole}"
            lines.append(Line("", share))
    if plan.reordered:
        order = "not that of the file, which needs more RAM; bounds are for this order"
        lines.append(Line("order", order))
    s = plan.solver
    where = f"{s.name} ({s.version}), seed {s.seed}, {format_seconds(s.time_s)}"
    ended = f" ({s.stopped})" if s.stopped else ""
    told = f"{plan.status}{ended}, {where}; the plan has been replayed by the checker"
    return [*lines, Line("solver", told)]


def amount(objective: str, value: float) -> str:
    """A figure of an objective with its unit."""
    if objective == "weighted":
        return f"{value:.6g}"
    if objective == "energy":
        return format_joules(value)
    return f"{value:,.0f}{_UNITS.get(objective, '')}"


def baseline_grid(planned: PlannedModel) -> Grid:
    """The plan beside the usual ones."""
    plan = planned.plan
    learned = sum(u.importance for u in plan.decisions.updates)
    claims = plan.claims
    found = [("this plan", claims.ram_bytes.total, claims.latency_s, learned, True)]
    found += [(b.name, b.ram_bytes, b.latency_s, b.importance, b.fits) for b in planned.baselines]
    return Grid(
        ("compared with", "RAM", "latency", "importance", "fits"),
        tuple(
            (
                Cell(name),
                Cell(f"{ram:,} B", ram),
                Cell(format_seconds(latency), latency),
                Cell(f"{importance:,.0f}", importance),
                Cell("yes" if fits else "no", int(fits)),
            )
            for name, ram, latency, importance, fits in found
        ),
    )
