"""The decisions of a plan against what its steps do.

Part of the checker (see ``planner.check``). An action is derived from the steps that ran on the
abstract machine, an update from the training graph; the plan may say nothing else.
"""

from __future__ import annotations

from math import isclose

from ..ir.graph import Node, Value
from ..ir.opdef import get_op, parameter_slots
from ..ir.ops.streamed import layers_of
from ..ir.training import Update
from .check_machine import Machine
from .check_program import CheckError, Program, occupied


def decisions(p: Program, machine: Machine) -> None:
    """Compare the plan's decisions with what its steps do.

    Raises:
        CheckError: A decision is not carried out, or an action is not decided.
    """
    _updates(p)
    _activations(p, machine)
    _precision(p)
    _objective(p)
    _order(p)
    _freezing(p)


def _order(p: Program) -> None:
    """Whether operators run in the graph's order.

    Neither views count, nor what backward alone reads, nor what waits for the last micro-step.
    """
    wanted = {v for n in p.training.graph.nodes if n.phase in ("forward", "loss") for v in n.inputs}
    position = {
        n.name: k
        for k, n in enumerate(p.training.graph.nodes)
        if not get_op(n.op).view and (n.phase != "forward" or not wanted.isdisjoint(n.outputs))
    }
    last, reordered = -1, False
    for step in p.plan.steps:
        if step.nodes and not step.recompute and not step.last_micro:
            here = position.get(step.nodes[-1], last)
            reordered |= here < last
            last = here
    if reordered != p.plan.reordered:
        raise CheckError(
            f"reordered is {p.plan.reordered}, but operators run in"
            f" {'another order than' if reordered else 'the order of'} the graph"
        )


def _freezing(p: Program) -> None:
    """Nothing is updated that a node of ``--freeze-before`` depends on."""
    for name in p.plan.asked.freeze_before if p.plan.asked is not None else ():
        for node in _before(p, name):
            for u in p.training.updates:
                if u.value in node.inputs:
                    raise CheckError(
                        f"asked.freeze_before: {u.candidate.param} of {node.name} is updated, which"
                        f" {name} depends on"
                    )


def _before(p: Program, name: str) -> list[Node]:
    """What a node of the imported graph, or a module, depends on.

    Layers of a streamed block stand for the block; nodes that are merged into one before them come
    right behind it.
    """
    graph = p.training.graph
    forward = [n for n in graph.nodes if n.phase == "forward"]
    at = {n.name: n for n in forward}
    at |= {n.name: b for b in forward if b.op == "StreamedBlock" for n in layers_of(b).nodes}

    def called(part: str) -> set[Node]:
        return {n for k, n in at.items() if f"{k}/".startswith(f"{part}/")}

    own = called(name)
    merged = [k for k in graph.merged if f"{k}/".startswith(f"{name}/")]
    if not own and not merged:
        raise CheckError(f"asked.freeze_before: the graph has no node {name}")
    wanted = {v for n in own for v in n.operands()}
    for k in merged:
        host: str | None = k
        while host in graph.merged:
            host = graph.merged[host]
        if host is not None:
            wanted.update(v for n in called(host) for v in n.outputs)
    found: list[Node] = []
    for node in reversed(forward):
        if node not in own and wanted.intersection(node.outputs):
            found.append(node)
            wanted.update(node.operands())
    return found


def _precision(p: Program) -> None:
    graph, told = p.training.graph, p.plan.decisions
    blocks = [n for n in graph.nodes if n.op == "StreamedBlock"]
    samples = {v.name: v for v in p.training.samples}
    layers = {n.name: n for n in graph.nodes if n.phase == "forward"}
    layers |= {n.name: n for block in blocks for n in layers_of(block).nodes}
    for name, precision in told.precision.items():
        if name in samples:
            found = samples[name].type.dtype
        elif name in layers:
            found = _computes_in(layers[name])
        elif name in graph.unchanged or f"{name}/pool" in layers:  # the latter is a mean
            found = "i8"
        else:
            raise CheckError(f"decisions.precision: {name} is no layer of the graph")
        if found != precision:
            raise CheckError(f"decisions.precision: {name} computes in {found}, not {precision}")
    for name, node in layers.items():
        if get_op(node.op).params and name not in told.precision:
            raise CheckError(f"decisions.precision: {name} is missing")
    if told.noise_avoided and "mixed" not in told.precision.values():
        raise CheckError(f"decisions.noise_avoided is {told.noise_avoided}, but no layer is mixed")
    streamed = sorted(n.name for n in blocks)
    if streamed != sorted(told.streamed):
        raise CheckError(
            f"decisions.streamed: {', '.join(told.streamed) or 'none'}, but the steps stream"
            f" {', '.join(streamed) or 'none'}"
        )


def _computes_in(node: Node) -> str:
    """i8 with integer weights, mixed with float weights on i8 activations, else the float type."""
    if node.out.type.dtype != "i8":
        return node.out.type.dtype
    weights = [node.inputs[s.index] for s in get_op(node.op).params if s.index < len(node.inputs)]
    return "mixed" if any(w is not None and w.type.dtype == "f32" for w in weights) else "i8"


def _objective(p: Program) -> None:
    """Values are what steps and decisions give, bounds are on their side, gaps are as they say."""
    claims, decisions = p.plan.claims, p.plan.decisions
    ram = claims.ram_bytes
    facts = {
        "learn": sum(u.importance for u in decisions.updates) + decisions.noise_avoided,
        "latency": float(claims.cycles),
        "energy": claims.energy_j,
        "ram": ram.live_peak + ram.weights + ram.optimizer + ram.accumulators,
        "flash": claims.flash_bytes.total,
    }
    names = [o.name for o in p.plan.objective]
    if len(set(names)) != len(names):
        raise CheckError(f"objective: stages {', '.join(names)}, one occurs twice")
    for o in p.plan.objective:
        if (o.name == "weighted") != bool(o.terms):
            raise CheckError(f"objective {o.name}: has {len(o.terms)} terms")
        if o.name == "weighted":
            parts = ((t.weight, facts[t.name] / t.reference, t.name) for t in o.terms)
            fact = sum(w * (1 - x if name == "learn" else x) for w, x, name in parts)
        else:
            fact = facts[o.name]
        # Solvers work in floating point: a millionth is rounding, not a lie.
        if not isclose(o.value, fact, rel_tol=1e-6, abs_tol=1e-9):
            raise CheckError(f"objective {o.name}: value is {o.value}, but the plan gives {fact}")
        over = o.value - o.bound if o.name == "learn" else o.bound - o.value
        if over > 1e-6 * max(abs(o.value), 1e-9):
            raise CheckError(f"objective {o.name}: value {o.value} is beyond its bound {o.bound}")
        gap = abs(o.bound - o.value) / max(abs(o.value), 1e-9)
        if not isclose(o.gap, gap, rel_tol=1e-6, abs_tol=1e-9):
            raise CheckError(f"objective {o.name}: gap is {o.gap}, but bound and value give {gap}")


def _updates(p: Program) -> None:
    wanted = {u.candidate.param: u for u in p.training.updates}
    frozen = _frozen(p)
    seen: set[str] = set()
    for d in p.plan.decisions.updates:
        if d.param in seen:
            raise CheckError(f"decisions.updates: {d.param} occurs twice")
        seen.add(d.param)
        u = wanted.get(d.param)
        if u is None:
            if d.ratio or d.channels is not None or (d.saved, d.state) != ("f32", "keep"):
                raise CheckError(
                    f"decisions.updates: {d.param} has ratio {d.ratio} but no step updates it"
                )
            if (d.node, d.role) not in frozen.get(d.param, ()):
                raise CheckError(
                    f"decisions.updates: {d.param} is no {d.role} of a forward node {d.node}"
                )
            continue
        ratio = 1.0
        if u.candidate.channels is not None:
            whole = u.value.type.size + _cold_size(u.owner)
            ratio = u.value.type.size / whole
        facts = (u.role, u.owner.name, u.candidate.channels, _saved(u), _state(p, u))
        told = (d.role, d.node, d.channels, d.saved, d.state)
        if told != facts or not isclose(d.ratio, ratio, rel_tol=1e-9):
            raise CheckError(
                f"decisions.updates: {d.param} is {d.role} of {d.node}, channels {d.channels},"
                f" saved {d.saved}, state {d.state}, ratio {d.ratio} in the plan, but {facts[0]} of"
                f" {facts[1]}, channels {facts[2]}, saved {facts[3]}, state {facts[4]}, ratio"
                f" {ratio} in the graph"
            )
    for name in wanted:
        if name not in seen:
            raise CheckError(f"decisions.updates: {name} is updated but not decided")


def _saved(update: Update) -> str:
    """What the gradient of a float layer's weight reads in place of the layer's input."""
    x, made = update.owner.inputs[0], update.grad.producer
    assert x is not None, update.owner.name
    assert made is not None, update.grad.name
    kept = made.inputs[0]
    if update.role != "weight" or x.type.dtype != "f32" or kept is None:
        return "f32"
    return kept.type.dtype


def _state(p: Program, update: Update) -> str:
    """What has become of the optimizer tensors that the plan's optimizer has."""
    if update.apply_node.op in ("SGD", "QSGD") and p.plan.training.optimizer != "sgd":
        return "sgd"
    return "paged" if any(v.name in p.home_of for v in update.states) else "keep"


def _frozen(p: Program) -> dict[str, set[tuple[str, str]]]:
    """Constants that could be trained: the forward nodes that use them, and as what."""
    found: dict[str, set[tuple[str, str]]] = {}
    forward = (n for n in p.training.graph.nodes if n.phase == "forward")
    layers = (
        part for n in forward for part in (layers_of(n).nodes if n.op == "StreamedBlock" else (n,))
    )
    for node in layers:
        for slot in parameter_slots(node):
            v = node.inputs[slot.index]
            if v is not None and v.name in p.training.graph.constants:
                found.setdefault(v.name, set()).add((node.name, slot.role))
    return found


def _cold_size(owner: Node) -> int:
    for slot in get_op(owner.op).params:
        if slot.cold_index is not None and slot.cold_index < len(owner.inputs):
            cold = owner.inputs[slot.cold_index]
            if cold is not None:
                return cold.type.size
    return 0


def _activations(p: Program, machine: Machine) -> None:
    listed: dict[str, str] = {}
    for d in p.plan.decisions.activations:
        value = p.training.graph.values.get(d.value)
        if value is None or d.value in listed:
            raise CheckError(f"decisions.activations: {d.value} is unknown or listed twice")
        size = occupied(value.type.nbytes)
        if d.bytes != size:
            raise CheckError(f"decisions.activations: {d.value} takes {size} B, not {d.bytes}")
        listed[d.value] = d.action
        action = "keep"
        if d.value in machine.paged:
            action = "page"
        elif d.value in machine.recomputed:
            action = "recompute"
        if d.action != action:
            raise CheckError(
                f"decisions.activations: {d.value} is to {d.action}, but the steps {action} it"
            )
    decided = {_source(p.training.graph.values[name]) for name in listed}
    for node in p.training.graph.nodes:
        if node.phase not in ("backward", "update"):
            continue
        for v in node.operands():
            source = _source(v)
            given = source in p.training.samples
            if not given and (source.producer is None or source.producer.phase != "forward"):
                continue
            if source not in decided:
                raise CheckError(
                    f"decisions.activations: {v.name}, which {node.name} reads, is not listed"
                )


def _source(value: Value) -> Value:
    """The value whose bytes a view shows."""
    while value.producer is not None and get_op(value.producer.op).view:
        operand = value.producer.inputs[0]
        assert operand is not None, value.name
        value = operand
    return value
