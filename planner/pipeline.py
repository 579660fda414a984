"""From a request to a checked plan: import, candidates, solve, schedule, layout, plan, check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..ir.autodiff import build_training, candidates
from ..ir.calibrate import SYNTHETIC, calibrate, knows_activations, load_samples
from ..ir.errors import InfeasibleError, UnsupportedModelError, UsageError
from ..ir.graph import Graph
from ..ir.onnx_import import import_model
from ..ir.precision import Precision, lower
from ..ir.ranges import Method
from ..ir.streaming import blocks, stream
from ..ir.training import Candidate, TrainingGraph, TrainingSpec
from . import baselines
from .assemble import assemble, source_of
from .baselines import Baseline
from .check import CheckReport, check
from .choices import Choices, score_of
from .cost import CostModel
from .device import Device, load_core
from .importance import prior
from .infeasible import explain
from .linear import SolverName, SolverOptions
from .milp import Milp, SolveResult
from .plan import Budget, DeviceInfo, ObjectiveName, Plan
from .precision import NOISE_WEIGHT, choosable, pinned, unchosen
from .problem import Limits, Problem
from .schedule import Schedule, realize
from .solution import Solution
from .timeline import build_problem
from .train_set import choose

Progress = Callable[[str], None]
#: Solve again with a tighter RAM limit at most this often when live bytes fit but no layout does.
LAYOUT_TRIES = 6
MIXED: Precision = "mixed"


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


def make_plan(request: Request, on_progress: Progress | None = None) -> PlannedModel:
    """Plan a model.

    Raises:
        UnsupportedModelError: The model can't be imported or trained.
        InfeasibleError: No plan keeps the limits; says what binds and what would work.
        UsageError: The request contradicts itself.
    """
    return _Planner(request, on_progress or (lambda _: None)).run()


class LayoutError(InfeasibleError):
    """Live bytes fit, but no addresses were found.

    Attributes:
        over_bytes: Bytes that the last layout was over the budget.
    """

    def __init__(self, ram_bytes: int, over_bytes: int) -> None:
        """Name the budget and the excess."""
        super().__init__(
            f"live bytes fit into {ram_bytes:,} B of RAM, but no layout was found in {LAYOUT_TRIES}"
            f" tries; allow {over_bytes:,} B more with --ram"
        )
        self.over_bytes = over_bytes


class _Planner:
    def __init__(self, request: Request, progress: Progress) -> None:
        self.request, self.progress = request, progress
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
        self.time_s = 0.0
        self.streamed: tuple[str, ...] = ()

    def run(self) -> PlannedModel:
        r = self.request
        self.forward = import_model(r.model, batch=r.batch, fold_batchnorm=r.fold_batchnorm)
        self.noise: dict[str, float] = {}
        scales = self._annotate()
        pins = pinned(self.forward, r.precision)
        self.precision: dict[str, Precision] = {}
        self.free: list[str] = []
        if self.forward.quantization:
            self.precision = unchosen(self.forward, pins)
            self.free = choosable(self.forward, pins)
        lowered = self._lowered()
        every = candidates(lowered, imported=self.forward)
        if not every:
            raise UnsupportedModelError(
                f"{r.model}: no constant weight, bias or scale that could be trained;"
                " `odt-plan check` shows every node"
            )
        self.importance = prior(self.forward, every)
        chosen = choose(lowered, r.train, every)
        if chosen is None and r.objective != "learn":
            raise UsageError(
                f"objective {r.objective} needs a fixed update set: add --train all, last, bias"
                " or parameter names"
            )
        bounds: dict[ObjectiveName, float] = {}
        if r.objective == "learn" and (chosen is None or self.free):
            chosen, bounds["learn"] = self._learn(chosen, every)
            self.free = []
        assert chosen is not None
        name: ObjectiveName = "latency" if r.objective == "learn" else r.objective
        training, schedule, bounds[name] = self._schedule(chosen, name)
        plan = assemble(
            self.forward,
            self._lowered(),
            training,
            schedule,
            self.cost,
            source=source_of(r.model, r.batch, r.fold_batchnorm),
            device=self._device_info(),
            bounds=bounds,
            gap=r.gap,
            importance=self._achieved(training),
            solver=(r.solver, r.seed, self.time_s),
            calibrated={
                n: q for n, q in self.forward.quantization.items() if n not in self.in_file
            },
            precision=self.precision,
            streamed=self.streamed,
            noise_avoided=self._noise_avoided(),
        )
        report = check(plan, training, r.device)
        rivals = self._baselines(every) if r.with_baselines else ()
        return PlannedModel(plan, training, r.device, report, rivals, scales)

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
        self.progress("calibrating")
        samples = None if r.calibration == SYNTHETIC else load_samples(r.calibration)
        found = calibrate(self.forward, samples, method=r.calibration_method)
        self.noise = found.weight_noise
        return found.note if r.calibration == SYNTHETIC else f"{found.note} of {r.calibration.name}"

    # -- solving ----------------------------------------------------------------------------------

    def _problem(
        self,
        training: TrainingGraph,
        *,
        fixed: bool,
        limits: Limits | None = None,
        choices: Choices | None = None,
    ) -> Problem:
        return build_problem(
            training,
            self.cost,
            limits or self.limits,
            self._scores(training),
            fixed_updates=fixed,
            choices=choices,
        )

    def _scores(self, training: TrainingGraph) -> dict[Candidate, int]:
        """Importance of the graph's updates; a ratio given by hand is scored beside the rest."""
        wanted = [u.candidate for u in training.updates]
        scores = prior(self.forward, [*self.importance, *wanted])
        return {c: scores[c] for c in wanted}

    def _achieved(self, training: TrainingGraph) -> dict[Candidate, int]:
        """Importance of the updates in the precision that they have."""
        scores = self._scores(training)
        return {u.candidate: score_of(u, scores[u.candidate]) for u in training.updates}

    def _noise_gain(self, layers: Sequence[str]) -> dict[str, int]:
        """What it is worth that a layer is mixed: the noise of its i8 weights."""
        most: dict[str, int] = {}
        for c, score in self.importance.items():
            most[c.param] = max(most.get(c.param, 0), score)
        unit = NOISE_WEIGHT * sum(most.values())
        return {n: round(unit * self.noise.get(n, 0.0)) for n in layers}

    def _noise_avoided(self) -> float:
        """Of the layers that were chosen to be mixed; a pin decides nothing."""
        mixed = [n for n in self.free if self.precision[n] == MIXED]
        return float(sum(self._noise_gain(mixed).values()))

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

    def _lowered(self, mixed: Sequence[str] = ()) -> Graph:
        """The forward graph in its precisions, these layers mixed."""
        if not self.forward.quantization:
            return self.forward
        return lower(self.forward, {**self.precision, **dict.fromkeys(mixed, MIXED)})

    def _choices(
        self, chosen: Sequence[Candidate], lowered: Graph, layers: Sequence[str]
    ) -> Choices:
        """Layers that may be mixed and blocks that may be streamed."""
        found = blocks(lowered)
        return Choices(
            build_training(self._lowered(layers), self.request.spec, chosen) if layers else None,
            self._noise_gain(layers),
            found,
            stream(lowered, [b.name for b in found]),
        )

    def _learn(
        self, fixed: Sequence[Candidate] | None, every: Sequence[Candidate]
    ) -> tuple[list[Candidate], float]:
        """The update set and the precisions with the highest score, and a bound on it."""
        offered, lowered = list(fixed or every), self._lowered()
        training = build_training(lowered, self.request.spec, offered)
        choices = self._choices(offered, lowered, self.free)
        problem = self._problem(training, fixed=fixed is not None, choices=choices)
        self.progress(f"choosing updates and precisions: {len(problem.slots)} slots")
        result = self._solve(problem, "learn")
        assert result.solution is not None
        self._mix(problem, result.solution)
        chosen = result.solution.candidates(problem) if fixed is None else list(fixed)
        return chosen, result.bound

    def _mix(self, problem: Problem, solution: Solution) -> None:
        """Note which layers the solver has made mixed."""
        for m in problem.mixed_layers:
            if m.activity in solution.active:
                self.precision[m.name] = MIXED

    def _solve(self, problem: Problem, name: ObjectiveName) -> SolveResult:
        result = self._attempt(problem, name)
        if result.status == "infeasible":
            raise explain(problem, self.options, self._smallest_ram)
        return result

    def _attempt(self, problem: Problem, name: ObjectiveName) -> SolveResult:
        """Solve; without a solution the result is proven infeasible."""
        result = Milp(problem).solve(name, self.options, self.progress)
        self.time_s += result.time_s
        if result.solution is None and result.status != "infeasible":
            raise InfeasibleError(
                f"no plan found within {self.options.time_limit_s:g} s, and none excluded;"
                " raise --time-limit or the budgets"
            )
        return result

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

    def _schedule(
        self, chosen: Sequence[Candidate], name: ObjectiveName
    ) -> tuple[TrainingGraph, Schedule, float]:
        """Solve for a fixed update set until the layout, too, keeps the RAM budget.

        The bound is that of the first solve: it holds for the budget that was asked for, later ones
        hold for tighter budgets only.
        """
        limits, over = self.limits, 0
        bound: float | None = None
        unchosen = dict(self.precision)
        for _ in range(LAYOUT_TRIES):
            self.precision = dict(unchosen)
            solve = self._solve if limits is self.limits else self._attempt
            lowered, self.streamed = self._lowered(), ()
            result: SolveResult | None = None
            if lowered is not self.forward:
                choices = self._choices(chosen, lowered, self.free)
                training = build_training(lowered, self.request.spec, chosen)
                problem = self._problem(training, fixed=True, limits=limits, choices=choices)
                self.progress(f"choosing what is streamed by rows: {len(problem.slots)} slots")
                result = solve(problem, name)
                if result.solution is None:
                    break
                bound = result.bound if bound is None else bound
                self._mix(problem, result.solution)
                active = result.solution.active
                self.streamed = tuple(b.name for b in problem.streams if b.activity in active)
                lowered = stream(self._lowered(), self.streamed)
            training = build_training(lowered, self.request.spec, chosen)
            problem = self._problem(training, fixed=True, limits=limits)
            self.progress(f"choosing what is kept: {len(problem.slots)} slots")
            result = solve(problem, name)
            if result.solution is None:
                break  # tightened below the live bytes of any plan
            bound = result.bound if bound is None else bound
            schedule = realize(problem, result.solution, seed=self.options.seed)
            over = schedule.arena_bytes + schedule.state_bytes - self.limits.ram_bytes
            if over <= 0:
                return training, schedule, bound
            self.progress(f"live bytes fit, the layout is {over:,} B over: tightening")
            limits = replace(limits, ram_bytes=limits.ram_bytes - max(over, 4))
        raise LayoutError(self.limits.ram_bytes, over)

    # -- comparison -------------------------------------------------------------------------------

    def _baselines(self, every: Sequence[Candidate]) -> tuple[Baseline, ...]:
        """Plain heuristics under the same accounting; see ``planner.baselines``."""
        result: list[Baseline] = []
        lowered = self._lowered()
        for name, train in (("last-layer", "last"), ("bias-only", "bias")):
            try:
                chosen = choose(lowered, (train,), every)
            except UsageError:
                continue  # the model has no such parameters, nothing to compare with
            assert chosen
            problem = self._fixed_problem(lowered, chosen)
            result.append(baselines.evaluate(name, problem, baselines.keep_all(problem)))
        whole = choose(lowered, ("all",), every)
        assert whole
        problem = self._fixed_problem(lowered, whole)
        for name, rule in baselines.RULES.items():
            result.append(baselines.evaluate(name, problem, rule(problem)))
        return tuple(result)

    def _fixed_problem(self, lowered: Graph, chosen: Sequence[Candidate]) -> Problem:
        return self._problem(build_training(lowered, self.request.spec, chosen), fixed=True)
