"""Which models train on which devices: one plan per pair, and what binds where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .ir.errors import InfeasibleError, OdtPlanError, UnsupportedModelError, UsageError
from .planner.device import GENERIC_DEVICE, Device, load_device
from .planner.pipeline import Request
from .planner.sizes import LARGEST_BYTES
from .sweep import Executor, Outcome, Task, pack


@dataclass(frozen=True)
class Fit:
    """One model on one device.

    Attributes:
        model: Path as it was given.
        device: Id.
        outcome: The plan's figures, or why there is none.
        most: Bound on what can be learned without limits; None: not known.
    """

    model: str
    device: str
    outcome: Outcome
    most: float | None

    @property
    def verdict(self) -> str:
        """``fits``; ``too large``: proven; ``unknown``: no plan found, none excluded;
        ``unsupported``: the model can't be planned at all; ``rejected``: the options or the samples
        don't suit it, or it can't be read;
        ``failed``: a defect or a lost worker.
        """  # noqa: D205
        code = self.outcome.exit_code
        if code == InfeasibleError.exit_code:
            return "too large" if self.outcome.shortfalls else "unknown"
        if code == UnsupportedModelError.exit_code:
            return "unsupported"
        if code == UsageError.exit_code:
            return "rejected"
        return "failed" if code else "fits"

    @property
    def share(self) -> float | None:
        """Part of the most that can be learned."""
        figures = self.outcome.figures
        return figures.learn / self.most if figures is not None and self.most else None


class Survey:
    """Plans every model on every device; ``fits`` tells at any time what is known."""

    def __init__(
        self, models: Sequence[str], devices: Sequence[Device], request: Callable[[str], Request]
    ) -> None:
        """Read the models.

        Args:
            models: Paths of the files.
            devices: Targets.
            request: Path -> what is asked, for any device; raises UnsupportedModelError for a model
                that can't be planned, UsageError for one that the options or the samples don't
                suit. Either is a row of its own.

        Raises:
            UsageError: Two devices have one id.
        """
        ids = [d.id for d in devices]
        if twice := sorted({i for i in ids if ids.count(i) > 1}):
            raise UsageError(f"--device: two devices have the id {twice[0]}; rename one")
        self._models, self._devices = models, devices
        self._tasks: dict[tuple[str, str | None], Task] = {}
        self._done: dict[tuple[str, str | None], Outcome] = {}
        for model in models:
            try:
                asked = replace(request(model), with_baselines=False, with_relaxations=False)
                task = pack(asked, model)
            except (UnsupportedModelError, UsageError) as e:
                outcome = Outcome(None, e.exit_code, str(e))
                self._done |= {(model, d.id): outcome for d in devices}
                continue
            free = replace(
                asked,
                device=load_device(GENERIC_DEVICE),
                ram_bytes=LARGEST_BYTES,
                flash_bytes=LARGEST_BYTES,
            )
            self._tasks[model, None] = replace(task, request=free)
            for d in devices:
                on_device = replace(asked, device=d)
                self._tasks[model, d.id] = replace(
                    task, name=f"{model} on {d.id}", request=on_device
                )

    @property
    def size(self) -> int:
        """Number of tasks."""
        return len(self._tasks)

    def run(self, executor: Executor, on_done: Callable[[], None] = lambda: None) -> None:
        """Make all plans.

        Raises:
            UsageError: The options suit no model.
        """
        keys = list(self._tasks)

        def done(i: int, outcome: Outcome) -> None:
            self._done[keys[i]] = outcome
            on_done()

        executor.run(list(self._tasks.values()), done)
        fits = self.fits()
        if {f.verdict for f in fits} == {"rejected"}:
            self._done.clear()
            raise UsageError(fits[0].outcome.reason)

    def fits(self) -> list[Fit]:
        """What is known, model by model in the order of the devices."""
        return [
            Fit(m, d.id, outcome, self._most(m))
            for m in self._models
            for d in self._devices
            if (outcome := self._done.get((m, d.id))) is not None
        ]

    def _most(self, model: str) -> float | None:
        free = self._done.get((model, None))
        if free is None or free.figures is None:
            return None
        stage = free.figures.stages.get("learn")
        return free.figures.learn if stage is None else stage.bound


def exit_code(fits: Sequence[Fit]) -> int:
    """0 if at least one model fits somewhere, 3 if none does; 1 if a row has failed."""
    verdicts = {f.verdict for f in fits}
    if "failed" in verdicts:
        return OdtPlanError.exit_code
    return 0 if "fits" in verdicts else InfeasibleError.exit_code
