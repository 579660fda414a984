"""What happened during a training session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .metrics import Evaluation

Stop = Literal["not_finite", "interrupted", "patience"]


@dataclass(frozen=True)
class Epoch:
    """The end of a pass over the data, or of the run.

    Attributes:
        number: Counted from 1; 0 is before training.
        updates: Updates done by then.
        loss: Mean loss of the updates since the last one; None before training.
        lr: Step size of the last update; None before training.
        validation: What was reached on the validation set, where there is one.
    """

    number: int
    updates: int
    loss: float | None
    lr: float | None
    validation: Evaluation | None


@dataclass(frozen=True)
class History:
    """What happened during training.

    Attributes:
        losses: Mean loss of each update that was kept.
        stopped: None when all steps were done; ``not_finite`` when a loss or a parameter became
            NaN or infinite, ``interrupted`` by Ctrl-C, ``patience`` when the validation set showed
            nothing better for so many epochs. Without a validation set the runtime then holds the
            state of the last good update.
        replayed: Micro-steps that were trained from the replay cache.
        epochs: The end of each pass; with a validation set the first is before training.
        kept: Number of the epoch whose state the runtime holds; 0: rolled back to the state before
            training, which was better; None: the state after the last good update.
        halvings: How often the step size was halved after a value that was not finite.
        leftover: Samples at the end of the data that made no whole update (online only).
    """

    losses: tuple[float, ...]
    stopped: Stop | None
    replayed: int = 0
    epochs: tuple[Epoch, ...] = ()
    kept: int | None = None
    halvings: int = 0
    leftover: int = 0

    @property
    def before(self) -> Evaluation | None:
        """On the validation set, before training."""
        return self.epochs[0].validation if self.epochs else None

    @property
    def after(self) -> Evaluation | None:
        """On the validation set, of the state that was kept."""
        return next((e.validation for e in self.epochs if e.number == self.kept), None)

    @property
    def rolled_back(self) -> bool:
        """Whether training made it worse, and the state before training was kept."""
        return self.kept == 0 and bool(self.losses)

    @property
    def message(self) -> str:
        """One line about the end of training."""
        done = len(self.losses)
        kept = "" if self.kept is not None else f"; the state after update {done} is kept"
        if self.stopped == "not_finite":
            tried = f" at 1/{2**self.halvings} of the step size" if self.halvings else ""
            return (
                f"stopped: update {done + 1} gave a NaN or infinite value{tried}{kept}; try a"
                " smaller step size"
            )
        if self.stopped == "interrupted":
            return (
                f"interrupted after update {done}{kept}"
                if self.kept is not None
                else f"interrupted: {kept[2:]}"
            )
        if self.stopped == "patience":
            return f"stopped after {done} updates: nothing better on the validation set"
        return f"{done} updates done"
