"""A plan's decisions as notes on the nodes of the model file, which viewers like Netron show."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from ...ir.opdef import get_op
from ...ir.training import TrainingGraph
from ...planner.plan import Plan

_DONE = {"keep": "kept", "recompute": "recomputed", "page": "paged"}


@dataclass
class _Facts:
    """What is decided about one node of the file.

    Attributes:
        parameters: It has some.
        updates: Trained parameters with their ratios.
        precision: Of the layers that it has become.
        saved: What happens to its results until backward reads them.
        bytes: Of its results.
        cycles: Of the steps that compute it in forward and again, per micro-batch.
    """

    parameters: bool = False
    updates: list[str] = field(default_factory=list)
    precision: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    bytes: int = 0
    cycles: int = 0

    def notes(self) -> dict[str, str]:
        """Those that say something."""
        action = "updated" if self.updates else "frozen" if self.parameters else ""
        texts = {
            "action": action,
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
    graph = training.graph
    found: dict[str, _Facts] = {}
    owners: dict[str, _Facts] = {}
    for node in graph.nodes:
        owner = _owner(node.name, names) if node.phase in ("forward", "loss") else None
        if owner is None:
            continue
        facts = owners[node.name] = found.setdefault(owner, _Facts())
        facts.parameters |= any(v.name in graph.constants for v in node.operands())
        if not get_op(node.op).view:
            facts.bytes += sum(v.type.nbytes for v in node.outputs)
        if node.name in plan.decisions.precision:
            facts.precision.append(plan.decisions.precision[node.name])
    for u in plan.decisions.updates:
        if u.ratio > 0 and u.node in owners:
            owners[u.node].updates.append(f"{u.param} {u.ratio:g}")
    for a in plan.decisions.activations:
        producer = graph.values[a.value].producer if a.value in graph.values else None
        if producer is not None and producer.name in owners:
            owners[producer.name].saved.append(_DONE[a.action])
    for step in plan.steps:
        if step.kind == "compute" and step.nodes[0] in owners:
            owners[step.nodes[0]].cycles += step.cycles
    return {name: facts.notes() for name, facts in found.items()}


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
