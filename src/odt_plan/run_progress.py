"""What goes on during training: a bar on a terminal, else a line per epoch, always on stderr."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from .backends.numpy import Epoch, Evaluation, MetricName


class Shown:
    """A listener of a training session."""

    def __init__(self, *, notes: bool, progress: bool) -> None:
        """Choose what is shown.

        Args:
            notes: Lines that the user should read.
            progress: How far training is.
        """
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._notes, self._progress = notes, progress
        self._bar: Progress | None = None
        self._best: Evaluation | None = None
        if progress and self._console.is_terminal:
            said = TextColumn("{task.description}", markup=False)
            columns = (said, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("training", total=None)

    def __enter__(self) -> Self:
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take it away."""
        if self._bar is not None:
            self._bar.stop()

    def updated(self, done: int, total: int, loss: float) -> None:
        """An update was kept."""
        if self._bar is not None:
            said = f"loss {loss:.4f}"
            if (best := self._best) is not None:
                said += f", best {best.metric} {described(best.metric, best.value)}"
            self._bar.update(self._task, completed=done, total=total, description=said)

    def ended(self, epoch: Epoch) -> None:
        """An epoch was judged."""
        found = epoch.validation
        new = found is not None and (self._best is None or found.better_than(self._best))
        if new:
            self._best = found
        if self._progress and self._bar is None:
            self._console.print(epoch_line(epoch, best=new and epoch.number > 0), markup=False)

    def noted(self, text: str) -> None:
        """Something the user should know."""
        if self._notes:
            self._console.print(f"warning: {text}", markup=False)


def described(metric: MetricName, value: float) -> str:
    """A value as it is told."""
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.4g}"


def _told(found: Evaluation) -> str:
    """Metric and value, then those of single outputs."""
    parts = [f"{found.metric} {described(found.metric, found.value)}"]
    parts += [f"{s.metric} of {s.output} {described(s.metric, s.value)}" for s in found.scores]
    return "  ".join(parts)


def epoch_line(epoch: Epoch, *, best: bool = False) -> str:
    """One line about the end of an epoch."""
    parts = [f"epoch {epoch.number}" if epoch.number else "before training"]
    if epoch.loss is not None:
        parts.append(f"loss {epoch.loss:.4f}")
    if epoch.lr is not None:
        parts.append(f"lr {epoch.lr:.3g}")
    if epoch.validation is not None:
        parts.append(_told(epoch.validation))
        if epoch.validation.metric != "loss":
            parts.append(f"validation loss {epoch.validation.loss:.4f}")
    return "  ".join(parts) + ("  best so far" if best else "")
