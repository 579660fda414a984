"""From a request to a checked plan: import, candidates, solve, schedule, layout, plan, check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from ..ir.adapters import without_unused
from ..ir.autodiff import build_training, candidates, param_slots
from ..ir.candidates import with_states
from ..ir.channels import Channels, of_parts, reordered
from ..ir.errors import InfeasibleError, UnsupportedModelError, UsageError
from ..ir.freezing import frozen_before, stop_reasons, untrainable, way_out
from ..ir.import_options import PLAIN, ImportOptions
from ..ir.obstacles import report_obstacles
from ..ir.precision import Precision, lower, quantizable
from ..ir.ranges import Method
from ..ir.training import Candidate, TrainingGraph, TrainingSpec
from . import baselines
from .assemble import assemble, source_of
from .at_once import reference
from .baselines import Baseline
from .check import CheckReport, check
from .cost import CostModel
from .decided import Decided, ProvenInfeasibleError, Scheduled
from .demands import Demand, demanded_precision, demanded_updates
from .device import Device, load_core
from .importance import scores
from .imported import Imported, import_requested
from .infeasible import explain
from .known import Known, KnownPlan
from .linear import SolverName, SolverOptions
from .objective import Goal, Weighted
from .order import best_order
from .plan import (
    Asked,
    Budget,
    DeviceInfo,
    ImportanceTable,
    ObjectiveName,
    Plan,
    SolverInfo,
    Stopped,
)
from .precision import choosable, pinned, unchosen
from .problem import Limits, Problem, RamRegion
from .progress import Watch
from .rebuild import as_planned
from .replay import RAM, Wanted, storages, with_replay
from .search import Bounds, Found, Search, Start, StoppedEarlyError
from .sizes import LARGEST_BYTES
from .stages import Stages
from .state_forms import state_forms
from .train_set import choose

#: Seconds or joules that no training step takes.
LARGEST_AMOUNT = 1e12


@dataclass(frozen=True)
class Request:
    """What is asked of the planner.

    Attributes:
        model: ONNX file.
        device: Target.
        importing: How the file is imported.
        storage: Id of the device's storage to page to, None for no paging.
        ram_bytes: RAM budget in one region; None: ``ram_regions``.
        ram_regions: RAM budgets by name of the device's RAM runs; empty: all of them less the
            device's reserve.
        flash_bytes: Flash budget; None: the device's flash less its reserve.
        latency_s: Limit of one training step.
        energy_j: Limit of one training step.
        min_steps: Training steps that paging may not wear the storage out in.
        spec: Loss, optimizer, micro-batches.
        train: ``auto``, ``all``, ``last``, ``bias``, or ``NAME`` and ``NAME=RATIO`` items.
        freeze_before: Nodes that nothing may be updated before; see ``ir.freezing``.
        state: What may become of an optimizer's tensors, see ``planner.state_forms``.
        precision: ``LAYER=i8``, ``mixed`` and ``f32`` pins, with wildcards; see
            ``planner.precision``.
        calibration: Samples that a float model's scales are found from, or ``synthetic``: a guess
            without samples; None: it stays f32.
        calibration_method: How; see ``ir.calibrate``.
        importance: Scores of updates; None: the prior.
        objective: One figure, or figures with weights; see ``planner.objective``. ``learn`` chooses
            the update set; without it there must be a fixed one.
        time_limit_s: Wall clock limit of the whole run. A first plan is made in any case, if
            heuristics find one; where there is none, finding out why takes as long again.
        replay: Keep what the frozen front makes of the samples; see ``planner.replay``.
        with_relaxations: If no plan keeps the limits, also plan what else would work.
        demands: Decisions that are given; ``planner.explain`` asks what they would cost.
        known: What plans of the same request under other budgets tell, in the file's order.
    """

    model: Path
    device: Device
    importing: ImportOptions = PLAIN
    storage: str | None = None
    ram_bytes: int | None = None
    ram_regions: tuple[tuple[str, int], ...] = ()
    flash_bytes: int | None = None
    latency_s: float | None = None
    energy_j: float | None = None
    min_steps: int | None = None
    spec: TrainingSpec = field(default_factory=TrainingSpec)
    train: tuple[str, ...] = ("auto",)
    freeze_before: tuple[str, ...] = ()
    state: tuple[str, ...] = ("keep",)
    precision: tuple[str, ...] = ()
    calibration: Path | Literal["synthetic"] | None = None
    calibration_method: Method = "minmax"
    importance: ImportanceTable | None = None
    objective: ObjectiveName | Mapping[ObjectiveName, float] = "learn"
    solver: SolverName = "auto"
    gap: float = 1e-3
    time_limit_s: float = 60.0
    seed: int = 0
    threads: int = 1
    replay: Wanted | None = None
    with_baselines: bool = True
    with_relaxations: bool = True
    demands: tuple[Demand, ...] = ()
    known: Known = field(default_factory=Known)

    def __post_init__(self) -> None:
        """Reject limits that can't be meant."""
        given = [("RAM", self.ram_bytes), ("flash", self.flash_bytes)]
        given += [(f"{name} budget", n) for name, n in self.ram_regions]
        for what, n in given:
            if n is not None and not 0 <= n <= LARGEST_BYTES:
                raise UsageError(f"{what} budget {n:,} is outside 0 to {LARGEST_BYTES:,} bytes")
        if self.min_steps is not None and self.min_steps < 1:
            raise UsageError(f"--min-steps: {self.min_steps} steps are too few; give 1 or more")
        for what, x in (("latency", self.latency_s), ("energy", self.energy_j)):
            if x is not None and not 0 < x < LARGEST_AMOUNT:
                raise UsageError(f"{what} limit {x:g} can't be kept by any plan")
        self._check_replay()

    def _check_replay(self) -> None:
        place = None if self.replay is None else self.replay.place
        if place in (None, RAM):
            return
        if place not in storages(self.device):
            known = ", ".join([RAM, *storages(self.device)])
            raise UsageError(
                f"--replay-in: {self.device.id} has no {place!r} for samples; it has {known}"
            )
        if self.storage not in (None, place):
            raise UsageError(
                f"--replay-in {place}: the plan pages to {self.storage}, and firmware knows one"
                f" storage; give --replay-in {self.storage} or ram"
            )

    @property
    def weights(self) -> Mapping[ObjectiveName, float]:
        """Figures of the objective."""
        return {self.objective: 1.0} if isinstance(self.objective, str) else self.objective


@dataclass(frozen=True)
class PlannedModel:
    """A checked plan with what it was made from.

    Attributes:
        known: What a search under looser limits may begin with.
        scales: Where the scales of i8 come from; empty for a model without.
        no_replay: Why the plan has no replay that was asked for.
        notes: What the importer changed to make a model that can be trained.
    """

    plan: Plan
    training: TrainingGraph
    device: Device
    report: CheckReport
    baselines: tuple[Baseline, ...]
    known: KnownPlan
    scales: str = ""
    no_replay: str = ""
    notes: tuple[str, ...] = ()


def make_plan(
    request: Request, watch: Watch | None = None, imported: Imported | None = None
) -> PlannedModel:
    """Plan a model.

    Args:
        request: What is asked.
        watch: Told what goes on. ``watch.stop()``, called by another thread or a signal handler,
            ends the run with the best plan so far.
        imported: The request's model, if it is imported already.

    Raises:
        UnsupportedModelError: The model can't be imported or trained.
        InfeasibleError: No plan keeps the limits; a ``NoPlanError`` says what binds and what would
            work.
        UsageError: The request contradicts itself.
        KeyboardInterrupt: Stopped before there was any plan.
    """
    watch = watch or Watch()
    watch.begin(request.time_limit_s)
    model = imported or import_requested(request, watch)
    try:
        return Planner(request, model, watch).run()
    except ProvenInfeasibleError:
        watch.stage("no plan fits: finding out why")
    watch.begin(request.time_limit_s)
    request = replace(request, known=Known())  # an explanation also asks about looser limits
    raise explain(request, lambda r: Planner(r, model, watch.part(r.time_limit_s)), watch)


def _regions(request: Request) -> tuple[RamRegion, ...]:
    """RAM that a plan may use, preferred regions first.

    Raises:
        UsageError: The device has no run of RAM of that name.
    """
    device = request.device
    budgets = {r.name: n for r, n in device.ram_budgets}
    if request.ram_bytes is not None:
        budgets = {device.main_run.name: request.ram_bytes}
    elif request.ram_regions:
        for name, _ in request.ram_regions:
            if name not in budgets:
                raise UsageError(
                    f"--ram: {device.id} has no RAM region {name!r}; it has {', '.join(budgets)}"
                )
        budgets = dict(request.ram_regions)
    return tuple(
        RamRegion(r.name, budgets[r.name], r.extra_cycles_per_byte)
        for r in device.ram_runs
        if r.name in budgets
    )


def _is_plain(regions: Sequence[RamRegion], device: Device) -> bool:
    """One region, the largest of the device, without extra cycles: nothing has to be told."""
    names = {(r.name, r.extra_cycles_per_byte) for r in regions}
    return names == {(device.main_run.name, 0.0)}


class Planner:
    """Plans one request for a model that is imported already.

    Attributes:
        request: What is asked.
        watch: Told what goes on; says when to end.
        limits: The budgets, those of the device included.
        cost: Predicted costs.
        frozen: Constants that may not be updated -> the node of ``--freeze-before`` that says so.
        stuck: Other parameters that can't be updated -> the node that stops their gradients.
    """

    def __init__(self, request: Request, imported: Imported, watch: Watch) -> None:
        """Find limits and costs."""
        core = load_core(request.device.core)
        spec = replace(request.spec, tile_bytes=core.gradient_tile.value)
        self.request, self.watch, self.imported = replace(request, spec=spec), watch, imported
        self.forward = reordered(imported.forward, self._channels)
        self.frozen = frozen_before(self.forward, request.freeze_before)
        self.stuck = untrainable(self.forward, self.frozen)
        device = request.device
        storage = None if request.storage is None else device.find_storage(request.storage)
        self.cost = CostModel(device, core, storage)
        regions, flash = _regions(request), request.flash_bytes
        if flash is None:
            flash = device.flash_bytes - device.reserve.flash_bytes
            if storage is not None and storage.region is not None:
                flash -= storage.bytes
            flash = max(0, flash)
        cycles = None
        if request.latency_s is not None:
            cycles = int(request.latency_s * device.clock_hz.value)
        worn = None
        if storage is not None and request.min_steps is not None:
            worn = self.cost.most_worn(request.min_steps, request.spec.micro_batches)
        self.limits = Limits(
            sum(r.bytes for r in regions),
            flash,
            cycles,
            request.energy_j,
            storage.bytes if storage is not None else 0,
            () if _is_plain(regions, device) else regions,
            worn,
        )
        self.options = SolverOptions(
            request.solver, request.gap, request.time_limit_s, request.seed, request.threads
        )

    @cached_property
    def prepared(self) -> tuple[Stages, Start]:
        """Everything before the first solve."""
        r = self.request
        pins = pinned(self.forward, r.precision) | demanded_precision(r.demands)
        self._check_adapters(pins)
        annotated = bool(self.forward.quantization)
        precision = unchosen(self.forward, pins) if annotated else {}
        free = choosable(self.forward, pins) if annotated else []
        lowered = lower(self.forward, precision) if annotated else self.forward
        known = candidates(lowered, imported=self.forward)
        every = [c for c in known if c.param not in self.frozen]
        if known and not every:
            raise UsageError(
                f"--freeze-before {', '.join(r.freeze_before)}: all parameters of"
                f" {self.forward.name} lie before; name a node further to the front"
            )
        if not every:
            raise UnsupportedModelError(
                f"{r.model}: no constant weight, bias or scale that could be trained;"
                " `odt-plan check` shows every node"
            )
        chosen = choose(lowered, r.train, every, self.frozen)
        if any(c.param in self.stuck for c in (every if chosen is None else chosen)):
            reasons = stop_reasons(self.forward, self.stuck)
            help_ = way_out(self.forward, self.stuck, r.freeze_before)
            raise report_obstacles(r.model, reasons, help_)
        every = [c for c in every if c.param not in self.stuck]
        if chosen is None and "learn" not in r.weights:
            raise UsageError(
                f"objective {', '.join(r.weights)} needs a fixed update set: add --train all, last,"
                " bias or parameter names, or weigh it with learn"
            )
        states = state_forms(r.state, r.spec, pages=r.storage is not None)
        several = len(states.forms) > 1
        slots = param_slots(self.forward)
        averages = {name for name, uses in slots.items() if uses[0][1].role == "statistic"}
        states_of_every = with_states(every, states.forms, averages)
        stages = Stages(
            self.forward,
            r.spec,
            self.cost,
            self.limits,
            self.options,
            scores(self.forward, states_of_every, r.importance, states.sgd_worth),
            self.imported.noise,
            self.watch,
            r.demands,
            all_updated=chosen is not None and several,
            sgd_worth=states.sgd_worth,
            measured=r.importance,
        )
        fixed = chosen is not None and not several
        whole = chosen if chosen is not None else choose(lowered, ("all",), every)
        assert whole
        goals = self._goals(stages, Decided(tuple(whole), precision), fixed=fixed, free=free)
        offered = every if chosen is None else demanded_updates(self.forward, chosen, r.demands)
        decided = Decided(tuple(with_states(offered, states.forms, averages)), precision)
        return stages, Start(decided, tuple(every), tuple(free), fixed, goals, r.known)

    def _check_adapters(self, pins: Mapping[str, Precision]) -> None:
        """Adapters and the layers beside them are float ones; beside modules of blocks, all are."""
        layers = quantizable(self.forward) if self.forward.quantization else {}
        lite = self.forward.adapters and self.request.importing.lite_residual is not None
        if lite and any(p is None and pins.get(n) != "f32" for n, p in layers.items()):
            raise UsageError(
                "--lite-residual: its modules are for float models: give --precision '*=f32', or"
                " leave --calib out"
            )
        for adapter in self.forward.adapters:
            for name in (adapter.layer, *adapter.nodes):
                if layers.get(name, "f32") is None and pins.get(name) != "f32":
                    raise UsageError(
                        f"--lora: {name} has scales, with which it might become an integer layer;"
                        f" adapters are for float ones: give --precision '{adapter.layer}*=f32', or"
                        " '*=f32' for all layers, or leave --calib out"
                    )

    def _goals(
        self, stages: Stages, plain: Decided, *, fixed: bool, free: Sequence[str]
    ) -> tuple[Goal, ...]:
        """The stages of the objective; weighted figures are relative to plain training."""
        objective = self.request.objective
        if not isinstance(objective, str):
            return (Weighted(objective, reference(stages, plain)),)
        if objective != "learn":
            return (objective,)
        return ("latency",) if fixed and not free else ("learn", "latency")

    def problem(self) -> Problem:
        """The first problem that is solved, in the order that needs the least RAM.

        The request is infeasible if it is so in the order of the file, too.
        """
        stages, start = self.prepared
        stages = replace(stages, ranks=self._better_order(stages, start))
        if not start.learns:
            return stages.schedule_problem(start.decided, start.free)
        return stages.learn_problem(
            start.decided, fixed=start.fixed, free=start.free, goal=start.goals[0]
        )

    def last_problem(self, decided: Decided, *, reordered: bool = False) -> Problem:
        """The problem of what is kept, rebuilt and paged, all else decided."""
        stages, start = self.prepared
        if reordered:
            stages = replace(stages, ranks=self._better_order(stages, start))
        training = build_training(stages.lowered(decided), self.request.spec, decided.updates)
        return stages.problem(training, fixed=True)

    def run(self) -> PlannedModel:
        """Solve, place, check.

        Raises:
            ProvenInfeasibleError: No plan keeps the limits.
            InfeasibleError: None was found.
            KeyboardInterrupt: Stopped before there was any plan.
        """
        r = self.request
        stages, start = self.prepared
        found = self._found(stages, start)
        rivals: tuple[Baseline, ...] = ()
        if r.with_baselines and not self.watch.interrupted:
            rivals = self._baselines(stages, start)
        plan, training, report = self._in_least_order(found)
        reason = ""
        if r.replay is not None:
            plan, reason = with_replay(plan, training, r.replay, self.cost)
            report = check(plan, training, r.device)
        scales, notes = self.imported.scales, self.imported.forward.notes
        return PlannedModel(
            plan, training, r.device, report, rivals, found.known, scales, reason, notes
        )

    def _found(self, stages: Stages, start: Start) -> Found:
        """The best plan in the order of the file, or in a better one; bounds are of its order.

        The other order is tried if there is one and the file's has no plan, or one that may leave
        something to gain: in the time that is left then, by heuristics alone where none is.
        """
        gap, failed = self.request.gap, None
        first: Found | None = None
        search = Search(stages, start, gap, self.watch, self._checked)
        try:
            first = search.run()
        except InfeasibleError as e:
            failed = e
        ranks = None
        if not search.settled() and not self.watch.interrupted:
            ranks = self._better_order(stages, start)
        if ranks is not None:
            self.watch.stage("another order of operators")
            anew = replace(start, known=Known())  # which is of the file's order
            other = Search(replace(stages, ranks=ranks), anew, gap, self.watch, self._checked)
            second = None
            try:
                second = other.run()
            except InfeasibleError as e:
                failed = e
            except StoppedEarlyError:
                if first is None:
                    raise
            if first is None or (second is not None and second.merit > first.merit):
                first = second
        if first is None:
            assert failed is not None
            raise failed
        return first

    def _better_order(self, stages: Stages, start: Start) -> Mapping[str, int] | None:
        """An order of operators that may need less RAM than that of the file."""
        lowered = stages.lowered(start.decided)
        chosen: Sequence[Candidate] | None = start.first[0].updates
        if not start.fixed and not stages.all_updated:
            chosen = choose(lowered, ("all",), start.every)
        assert chosen
        return best_order(build_training(lowered, self.request.spec, chosen)).ranks

    def _checked(self, done: Scheduled, bounds: Bounds, stopped: Stopped | None) -> Found:
        """Assemble the plan of a schedule and have it checked."""
        r, decided, (stages, _) = self.request, done.decided, self.prepared
        unused = set(self.forward.adapters).difference(done.training.graph.adapters)
        gone = {name for a in unused for name in a.nodes}
        plan = assemble(
            self.forward,
            without_unused(
                stages.lowered(replace(decided, streamed=())), {c.param for c in decided.updates}
            ),
            done.training,
            done.schedule,
            self.cost,
            source=source_of(r.model, r.importing, self._channels),
            device=self._device_info(),
            bounds=bounds,
            gap=r.gap,
            importance=stages.achieved(done.training),
            solver=SolverInfo(
                name=r.solver,
                version=f"ortools {version('ortools')}",
                seed=r.seed,
                time_s=round(stages.time_s, 6),
                stopped=stopped,
            ),
            calibrated={
                n: q
                for n, q in self.imported.forward.quantization.items()
                if n not in self.imported.in_file
            },
            precision={n: p for n, p in decided.precision.items() if n not in gone},
            streamed=decided.streamed,
            noise_avoided=stages.noise_avoided(decided),
            asked=Asked(
                train=r.train,
                precision=r.precision,
                state=r.state,
                freeze_before=r.freeze_before,
                noise=dict(self.imported.noise),
                importance=r.importance,
            ),
        )
        return Found(done, plan, check(plan, done.training, r.device))

    @property
    def _channels(self) -> Channels:
        """The order of channels that scores are for."""
        table = self.request.importance
        return {} if table is None else table.channels

    def _in_least_order(self, found: Found) -> tuple[Plan, TrainingGraph, CheckReport]:
        """The plan with channels as in the file wherever no part of a weight is updated by them."""
        plan, training = found.plan, found.scheduled.training
        model, updates = self.imported.forward, found.scheduled.decided.updates
        needed = of_parts(model, plan.model.channels, updates)
        if needed == plan.model.channels:
            return plan, training, found.report
        source = plan.model.model_copy(update={"channels": needed})
        plan = plan.model_copy(update={"model": source})
        training = build_training(as_planned(plan, model), self.request.spec, updates)
        return plan, training, check(plan, training, self.request.device)

    def _device_info(self) -> DeviceInfo:
        r, limits = self.request, self.limits
        return DeviceInfo(
            id=r.device.id,
            storage=r.storage,
            budget=Budget(
                ram_bytes=limits.ram_bytes,
                flash_bytes=limits.flash_bytes,
                latency_s=r.latency_s,
                energy_j=r.energy_j,
                storage_bytes=limits.storage_bytes,
                min_steps=r.min_steps,
            ),
        )

    # -- comparison -------------------------------------------------------------------------------

    def _baselines(self, stages: Stages, start: Start) -> tuple[Baseline, ...]:
        """Plain heuristics under the same accounting; see ``planner.baselines``."""
        result: list[Baseline] = []
        lowered = stages.lowered(start.decided)

        def problem(chosen: Sequence[Candidate]) -> Problem:
            training = build_training(lowered, self.request.spec, chosen)
            return stages.problem(training, fixed=True)

        for name, train in (("last-layer", "last"), ("bias-only", "bias")):
            try:
                chosen = choose(lowered, (train,), start.every)
            except UsageError:
                continue  # the model has no such parameters, nothing to compare with
            assert chosen
            fixed = problem(chosen)
            result.append(baselines.evaluate(name, fixed, baselines.keep_all(fixed)))
        whole = choose(lowered, ("all",), start.every)
        assert whole
        fixed = problem(whole)
        for name, rule in baselines.RULES.items():
            result.append(baselines.evaluate(name, fixed, rule(fixed)))
        return tuple(result)
