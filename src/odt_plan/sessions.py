"""Trainings by plans in the NumPy runtime, many at a time in processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from .backends.numpy import Runtime, SessionOptions, data_set, train_session
from .backends.numpy.data import chosen_of
from .ir.errors import OdtPlanError, UsageError
from .ir.graph import Array
from .local_pool import InProcess, Job, LocalPool
from .planner.plan import Plan
from .planner.progress import Watch
from .planner.rebuild import rebuild

_T = TypeVar("_T")
Pool = InProcess | LocalPool


@dataclass(frozen=True)
class Labelled:
    """Samples, and labels or targets, by the names of their arrays."""

    x: dict[str, Array]
    y: dict[str, Array]

    @property
    def count(self) -> int:
        """Samples."""
        return len(next(iter(self.y.values())))

    def part(self, chosen: Array) -> Labelled:
        """Some of them."""
        return Labelled(chosen_of(self.x, chosen), chosen_of(self.y, chosen))


@dataclass(frozen=True)
class Session:
    """One training by a plan; picklable.

    Attributes:
        name: For messages.
        plan: The plan.
        model: Its model file, on this machine.
        data: What is trained on.
        epochs: Passes over the data.
        lr: Step size at its largest; it falls as half a cosine.
        seed: Of the order of the samples.
    """

    name: str
    plan: Plan
    model: Path
    data: Labelled
    epochs: int
    lr: float
    seed: int

    def runtime(self) -> Runtime:
        """The model as it is before training; sums have the order that is fast on this machine.

        Raises:
            OdtPlanError: The model can't be read again.
        """
        return Runtime(self.plan, rebuild(self.plan, self.model, self.model), exact=False)

    def train(self, runtime: Runtime) -> None:
        """Leave what is learned in the runtime.

        Raises:
            OdtPlanError: The data do not fit the model.
        """
        options = SessionOptions(self.lr, epochs=self.epochs, seed=self.seed, schedule="cosine")
        train_session(runtime, data_set(runtime.training, self.data.x, self.data.y), options)


@dataclass(frozen=True)
class Judged(Generic[_T]):
    """A training, and what comes of it; picklable.

    Attributes:
        session: The training.
        tested: What is judged on.
        judge: Trains and judges; a function of a module.
    """

    session: Session
    tested: Labelled
    judge: Callable[[Session, Labelled], _T]

    @property
    def name(self) -> str:
        """For messages."""
        return self.session.name

    def run(self) -> _T | str:
        """What is judged, or what is wrong."""
        try:
            return self.judge(self.session, self.tested)
        except OdtPlanError as e:
            return str(e)

    def lost(self, reason: str) -> _T | str:
        """Its worker died time and again."""
        return reason


@contextmanager
def workers(jobs: int) -> Iterator[Pool]:
    """Processes for trainings; one job needs none."""
    if jobs == 1:
        yield InProcess()
        return
    with closing(LocalPool(jobs)) as pool:
        yield pool


def train_all(
    todo: Sequence[Job[_T | str]],
    pool: Pool,
    what: str,
    watch: Watch,
    on_done: Callable[[int, _T], None] = lambda i, result: None,
) -> list[_T]:
    """Run trainings.

    Args:
        todo: The trainings; text that comes of one is what is wrong with it.
        pool: Where.
        what: The stage that is told.
        watch: Told how many are done.
        on_done: Told what comes of each.

    Returns:
        Results in the order of the trainings.

    Raises:
        UsageError: One failed.
    """
    found: dict[int, _T] = {}

    def done(i: int, result: _T | str) -> None:
        if isinstance(result, str):
            raise UsageError(f"{todo[i].name}: {result}")
        found[i] = result
        on_done(i, result)
        watch.stage(f"{what}: {len(found)} of {len(todo)} ({todo[i].name})")

    watch.stage(f"{what}: 0 of {len(todo)}")
    pool.run(todo, done)
    return [found[i] for i in range(len(todo))]
