"""The plan record around steps and buffers, with true claims, for plans that tests make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from odt_plan.ir.ops.streamed import layers_of
from odt_plan.ir.training import TrainingGraph
from odt_plan.planner.cost import CostModel, code_bytes, flash_weights_bytes
from odt_plan.planner.device import Device
from odt_plan.planner.plan import (
    ActivationDecision,
    Budget,
    Buffer,
    Claims,
    Decisions,
    DeviceInfo,
    FlashClaim,
    ModelInfo,
    Objective,
    Plan,
    RamClaim,
    RegionClaim,
    SolverInfo,
    Step,
    Training,
    UpdateDecision,
)

Action = Mapping[str, tuple[int, str]]


def padded(n: int) -> int:
    return (n + 3) // 4 * 4


def finish(
    training: TrainingGraph,
    device: Device,
    cost: CostModel,
    steps: Sequence[Step],
    buffers: Sequence[Buffer],
    actions: Action,
    storage: str | None = None,
    transfer_cycles: int = 0,
    cycles: int | None = None,
    regions: tuple[RegionClaim, ...] = (),
) -> Plan:
    """The plan record around steps and buffers, with true claims."""
    spec, updates = training.spec, training.updates
    arena = [b for b in buffers if b.space == "arena"]
    live = []
    for k in range(len(steps)):
        at: dict[int, int] = {}
        for b in arena:
            if b.first <= k <= b.last:
                at[b.offset] = max(at.get(b.offset, 0), padded(b.bytes))
        live.append(sum(at.values()))
    top = max(b.offset + padded(b.bytes) for b in arena)
    weights = sum(padded(u.value.type.nbytes) for u in updates)
    optimizer = sum(padded(v.type.nbytes) for u in updates for v in u.states if v not in u.paged)
    accumulators = sum(padded(u.accumulator.type.nbytes) for u in updates if u.accumulator)
    by_name = {n.name: n for n in training.graph.nodes}
    forward = [n for n in training.graph.nodes if n.phase == "forward"]
    flash = flash_weights_bytes(training)
    code = code_bytes([by_name[n] for s in steps for n in s.nodes], len(steps))
    if cycles is None:
        cycles = sum(s.cycles * (1 if s.last_micro else spec.micro_batches) for s in steps)
    ram = top + weights + optimizer + accumulators
    paged = [b for b in buffers if b.space == "storage"]
    stored = max((b.offset + cost.stored_bytes(padded(b.bytes)) for b in paged), default=0)
    homes = {v.name for u in updates for v in u.paged}
    times = {b.id: 1 if b.value in homes else spec.micro_batches for b in paged}
    worn = sum(times[b.id] * cost.worn_bytes(padded(b.bytes)) for b in paged)
    decided = []
    for u in updates:
        sizes = u.value.type.size, 0
        if u.candidate.channels is not None:
            name = f"{u.candidate.param}[{u.candidate.channels}:]"
            (cold,) = (v for v in u.owner.operands() if v.name == name)
            sizes = u.value.type.size, cold.type.size
        decided.append(
            UpdateDecision(
                param=u.candidate.param, node=u.owner.name, role=u.role,
                ratio=sizes[0] / sum(sizes), channels=u.candidate.channels,
                saved=u.candidate.saved, state=u.candidate.state, importance=1.0,
            )
        )  # fmt: skip
    return Plan(
        schema_version=1,
        odt_plan_version="0.0.0",
        model=ModelInfo(
            name=training.graph.name, file="model.onnx", sha256="0" * 64,
            batch=training.sample.type.shape[0], fold_batchnorm=True,
        ),
        training=Training(**asdict(spec)),
        device=DeviceInfo(
            id=device.id, storage=storage,
            budget=Budget(
                ram_bytes=sum(r.budget for r in regions) or ram, flash_bytes=flash + code,
                storage_bytes=stored,
            ),
        ),
        status="feasible",
        objective=(Objective(name="latency", value=cycles, bound=cycles, gap=0.0),),
        claims=Claims(
            ram_bytes=RamClaim(
                total=ram, arena=top, weights=weights, optimizer=optimizer,
                accumulators=accumulators, live_peak=max(live), peak_step=live.index(max(live)),
            ),
            flash_bytes=FlashClaim(total=flash + code, weights=flash, code=code),
            storage_bytes=stored,
            cycles=cycles,
            latency_s=cost.latency_s(cycles),
            energy_j=cost.energy_j(cycles, transfer_cycles),
            worn_bytes=worn,
            life_steps=cost.life_steps(worn, max(times.values(), default=1)),
        ),
        regions=regions,
        decisions=Decisions(
            importance_source="tests",
            updates=tuple(decided),
            activations=tuple(
                ActivationDecision(value=v, bytes=n, action=a)  # type: ignore[arg-type]
                for v, (n, a) in actions.items()
            ),
            precision={
                **{n.name: t for n in forward if (t := n.out.type.dtype) in ("f32", "i8")},
                **{
                    layer.name: "i8"
                    for n in forward
                    if n.op == "StreamedBlock"
                    for layer in layers_of(n).nodes
                },
            },
            streamed=tuple(n.name for n in forward if n.op == "StreamedBlock"),
        ),
        buffers=tuple(buffers),
        steps=tuple(steps),
        solver=SolverInfo(name="keep-all", version="0", seed=0, time_s=0.0),
    )  # fmt: skip
