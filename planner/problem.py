"""The planning problem: a timeline of candidate slots with integer costs, free of any solver.

Timeline: the forward nodes in order, the loss, then the backward and update steps in order. Before
a backward step that reads forward tensors stand optional *rebuild* slots: the writers of those
tensors and of the tensors that they are computed from. Each slot has an activity: always, chosen by
an update candidate, needed by active readers, an optional auxiliary node in forward, or a rebuild.
Two more choices change what slots cost: a layer of the i8 graph may be mixed (f32 weights), and a
block of frozen layers may be streamed by rows. ``planner.timeline`` lays it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..ir.graph import Node
from ..ir.training import TrainingGraph, Update
from .cost import CostModel
from .tensors import Storage, Tensor, aligned

#: Index of the activity that always holds.
ALWAYS = 0
LeftOut = Literal["all", "some"]
ActivityKind = Literal["always", "update", "needed", "auxiliary", "rebuild", "mixed", "streamed"]


@dataclass(frozen=True)
class Activity:
    """Whether slots run: 1 (always) or a 0/1 decision.

    Attributes:
        index: Position in ``Problem.activities``.
        kind: ``always``; ``update`` (its update is chosen); ``needed`` (at least one of
            ``implied_by`` is active); ``auxiliary`` (run in forward, or left to a rebuild);
            ``rebuild``; ``mixed`` (a layer has f32 weights); ``streamed`` (a block runs by rows).
        implied_by: Activities that force a ``needed`` activity.
        updates: Those of an ``update`` activity: one, or both of an adapter.
        tensor: The tensor that an ``auxiliary`` or ``rebuild`` activity writes.
    """

    index: int
    kind: ActivityKind
    implied_by: tuple[int, ...] = ()
    updates: tuple[Update, ...] = ()
    tensor: Tensor | None = None


@dataclass(frozen=True)
class Form:
    """What a slot costs where its layer is mixed.

    Attributes:
        choice: Activity of the layer's choice.
        cycles: Instead of the slot's.
        scratch_bytes: Instead of the slot's.
        kernels: Instead of the slot's.
    """

    choice: int
    cycles: int
    scratch_bytes: int
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class SplitCost:
    """What a slot costs more where an update has split the weight that it reads.

    Attributes:
        update: Activity of the update.
        cycles: More than the slot's.
        mixed_cycles: More than those of its mixed form.
    """

    update: int
    cycles: int
    mixed_cycles: int


@dataclass(frozen=True)
class Slot:
    """One candidate execution of a node or of an update step.

    Attributes:
        index: Position in the timeline.
        node: Executed node; for an update step its apply (or accumulate) node.
        update: Set for update steps.
        activity: Index of its activity.
        reads: Arena tensors read.
        writes: Arena tensors written.
        scratch_bytes: Workspace and gradient tile, aligned.
        cycles: Predicted cycles per training step (all micro-steps together).
        kernels: C kernels that it calls.
        mixed: Its costs if its layer is mixed; None: no choice.
        split: What partial updates add to its cycles; needed under limits of time only.
        rebuild: It runs a forward node again (or, for an auxiliary node, for the first time).
        last_micro: Runs only in the last micro-step.
    """

    index: int
    node: Node
    update: Update | None
    activity: int
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    scratch_bytes: int
    cycles: int
    kernels: tuple[str, ...]
    mixed: Form | None = None
    split: tuple[SplitCost, ...] = ()
    rebuild: bool = False
    last_micro: bool = False

    @property
    def largest_bytes(self) -> int:
        """Of the largest buffer that it reads, writes or keeps."""
        sizes = [t.bytes for t in (*self.reads, *self.writes)]
        if self.update is not None:
            sizes += [aligned(v.type.nbytes) for v in self.update.resident]
        return max(sizes, default=0)


@dataclass(frozen=True)
class Event:
    """A slot that reads or completes a forward tensor after its fixed window.

    Attributes:
        slot: Timeline position.
        activity: Activity of that slot.
        writes: The tensor is complete after this slot (else it is read).
        begin: For writes: first slot of the rebuild, from which the bytes are occupied.
        may_load: A page-in right before this slot is offered.
    """

    slot: int
    activity: int
    writes: bool
    begin: int
    may_load: bool


@dataclass(frozen=True)
class Retention:
    """A forward tensor that backward may read, and where it can be kept, rebuilt or loaded.

    Attributes:
        tensor: The tensor.
        window: First and last slot where it is live anyway (None for an auxiliary tensor).
        events: Later reads and rebuilds in timeline order.
        page_out_activity: Activity that must hold for a page-out (the first completion).
    """

    tensor: Tensor
    window: tuple[int, int] | None
    events: tuple[Event, ...]
    page_out_activity: int


@dataclass(frozen=True)
class Transient:
    """A tensor that is made once and dies after its last active reader (gradients, loss).

    Attributes:
        tensor: The tensor.
        begin: First writing slot.
        segments: (last slot, activities) in order: up to that slot the tensor is live if any of the
            activities holds.
    """

    tensor: Tensor
    begin: int
    segments: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Overwrite:
    """A result that takes its operand's bytes over where nothing else is to read the operand.

    Attributes:
        slot: Position of the slot that computes it; operand and result are both live there.
        operand: As large as the result.
        unless: Activities, none of which may hold: without them nothing else reads the operand.
    """

    slot: int
    operand: Tensor
    unless: tuple[int, ...]


@dataclass(frozen=True)
class PagedState:
    """Optimizer tensors of an update that live in storage, read before its step and written behind.

    In the arena they are transients of that step.

    Attributes:
        activity: Of the update.
        cycles: Of all transfers, per training step.
        stored_bytes: Of storage.
        worn_bytes: Of storage, per training step.
        steps: Steps of the plan that move them.
    """

    activity: int
    cycles: int
    stored_bytes: int
    worn_bytes: int
    steps: int


def paged_state(activity: int, sizes: Sequence[int], cost: CostModel) -> PagedState:
    """Of optimizer tensors of these bytes."""
    return PagedState(
        activity,
        sum(cost.read_cycles(n) + cost.write_cycles(n) for n in sizes),
        sum(cost.stored_bytes(n) for n in sizes),
        sum(cost.worn_bytes(n) for n in sizes),
        2 * len(sizes) * cost.steps_per_transfer,
    )


def together(states: Iterable[PagedState]) -> PagedState:
    """What several take together, whatever their activities."""
    found = list(states)
    return PagedState(
        ALWAYS,
        sum(s.cycles for s in found),
        sum(s.stored_bytes for s in found),
        sum(s.worn_bytes for s in found),
        sum(s.steps for s in found),
    )


@dataclass(frozen=True)
class Constant:
    """Weights in flash that are there if something reads them.

    Attributes:
        bytes: Aligned size.
        readers: Activities of what reads it.
        absent: Activity of a layer's choice that replaces it; None: none does.
    """

    bytes: int
    readers: tuple[int, ...]
    absent: int | None = None


@dataclass(frozen=True)
class MixedLayer:
    """A layer that may have f32 weights on i8 activations instead of i8 weights.

    Attributes:
        name: The layer.
        activity: Holds if it is mixed.
        gain: Score of the quantization noise that its f32 weights avoid.
        flash_bytes: Flash of its constants that this adds.
        excludes: Activities that compute the layer again, as i8.
    """

    name: str
    activity: int
    gain: int
    flash_bytes: int
    excludes: tuple[int, ...]


@dataclass(frozen=True)
class MixedUpdate:
    """What an update adds if its layer is mixed.

    Attributes:
        activity: Of the update.
        choice: Activity of the layer's choice.
        state_bytes: RAM kept for good beyond that of the i8 update.
        gain: Importance beyond that of the i8 update.
        flash_bytes: Padding of the weight's parts in flash beyond that of the i8 update.
    """

    activity: int
    choice: int
    state_bytes: int
    gain: int
    flash_bytes: int


@dataclass(frozen=True)
class StreamChoice:
    """A block of frozen i8 layers that may run by rows, in place of its slots.

    Attributes:
        name: The block.
        activity: Holds if it is streamed.
        slots: Forward slots that it replaces; it runs in the first of them.
        inner: Tensors that it never holds.
        result: Its result, live from the first slot on; None where that takes over its operand.
        frees: Its operand where the result takes over its bytes from the second slot on.
        scratch_bytes: Line buffers, and the result where that can't take over the operand.
        cycles: Predicted cycles per training step.
        kernels: C kernels that it calls.
        excludes: Activities that need something inside of it.
    """

    name: str
    activity: int
    slots: tuple[int, ...]
    inner: tuple[Tensor, ...]
    result: Tensor | None
    frees: Tensor | None
    scratch_bytes: int
    cycles: int
    kernels: tuple[str, ...]
    excludes: tuple[int, ...]


@dataclass(frozen=True)
class Forced:
    """A decision that is given instead of chosen.

    Attributes:
        activities: Activities of which at least one holds, or none does.
        holds: At least one of them does.
    """

    activities: tuple[int, ...]
    holds: bool


@dataclass(frozen=True)
class RamRegion:
    """A RAM region, of which a buffer lies in one only.

    Attributes:
        name: In the device's spec.
        bytes: What the plan may use of it.
        extra_cycles_per_byte: What a byte there costs a kernel more, see ``planner.device.Region``.
    """

    name: str
    bytes: int
    extra_cycles_per_byte: float = 0.0


@dataclass(frozen=True)
class Limits:
    """Budgets of one training step; None where there is no limit.

    Attributes:
        ram_bytes: Arena + state, over all regions.
        flash_bytes: Weights + code.
        cycles: Latency limit in cycles.
        energy_j: Energy limit.
        storage_bytes: Capacity for paging.
        regions: Where buffers can lie, preferred ones first; empty for one region without extra
            cycles.
        worn_bytes: Of storage, per training step.
        wait_for_transfers: Count every page transfer in full, even where it runs beside the core:
            what a schedule takes is then no more than what the model says.
    """

    ram_bytes: int
    flash_bytes: int
    cycles: int | None = None
    energy_j: float | None = None
    storage_bytes: int = 0
    regions: tuple[RamRegion, ...] = ()
    worn_bytes: int | None = None
    wait_for_transfers: bool = False

    @property
    def largest_bytes(self) -> int:
        """The most that one buffer can have."""
        return max((r.bytes for r in self.regions), default=self.ram_bytes)

    def in_one_region(self, ram_bytes: int) -> Limits:
        """With one RAM region of this size."""
        return replace(self, ram_bytes=ram_bytes, regions=())


@dataclass(frozen=True)
class Problem:
    """Everything the solvers need; see the module docstring.

    Attributes:
        training: The training graph (superset or specialised).
        storage: Its storage tensors.
        slots: The timeline.
        activities: Decisions and constants about slots.
        retentions: Forward tensors with choices.
        transients: Tensors without choices.
        fixed: (first slot, last slot, tensor) of forward tensors that backward never reads.
        overwrites: Results that may take over their operand's bytes; at most one per slot does.
        limits: Budgets.
        choices: Parameter -> activities of its candidates, those of a weight's adapter included
            (at most one may hold).
        gain: Activity of an update -> importance.
        state_bytes: Activity of an update -> RAM kept for good.
        flash_bytes: Activity of an update -> flash that splitting its weight adds (padding).
        paged_states: Updates whose optimizer tensors are in storage.
        constants: Weights in flash.
        mixed_layers: Layers whose precision is to be chosen.
        mixed_updates: Their updates.
        streams: Blocks that may be streamed.
        cost: Cost model.
        micro_batches: Micro-steps of one training step.
        forced: Decisions that are given, see ``planner.demands``.
        left_out: Ways to make activations again that are not offered: all of them, or some: those
            before steps that don't read them, and of what is far from what a step reads.
    """

    training: TrainingGraph
    storage: Storage
    slots: tuple[Slot, ...]
    activities: tuple[Activity, ...]
    retentions: tuple[Retention, ...]
    transients: tuple[Transient, ...]
    fixed: tuple[tuple[int, int, Tensor], ...]
    overwrites: tuple[Overwrite, ...]
    limits: Limits
    choices: Mapping[str, tuple[int, ...]]
    gain: Mapping[int, int]
    state_bytes: Mapping[int, int]
    flash_bytes: Mapping[int, int]
    paged_states: tuple[PagedState, ...]
    constants: tuple[Constant, ...]
    mixed_layers: tuple[MixedLayer, ...]
    mixed_updates: tuple[MixedUpdate, ...]
    streams: tuple[StreamChoice, ...]
    cost: CostModel
    micro_batches: int
    forced: tuple[Forced, ...] = ()
    left_out: LeftOut | None = None

    @property
    def always_paged(self) -> PagedState:
        """State in storage that no decision can avoid."""
        return together(s for s in self.paged_states if s.activity == ALWAYS)
