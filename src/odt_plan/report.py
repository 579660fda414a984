"""The terminal report of a plan. Figures are predictions unless the line says what they are.

Rich draws it; through a pipe or with NO_COLOR it is plain text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .ir.graph import PHASES
from .ir.training import TrainingGraph
from .planner.check import CheckReport
from .planner.device import GENERIC_DEVICE, Device, Storage
from .planner.pipeline import PlannedModel
from .planner.plan import Plan
from .planner.plan_diff import update_words
from .planner.sizes import format_bytes, format_joules, format_seconds
from .tables import print_table

_BAR = 24
_LABEL = 10
#: Width of the report where there is no terminal to ask.
_PIPE_WIDTH = 160
#: Names of a list that are shown.
_SHOWN = 6
_UNITS = {"learn": " of importance", "latency": " cycles", "ram": " B", "flash": " B"}


@dataclass(frozen=True)
class Budgeted:
    """Which budgets the user gave; None: the device's memory less its reserve.

    Attributes:
        given_regions: RAM was given per region.
    """

    ram_bytes: int | None
    flash_bytes: int | None
    given_regions: bool = False


def console() -> Console:
    """Standard output; plain and wide where it is no terminal."""
    plain = Console(highlight=False, soft_wrap=True)
    return plain if plain.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def print_plan(
    planned: PlannedModel, budgeted: Budgeted, files: Sequence[Path], *, verbose: bool = False
) -> None:
    """Print the report of a new plan.

    Args:
        planned: The plan.
        budgeted: Which budgets were given.
        files: What was written.
        verbose: What the report sums up is listed by name, too.
    """
    out = console()
    _head(out, planned, budgeted)
    _memory(out, planned.plan, planned.device, budgeted)
    _time(out, planned.report)
    _replayed(out, planned.plan)
    if planned.no_replay:
        _line(out, "replay", f"none: {planned.no_replay}")
    _updates(out, planned.plan)
    _activations(out, planned.plan)
    _precisions(out, planned)
    if verbose:
        _by_name(out, planned.plan)
    _solved(out, planned)
    _baselines(out, planned)
    if files:
        _line(out, "written", _listed(files))


def print_verified(plan_file: Path, plan: Plan, report: CheckReport) -> None:
    """Print what the replay of a plan file found."""
    out = console()
    ram = plan.claims.ram_bytes.total
    found = f"{plan_file}: {len(plan.steps)} steps replayed, all claims confirmed"
    _line(out, "ok", found, "green")
    _line(out, "RAM", f"{format_bytes(ram)} of {format_bytes(plan.device.budget.ram_bytes)}")
    _regions(out, plan)
    flash = plan.claims.flash_bytes.total
    _line(out, "flash", f"{format_bytes(flash)} of {format_bytes(plan.device.budget.flash_bytes)}")
    _line(out, "peak", _peak(report))
    _line(out, "time", f"{format_seconds(report.latency_s)} predicted per training step")
    _line(out, "energy", f"{format_joules(report.energy_j)} predicted per training step")
    _replayed(out, plan)


def verified_record(plan: Plan, report: CheckReport) -> dict[str, object]:
    """What ``verify --json`` prints."""
    return {
        "ok": True,
        "steps": len(plan.steps),
        "ram_bytes": plan.claims.ram_bytes.total,
        "arena_bytes": report.arena_bytes,
        "state_bytes": report.state_bytes,
        "regions": [r.model_dump() for r in plan.regions],
        "live_peak_bytes": report.live_peak_bytes,
        "peak_step": report.peak_step,
        "flash_weights_bytes": report.flash_weights_bytes,
        "storage_bytes": report.storage_bytes,
        "worn_bytes": report.worn_bytes,
        "life_steps": report.life_steps,
        "cycles": report.cycles,
        "latency_s": report.latency_s,
        "energy_j": report.energy_j,
        "replay": None if plan.replay is None else plan.replay.model_dump(),
    }


def _line(out: Console, label: str, text: str, style: str = "bold") -> None:
    out.print(Text.assemble((f"{label:<{_LABEL}}", style), text), soft_wrap=True)


def _head(out: Console, planned: PlannedModel, budgeted: Budgeted) -> None:
    plan, device = planned.plan, planned.device
    t, m = plan.training, plan.model
    forward = sum(n.phase == "forward" for n in planned.training.graph.nodes)
    predictions = ", ".join(str(v.type) for v in planned.training.predictions)
    samples = ", ".join(str(v.type) for v in planned.training.samples)
    shapes = f"{samples} -> {predictions}"
    _line(out, "model", f"{m.file} ({m.name}): {shapes}, {forward} nodes in forward")
    for note in planned.notes:
        _line(out, "", note)
    clock = f"{device.clock_hz.value / 1e6:g} MHz"
    _line(out, "device", f"{device.id}: {device.name}, {device.core}, {clock}")
    if device.id == GENERIC_DEVICE:
        stand_in = "stands in where no device is named; its times and energies are estimates"
        _line(out, "", stand_in)
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
    _line(out, "budget", ", ".join(limits))
    batches = f"batch {m.batch}" + (f" x {t.micro_batches}" if t.micro_batches > 1 else "")
    fold = ", BatchNormalization folded" if m.fold_batchnorm else ""
    fold += f", a fresh head for {m.head} classes" if m.head else ""
    fold += f", adapters of rank {m.lora.rank} times {m.lora.scale:g} offered" if m.lora else ""
    if plan.asked is not None and plan.asked.freeze_before:
        fold += f", nothing before {', '.join(plan.asked.freeze_before)}"
    loss = _losses(planned.training)
    what = ", ".join((loss, t.optimizer, batches, _updated_types(planned)))
    _line(out, "training", f"{what}{fold}")


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


def _memory(out: Console, plan: Plan, device: Device, budgeted: Budgeted) -> None:
    ram, flash = plan.claims.ram_bytes, plan.claims.flash_bytes
    given = budgeted.ram_bytes is not None or budgeted.given_regions
    kept_ram = 0 if given else device.reserve.ram_bytes
    kept_flash = device.reserve.flash_bytes if budgeted.flash_bytes is None else 0
    parts = [
        ("arena", ram.arena),
        ("weights", ram.weights),
        ("optimizer", ram.optimizer),
        ("accumulators", ram.accumulators),
        *([("replay", kept)] if (kept := plan.replay_bytes("ram")) else []),
    ]
    out.print()
    _bar(out, "RAM", ram.total + kept_ram, plan.device.budget.ram_bytes + kept_ram)
    _line(out, "", _sum([*parts, ("reserve", kept_ram)]))
    _regions(out, plan)
    _bar(out, "flash", flash.total + kept_flash, plan.device.budget.flash_bytes + kept_flash)
    code = ("code (estimated)", flash.code)
    _line(out, "", _sum([("weights", flash.weights), code, ("reserve", kept_flash)]))
    if r := plan.replay_bytes("storage"):
        assert plan.replay is not None
        size = format_bytes(plan.claims.storage_bytes + r)
        parts = [("paged", plan.claims.storage_bytes), ("replay", r)]
        _line(out, "storage", f"{size} of {plan.replay.place} {_sum(parts)}")
    elif plan.device.storage:
        size = format_bytes(plan.claims.storage_bytes)
        _line(out, "storage", f"{size} of {plan.device.storage}{_wear(plan)}")


def _wear(plan: Plan) -> str:
    c = plan.claims
    if c.life_steps is None:
        return ""
    worn = f"a training step wears {c.worn_bytes:,} B"
    return f"; {worn}, so it is worn out after {c.life_steps:,} steps (predicted)"


def _regions(out: Console, plan: Plan) -> None:
    """What lies in each RAM region that is in use."""
    for r in plan.regions:
        used = r.arena + r.state
        if used:
            told = f"{used:,} B of {format_bytes(r.budget)}: arena {r.arena:,} + state {r.state:,}"
            _line(out, "", f"{r.name} {told}")


def _sum(parts: Sequence[tuple[str, int]]) -> str:
    return "= " + " + ".join(f"{name} {n:,}" for name, n in parts)


def _bar(out: Console, label: str, used: int, limit: int) -> None:
    share = used / limit if limit else 1.0
    full = min(_BAR, int(share * _BAR))  # full only when nothing is left
    meter = "[" + "=" * full + " " * (_BAR - full) + "]"
    style = "green" if share < 0.9 else "yellow"
    text = f" {share:6.1%}  {used:,} B of {format_bytes(limit)}"
    out.print(Text.assemble((f"{label:<{_LABEL}}", "bold"), (meter, style), text), soft_wrap=True)


def _time(out: Console, report: CheckReport) -> None:
    _line(out, "peak", _peak(report))
    spent = report.phase_cycles
    parts = [p for p in (*PHASES, "recompute", "paging") if spent.get(p)]
    split = ", ".join(f"{p} {spent[p] / report.cycles:.1%}" for p in parts)
    latency = f"{format_seconds(report.latency_s)} predicted per training step"
    _line(out, "latency", f"{latency} ({report.cycles:,} cycles): {split}")
    if report.transfer_cycles:
        hidden = 1 - spent["paging"] / report.transfer_cycles
        clock = report.cycles / report.latency_s
        moving = f"{format_seconds(report.transfer_cycles / clock)} of transfers"
        _line(out, "paging", f"{moving}, {hidden:.1%} of it beside the computation (predicted)")
    _line(out, "energy", f"{format_joules(report.energy_j)} predicted per training step")


def _replayed(out: Console, plan: Plan) -> None:
    """What is kept per sample, where, and what it saves."""
    r = plan.replay
    if r is None:
        return
    where = f"RAM{f' ({r.region})' if r.region else ''}" if r.place == "ram" else r.place
    each = f"{r.entry_bytes:,} B per {'sample' if plan.model.batch == 1 else 'micro-batch'}"
    kept = f"{r.samples:,} samples as {r.value} in {where}, {each}, {r.cache_bytes:,} B"
    once = f"the first {r.front} of {len(plan.steps)} steps run once per sample"
    _line(out, "replay", f"{kept}; {once}")
    clock = plan.claims.cycles / plan.claims.latency_s
    times = [format_seconds(c / clock) for c in (r.capture_cycles, r.cached_cycles)]
    share = f"{r.average_cycles / plan.claims.cycles:.1%} of a step without"
    gap = (r.average_cycles - r.bound) / r.average_cycles
    _line(out, "", f"{times[0]} predicted to capture, {times[1]} per cached training step")
    average = f"{format_seconds(r.latency_s)}, {format_joules(r.energy_j)} per training step"
    _line(out, "", f"on average of {r.epochs} epochs {average}: {share}, gap {gap:.3%}")


def _peak(report: CheckReport) -> str:
    step = report.steps[report.peak_step]
    return (
        f"{report.live_peak_bytes:,} B live in the arena at step {report.peak_step} of"
        f" {len(report.steps)}: {step.kind} {step.label} ({step.phase})"
    )


def _updates(out: Console, plan: Plan) -> None:
    updates = plan.decisions.updates
    chosen = [u for u in updates if u.ratio > 0]
    out.print()
    table = Table("layer", "tensor", "role", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("updated", justify="right")
    table.add_column("importance", justify="right")
    for u in chosen:
        cells = (u.node, u.param, u.role, update_words(u), f"{u.importance:,.0f}")
        table.add_row(*map(Text, cells))
    trained = f"{len(chosen)} of {len(updates)} tensors"
    _line(out, "trained", f"{trained}; importance: {plan.decisions.importance_source}")
    print_table(out, table)
    _trial(out, plan)


def _trial(out: Console, plan: Plan) -> None:
    """What the update sets learned that were tried."""
    trial = plan.decisions.trial
    if trial is None:
        return
    table = Table("tried", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("loss", f"more than {trial.tried[0].names[0]}", "RAM", "tensors", "step size"):
        table.add_column(name, justify="right")
    for t in trial.tried:
        mark = " (chosen)" if trial.chosen in t.names else ""
        more = "-" if t.more is None else f"{t.more:.4f} ± {t.error or 0:.4f}"
        cells = (_loss(t.loss), more, f"{t.ram_bytes:,} B", str(t.updated), f"{t.lr:g}")
        table.add_row(*map(Text, (", ".join(t.names) + mark, *cells)))
    how = (
        f"{trial.samples:,} samples of {trial.file}, each held out of one of {trial.folds}"
        f" trainings of {trial.epochs} passes, seed {trial.seed}"
    )
    _line(out, "trial", f"loss measured on {how}; before training {_loss(trial.before)}")
    print_table(out, table)


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _activations(out: Console, plan: Plan) -> None:
    count, size = Counter[str](), Counter[str]()
    for a in plan.decisions.activations:
        count[a.action] += 1
        size[a.action] += a.bytes
    told = [f"{a} {count[a]} ({size[a]:,} B)" for a in ("keep", "recompute", "page")]
    _line(out, "saved", f"tensors that backward reads: {', '.join(told)}")


def _precisions(out: Console, planned: PlannedModel) -> None:
    if not planned.scales:
        return
    decided = planned.plan.decisions
    count = Counter(decided.precision.values())
    told = f"{count['i8']} layers i8, {count['mixed']} mixed (f32 weights), {count['f32']} f32"
    _line(out, "precision", f"{told}; {planned.scales}")
    if decided.streamed:
        _line(out, "", f"{len(decided.streamed)} blocks run row by row: {_few(decided.streamed)}")


def _by_name(out: Console, plan: Plan) -> None:
    """What is frozen, what becomes of each tensor that backward reads, and how layers compute."""
    decided = plan.decisions
    frozen = [u.param for u in decided.updates if not u.ratio]
    saved = [(a.value, f"{a.bytes:,} B", a.action) for a in decided.activations]
    layers = [(n, p, "") for n, p in decided.precision.items()]
    streamed = [(n, "row by row", "") for n in decided.streamed]
    out.print()
    if frozen:
        _line(out, "frozen", ", ".join(frozen))
    for head, rows in (("saved tensor", saved), ("layer", layers), ("block", streamed)):
        if rows:
            table = Table(head, "", "", box=box.SIMPLE_HEAD, pad_edge=False)
            for row in rows:
                table.add_row(*map(Text, row))
            print_table(out, table)


def _few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _solved(out: Console, planned: PlannedModel) -> None:
    plan = planned.plan
    for o in plan.objective:
        value, bound = amount(o.name, o.value), amount(o.name, o.bound)
        _line(out, "objective", f"{o.name} {value}, bound {bound}, gap {o.gap:.3%}")
        for t in o.terms:
            what = "of forgone importance" if t.name == "learn" else f"of {t.name}"
            whole = amount(t.name, t.reference)
            _line(out, "", f"  + {t.weight:g} x share {what}, where plain training takes {whole}")
    if plan.reordered:
        _line(out, "order", "not that of the file, which needs more RAM; bounds are for this order")
    s = plan.solver
    where = f"{s.name} ({s.version}), seed {s.seed}, {format_seconds(s.time_s)}"
    ended = f" ({s.stopped})" if s.stopped else ""
    told = f"{plan.status}{ended}, {where}; the plan has been replayed by the checker"
    _line(out, "solver", told)


def amount(objective: str, value: float) -> str:
    """A figure of an objective with its unit."""
    if objective == "weighted":
        return f"{value:.6g}"
    if objective == "energy":
        return format_joules(value)
    return f"{value:,.0f}{_UNITS.get(objective, '')}"


def _baselines(out: Console, planned: PlannedModel) -> None:
    if not planned.baselines:
        return
    table = Table("compared with", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("RAM", "latency", "importance", "fits"):
        table.add_column(name, justify="right")
    plan = planned.plan
    learned = sum(u.importance for u in plan.decisions.updates)
    claims = plan.claims
    rows = [("this plan", claims.ram_bytes.total, claims.latency_s, learned, True)]
    rows += [(b.name, b.ram_bytes, b.latency_s, b.importance, b.fits) for b in planned.baselines]
    for name, ram, latency, importance, fits in rows:
        told = "-" if ram is None else f"{ram:,} B"
        time = "-" if latency is None else format_seconds(latency)
        table.add_row(name, told, time, f"{importance:,.0f}", "yes" if fits else "no")
    out.print()
    print_table(out, table)


def print_devices(devices: Sequence[Device]) -> None:
    """Print one row per device."""
    table = Table("id", "name", "core", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("MHz", "RAM", "flash"):
        table.add_column(name, justify="right")
    table.add_column("storage")
    for d in devices:
        mhz = f"{d.clock_hz.value / 1e6:g}"
        ram = _short(sum(r.bytes for r in d.ram_runs))
        storage = ", ".join(s.id for s in d.storage) or "none"
        cells = (d.id, d.name, d.core, mhz, ram, _short(d.flash_bytes), storage)
        table.add_row(*map(Text, cells))
    out = console()
    print_table(out, table)
    out.print("`odt-plan devices show ID` prints every number with its source.", soft_wrap=True)


def _storage_facts(s: Storage) -> Iterator[tuple[str, str, str]]:
    """Whether transfers run beside the core, what wears, and whether the chip's flash may."""
    if s.dma is not None:
        yield "  DMA", "beside the core" if s.dma.value else "none", s.dma.source
    if s.wear is not None:
        yield "  erase cycles", f"{s.wear.cycles.value:g}", s.wear.cycles.source
        how = "levelled" if s.wear.levelled else "of each tensor's own"
        yield "  erase unit", f"{format_bytes(s.wear.unit_bytes)}, {how}", s.wear.source
    if s.region is not None:
        allowed = "allowed" if s.pages else "not allowed"
        source = s.allow_paging.source if s.allow_paging else ""
        yield "  paging", f"{allowed} to this flash of the chip, {s.region}", source


def print_device(device: Device) -> None:
    """Print everything known about a device, each number with its source."""
    out = console()
    out.print(Text.assemble((device.id, "bold"), f"  {device.name}"), soft_wrap=True)
    if device.notes:
        out.print(Text(device.notes), soft_wrap=True)
    clock, cpi, power = device.clock_hz, device.cycles_per_instruction, device.power_w
    rows = [
        ("core", device.core, device.core_source or ""),
        ("clock", f"{clock.value / 1e6:g} MHz", clock.source),
        ("cycles per instruction", f"{cpi.value:g}", cpi.source),
        ("power while computing", f"{power.value:g} W", power.source),
    ]
    for r in device.regions:
        sectors = " + ".join(f"{n} x {_short(b)}" for n, b in r.sectors)
        where = f"{r.origin:#010x}  {format_bytes(r.bytes)}"
        rows.append((f"{r.kind} {r.name}", f"{where}{': ' if sectors else ''}{sectors}", r.source))
        if r.extra_cycles_per_byte is not None:
            more = r.extra_cycles_per_byte
            rows.append(("  extra", f"{more.value:g} cycles per byte touched", more.source))
    kept = device.reserve
    rows.append(("reserved RAM", format_bytes(kept.ram_bytes), kept.source))
    rows.append(("reserved flash", format_bytes(kept.flash_bytes), kept.source))
    for s in device.storage:
        rows.append((f"storage {s.id}", f"{s.name}, {format_bytes(s.bytes)}", ""))
        for what, rate, wait in (
            ("read", s.read_bytes_per_s, s.read_latency_s),
            ("write", s.write_bytes_per_s, s.write_latency_s),
        ):
            rows.append((f"  {what} rate", f"{rate.value / 1e6:g} MB/s", rate.source))
            rows.append((f"  {what} latency", format_seconds(wait.value), wait.source))
        rows.append(("  power", f"{s.power_w.value:g} W", s.power_w.source))
        rows += _storage_facts(s)
    for label, value, source in rows:
        told = Text(f"{label:<24}{value}")
        out.print(told.append(f"  ({source})" if source else "", "dim"), soft_wrap=True)
    for run, left in device.ram_budgets:
        less = ", less the reserve" * (left < run.bytes)
        extra = run.extra_cycles_per_byte
        slow = f", {extra:g} cycles per byte slower" if extra else ""
        whole = f"{format_bytes(run.bytes)} of RAM from {run.origin:#010x} ({run.name}){slow}{less}"
        out.print(Text(f"{'a plan uses':<24}{whole}"), soft_wrap=True)
    out.print(Text(f"{'':<24}all flash, less the reserve"), soft_wrap=True)


def _listed(files: Sequence[Path]) -> str:
    """The folder and its files; the kernels of the C library only by number."""
    folder = min((f.parent for f in files), key=lambda p: len(p.parts))
    names = [str(f.relative_to(folder)) for f in files]
    own = [n for n in names if not n.startswith("odtplan_")]
    kernels = len(names) - len(own)
    more = f" and {kernels} files of the kernel library" if kernels else ""
    return f"{folder}: {', '.join(own)}{more}"


def _short(n: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n / size:g} {unit}"
    return f"{n} B"
