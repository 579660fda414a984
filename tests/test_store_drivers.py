"""The flash drivers that docs/c-integration.md shows for the store: they compile, save and load."""

from __future__ import annotations

import subprocess
from pathlib import Path

import nets
import pytest
from board import lane
from test_c_backend import Planned, needs_gcc, planned
from test_docs import ROOT, blocks

from odt_plan.backends.c import emit_c
from odt_plan.ir.training import TrainingSpec
from odt_plan.planner.store import saved_bytes, written_bytes

PICO, ZEPHYR = "hardware/flash.h", "zephyr/storage/flash_map.h"
needs_cross = pytest.mark.skipif(not lane.has_gcc(), reason="needs arm-none-eabi-gcc")


def two_sectors() -> Planned:
    """A state of more than one sector."""
    return planned(nets.mlp((8, 32, 10)), TrainingSpec(optimizer="adam"))


def driver(header: str) -> str:
    """The only example that includes a header."""
    shown = ["\n".join(b) for _, b in blocks(ROOT / "docs" / "c-integration.md", "c")]
    (text,) = [b for b in shown if f"#include <{header}>" in b or f'#include "{header}"' in b]
    return text + "\n"


@needs_cross
@pytest.mark.parametrize(("header", "core"), [(PICO, "cortex-m0plus"), (ZEPHYR, "cortex-m4")])
def test_drivers_compile_for_the_core(header: str, core: str, tmp_path: Path) -> None:
    emit_c(*two_sectors(), tmp_path, name="my_model", program_bytes=256)
    (tmp_path / "driver.c").write_text(driver(header), "ascii")
    command = ["arm-none-eabi-gcc", "-mthumb", f"-mcpu={core}", "-Os", *lane.STRICT, "-I."]
    command += [f"-I{lane.FIRMWARE}", "-c", "driver.c", "my_model_store.c"]
    subprocess.run(command, cwd=tmp_path, check=True)


@needs_gcc
@pytest.mark.parametrize(
    ("header", "program_bytes", "unit", "opened"),
    [
        (PICO, 256, 256, []),
        (ZEPHYR, 256, 256, [["open", "0"]]),
        (ZEPHYR, 8, 16, [["open", "0"]]),  # not the flash that the board's spec tells of
    ],
)
def test_drivers_keep_to_units_and_sectors(
    header: str,
    program_bytes: int,
    unit: int,
    opened: list[list[str]],
    tmp_path: Path,
) -> None:
    """Over an array that takes units once after each erase, and sectors of 4,096 bytes alone."""
    plan, training = two_sectors()
    library = tmp_path / "c"
    emit_c(plan, training, library, name="my_model", program_bytes=program_bytes)
    (library / "driver.h").write_text(driver(header), "ascii")
    defines = ['DRIVER="driver.h"', f"UNIT={unit}u", *["OPEN"] * len(opened)]
    main = lane.FIRMWARE / "drivers.c"
    program = lane.build_host(library, "my_model", selftest=False, defines=defines, main=main)
    result = lane.run_host(program, {})
    assert result.exit_code == 0, result.stdout
    units = 3 * written_bytes(saved_bytes(plan, training), unit) // unit
    assert [line.split("=") for line in result.stdout.splitlines()] == [
        *opened, ["init", "0"], ["none", "6"], *[["save", "0"], ["load", "0"]] * 3,
        ["units", str(units)], ["sectors", "6"], ["unit", str(unit)],
        ["slot", "8192"], ["wrong", "0"],
    ]  # fmt: skip
