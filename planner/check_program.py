"""The plan under check, resolved: buffers, types and nodes by name.

Part of the checker (see ``planner.check``). Nothing here trusts a figure of the plan: a buffer's
type comes from the training graph, its bytes from its type.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import OdtPlanError
from ..ir.graph import DTYPES, Node, TensorType, Value
from ..ir.training import TrainingGraph, Update
from .plan import ALIGNMENT_BYTES, Buffer, Plan, part_of


class CheckError(OdtPlanError):
    """The plan breaks a rule; the message names step, node, buffer, rule and numbers."""


def occupied(n_bytes: int) -> int:
    """Bytes that a buffer of ``n_bytes`` takes, padded to the alignment."""
    return (n_bytes + ALIGNMENT_BYTES - 1) // ALIGNMENT_BYTES * ALIGNMENT_BYTES


@dataclass(frozen=True)
class Program:
    """A plan with its names resolved against the training graph.

    Attributes:
        plan: The plan under check.
        training: The training graph that it claims to execute.
        buffers: Buffers by id.
        types: Type of each buffer by id.
        nodes: Nodes of the training graph by name.
        resident: Values that live in the state space, with what they are.
        home_of: Storage buffer of each optimizer tensor that lives in storage.
        update_of: Update that each apply and accumulate node carries out.
        state_of: State buffer of each resident value.
        given: Arena buffers that the caller writes the samples to before step 0.
        region_of: Index in ``plan.regions`` of each buffer in arena or state; all 0 where the plan
            names none.
    """

    plan: Plan
    training: TrainingGraph
    buffers: dict[str, Buffer]
    types: dict[str, TensorType]
    nodes: dict[str, Node]
    resident: dict[str, str]
    home_of: dict[str, Buffer]
    update_of: dict[Node, Update]
    state_of: dict[str, Buffer]
    given: tuple[Buffer, ...]
    region_of: dict[str, int]

    def error(self, index: int, text: str) -> CheckError:
        """The error that a step breaks a rule."""
        return CheckError(f"{self.where(index)}: {text}")

    def where(self, index: int) -> str:
        """``step 12 (conv1/dw)`` for messages."""
        return f"step {index} ({self.label(index)})"

    def label(self, index: int) -> str:
        """Nodes of a step, or what it moves."""
        step = self.plan.steps[index]
        if step.nodes:
            return " + ".join(step.nodes)
        values = [self.buffers[b].value for b in step.reads if b is not None and b in self.buffers]
        return f"{step.kind} {', '.join(values)}".strip()

    def node(self, index: int, name: str) -> Node:
        """A node of a step.

        Raises:
            CheckError: The training graph has no such node.
        """
        if name not in self.nodes:
            raise CheckError(f"step {index}: the training graph has no node {name}")
        return self.nodes[name]

    def step_nodes(self, index: int) -> list[Node]:
        """The nodes of a step."""
        return [self.node(index, name) for name in self.plan.steps[index].nodes]

    def buffer(self, index: int, name: str) -> Buffer:
        """A buffer that a step names.

        Raises:
            CheckError: The plan has no such buffer, or the step is outside its lifetime.
        """
        if name not in self.buffers:
            raise self.error(index, f"the plan has no buffer {name}")
        b = self.buffers[name]
        if not b.first <= index <= b.last:
            raise self.error(
                index, f"buffer {name} ({b.value}) lives from step {b.first} to {b.last}"
            )
        return b


def resolve(plan: Plan, training: TrainingGraph) -> Program:
    """Resolve names and check each buffer by itself: type, bytes, space, alignment, bounds.

    Raises:
        CheckError: A buffer or the training set-up does not fit the training graph.
    """
    spec, said = training.spec, plan.training
    for key in type(said).model_fields:
        if getattr(said, key) != getattr(spec, key):
            raise CheckError(
                f"training.{key} is {getattr(said, key)} in the plan, {getattr(spec, key)} in the"
                " graph"
            )
    for v in training.samples:
        batch = v.type.shape[0] if v.type.shape else 1
        if plan.model.batch != batch:
            raise CheckError(
                f"model.batch is {plan.model.batch} but the graph takes batches of {batch}"
            )
    if not plan.steps:
        raise CheckError("the plan has no steps")
    resident: dict[str, str] = {}
    update_of: dict[Node, Update] = {}
    for u in training.updates:
        resident[u.value.name] = "weights"
        resident.update({s.name: "optimizer" for s in u.states if s not in u.paged})
        if u.accumulator is not None:
            resident[u.accumulator.name] = "accumulators"
        for n in (u.apply_node, u.accumulate_node):
            if n is not None:
                update_of[n] = u
    buffers: dict[str, Buffer] = {}
    types: dict[str, TensorType] = {}
    for b in plan.buffers:
        if b.id in buffers:
            raise CheckError(f"buffer {b.id} occurs twice")
        buffers[b.id] = b
        types[b.id] = _type(b)
    nodes = {n.name: n for n in training.graph.nodes}
    state_of = _state(plan, resident)
    home_of = _homes(plan, training)
    given = tuple(_given(plan, v.name) for v in training.samples)
    _check_regions(plan)
    region_of = {b.id: _region(plan, b) for b in plan.buffers if b.space in ("arena", "state")}
    program = Program(
        plan, training, buffers, types, nodes, resident, home_of, update_of, state_of, given,
        region_of,
    )  # fmt: skip
    for b in plan.buffers:
        _space(program, b)
    return program


def _type(b: Buffer) -> TensorType:
    if b.dtype not in DTYPES:
        raise CheckError(f"buffer {b.id} ({b.value}): dtype {b.dtype} is not known")
    t = TensorType(b.shape, b.dtype)
    if t.nbytes != b.bytes:
        raise CheckError(f"buffer {b.id} ({b.value}): {t} takes {t.nbytes} B, not {b.bytes} B")
    if b.offset % ALIGNMENT_BYTES:
        raise CheckError(
            f"buffer {b.id} ({b.value}): offset {b.offset} is not a multiple of {ALIGNMENT_BYTES}"
        )
    return t


def _check_regions(plan: Plan) -> None:
    """The parts of the regions make up arena, state and budget."""
    if not plan.regions:
        return
    ram = plan.claims.ram_bytes
    names = [r.name for r in plan.regions]
    if len(set(names)) < len(names):
        raise CheckError(f"regions: {', '.join(names)}: one occurs twice")
    for what, parts, whole in (
        ("arena", [r.arena for r in plan.regions], ram.arena),
        ("state", [r.state for r in plan.regions], ram.weights + ram.optimizer + ram.accumulators),
        ("budget", [r.budget for r in plan.regions], plan.device.budget.ram_bytes),
    ):
        if sum(parts) != whole:
            raise CheckError(f"regions: {what} adds up to {sum(parts)} B, the plan says {whole} B")
        if odd := [n for n in parts if what != "budget" and n % ALIGNMENT_BYTES]:
            raise CheckError(f"regions: {what} of {odd[0]} B is no multiple of {ALIGNMENT_BYTES}")


def _region(plan: Plan, b: Buffer) -> int:
    """The region whose part of the space holds the whole buffer."""
    end = b.offset + occupied(b.bytes)
    parts = plan.parts("arena" if b.space == "arena" else "state")
    try:
        return part_of(parts, b.offset, end)
    except ValueError:
        if len(parts) == 1:
            return 0  # it ends beyond its space, which is checked with the space
        told = ", ".join(f"{p.region} {p.begin} to {p.end}" for p in parts)
        raise CheckError(
            f"buffer {b.id} ({b.value}): bytes {b.offset} to {end} of space {b.space} lie in no one"
            f" RAM region; {told}"
        ) from None


def _space(p: Program, b: Buffer) -> None:
    ram, last = p.plan.claims.ram_bytes, len(p.plan.steps) - 1
    value = p.training.graph.values.get(b.value)
    what = f"buffer {b.id} ({b.value})"
    if not b.first <= b.last <= last:
        raise CheckError(f"{what}: lifetime {b.first}..{b.last} is not within the steps 0..{last}")
    if value is None:
        if b.space != "arena" or not b.value.startswith(("tile:", "workspace:")):
            raise CheckError(f"{what}: the training graph has no value {b.value}")
    elif value.type.stored != p.types[b.id]:
        raise CheckError(f"{what}: is {p.types[b.id]} in the plan but {value.type} in the graph")
    if b.space in ("flash", "io"):
        if b.offset:
            raise CheckError(f"{what}: offset {b.offset} in space {b.space}, must be 0")
    else:
        limit = {
            "arena": ram.arena,
            "state": ram.weights + ram.optimizer + ram.accumulators,
            "storage": p.plan.claims.storage_bytes,
        }[b.space]
        end = b.offset + occupied(b.bytes)
        if end > limit:
            raise CheckError(f"{what}: ends at byte {end}, but space {b.space} has {limit} B")
    survives = b.space in ("flash", "io", "state") or b.id in {h.id for h in p.home_of.values()}
    if survives and (b.first, b.last) != (0, last):
        raise CheckError(
            f"{what}: lives from {b.first} to {b.last}, but {b.space} lives from 0 to {last}"
        )
    if not _belongs(p, b, value):
        raise CheckError(f"{what}: {b.value} can't live in space {b.space}")


def _belongs(p: Program, b: Buffer, value: Value | None) -> bool:
    t = p.training
    if b.space == "state":
        return b.value in p.resident
    if b.value in p.resident:
        return False
    if b.space == "flash":
        return b.value in t.graph.constants
    if b.space == "io":
        return value in (*t.targets, t.hyper)
    if b.value in p.home_of:
        return b.space == "arena" or b is p.home_of[b.value]
    return value is None or value.producer is not None or value in t.samples


def _state(plan: Plan, resident: dict[str, str]) -> dict[str, Buffer]:
    found: dict[str, Buffer] = {}
    for b in plan.buffers:
        if b.space == "state":
            if b.value in found:
                raise CheckError(f"{b.value} has two state buffers, {found[b.value].id} and {b.id}")
            found[b.value] = b
    for value, kind in resident.items():
        if value not in found:
            raise CheckError(f"{value} ({kind}) has no state buffer")
    return found


def _homes(plan: Plan, training: TrainingGraph) -> dict[str, Buffer]:
    """The storage buffers of optimizer tensors that live in storage, one each."""
    found: dict[str, Buffer] = {}
    for v in (v for u in training.updates for v in u.paged):
        own = [b for b in plan.buffers if b.space == "storage" and b.value == v.name]
        if len(own) != 1:
            raise CheckError(f"{v.name} (optimizer) has {len(own)} storage buffers, must have 1")
        found[v.name] = own[0]
    return found


def _given(plan: Plan, name: str) -> Buffer:
    """The stay of a sample that the caller writes; later ones are paged in."""
    written = {b for step in plan.steps for b in step.writes}
    found = [
        b for b in plan.buffers if b.value == name and b.space == "arena" and b.id not in written
    ]
    if len(found) != 1:
        raise CheckError(f"the sample {name} has {len(found)} buffers for the caller, must have 1")
    return found[0]
