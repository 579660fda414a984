"""Assembles the plan file's content from a schedule; the checker recomputes every figure of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from .. import __version__
from ..ir.autodiff import param_slots
from ..ir.channels import Channels
from ..ir.graph import Graph, Node
from ..ir.import_options import ImportOptions
from ..ir.opdef import get_op
from ..ir.precision import Precision
from ..ir.quantization import Quantization
from ..ir.training import Candidate, TrainingGraph
from .cost import CostModel, code_bytes, flash_weights_bytes
from .importance import ratio, source_of_importance
from .objective import Goal, Weighted
from .plan import (
    SCHEMA_VERSION,
    ActivationDecision,
    Asked,
    Claims,
    Decisions,
    DeviceInfo,
    FlashClaim,
    ModelInfo,
    Objective,
    ObjectiveName,
    Plan,
    QuantizationRecord,
    RamClaim,
    SolverInfo,
    StageName,
    Step,
    Term,
    Training,
    UpdateDecision,
)
from .rebuild import file_sha256
from .schedule import Schedule
from .tensors import aligned

#: Solvers work in floating point: a gap up to this is rounding.
ROUNDING = 1e-6


def source_of(path: Path, options: ImportOptions, channels: Channels) -> ModelInfo:
    """What identifies the model and how it was imported; the plan lies beside the file."""
    return ModelInfo(
        name=path.stem,
        file=path.name,
        sha256=file_sha256(path),
        batch=options.batch,
        fold_batchnorm=options.folds,
        head=options.head,
        dims=dict(options.dims),
        outputs=options.outputs,
        lora=options.lora,
        lite_residual=options.lite_residual,
        channels={name: tuple(order) for name, order in channels.items()},
    )


def assemble(
    forward: Graph,
    lowered: Graph,
    training: TrainingGraph,
    schedule: Schedule,
    cost: CostModel,
    *,
    source: ModelInfo,
    device: DeviceInfo,
    bounds: Sequence[tuple[Goal, float]],
    gap: float,
    importance: Mapping[Candidate, int],
    solver: SolverInfo,
    calibrated: Mapping[str, Quantization],
    precision: Mapping[str, Precision],
    streamed: Collection[str],
    noise_avoided: float,
    asked: Asked,
) -> Plan:
    """The plan of a schedule.

    Args:
        forward: Imported graph.
        lowered: The same graph in the precisions of the plan.
        training: Specialised training graph whose nodes the steps name.
        schedule: Steps and placed buffers.
        cost: Predicted costs.
        source: Model file and import options.
        device: Device and budgets.
        bounds: Stages of the objective in order, each with what is proven for all plans.
        gap: Relative gap that makes a stage optimal.
        importance: Score of each update, in the precision that it has.
        solver: Provenance.
        calibrated: Scales that are not in the model file, by value of ``forward``.
        precision: Of the layers and inputs of an annotated model.
        streamed: Blocks that run by rows.
        noise_avoided: Score of the noise that mixed layers avoid.
        asked: What was given.
    """
    spec = training.spec
    claims = _claims(training, schedule, cost)
    reached: dict[ObjectiveName, float] = {
        "learn": sum(importance[u.candidate] for u in training.updates) + noise_avoided,
        "latency": claims.cycles,
        "energy": claims.energy_j,
        "ram": claims.ram_bytes.live_peak + schedule.state_bytes,
        "flash": claims.flash_bytes.total,
    }
    stages = tuple(_stage(goal, reached, bound) for goal, bound in bounds)
    optimal = all(s.gap <= max(gap, ROUNDING) for s in stages)
    return Plan(
        schema_version=SCHEMA_VERSION,
        odt_plan_version=__version__,
        model=source,
        training=Training(**asdict(spec)),
        device=device,
        status="optimal" if optimal else "feasible",
        objective=stages,
        claims=claims,
        regions=schedule.regions,
        reordered=_reordered(training, schedule.steps),
        decisions=Decisions(
            importance_source=source_of_importance(asked.importance),
            updates=_updates(forward, lowered, training, importance),
            activations=tuple(
                ActivationDecision(value=name, bytes=size, action=action)
                for name, (size, action) in schedule.actions.items()
            ),
            precision={
                **{n.name: "f32" for n in lowered.nodes if get_op(n.op).params},
                **precision,
            },
            streamed=tuple(streamed),
            noise_avoided=noise_avoided,
        ),
        quantization={
            name: QuantizationRecord(scale=q.scale, zero_point=q.zero_point, axis=q.axis)
            for name, q in calibrated.items()
        },
        asked=asked,
        buffers=schedule.buffers,
        steps=schedule.steps,
        solver=solver,
    )


def _reordered(training: TrainingGraph, steps: Sequence[Step]) -> bool:
    """Operators run in another order than that of the graph.

    Views, what is made for backward alone and what waits for the last micro-step don't count.
    """
    consumers = training.graph.consumers()
    bound = {
        n.name: k
        for k, n in enumerate(training.graph.nodes)
        if not get_op(n.op).view
        and (n.phase != "forward" or any(_early(c) for v in n.outputs for c in consumers[v]))
    }
    first = [s.nodes[-1] for s in steps if s.nodes and not s.recompute and not s.last_micro]
    ran = [bound[name] for name in first if name in bound]
    return ran != sorted(ran)


def _early(node: Node) -> bool:
    return node.phase in ("forward", "loss")


def _stage(goal: Goal, reached: Mapping[ObjectiveName, float], bound: float) -> Objective:
    terms: tuple[Term, ...] = ()
    if isinstance(goal, Weighted):
        name: StageName = "weighted"
        value = goal.value(reached)
        terms = tuple(
            Term(name=n, weight=w, reference=goal.references[n]) for n, w in goal.weights.items()
        )
    else:
        name, value = goal, reached[goal]
    gap = abs(bound - value) / max(abs(value), 1e-9)
    return Objective(name=name, value=value, bound=bound, gap=gap, terms=terms)


def _claims(training: TrainingGraph, schedule: Schedule, cost: CostModel) -> Claims:
    updates = training.updates
    weights = sum(aligned(u.value.type.nbytes) for u in updates)
    optimizer = sum(aligned(v.type.nbytes) for u in updates for v in u.states if v not in u.paged)
    by_name = {n.name: n for n in training.graph.nodes}
    flash_weights = flash_weights_bytes(training)
    nodes = [by_name[n] for s in schedule.steps for n in s.nodes]
    code = code_bytes(nodes, len(schedule.steps))
    peak = max(schedule.live)
    # how often a tensor is paged out; state is in the last micro-step only
    often = any(s.kind == "page_out" and not s.last_micro for s in schedule.steps)
    times = training.spec.micro_batches if often else 1
    return Claims(
        ram_bytes=RamClaim(
            total=schedule.arena_bytes + schedule.state_bytes,
            arena=schedule.arena_bytes,
            weights=weights,
            optimizer=optimizer,
            accumulators=schedule.state_bytes - weights - optimizer,
            live_peak=peak,
            peak_step=schedule.live.index(peak),
        ),
        flash_bytes=FlashClaim(total=flash_weights + code, weights=flash_weights, code=code),
        storage_bytes=schedule.storage_bytes,
        cycles=schedule.cycles,
        latency_s=cost.latency_s(schedule.cycles),
        energy_j=cost.energy_j(schedule.cycles, schedule.transfer_cycles),
        worn_bytes=schedule.worn_bytes,
        life_steps=cost.life_steps(schedule.worn_bytes, times),
    )


def _updates(
    forward: Graph,
    lowered: Graph,
    training: TrainingGraph,
    importance: Mapping[Candidate, int],
) -> tuple[UpdateDecision, ...]:
    """Every trainable parameter, frozen ones with the ratio 0."""
    done = {u.candidate.param: u.candidate for u in training.updates}
    updates, slots = [], param_slots(forward)
    for param, uses in param_slots(lowered).items():
        node, slot = uses[0]
        candidate = done.get(param)
        updates.append(
            UpdateDecision(
                param=param,
                node=node.name,
                role=slot.role,
                ratio=ratio(forward, candidate, slots) if candidate else 0.0,
                channels=candidate.channels if candidate else None,
                saved=candidate.saved if candidate else "f32",
                state=candidate.state if candidate else "keep",
                importance=importance[candidate] if candidate else 0.0,
            )
        )
    return tuple(updates)
