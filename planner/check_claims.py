"""The figures of a plan, computed again from its steps and the device.

Part of the checker (see ``planner.check``). The cost formulas of ``planner.cost`` are written here
a second time on purpose: a mistake in one of them shows as a disagreement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, isclose

from ..ir.graph import Node, TensorType
from ..ir.opdef import Work, get_op
from .check_paging import core_cycles, storage_end, wear
from .check_program import CheckError, Program, occupied
from .device import Core, Device, Storage
from .plan import CODE_BYTES_PER_KERNEL, CODE_BYTES_PER_STEP, Step

#: Parts of a training step that cycles are reported for.
PARTS = ("forward", "loss", "backward", "update", "recompute", "paging")


@dataclass(frozen=True)
class Figures:
    """What a plan costs.

    Attributes:
        cycles: Of the core, per step, in the last micro-step.
        transfer_bytes: Bytes that each step pages.
        live_bytes: Arena bytes live at each step.
        parts: Part of the training step (``PARTS``) that each step belongs to.
        part_cycles: Cycles per training step by part.
        total_cycles: Cycles per training step.
        latency_s: Seconds per training step.
        energy_j: Joules per training step.
        arena_bytes: End of the highest arena buffer.
        region_bytes: End of the highest arena buffer in each region, from the begin of its part.
        transfer_cycles: Cycles per training step in which a page transfer is under way.
        storage_bytes: End of the highest storage buffer, in whole erase units where it has them.
        worn_bytes: Bytes of storage that a training step wears.
        life_steps: Training steps that wear the storage out; None: nothing wears.
        flash_weights_bytes: All constants.
        flash_code_bytes: Kernels and schedule (estimated).
        state_bytes: Bytes by kind: weights, optimizer, accumulators.
    """

    cycles: tuple[int, ...]
    transfer_bytes: tuple[int, ...]
    live_bytes: tuple[int, ...]
    parts: tuple[str, ...]
    part_cycles: dict[str, int]
    total_cycles: int
    latency_s: float
    energy_j: float
    arena_bytes: int
    region_bytes: tuple[int, ...]
    transfer_cycles: int
    storage_bytes: int
    worn_bytes: int
    life_steps: int | None
    flash_weights_bytes: int
    flash_code_bytes: int
    state_bytes: dict[str, int]


def measure(p: Program, device: Device, core: Core) -> Figures:
    """Compute every figure of a plan from its steps, its buffers and the device.

    Raises:
        CheckError: The plan pages to a storage that the device lacks.
    """
    storage, slowness = _storage(p, device), _slowness(p, device)
    work, moved = [], []
    for i, step in enumerate(p.plan.steps):
        n_bytes = cycles = 0
        if step.kind in ("page_out", "page_in", "page_wait"):
            if storage is None:
                raise CheckError(f"{p.where(i)}: pages, but the plan has no storage")
            if step.overlapped and not (storage.dma and storage.dma.value):
                raise CheckError(f"{p.where(i)}: overlaps, but {storage.id} has no DMA")
            if step.kind != "page_wait":
                n_bytes = occupied(p.buffers[step.writes[0]].bytes)
                cycles = _transfer_cycles(n_bytes, storage, step.kind == "page_out", device)
        else:
            cycles = _compute_cycles(p.step_nodes(i), step, device, core)
            cycles += _slow_memory_cycles(p, i, slowness)
        work.append(cycles)
        moved.append(n_bytes)
    parts = [_part(p, i) for i in range(len(work))]
    last = core_cycles(p.plan.steps, work, last=True)
    others = core_cycles(p.plan.steps, work, last=False)
    part_cycles = dict.fromkeys(PARTS, 0)
    more = p.plan.training.micro_batches - 1
    for part, final, other in zip(parts, last, others, strict=True):
        part_cycles[part] += final + more * other
    total = sum(part_cycles.values())
    bus = sum(
        c * (1 if step.last_micro else more + 1)
        for c, part, step in zip(work, parts, p.plan.steps, strict=True)
        if part == "paging"
    )
    clock = device.clock_hz.value
    energy = device.power_w.value * (total / clock)
    if storage is not None:
        energy += storage.power_w.value * (bus / clock)
    worn_bytes, life = wear(p, storage)
    state = dict.fromkeys(("weights", "optimizer", "accumulators"), 0)
    for value, kind in p.resident.items():
        state[kind] += occupied(p.training.graph.values[value].type.nbytes)
    constants = [p.training.graph.values[name].type for name in p.training.graph.constants]
    return Figures(
        cycles=tuple(last),
        transfer_bytes=tuple(moved),
        live_bytes=_live(p),
        parts=tuple(parts),
        part_cycles=part_cycles,
        total_cycles=total,
        latency_s=total / clock,
        energy_j=energy,
        arena_bytes=_end(p, "arena"),
        region_bytes=_region_ends(p),
        transfer_cycles=bus,
        storage_bytes=storage_end(p, storage),
        worn_bytes=worn_bytes,
        life_steps=life,
        flash_weights_bytes=sum(occupied(t.nbytes) for t in constants),
        flash_code_bytes=_code_bytes(p),
        state_bytes=state,
    )


def _storage(p: Program, device: Device) -> Storage | None:
    name = p.plan.device.storage
    if name is None:
        return None
    for s in device.storage:
        if s.id == name and s.region is not None and not (s.allow_paging and s.allow_paging.value):
            raise CheckError(f"device {device.id} does not allow paging to its own flash, {name}")
        if s.id == name:
            return s
    raise CheckError(f"device {device.id} has no storage {name}")


def _slowness(p: Program, device: Device) -> list[float]:
    """Extra cycles per byte of each region of the plan; without any it is the largest run."""
    runs = {r.name: r for r in device.ram_runs}
    if not p.plan.regions:
        return [device.main_run.extra_cycles_per_byte]
    for r in p.plan.regions:
        if r.name not in runs:
            raise CheckError(f"device {device.id} has no RAM region {r.name}")
    return [runs[r.name].extra_cycles_per_byte for r in p.plan.regions]


def _slow_memory_cycles(p: Program, index: int, slowness: list[float]) -> int:
    """What the bytes of operands, results and scratch cost a kernel in slow regions."""
    step = p.plan.steps[index]
    if get_op(p.step_nodes(index)[0].op).view:
        return 0
    touched = [0] * len(slowness)
    for name in (*step.reads, *step.writes, step.workspace, step.tile):
        if name is not None and name in p.region_of:
            touched[p.region_of[name]] += p.buffers[name].bytes
    # Less than a millionth of a cycle is the rounding error of this very sum.
    return ceil(round(sum(n * more for n, more in zip(touched, slowness, strict=True)), 6))


def _part(p: Program, index: int) -> str:
    step = p.plan.steps[index]
    if step.kind in ("page_out", "page_in", "page_wait"):
        return "paging"
    if step.kind == "update":
        return "update"
    return "recompute" if step.recompute else p.step_nodes(index)[0].phase


def _transfer_cycles(n_bytes: int, storage: Storage, write: bool, device: Device) -> int:
    if write:
        seconds = storage.write_latency_s.value + n_bytes / storage.write_bytes_per_s.value
    else:
        seconds = storage.read_latency_s.value + n_bytes / storage.read_bytes_per_s.value
    return ceil(seconds * device.clock_hz.value)


def _compute_cycles(nodes: list[Node], step: Step, device: Device, core: Core) -> int:
    if get_op(nodes[0].op).view:
        return 0
    instructions = 0.0
    for node in nodes:
        op = get_op(node.op)
        if step.tile_rows and op.tiled_work is not None:
            work: Work | tuple[Work, ...] = op.tiled_work(node, step.tile_rows)
        else:
            work = op.work(node)
        for part in work if isinstance(work, tuple) else (work,):
            rate = core.rate(replace(part, operator=part.operator or node.op))
            made = part.outputs if part.outputs is not None else node.out.type.size
            instructions += part.amount * rate.value + part.passes * rate.per_pass
            instructions += part.loops * rate.per_loop + made * rate.per_output
    calls = 1
    if len(nodes) == 2:
        calls = 2 * ceil(_rows(nodes[0].out.type) / step.tile_rows)
    instructions += calls * core.call.value
    # Less than a millionth of a cycle is the rounding error of this very sum.
    return ceil(round(instructions * device.cycles_per_instruction.value, 6))


def _rows(t: TensorType) -> int:
    return t.shape[0] if t.shape else 1


def _live(p: Program) -> tuple[int, ...]:
    """Arena bytes live at each step; buffers at one offset are one chain and count once."""
    live: list[dict[int, int]] = [{} for _ in p.plan.steps]
    for b in p.plan.buffers:
        if b.space == "arena":
            for held in live[b.first : b.last + 1]:
                held[b.offset] = max(held.get(b.offset, 0), occupied(b.bytes))
    return tuple(sum(held.values()) for held in live)


def _end(p: Program, space: str) -> int:
    return max(
        (b.offset + occupied(b.bytes) for b in p.plan.buffers if b.space == space), default=0
    )


def _region_ends(p: Program) -> tuple[int, ...]:
    parts = p.plan.parts("arena")
    tops = [part.begin for part in parts]
    for b in p.plan.buffers:
        if b.space == "arena":
            r = p.region_of[b.id]
            tops[r] = max(tops[r], b.offset + occupied(b.bytes))
    return tuple(top - part.begin for top, part in zip(tops, parts, strict=True))


def _code_bytes(p: Program) -> int:
    nodes = {n for i in range(len(p.plan.steps)) for n in p.step_nodes(i)}
    symbols = {c.symbol for n in nodes if (c := get_op(n.op).c) is not None}
    return CODE_BYTES_PER_KERNEL * len(symbols) + CODE_BYTES_PER_STEP * len(p.plan.steps)


def compare(p: Program, f: Figures) -> None:
    """Compare the plan's claims with the figures, and both with the budget.

    Raises:
        CheckError: A claim is not what the plan costs, or a budget is exceeded.
    """
    for i, (step, cycles) in enumerate(zip(p.plan.steps, f.cycles, strict=True)):
        if step.cycles != cycles:
            raise CheckError(f"{p.where(i)}: claims {step.cycles} cycles, takes {cycles}")
    claims, budget = p.plan.claims, p.plan.device.budget
    ram, flash = claims.ram_bytes, claims.flash_bytes
    peak = max(f.live_bytes)
    ram_total = f.arena_bytes + sum(f.state_bytes.values()) + p.plan.replay_bytes("ram")
    flash_total = f.flash_weights_bytes + f.flash_code_bytes
    for name, said, is_ in (
        ("ram_bytes.arena", ram.arena, f.arena_bytes),
        ("ram_bytes.weights", ram.weights, f.state_bytes["weights"]),
        ("ram_bytes.optimizer", ram.optimizer, f.state_bytes["optimizer"]),
        ("ram_bytes.accumulators", ram.accumulators, f.state_bytes["accumulators"]),
        ("ram_bytes.total", ram.total, ram_total),
        ("ram_bytes.live_peak", ram.live_peak, peak),
        ("ram_bytes.peak_step", ram.peak_step, f.live_bytes.index(peak)),
        ("flash_bytes.weights", flash.weights, f.flash_weights_bytes),
        ("flash_bytes.code", flash.code, f.flash_code_bytes),
        ("flash_bytes.total", flash.total, flash_total),
        ("storage_bytes", claims.storage_bytes, f.storage_bytes),
        ("worn_bytes", claims.worn_bytes, f.worn_bytes),
        ("life_steps", claims.life_steps, f.life_steps),
        ("cycles", claims.cycles, f.total_cycles),
    ):
        if said != is_:
            raise CheckError(f"claims.{name} is {said}, but the steps take {is_}")
    for r, top in zip(p.plan.regions, f.region_bytes, strict=False):
        if r.arena != top:
            raise CheckError(f"regions: {r.name} claims {r.arena} B of arena, but takes {top} B")
        if r.arena + r.state > r.budget:
            raise CheckError(
                f"takes {r.arena + r.state} B of {r.name}, but its budget is {r.budget} B;"
                " plan again"
            )
    for name, claimed, actual in (
        ("latency_s", claims.latency_s, f.latency_s),
        ("energy_j", claims.energy_j, f.energy_j),
    ):
        if not isclose(claimed, actual, rel_tol=1e-9):
            raise CheckError(f"claims.{name} is {claimed!r}, but the steps take {actual!r}")
    for name, used, limit in (
        ("ram_bytes", ram_total, budget.ram_bytes),
        ("flash_bytes", flash_total, budget.flash_bytes),
        ("storage_bytes", f.storage_bytes, budget.storage_bytes),
        ("latency_s", f.latency_s, budget.latency_s),
        ("energy_j", f.energy_j, budget.energy_j),
    ):
        if limit is not None and used > limit:
            raise CheckError(f"takes {used} of {name}, but the budget is {limit}; plan again")
    lasts, steps = f.life_steps, budget.min_steps
    if lasts is not None and steps is not None and lasts < steps:
        raise CheckError(
            f"wears the storage out in {lasts} steps, but it has to last {steps}; plan again"
        )
