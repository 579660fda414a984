"""Where a training session stands: records that are replaced as a whole, so never half changed."""

from __future__ import annotations

from dataclasses import dataclass

from .history import Epoch
from .runtime import Snapshot


@dataclass(frozen=True)
class Standing:
    """The last good state, between two updates.

    Attributes:
        state: Of the runtime.
        position: Updates' worth of samples that were used, which tells the samples that come next.
        losses: Updates that were kept.
        replayed: Micro-steps from the replay cache.
        halved: How often the step size was halved.
    """

    state: Snapshot
    position: int = 0
    losses: int = 0
    replayed: int = 0
    halved: int = 0


@dataclass(frozen=True)
class Judged:
    """What the ends of epochs have shown.

    Attributes:
        milestone: The state at the last one, or before training.
        epochs: All of them.
        best: The best and its state; None without a validation set.
    """

    milestone: Standing
    epochs: tuple[Epoch, ...] = ()
    best: tuple[Epoch, Snapshot] | None = None

    def with_epoch(self, epoch: Epoch, standing: Standing) -> Judged:
        """One more epoch; its state may be the best."""
        best, found = self.best, epoch.validation
        if found is not None and epoch.number:
            old = None if best is None else best[0].validation
            if old is None or found.better_than(old):
                best = epoch, standing.state
        return Judged(standing, (*self.epochs, epoch), best)

    @property
    def since_best(self) -> int:
        """Epochs after the best."""
        return 0 if self.best is None else self.epochs[-1].number - self.best[0].number
