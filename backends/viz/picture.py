"""What the graph pictures show, in any format: boxes, edges and the decision on each node."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from ...ir.graph import Node, Value
from ...ir.training import TrainingGraph
from ...planner.plan import Plan
from ...planner.sizes import format_joules, format_seconds

if TYPE_CHECKING:
    from ...planner.check import CheckReport

Decision = Literal["frozen", "updated", "recomputed", "paged"]


@dataclass(frozen=True)
class Style:
    """Look of a decision: colour-blind safe hue (Okabe and Ito) and a border that works in grey."""

    color: str
    tint: str
    width: float
    dash: str  #: SVG stroke-dasharray, empty for a solid line
    dot: str  #: Graphviz border style
    text: str


STYLES: dict[Decision, Style] = {
    "frozen": Style("#767676", "#ececec", 1, "", "solid", "frozen: parameters stay as they are"),
    "updated": Style("#009e73", "#cdeee3", 3, "", "bold", "updated: parameters are trained"),
    "recomputed": Style("#b87900", "#fbe9c6", 2, "7 4", "dashed", "recomputed for backward"),
    "paged": Style("#0072b2", "#d0e5f2", 2.5, "1.5 3.5", "dotted", "paged to external storage"),
}
#: Nodes about which nothing was decided: no parameters, and the result is not stored for backward
#: or simply kept.
PLAIN = Style("#000000", "#ffffff", 0.8, "", "solid", "no parameters")


@dataclass(frozen=True)
class Box:
    """One node of the picture.

    Attributes:
        op: Operator, or ``input`` for a run-time input.
        name: Node or input name, unshortened.
        type: Type of the first result.
        bytes: Exact bytes of the first result.
        decisions: Decisions in the order in which they are drawn.
        note: One short line: what is updated, kept, recomputed or paged.
        details: Lines of the tooltip with exact figures.
    """

    op: str
    name: str
    type: str
    bytes: int
    decisions: tuple[Decision, ...]
    note: str
    details: tuple[str, ...]


@dataclass(frozen=True)
class Link:
    """One edge: ``value`` flows from box ``source`` to box ``target`` (indices)."""

    source: int
    target: int
    value: str
    type: str
    bytes: int


@dataclass(frozen=True)
class Picture:
    """Boxes in execution order, edges in operand order, and the heading lines."""

    title: str
    facts: str
    boxes: tuple[Box, ...]
    links: tuple[Link, ...]


def draw(plan: Plan, training: TrainingGraph, report: CheckReport) -> Picture:
    """Collect forward and loss nodes with the decisions that the plan's steps carry out."""
    nodes = [n for n in training.graph.nodes if n.phase in ("forward", "loss")]
    facts = _Facts(plan, training, report)
    index: dict[Value, int] = {}
    boxes: list[Box] = []
    links: list[Link] = []
    for node in nodes:
        operands = list(dict.fromkeys(node.operands()))
        for v in operands:  # inputs stand in the order in which they are read
            if v in training.graph.inputs and v not in index:
                index[v] = len(boxes)
                boxes.append(facts.input_box(v))
        links += [
            Link(index[v], len(boxes), v.name, str(v.type), v.type.nbytes)
            for v in operands
            if v in index
        ]
        index.update(dict.fromkeys(node.outputs, len(boxes)))
        boxes.append(facts.node_box(node))
    return Picture(title(plan), summary(plan, report), tuple(boxes), tuple(links))


def title(plan: Plan) -> str:
    """Model, status and device in one line."""
    return f"{plan.model.name}: {plan.status} training plan for {plan.device.id}"


def summary(plan: Plan, report: CheckReport) -> str:
    """The checked figures in one line."""
    kept = plan.replay_bytes("ram")
    ram = report.arena_bytes + report.state_bytes + kept
    budget = plan.device.budget.ram_bytes
    replay = f", replay {kept:,}" if kept else ""
    return (
        f"RAM {ram:,} B of {budget:,} B (arena {report.arena_bytes:,}, state"
        f" {report.state_bytes:,}{replay}); predicted per training step:"
        f" {format_seconds(report.latency_s)}, {format_joules(report.energy_j)}"
    )


def kib(n: int) -> str:
    """Bytes for people: exact below 1 KiB, else KiB or MiB with one decimal; tooltips are exact."""
    if n < 1024:
        return f"{n} B"
    if n < 1024 * 1024:
        return f"{n / 1024:.1f}".removesuffix(".0") + " KiB"
    return f"{n / 1024 / 1024:.1f}".removesuffix(".0") + " MiB"


class _Facts:
    """Decisions and figures by node."""

    def __init__(self, plan: Plan, training: TrainingGraph, report: CheckReport) -> None:
        self.constants = training.graph.constants
        values = training.graph.values
        arena = {b.id: b for b in plan.buffers}
        self.updates: dict[str, list[tuple[str, str, float, int | None]]] = {}
        for u in plan.decisions.updates:
            if u.ratio > 0:
                entry = (u.role, u.param, u.ratio, u.channels)
                self.updates.setdefault(u.node, []).append(entry)
        self.kept = {a.value for a in plan.decisions.activations if a.action == "keep"}
        self.paged: dict[Value, int] = {}
        self.runs: dict[str, list[str]] = {}
        self.recomputed: set[str] = set()
        self.late: set[str] = set()
        phase_of = {n.name: n.phase for n in training.graph.nodes}
        backward = False
        for i, (step, figures) in enumerate(zip(plan.steps, report.steps, strict=True)):
            if step.kind == "page_out":
                for r in step.reads:
                    if r is not None and arena[r].value in values:
                        self.paged[values[arena[r].value]] = arena[r].bytes
            for name in step.nodes:
                again = " (recomputed)" if step.recompute else ""
                text = f"step {i}{again}: {figures.cycles:,} cycles"
                backward = backward or phase_of[name] == "backward"
                if backward and name not in self.runs and phase_of[name] == "forward":
                    self.late.add(name)
                self.runs.setdefault(name, []).append(text)
                if step.recompute:
                    self.recomputed.add(name)

    def input_box(self, v: Value) -> Box:
        notes, decisions = [], list[Decision]()
        if v in self.paged:
            decisions.append("paged")
            notes.append("paged")
        details = [f"run-time input {v.name}", f"{v.type}, {v.type.nbytes:,} B"]
        if v in self.paged:
            details.append(f"paged out: {self.paged[v]:,} B")
        return Box(
            "input",
            v.name,
            str(v.type),
            v.type.nbytes,
            tuple(decisions),
            "; ".join(notes),
            tuple(details),
        )

    def node_box(self, node: Node) -> Box:
        decisions, notes = list[Decision](), list[str]()
        details = [f"{node.op} {node.name} [{node.phase}]"]
        details += [f"result {v.name}: {v.type}, {v.type.nbytes:,} B" for v in node.outputs]
        parameters = [v for v in node.operands() if v.name in self.constants]
        details += [f"constant {v.name}: {v.type}, {v.type.nbytes:,} B" for v in parameters]
        updates = self.updates.get(node.name, [])
        if updates:
            decisions.append("updated")
            notes.append("updates " + ", ".join(_part(role, r) for role, _, r, _ in updates))
            for role, name, ratio, channels in updates:
                part = "whole" if channels is None else f"{channels} leading input channels"
                details.append(f"updated {role} {name}: {part} (ratio {ratio:g})")
        elif parameters:
            decisions.append("frozen")
            notes.append("frozen")
        if node.name in self.late:
            notes.append("run in backward")
        if node.name in self.recomputed:
            decisions.append("recomputed")
            notes.append("recomputed")
        for v in node.outputs:
            if v in self.paged:
                decisions.append("paged")
                notes.append("paged")
                details.append(f"paged out: {v.name}, {self.paged[v]:,} B")
            elif v.name in self.kept:
                notes.append("kept")
                details.append(f"kept for backward: {v.name}")
        details += self.runs.get(node.name, ["no code runs"])
        return Box(
            node.op,
            node.name,
            str(node.out.type),
            node.out.type.nbytes,
            tuple(dict.fromkeys(decisions)),
            ", ".join(dict.fromkeys(notes)),
            tuple(details),
        )


def _part(role: str, ratio: float) -> str:
    if ratio >= 1:
        return role
    f = Fraction(ratio).limit_denominator(64)
    return f"{role} {f}" if abs(float(f) - ratio) < 1e-9 else f"{role} {ratio:.0%}"
