"""Predicted against measured on the emulated Cortex-M7: instructions, RAM, flash, stack.

python -m benchmarks.instructions [models...]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from odt_plan.backends.c import emit_c
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan

from .board import Elf, lane
from .models import NAMES, models

DEVICE = "stm32f746g-disco"
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


def _row(name: str, planned: PlannedModel, compiler: lane.Compiler, flag: str) -> str:
    plan, training, device = planned.plan, planned.training, planned.device
    claims = plan.claims
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
    arena = elf.symbols[f"{model}_arena"].bytes
    assert arena == claims.ram_bytes.arena, (arena, claims.ram_bytes.arena)
    ram = elf.symbols["__ram_used"].address - LIMITS.stack_bytes
    flash = elf.symbols["__flash_used"].address
    predicted = claims.cycles / device.cycles_per_instruction.value
    measured = result.instructions["train"]
    return (
        f"| {name} | {compiler} {flag} | {predicted:,.0f} | {measured:,} |"
        f" {measured / predicted:.2f} |"
        f" {arena:,} | {claims.ram_bytes.total:,} | {ram:,} | {claims.flash_bytes.total:,} |"
        f" {flash:,} | {result.stack_bytes:,} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    for line in instruction_table(parser.parse_args().models):
        print(line)


if __name__ == "__main__":
    main()
