"""Devices from linker scripts, maps, ELFs and vendors' files; GNU's own tools are the oracle."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli_run import Cli

from odt_plan.ir.errors import UsageError
from odt_plan.planner.boards.combine import Given, Imported, combine
from odt_plan.planner.boards.facts import Facts, Use
from odt_plan.planner.boards.read import read_facts
from odt_plan.planner.device import load_device
from odt_plan.planning import PlanOptions, make_request

MODEL = Path(__file__).resolve().parent.parent / "examples" / "digits_cnn.onnx"
GCC, SIZE, LD = (shutil.which(f"arm-none-eabi-{t}") for t in ("gcc", "size", "ld"))
needs_gcc = pytest.mark.skipif(not (GCC and SIZE and LD), reason="arm-none-eabi-gcc is missing")

SCRIPT = """/* A board with two RAMs. */
ENTRY(Reset_Handler)
_Min_Heap_Size = 0x200; _Min_Stack_Size = STACK_KB * 1K; /* both stand
   in a section */
STACK_KB = 1;
MEMORY
{
  FLASH (rx)  : ORIGIN = 0x08000000, LENGTH = 512K
  RAM (xrw)   : ORIGIN = 0x20000000, LENGTH = (1 << 17) - 32K
  SRAM2 (rw)  : org = ORIGIN(RAM) + LENGTH(RAM) * 4, len = 32K
}
SECTIONS {
  .isr_vector : { LONG(ORIGIN(RAM) + LENGTH(RAM)) LONG(Reset_Handler) } > FLASH
  .text : { *(.text*) *(.rodata*) } > FLASH
  .data : { *(.data*) } > RAM AT> FLASH
  .bss (NOLOAD) : ALIGN(32) { *(.bss*) *(COMMON) . = ALIGN(8); end = .; } > RAM
  ._user_heap_stack : { . = ALIGN(8); . = . + _Min_Heap_Size; . = . + _Min_Stack_Size; } > RAM
  .a_section_with_a_long_name (NOLOAD) : { *(.dma) } > SRAM2
}
"""
SOURCE = """
int initialised[10] = {1, 2, 3}, zeroed[100];
const int table[33] = {4, 5};
__attribute__((section(".dma"))) char dma[256];
int main(void) { return zeroed[3] = initialised[1] + table[zeroed[2] & 31] + dma[1]; }
void Reset_Handler(void) { main(); for (;;); }
"""


@dataclass
class Firmware:
    """A linked program, and what the linker says that it takes: region -> bytes."""

    script: Path
    map: Path
    elf: Path
    used: dict[str, int]


def link(folder: Path, cpu: str, script: str = SCRIPT) -> Firmware:
    (folder / "app.c").write_text(SOURCE, encoding="utf-8")
    (folder / "app.ld").write_text(script, encoding="utf-8")
    assert GCC
    words = [GCC, f"-mcpu={cpu}", "-mthumb", "-O1", "-g", "app.c", "-nostdlib", "-T", "app.ld",
             "-Wl,-Map=app.map", "-Wl,--print-memory-usage", "-o", "app.elf"]  # fmt: skip
    if cpu in ("cortex-m4", "cortex-m7", "cortex-m33"):
        fpu = "fpv4-sp-d16" if cpu == "cortex-m4" else "fpv5-sp-d16"
        words[2:2] = ["-mfloat-abi=hard", f"-mfpu={fpu}"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\s*(\w+):\s+(\d+) (B|KB)", done.stdout, re.MULTILINE)
    used = {name: int(n) * (1024 if unit == "KB" else 1) for name, n, unit in rows}
    return Firmware(*(folder / f"app.{e}" for e in ("ld", "map", "elf")), used)


@pytest.fixture(scope="module")
def firmware(tmp_path_factory: pytest.TempPathFactory) -> Firmware:
    return link(tmp_path_factory.mktemp("firmware"), "cortex-m4")


def imported(*files: Path, chip: str | None = None, **given: Any) -> Imported:
    facts = [read_facts(f, chip, given.get("core")) for f in files]
    return combine(facts, Given("board", **given))


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


# ---- the user's firmware ------------------------------------------------------------------------


@needs_gcc
def test_what_the_firmware_takes_is_what_the_linker_says(firmware: Firmware) -> None:
    found = imported(firmware.script, firmware.elf)
    assert found.device.reserve.flash_bytes == firmware.used["FLASH"]
    assert found.device.reserve.ram_bytes == firmware.used["RAM"]
    assert found.device.reserve.region == "RAM"
    (ram, _), (second, left) = found.device.ram_budgets
    assert (ram.origin, ram.bytes) == (0x2000_0000, 96 << 10)
    assert second.bytes == left == (32 << 10) - firmware.used["SRAM2"]
    assert second.origin == 0x2000_0000 + 4 * (96 << 10) + firmware.used["SRAM2"]
    assert not found.conflicts
    assert found.device.core == "cortex-m4"


@needs_gcc
def test_script_and_map_give_the_same_regions(firmware: Firmware) -> None:
    script, linked = read_facts(firmware.script), read_facts(firmware.map)
    assert [(m.name, m.kind, m.origin, m.bytes) for m in script.memories] == [
        (m.name, m.kind, m.origin, m.bytes) for m in linked.memories
    ]


@needs_gcc
def test_a_map_takes_as_much_as_its_elf(firmware: Firmware) -> None:
    by_map = imported(firmware.map, core="cortex-m4").device
    by_elf = imported(firmware.elf, firmware.script).device
    assert by_map.reserve.ram_bytes == by_elf.reserve.ram_bytes
    assert by_map.reserve.flash_bytes == by_elf.reserve.flash_bytes
    assert [r.bytes for r in by_map.regions] == [r.bytes for r in by_elf.regions]
    assert not imported(firmware.map, firmware.elf).conflicts


@needs_gcc
def test_sections_are_those_of_size(firmware: Firmware) -> None:
    assert SIZE
    told = subprocess.run([SIZE, "-A", firmware.elf], capture_output=True, text=True).stdout
    sizes = {(n, int(a)): int(s) for n, s, a in re.findall(r"^(\.\S+)\s+(\d+)\s+(\d+)", told, re.M)}
    uses = read_facts(firmware.elf).uses
    assert uses is not None
    at_run_time = {(u.section, u.origin): u.bytes for u in uses}
    assert {k: s for k, s in sizes.items() if s and k[1]} == {
        k: s for k, s in at_run_time.items() if k in sizes
    }
    assert [u.section for u in uses if (u.section, u.origin) not in sizes] == [".data"]


@needs_gcc
@pytest.mark.parametrize(
    ("cpu", "core"),
    [
        ("cortex-m0", "cortex-m0plus"),
        ("cortex-m0plus", "cortex-m0plus"),
        ("cortex-m3", "cortex-m0plus"),
        ("cortex-m7", "cortex-m7"),
        ("cortex-m33", "cortex-m33"),
    ],
)
def test_the_core_is_that_of_the_compiler(tmp_path: Path, cpu: str, core: str) -> None:
    built = link(tmp_path, cpu)
    found = imported(built.elf, built.script).device
    assert found.core == core
    assert ("estimated" in (found.core_source or "")) == (cpu == "cortex-m3")


@needs_gcc
def test_an_odd_core_is_asked_for(tmp_path: Path, board: Path) -> None:
    """Without an FPU, the attributes are those of Cortex-M4 and M7."""
    built = link(tmp_path, "cortex-m4+nofp")
    with pytest.raises(UsageError, match=r"one of cortex-m4, cortex-m7 \(app.elf: .*give --core"):
        imported(built.elf, built.script)
    assert imported(built.elf, built.script, core="cortex-m7").device.core == "cortex-m7"
    told = imported(built.elf, built.script, board)  # the board's file is narrower
    assert told.device.core == "cortex-m7"
    assert "core" not in [c.what for c in told.conflicts]


@needs_gcc
def test_a_stack_without_a_section_is_added(tmp_path: Path) -> None:
    bare = SCRIPT.replace("  ._user_heap_stack : { . = ALIGN(8); . = . + _Min_Heap_Size; . = . +"
                          " _Min_Stack_Size; } > RAM\n", "")  # fmt: skip
    assert bare != SCRIPT
    built = link(tmp_path, "cortex-m4", bare)
    with_symbols = imported(built.elf, built.script).device.reserve
    assert with_symbols.ram_bytes == built.used["RAM"] + 0x200 + 0x400
    assert imported(built.script, built.elf, stack=9000).device.reserve.ram_bytes == (
        built.used["RAM"] + 0x200 + 9000
    )
    plain = bare.replace("_Min_Heap_Size = 0x200; _Min_Stack_Size = STACK_KB * 1K;", "")
    built = link(tmp_path, "cortex-m4", plain)
    guessed = imported(built.elf, built.script).device.reserve
    assert guessed.ram_bytes == built.used["RAM"] + 4096
    assert "stack 4,096 (estimated: no file tells it, give --stack)" in guessed.source


def test_far_sections_leave_what_is_between_them(tmp_path: Path) -> None:
    """And what two programs both have, a shared buffer say, is taken once."""
    script = read_facts(written(tmp_path, "x.ld", SCRIPT))
    ram = 0x2000_0000
    boot = Facts("elf", "boot.elf", uses=(Use(".bss", ram, 100), Use(".shared", ram + 0x8000, 64)))
    app = Facts("elf", "app.elf", uses=(Use(".shared", ram + 0x8000, 64), Use(".b", ram + 132, 8)))
    kept = combine([script, boot, app], Given("board", core="cortex-m4", stack=1)).device.reserve
    assert kept.ram_bytes == 100 + 32 + 8 + 64 + 1 + 0x200  # with a gap of alignment, and the heap
    assert kept.flash_bytes == 0


@needs_gcc
def test_elf_and_map_of_different_builds_are_told(firmware: Firmware, tmp_path: Path) -> None:
    other = link(tmp_path, "cortex-m4", SCRIPT.replace("STACK_KB = 1", "STACK_KB = 3"))
    found = imported(firmware.script, firmware.elf, other.map)
    (conflict,) = found.conflicts
    assert (conflict.what, conflict.taken.source) == ("firmware", "app.elf")
    assert found.device.reserve.ram_bytes == firmware.used["RAM"]


@needs_gcc
def test_expressions_have_the_values_of_ld(tmp_path: Path) -> None:
    """Sixty random expressions, evaluated by GNU ld as symbols of a script."""
    rng = random.Random(3)

    leaves = ["7", "0x1f", "2K", "1M", "010", "first", "ORIGIN(RAM)", "LENGTH(RAM)"]

    def expression(depth: int) -> str:
        if not depth:
            return rng.choice(leaves)
        a, b, c = (expression(depth - 1) for _ in range(3))
        return rng.choice(
            [f"{a} + {b} * 3", f"({a} | {b}) - ({a} & {b})", f"{a} / (({b}) | 1)",
             f"{a} % 13 | {b}", f"({a} < {b} ? {b} : {c})", f"({a} >> 3 << 2)",
             f"MAX({a}, {b})", f"ALIGN({a}, 16)",
             f"(DEFINED(nothing) ? nothing : {a})", f"(DEFINED(first) ? {a} : nothing)",
             f"({a} >= {b} && {c} != 7 || !{a})"]
        )  # fmt: skip

    texts = [expression(1 + i % 3) for i in range(60)]
    symbols = "".join(f"v{i} = {t};\n" for i, t in enumerate(texts))
    memory = "MEMORY { RAM (rw) : ORIGIN = 0x20000000, LENGTH = 64K }\n"
    path = written(tmp_path, "x.ld", f"{memory}first = 5;\n{symbols}SECTIONS {{ .text : {{ }} }}\n")
    empty = written(tmp_path, "empty.s", "")
    assert GCC
    assert LD
    subprocess.run([GCC, "-c", empty, "-o", tmp_path / "e.o"], check=True)
    done = subprocess.run([LD, "-T", path, tmp_path / "e.o", "-o", tmp_path / "x.elf", "-Map",
                           tmp_path / "x.map"], capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    linked = (tmp_path / "x.map").read_text(encoding="utf-8")
    by_ld = {n: int(v, 16) for v, n in re.findall(r"^\s+0x([0-9a-f]+)\s+(v\d+) = ", linked, re.M)}
    assert len(by_ld) == 60
    regions = "".join(
        f"  R{i} (rw) : ORIGIN = 0, LENGTH = (v{i}) % 0x100000000 + 1\n" for i in range(60)
    )
    text = path.read_text(encoding="utf-8").replace("64K }", f"64K\n{regions}}}")
    ours = read_facts(written(tmp_path, "ours.ld", text)).memories
    assert {m.name: m.bytes - 1 for m in ours[1:]} == {f"R{n[1:]}": v for n, v in by_ld.items()}


# ---- linker scripts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("FLASH (rx) : ORIGIN = 0x08000000, LENGTH = 1K", "flash"),
        ("FLASH : ORIGIN = 0x08000000, LENGTH = 1K", "flash"),
        ("FLASH (xrw) : ORIGIN = 0x08000000, LENGTH = 1K", "flash"),
        ("PROGRAM_FLASH (rx) : ORIGIN = 0, LENGTH = 1K", "flash"),
        ("CCMRAM (xrw) : o = 0x10000000, l = 1K", "ram"),
        ("m_data (RW) : ORIGIN = 0x1fff0000, LENGTH = 1K", "ram"),
        ("ITCMRAM (xrw) : ORIGIN = 0x0, LENGTH = 1K", "code"),
        ("CODE_RAM (rwx) : ORIGIN = 0x800000, LENGTH = 1K", "code"),
        ("IRAM1 (rw) : ORIGIN = 0x20000000, LENGTH = 1K", "ram"),
        ("X (!w) : ORIGIN = 0x1000, LENGTH = 1K", "flash"),
        ("X (w) : ORIGIN = 0x60000000, LENGTH = 1K", "ram"),
        ("X (rx) : ORIGIN = 0x60000000, LENGTH = 1K", "flash"),
        ("X : ORIGIN = 0x20000000, LENGTH = 1K", "ram"),
        ("X : ORIGIN = 0x60000000, LENGTH = 1K", None),
    ],
)
def test_kind_of_a_region(tmp_path: Path, line: str, kind: str | None) -> None:
    (memory,) = read_facts(written(tmp_path, "x.ld", f"MEMORY\n{{\n{line}\n}}\n")).memories
    assert (memory.kind, memory.bytes) == (kind, 1024)
    assert memory.source == "x.ld:3, MEMORY"


def test_a_doubtful_region_is_asked_for(tmp_path: Path) -> None:
    text = SCRIPT.replace("SRAM2 (rw)", "EXT")
    text = text.replace("ORIGIN(RAM) + LENGTH(RAM) * 4", "0x60000000")
    path = written(tmp_path, "x.ld", text)
    with pytest.raises(UsageError, match=r"x.ld:10, MEMORY: EXT 0x60000000 .* --kind EXT=ram"):
        imported(path, core="cortex-m4")
    for kind, runs in (("ram", 2), ("none", 1), ("flash", 1)):
        found = imported(path, core="cortex-m4", kinds={"EXT": kind}).device
        assert len(found.ram_runs) == runs
        assert found.flash_bytes == (512 << 10) + (32 << 10) * (kind == "flash")
    with pytest.raises(UsageError, match="--kind EXTT: no file has that region; there are EXT, FL"):
        imported(path, core="cortex-m4", kinds={"EXTT": "ram"})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("LENGTH = 512K", "LENGTH = SIZE", r"x.ld:8: region FLASH: SIZE is not defined here; "),
        ("org = ORIGIN(RAM)", "org = ORIGIN(RAMM)", r"x.ld:10: .* no region 'RAMM'.*understood so"
         r" far: FLASH 0x08000000 524,288 B, RAM 0x20000000 98,304 B$"),
        ("org = ORIGIN(RAM)", "org = ORIGIN(SRAM2)", "x.ld:10: region SRAM2: .* depends on itself"),
        ("(1 << 17)", "(1 << 17", r"x.ld:9: region RAM: "),
        ("(1 << 17)", "(1 / 0)", "x.ld:9: region RAM: division by zero"),
        ("(1 << 17)", "(1 @ 17)", "x.ld:9: region RAM: can't read '@ 17"),
        ("(1 << 17)", "019", "x.ld:9: region RAM: 019 starts with 0"),
        ("(1 << 17)", "SIZEOF(.text)", r"x.ld:9: region RAM: SIZEOF\(...\) is known only when"),
        ("(1 << 17)", "(" * 250 + "1", "x.ld:9: region RAM: "),
        (", len = 32K", "", "x.ld:10: region SRAM2 has no LENGTH"),
        ("SRAM2 (rw)", "RAM (rw)", "x.ld:10: region RAM is defined twice"),
        ("  FLASH (rx)", "  nonsense\n  FLASH (rx)", "x.ld:8: 'nonsense' is no region NAME"),
        ("MEMORY\n", "#if DEBUG\nMEMORY\n", "x.ld:6: needs the C preprocessor"),
    ],
)  # fmt: skip
def test_a_broken_script_is_told_with_its_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in SCRIPT
    path = written(tmp_path, "x.ld", SCRIPT.replace(old, new, 1))
    with pytest.raises(UsageError, match=message) as e:
        read_facts(path)
    assert "\n" not in str(e.value)


def test_a_script_that_is_cut_is_told_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "x.ld", SCRIPT[: SCRIPT.index("512K")])
    with pytest.raises(UsageError, match=r"x.ld:6: the MEMORY block has no end"):
        read_facts(path)


def test_symbols_of_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, "x.ld", SCRIPT.replace("512K", "DEFINED(SIZE) ? SIZE : 64K"))
    assert read_facts(path).memories[0].bytes == 64 << 10
    assert read_facts(path, symbols={"SIZE": "0x20 * 1K"}).memories[0].bytes == 32 << 10
    default = "SIZE = DEFINED(SIZE) ? SIZE : 48K;\n" + SCRIPT.replace("512K", "SIZE")
    path = written(tmp_path, "y.ld", default)
    assert read_facts(path).memories[0].bytes == 48 << 10
    assert read_facts(path, symbols={"SIZE": "1K"}).memories[0].bytes == 1 << 10


def test_an_include_is_not_followed_but_told(tmp_path: Path) -> None:
    rest = written(tmp_path, "link.x", 'INCLUDE "memory.x"\nSECTIONS { }\n')
    with pytest.raises(UsageError, match=r"no file tells of any RAM.*: INCLUDE memory.x is not"):
        imported(rest, core="cortex-m4")
    memory = written(tmp_path, "memory.x", SCRIPT[: SCRIPT.index("SECTIONS")])
    assert imported(rest, memory, core="cortex-m4").device.flash_bytes == 512 << 10


# ---- vendors' files -----------------------------------------------------------------------------

PACK = """<?xml version="1.0"?>
<package><devices><family Dfamily="F">
  <processor Dcore="Cortex-M7" Dclock="216000000"/>
  <subFamily DsubFamily="S">
    <memory name="DTCM" access="rwx" start="0x20000000" size="0x10000" default="0"/>
    <memory name="SRAM1" access="rwx" start="0x20010000" size="0x40000" default="1"/>
    <memory name="BKP" access="rwx" start="0x40024000" size="0x1000" default="0"/>
    <memory name="ITCM" access="rwx" start="0" size="0x4000" default="0"/>
    <memory name="Flash" access="rx" start="0x08000000" size="0x80000" startup="1"/>
    <device Dname="CHIP46E"/>
    <device Dname="CHIP46G">
      <processor Dclock="200000000"/>
      <memory name="Flash" access="rx" start="0x08000000" size="0x100000" default="1"/>
      <memory name="ITCM_Flash" access="rx" start="0x00200000" size="0x100000" default="0"/>
      <variant Dvariant="CHIP46GTx"/>
    </device>
    <device Dname="DUAL">
      <processor Pname="A" Dcore="Cortex-M7" Dclock="480000000"/>
      <processor Pname="B" Dcore="Cortex-M4" Dclock="240000000"/>
      <memory Pname="B" id="IRAM2" start="0x10000000" size="0x8000"/>
    </device>
  </subFamily>
</family></devices></package>
"""
TARGETS = """name: Family
variants:
- name: nChip_A
  cores: [{name: main, type: armv7em}]
  memory_map:
  - !Nvm {range: {start: 0x0, end: 0x80000}, access: {boot: true}}
  - !Ram {range: {start: 0x800000, end: 0x820000}}
  - !Nvm {range: {start: 0x10001000, end: 0x10002000}}
  - !Ram {name: DATA, range: {start: 0x20000000, end: 0x20020000}, is_alias: true}
  - !Generic {name: ROM, range: {start: 0x30000000, end: 0x30001000}}
- name: nChip_B
  package_variants: [nChip_B64]
  cores: [{name: main, type: armv6m}]
  memory_map:
  - !Nvm {name: FLASH, range: {start: 0x0, end: 0x10000}, access: {boot: true}}
  - !Ram {name: RAM, range: {start: 0x20000000, end: 0x20002000}}
"""
BOARD = {
    "build": {"cpu": "cortex-m7", "f_cpu": "180000000L", "mcu": "stm32f746ngh6"},
    "name": "A Board",
    "upload": {"maximum_ram_size": 327680, "maximum_size": 1048576},
}


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    return written(tmp_path, "chips.pdsc", PACK)


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    return written(tmp_path, "family.yaml", TARGETS)


@pytest.fixture
def board(tmp_path: Path) -> Path:
    return written(tmp_path, "board.json", json.dumps(BOARD))


def shape(facts: Facts) -> list[tuple[str, str | None, int, int]]:
    return [(m.name, m.kind, m.origin, m.bytes) for m in facts.memories]


def test_a_pack_inherits_from_outside_in(pack: Path) -> None:
    found = read_facts(pack, "chip46gtx")
    assert found.name == "CHIP46G"
    assert shape(found) == [
        ("DTCM", "ram", 0x2000_0000, 0x10000),
        ("SRAM1", "ram", 0x2001_0000, 0x40000),
        ("BKP", "ram", 0x4002_4000, 0x1000),
        ("ITCM", "code", 0, 0x4000),
        ("Flash", "flash", 0x0800_0000, 0x100000),
    ]
    assert found.cores is not None
    assert found.cores.value == ("cortex-m7",)
    assert found.clock_hz is not None
    assert found.clock_hz.value == 200e6
    device = imported(pack, chip="CHIP46G").device
    assert "BKP" not in [r.name for r in device.regions]
    assert device.ram_region() == (0x2000_0000, 320 << 10)


def test_a_pack_of_two_cores(pack: Path) -> None:
    with pytest.raises(UsageError, match="DUAL has the cores cortex-m7, cortex-m4; choose by"):
        read_facts(pack, "DUAL")
    small = read_facts(pack, "DUAL", "cortex-m4")
    assert small.clock_hz is not None
    assert small.clock_hz.value == 240e6
    assert ("IRAM2", "ram", 0x1000_0000, 0x8000) in shape(small)
    assert "IRAM2" not in [m.name for m in read_facts(pack, "DUAL", "cortex-m7").memories]


def test_a_chip_of_several_is_chosen(pack: Path, targets: Path) -> None:
    with pytest.raises(UsageError, match=r"family.yaml: describes 2 chips; choose by --chip, as"):
        read_facts(targets)
    with pytest.raises(UsageError, match=r"--chip CHIP46: may be CHIP46E, CHIP46G of chips.pdsc"):
        read_facts(pack, "CHIP46")
    with pytest.raises(UsageError, match=r"--chip nCip_A: .* did you mean nChip_A"):
        read_facts(targets, "nCip_A")
    assert read_facts(targets, "NCHIP_B64").name == "nChip_B"


def test_targets_of_probe_rs(targets: Path) -> None:
    found = read_facts(targets, "nChip_A")
    assert shape(found) == [
        ("NVM0", "flash", 0, 0x80000),
        ("DATA", "ram", 0x2000_0000, 0x20000),
    ]
    with pytest.raises(UsageError, match=r"one of cortex-m4, cortex-m7 \(family.yaml: nChip_A, "):
        imported(targets, chip="nChip_A")
    device = imported(targets, chip="nChip_B").device
    assert (device.core, device.ram_region()) == ("cortex-m0plus", (0x2000_0000, 8 << 10))


def test_a_board_of_platformio(board: Path) -> None:
    device = imported(board).device
    assert (device.name, device.core, device.clock_hz.value) == ("A Board", "cortex-m7", 180e6)
    assert device.ram_region() == (0x2000_0000, 320 << 10)
    assert device.flash_bytes == 1 << 20
    assert "address is an estimate" in device.regions[0].source
    # the nearest clock of that core; power in proportion
    near = load_device("stm32f746g-disco")
    assert device.cycles_per_instruction.value == near.cycles_per_instruction.value
    assert device.power_w.value == pytest.approx(near.power_w.value * 180 / 216, rel=1e-2)
    assert device.power_w.source == "estimated: 0.33 W of stm32f746g-disco x 180 MHz / 216 MHz"


# ---- several files ------------------------------------------------------------------------------


def test_the_script_counts_before_the_vendor(tmp_path: Path, pack: Path, board: Path) -> None:
    script = written(tmp_path, "x.ld", SCRIPT)
    found = imported(pack, board, script, chip="CHIP46G")  # whatever the order
    assert [r.source for r in found.device.regions] == [f"x.ld:{n}, MEMORY" for n in (8, 9, 10)]
    told = {c.what: (c.taken.source, [o.source for o in c.others]) for c in found.conflicts}
    assert told == {
        "RAM": ("x.ld", ["chips.pdsc", "board.json"]),
        "flash": ("x.ld", ["chips.pdsc", "board.json"]),
        "clock": ("board.json: build.f_cpu", ["chips.pdsc: CHIP46G, Dclock"]),
    }
    agreeing = imported(pack, board, chip="CHIP46G")  # 320 KiB in two regions, and as a number
    assert [c.what for c in agreeing.conflicts] == ["clock"]
    given = imported(pack, chip="CHIP46G", core="cortex-m4", clock_hz=1e8)
    assert {c.what: c.taken.value for c in given.conflicts} == {
        "core": "cortex-m4",
        "clock": "100 MHz",
    }


def test_the_same_said_otherwise_is_no_conflict(tmp_path: Path, pack: Path, targets: Path) -> None:
    """Adjacent regions are one; of a file without addresses only sizes count."""
    text = "MEMORY { F (rx) : org = 0x8000000, len = 1M R (rw) : org = 0x20000000, len = 320K }"
    script = written(tmp_path, "x.ld", text)
    assert not imported(script, pack, chip="CHIP46G").conflicts
    sizes = {"maximum_ram_size": 128 << 10, "maximum_size": 512 << 10}
    small = {"build": {"cpu": "cortex-m4f", "mcu": "stm32x"}, "upload": sizes}
    board = written(tmp_path, "small.json", json.dumps(small))
    found = imported(targets, board, chip="nChip_A")  # flash at 0, and not at 0x08000000
    assert not found.conflicts
    assert found.device.core == "cortex-m4"
    sizes["maximum_size"] += 1024
    board = written(tmp_path, "small.json", json.dumps(small))
    assert [c.what for c in imported(targets, board, chip="nChip_A").conflicts] == ["flash"]


def test_a_base_fills_what_no_file_tells(tmp_path: Path) -> None:
    base = load_device("nucleo-f411re")
    script = written(tmp_path, "x.ld", SCRIPT.replace("LENGTH = (1 << 17) - 32K", "LENGTH = 64K"))
    found = imported(script, base=base)
    assert found.device.clock_hz.value == base.clock_hz.value
    assert found.device.power_w.value == base.power_w.value
    assert [s.id for s in found.device.storage] == [s.id for s in base.storage]
    flash = next(r for r in found.device.regions if r.kind == "flash")
    assert flash.sectors == next(r.sectors for r in base.regions if r.kind == "flash")
    base = load_device("nucleo-l4r5zi")
    flash = next(r for r in imported(script, base=base).device.regions if r.kind == "flash")
    assert not flash.sectors  # a part of the base's region; units are those of all of it
    assert flash.program_bytes == next(r for r in base.regions if r.kind == "flash").program_bytes
    assert [c.what for c in found.conflicts] == ["RAM"]  # flash is as large as the base's


def test_nothing_is_invented_silently(tmp_path: Path) -> None:
    """All that no file tells is marked as an estimate, or the reader is asked."""
    script = written(tmp_path, "x.ld", SCRIPT)
    with pytest.raises(UsageError, match="no file tells the core; give --core"):
        imported(script)
    d = imported(script, core="cortex-m4").device
    for quantity in (d.clock_hz, d.cycles_per_instruction, d.power_w, d.reserve):
        assert quantity.source.startswith("estimated: "), quantity
    kept = imported(
        written(tmp_path, "y.ld", SCRIPT.replace("STACK_KB = 1;", "STACK_KB = 16;")),
        core="cortex-m4",
    ).device.reserve
    assert kept.ram_bytes == (16 << 10) + 0x200


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "hello", "is not understood; give a linker script, map or ELF"),
        ("a.json", '{"build": ', "a.json:1: broken JSON"),
        ("a.json", '{"a": 1}', "no board file of PlatformIO"),
        ("a.json", '{"build": [], "upload": {}}', "build is no table"),
        ("a.json", '{"build": {"f_cpu": "fast"}}', "build.f_cpu: 'fast' is no size or frequency"),
        ("a.json", '{"upload": {"maximum_size": true}}', "upload.maximum_size: 'True' is no size"),
        ("a.yaml", "variants: [1, {", r"a.yaml:\d: broken YAML"),
        ("a.yaml", "variants: &a [*a]", "holds an alias"),
        ("a.yaml", "variants: [{name: X}]", "no target description of probe-rs: KeyError at 'mem.*"
         "understood so far: X"),
        ("a.pdsc", "<package", "broken XML"),
        ("a.pdsc", "<package/>", "describes no chip"),
        ("a.pdsc", '<!DOCTYPE p [<!ENTITY a "aaa">]><package>&a;</package>', "a.pdsc:1: a DOCTYPE"),
        ("a.pdsc", "<a>" * 100 + "</a>" * 100, "nested too deep"),
        ("a.pdsc", PACK.replace('size="0x10000"', 'size="big"'), "CHIP46E: ValueError at inv"),
        ("a.map", "\nLinker script and memory map\n", "'Memory Configuration' is missing"),
        ("a.map", "Memory Configuration\n*default* 0x0 0xff\n\nLinker script and memory map\n",
         "linked without MEMORY regions"),
        ("a.map", "     VMA      LMA     Size Align Out     In      Symbol\n", "lld; give the ELF"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(UsageError, match=message) as e:
        read_facts(path, "CHIP46E" if "CHIP46E" in text else None)
    assert str(e.value).startswith(name)
    assert "\n" not in str(e.value)


def test_no_file_no_text_no_elf(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_facts(tmp_path / "none.ld")
    with pytest.raises(UsageError, match="it is a folder"):
        read_facts(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"\x00\xff\xfe")
    with pytest.raises(UsageError, match="neither an ELF nor UTF-8 text at byte 1"):
        read_facts(tmp_path / "a.bin")


@needs_gcc
def test_a_damaged_elf_never_ends_in_a_traceback(firmware: Firmware, tmp_path: Path) -> None:
    whole, rng = firmware.elf.read_bytes(), random.Random(5)
    broken = tmp_path / "broken.elf"
    told: list[str] = []
    for i in range(150):
        data = bytearray(whole[: rng.randrange(20, len(whole))] if i % 2 else whole)
        for _ in range(8):
            end = min(len(data), 400) if i % 3 else len(data)
            data[rng.randrange(16, end)] = rng.randrange(256)
        broken.write_bytes(data)
        try:
            read_facts(broken)
        except UsageError as e:
            told.append(str(e))
    assert len(told) > 50
    assert all(t.startswith("broken.elf: ") and "\n" not in t for t in told)


@needs_gcc
def test_an_object_is_no_firmware(tmp_path: Path) -> None:
    source = written(tmp_path, "a.c", "int f(void) { return 1; }")
    assert GCC
    subprocess.run([GCC, "-c", source, "-o", tmp_path / "a.o"], check=True)
    with pytest.raises(UsageError, match=r"ET_REL is no linked firmware; .*that is flashed"):
        read_facts(tmp_path / "a.o")


# ---- the command --------------------------------------------------------------------------------


@needs_gcc
def test_the_file_is_one_that_plans_take(
    odt: Cli, firmware: Firmware, targets: Path, tmp_path: Path
) -> None:
    target = tmp_path / "My Board.yaml"
    words = ("devices", "import", firmware.script, firmware.elf, targets, "--chip", "nChip_A")
    done = odt(*words, "--clock", "72MHz", "-o", target)
    assert done.code == 0, done.err
    assert "conflict  flash: 524,288 B = NVM0" not in done.out  # the script's is shown as taken
    assert "conflict  RAM: 131,072 B = RAM 0x20000000 98,304 B + SRAM2" in done.out
    assert "clock                   72 MHz  (given by --clock)" in done.out
    assert f"written   {target}" in done.out
    own = load_device(str(target))
    assert (own.id, own.clock_hz.value) == ("my-board", 72e6)
    assert "origin: 0x08000000" in target.read_text(encoding="utf-8")
    assert odt("devices", "show", target).code == 0
    options = PlanOptions(model=MODEL, device=str(target), quiet=True)
    (run, left), _ = make_request(options).device.ram_budgets
    assert (run.name, left) == ("RAM", (96 << 10) - firmware.used["RAM"])

    before = target.read_bytes()
    assert "exists; choose another -o, or write over it: --force" in odt(*words, "-o", target).error
    assert target.read_bytes() == before
    assert odt(*words, "-o", target, "--force", "-q").out == ""
    assert target.read_bytes() != before  # without --clock


def test_the_command_shows_everything_as_json(odt: Cli, board: Path, pack: Path) -> None:
    record = odt("devices", "import", board, pack, "--chip", "CHIP46G", "--json").json
    assert record["device"]["core"] == "cortex-m7"
    assert [c["what"] for c in record["conflicts"]] == ["clock"]
    assert any("ITCM_Flash" in n for n in record["notes"])
    assert "nothing is written" in odt("devices", "import", board).out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kind", "RAM"), "--kind: 'RAM' is not REGION=KIND, with ram, code, flash, none"),
        (("--kind", "RAM=rom"), "--kind: 'RAM=rom' is not REGION=KIND"),
        (("--kind", "RAM=none"), "no file tells of any RAM"),
        (("--defsym", "A"), "--defsym: 'A' is not NAME=VALUE"),
        (("--clock", "fast"), "--clock: 'fast' can't be read; write for example 72MHz or 72000000"),
        (("--core", "z80"), "core 'z80' is not known; known are cortex-a72, "),
        (("--stack", "much"), "--stack: 'much' is not a size"),
        (("--base", "nuc"), "device 'nuc' is not known"),
        (("--id", "!"), "--id: '!' has no letters or digits"),
    ],
)
def test_wrong_options_of_the_command(
    odt: Cli, board: Path, words: tuple[str, ...], message: str
) -> None:
    done = odt("devices", "import", board, *words)
    assert done.code == 2
    assert done.error.startswith(message)
