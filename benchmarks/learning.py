"""What plans learn on real data: accuracy by update set, budget and measure of importance.

Every update set is that of a checked plan for its RAM budget; its training graph learns a task that
the model was not made for, one sample at a time by plain SGD. Each set has the step size that is
best for it on draws of the data that no result is measured on.

    python -m benchmarks.learning [TASK ...]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from odt_plan.backends.numpy.parameters import merged
from odt_plan.ir.autodiff import build_training, param_slots
from odt_plan.ir.candidates import parts
from odt_plan.ir.channels import reordered
from odt_plan.ir.graph import Array, Graph
from odt_plan.ir.import_options import ImportOptions, Lora
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.training import Candidate, TrainingSpec
from odt_plan.planner.device import load_device
from odt_plan.planner.greedy import choose_updates
from odt_plan.planner.importance import scores
from odt_plan.planner.imported import import_requested
from odt_plan.planner.pipeline import Planner, Request, make_plan
from odt_plan.planner.plan import ImportanceTable, Plan
from odt_plan.planner.progress import Watch
from odt_plan.planner.rebuild import updates_of
from odt_plan.trials import TRIAL, Outcome, Trials
from odt_plan.usual_sets import BIASES, LAST, LAYERS

from . import adaptation
from .adaptation import RISING, TESTED, Learner, accuracy, cautious
from .matrix_kernels import plain_recurrence
from .models import shared
from .results import put

DEVICE = "nrf52840"
PLENTY = 1 << 28
#: RAM budgets: this part of the way from what the last layer needs to what all tensors need.
SHARES = (0.02, 0.05, 0.1, 0.3)
RATES = (0.001, 0.003, 0.01, 0.03)
#: For samples that are not normalized: the hidden layers of st_har bear no larger ones.
SMALL_RATES = (0.00001, 0.00003, 0.0001, 0.0003, 0.001)
SEEDS, GRID_SEEDS = 5, 2
METHODS = ("prior", "gradient", "fisher", "magnitude")
#: Relative gap that plans are proven within, if it is closed in so many seconds.
GAP, SECONDS = 0.01, 4.0
#: Of all plans of a trial together.
TRIAL_SECONDS = 60.0
#: Table of the greedy choice.
CHOSEN = "gradient"
GREEDY = "greedy"
#: Update sets that no budget changes, as ``--train`` names them.
FIXED = {LAST: "last", BIASES: "bias", "all": "all"}
#: Samples per update where everything is updated on a larger machine.
BATCHED = 8
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Updates:
    """What is trained: an update set, and the order of channels that its parts are of."""

    chosen: tuple[Candidate, ...]
    channels: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @staticmethod
    def of(plan: Plan) -> Updates:
        """That of a plan."""
        chosen = sorted(updates_of(plan), key=str)
        return Updates(tuple(chosen), tuple(plan.model.channels.items()))


@dataclass(frozen=True, eq=False)
class Draw:
    """A model, maybe with adapters, samples that it learns from, and samples to test it with."""

    model: Path
    x: Array
    y: Array
    tested_x: Array
    tested_y: Array
    #: Recording of each sample that is learned from; None: each is one of its own.
    group: Array | None = None
    lora: Lora | None = None

    @cached_property
    def forward(self) -> Graph:
        """At batch 1."""
        return import_model(self.model, ImportOptions(lora=self.lora))

    @cached_property
    def tested(self) -> Graph:
        """The same at a larger batch."""
        options = ImportOptions(batch=TESTED, fold_batchnorm=True, lora=self.lora)
        return import_model(self.model, options)


class Task(Protocol):
    """A model and data that it was not made for."""

    name: str
    about: str
    epochs: int
    rates: tuple[float, ...]

    def draws(self) -> list[Draw]:
        """What results are measured on."""

    def others(self) -> list[Draw]:
        """What step sizes are chosen on."""


# --- tasks ----------------------------------------------------------------------------------------


@dataclass
class Usps:
    """A network of MNIST digits learns those of USPS."""

    model: str
    shape: tuple[int, ...]
    samples: int = 200
    tested: int = 1000
    epochs: int = 2
    rates: tuple[float, ...] = RATES
    name: str = field(init=False)
    about: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = f"{self.model} on USPS"
        self.about = (
            f"{self.model}, trained on MNIST, learns USPS from {self.samples} digits in"
            f" {self.epochs} passes; tested on {self.tested} of the official test digits."
        )

    def _draw(self, seed: int, *, official: bool) -> Draw:
        folder = shared()
        assert folder is not None
        with np.load(folder / "data" / "usps.npz", allow_pickle=False) as data:
            x, y = _as_mnist(data["x_train"], self.shape), data["y_train"].astype(np.int32)
            tx, ty = _as_mnist(data["x_test"], self.shape), data["y_test"].astype(np.int32)
        order = np.random.default_rng(seed).permutation(len(x))
        mine, rest = order[: self.samples], order[self.samples :][: self.tested]
        chosen = np.random.default_rng(0).permutation(len(tx))[: self.tested]
        path = folder / "models" / f"{self.model}.onnx"
        test = (tx[chosen], ty[chosen]) if official else (x[rest], y[rest])
        return Draw(path, x[mine], y[mine], *test)

    def draws(self) -> list[Draw]:
        return [self._draw(seed, official=True) for seed in range(SEEDS)]

    def others(self) -> list[Draw]:
        return [self._draw(100 + seed, official=False) for seed in range(GRID_SEEDS)]


def _as_mnist(x: NDArray[np.uint8], shape: tuple[int, ...]) -> Array:
    """16 x 16 pixels, bilinearly to 20 x 20 in a frame of 28 x 28, 0 to 1."""
    small, large = x.shape[1], 20
    at = (np.arange(large) + 0.5) * small / large - 0.5
    low = np.clip(np.floor(at).astype(int), 0, small - 1)
    high, part = np.clip(low + 1, 0, small - 1), np.clip(at - low, 0, 1)
    weights = np.zeros((large, small))
    weights[np.arange(large), low] += 1 - part
    weights[np.arange(large), high] += part
    scaled = weights @ (x / 255.0) @ weights.T
    framed = np.pad(scaled, ((0, 0), (4, 4), (4, 4))).astype(np.float32)
    return framed.reshape(len(x), *shape)


@dataclass
class Speakers:
    """A network of spoken digits learns a speaker whom it has not heard."""

    folder: Path
    tested: tuple[int, ...] = (3,)
    epochs: int = 5
    rates: tuple[float, ...] = RATES
    name: str = "spoken digits, unseen speaker"
    about: str = field(init=False)

    def __post_init__(self) -> None:
        found = shared()
        assert found is not None
        self.setup = adaptation.Setup(epochs=self.epochs)
        self.clips = adaptation.load(found / "data" / adaptation.DATA)
        self.about = (
            "A network of depthwise-separable convolutions, trained on three speakers, learns"
            f" the fourth from {10 * self.setup.per_digit} clips in {self.epochs} passes; tested on"
            " that speaker's other clips."
        )

    def _draws(self, number: int, seeds: Sequence[int]) -> list[Draw]:
        speaker, c = adaptation.Speaker(self.setup, self.clips, number, self.folder), self.clips
        found = []
        for mine, rest in map(speaker.split, seeds):
            found.append(Draw(speaker.model, c.x[mine], c.digit[mine], c.x[rest], c.digit[rest]))
        return found

    def draws(self) -> list[Draw]:
        return [d for s in self.tested for d in self._draws(s, range(SEEDS))]

    def others(self) -> list[Draw]:
        return self._draws(adaptation.VALIDATION, range(GRID_SEEDS))


@dataclass
class Activity:
    """A network of human activities learns recordings of a device that is worn in another way.

    Recordings are left out whole: those that are learned from are not tested.
    """

    samples: int = 600
    tested: int = 1000
    epochs: int = 2
    rates: tuple[float, ...] = SMALL_RATES
    name: str = "human activity, device turned"
    about: str = field(init=False)

    def __post_init__(self) -> None:
        self.about = (
            "st_har learns to read its accelerometer turned (y, z, x in place of x, y, z) from"
            f" {self.samples} windows of a third of the recordings in {self.epochs} passes; tested"
            f" on {self.tested} windows of the other recordings."
        )

    def _draw(self, seed: int) -> Draw:
        folder = shared()
        assert folder is not None
        with np.load(folder / "data" / "st_har.npz", allow_pickle=False) as data:
            acc, label, number = data["acc"], data["label"], data["file_id"]
        windows, labels, files = [], [], []
        for f in np.unique(number):
            rows = acc[number == f].astype(np.float32)[:, [1, 2, 0]] / 4000
            count = len(rows) // 26
            windows.append(rows[: count * 26].reshape(count, 26, 3))
            labels += [int(label[number == f][0])] * count
            files += [int(f)] * count
        x, y, of = np.concatenate(windows), np.array(labels, np.int32), np.array(files)
        rng = np.random.default_rng(seed)
        shuffled = rng.permutation(np.unique(of))
        known = np.isin(of, shuffled[: len(shuffled) // 3])
        mine = _balanced(rng, np.flatnonzero(known), y, self.samples)
        rest = _balanced(rng, np.flatnonzero(~known), y, self.tested)
        path = folder / "models" / "st_har.onnx"
        return Draw(path, x[mine], y[mine], x[rest], y[rest], of[mine])

    def draws(self) -> list[Draw]:
        return [self._draw(seed) for seed in range(SEEDS)]

    def others(self) -> list[Draw]:
        return [self._draw(100 + seed) for seed in range(GRID_SEEDS)]


def _balanced(
    rng: np.random.Generator, among: NDArray[np.int64], y: Array, count: int
) -> NDArray[np.int64]:
    """Indices of as many samples of each class."""
    classes = np.unique(y)
    each = [rng.permutation(among[y[among] == c])[: count // len(classes)] for c in classes]
    return np.concatenate(each)


# --- update sets ----------------------------------------------------------------------------------


class Bench:
    """Update sets of plans, and what they learn.

    Attributes:
        task: The task.
        budgets: RAM in bytes.
        least: RAM that the last layer needs.
        most: RAM that all tensors need.
    """

    def __init__(self, task: Task) -> None:
        """Prepare data; find the budgets on a draw that no result is measured on."""
        self.task, self._draws, self._others = task, task.draws(), task.others()
        self._learned: dict[tuple[Draw, Updates, float], float] = {}
        self._rates: dict[tuple[str, int], float] = {}
        self._plans: dict[tuple[Draw, int, tuple[str, ...]], tuple[Updates, int]] = {}
        self._trials: dict[tuple[Draw, int], _Tried] = {}
        low, high = (self._plan(self._others[0], PLENTY, train)[1] for train in ("last", "all"))
        self.budgets = tuple(round(low + s * (high - low)) // 4 * 4 for s in SHARES)
        self.least, self.most = low, high

    def _request(self, draw: Draw, ram: int, train: Sequence[str] = ("auto",)) -> Request:
        device = load_device(DEVICE)
        request = Request(
            draw.model, device, ram_bytes=ram, train=tuple(train), with_baselines=False
        )
        return replace(
            request, flash_bytes=PLENTY, with_relaxations=False, gap=GAP, time_limit_s=SECONDS,
            importing=ImportOptions(lora=draw.lora),
        )  # fmt: skip

    def _plan(self, draw: Draw, ram: int, *train: str) -> tuple[Updates, int]:
        """Updates and RAM of a plan.

        Raises:
            InfeasibleError: There is none.
        """
        if (draw, ram, train) not in self._plans:
            plan = make_plan(self._request(draw, ram, train)).plan
            self._plans[draw, ram, train] = Updates.of(plan), plan.claims.ram_bytes.total
        return self._plans[draw, ram, train]

    def tried(self, draw: Draw, ram: int) -> _Tried:
        """The trial on the samples that are learned from; its sets are planned at once."""
        if (draw, ram) not in self._trials:
            request = replace(self._request(draw, ram), time_limit_s=TRIAL_SECONDS)
            self._trials[draw, ram] = _Tried(draw, request)
        return self._trials[draw, ram]

    def greedy(self, draw: Draw, ram: int, method: str) -> tuple[Updates, float]:
        """What the most important candidates per byte are, as long as they fit; and the score."""
        table = self.tried(draw, ram).table(method)
        request = replace(self._request(draw, ram), importance=table)
        planner = Planner(request, import_requested(request, Watch()), Watch())
        found = choose_updates(planner.problem())
        assert found is not None, ram
        channels = () if table is None else tuple(table.channels.items())
        updates = Updates(tuple(found[0]), channels)
        return updates, sum(planner.prepared[0].importance[c] for c in found[0])

    def _total(self, draw: Draw, ram: int) -> int:
        """Score of all tensors, whole."""
        whole = [Candidate(p) for p in param_slots(draw.forward)]
        return sum(scores(draw.forward, whole, self.tried(draw, ram).table(CHOSEN)).values())

    # ---- learning

    def learn(self, draw: Draw, updates: Updates, rate: float) -> float:
        """Accuracy after training by these updates."""
        key = draw, updates, rate
        if key not in self._learned:
            forward = reordered(draw.forward, dict(updates.channels))
            training = build_training(forward, TrainingSpec(), updates.chosen)
            learner = Learner(training)
            order = self._order(len(draw.y))
            share = (np.arange(len(order)) + 1) / len(order)
            factor = np.minimum(share / RISING, (1 - share) / (1 - RISING))
            with np.errstate(all="ignore"):  # too large a step ends in NaN and is not chosen
                for i, f in zip(order.tolist(), factor.tolist(), strict=True):
                    learner.step(draw.x[i : i + 1], draw.y[i : i + 1], rate * f)
                self._learned[key] = self._tested(draw, merged(training, learner.state))
        return self._learned[key]

    def _order(self, count: int) -> NDArray[np.int64]:
        rng = np.random.default_rng(0)
        return np.concatenate([rng.permutation(count) for _ in range(self.task.epochs)])

    def _tested(self, draw: Draw, state: Mapping[str, Array]) -> float:
        return accuracy(draw.tested, state, draw.tested_x, draw.tested_y)

    def untouched(self) -> Floats:
        """Accuracies before learning."""
        return np.array([self._tested(d, {}) for d in self._draws])

    def accuracies(self, strategy: str, ram: int) -> Floats:
        """Of every draw, with the step size that suits the strategy on other draws."""
        return np.array([self._accuracy(d, strategy, ram) for d in self._draws])

    def _accuracy(self, draw: Draw, strategy: str, ram: int) -> float:
        if strategy == TRIAL:
            strategy = self.tried(draw, ram).chosen
        ram = PLENTY if strategy in FIXED else ram
        rate = self._rate(strategy, ram)
        return self.learn(draw, self.updates(draw, strategy, ram), rate)

    def _rate(self, strategy: str, ram: int) -> float:
        if (strategy, ram) not in self._rates:
            tried = [
                [self.learn(d, self.updates(d, strategy, ram), r) for d in self._others]
                for r in self.task.rates
            ]
            self._rates[strategy, ram] = self.task.rates[cautious(np.array(tried))]
        return self._rates[strategy, ram]

    def updates(self, draw: Draw, strategy: str, ram: int) -> Updates:
        """The update set of a strategy."""
        if strategy in FIXED:
            return self._fixed[strategy][0]
        if strategy == GREEDY:
            return self.greedy(draw, ram, CHOSEN)[0]
        return Updates.of(self.tried(draw, ram).plans[strategy])

    @cached_property
    def _fixed(self) -> dict[str, tuple[Updates, int]]:
        """Updates and RAM of the sets that no budget changes."""
        return {s: self._plan(self._others[0], PLENTY, t) for s, t in FIXED.items()}

    # ---- tables

    def rows(self) -> Iterator[str]:
        """Markdown: a row per strategy, a column per budget."""
        yield f"### What plans learn: {self.task.name} (measured)"
        yield ""
        yield (
            "Accuracy in %, mean ± standard deviation over the draws; in brackets the mean of"
            f" paired differences from the prior ± standard error. Plans of one trial within"
            f" {TRIAL_SECONDS:g} s together."
        )
        yield ""
        yield self.task.about
        yield ""
        yield f"| update set | {' | '.join(f'{b:,} B' for b in self.budgets)} |"
        yield "|---" * (len(self.budgets) + 1) + "|"
        names = {m: f"plan, importance: {m}" for m in METHODS} | {
            LAYERS: "the most last layers that fit",
            GREEDY: f"greedy, importance: {CHOSEN}",
            TRIAL: "**plan by trial**",
        }
        for s, name in names.items():
            cells = []
            for b in self.budgets:
                found = self.accuracies(s, b)
                base = self.accuracies(METHODS[0], b)
                paired = "" if s == METHODS[0] else f" ({_paired(found - base)})"
                cells.append(_told(found) + paired)
                print(f"{self.task.name}: {name} in {b:,} B: {cells[-1]}", file=sys.stderr)
            yield f"| {name} | {' | '.join(cells)} |"
        for s in (*METHODS, LAYERS, LAST, BIASES, "all"):
            cells = [self._less(s, b) for b in self.budgets]
            yield f"| trial less {s} | {' | '.join(cells)} |"
        for name, score in (
            ("solver", lambda d, b: self.score(d, b, CHOSEN)),
            ("greedy", lambda d, b: self.greedy(d, b, CHOSEN)[1]),
        ):
            shares = [
                np.mean([score(d, b) / self._total(d, b) for d in self._draws])
                for b in self.budgets
            ]
            cells = [f"{share:.2%}" for share in shares]
            yield f"| score of the {name}'s choice, of all ({CHOSEN}) | {' | '.join(cells)} |"
        chosen = [Counter(self.tried(d, b).chosen for d in self._draws) for b in self.budgets]
        told = [", ".join(f"{n} {s}" for s, n in c.most_common()) for c in chosen]
        yield f"| chosen by trial | {' | '.join(told)} |"
        leads = [max(self.tried(d, b).lead for d in self._draws) for b in self.budgets]
        told = [f"{lead:.1f} ({name})" for lead, name in leads]
        yield f"| largest lead of a set over gradient's, in standard errors | {' | '.join(told)} |"
        yield ""
        yield self._quarter()
        yield ""
        yield self._whatever()

    def score(self, draw: Draw, ram: int, method: str) -> float:
        """Of the solver's choice."""
        return sum(u.importance for u in self.tried(draw, ram).plans[method].decisions.updates)

    def _less(self, strategy: str, ram: int) -> str:
        """The trial's plan against another that fits."""
        if strategy != "all" and any(strategy not in self.tried(d, ram).plans for d in self._draws):
            return "does not fit"
        return _paired(self.accuracies(TRIAL, ram) - self.accuracies(strategy, ram))

    def _whatever(self) -> str:
        told = [
            f"{s} {_told(self.accuracies(s, PLENTY))} ({ram:,} B)"
            for s, (_, ram) in self._fixed.items()
        ]
        return f"Whatever the budget: {'; '.join(told)}; nothing {_told(self.untouched())}."

    def _quarter(self) -> str:
        """What can be trained in a quarter of the RAM that everything takes."""
        quarter, (least, bound) = self.most // 4, self._smallest()
        batched = replace(
            self._request(self._others[0], PLENTY, ("all",)), importing=ImportOptions(batch=BATCHED)
        )
        many = make_plan(batched).plan.claims.ram_bytes.total
        told = (
            f"Updating everything takes {self.most:,} B at batch 1 and {many:,} B at batch"
            f" {BATCHED}. The least that any update takes is {least:,} B (proven: {bound:,} B or"
            f" more), {least / self.most:.1%} and {least / many:.1%} of it."
        )
        if bound > quarter:
            return f"{told} So no update fits a quarter of it, {quarter:,} B, at batch 1."
        found, whole = self.accuracies(TRIAL, quarter), self.accuracies("all", PLENTY)
        return (
            f"{told} In a quarter of it, {quarter:,} B, the plan by trial learns {_told(found)};"
            f" all less that: {_paired(whole - found)}."
        )

    def _smallest(self) -> tuple[int, int]:
        """RAM of the plan that needs the least of all that update anything, and its bound.

        More updates need no less, so one tensor, or the smallest part of it, is enough to look at.
        """
        forward = self._others[0].forward
        found = []
        for p in param_slots(forward):
            part = next(iter(parts(forward, p)), 1.0)
            request = self._request(self._others[0], PLENTY, (f"{p}={part}" if part < 1 else p,))
            plan = make_plan(replace(request, objective="ram")).plan
            found.append((plan.claims.ram_bytes.total, ceil(plan.objective[0].bound)))
        return min(total for total, _ in found), min(bound for _, bound in found)


class _Tried:
    """The sets of a trial, and the one that it chooses.

    Attributes:
        plans: By the name of a table or a usual set.
    """

    def __init__(self, draw: Draw, request: Request) -> None:
        with tempfile.TemporaryDirectory() as folder:
            samples = Path(folder) / "samples.npz"
            group = {} if draw.group is None else {"group": draw.group}
            np.savez(samples, x=draw.x, y=draw.y, **group)
            self._trials = Trials(request, samples, Watch())
            self._entries = self._trials.entries()
        self.plans = {n: e.planned.plan for e in self._entries for n in e.names}

    def table(self, method: str) -> ImportanceTable | None:
        """Scores."""
        asked = self.plans[method].asked
        assert asked is not None
        return asked.importance

    @cached_property
    def chosen(self) -> str:
        """Name of the set."""
        return self._entries[self._outcome.best].names[0]

    @cached_property
    def lead(self) -> tuple[float, str]:
        """The largest of a set over that of the measured default, in standard errors; whose."""
        trial = self._trials.planned(self._outcome).plan.decisions.trial
        assert trial is not None
        return max((-t.more / t.error, t.names[0]) for t in trial.tried if t.more and t.error)

    @cached_property
    def _outcome(self) -> Outcome:
        return self._trials.run(self._entries, 1)


def _paired(less: Floats) -> str:
    return f"{100 * less.mean():+.1f} ± {100 * less.std(ddof=1) / np.sqrt(less.size):.1f}"


def _told(found: Floats) -> str:
    return f"{100 * found.mean():.1f} ± {100 * found.std(ddof=1):.1f}"


def tasks(folder: Path) -> dict[str, Task]:
    """All tasks by short name."""
    return {
        "usps": Usps("tinymaix_mnist_cnn", (28, 28, 1)),
        "lstm": Usps("tflm_mnist_lstm", (28, 28)),
        "speakers": Speakers(folder),
        "activity": Activity(),
    }


def learning_table() -> Iterator[str]:
    """Markdown rows of all tasks whose data are at hand."""
    if shared() is None:
        yield "### What plans learn"
        yield ""
        yield "No data are at hand."
        return
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks(Path(folder)).values():
            yield from rows_of(task)
            yield ""


def rows_of(task: Task) -> list[str]:
    """The table of a task; recurrent layers run by BLAS, as convolutions do."""
    with plain_recurrence():
        return list(Bench(task).rows())


def main() -> None:
    """Print the tables of some tasks, or of all, and put them into benchmarks/RESULTS.md."""
    with tempfile.TemporaryDirectory() as folder:
        known = tasks(Path(folder))
        for name in sys.argv[1:] or known:
            begin = time.process_time()
            table = rows_of(known[name])
            print("\n".join(table), flush=True)
            put(table[0], table)
            print(f"{time.process_time() - begin:.0f} s of processor time", file=sys.stderr)


if __name__ == "__main__":
    main()
