"""From a request to a checked plan: import, candidates, solve, schedule, layout, plan, check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from ..ir.autodiff import build_training, candidates
from ..ir.calibrate import SYNTHETIC, calibrate, knows_activations, load_samples
from ..ir.errors import UnsupportedModelError, UsageError
from ..ir.onnx_import import import_model
from ..ir.precision import lower
from ..ir.ranges import Method
from ..ir.training import Candidate, TrainingGraph, TrainingSpec
from . import baselines
from .assemble import assemble, source_of
from .at_once import reference
from .baselines import Baseline
from .check import CheckReport, check
from .cost import CostModel
from .device import Device, load_core
from .importance import prior
from .linear import SolverName, SolverOptions
from .objective import Goal, Weighted
from .plan import Budget, DeviceInfo, ObjectiveName, Plan, SolverInfo, Stopped
from .precision import choosable, pinned, unchosen
from .problem import Limits, Problem
from .progress import Watch
from .search import Bounds, Found, Search
from .stages import LAYOUT_TRIES, Decided, LayoutError, Scheduled, Stages
from .train_set import choose


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
        objective: One figure, or figures with weights; see ``planner.objective``. ``learn`` chooses
            the update set; without it there must be a fixed one.
        time_limit_s: Wall clock limit of the whole run. A first plan is made in any case, if
            heuristics find one.
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
    objective: ObjectiveName | Mapping[ObjectiveName, float] = "learn"
    solver: SolverName = "auto"
    gap: float = 1e-3
    time_limit_s: float = 60.0
    seed: int = 0
    threads: int = 1
    with_baselines: bool = True


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


def make_plan(request: Request, watch: Watch | None = None) -> PlannedModel:
    """Plan a model.

    Args:
        request: What is asked.
        watch: Told what goes on. ``watch.stop()``, called by another thread or a signal handler,
            ends the run with the best plan so far.

    Raises:
        UnsupportedModelError: The model can't be imported or trained.
        InfeasibleError: No plan keeps the limits; says what binds and what would work.
        UsageError: The request contradicts itself.
        KeyboardInterrupt: Stopped before there was any plan.
    """
    watch = watch or Watch()
    watch.begin(request.time_limit_s)
    return _Planner(request, watch).run()


class _Planner:
    def __init__(self, request: Request, watch: Watch) -> None:
        self.request, self.watch = request, watch
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

    def run(self) -> PlannedModel:
        r = self.request
        self.forward = import_model(r.model, batch=r.batch, fold_batchnorm=r.fold_batchnorm)
        self.noise: dict[str, float] = {}
        scales = self._annotate()
        pins = pinned(self.forward, r.precision)
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
        weights = {r.objective: 1.0} if isinstance(r.objective, str) else r.objective
        if chosen is None and "learn" not in weights:
            raise UsageError(
                f"objective {', '.join(weights)} needs a fixed update set: add --train all, last,"
                " bias or parameter names, or weigh it with learn"
            )
        stages = Stages(
            self.forward,
            r.spec,
            self.cost,
            self.limits,
            self.options,
            prior(self.forward, every),
            self.noise,
            self._smallest_ram,
            self.watch,
        )
        start = Decided(tuple(chosen or every), precision)
        search = Search(
            stages,
            start,
            free,
            chosen is not None,
            self._goals(stages, start, choose(lowered, ("all",), every), chosen, free),
            r.gap,
            self.watch,
            lambda scheduled, bounds, stopped: self._checked(stages, scheduled, bounds, stopped),
        )
        found = search.run()
        rivals: tuple[Baseline, ...] = ()
        if r.with_baselines and not self.watch.interrupted:
            rivals = self._baselines(stages, start, every)
        return PlannedModel(
            found.plan, found.scheduled.training, r.device, found.report, rivals, scales
        )

    def _goals(
        self,
        stages: Stages,
        start: Decided,
        whole: Sequence[Candidate] | None,
        chosen: Sequence[Candidate] | None,
        free: Sequence[str],
    ) -> tuple[Goal, ...]:
        """The stages of the objective."""
        objective = self.request.objective
        if not isinstance(objective, str):
            assert whole
            return (Weighted(objective, reference(stages, chosen or whole, start)),)
        if objective != "learn":
            return (objective,)
        return ("latency",) if chosen and not free else ("learn", "latency")

    def _checked(
        self, stages: Stages, done: Scheduled, bounds: Bounds, stopped: Stopped | None
    ) -> Found:
        """Assemble the plan of a schedule and have it checked."""
        r, decided = self.request, done.decided
        plan = assemble(
            self.forward,
            stages.lowered(replace(decided, streamed=())),
            done.training,
            done.schedule,
            self.cost,
            source=source_of(r.model, r.batch, r.fold_batchnorm),
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
                n: q for n, q in self.forward.quantization.items() if n not in self.in_file
            },
            precision=decided.precision,
            streamed=decided.streamed,
            noise_avoided=stages.noise_avoided(decided),
        )
        return Found(done, plan, check(plan, done.training, r.device))

    def _annotate(self) -> str:
        """Find the scales that the file lacks, if wanted; says where they are from."""
        r = self.request
        self.in_file = frozenset(self.forward.quantization)
        known = knows_activations(self.forward)
        if r.calibration is None:
            if self.in_file and not known:
                return (
                    "the model file has scales of weights alone, so every layer is f32; give"
                    " samples with --calib for i8"
                )
            return "scales from the model file" if known else ""
        if known:
            raise UsageError(
                f"--calib: {r.model} is quantized already and brings its own scales; leave --calib"
                " out, or give the float model"
            )
        self.watch.stage("calibrating")
        samples = None if r.calibration == SYNTHETIC else load_samples(r.calibration)
        found = calibrate(self.forward, samples, method=r.calibration_method)
        self.noise = found.weight_noise
        return found.note if r.calibration == SYNTHETIC else f"{found.note} of {r.calibration.name}"

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

    def _smallest_ram(self, live_bytes: int) -> int | None:
        """RAM from ``live_bytes`` on with which a plan with a layout is found; None: none is."""
        ram = live_bytes
        for _ in range(LAYOUT_TRIES):
            try:
                make_plan(replace(self.request, ram_bytes=ram, with_baselines=False))
            except LayoutError as e:
                ram += e.over_bytes
            else:
                return ram
        return None

    # -- comparison -------------------------------------------------------------------------------

    def _baselines(
        self, stages: Stages, start: Decided, every: Sequence[Candidate]
    ) -> tuple[Baseline, ...]:
        """Plain heuristics under the same accounting; see ``planner.baselines``."""
        result: list[Baseline] = []
        lowered = stages.lowered(start)

        def problem(chosen: Sequence[Candidate]) -> Problem:
            training = build_training(lowered, self.request.spec, chosen)
            return stages.problem(training, fixed=True)

        for name, train in (("last-layer", "last"), ("bias-only", "bias")):
            try:
                chosen = choose(lowered, (train,), every)
            except UsageError:
                continue  # the model has no such parameters, nothing to compare with
            assert chosen
            fixed = problem(chosen)
            result.append(baselines.evaluate(name, fixed, baselines.keep_all(fixed)))
        whole = choose(lowered, ("all",), every)
        assert whole
        fixed = problem(whole)
        for name, rule in baselines.RULES.items():
            result.append(baselines.evaluate(name, fixed, rule(fixed)))
        return tuple(result)
