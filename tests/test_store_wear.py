"""Where saves can be kept in the chip's flash, and how many there can be."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_run import Cli
from hypothesis import given, settings
from hypothesis import strategies as st

from odt_plan.ir.errors import UsageError
from odt_plan.planner.device import Device, Quantity, Region, Size, load_device
from odt_plan.planner.spec_file import bundled
from odt_plan.planner.store import place_slots

MODEL = Path(__file__).resolve().parent.parent / "examples" / "digits_cnn.onnx"


def board(sectors: list[tuple[int, int]], unit: int | None = None) -> Device:
    like = load_device("nrf52840")
    flash = Region(
        name="FLASH",
        kind="flash",
        origin=0,
        bytes=sum(n * size for n, size in sectors),
        sectors=tuple(sectors),
        erase_cycles=Quantity(value=500, source="made up"),
        program_bytes=None if unit is None else Size(value=unit, source="made up"),
        source="made up",
    )
    ram = [r for r in like.regions if r.kind == "ram"]
    return like.model_copy(update={"regions": (flash, *ram)})


@settings(deadline=None)  # a loaded machine is slow once in a hundred examples
@given(
    sectors=st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from([32, 64, 128, 256])), min_size=1, max_size=4
    ),
    n_bytes=st.integers(1, 600),
    unit=st.sampled_from([None, 1, 8, 16, 32]),
)
def test_the_smallest_slots_at_the_end(
    sectors: list[tuple[int, int]], n_bytes: int, unit: int | None
) -> None:
    edges = [0]
    for n, size in sectors:
        for _ in range(n):
            edges.append(edges[-1] + size)
    by = 32 if unit is None else unit
    written = -(-n_bytes // by) * by + max(by, 8)  # whole units, and the mark in its own
    end = edges[-1]
    ways = [end - b for b in edges for a in edges if b - a == end - b >= written]
    found = place_slots(board(sectors, unit), n_bytes)
    if not ways:
        assert found is None
        return
    assert found is not None
    assert found.slot_bytes == min(ways)
    assert found.sectors == sum(1 for e in edges if e > end - 2 * min(ways))
    assert found.saves == 1000
    assert found.origin == end - 2 * min(ways)


def test_of_several_regions_the_last_that_can() -> None:
    device = board([(4, 1024)])
    (flash, *rest) = device.regions
    small = flash.model_copy(
        update={"name": "BANK2", "origin": 1 << 20, "bytes": 512, "sectors": ((2, 256),)}
    )
    both = device.model_copy(update={"regions": (flash, small, *rest)})
    for size, name in ((200, "BANK2"), (300, "FLASH")):
        slots = place_slots(both, size)
        assert slots is not None
        assert slots.region.name == name


@pytest.mark.parametrize(
    ("device", "told"),
    [
        # 2 x 106 sectors of 4 KiB would be of 434,176 B; 10,000 erases of each, two slots
        ("nrf52840", "; 20,000 saves wear them out: 2.3 years of one an hour, 55 of one a day"),
        ("stm32f746g-disco", " in the last 8 sectors of FLASH, where plan and reserve leave just "),
        ("generic-cortex-m7", "; sectors of generic-cortex-m7 for two of them are not known"),
    ],
)
def test_report(odt: Cli, device: str, told: str) -> None:
    done = odt(MODEL, "--device", device, "--gap", "0.05")
    assert done.code == 0, done.err
    (line,) = [row for row in done.out.splitlines() if row.startswith("store ")]
    assert told in line


@pytest.mark.parametrize(
    ("device", "unit", "slots"),
    [
        (
            "rp2040",
            256,
            {"region": "XIP", "origin": 0x1020_0000 - 2 * 53 * 4096, "slot_bytes": 53 * 4096,
             "sectors": 2 * 53, "erase_cycles": 100_000, "saves": 200_000},
        ),
        (
            "stm32f746g-disco",
            32,
            {"region": "FLASH", "origin": 0x0800_0000, "slot_bytes": 512 << 10, "sectors": 8,
             "erase_cycles": 10_000, "saves": 20_000},
        ),
        ("generic-cortex-m7", 32, None),
    ],
)  # fmt: skip
def test_json(
    odt: Cli, tmp_path: Path, device: str, unit: int, slots: dict[str, object] | None
) -> None:
    """All that the line of the report tells, as numbers; where it lies, and what a save writes."""
    options = (MODEL, "--device", device, "--gap", "0.05")
    told = odt(*options, "--json", "--quiet", "--emit", "c", "-o", str(tmp_path)).json["store"]
    assert told["slots"] == (None if slots is None else {"count": 2, **slots})
    saved, written = told["saved_bytes"], told["written_bytes"]
    assert told["program_bytes"] == unit
    assert (written - unit) % unit == 0
    assert 0 <= written - unit - saved < unit
    (line,) = [row for row in odt(*options).out.splitlines() if row.startswith("store ")]
    assert f" takes {saved:,} B" in line
    if slots is None:
        assert not told["fits"]
        return
    assert written <= told["slots"]["slot_bytes"]
    assert f" two slots {2 * told['slots']['slot_bytes']:,} B " in line
    assert f" in the last {told['slots']['sectors']} sectors of {slots['region']}" in line
    assert told["fits"] == (2 * told["slots"]["slot_bytes"] <= told["free_bytes"])
    if told["fits"]:
        assert f"; {told['slots']['saves']:,} saves wear them out" in line
    else:
        assert f" leave just {told['free_bytes']:,} B" in line


def test_units_of_the_board_are_those_of_the_library(odt: Cli, tmp_path: Path) -> None:
    for device, unit in (("rp2040", 256), ("nrf52840", 4), ("esp32-s3", 32)):
        done = odt(MODEL, "--device", device, "--gap", "0.05", "--emit", "c", "-o", device, "-q")
        assert done.code == 0, done.err
        header = (tmp_path / device / "digits_cnn_store.h").read_text("ascii")
        assert f"\n#define DIGITS_CNN_STORE_UNIT {unit}u\n" in header
        kernels = [tmp_path / d / "odtplan_store.h" for d in ("rp2040", device)]
        assert kernels[0].read_bytes() == kernels[1].read_bytes(), "models share it"


def test_erase_cycles_belong_to_sectors(tmp_path: Path) -> None:
    text = bundled("devices", "nrf52840").read_text(encoding="utf-8")
    path = tmp_path / "board.yaml"
    path.write_text(text.replace("    sectors: [[256, 4096]]\n", ""))
    with pytest.raises(UsageError, match="erase_cycles: are those of sectors; add these"):
        load_device(str(path))
