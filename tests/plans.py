"""Plans for the tests of checker and back ends.

A keep-all builder that shares no code with the planner's schedule and layout, and plans that the
planner makes under pressure (recomputation, paging).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plan_record import Action, finish, padded

from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.graph import Graph, Node, Value
from odt_plan.ir.opdef import get_op
from odt_plan.ir.training import Candidate, TrainingGraph, TrainingSpec, Update
from odt_plan.planner.cost import CostModel
from odt_plan.planner.device import Core, Device, Fact, load_core, load_device
from odt_plan.planner.importance import prior
from odt_plan.planner.linear import SolverOptions
from odt_plan.planner.milp import Milp
from odt_plan.planner.plan import Buffer, Plan, Step
from odt_plan.planner.problem import Limits, Problem, RamRegion
from odt_plan.planner.schedule import realize
from odt_plan.planner.timeline import build_problem

BOARD = "stm32f746g-disco"


def whole(forward: Graph) -> list[Candidate]:
    """All parameters, whole."""
    return [c for c in candidates(forward) if c == Candidate(c.param)]


def cost_of(
    device: Device,
    storage: str | None = None,
    core: Core | None = None,
    *,
    overlap: bool = False,
) -> CostModel:
    """Predicted costs; transfers run beside the core only if that is asked for."""
    found = device.find_storage(storage) if storage else None
    if found is not None:
        dma = Fact(value=True, source="asked for by a test") if overlap else None
        found = found.model_copy(update={"dma": dma})
    return CostModel(device, core or load_core(device.core), found)


def without_dma(device: Device) -> Device:
    """The device, with transfers that the core waits for."""
    storage = tuple(s.model_copy(update={"dma": None}) for s in device.storage)
    return device.model_copy(update={"storage": storage})


def problem_of(
    forward: Graph, training: TrainingGraph, limits: Limits, cost: CostModel, *, fixed: bool
) -> Problem:
    """The planner's problem with the importance prior."""
    scores = prior(forward, [u.candidate for u in training.updates])
    return build_problem(training, cost, limits, scores, fixed_updates=fixed)


def keep_all(
    training: TrainingGraph,
    *,
    reuse: bool = True,
    device: Device | None = None,
    core: Core | None = None,
) -> Plan:
    """Every node once, in the graph's order; ``reuse`` places by first fit, else side by side."""
    device = device or load_device(BOARD)
    return _KeepAll(training, cost_of(device, core=core), reuse).plan(device)


def squeezed(
    forward: Graph,
    training: TrainingGraph,
    *,
    ram_bytes: int,
    storage: str | None = None,
    device: Device | None = None,
    overlap: bool = False,
    regions: tuple[RamRegion, ...] = (),
) -> Plan:
    """A plan of the planner's own model and schedule within a live-byte limit."""
    device = device or load_device(BOARD)
    limits = Limits(ram_bytes, 10**7, None, None, 10**6 if storage else 0, regions)
    cost = cost_of(device, storage, overlap=overlap)
    problem = problem_of(forward, training, limits, cost, fixed=True)
    result = Milp(problem, shy=overlap).solve("latency", SolverOptions(time_limit_s=30))
    assert result.solution is not None, result.status
    s = realize(problem, result.solution, hide_within=limits)
    assert bool(s.regions) == bool(regions), s.missing_bytes
    return finish(
        training, device, problem.cost, s.steps, s.buffers, s.actions, storage, s.transfer_cycles,
        s.cycles, s.regions,
    )  # fmt: skip


def within(forward: Graph, training: TrainingGraph, ratio: float, storage: str | None) -> Plan:
    """``squeezed`` to a part of what keeping everything takes; sdram moves beside the core."""
    ram = keep_all(training).claims.ram_bytes
    limit = int(ram.live_peak * ratio) + ram.total - ram.arena
    overlap = storage == "sdram"
    return squeezed(forward, training, ram_bytes=limit, storage=storage, overlap=overlap)


@dataclass
class _Stay:
    value: str
    type_: tuple[str, tuple[int, ...], int]
    first: int
    last: int
    root: str


class _KeepAll:
    def __init__(self, training: TrainingGraph, cost: CostModel, reuse: bool) -> None:
        self.training, self.cost, self.reuse = training, cost, reuse
        self.steps: list[Step] = []
        self.stays: dict[str, _Stay] = {}
        self.fixed: list[Buffer] = []

    def plan(self, device: Device) -> Plan:
        t = self.training
        for v in t.samples:
            self._open(v, 0, None)
        fused = {u.grad_node: u for u in t.updates if u.grad_node is not None}
        appliers: dict[Node, Update] = {}
        for u in t.updates:
            appliers[u.accumulate_node or u.apply_node] = u
        lasts = [u for u in t.updates if u.accumulate_node is not None]
        applied = {u.apply_node for u in lasts}
        for node in t.graph.nodes:
            if node in fused or node in applied:
                continue
            if node in appliers:
                self._update(node, appliers[node])
            else:
                self._compute(node)
        for u in lasts:
            self._apply(u)
        self.stays[t.loss.name].last = len(self.steps) - 1
        buffers = [*self._constant(), *self._place()]
        late = {v for n in t.graph.nodes if n.phase in ("backward", "update") for v in n.operands()}
        kept = [v for v in late if v in t.samples or (v.producer and v.producer.phase == "forward")]
        actions: Action = {
            v.name: (padded(v.type.nbytes), "keep") for v in sorted(kept, key=lambda v: v.name)
        }
        return finish(t, device, self.cost, self.steps, buffers, actions)

    def _open(self, v: Value, step: int, view_of: Value | None) -> str:
        root = v.name if view_of is None else self.stays[view_of.name].root
        self.stays[v.name] = _Stay(
            v.name, (v.type.dtype, v.type.shape, v.type.nbytes), step, step, root
        )
        return v.name

    def _scratch(self, name: str, size: int) -> str | None:
        if size == 0:
            return None
        k = len(self.steps)
        self.stays[name] = _Stay(name, ("u8", (size,), size), k, k, name)
        return name

    def _read(self, v: Value | None) -> str | None:
        if v is None:
            return None
        if v.name in self.stays:
            self.stays[v.name].last = len(self.steps)
        return v.name

    def _compute(self, node: Node) -> None:
        op, k = get_op(node.op), len(self.steps)
        reads = tuple(self._read(v) for v in node.inputs)
        source = node.inputs[0] if op.view else None
        writes = tuple(self._open(v, k, source) for v in node.outputs)
        workspace = self._scratch(f"workspace:{node.name}", op.workspace(node))
        self.steps.append(
            Step(
                kind="compute", nodes=(node.name,), reads=reads, writes=writes, workspace=workspace,
                cycles=self.cost.node_cycles(node),
            )
        )  # fmt: skip

    def _update(self, final: Node, u: Update) -> None:
        operands = list(final.inputs)
        nodes, tile, rows, workspace = [final], None, 0, None
        if u.grad_node is not None:
            operands.remove(u.grad)
            operands = [*u.grad_node.inputs, *operands]
            nodes = [u.grad_node, final]
            tile, rows = self._scratch(f"tile:{u.grad_node.name}", u.tile_bytes), u.tile_rows
            size = get_op(u.grad_node.op).workspace(u.grad_node)
            workspace = self._scratch(f"workspace:{u.grad_node.name}", size)
        changed = (u.accumulator,) if final is u.accumulate_node else (u.value, *u.states)
        self.steps.append(
            Step(
                kind="update", nodes=tuple(n.name for n in nodes),
                reads=tuple(self._read(v) for v in operands),
                writes=tuple(v.name for v in changed if v is not None), workspace=workspace,
                tile=tile, tile_rows=rows, cycles=self.cost.update_cycles(u),
            )
        )  # fmt: skip

    def _apply(self, u: Update) -> None:
        assert u.accumulator is not None
        assert u.accumulate_node is not None
        total = u.accumulate_node.out
        operands = [u.accumulator if v is total else v for v in u.apply_node.inputs]
        self.steps.append(
            Step(
                kind="update", nodes=(u.apply_node.name,),
                reads=tuple(self._read(v) for v in operands),
                writes=tuple(v.name for v in (u.value, *u.states)), last_micro=True,
                cycles=self.cost.node_cycles(u.apply_node),
            )
        )  # fmt: skip

    def _constant(self) -> list[Buffer]:
        t, last, top = self.training, len(self.steps) - 1, 0
        result = []
        resident = [
            v for u in t.updates for v in (u.value, *u.states, u.accumulator) if v is not None
        ]
        for v in resident:
            result.append(_buffer(v.name, v, "state", top, 0, last))
            top += padded(v.type.nbytes)
        for name in t.graph.constants:
            v = t.graph.values[name]
            if v not in resident:
                result.append(_buffer(name, v, "flash", 0, 0, last))
        result += [_buffer(v.name, v, "io", 0, 0, last) for v in (*t.targets, t.hyper)]
        return result

    def _place(self) -> list[Buffer]:
        spans: dict[str, list[int]] = {}
        for s in self.stays.values():
            span = spans.setdefault(s.root, [padded(s.type_[2]), s.first, s.last])
            span[1], span[2] = min(span[1], s.first), max(span[2], s.last)
        offsets: dict[str, int] = {}
        top = 0
        for root, (size, first, last) in sorted(spans.items(), key=lambda i: (i[1][1], i[0])):
            at = top
            if self.reuse:
                busy = sorted(
                    (offsets[o], offsets[o] + n)
                    for o, (n, a, b) in spans.items()
                    if o in offsets and a <= last and first <= b
                )
                at = 0
                for low, high in busy:
                    if low < at + size and at < high:
                        at = high
            offsets[root] = at
            top = max(top, at + size)
        return [
            Buffer(
                id=name, value=s.value, space="arena", dtype=s.type_[0], shape=s.type_[1],
                bytes=s.type_[2], offset=offsets[s.root], first=s.first, last=s.last,
            )
            for name, s in self.stays.items()
        ]  # fmt: skip


def _buffer(id_: str, v: Value, space: str, offset: int, first: int, last: int) -> Buffer:
    return Buffer(
        id=id_, value=v.name, space=space, dtype=v.type.dtype, shape=v.type.shape,  # type: ignore[arg-type]
        bytes=v.type.nbytes, offset=offset, first=first, last=last,
    )  # fmt: skip


def training_of(
    forward: Graph, spec: TrainingSpec | None = None, chosen: Sequence[Candidate] | None = None
) -> TrainingGraph:
    """A training graph; all parameters whole unless given."""
    return build_training(forward, spec or TrainingSpec(), chosen or whole(forward))
