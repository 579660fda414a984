"""Tasks on this machine: in this process, or in a pool of worker processes."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

#: A task whose worker died is run again so often.
RETRIES = 2


_R = TypeVar("_R", covariant=True)
_T = TypeVar("_T")


class Job(Protocol[_R]):
    """Work of one process; picklable, and so is what comes of it."""

    @property
    def name(self) -> str:
        """For messages."""

    def run(self) -> _R:
        """Do it; what is wrong with it stands in the result."""

    def lost(self, reason: str) -> _R:
        """What comes of it where its worker died time and again."""


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class InProcess:
    """Runs tasks one after the other, in this process."""

    def run(self, tasks: Sequence[Job[_T]], on_done: Callable[[int, _T], None]) -> None:
        """Run all tasks."""
        for i, task in enumerate(tasks):
            on_done(i, task.run())


class LocalPool:
    """Worker processes on this machine, which live until ``close``.

    Each has a pipe of its own, so a worker that dies is known with its task: the task is run again
    by a new worker, at most ``RETRIES`` times, and no other task notices.
    """

    def __init__(self, jobs: int) -> None:
        """A pool of at most ``jobs`` workers; they are started when there are tasks for them."""
        self._jobs = jobs
        self._idle: list[_Worker] = []
        self._busy: dict[object, tuple[_Worker, int]] = {}  # by pipe

    def run(self, tasks: Sequence[Job[_T]], on_done: Callable[[int, _T], None]) -> None:
        """Run all tasks."""
        waiting = deque(range(len(tasks)))
        deaths = [0] * len(tasks)
        while waiting or self._busy:
            # All are started before the first is fed: a large task blocks until it is read.
            while len(self._idle) < min(self._jobs - len(self._busy), len(waiting)):
                self._idle.append(_Worker())
            while waiting and self._idle:
                worker, i = self._idle.pop(), waiting.popleft()
                self._busy[worker.pipe] = (worker, i)
                worker.give(tasks[i])
            for pipe in wait([w.pipe for w, _ in self._busy.values()]):
                worker, i = self._busy.pop(pipe)
                try:
                    outcome = worker.take()
                except (EOFError, OSError):
                    pass
                else:
                    self._idle.append(worker)
                    on_done(i, outcome)
                    continue
                deaths[i] += 1
                worker.process.join(timeout=1.0)  # it is about to tell how it ended
                end = worker.end()
                if deaths[i] <= RETRIES:
                    waiting.appendleft(i)
                else:
                    reason = f"{tasks[i].name}: its worker died {deaths[i]} times, last {end}"
                    on_done(i, tasks[i].lost(reason))

    def close(self) -> None:
        """Stop all workers, also those at work."""
        for worker in [*self._idle, *(w for w, _ in self._busy.values())]:
            worker.end()
        self._idle.clear()
        self._busy.clear()


class _Worker:
    """A process that does jobs."""

    def __init__(self) -> None:
        context = get_context("spawn")  # forks of a process with threads may hang
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far,), daemon=True)
        with _interrupts_ignored():  # from its first moment on: Ctrl-C is the parent's to answer
            self.process.start()
        far.close()

    def give(self, task: Job[object]) -> None:
        """Send a task; that the worker is dead is noticed by ``take``."""
        with suppress(OSError):
            self.pipe.send(task)

    def take(self) -> Any:
        """What came of the job; EOFError or OSError where the worker has died."""
        return self.pipe.recv()

    def end(self) -> str:
        """Stop the process; says how it ended."""
        self.pipe.close()
        self.process.kill()
        self.process.join()
        code = self.process.exitcode or 0
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """What child processes inherit."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread, which alone may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(pipe: Connection) -> None:
    """A worker's life: until its parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            pipe.send(pipe.recv().run())
    except (EOFError, BrokenPipeError):
        return
