"""The joint model at ten RAM budgets between the least RAM and the need without a limit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from odt_plan.ir.errors import InfeasibleError
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request, make_plan

from .models import models

DEVICE = "stm32f746g-disco"
NAMES = (
    "mbv2-w0.35-head10-qdq",
    "mcunet-5fps-head10-qdq",
    "mlperf_resnet8_bn",
    "mlperf_resnet8_int8",
    "mlperf_dscnn_kws_int8",
    "kwt1_op17",
)
BUDGETS = 10
#: Seconds of one run: the default of the command line.
TIME_LIMIT_S = 60.0
#: RAM and flash that never bind: KWT-1 in f32 has more weights than the board has flash.
PLENTY, FLASH = 1 << 26, 1 << 24


def _least(path: Path) -> int:
    """RAM of training the last layer alone, as little as is possible."""
    request = Request(
        path, load_device(DEVICE), ram_bytes=PLENTY, flash_bytes=FLASH, train=("last",),
        objective="ram", with_baselines=False,
    )  # fmt: skip
    return make_plan(request).plan.claims.ram_bytes.total


def budgets_table(names: Sequence[str] = NAMES, count: int = BUDGETS) -> Iterator[str]:
    """Markdown rows: seconds from file to checked plan, proven gaps and the score.

    The budgets lie between the least RAM of training the last layer alone and what is used without
    a limit.
    """
    yield f"### `--train auto` on {DEVICE}: ten RAM budgets from the last layer's need to no limit"
    yield ""
    yield (
        "| model | RAM budget B | measured s | CPU s | load | learn gap |"
        " latency gap | score | RAM B |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for path in models(tuple(names)):
        if path.stem not in names:
            continue
        yield from _rows(path, count)


def _rows(path: Path, count: int) -> Iterator[str]:
    device, low = load_device(DEVICE), _least(path)
    free = Request(
        path, device, ram_bytes=PLENTY, flash_bytes=FLASH, with_baselines=False,
        time_limit_s=TIME_LIMIT_S,
    )  # fmt: skip
    top = make_plan(free).plan.claims.ram_bytes.total
    for i in range(count):
        ram = (low + (top - low) * (i + 1) // (count + 1)) // 4 * 4
        wall, cpu = time.perf_counter(), time.process_time()
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        row = f"| {path.stem} | {ram:,} |"
        try:
            planned = make_plan(replace(free, ram_bytes=ram))
        except InfeasibleError as e:
            yield f"{row} {time.perf_counter() - wall:.1f} | | {load:.1f} | {e} | | | |"
            continue
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        learn, latency = planned.plan.objective
        yield (
            f"{row} {wall:.1f} | {cpu:.1f} | {load:.1f} | {learn.gap:.1e} |"
            f" {latency.gap:.1e} | {learn.value:,.0f} | {planned.plan.claims.ram_bytes.total:,} |"
        )


def main() -> None:
    """Print the table as it is measured."""
    for line in budgets_table():
        print(line, flush=True)


if __name__ == "__main__":
    main()
