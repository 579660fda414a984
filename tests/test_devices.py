"""Device and core specs: the bundled ones, and what a wrong file is told."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml

from odt_plan.ir.errors import UsageError
from odt_plan.ir.opdef import CostClass
from odt_plan.planner.device import GENERIC_DEVICE, device_ids, load_core, load_device
from odt_plan.planner.spec_file import bundled, bundled_ids

ASKED_FOR = [
    "esp32-s3",
    "nrf52840",
    "nucleo-f411re",
    "nucleo-g0b1re",
    "nucleo-l4r5zi",
    "nucleo-u575zi-q",
    "raspberry-pi-4b",
    "rp2040",
    "rp2350",
    "samd21-mkr1000",
    "stm32f746g-disco",
    "stm32h743",
]


def test_all_devices_are_bundled() -> None:
    assert device_ids() == sorted([*ASKED_FOR, GENERIC_DEVICE])


@pytest.mark.parametrize("device_id", [*ASKED_FOR, GENERIC_DEVICE])
def test_device_is_complete(device_id: str) -> None:
    d = load_device(device_id)
    assert d.id == device_id
    assert load_core(d.core).id == d.core
    assert d.ram_region()[1] > d.reserve.ram_bytes
    assert d.flash_bytes > d.reserve.flash_bytes
    assert d.find_storage("sdcard").read_bytes_per_s.value > 1e6
    assert all(r.sectors for r in d.regions if r.kind == "flash") or d.id in (
        GENERIC_DEVICE,
        "raspberry-pi-4b",
    )


@pytest.mark.parametrize(
    ("device_id", "ram", "flash"),  # FIELD figures: linker maps, probe-rs, MLPerf Tiny v1.2
    [
        ("stm32f746g-disco", (0x2000_0000, 320 << 10), 1 << 20),
        ("stm32h743", (0x2400_0000, 512 << 10), 2 << 20),
        ("nucleo-f411re", (0x2000_0000, 128 << 10), 512 << 10),
        ("nrf52840", (0x2000_0000, 256 << 10), 1 << 20),
        ("nucleo-l4r5zi", (0x2000_0000, 640 << 10), 2 << 20),
        ("nucleo-u575zi-q", (0x2000_0000, 768 << 10), 2 << 20),
        ("nucleo-g0b1re", (0x2000_0000, 144 << 10), 512 << 10),
        ("rp2040", (0x2000_0000, 264 << 10), 2 << 20),
        ("rp2350", (0x2000_0000, 520 << 10), 4 << 20),
        ("samd21-mkr1000", (0x2000_0000, 32 << 10), 256 << 10),
    ],
)
def test_memory_sizes(device_id: str, ram: tuple[int, int], flash: int) -> None:
    d = load_device(device_id)
    assert d.ram_region() == ram
    assert d.flash_bytes == flash


def test_f746_flash_sectors_are_uneven() -> None:
    (flash,) = (r for r in load_device("stm32f746g-disco").regions if r.kind == "flash")
    assert flash.sectors == ((4, 32 << 10), (1, 128 << 10), (3, 256 << 10))


@pytest.mark.parametrize("core_id", bundled_ids("cores"))
def test_core_prices_every_cost_class(core_id: str) -> None:
    core = load_core(core_id)
    assert set(core.instructions["f32"]) == set(get_args(CostClass))
    assert all(q.value > 0 for q in core.instructions["f32"].values())
    assert core.call.value > 0


@pytest.mark.parametrize("kind", ["devices", "cores"])
def test_every_number_has_a_source(kind: str) -> None:
    def sources(node: object) -> list[str]:
        if isinstance(node, list):
            return [s for item in node for s in sources(item)]
        if isinstance(node, dict):
            own = [node["source"]] if "source" in node else []
            return own + [s for item in node.values() for s in sources(item)]
        return []

    for spec_id in bundled_ids(kind):
        found = sources(yaml.safe_load(bundled(kind, spec_id).read_text(encoding="utf-8")))
        assert found, spec_id
        for source in found:
            assert len(source) > 8, (spec_id, source)
            assert source != "estimated:", spec_id


def test_unknown_device_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="'stm32f746-disco' is not known; did you mean stm32f746g"):
        load_device("stm32f746-disco")


def test_unknown_storage_names_the_known() -> None:
    with pytest.raises(UsageError, match="it knows none, sdcard, sdram"):
        load_device("stm32f746g-disco").find_storage("tape")


def test_unknown_core_names_the_known() -> None:
    with pytest.raises(UsageError, match=r"core 'z80' is not known; known are .*cortex-m7"):
        load_core("z80")


def edited(tmp_path: Path, old: str, new: str) -> Path:
    """A copy of the F746 spec with one text replaced."""
    text = bundled("devices", "stm32f746g-disco").read_text(encoding="utf-8")
    assert text.count(old) >= 1
    path = tmp_path / "board.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


def line_of(path: Path, text: str) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(i for i, line in enumerate(lines, 1) if text in line)


def test_own_device_file_is_read(tmp_path: Path) -> None:
    path = edited(tmp_path, "id: stm32f746g-disco", "id: my-board")
    assert load_device(str(path)).id == "my-board"


@pytest.mark.parametrize(
    ("old", "new", "at", "message"),
    [
        ("name: STM32F746G Discovery\n", "", 1, "name: is missing"),
        ("kind: flash", "kind: rom", "kind: rom", "regions.3.kind: .*'ram', 'code' or 'flash'"),
        ("kind: flash", "kindd: flash", "FLASH", "regions.3.kind: is missing"),
        ("bytes: 65536", "bytes: -1", "bytes: -1", "regions.1.bytes: .*greater than 0"),
        ("bytes: 65536", "bytes: 320 kb/s", "320 kb/s", "regions.1.bytes: .*valid integer"),
        ("value: 0.33, source", "value: .nan, source", ".nan", "power_w.value: .*finite"),
        ("value: 0.33, source", "value: .inf, source", ".inf", "power_w.value: .*finite"),
        ("value: 0.33, source", "watts: 0.33, source", "watts", "power_w.value: is missing"),
        ("core: cortex-m7", "core: z80", "core: z80", "core: 'z80' is not one of .*cortex-m7"),
        ("3, 262144", "4, 262144", "4, 262144", "regions.3.sectors: add up to 1,310,720 bytes"),
        (
            "name: DTCM\n",
            "name: DTCM\n    program_bytes: {value: 8, source: nobody}\n",
            "value: 8,",
            "regions.1.program_bytes: are those of flash",
        ),
        (
            "kind: flash\n",
            "kind: flash\n    program_bytes: {value: 24, source: nobody}\n",
            "value: 24",
            "regions.3.program_bytes: must be a power of 2, not 24",
        ),
        (
            "kind: flash\n",
            "kind: flash\n    program_bytes: {value: 65536, source: nobody}\n",
            "value: 65536",
            "regions.3.program_bytes: 65,536 bytes do not divide 32,768",
        ),
        ("0x2001_0000", "0x2000_8000", "regions:", "regions: SRAM at 0x20008000 overlaps DTCM"),
        ("id: sdram", "id: sdcard", "storage:", "storage: id sdcard occurs twice"),
        ("id: sdram", "id: none", "id: none", "storage.1.id: 'none' stands for"),
        ("value: 216000000", "value: 0", "clock_hz", "clock_hz: must be above 0"),
        ("value: 4440000", "value: 0", "write_bytes", "storage.0.write_bytes_per_s: must be"),
        ("dma: {value: true", "dma: {value: fast", "dma:", "storage.0.dma.value: .*boolean"),
        ("dma: {value: true", "dma: {yes: true", "dma:", "storage.0.dma.value: is missing"),
        ("value: 1000,", "value: 0,", "value: 0,", "storage.0.wear.cycles: must be 1 or more"),
        ("unit_bytes: 16384", "unit_bytes: 6", "unit_bytes", "unit_bytes: must be a multiple of 4"),
        ("    wear:", "    region: FLASH\n    wear:", "wear:", "storage.0.wear: .*levelled: false"),
        (
            "    wear:",
            "    allow_paging: {value: true, source: me too}\n    wear:",
            "allow_paging:",
            "storage.0.allow_paging: is for a part of the chip's flash",
        ),
        ("kind: ram", "kind: ram\n    kind: ram", 15, "kind: given twice .first in line 14"),
    ],
)
def test_wrong_field_is_named_with_its_line(
    tmp_path: Path, old: str, new: str, at: int | str, message: str
) -> None:
    path = edited(tmp_path, old, new)
    line = at if isinstance(at, int) else line_of(path, at)
    with pytest.raises(UsageError, match=message) as e:
        load_device(str(path))
    assert str(e.value).startswith(f"{path}:{line}: ")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("id: a\nname: [1, 2\ncore: x\n", 3),
        ("id: a\n\tname: b\n", 2),
        ("id: 'a\nname: b\n", 3),
        ("- a\n- b\n", 1),
        ("id: !!python/object:os.system x\n", 1),
        ("a: *b\n", 1),
        ("id: x\nname: &a [*a]\n", 2),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", 2),
    ],
)
def test_broken_yaml_is_told_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "board.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as e:
        load_device(str(path))
    assert str(e.value).startswith(f"{path}:{line}: ")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"[" * 5000, b"\x00", b"? [a]\n: b\n"])
def test_garbage_is_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "board.yaml"
    path.write_bytes(data)
    with pytest.raises(UsageError) as e:
        load_device(str(path))
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_huge_file_is_no_spec(tmp_path: Path) -> None:
    path = tmp_path / "board.yaml"
    path.write_bytes(b"#" * (1 << 21))
    with pytest.raises(UsageError, match="is no spec"):
        load_device(str(path))


def test_missing_file_and_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_device(str(tmp_path / "none.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UsageError, match="can't read"):
        load_device(str(tmp_path / "folder.yaml"))


def test_internal_flash_is_a_part_of_a_flash_region(tmp_path: Path) -> None:
    path = edited(tmp_path, "levelled: true", "levelled: false")
    text = path.read_text(encoding="utf-8")
    assert load_device(str(path)).find_storage("sdcard").pages
    for region, size in (("FLASH", 4096), ("FLASH", 1 << 21), ("SRAM", 4096)):
        changed = text.replace("bytes: 0x7000_0000", f"bytes: {size}\n    region: {region}")
        path.write_text(changed, encoding="utf-8")
        if (region, size) == ("FLASH", 4096):
            assert [s.id for s in load_device(str(path)).pageable] == ["sdram"]
            continue
        with pytest.raises(UsageError, match=f"sdcard is no part of a flash region {region}"):
            load_device(str(path))
