"""The replay cache: the frozen front of the network runs once per sample, training goes on from it.

On-device training uses the same few samples for several epochs. Steps that depend on nothing that
training changes give the same results every time; where the others need one tensor of them, that
tensor is kept, per micro-batch, and the front runs once. See docs/design.md, Replay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from ..ir.errors import UsageError
from ..ir.opdef import Work, get_op
from ..ir.training import TrainingGraph
from .cost import CostModel
from .device import Device
from .plan import Buffer, Plan, Replay, part_of
from .tensors import aligned

#: A place of the cache that is no storage.
RAM = "ram"
#: More samples or epochs are a mistake.
MOST_SAMPLES, MOST_EPOCHS = 10**9, 10**6


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        samples: Samples that are kept.
        epochs: How often training uses each of them.
        place: ``ram`` or a storage of the device; None: the RAM that is left, or the storage that
            the plan may page to, whichever is better.
    """

    samples: int
    epochs: int = 10
    place: str | None = None

    def __post_init__(self) -> None:
        """Reject what can't be meant."""
        if not 1 <= self.samples <= MOST_SAMPLES:
            raise UsageError(f"--replay: {self.samples:,} samples can't be kept; give 100, say")
        if not 2 <= self.epochs <= MOST_EPOCHS:
            raise UsageError(
                f"--epochs: {self.epochs:,}: from 2 epochs on there is something to replay"
            )


@dataclass(frozen=True)
class Cut:
    """A place in the schedule where one tensor is all that the later steps need.

    Attributes:
        front: Number of steps before it.
        boundary: Buffer that is kept.
        cycles: Of the front, per micro-step.
    """

    front: int
    boundary: Buffer
    cycles: int


@dataclass(frozen=True)
class Place:
    """Where a cache may lie.

    Attributes:
        name: ``ram`` or the id of a storage.
        region: RAM region, where the plan names any.
        room_bytes: What is free there.
    """

    name: str
    region: str
    room_bytes: int


def cuts(plan: Plan) -> list[Cut]:
    """All cuts whose front does not depend on what training changes, by rising length."""
    buffers = {b.id: b for b in plan.buffers}
    passing = [b for b in plan.buffers if b.space == "arena"]  # a front pages nothing
    found: list[Cut] = []
    cycles = 0
    for k, step in enumerate(plan.steps[:-1], 1):
        read = {buffers[b].space for b in step.reads if b is not None}
        if step.kind != "compute" or not read <= {"arena", "flash"}:
            break
        cycles += step.cycles
        live = [b for b in passing if b.first < k <= b.last]
        if live and len({(b.offset, b.bytes) for b in live}) == 1:
            found.append(Cut(k, max(live, key=lambda b: b.first), cycles))
    return found


def with_replay(
    plan: Plan, training: TrainingGraph, wanted: Wanted, cost: CostModel
) -> tuple[Plan, str]:
    """The plan with the best cache, or as it was and one line that tells why there is none.

    The least average of cycles wins, then the smaller cache, then RAM.
    """
    found = cuts(plan)
    if not any(c.cycles for c in found):
        return plan, _nothing_frozen(plan, training)
    places = list(_places(plan, cost, wanted.place))
    offers = [_offer(plan, cut, place, wanted, cost) for cut in found for place in places]
    pays = [(o, p) for o, p in offers if o.average_cycles < plan.claims.cycles]
    fits = [o for o, p in pays if o.cache_bytes <= p.room_bytes]
    if not pays:
        return plan, f"copies take longer than what {wanted.epochs} epochs would save"
    if not fits:
        return plan, _too_large(pays, plan, cost)
    best = min(fits, key=lambda o: (o.average_cycles, o.cache_bytes))
    best = best.model_copy(update={"bound": bound(plan, training, cost, wanted.epochs)})
    ram = plan.claims.ram_bytes
    if best.place == RAM:
        ram = ram.model_copy(update={"total": ram.total + best.cache_bytes})
    claims = plan.claims.model_copy(update={"ram_bytes": ram})
    return plan.model_copy(update={"replay": best, "claims": claims}), ""


def bound(plan: Plan, training: TrainingGraph, cost: CostModel, epochs: int) -> float:
    """Cycles that no cache and no schedule of this training graph undercut on average.

    All that depends on parameters that are updated runs in every step, all else at least once per
    sample; nothing is copied, paged or computed again.
    """
    constant = {training.graph.values[n] for n in training.graph.constants}
    same = (constant - {u.value for u in training.updates}) | {*training.samples}
    for node in training.graph.nodes:
        if node.phase == "forward" and all(v in same for v in node.operands()):
            same.update(node.outputs)
    nodes = {n.name: n for n in training.graph.nodes}
    update_of = {n: u for u in training.updates for n in (u.apply_node, u.accumulate_node) if n}
    micro, often, once = training.spec.micro_batches, 0, 0
    for step in plan.steps:
        if step.kind == "update":
            final = nodes[step.nodes[-1]]
            if step.last_micro:
                often += cost.node_cycles(final)
            else:
                often += micro * cost.update_cycles(update_of[final])
        elif step.kind == "compute" and not step.recompute:
            node = nodes[step.nodes[0]]
            if all(v in same for v in node.outputs):
                once += micro * cost.node_cycles(node)
            else:
                often += micro * cost.node_cycles(node)
    return often + once / epochs


def storages(device: Device) -> list[str]:
    """Storages that can hold a cache: those where nobody has to look after erase units."""
    return [s.id for s in device.storage if s.wear is None or s.wear.levelled]


def _places(plan: Plan, cost: CostModel, wanted: str | None) -> Iterator[Place]:
    """RAM first."""
    ram, device = plan.claims.ram_bytes, plan.device
    if wanted in (None, RAM):
        for r in plan.regions:
            yield Place(RAM, r.name, r.budget - r.arena - r.state)
        if not plan.regions:
            yield Place(RAM, "", device.budget.ram_bytes - ram.total)
    name = device.storage if wanted is None else wanted
    if name in storages(cost.device):
        yield Place(name, "", cost.device.find_storage(name).bytes - plan.claims.storage_bytes)


def _offer(
    plan: Plan, cut: Cut, place: Place, wanted: Wanted, cost: CostModel
) -> tuple[Replay, Place]:
    """A cache at a place; whether it fits is not asked."""
    micro, claims = plan.training.micro_batches, plan.claims
    size = cut.boundary.bytes
    transfer = 0.0
    if place.name == RAM:
        write = read = _copy_cycles(plan, cut.boundary, place, cost)
    else:
        storage = cost.device.find_storage(place.name)
        there = CostModel(cost.device, cost.core, storage)
        write, read = there.write_cycles(aligned(size)), there.read_cycles(aligned(size))
        share = micro * (write / wanted.epochs + read)
        transfer = storage.power_w.value * share / cost.device.clock_hz.value
    capture = micro * (cut.cycles + write)
    cached = claims.cycles + micro * (read - cut.cycles)
    average = cached + ceil(capture / wanted.epochs)
    saved = cost.energy_j(claims.cycles, 0) - cost.energy_j(average, 0)
    replay = Replay(
        samples=wanted.samples,
        epochs=wanted.epochs,
        place=place.name,
        region=place.region,
        front=cut.front,
        value=cut.boundary.value,
        buffer=cut.boundary.id,
        entry_bytes=size,
        cache_bytes=-(-wanted.samples // plan.model.batch) * aligned(size),
        capture_cycles=capture,
        cached_cycles=cached,
        average_cycles=average,
        bound=0.0,
        latency_s=cost.latency_s(average),
        energy_j=claims.energy_j - saved + transfer,
    )
    return replay, place


def _copy_cycles(plan: Plan, boundary: Buffer, place: Place, cost: CostModel) -> int:
    """Copying an entry from one place in RAM to another; Concat is measured doing that."""
    slow = {r.name: r.extra_cycles_per_byte for r in cost.device.ram_runs}
    here = cost.device.main_run.name
    if plan.regions:
        part = part_of(plan.parts("arena"), boundary.offset, boundary.offset + boundary.bytes)
        here = plan.regions[part].name
    per_byte = slow[here] + slow[place.region or here]
    rate = cost.core.rate(Work("copy", boundary.bytes, operator="Concat"))
    instructions = cost.core.call.value + boundary.bytes * rate.value
    cycles = instructions * cost.device.cycles_per_instruction.value + boundary.bytes * per_byte
    return ceil(round(cycles, 6))


def _nothing_frozen(plan: Plan, training: TrainingGraph) -> str:
    spaces = {b.id: b.space for b in plan.buffers}
    nodes = {n.name: n for n in training.graph.nodes}
    for step in plan.steps:
        if "state" in {spaces[b] for b in step.reads if b is not None}:
            return "training changes the first layer, so nothing of a sample stays the same"
        if step.kind != "compute" or get_op(nodes[step.nodes[0]].op).params:
            break
    return "no single tensor holds all that the frozen layers hand on"


def _too_large(offers: Sequence[tuple[Replay, Place]], plan: Plan, cost: CostModel) -> str:
    """What the smallest cache lacks, and how many samples fit."""
    small, place = min(offers, key=lambda o: o[0].cache_bytes - o[1].room_bytes)
    where = {RAM: f"RAM{f' ({place.region})' if place.region else ''}"}.get(place.name, place.name)
    fit = max(0, place.room_bytes) // small.stride * plan.model.batch
    fewer = f"--replay {fit:,} fits" if fit else "not one sample fits"
    others = [s for s in storages(cost.device) if plan.device.storage in (None, s)]
    other = f"; or --replay-in {' or '.join(others)}" if others and place.name == RAM else ""
    return (
        f"{small.samples:,} samples take {small.cache_bytes:,} B ({small.value}), but {where} has"
        f" {max(0, place.room_bytes):,} B left; {fewer}{other}"
    )
