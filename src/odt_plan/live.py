"""What goes on during planning, on one line of the terminal; Ctrl-C ends with the best plan."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType

from .figures import amount
from .planner.progress import Progress, Watch
from .planner.sizes import format_seconds


@contextmanager
def shown(quiet: bool) -> Iterator[Watch]:
    """A watch whose progress is shown on stderr, on a terminal only, and that Ctrl-C stops.

    The first Ctrl-C stops the run once there is a plan; before that, and the second time, it is a
    KeyboardInterrupt.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    watch = Watch()
    with _stopped_by_ctrl_c(watch):
        if quiet or not console.is_terminal:
            yield watch
            return
        with console.status("planning") as status:
            watch.listener = lambda p: status.update(Text(described(p)))
            yield watch


def described(p: Progress) -> str:
    """One line: stage, elapsed time, best, bound, gap."""
    parts = [p.stage, format_seconds(p.elapsed_s)]
    if p.best is not None:
        parts.append(f"{p.objective} {amount(p.objective, p.best)}")
    if p.bound is not None:
        parts.append(f"bound {amount(p.objective, p.bound)}")
    if p.gap is not None:
        parts.append(f"gap {p.gap:.2%}")
    if p.has_plan:
        parts.append("Ctrl-C for the best plan")
    return " | ".join(parts)


@contextmanager
def _stopped_by_ctrl_c(watch: Watch) -> Iterator[None]:
    def handle(number: int, frame: FrameType | None) -> None:
        if watch.interrupted or not watch.has_plan:
            raise KeyboardInterrupt
        watch.stop()

    if current_thread() is not main_thread():  # only that one may handle signals
        yield
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
