"""Lays the timeline of a planning problem out and finds where tensors can be kept or rebuilt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..ir.adapters import Adapter, adapters_by_param
from ..ir.graph import Node
from ..ir.opdef import get_op
from ..ir.training import Candidate, TrainingGraph, Update
from .adapters import AdapterSteps, together
from .choices import (
    Choices,
    MixedForms,
    kernels,
    score_of,
    split_costs,
    split_padding,
    stream_choices,
    update_nodes,
)
from .cost import CostModel
from .problem import (
    ALWAYS,
    Activity,
    ActivityKind,
    Constant,
    Event,
    LeftOut,
    Limits,
    Overwrite,
    Problem,
    Retention,
    Slot,
    SplitCost,
    Transient,
    paged_state,
)
from .tensors import Storage, Tensor, aligned

#: Ancestors that may be rebuilt for one backward step, besides what it reads: the nearest ones.
REBUILD_LIMIT = 24
#: Rebuilds up to which all of them are offered while updates are chosen; beyond, only those of
#: auxiliary tensors are, because a proof would take minutes.
LEARN_REBUILDS = 400
#: Node of a backward step -> indices of storage tensors that are made right before it, in order.
Rebuilds = Mapping[Node, Sequence[int]]


def build_problem(
    training: TrainingGraph,
    cost: CostModel,
    limits: Limits,
    importance: Mapping[Candidate, int],
    *,
    fixed_updates: bool,
    choices: Choices | None = None,
    rebuild: bool | Rebuilds = True,
) -> Problem:
    """Lay the timeline out and collect all choices.

    Args:
        training: Training graph; the superset if the update set is to be chosen.
        cost: Predicted costs.
        limits: Budgets.
        importance: Integer score of each update's candidate.
        fixed_updates: Every update of the graph is carried out; nothing is chosen about them.
        choices: Other forms of its layers and blocks.
        rebuild: Offer to compute activations again; without it auxiliary tensors may be made late
            anyway. Or just these: backward step -> what may be made right before it.
    """
    return _Builder(
        training, cost, limits, importance, fixed_updates, choices or Choices(), rebuild
    ).build()


@dataclass
class _Draft:
    node: Node
    update: Update | None
    activity: int
    rebuild: Tensor | None = None
    last_micro: bool = False


@dataclass
class _Builder:
    training: TrainingGraph
    cost: CostModel
    limits: Limits
    importance: Mapping[Candidate, int]
    fixed_updates: bool
    choices: Choices
    rebuild: bool | Rebuilds
    activities: list[Activity] = field(default_factory=lambda: [Activity(ALWAYS, "always")])
    drafts: list[_Draft] = field(default_factory=list)
    left_out: LeftOut | None = None

    def build(self) -> Problem:
        self.storage = Storage(self.training)
        self.order = {n: i for i, n in enumerate(self.training.graph.nodes)}
        self.consumers = self.training.graph.consumers()
        self.update_activity: dict[Update, int] = {}
        self.adapter_activities: dict[Adapter, list[int]] = {}
        graph = self.training.graph
        self.adapters = AdapterSteps(self.training, () if self.fixed_updates else graph.adapters)
        adapter_of = adapters_by_param(graph)
        for updates in together(self.training):
            a = ALWAYS if self.fixed_updates else self._activity("update", updates=tuple(updates))
            self.update_activity |= dict.fromkeys(updates, a)
            if (adapter := adapter_of.get(updates[0].candidate.param)) is not None:
                self.adapter_activities.setdefault(adapter, []).append(a)
        self.node_activity = self._node_activities()
        self.forms = MixedForms(self.choices, self.cost, lambda _: self._activity("mixed"))
        self.split = split_costs(self.choices, self.training, self.cost, self.update_activity)
        for name, added in self.adapters.cycles(self.cost, self.adapter_activities):
            self.split[name] = (*self.split.get(name, ()), added)
        self._lay_out()
        slots = tuple(self._slots())
        retentions, transients, fixed = self._tensors(slots)
        streams = stream_choices(
            self.choices,
            self.storage,
            slots,
            self.cost,
            self.forms.choice,
            lambda _: self._activity("streamed"),
        )
        choices: dict[str, list[int]] = {}
        gain: dict[int, int] = {}
        state: dict[int, int] = {}
        flash: dict[int, int] = {}
        mixed = []
        paged = []
        for u, a in self.update_activity.items():
            adapter = adapter_of.get(u.candidate.param)
            param = u.candidate.param if adapter is None else adapter.choice
            if a not in choices.setdefault(param, []):
                choices[param].append(a)
            score = self.importance[u.candidate]
            gain[a] = gain.get(a, 0) + score_of(u, score)
            state[a] = state.get(a, 0) + sum(aligned(v.type.nbytes) for v in u.resident)
            if u.paged:
                paged.append(paged_state(a, [aligned(v.type.nbytes) for v in u.paged], self.cost))
            if padding := split_padding(u):
                flash[a] = padding
            if (more := self.forms.update(u, a, score)) is not None:
                mixed.append(more)
        return Problem(
            training=self.training,
            storage=self.storage,
            slots=slots,
            activities=tuple(self.activities),
            retentions=retentions,
            transients=transients,
            fixed=fixed,
            overwrites=tuple(self._overwrites(slots)),
            limits=self.limits,
            choices={p: tuple(a) for p, a in choices.items()},
            gain=gain,
            state_bytes=state,
            flash_bytes=flash,
            paged_states=tuple(paged),
            constants=self._constants(slots),
            mixed_layers=self.forms.layers(self.training, slots),
            mixed_updates=tuple(mixed),
            streams=streams,
            cost=self.cost,
            micro_batches=self.training.spec.micro_batches,
            left_out=self.left_out,
        )

    def _constants(self, slots: tuple[Slot, ...]) -> tuple[Constant, ...]:
        """Weights in flash, with what reads them; those in no slot are the images of state."""
        readers: dict[str, set[int]] = {}
        absent: dict[str, int] = {}
        of_layers: set[str] = set()
        for s in slots:
            if s.node.phase == "forward":
                of_layers.update(v.name for v in s.node.operands())
            nodes: tuple[Node, ...] = (s.node,)
            if s.update is not None:
                nodes = update_nodes(s.update, s.node, last_micro=s.last_micro)
            for v in (v for n in nodes for v in n.operands()):
                if v.name in self.training.graph.constants:
                    readers.setdefault(v.name, set()).add(s.activity)
                    layer = self.forms.layer(s.node)
                    if s.update is not None and s.update.owner.name in self.forms.choice:
                        layer = s.update.owner.name
                    if layer is not None:
                        absent[v.name] = self.forms.choice[layer]
        result = []
        for name in self.training.graph.constants:
            acts = tuple(sorted(readers.get(name, {ALWAYS})))
            # what forward reads is exchanged as a whole, see MixedLayer.flash_bytes
            gone = None if name in of_layers else absent.get(name)
            size = aligned(self.training.graph.values[name].type.nbytes)
            result.append(Constant(size, (ALWAYS,) if ALWAYS in acts else acts, gone))
        return tuple(result)

    def _activity(
        self,
        kind: ActivityKind,
        implied_by: tuple[int, ...] = (),
        updates: tuple[Update, ...] = (),
        tensor: Tensor | None = None,
    ) -> int:
        self.activities.append(Activity(len(self.activities), kind, implied_by, updates, tensor))
        return len(self.activities) - 1

    def _node_activities(self) -> dict[Node, int]:
        """Activity of every node; a backward node runs if one of its readers does."""
        result: dict[Node, int] = {}
        needed: dict[tuple[int, ...], int] = {}

        def any_of(acts: Iterable[int]) -> int:
            key = tuple(sorted(acts))
            if len(key) == 1 or ALWAYS in key:
                return ALWAYS if ALWAYS in key else key[0]
            if key not in needed:
                needed[key] = self._activity("needed", key)
            return needed[key]

        for node in reversed(self.training.graph.nodes):
            update = self.storage.update_of.get(node)
            if update is not None:
                result[node] = self.update_activity[update]
            elif node.phase == "backward":
                readers = {
                    result[c]
                    for v in node.outputs
                    for c in self.consumers[v]
                    if c not in self.adapters.entries
                }
                result[node] = any_of(readers)
            elif node in self.adapters.forward:
                result[node] = any_of(self.adapter_activities[self.adapters.forward[node]])
            elif self._auxiliary(node):
                result[node] = self._activity("auxiliary", tensor=self.storage.of[node.out])
            else:
                result[node] = ALWAYS
        return result

    def _auxiliary(self, node: Node) -> bool:
        """A forward node that only backward reads: it may as well run later."""
        return (
            node.phase == "forward"
            and node.out not in self.training.graph.outputs
            and not get_op(node.op).view
            and self.storage.of[node.out].rebuildable
            and all(
                c.phase in ("backward", "update") for v in node.outputs for c in self.consumers[v]
            )
        )

    # -- timeline ---------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        nodes = [n for n in self.training.graph.nodes if not get_op(n.op).view]
        backward = [n for n in nodes if n.phase in ("backward", "update")]
        for n in nodes:
            if n.phase in ("forward", "loss"):
                self.drafts.append(_Draft(n, None, self.node_activity[n]))
        if isinstance(self.rebuild, Mapping):
            tensors = self.storage.tensors
            rebuilds = {n: [tensors[i] for i in found] for n, found in self.rebuild.items()}
        else:
            rebuilds = self._rebuilds(backward)
        many = not self.fixed_updates and sum(map(len, rebuilds.values())) > LEARN_REBUILDS
        offered = (t for tensors in rebuilds.values() for t in tensors)
        if self.rebuild is True and not all(map(self._kept_for_backward, offered)):
            self.left_out = "all" if many else "some"
        if many:
            rebuilds = {
                n: [t for t in tensors if self._kept_for_backward(t)]
                for n, tensors in rebuilds.items()
            }
        elif self.rebuild is True:
            self._add_siblings(rebuilds, backward)
        for node in backward:
            update = self.storage.update_of.get(node)
            if update is not None and node is update.grad_node:
                continue  # part of the update step
            if node in self.adapters.passing:
                continue  # part of the layer's own gradient
            for tensor in rebuilds.get(node, ()):
                activity = self._activity("rebuild", tensor=tensor)
                self.drafts += [
                    _Draft(w, None, activity, tensor)
                    for w in tensor.writers
                    if w not in self.adapters.forward or self._of_adapter(tensor)
                ]
            last = (
                update is not None and node is update.apply_node and update.accumulator is not None
            )
            self.drafts.append(_Draft(node, update, self.node_activity[node], last_micro=last))

    def _rebuilds(self, backward: list[Node]) -> dict[Node, list[Tensor]]:
        """Backward step -> what may be rebuilt right before it, in forward order."""
        result: dict[Node, list[Tensor]] = {}
        covered: set[Tensor] = set()
        updated: set[str] = set()
        for i, node in enumerate(backward):
            update = self.storage.update_of.get(node)
            if node in self.adapters.passing or (update and node is update.grad_node):
                continue
            uses = self._forward_reads(node)
            if uses - covered:
                for other in backward[i + 1 :]:
                    u = self.storage.update_of.get(other)
                    if update is None or u is None or u.candidate.param != update.candidate.param:
                        break
                    uses |= self._forward_reads(other)
                result[node] = self._rebuildable(uses, updated)
                covered = uses
            elif not uses:
                covered = set()
            if update is not None and node is update.apply_node:
                updated.add(update.candidate.param)
        return result

    def _add_siblings(self, rebuilds: dict[Node, list[Tensor]], backward: list[Node]) -> None:
        """Offer more before a step: what later ones read, made from the same as what it reads.

        A mask beside an index, say: what both are made from is then rebuilt once.
        """
        last = {t: i for i, n in enumerate(backward) for t in self._forward_reads(n)}
        small = [t for t in last if self._kept_for_backward(t)]
        for i, node in enumerate(backward):
            known = set(rebuilds.get(node, ()))
            uses = self._forward_reads(node)
            there = {u for t in uses & known for u in self._inputs_of(t)}
            more = [
                t
                for t in small
                if last[t] > i and t not in known and there.issuperset(self._inputs_of(t))
            ]
            if more:
                ordered = sorted([*known, *more], key=lambda t: self.order[t.writers[-1]])
                rebuilds[node] = ordered

    def _kept_for_backward(self, tensor: Tensor) -> bool:
        """A mask, an index, leading channels: made for backward alone, by one node."""
        return len(tensor.writers) == 1 and self._auxiliary(tensor.writers[0])

    def _forward_reads(self, node: Node) -> set[Tensor]:
        return {t for t in self._reads(node) if t.is_forward}

    def _reads(self, node: Node) -> list[Tensor]:
        """Arena tensors that a step reads, its own in-place operand included."""
        update = self.storage.update_of.get(node)
        operands = list(node.operands())
        if (
            update is not None
            and update.grad_node is not None
            and self._computes_grad(node, update)
        ):
            operands += update.grad_node.operands()
        return list(dict.fromkeys(self.storage.of[v] for v in operands if v in self.storage.of))

    @staticmethod
    def _computes_grad(node: Node, update: Update) -> bool:
        return node is (update.accumulate_node or update.apply_node)

    def _inputs_of(self, tensor: Tensor) -> list[Tensor]:
        own = self._of_adapter(tensor)
        writers = (w for w in tensor.writers if own or w not in self.adapters.forward)
        reads = (t for w in writers for t in self._reads(w))
        return [t for t in dict.fromkeys(reads) if t is not tensor]

    def _rebuildable(self, uses: set[Tensor], updated: set[str]) -> list[Tensor]:
        """Tensors that may be rebuilt for these reads, in forward order."""
        found: set[Tensor] = set()
        stack = list(uses)
        while stack:
            t = stack.pop()
            if not self.rebuild and not self._kept_for_backward(t):
                continue
            if t in found or not t.rebuildable:
                continue
            if any(v.name in updated for w in t.writers for v in w.operands()):
                continue  # its parameters have changed: it can't be made again
            found.add(t)
            stack += self._inputs_of(t)
        ordered = sorted(found, key=lambda t: self.order[t.writers[-1]])
        near = [t for t in ordered if t in uses]
        far = [t for t in ordered if t not in uses]
        keep = set(near) | set(far[-REBUILD_LIMIT:])
        return [t for t in ordered if t in keep]

    def _slots(self) -> Iterator[Slot]:
        micro = self.training.spec.micro_batches
        for k, d in enumerate(self.drafts):
            op = get_op(d.node.op)
            scratch = aligned(op.workspace(d.node))
            update = d.update
            if update is not None and not d.last_micro:
                cycles = self.cost.update_cycles(update)
                scratch += aligned(update.tile_bytes)
                if update.grad_node is not None:
                    scratch += aligned(get_op(update.grad_node.op).workspace(update.grad_node))
            else:
                cycles = self.cost.node_cycles(d.node)
            writes = [self.storage.of[v] for v in d.node.outputs if v in self.storage.of]
            nodes: tuple[Node, ...] = (d.node,)
            times = 1 if d.last_micro else micro
            split: tuple[SplitCost, ...] = ()
            form = None
            if update is not None:
                nodes = update_nodes(update, d.node, last_micro=d.last_micro)
                form = self.forms.of_update(update, times, last_micro=d.last_micro)
            else:
                split = tuple(
                    SplitCost(x.update, x.cycles * times, x.mixed_cycles * times)
                    for x in self.split.get(d.node.name, ())
                )
                if d.rebuild is None:  # a layer that is rebuilt is i8
                    form = self.forms.of_node(d.node, times)
            yield Slot(
                k,
                d.node,
                update,
                d.activity,
                tuple(self._reads(d.node)),
                tuple(dict.fromkeys(writes)),
                scratch,
                cycles * times,
                kernels(*nodes),
                mixed=form,
                split=split,
                rebuild=d.rebuild is not None,
                last_micro=d.last_micro,
            )

    # -- tensors ----------------------------------------------------------------------------------

    def _tensors(
        self, slots: tuple[Slot, ...]
    ) -> tuple[tuple[Retention, ...], tuple[Transient, ...], tuple[tuple[int, int, Tensor], ...]]:
        writes: dict[Tensor, list[Slot]] = {t: [] for t in self.storage.tensors}
        reads: dict[Tensor, list[Slot]] = {t: [] for t in self.storage.tensors}
        for s in slots:
            for t in s.writes:
                writes[t].append(s)
            for t in s.reads:
                if t not in s.writes:
                    reads[t].append(s)
        retentions: list[Retention] = []
        transients: list[Transient] = []
        fixed: list[tuple[int, int, Tensor]] = []
        for t in self.storage.tensors:
            own = self._of_adapter(t)
            if own and not writes[t]:
                continue  # a gradient on its way through an adapter
            if not t.is_forward:
                transients.append(self._transient(t, writes[t], reads[t], len(slots) - 1))
                continue
            auxiliary = self._kept_for_backward(t)
            window = None
            if not auxiliary and not own:
                first = [s.index for s in writes[t] if not s.rebuild]
                always = [s.index for s in reads[t] if s.activity == ALWAYS and self._early(s)]
                window = (min(first, default=0), max([*first, *always], default=0))
            events = self._events(t, writes[t], reads[t], window)
            if any(not e.writes for e in events):
                out = writes[t][0].activity if auxiliary or own else ALWAYS
                retentions.append(Retention(t, window, events, out))
            elif window is not None:
                fixed.append((*window, t))
        return tuple(retentions), tuple(transients), tuple(fixed)

    def _of_adapter(self, tensor: Tensor) -> bool:
        """Whether a tensor is there for an adapter alone."""
        steps = (self.adapters.forward, self.adapters.passing)
        return bool(tensor.writers) and any(tensor.writers[0] in nodes for nodes in steps)

    @staticmethod
    def _early(slot: Slot) -> bool:
        return slot.node.phase in ("forward", "loss") and not slot.rebuild

    def _events(
        self,
        tensor: Tensor,
        writes: list[Slot],
        reads: list[Slot],
        window: tuple[int, int] | None,
    ) -> tuple[Event, ...]:
        after = -1 if window is None else window[1]
        events = [
            Event(s.index, s.activity, False, s.index, may_load=self.cost.storage is not None)
            for s in reads
            if s.index > after
        ]
        runs: dict[int, list[int]] = {}
        for s in writes:
            if s.index > after:
                runs.setdefault(s.activity, []).append(s.index)
        events += [Event(max(r), a, True, min(r), may_load=False) for a, r in runs.items()]
        return tuple(sorted(events, key=lambda e: e.slot))

    def _overwrites(self, slots: tuple[Slot, ...]) -> Iterator[Overwrite]:
        """Results that would be in place without readers that are a matter of choice."""
        at = {s.node: s.index for s in slots if not s.rebuild and s.update is None}
        for node, source, readers in self.storage.refused:
            acts = {a for n in readers for a in self._there_for(n)}
            if node in at and ALWAYS not in acts and node.out not in self.storage.aliases:
                yield Overwrite(at[node], self.storage.of[source], tuple(sorted(acts)))

    def _there_for(self, node: Node) -> set[int]:
        """Activities without which a node is not part of the graph."""
        if node.phase == "forward" and self._auxiliary(node):
            readers = {c for v in node.outputs for c in self.consumers[v]}
            return {a for c in readers for a in self._there_for(c)}
        return {self.node_activity[node]}

    def _transient(
        self, tensor: Tensor, writes: list[Slot], reads: list[Slot], last: int
    ) -> Transient:
        users = sorted([*writes, *reads], key=lambda s: s.index)
        if self.training.loss in tensor.values:
            return Transient(tensor, users[0].index, ((last, (ALWAYS,)),))
        segments: list[tuple[int, tuple[int, ...]]] = []
        for i, s in enumerate(users):
            acts = {u.activity for u in users[i:]}
            segments.append((s.index, (ALWAYS,) if ALWAYS in acts else tuple(sorted(acts))))
        return Transient(tensor, users[0].index, tuple(segments))
