"""Predicted against measured on the emulated Cortex-M7: instructions, RAM, flash, stack."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from odt_plan.backends.c import emit_c
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan

from .board import Elf, lane
from .models import models

DEVICE = "stm32f746g-disco"


def instruction_table() -> Iterator[str]:
    """Markdown rows: what the plan claims and what the emitted firmware does, gcc and clang."""
    device = load_device(DEVICE)
    yield f"### Predicted against measured: one training step, emulated {device.core} ({DEVICE})"
    yield ""
    yield "Instructions are executed ones, exact and repeatable; they are not cycles."
    yield ""
    yield (
        "| model | compiler | instructions predicted | measured | measured / predicted |"
        " arena B plan = .bss | RAM B plan | linked | flash B plan | linked | stack B |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for path in models():
        for train in (("auto",), ("all",)):
            ram = None if train == ("auto",) else 1 << 22
            planned = make_plan(
                Request(path, device, train=train, ram_bytes=ram, with_baselines=False)
            )
            for compiler in ("gcc", "zig"):
                if compiler == "gcc" and not lane.has_gcc():
                    continue
                yield _row(f"{path.stem}, {train[0]}", planned, compiler)


def _row(name: str, planned: PlannedModel, compiler: lane.Compiler) -> str:
    plan, training, device = planned.plan, planned.training, planned.device
    claims = plan.claims
    limits = lane.Limits(flash_bytes=4 << 20, ram_bytes=8 << 20)
    with tempfile.TemporaryDirectory() as folder:
        model = emit_c(plan, training, Path(folder))[0].stem
        image = lane.build(
            Path(folder), model, "cortex-m7", compiler, limits=limits, selftest=False
        )
        rng = np.random.default_rng(0)
        x = rng.standard_normal(training.sample.type.shape).astype(np.float32)
        kind = training.target.type
        target = np.zeros(kind.shape, np.int32 if kind.dtype == "i32" else np.float32)
        count = plan.training.micro_batches
        files = lane.training_input([x] * count, [target] * count, 0.01)
        result = lane.run(image, "cortex-m7", files=files, limits=limits)
        elf = Elf(image)
    assert result.exit_code == 0, result.stdout
    arena = elf.symbols[f"{model}_arena"].bytes
    assert arena == claims.ram_bytes.arena, (arena, claims.ram_bytes.arena)
    ram = elf.symbols["__ram_used"].address - limits.stack_bytes
    flash = elf.symbols["__flash_used"].address
    predicted = claims.cycles / device.cycles_per_instruction.value
    measured = result.instructions["train"]
    return (
        f"| {name} | {compiler} -O2 | {predicted:,.0f} | {measured:,} |"
        f" {measured / predicted:.2f} |"
        f" {arena:,} | {claims.ram_bytes.total:,} | {ram:,} | {claims.flash_bytes.total:,} |"
        f" {flash:,} | {result.stack_bytes:,} |"
    )


if __name__ == "__main__":
    for line in instruction_table():
        print(line)
