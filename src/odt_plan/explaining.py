"""What ``odt-plan explain`` and ``--explain`` print: decisions, their price, and the other way."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.text import Text

from .live import shown
from .options import EXPLAIN_S
from .planner.device import Device
from .planner.explain import Decision, Explainer, Outcome, Price
from .planner.pipeline import PlannedModel
from .planner.plan import Plan, load_plan
from .planner.sizes import format_bytes, format_seconds
from .planning import PlanOptions, device_of_plan
from .report import console

_LABEL = 12
#: What is demanded, in words.
_OTHER = {
    "update": "if updated",
    "freeze": "if frozen",
    "keep": "if kept",
    "whole": "if whole",
    "i8": "if i8",
    "mixed": "if mixed",
    "f32": "if f32",
}


@dataclass(frozen=True)
class ExplainOptions:
    """The options of ``odt-plan explain``; see its ``--help``."""

    plan_file: Path
    layers: tuple[str, ...]
    model: Path | None
    device: str | None
    gap: float
    time_limit_s: float
    as_json: bool


def run_explain(options: ExplainOptions) -> list[dict[str, object]]:
    """Explain what is decided about layers, and print it as it is found unless JSON is wanted.

    Returns:
        What ``--json`` prints.

    Raises:
        OdtPlanError: The plan, its model or its device is wrong, or a name is not known.
    """
    plan = load_plan(options.plan_file)
    device = device_of_plan(options.plan_file, plan.device.id, options.device)
    return explain_layers(plan, device, options)


def explain_planned(
    asked: PlanOptions, planned: PlannedModel, plan_file: Path
) -> list[dict[str, object]]:
    """The same for a plan that was just made, and stands, or would stand, in a file."""
    options = ExplainOptions(
        plan_file, asked.explain, asked.model, None, asked.gap, EXPLAIN_S, asked.as_json
    )
    return explain_layers(planned.plan, planned.device, options)


def explain_layers(plan: Plan, device: Device, options: ExplainOptions) -> list[dict[str, object]]:
    """The same for a plan that is at hand."""
    records: list[dict[str, object]] = []
    with shown(options.as_json) as watch:
        explainer = Explainer(
            plan,
            options.plan_file,
            device,
            model_path=options.model,
            gap=options.gap,
            time_limit_s=options.time_limit_s,
            watch=watch,
        )
        for layer in options.layers:
            for decision in explainer.explain(layer):
                records.append(asdict(decision))
                if not options.as_json:
                    _print(decision)
    return records


def _print(d: Decision) -> None:
    out = console()
    given = f", as given by {d.given}" if d.given else ""
    out.print(Text.assemble((d.name, "bold"), f": {d.chosen}{given}"), soft_wrap=True)
    lines = [] if d.price is None else list(_price_lines(d.price))
    for o in d.others:
        lines += _outcome_lines(o, given=bool(d.given))
    if d.others:
        lines.append(("flips", _flip_words(d)))
    for label, text in lines:
        out.print(Text.assemble((f"  {label:<{_LABEL}}", "dim"), text), soft_wrap=True)


def _price_lines(p: Price) -> list[tuple[str, str]]:
    per_byte, per_cycle = p.importance / p.kept_bytes, p.importance / p.cycles
    worth = f"{p.importance:,}: {per_byte:.4g} per byte kept, {per_cycle:.4g} per cycle"
    return [
        ("importance", worth),
        ("scored by", p.source),
        (
            "price",
            f"{p.kept_bytes:,} B kept in RAM, {p.saved_bytes:,} B saved for its gradient,"
            f" {p.cycles:,} cycles of its own per training step",
        ),
    ]


def _outcome_lines(o: Outcome, *, given: bool) -> list[tuple[str, str]]:
    label = _OTHER[o.forced.kind]
    if o.status != "planned":
        first, *rest = o.why
        known = "impossible" if o.status == "impossible" else "not known"
        return [(label, f"{known}: {first}"), *(("", line) for line in rest)]
    lines = [(label, f"learn {o.score:,.0f} ({o.score_change:+,.0f}), {_times(o)}")]
    lines += [("  less", ", ".join(o.less))] if o.less else []
    lines += [("  more", ", ".join(o.more))] if o.more else []
    return lines if given else [*lines, ("  proof", _proof(o))]


def _times(o: Outcome) -> str:
    sign = "-" if o.latency_change_s < 0 else "+"
    latency = f"latency {sign}{format_seconds(abs(o.latency_change_s))}"
    return f"{latency}, RAM {o.ram_change_bytes:+,} B"


def _proof(o: Outcome) -> str:
    """What the bound tells about the change of the score."""
    lost = o.score - o.score_change - o.score_bound
    if lost > 0.5:
        return f"every such plan loses {lost:,.0f} or more of learn"
    if o.score_change < -0.5:
        return "found, not proven: within the gap of the solver, such a plan may be as good"
    if o.score_change > 0.5:
        return "a better plan, which the gap or the time limit had left open"
    return "learns as much; the plan is chosen for its latency"


def _flip_words(d: Decision) -> str:
    if not d.flip.searched:
        return "not searched"
    if d.flip.ram_bytes is None:
        return "at no RAM, under the other limits"
    return (
        f"at {format_bytes(d.flip.ram_bytes)} of RAM, live bytes: the least at which"
        f" {_OTHER[d.others[0].forced.kind].removeprefix('if ')} is as good as any plan"
    )
