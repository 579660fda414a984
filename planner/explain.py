"""Why a plan decides as it does about a layer: what the other way would cost, planned for real.

Every decision is forced the other way under the same budgets, and the rest is planned again. Where
that is impossible, the answer is the conflict, with the bytes that are missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from ..ir.autodiff import build_training
from ..ir.candidates import channel_axis, param_slots
from ..ir.channels import orders_of
from ..ir.errors import InfeasibleError, UsageError
from ..ir.precision import mixable, quantizable
from ..ir.streaming import Block, blocks
from ..ir.training import Candidate
from .choices import score_of
from .conflict import NO_LIMIT
from .decided import Decided
from .demands import Demand, DemandKind, impose
from .device import Device
from .flip import Flip, flip_of
from .importance import scores
from .imported import Imported
from .infeasible import NoPlanError, words
from .linear import SolverName
from .milp import Milp
from .pipeline import Planner, Request, make_plan
from .plan import Asked, ObjectiveName, Plan, UpdateDecision
from .precision import pinned
from .problem import Problem
from .progress import Watch
from .rebuild import forward_of, spec_of, updates_of
from .replay import RAM
from .schedule import realize
from .search import Start
from .stages import Stages
from .subjects import Subject, SubjectKind, matching, subjects_of
from .tensors import aligned

#: Channels that are told one by one.
_TOLD = 8


@dataclass(frozen=True)
class Price:
    """What an update takes by itself, in the precision of its layer.

    Attributes:
        importance: Score.
        source: Where the score comes from.
        kept_bytes: RAM for the weight, optimizer tensors and accumulator.
        saved_bytes: Forward tensors that its gradient reads.
        cycles: Predicted cycles of its steps in a training step, without backward up to there.
    """

    importance: int
    source: str
    kept_bytes: int
    saved_bytes: int
    cycles: int


@dataclass(frozen=True)
class Outcome:
    """What happens when a decision is forced the other way.

    Attributes:
        forced: What was demanded.
        status: ``planned``; ``impossible`` (proven); ``unknown`` (no plan was found within the time
            limit, or no layout).
        why: Lines that say why it is impossible or unknown.
        missing_bytes: RAM that is missing, where RAM alone is missing.
        score: Learn score of the other plan.
        score_bound: Proven bound on the score of all such plans.
        score_change: Against this plan.
        latency_change_s: Against this plan.
        ram_change_bytes: Against this plan.
        less: Updates that shrink or fall away.
        more: Updates that grow or are added.
    """

    forced: Demand
    status: Literal["planned", "impossible", "unknown"]
    why: tuple[str, ...] = ()
    missing_bytes: int | None = None
    score: float = 0.0
    score_bound: float = 0.0
    score_change: float = 0.0
    latency_change_s: float = 0.0
    ram_change_bytes: int = 0
    less: tuple[str, ...] = ()
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """One decision of a plan.

    Attributes:
        name: Parameter, layer, tensor or block.
        kind: What is decided about it.
        chosen: What the plan does, in words.
        given: The option that asked for it; empty where the solver chose.
        price: Of an update.
        others: The other ways.
        flip: Of the first other way.
    """

    name: str
    kind: SubjectKind
    chosen: str
    given: str
    price: Price | None
    others: tuple[Outcome, ...]
    flip: Flip


class Explainer:
    """Explains decisions of one plan."""

    def __init__(
        self,
        plan: Plan,
        plan_path: Path,
        device: Device,
        *,
        model_path: Path | None = None,
        gap: float = 1e-3,
        time_limit_s: float = 20.0,
        watch: Watch | None = None,
    ) -> None:
        """Build the plan's request again.

        Args:
            plan: The plan.
            plan_path: Its file; the model is beside it.
            device: Its device.
            model_path: Model file to use instead.
            gap: Relative gap to prove.
            time_limit_s: Of one plan, or of one solve beside it.
            watch: Told what goes on.

        Raises:
            UsageError: The model file is not that of the plan, or the plan does not tell what was
                asked for.
        """
        if plan.asked is None:
            raise UsageError(f"{plan_path}: does not tell what was asked for; plan the model again")
        self.plan, self.asked = plan.without_replay(), plan.asked  # what steps cost by themselves
        self._replay = plan.replay
        self.forward = forward_of(plan, plan_path, model_path)
        self._watch = watch or Watch()
        in_file = frozenset(self.forward.quantization) - plan.quantization.keys()
        self._imported = Imported(self.forward, in_file, self.asked.noise, "")
        path = model_path or plan_path.parent / plan.model.file
        request = _request_of(plan, self.asked, path, device)
        self.request = replace(request, gap=gap, time_limit_s=time_limit_s)
        names = {v.name for v in self.forward.inputs}
        names |= quantizable(self.forward).keys() if self.forward.quantization else set()
        precision = {n: p for n, p in plan.decisions.precision.items() if n in names}
        self._decided = Decided(
            tuple(updates_of(plan)),
            precision if self.forward.quantization else {},
            streamed=plan.decisions.streamed,
        )

    def explain(self, pattern: str) -> Iterator[Decision]:
        """All decisions about a layer, parameter or tensor; see ``subjects.matching``."""
        about = {
            "update": self._update,
            "precision": self._precision,
            "tensor": self._tensor,
            "block": self._block,
        }
        known = subjects_of(self.plan, self.forward, self._last.storage, self._blocks)
        for s in matching(known, pattern, self.plan.model.name):
            self._watch.stage(f"the other way: {s.name}")
            yield about[s.kind](s)

    @cached_property
    def _planner(self) -> Planner:
        return Planner(self.request, self._imported, self._watch)

    @property
    def _stages(self) -> Stages:
        return self._planner.prepared[0]

    @property
    def _start(self) -> Start:
        return self._planner.prepared[1]

    @cached_property
    def _last(self) -> Problem:
        """The problem of what this plan keeps."""
        return self._planner.last_problem(self._decided, reordered=self.plan.reordered)

    @cached_property
    def _first(self) -> Problem:
        """The problem that is solved first."""
        return self._planner.problem()

    @cached_property
    def _blocks(self) -> tuple[Block, ...]:
        whole = replace(self._decided, streamed=())
        return blocks(self._stages.lowered(whole)) if self.forward.quantization else ()

    # -- decisions --------------------------------------------------------------------------------

    def _update(self, s: Subject) -> Decision:
        u = next(u for u in self.plan.decisions.updates if u.param == s.name)
        auto = self.asked.train in ((), ("auto",))
        trial = self.plan.decisions.trial
        given = "" if auto else f"--train {','.join(self.asked.train)}"
        if trial is not None and not auto:
            given = f"the trial, which chose the {trial.chosen}"
        if (node := self._planner.frozen.get(s.name)) is not None:
            given = f"--freeze-before {node}"
            return Decision(s.name, "update", "frozen", given, None, (), Flip(searched=False))
        if (node := self._planner.stuck.get(s.name)) is not None:
            chosen = f"frozen: no gradient passes {node} behind it"
            return Decision(s.name, "update", chosen, "", None, (), Flip(searched=False))
        other = Demand("freeze" if u.ratio else "update", s.name)
        outcome = self._planned(other)
        flip = Flip(searched=False)
        if other.kind == "update" and self._start.goals[0] == "learn":
            flip = flip_of(self._first, (other,), "learn", self._planner.options)
        chosen = f"{u.ratio:.1%} updated{self._which(u)}" if u.ratio else "frozen"
        chosen += {"keep": "", "paged": ", optimizer state paged", "sgd": ", plain SGD"}[u.state]
        front = self.plan.steps[: self._replay.front] if self._replay is not None else ()
        if any(u.node in step.nodes for step in front):
            chosen += ", its layer runs once per sample (replay)"
        return Decision(s.name, "update", chosen, given, self._price(u), (outcome,), flip)

    def _which(self, u: UpdateDecision) -> str:
        """The file's channels that a part is of, where they are not the first ones."""
        axis = channel_axis(param_slots(self.forward)[u.param])
        orders = orders_of(self.forward, self.plan.model.channels).get(u.param)
        order = None if orders is None or axis is None else orders[axis]
        if u.channels is None or order is None:
            return ""
        told = ", ".join(map(str, order[: min(u.channels, _TOLD)]))
        more = f" and {u.channels - _TOLD} more" if u.channels > _TOLD else ""
        return f", input channels {told}{more} of the file"

    def _price(self, u: UpdateDecision) -> Price:
        """Of what the plan updates, or else of the whole tensor, as the only update of a graph."""
        own = next((c for c in self._decided.updates if c.param == u.param), Candidate(u.param))
        lowered = self._stages.lowered(replace(self._decided, streamed=()))
        update = build_training(lowered, spec_of(self.plan), [own]).updates[0]
        every, worth = [*self._start.every, own], self._stages.sgd_worth
        score = scores(self.forward, every, self.asked.importance, worth)[own]
        grad = update.grad_node or update.apply_node
        samples = {v.name for v in lowered.inputs}
        saved = {
            v
            for v in grad.operands()
            if v.type.nbytes
            and (v.producer.phase == "forward" if v.producer else v.name in samples)
        }
        cost, micro = self._planner.cost, update.accumulate_node is not None
        cycles = cost.update_cycles(update) * self.plan.training.micro_batches
        return Price(
            score_of(update, score),
            self.plan.decisions.importance_source,
            sum(aligned(v.type.nbytes) for v in update.resident),
            sum(aligned(v.type.nbytes) for v in saved),
            cycles + (cost.node_cycles(update.apply_node) if micro else 0),
        )

    def _precision(self, s: Subject) -> Decision:
        now = self.plan.decisions.precision[s.name]
        pins = [i for i in self.asked.precision if s.name in pinned(self.forward, (i,))]
        given = f"--precision {pins[-1]}" if pins else ""
        reason = quantizable(self.forward)[s.name]
        kinds: list[DemandKind] = []
        if not given and reason is None:
            if mixable(self.forward).get(s.name, "no weights") is None:
                kinds.append("i8" if now == "mixed" else "mixed")
            kinds.append("f32")
        others = tuple(self._planned(Demand(k, s.name)) for k in kinds)
        flip = Flip(searched=False)
        if kinds and kinds[0] != "f32" and self._start.goals[0] == "learn":
            demand = (Demand(kinds[0], s.name),)
            flip = flip_of(self._first, demand, "learn", self._planner.options)
        chosen = now if reason is None else f"{now}: {reason}"
        return Decision(s.name, "precision", chosen, given, None, others, flip)

    def _tensor(self, s: Subject) -> Decision:
        a = next(a for a in self.plan.decisions.activations if a.value == s.name)
        words = {"keep": "kept", "recompute": "recomputed", "page": "paged"}
        chosen = f"{words[a.action]}, {a.bytes:,} B"
        if self._replay is not None and self._replay.value == s.name:
            place = "RAM" if self._replay.place == RAM else self._replay.place
            chosen += f", replayed from {place}"
        if a.action == "keep":
            return Decision(s.name, "tensor", chosen, "", None, (), Flip(searched=False))
        demand = Demand("keep", s.name)
        flip = Flip(searched=False)
        if self._start.goals[-1] == "latency":
            flip = flip_of(self._last, (demand,), "latency", self._planner.options)
        return Decision(s.name, "tensor", chosen, "", None, (self._kept(demand),), flip)

    def _block(self, s: Subject) -> Decision:
        outcome = self._planned(Demand("whole", s.name))
        return Decision(s.name, "block", "runs row by row", "", None, (outcome,), Flip(False))

    # -- the other way ----------------------------------------------------------------------------

    def _planned(self, demand: Demand) -> Outcome:
        """Plan everything again with one decision given."""
        request = replace(self.request, demands=(demand,))
        try:
            other = make_plan(request, self._watch.part(request.time_limit_s), self._imported).plan
        except NoPlanError as e:
            short = e.shortfalls[0] if len(e.shortfalls) == 1 else None
            missing = None
            if short is not None and short.limit == "ram":
                missing = round(short.needs - short.has)
            why = tuple(words(e.explanation))
            return Outcome(demand, "impossible", why, missing)
        except InfeasibleError as e:
            return Outcome(demand, "unknown", (str(e),))
        less, more = _changes(self.plan, other)
        score = _score(other)
        bound = next((o.bound for o in other.objective if o.name == "learn"), score)
        return Outcome(
            demand,
            "planned",
            score=score,
            score_bound=bound,
            score_change=score - _score(self.plan),
            latency_change_s=other.claims.latency_s - self.plan.claims.latency_s,
            ram_change_bytes=other.claims.ram_bytes.total - self.plan.claims.ram_bytes.total,
            less=less,
            more=more,
        )

    def _kept(self, demand: Demand) -> Outcome:
        """Choose again what else is kept, with the plan's updates, precisions and blocks."""
        problem, options = impose(self._last, (demand,)), self._planner.options
        result = Milp(problem).solve(self._start.goals[-1], options)
        score = _score(self.plan)
        if result.solution is not None:
            s = realize(
                problem,
                result.solution,
                seed=options.seed,
                hide_within=problem.limits,
            )
            ram = s.arena_bytes + s.state_bytes
            if s.over_bytes(problem.limits) > 0:
                return Outcome(demand, "unknown", ("live bytes fit, but no layout was found",))
            claims = self.plan.claims
            latency = problem.cost.latency_s(s.cycles) - claims.latency_s
            return Outcome(
                demand, "planned", score=score, score_bound=score, latency_change_s=latency,
                ram_change_bytes=ram - claims.ram_bytes.total,
            )  # fmt: skip
        if result.status != "infeasible":
            return Outcome(demand, "unknown", (f"no plan in {options.time_limit_s:g} s",))
        has = problem.limits.largest_bytes
        wide = replace(problem, limits=problem.limits.in_one_region(NO_LIMIT))
        need = Milp(wide).solve("ram", replace(options, gap=0.0))
        if need.solution is None:
            return Outcome(demand, "impossible", ("another limit than RAM does not allow it",))
        least = round(need.value if need.status == "optimal" else need.bound)
        why = f"needs {least:,} B at {need.peak_node}, has {has:,} B, {least - has:,} B too few"
        return Outcome(demand, "impossible", (why,), least - has)


def _request_of(plan: Plan, asked: Asked, model: Path, device: Device) -> Request:
    """What was asked for when a plan was made."""
    budget = plan.device.budget
    first = plan.objective[0]
    objective: ObjectiveName | Mapping[ObjectiveName, float]
    weights = {t.name: t.weight for t in first.terms}
    objective = weights if first.name == "weighted" else first.name
    return Request(
        model=model,
        device=device,
        storage=plan.device.storage,
        ram_bytes=None if plan.regions else budget.ram_bytes,
        ram_regions=tuple((r.name, r.budget) for r in plan.regions),
        flash_bytes=budget.flash_bytes,
        latency_s=budget.latency_s,
        energy_j=budget.energy_j,
        min_steps=budget.min_steps,
        spec=spec_of(plan),
        train=asked.train,
        state=asked.state,
        freeze_before=asked.freeze_before,
        importing=plan.model.importing,
        precision=asked.precision,
        importance=asked.importance,
        objective=objective,
        solver=_solver(plan.solver.name),
        seed=plan.solver.seed,
        with_baselines=False,
        with_relaxations=False,
    )


def _solver(name: str) -> SolverName:
    return next((s for s in get_args(SolverName) if s == name), "auto")


def _score(plan: Plan) -> float:
    """Importance of the updates, and of the noise that is avoided."""
    decided = plan.decisions
    return sum(u.importance for u in decided.updates) + decided.noise_avoided


def _changes(plan: Plan, other: Plan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Updates that are less, and those that are more, in another plan."""
    less: list[str] = []
    more: list[str] = []
    now, then = ({u.param: u.ratio for u in p.decisions.updates} for p in (plan, other))
    for param in now | then:  # an adapter that is not updated is in no plan
        was, will = now.get(param, 0.0), then.get(param, 0.0)
        if will != was:
            told = f"{param} {_part(was)} -> {_part(will)}"
            (less if will < was else more).append(told)
    return tuple(less), tuple(more)


def _part(ratio: float) -> str:
    return f"{ratio:.1%}" if ratio else "frozen"
