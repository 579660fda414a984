"""A plan's decisions by node: facts for tables, and notes that viewers like Netron show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...ir.opdef import get_op
from ...ir.training import TrainingGraph
from ...planner.plan import Plan

if TYPE_CHECKING:
    from ...planner.check import CheckReport

_DONE = {"keep": "kept", "recompute": "recomputed", "page": "paged"}


@dataclass
class NodeFacts:
    """What is decided about one node.

    Attributes:
        parameters: It has some.
        updates: Trained parameters with their ratios.
        importance: Their scores.
        precision: Of the layers that it has become.
        saved: What happens to its results until backward reads them.
        bytes: Of its results.
        cycles: Of the steps that compute it in forward and again, per micro-batch.
    """

    parameters: bool = False
    updates: list[str] = field(default_factory=list)
    importance: float = 0.0
    precision: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    bytes: int = 0
    cycles: int = 0

    @property
    def action(self) -> str:
        """Updated or frozen, where there are parameters."""
        return "updated" if self.updates else "frozen" if self.parameters else ""

    def notes(self) -> dict[str, str]:
        """Those that say something."""
        texts = {
            "action": self.action,
            "updated": ", ".join(self.updates),
            "precision": ", ".join(dict.fromkeys(self.precision)),
            "activation": ", ".join(dict.fromkeys(self.saved)),
            "bytes": str(self.bytes),
            "cycles": str(self.cycles),
        }
        return {k: text for k, text in texts.items() if text}


def node_notes(
    plan: Plan, training: TrainingGraph, names: Collection[str]
) -> dict[str, dict[str, str]]:
    """Notes on the nodes of a model file.

    Args:
        plan: The plan.
        training: The training graph that it was made for.
        names: Names of the nodes in the file.

    Returns:
        By name ``action`` (frozen or updated, where there are parameters), ``updated`` (parameter
        and ratio), ``precision``, ``activation`` (kept, recomputed or paged), ``bytes`` and
        ``cycles``. Nodes that importing has merged into others have none.
    """
    return {name: facts.notes() for name, facts in node_facts(plan, training, names).items()}


def node_facts(
    plan: Plan, training: TrainingGraph, names: Collection[str]
) -> dict[str, NodeFacts]:
    """What is decided about nodes, be they those of a model file or of the training graph.

    Returns:
        By name; nodes that importing has merged into others have none.
    """
    graph = training.graph
    found: dict[str, NodeFacts] = {}
    owners: dict[str, NodeFacts] = {}
    for node in graph.nodes:
        owner = _owner(node.name, names) if node.phase in ("forward", "loss") else None
        if owner is None:
            continue
        facts = owners[node.name] = found.setdefault(owner, NodeFacts())
        facts.parameters |= any(v.name in graph.constants for v in node.operands())
        if not get_op(node.op).view:
            facts.bytes += sum(v.type.nbytes for v in node.outputs)
        if node.name in plan.decisions.precision:
            facts.precision.append(plan.decisions.precision[node.name])
    for u in plan.decisions.updates:
        if u.ratio > 0 and u.node in owners:
            owners[u.node].updates.append(f"{u.param} {u.ratio:g}")
            owners[u.node].importance += u.importance
    for a in plan.decisions.activations:
        producer = graph.values[a.value].producer if a.value in graph.values else None
        if producer is not None and producer.name in owners:
            owners[producer.name].saved.append(_DONE[a.action])
    for step in plan.steps:
        if step.kind == "compute" and step.nodes[0] in owners:
            owners[step.nodes[0]].cycles += step.cycles
    return found


def node_cycles(
    training: TrainingGraph, report: CheckReport, plan: Plan, names: Collection[str]
) -> dict[str, Counter[str]]:
    """What nodes cost: those of forward their gradients and updates, too.

    Returns:
        By name of a node, cycles by part of a training step; paging belongs to no node.
    """
    updated = {
        n.name: u.owner.name
        for u in training.updates
        for n in (u.apply_node, u.accumulate_node)
        if n is not None
    }
    found: dict[str, Counter[str]] = {}
    for step, figures in zip(plan.steps, report.steps, strict=True):
        if step.nodes:
            name = _owner(updated.get(step.nodes[0], step.nodes[0]), names)
            found.setdefault(name or "", Counter())[figures.phase] += figures.cycles
    return found


def model_notes(plan: Plan) -> dict[str, str]:
    """Notes on the model: the device, and what a training step takes."""
    return {
        "version": plan.odt_plan_version,
        "device": plan.device.id,
        "status": plan.status,
        "ram_bytes": str(plan.claims.ram_bytes.total),
        "flash_bytes": str(plan.claims.flash_bytes.total),
        "cycles": str(plan.claims.cycles),
    }


def _owner(name: str, names: Collection[str]) -> str | None:
    """The node of the file that a node of the graph was made for: it may have parts."""
    while name not in names:
        name, slash, _ = name.rpartition("/")
        if not slash:
            return None
    return name
