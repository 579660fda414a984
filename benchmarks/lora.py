"""Low-rank adapters against whole weights at the same RAM: what they take and what they learn.

Every set of updates is that of a checked plan. Accuracies are measured as in
``benchmarks.learning``: each set has the step size that suits it on other draws of the data.

    python -m benchmarks.lora [TASK ...]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path

from odt_plan.ir.errors import InfeasibleError
from odt_plan.ir.import_options import ImportOptions, Lora
from odt_plan.ir.training import OptimizerName, TrainingSpec
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request, make_plan
from odt_plan.usual_sets import LAYERS

from . import learning
from .learning import METHODS, PLENTY, Bench, Draw, Task, Updates, _told
from .models import shared
from .results import put

#: Ranks whose RAM, with every adapter and the biases updated, is the budget of a column.
RANKS = (1, 4)
#: Larger step sizes that adapters are tried with, too: B begins at zero, and few numbers move.
FASTER = (3.0, 10.0, 30.0)
TASKS = ("activity", "usps")
PRIOR, ADAPTERS = METHODS[0], "adapters"
OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "adam")
#: KWT-1: what is trained, and with which adapters.
KWT = (
    ("everything", None, "all"),
    ("last layer", None, "last"),
    ("adapters of rank 1, last layer", 1, "lora,last"),
    ("adapters of rank 4, last layer", 4, "lora,last"),
)


class _ByPrior(Bench):
    """A bench whose plans by the prior are made alone, without those of a trial."""

    def updates(self, draw: Draw, strategy: str, ram: int) -> Updates:
        if strategy == PRIOR:
            return self._plan(draw, ram, "auto")[0]
        return super().updates(draw, strategy, ram)


class _Adapted(_ByPrior):
    """A bench that all draws have adapters of one rank in."""

    def __init__(self, task: Task, rank: int) -> None:
        super().__init__(task)
        self._draws, self._others = (
            [replace(d, lora=Lora(rank, rank)) for d in draws]
            for draws in (self._draws, self._others)
        )
        self.ram = self._plan(self._others[0], PLENTY, "lora", "bias")[1]

    def updates(self, draw: Draw, strategy: str, ram: int) -> Updates:
        if strategy == ADAPTERS:
            return self._plan(draw, PLENTY, "lora", "bias")[0]
        return super().updates(draw, strategy, ram)


def _learning_rows(task: Task) -> Iterator[str]:
    """A row per update set, a column per budget."""
    plain = _ByPrior(task)
    benches = [_Adapted(_faster(task), rank) for rank in RANKS]
    yield f"{task.about} Accuracy in %, mean ± standard deviation over the draws."
    yield ""
    budgets = [f"{b.ram:,} B (rank {r})" for r, b in zip(RANKS, benches, strict=True)]
    yield f"| update set | {' | '.join(budgets)} |"
    yield "|---" * (len(RANKS) + 1) + "|"
    rows = {
        "all adapters and biases": lambda b: b.accuracies(ADAPTERS, b.ram),
        "plan, adapters offered (prior)": lambda b: b.accuracies(PRIOR, b.ram),
        "plan, none offered (prior)": lambda b: plain.accuracies(PRIOR, b.ram),
        "the most last layers that fit": lambda b: plain.accuracies(LAYERS, b.ram),
    }
    for name, measured in rows.items():
        cells = []
        for b in benches:
            try:
                cells.append(_told(measured(b)))
            except InfeasibleError:
                cells.append("no plan")
            print(f"{task.name}: {name} in {b.ram:,} B: {cells[-1]}", file=sys.stderr, flush=True)
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    told = [
        f"{s} {_told(plain.accuracies(s, PLENTY))} ({ram:,} B)"
        for s, ram in (("last layer", plain.least), ("all", plain.most))
    ]
    yield f"Whatever the budget: {'; '.join(told)}; nothing {_told(plain.untouched())}."


def _faster(task: Task) -> Task:
    """The task with larger step sizes as well."""
    faster = copy(task)
    faster.rates = (*task.rates, *(task.rates[-1] * factor for factor in FASTER))
    return faster


def _kwt_rows(folder: Path) -> Iterator[str]:
    """RAM and latency of KWT-1, everything kept, by SGD and by Adam."""
    device = load_device("stm32h743")
    yield "| KWT-1, everything kept | updated weights | arena | RAM | RAM, Adam | latency | flash |"
    yield "|---|---|---|---|---|---|---|"
    for name, rank, train in KWT:
        sgd, adam = (
            make_plan(
                Request(
                    folder / "models" / "kwt1_op17.onnx", device, ram_bytes=PLENTY,
                    flash_bytes=PLENTY, train=(train,), spec=TrainingSpec(optimizer=optimizer),
                    importing=ImportOptions(lora=rank and Lora(rank, rank)), with_baselines=False,
                )
            ).plan.claims
            for optimizer in OPTIMIZERS
        )  # fmt: skip
        yield (
            f"| {name} | {sgd.ram_bytes.weights:,} B | {sgd.ram_bytes.arena:,} B |"
            f" {sgd.ram_bytes.total:,} B | {adam.ram_bytes.total:,} B | {sgd.latency_s:.3g} s |"
            f" {sgd.flash_bytes.total:,} B |"
        )


def lora_table(names: tuple[str, ...] = TASKS) -> Iterator[str]:
    """Markdown rows."""
    yield "### Low-rank adapters (measured)"
    yield ""
    if (found := shared()) is None:
        yield "No models are at hand."
        return
    yield from _kwt_rows(found)
    with tempfile.TemporaryDirectory() as folder:
        known = learning.tasks(Path(folder))
        for name in names:
            yield ""
            yield from _learning_rows(known[name])


def main() -> None:
    """Print the table and put it into benchmarks/RESULTS.md."""
    table = list(lora_table(tuple(sys.argv[1:]) or TASKS))
    print("\n".join(table), flush=True)
    put(table[0], table)


if __name__ == "__main__":
    main()
