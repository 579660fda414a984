"""How a training session is asked for, and who is told what goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ...ir.errors import UsageError
from .history import Epoch
from .metrics import MetricName
from .regularization import Regularization
from .schedule import ScheduleName


@dataclass(frozen=True)
class SessionOptions:
    """How to train.

    Attributes:
        lr: Step size at its largest.
        steps: Updates to do.
        epochs: Passes over the data instead; a last update that is not full is filled from the
            start of the next pass.
        online: One pass instead, in the order of the data, as a device sees them.
        seed: Of the order of the samples.
        schedule: How the step size changes from update to update.
        warmup: Updates over which it rises.
        weight_decay: See ``Regularization``.
        clip: See ``Regularization``.
        balance: Draw samples with replacement, all classes alike often.
        metric: What is judged on the validation set; None: what the loss suggests.
        patience: Stop after so many epochs without anything better; None: never.
        halvings: How often to go back and halve the step size when a value is not finite.
        checkpoint: File that is written at each epoch and at the end.
        checkpoint_every: Updates between two checkpoints, beside the epochs.
        resume: Checkpoint to continue from.
    """

    lr: float
    steps: int | None = None
    epochs: int | None = None
    online: bool = False
    seed: int = 0
    schedule: ScheduleName = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float | None = None
    balance: bool = False
    metric: MetricName | None = None
    patience: int | None = None
    halvings: int = 0
    checkpoint: Path | None = None
    checkpoint_every: int | None = None
    resume: Path | None = None

    def __post_init__(self) -> None:
        """Reject impossible settings."""
        if not np.isfinite(self.lr) or self.lr <= 0:
            raise UsageError(f"--lr: {self.lr} is no step size; give for example 0.01")
        least = {"warmup": 0, "patience": 1, "halvings": 0, "checkpoint_every": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"--{name.replace('_', '-')}: {value}; must be at least {low}")
        if self.online and self.balance:
            raise UsageError(
                "--balance draws samples again, --online takes each once; give one of them"
            )
        if self.checkpoint_every is not None and self.checkpoint is None:
            raise UsageError("--checkpoint-every needs a file; give --checkpoint as well")
        _ = self.regularization

    @property
    def regularization(self) -> Regularization:
        """Weight decay and clipping."""
        return Regularization(self.weight_decay, self.clip)


class Listener(Protocol):
    """Is told what goes on; every method may raise KeyboardInterrupt, which ends the session."""

    def updated(self, done: int, total: int, loss: float) -> None:
        """An update was kept; ``done`` and ``total`` count updates of the data's course."""

    def ended(self, epoch: Epoch) -> None:
        """An epoch was judged."""

    def noted(self, text: str) -> None:
        """Something the user should know, in one line."""


class Silent:
    """A listener that tells nothing."""

    def updated(self, done: int, total: int, loss: float) -> None:
        """Nothing."""

    def ended(self, epoch: Epoch) -> None:
        """Nothing."""

    def noted(self, text: str) -> None:
        """Nothing."""
