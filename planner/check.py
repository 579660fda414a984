"""The checker: replays a plan on an abstract machine and trusts none of its figures.

It reads the plan, the training graph and the device, and nothing of the code that made the plan: no
solver, problem, cost, schedule or layout module. In this order it demands that

1. every buffer has the type of its value, is aligned, lies within its space (``check_program``), is
   written once and shares bytes with no other live one, views and in-place results apart
   (``check_layout``);
2. executing the steps on symbols gives every operand in the right version at the right place, each
   chosen parameter is updated exactly once by its own gradient, and nothing else is
   (``check_machine``);
3. every claim is what the steps cost, and the budgets are kept (``check_claims``,
   ``check_paging``);
4. the decisions are what the steps do (``check_decisions``);
5. the steps behind a replayed front need nothing of it but what is kept (``check_replay``).

Reports and drawings are made from its result, never from solver variables.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.training import TrainingGraph
from . import check_claims
from .check_decisions import decisions
from .check_layout import layout
from .check_machine import Machine
from .check_paging import storage_rules
from .check_program import CheckError, Program, resolve
from .check_replay import replayed
from .device import Core, Device, load_core
from .plan import Plan, StepKind

__all__ = ["CheckError", "CheckReport", "Lifetime", "StepReport", "check"]


@dataclass(frozen=True)
class StepReport:
    """One step as the checker saw it.

    Attributes:
        index: Position in the plan.
        kind: Kind of step.
        label: Nodes that run, or the tensor that moves.
        phase: forward, loss, backward, update, recompute or paging.
        live_bytes: Arena bytes live during the step.
        cycles: Predicted cycles of the core, in the last micro-step.
        transfer_bytes: Bytes paged.
    """

    index: int
    kind: StepKind
    label: str
    phase: str
    live_bytes: int
    cycles: int
    transfer_bytes: int


@dataclass(frozen=True)
class Lifetime:
    """One stay of a tensor in the arena: a rectangle in the memory picture.

    Attributes:
        buffer: Buffer id.
        value: Value name, or ``tile:`` / ``workspace:`` scratch.
        offset: First byte.
        bytes: Size.
        first: First step.
        last: Last step, inclusive.
        phase: Phase of the step that writes it.
    """

    buffer: str
    value: str
    offset: int
    bytes: int
    first: int
    last: int
    phase: str


@dataclass(frozen=True)
class CheckReport:
    """What a checked plan does.

    Attributes:
        steps: Every step.
        lifetimes: Every stay of a tensor in the arena.
        arena_bytes: Bytes of the arena.
        state_bytes: Bytes of updated weights, optimizer tensors and accumulators.
        live_peak_bytes: Largest sum of live arena bytes.
        peak_step: First step where it is reached.
        cycles: Cycles of a training step (all its micro-steps).
        latency_s: Seconds of a training step.
        energy_j: Joules of a training step.
        transfer_cycles: Cycles of a training step in which a page transfer is under way.
        storage_bytes: Bytes of storage in use.
        worn_bytes: Bytes of storage that a training step wears, in whole erase units.
        life_steps: Training steps until the storage is worn out; None: nothing wears.
        flash_weights_bytes: Bytes of constants.
        phase_cycles: Cycles of a training step by phase.
    """

    steps: tuple[StepReport, ...]
    lifetimes: tuple[Lifetime, ...]
    arena_bytes: int
    state_bytes: int
    live_peak_bytes: int
    peak_step: int
    cycles: int
    latency_s: float
    energy_j: float
    transfer_cycles: int
    storage_bytes: int
    worn_bytes: int
    life_steps: int | None
    flash_weights_bytes: int
    phase_cycles: dict[str, int]


def check(
    plan: Plan, training: TrainingGraph, device: Device, core: Core | None = None
) -> CheckReport:
    """Replay a plan.

    Args:
        plan: The plan under check.
        training: The training graph of the chosen updates.
        device: The device that the plan was made for.
        core: The device's core; None: the bundled spec.

    Raises:
        CheckError: The plan breaks a rule, exceeds a budget or claims what it does not do.
    """
    if plan.device.id != device.id:
        raise CheckError(
            f"the plan is for device {plan.device.id}, not {device.id}; plan again for {device.id}"
        )
    program = resolve(plan, training)
    layout(program)
    machine = Machine(program)
    machine.run()
    figures = check_claims.measure(program, device, core or load_core(device.core))
    storage_rules(program, device)
    check_claims.compare(program, figures)
    decisions(program, machine)
    replayed(program, figures, device, core or load_core(device.core))
    peak = max(figures.live_bytes)
    return CheckReport(
        steps=tuple(
            StepReport(
                i,
                step.kind,
                program.label(i),
                figures.parts[i],
                figures.live_bytes[i],
                figures.cycles[i],
                figures.transfer_bytes[i],
            )
            for i, step in enumerate(plan.steps)
        ),
        lifetimes=_arena(program, figures.parts),
        arena_bytes=figures.arena_bytes,
        state_bytes=sum(figures.state_bytes.values()),
        live_peak_bytes=peak,
        peak_step=figures.live_bytes.index(peak),
        cycles=figures.total_cycles,
        latency_s=figures.latency_s,
        energy_j=figures.energy_j,
        transfer_cycles=figures.transfer_cycles,
        storage_bytes=figures.storage_bytes,
        worn_bytes=figures.worn_bytes,
        life_steps=figures.life_steps,
        flash_weights_bytes=figures.flash_weights_bytes,
        phase_cycles=figures.part_cycles,
    )


def _arena(program: Program, parts: tuple[str, ...]) -> tuple[Lifetime, ...]:
    return tuple(
        Lifetime(b.id, b.value, b.offset, b.bytes, b.first, b.last, parts[b.first])
        for b in program.plan.buffers
        if b.space == "arena"
    )
