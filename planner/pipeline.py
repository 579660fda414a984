"""From a request to a checked plan: import, candidates, solve, schedule, layout, plan, check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from ..ir.autodiff import build_training, candidates
from ..ir.errors import UnsupportedModelError, UsageError
from ..ir.precision import lower
from ..ir.ranges import Method
from ..ir.training import Candidate, TrainingGraph, TrainingSpec
from . import baselines
from .assemble import assemble, source_of
from .baselines import Baseline
from .check import CheckReport, check
from .cost import CostModel
from .demands import Demand, demanded_precision, demanded_updates
from .device import Device, load_core
from .importance import prior
from .imported import Imported, import_requested
from .infeasible import explain
from .linear import SolverName, SolverOptions
from .plan import Asked, Budget, DeviceInfo, ObjectiveName, Plan
from .precision import choosable, pinned, unchosen
from .problem import Limits, Problem
from .sizes import LARGEST_BYTES
from .stages import Decided, LayoutError, ProvenInfeasibleError, Scheduled, Stages
from .train_set import choose

Progress = Callable[[str], None]
#: Seconds or joules that no training step takes.
LARGEST_AMOUNT = 1e12


@dataclass(frozen=True)
class Request:
    """What is asked of the planner.

    Attributes:
        model: ONNX file.
        device: Target.
        storage: Id of the device's storage to page to, None for no paging.
        ram_bytes: RAM budget; None: the device's RAM less its reserve.
        flash_bytes: Flash budget; None: the device's flash less its reserve.
        latency_s: Limit of one training step.
        energy_j: Limit of one training step.
        spec: Loss, optimizer, micro-batches.
        train: ``auto``, ``all``, ``last``, ``bias``, or ``NAME`` and ``NAME=RATIO`` items.
        batch: Samples per micro-batch.
        fold_batchnorm: Fold frozen BatchNormalization into the layer before it.
        precision: ``LAYER=i8``, ``mixed`` and ``f32`` pins, with wildcards; see
            ``planner.precision``.
        calibration: Samples that a float model's scales are found from, or ``synthetic``: a guess
            without samples; None: it stays f32.
        calibration_method: How; see ``ir.calibrate``.
        objective: ``learn`` chooses the update set; the others need a fixed one.
        with_relaxations: If no plan keeps the limits, also plan what else would work.
        demands: Decisions that are given; ``planner.explain`` asks what they would cost.
    """

    model: Path
    device: Device
    storage: str | None = None
    ram_bytes: int | None = None
    flash_bytes: int | None = None
    latency_s: float | None = None
    energy_j: float | None = None
    spec: TrainingSpec = field(default_factory=TrainingSpec)
    train: tuple[str, ...] = ("auto",)
    batch: int = 1
    fold_batchnorm: bool = True
    precision: tuple[str, ...] = ()
    calibration: Path | Literal["synthetic"] | None = None
    calibration_method: Method = "minmax"
    objective: ObjectiveName = "learn"
    solver: SolverName = "auto"
    gap: float = 1e-3
    time_limit_s: float = 60.0
    seed: int = 0
    threads: int = 1
    with_baselines: bool = True
    with_relaxations: bool = True
    demands: tuple[Demand, ...] = ()

    def __post_init__(self) -> None:
        """Reject limits that can't be meant."""
        for what, n in (("RAM", self.ram_bytes), ("flash", self.flash_bytes)):
            if n is not None and not 0 <= n <= LARGEST_BYTES:
                raise UsageError(f"{what} budget {n:,} is outside 0 to {LARGEST_BYTES:,} bytes")
        for what, x in (("latency", self.latency_s), ("energy", self.energy_j)):
            if x is not None and not 0 < x < LARGEST_AMOUNT:
                raise UsageError(f"{what} limit {x:g} can't be kept by any plan")


@dataclass(frozen=True)
class PlannedModel:
    """A checked plan with what it was made from.

    Attributes:
        scales: Where the scales of i8 come from; empty for a model without.
    """

    plan: Plan
    training: TrainingGraph
    device: Device
    report: CheckReport
    baselines: tuple[Baseline, ...]
    scales: str = ""


@dataclass(frozen=True)
class Start:
    """What is known before the first solve.

    Attributes:
        decided: All candidates, or the update set that is given; precisions as far as given.
        every: All candidates.
        free: Layers whose precision is to be chosen.
        fixed: The update set is given.
        learns: There is something to choose that learning depends on.
    """

    decided: Decided
    every: tuple[Candidate, ...]
    free: tuple[str, ...]
    fixed: bool
    learns: bool


def make_plan(
    request: Request, on_progress: Progress | None = None, imported: Imported | None = None
) -> PlannedModel:
    """Plan a model.

    Args:
        request: What is asked.
        on_progress: Told what goes on.
        imported: The request's model, if it is imported already.

    Raises:
        UnsupportedModelError: The model can't be imported or trained.
        InfeasibleError: No plan keeps the limits; a ``NoPlanError`` says what binds and what would
            work.
        UsageError: The request contradicts itself.
    """
    progress = on_progress or (lambda _: None)
    model = imported or import_requested(request, progress)
    try:
        return Planner(request, model, progress).run()
    except ProvenInfeasibleError:
        progress("no plan fits: finding out why")
    raise explain(request, lambda r: Planner(r, model, progress))


class Planner:
    """Plans one request for a model that is imported already.

    Attributes:
        request: What is asked.
        limits: The budgets, those of the device included.
        cost: Predicted costs.
    """

    def __init__(self, request: Request, imported: Imported, progress: Progress) -> None:
        """Find limits and costs."""
        self.request, self.progress, self.imported = request, progress, imported
        self.forward = imported.forward
        device = request.device
        storage = None if request.storage is None else device.find_storage(request.storage)
        self.cost = CostModel(device, load_core(device.core), storage)
        ram, flash = request.ram_bytes, request.flash_bytes
        if ram is None:
            ram = max(0, device.ram_region()[1] - device.reserve.ram_bytes)
        if flash is None:
            flash = max(0, device.flash_bytes - device.reserve.flash_bytes)
        cycles = None
        if request.latency_s is not None:
            cycles = int(request.latency_s * device.clock_hz.value)
        self.limits = Limits(
            ram, flash, cycles, request.energy_j, storage.bytes if storage is not None else 0
        )
        self.options = SolverOptions(
            request.solver, request.gap, request.time_limit_s, request.seed, request.threads
        )

    @cached_property
    def prepared(self) -> tuple[Stages, Start]:
        """Everything before the first solve."""
        r = self.request
        pins = pinned(self.forward, r.precision) | demanded_precision(r.demands)
        annotated = bool(self.forward.quantization)
        precision = unchosen(self.forward, pins) if annotated else {}
        free = choosable(self.forward, pins) if annotated else []
        lowered = lower(self.forward, precision) if annotated else self.forward
        every = candidates(lowered, imported=self.forward)
        if not every:
            raise UnsupportedModelError(
                f"{r.model}: no constant weight, bias or scale that could be trained;"
                " `odt-plan check` shows every node"
            )
        chosen = choose(lowered, r.train, every)
        if chosen is not None:
            chosen = demanded_updates(chosen, r.demands)
        elif r.objective != "learn":
            raise UsageError(
                f"objective {r.objective} needs a fixed update set: add --train all, last, bias"
                " or parameter names"
            )
        stages = Stages(
            self.forward,
            r.spec,
            self.cost,
            self.limits,
            self.options,
            prior(self.forward, every),
            self.imported.noise,
            self.progress,
            r.demands,
        )
        decided = Decided(tuple(every if chosen is None else chosen), precision)
        fixed = chosen is not None
        learns = r.objective == "learn" and (not fixed or bool(free))
        return stages, Start(decided, tuple(every), tuple(free), fixed, learns)

    def problem(self) -> Problem:
        """The first problem that is solved; the request is infeasible if and only if this is."""
        stages, start = self.prepared
        if start.learns:
            return stages.learn_problem(start.decided, fixed=start.fixed, free=start.free)
        return stages.schedule_problem(start.decided, start.free)

    def last_problem(self, decided: Decided) -> Problem:
        """The problem of what is kept, rebuilt and paged, all else decided."""
        stages, _ = self.prepared
        training = build_training(stages.lowered(decided), self.request.spec, decided.updates)
        return stages.problem(training, fixed=True)

    def run(self) -> PlannedModel:
        """Solve, place, check.

        Raises:
            ProvenInfeasibleError: No plan keeps the limits.
            InfeasibleError: None was found.
        """
        r = self.request
        stages, start = self.prepared
        bounds, done = self._solve(stages, start)
        plan = assemble(
            self.forward,
            stages.lowered(replace(done.decided, streamed=())),
            done.training,
            done.schedule,
            self.cost,
            source=source_of(r.model, r.batch, r.fold_batchnorm),
            device=self._device_info(),
            bounds=bounds,
            gap=r.gap,
            importance=stages.achieved(done.training),
            solver=(r.solver, r.seed, stages.time_s),
            calibrated={
                n: q for n, q in self.forward.quantization.items() if n not in self.imported.in_file
            },
            precision=done.decided.precision,
            streamed=done.decided.streamed,
            noise_avoided=stages.noise_avoided(done.decided),
            asked=Asked(train=r.train, precision=r.precision, noise=dict(self.imported.noise)),
        )
        report = check(plan, done.training, r.device)
        rivals = self._baselines(stages, start) if r.with_baselines else ()
        return PlannedModel(plan, done.training, r.device, report, rivals, self.imported.scales)

    def _solve(self, stages: Stages, start: Start) -> tuple[dict[ObjectiveName, float], Scheduled]:
        """All stages; an update set that fits but for its layout is chosen again with less RAM."""
        r = self.request
        if not start.learns:
            name: ObjectiveName = "latency" if r.objective == "learn" else r.objective
            done = stages.schedule(start.decided, name, start.free)
            return {name: done.bound}, done
        bounds: dict[ObjectiveName, float] = {}
        limits = self.limits
        for last in (False, False, True):
            decided, bound = stages.learn(
                start.decided, fixed=start.fixed, free=start.free, limits=limits
            )
            bounds.setdefault("learn", bound)
            try:
                done = stages.schedule(decided, "latency", ())
                break
            except LayoutError as e:
                if last:
                    raise
                self.progress(f"no layout, {e.over_bytes:,} B over: choosing updates again")
                limits = replace(limits, ram_bytes=limits.ram_bytes - e.over_bytes)
        return {**bounds, "latency": done.bound}, done

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
