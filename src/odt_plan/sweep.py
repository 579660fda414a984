"""Many plans at once, on the cores of this machine or on a Dask cluster.

A task carries what its plan needs as data: the bytes of the model and its samples, the device, the
options. So it runs on a worker that shares no file system with this machine, and paths mean nothing
to it. Models for microcontrollers are small; an executor sends them with every task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

from .ir.errors import InfeasibleError, OdtPlanError, Shortfall, UsageError

if TYPE_CHECKING:
    from .planner.known import KnownPlan
    from .planner.pipeline import PlannedModel, Request
    from .planner.plan import StageName

#: Told of each task that is done: its index and outcome, in the order of completion.
OnDone = Callable[[int, "Outcome"], None]


@dataclass(frozen=True)
class Task:
    """One plan to make; small and picklable.

    Attributes:
        name: What it is called in messages.
        request: Its ``model`` and ``calibration`` are the paths that messages show.
        model_files: Name relative to the model's folder -> content: the model and what it keeps in
            files beside it.
        samples: Content of the calibration file, if there is one.
    """

    name: str
    request: Request
    model_files: Mapping[str, bytes]
    samples: bytes | None

    def run(self) -> Outcome:
        """Make the plan."""
        return solve(self)

    def lost(self, reason: str) -> Outcome:
        """The outcome where no worker lived to tell one."""
        return Outcome(None, OdtPlanError.exit_code, reason)


@dataclass(frozen=True)
class Stage:
    """A stage of the objective, as in ``planner.plan.Objective``."""

    value: float
    bound: float


@dataclass(frozen=True)
class Figures:
    """What a checked plan takes and reaches; times and energies are predictions.

    Attributes:
        learn: Summed importance, and the score of noise that mixed layers avoid.
        stages: Optimized, with the bound that was proven.
        updates: Updated parameters as items of ``--train``.
        tensors: Number of trainable tensors.
        mixed: Layers that were chosen to be mixed.
        reordered: Operators run in another order than the file's; bounds are of that order.
    """

    ram_bytes: int
    flash_bytes: int
    cycles: int
    latency_s: float
    energy_j: float
    learn: float
    stages: Mapping[StageName, Stage]
    updates: tuple[str, ...]
    tensors: int
    mixed: tuple[str, ...]
    reordered: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a task.

    Attributes:
        figures: Of its plan; None: there is none.
        exit_code: That of the same request on the command line: 0 for a plan.
        reason: Why there is no plan.
        shortfalls: Limits that bind, where an infeasible request told them.
        seconds: Wall clock, import to check.
        plan: What a task of the same model may begin with under a looser limit.
    """

    figures: Figures | None = None
    exit_code: int = 0
    reason: str = ""
    shortfalls: tuple[Shortfall, ...] = ()
    seconds: float = 0.0
    plan: KnownPlan | None = None


class Executor(Protocol):
    """Runs tasks: ``local_pool`` on this machine, ``dask_cluster`` on others."""

    def run(self, tasks: Sequence[Task], on_done: OnDone) -> None:
        """Run all tasks; returns when the last is done."""


def pack(request: Request, name: str) -> Task:
    """The task of a request, with the content of its files.

    Args:
        request: Its model has been imported before, so it is readable.
        name: For messages.

    Raises:
        UsageError: A file can't be read.
    """
    from .ir.calibrate import SYNTHETIC
    from .ir.onnx_external import external_files

    try:
        parts = [Path(request.model.name), *external_files(request.model)]
        content = {p.as_posix(): (request.model.parent / p).read_bytes() for p in parts}
        samples = None
        if request.calibration is not None and request.calibration != SYNTHETIC:
            samples = request.calibration.read_bytes()
    except OSError as e:
        raise UsageError(f"{e.filename}: can't be read: {e.strerror or e}") from None
    return Task(name, request, content, samples)


def solve(task: Task) -> Outcome:
    """Make the plan of a task; whatever is wrong with it stands in the outcome."""
    from .planner.pipeline import make_plan

    begin = time.perf_counter()
    with TemporaryDirectory(prefix="odt-plan-") as folder:
        request = _unpacked(task, Path(folder))
        try:
            planned = make_plan(request)
            outcome = Outcome(_figures(planned), plan=planned.known)
        except OdtPlanError as e:
            short = e.shortfalls if isinstance(e, InfeasibleError) else ()
            outcome = Outcome(None, e.exit_code, _shown(str(e), task, request), short)
        except Exception as e:  # one row of a sweep, not its end
            reason = f"{type(e).__name__}: {_shown(str(e), task, request)}; this is a defect"
            outcome = Outcome(None, OdtPlanError.exit_code, reason)
    return replace(outcome, seconds=time.perf_counter() - begin)


def _unpacked(task: Task, folder: Path) -> Request:
    """The request for copies of the files in this folder."""
    request = task.request
    for name, content in task.model_files.items():
        path = folder / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    request = replace(request, model=folder / "model" / request.model.name)
    if task.samples is not None:
        assert isinstance(request.calibration, Path)
        path = folder / request.calibration.name
        path.write_bytes(task.samples)
        request = replace(request, calibration=path)
    return request


def _shown(text: str, task: Task, unpacked: Request) -> str:
    """A message about the copies, told of the files that the user knows."""
    for copy, own in (
        (unpacked.model, task.request.model),
        (unpacked.model.parent, task.request.model.parent),
        (unpacked.calibration, task.request.calibration),
    ):
        text = text.replace(str(copy), str(own)) if isinstance(copy, Path) else text
    return text


def _figures(planned: PlannedModel) -> Figures:
    plan = planned.plan
    claims, decisions = plan.claims, plan.decisions
    chosen = [u for u in decisions.updates if u.ratio > 0]
    return Figures(
        ram_bytes=claims.ram_bytes.total,
        flash_bytes=claims.flash_bytes.total,
        cycles=claims.cycles,
        latency_s=claims.latency_s,
        energy_j=claims.energy_j,
        learn=sum(u.importance for u in chosen) + decisions.noise_avoided,
        stages={o.name: Stage(o.value, o.bound) for o in plan.objective},
        updates=tuple(u.param if u.channels is None else f"{u.param}={u.ratio}" for u in chosen),
        tensors=len(decisions.updates),
        mixed=tuple(n for n, p in decisions.precision.items() if p == "mixed"),
        reordered=plan.reordered,
    )
