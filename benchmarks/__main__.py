"""Runs all benchmarks and rewrites benchmarks/RESULTS.md (``make bench``)."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version

from . import (
    activation_budget,
    adaptation,
    budgets,
    head10,
    instructions,
    kernels,
    kernels_int8,
    layout,
    learning,
    lora,
    orders,
    peers,
    planning,
    rivals,
    runtime,
    scale,
    sweeps,
    tte,
)
from .results import RESULTS, write

TABLES = (
    planning.solve_table,
    planning.solver_table,
    planning.baseline_table,
    planning.squeeze_table,
    scale.scale_table,
    orders.orders_table,
    budgets.budgets_table,
    layout.instance_table,
    layout.arena_table,
    sweeps.sweep_table,
    sweeps.inheriting_table,
    peers.peers_table,
    rivals.rivals_table,
    activation_budget.activation_budget_table,
    instructions.instruction_table,
    instructions.plans_table,
    kernels.kernel_table,
    kernels_int8.int8_table,
    tte.tte_table,
    tte.importance_table,
    head10.head10_table,
    adaptation.adaptation_table,
    runtime.runtime_table,
    learning.learning_table,
    lora.lora_table,
)


def _report() -> Iterator[str]:
    yield "# Benchmark results"
    yield ""
    yield (
        f"`make bench` on {platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python"
        f" {platform.python_version()}, ortools {version('ortools')}. Seconds are wall clock on a"
        " shared machine; RAM, gaps and instructions are exact and repeatable. Models other than"
        " digits_cnn are public pretrained ones and are left out where they are not at hand."
    )
    for table in TABLES:
        yield ""
        print(f"{table.__module__}.{table.__name__} ...", file=sys.stderr)
        yield from table()


def main() -> None:
    """Run everything, then write the file whole."""
    text = "\n".join(_report()) + "\n"
    write(text)
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
