"""Predicted against measured on the emulated Cortex-M7: instructions, RAM, flash, stack.

python -m benchmarks.instructions [models...]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from odt_plan.backends.c import emit_c
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan

from .board import Elf, lane
from .models import NAMES, models

DEVICE = "stm32f746g-disco"
#: Ten plans of three models: update set and RAM budget.
BUDGETS: dict[str, tuple[tuple[str, int], ...]] = {
    "mlperf_resnet8_bn": (("all", 560_000), ("all", 600_000), ("auto", 250_000), ("auto", 400_000)),
    "mbv2-w0.35-head10-qdq": (("auto", 130_000), ("auto", 200_000), ("auto", 300_000)),
    "mlperf_dscnn_kws_int8": (("auto", 50_000), ("auto", 87_096), ("auto", 162_712)),
}
#: Room of the emulated board: larger than the device, so that every update set can be measured.
LIMITS = lane.Limits(flash_bytes=8 << 20, ram_bytes=12 << 20)
#: Integer models, and MCUNet in fp32.
LARGE = (
    "mcunet-5fps-head10-relu6",
    "mcunet-5fps-head10-qdq",
    "mbv2-w0.35-head10-qdq",
    "proxyless-w0.3-head10-qdq",
    "tinyengine_mcunet_vww_int8",
    "mlperf_dscnn_kws_int8",
    "mlperf_resnet8_int8",
)
#: Compilers and what they optimise for: the rates are those of the first.
BUILDS: tuple[tuple[lane.Compiler, str], ...] = (("gcc", "-O2"), ("gcc", "-O3"), ("zig", "-O2"))


@dataclass(frozen=True)
class _Linked:
    """Bytes of the firmware: .bss of the arena, RAM without stack, flash; painted stack."""

    arena: int
    ram: int
    flash: int
    stack: int


def instruction_table(paths: Sequence[Path] = ()) -> Iterator[str]:
    """Markdown rows: what the plan claims and what the emitted firmware does, gcc and clang."""
    device = load_device(DEVICE)
    yield f"### Predicted against measured: one training step, emulated {device.core} ({DEVICE})"
    yield ""
    yield (
        "Instructions are executed ones, exact and repeatable; they are not cycles. The prediction"
        " is of gcc -O2."
    )
    yield ""
    yield (
        "| model | compiler | instructions predicted | measured | measured / predicted |"
        " arena B plan = .bss | RAM B plan | linked | flash B plan | linked | stack B |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    large = set(models(LARGE)[1:])
    for path in paths or (*models(NAMES), *models(LARGE)[1:]):
        for train in ("last", "bias") if path in large else ("auto", "all"):
            room = {} if train == "auto" else {"ram_bytes": 10 << 20, "flash_bytes": 7 << 20}
            planned = make_plan(
                Request(path, device, train=(train,), with_baselines=False, **room)  # type: ignore[arg-type]
            )
            for compiler, flag in BUILDS:
                if compiler == "gcc" and not lane.has_gcc():
                    continue
                yield _row(f"{path.stem}, {train}", planned, compiler, flag)


def plans_table() -> Iterator[str]:
    """Markdown rows: the same for plans under RAM budgets, with all that these make a plan do."""
    device = load_device(DEVICE)
    yield f"### Predicted against measured under RAM budgets, emulated {device.core}, gcc -O2"
    yield ""
    yield "| plan | rebuilt | streamed | predicted | measured | measured / predicted |"
    yield "|---|---|---|---|---|---|"
    folder = {p.stem: p for p in models(tuple(BUDGETS))}
    for name, budgets in BUDGETS.items():
        for train, ram in budgets if name in folder else ():
            planned = make_plan(
                Request(
                    folder[name], device, ram_bytes=ram, train=(train,), with_baselines=False
                )
            )  # fmt: skip
            plan = planned.plan
            predicted, measured, _ = _measure(planned, "gcc", "-O2")
            rebuilt = sum(s.recompute and bool(s.cycles) for s in plan.steps)
            yield (
                f"| {name}, {train}, {ram:,} B | {rebuilt} | {len(plan.decisions.streamed)} |"
                f" {predicted:,.0f} | {measured:,} | {measured / predicted:.3f} |"
            )


def _measure(
    planned: PlannedModel, compiler: lane.Compiler, flag: str
) -> tuple[float, int, _Linked]:
    """Instructions of a training step, predicted and measured, and what was linked."""
    plan, training, device = planned.plan, planned.training, planned.device
    with tempfile.TemporaryDirectory() as folder:
        model = emit_c(plan, training, Path(folder))[0].stem
        image = lane.build(
            Path(folder),
            model,
            "cortex-m7",
            compiler,
            limits=LIMITS,
            selftest=False,
            optimise=flag,
        )
        rng = np.random.default_rng(0)
        kind = training.sample.type
        x = rng.standard_normal(kind.shape).astype(np.float32)
        if kind.dtype == "i8":
            x = rng.integers(-128, 128, kind.shape, np.int8)
        kind = training.target.type
        target = np.zeros(kind.shape, np.int32 if kind.dtype == "i32" else np.float32)
        count = plan.training.micro_batches
        files = lane.training_input([x] * count, [target] * count, 0.01)
        result = lane.run(image, "cortex-m7", files=files, limits=LIMITS)
        elf = Elf(image)
    assert result.exit_code == 0, result.stdout
    linked = _Linked(
        elf.symbols[f"{model}_arena"].bytes,
        elf.symbols["__ram_used"].address - LIMITS.stack_bytes,
        elf.symbols["__flash_used"].address,
        result.stack_bytes,
    )
    predicted = plan.claims.cycles / device.cycles_per_instruction.value
    return predicted, result.instructions["train"], linked


def _row(name: str, planned: PlannedModel, compiler: lane.Compiler, flag: str) -> str:
    claims = planned.plan.claims
    predicted, measured, linked = _measure(planned, compiler, flag)
    assert linked.arena == claims.ram_bytes.arena, (linked, claims.ram_bytes.arena)
    return (
        f"| {name} | {compiler} {flag} | {predicted:,.0f} | {measured:,} |"
        f" {measured / predicted:.2f} |"
        f" {linked.arena:,} | {claims.ram_bytes.total:,} | {linked.ram:,} |"
        f" {claims.flash_bytes.total:,} | {linked.flash:,} | {linked.stack:,} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    paths = parser.parse_args().models
    for line in (*instruction_table(paths), *(() if paths else ("", *plans_table()))):
        print(line)


if __name__ == "__main__":
    main()
