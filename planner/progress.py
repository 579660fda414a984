"""What a run tells about itself while it goes on, and when it has to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from threading import Event
from time import monotonic

from .plan import Stopped


@dataclass(frozen=True)
class Progress:
    """One moment of a run.

    Attributes:
        stage: What goes on.
        elapsed_s: Seconds since the run began.
        objective: What ``best`` and ``bound`` are figures of; empty while nothing is optimized.
        best: Of the best solution of this stage, None without one.
        bound: Proven in this stage so far, None without one.
        has_plan: A checked plan exists: a run that is stopped now returns it.
    """

    stage: str
    elapsed_s: float
    objective: str = ""
    best: float | None = None
    bound: float | None = None
    has_plan: bool = False

    @property
    def gap(self) -> float | None:
        """Relative, |bound - best| / |best|."""
        if self.best is None or self.bound is None:
            return None
        return abs(self.bound - self.best) / max(abs(self.best), 1e-9)


@dataclass
class Watch:
    """Keeps a run to its time and carries the wish to stop it; the only thing that threads share.

    Attributes:
        listener: Told all progress, also by threads of solvers.
        limit_s: Seconds that the run may take from its beginning.
        has_plan: A checked plan exists.
    """

    listener: Callable[[Progress], None] = lambda _: None
    limit_s: float = float("inf")
    has_plan: bool = field(default=False, init=False)
    _stop: Event = field(default_factory=Event, init=False)
    _begin: float = field(default_factory=monotonic, init=False)
    _stage: str = field(default="planning", init=False)
    _objective: str = field(default="", init=False)

    def begin(self, limit_s: float) -> None:
        """The run begins now."""
        self.limit_s, self._begin = limit_s, monotonic()

    def part(self, limit_s: float) -> Watch:
        """A watch for a run of so many seconds within this one; both are stopped together."""
        part = Watch(
            lambda p: self.listener(replace(p, elapsed_s=self.elapsed_s, has_plan=self.has_plan))
        )
        part._stop = self._stop
        part.begin(limit_s)
        return part

    def quiet(self) -> Watch:
        """The same wish to stop, but it tells nothing."""
        watch = Watch()
        watch._stop = self._stop
        return watch

    def stop(self) -> None:
        """Ask the run to end with what it has; may be called from a signal handler."""
        self._stop.set()

    @property
    def interrupted(self) -> bool:
        """It was asked to end."""
        return self._stop.is_set()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return monotonic() - self._begin

    @property
    def left_s(self) -> float:
        """Seconds that are left, 0 at least."""
        return max(0.0, self.limit_s - self.elapsed_s)

    def over(self) -> Stopped | None:
        """Why the run has to end, None while it may go on."""
        if self.interrupted:
            return "interrupted"
        return None if self.left_s > 0 else "time limit"

    def stage(self, text: str, objective: str = "") -> None:
        """Another stage begins."""
        self._stage, self._objective = text, objective
        self.found(None, None)

    def found(self, best: float | None, bound: float | None) -> None:
        """The stage's best solution and bound so far."""
        self.listener(
            Progress(self._stage, self.elapsed_s, self._objective, best, bound, self.has_plan)
        )
