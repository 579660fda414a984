"""The replay cache of a plan: what it keeps is enough, and costs what the plan claims.

Part of the checker (see ``planner.check``). The front runs on an abstract machine; what the
boundary holds then, and nothing else, is given to a second machine that runs the other steps as a
whole training step. The cost formulas of ``planner.replay`` are written here a second time on
purpose.
"""

from __future__ import annotations

from math import ceil, isclose

from ..ir.opdef import Work
from .check_claims import Figures
from .check_machine import Machine
from .check_memory import Range
from .check_program import CheckError, Program, occupied
from .device import Core, Device, Storage
from .plan import Buffer, Replay


def replayed(p: Program, f: Figures, device: Device, core: Core) -> None:
    """Demand that the plan's replay, if there is one, is right and keeps its budgets.

    Raises:
        CheckError: It is not, or does not.
    """
    replay = p.plan.replay
    if replay is None:
        return
    boundary = _boundary(p, replay)
    _frozen(p, replay)
    held = _Front(p, replay.front).hand_on(boundary)
    _Rest(p, replay.front, boundary, held).run()
    storage = _place(p, f, replay, device)
    _claims(p, f, replay, (boundary, storage), device, core)


class _Front(Machine):
    """Runs the front alone."""

    def __init__(self, program: Program, front: int) -> None:
        super().__init__(program)
        self._front = front

    def hand_on(self, boundary: Buffer) -> Range:
        """Run; what the boundary holds in the end."""
        begin = self._begin()
        for index in range(begin, self._front):
            self._step(index, self.program.plan.steps[index])
        held = self._memory.at(boundary)
        if held is None or (boundary.value, 0) not in held.holds:
            raise CheckError(
                f"replay: buffer {boundary.id} is to hold {boundary.value} after {self._front}"
                f" steps, but holds {held or 'nothing whole'}"
            )
        return held


class _Rest(Machine):
    """Runs the other steps; knows nothing of the front but the boundary."""

    def __init__(self, program: Program, front: int, boundary: Buffer, held: Range) -> None:
        super().__init__(program)
        self._front, self._boundary, self._held = front, boundary, held

    def run(self) -> None:
        """Execute a training step from the cache."""
        try:
            super().run()
        except CheckError as e:
            raise CheckError(f"replay: from step {self._front} on with the cache: {e}") from None

    def _begin(self) -> int:
        self._memory.forget("arena")
        self._memory.forget("storage", keep=self.program.home_of)
        steps = range(self._front)
        self._done = {n for i in steps for n in self.program.step_nodes(i)}
        self._write(self._boundary, (self._boundary.value, self._micro))
        held = self._memory.at(self._boundary)
        assert held is not None, self._boundary.id
        held.holds = {(name, self._micro): t for (name, _), t in self._held.holds.items()}
        return self._front


def _boundary(p: Program, replay: Replay) -> Buffer:
    if replay.front >= len(p.plan.steps):
        raise CheckError(f"replay.front is {replay.front} of {len(p.plan.steps)} steps")
    b = p.buffers.get(replay.buffer)
    if b is None or b.space != "arena" or b.value != replay.value:
        raise CheckError(f"replay: {replay.buffer} is no arena buffer of {replay.value}")
    if not b.first < replay.front <= b.last:
        raise CheckError(
            f"replay: buffer {b.id} lives from step {b.first} to {b.last}, not across step"
            f" {replay.front}"
        )
    return b


def _frozen(p: Program, replay: Replay) -> None:
    """The front computes the same for a sample at any time."""
    for i, step in enumerate(p.plan.steps[: replay.front]):
        if step.kind != "compute":
            raise CheckError(f"replay: {p.where(i)} of the front is {step.kind}, not compute")
        for name in step.reads:
            if name is not None and p.buffers[name].space not in ("arena", "flash"):
                raise CheckError(
                    f"replay: {p.where(i)} of the front reads {p.buffers[name].value}, which"
                    " changes from step to step"
                )


def _place(p: Program, f: Figures, replay: Replay, device: Device) -> Storage | None:
    """The storage of the cache, None for RAM; the cache fits there."""
    plan, batch = p.plan, p.plan.model.batch
    size = p.buffers[replay.buffer].bytes
    for name, said, is_ in (
        ("entry_bytes", replay.entry_bytes, size),
        ("cache_bytes", replay.cache_bytes, ceil(replay.samples / batch) * occupied(size)),
    ):
        if said != is_:
            raise CheckError(f"replay.{name} is {said}, but the samples take {is_}")
    named = {r.name: r for r in plan.regions} if replay.place == "ram" else {}
    if (replay.region in named) != bool(named) or (replay.region and not named):
        raise CheckError(f"replay.region: {replay.region or 'none'} is no RAM region of the plan")
    if replay.place == "ram":  # the sum of all is a claim like others
        if named:
            r = named[replay.region]
            used = r.arena + r.state + replay.cache_bytes
            if used > r.budget:
                raise CheckError(
                    f"replay: takes {used} B of {r.name} with the cache, but its budget is"
                    f" {r.budget} B; plan again"
                )
        return None
    if plan.device.storage not in (None, replay.place):
        raise CheckError(
            f"replay.place: {replay.place}, but the plan pages to {plan.device.storage}"
        )
    for storage in device.storage:
        if storage.id == replay.place and (storage.wear is None or storage.wear.levelled):
            used = f.storage_bytes + replay.cache_bytes
            if used > storage.bytes:
                raise CheckError(
                    f"replay: takes {used} B of {storage.id}, which holds {storage.bytes} B"
                )
            return storage
    raise CheckError(
        f"replay.place: {replay.place} is neither ram nor a storage of {device.id} for samples"
    )


def _claims(
    p: Program,
    f: Figures,
    replay: Replay,
    places: tuple[Buffer, Storage | None],
    device: Device,
    core: Core,
) -> None:
    (boundary, storage), clock = places, device.clock_hz.value
    size, micro = occupied(boundary.bytes), p.plan.training.micro_batches
    if storage is None:
        copy = _copy_cycles(p, replay, boundary, device, core)
        write, read = copy, copy
        transfer = 0.0
    else:
        out = storage.write_latency_s.value + size / storage.write_bytes_per_s.value
        into = storage.read_latency_s.value + size / storage.read_bytes_per_s.value
        write, read = ceil(out * clock), ceil(into * clock)
        transfer = storage.power_w.value * micro * (write / replay.epochs + read) / clock
    front = sum(f.cycles[: replay.front])
    capture = micro * (front + write)
    cached = f.total_cycles + micro * (read - front)
    average = cached + ceil(capture / replay.epochs)
    for name, said, is_ in (
        ("capture_cycles", replay.capture_cycles, capture),
        ("cached_cycles", replay.cached_cycles, cached),
        ("average_cycles", replay.average_cycles, average),
    ):
        if said != is_:
            raise CheckError(f"replay.{name} is {said}, but the steps take {is_}")
    if average >= f.total_cycles:
        raise CheckError(f"replay: takes {average} cycles on average, {f.total_cycles} without")
    energy = f.energy_j - device.power_w.value * (f.total_cycles - average) / clock + transfer
    for name, claimed, actual in (
        ("latency_s", replay.latency_s, average / clock),
        ("energy_j", replay.energy_j, energy),
    ):
        if not isclose(claimed, actual, rel_tol=1e-9):
            raise CheckError(f"replay.{name} is {claimed!r}, but the steps take {actual!r}")
    if replay.bound > replay.average_cycles:
        raise CheckError(f"replay.bound is {replay.bound}, above what is reached, {average}")


def _copy_cycles(p: Program, replay: Replay, boundary: Buffer, device: Device, core: Core) -> int:
    """A call that copies an entry, as Concat copies its operands."""
    rate = core.rate(Work("copy", boundary.bytes, operator="Concat"))
    instructions = core.call.value + boundary.bytes * rate.value
    slow = {r.name: r.extra_cycles_per_byte for r in device.ram_runs}
    regions = [r.name for r in p.plan.regions] or [device.main_run.name]
    ends = slow[replay.region or regions[0]] + slow[regions[p.region_of[boundary.id]]]
    cycles = instructions * device.cycles_per_instruction.value + boundary.bytes * ends
    # Less than a millionth of a cycle is the rounding error of this very sum.
    return ceil(round(cycles, 6))
