"""ELF files of a linked firmware: what its sections take, where, and the core it is for."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Any

from .facts import Facts, Told, Use, sizes_told, unreadable

_ALLOCATED = 0x2
#: By value of Tag_CPU_arch, with the FPU that tells two cores of one architecture apart.
_ARCHITECTURES: dict[int, tuple[str, ...]] = {
    10: ("cortex-m3",),
    11: ("cortex-m0plus", "cortex-m0", "cortex-m1"),
    12: ("cortex-m0plus", "cortex-m0", "cortex-m1"),
    13: ("cortex-m4", "cortex-m7"),
    16: ("cortex-m23",),
    17: ("cortex-m33", "cortex-m35p"),
    21: ("cortex-m55", "cortex-m85"),
}
#: Tag_FP_arch: 6 is FPv4-SP of the Cortex-M4; 8 is FPv5, of the Cortex-M7 and M33.
_FPU = {(13, 6): ("cortex-m4",), (13, 8): ("cortex-m7",)}
_MACHINES = {
    "EM_XTENSA": ("xtensa-lx6", "xtensa-lx7"),
    "EM_RISCV": ("riscv",),
    "EM_AARCH64": ("cortex-a",),
}


def read_elf(file: str, data: bytes) -> Facts:
    """What an ELF file tells.

    Raises:
        UsageError: It is broken, or no linked program.
    """
    from elftools.common.exceptions import DWARFError, ELFError
    from elftools.elf.elffile import ELFFile

    understood: list[object] = []
    try:
        elf = ELFFile(BytesIO(data))
        machine, kind = elf["e_machine"], elf["e_type"]
        understood.append(f"an ELF for {machine} with {elf.num_sections()} sections")
        if kind != "ET_EXEC":
            raise unreadable(file, f"{kind} is no linked firmware; give the file that is flashed")
        sections = [s for s in elf.iter_sections() if s["sh_flags"] & _ALLOCATED and s["sh_size"]]
        if not sections:
            raise unreadable(file, "no section says what it takes; was it stripped?", understood)
        understood += [f"{s.name} {s['sh_size']:,} B" for s in sections]
        segments = [s for s in elf.iter_segments("PT_LOAD") if s["p_filesz"]]
        uses = tuple(use for s in sections for use in _uses(s, segments))
        symbols = list(_symbols(elf))
        cores = _cores(file, elf, machine)
    except (ELFError, DWARFError, ValueError, KeyError, IndexError, TypeError, AttributeError,
            OverflowError, AssertionError, MemoryError, UnicodeDecodeError) as e:  # fmt: skip
        why = f"a broken ELF file: {str(e) or type(e).__name__}"
        raise unreadable(file, why, understood) from None
    stack, heap = sizes_told(file, symbols, (s.name for s in sections))
    notes: tuple[str, ...] = ()
    if any(name.startswith("odtplan_") for name, _ in symbols):
        notes = (
            f"{file}: holds the library of a plan already (odtplan_...), whose bytes are taken off"
            " as well; give the firmware without it",
        )
    return Facts("elf", file, cores=cores, uses=uses, stack=stack, heap=heap, notes=notes)


def _uses(section: Any, segments: list[Any]) -> Iterator[Use]:
    """Where a section is while the program runs, and where its bytes are stored until then."""
    origin, size = section["sh_addr"], section["sh_size"]
    yield Use(section.name, origin, size)
    if section["sh_type"] == "SHT_NOBITS":
        return
    for s in segments:
        at = section["sh_offset"] - s["p_offset"]
        if at >= 0 and at + size <= s["p_filesz"]:
            if (stored := s["p_paddr"] + at) != origin:
                yield Use(section.name, stored, size)
            return


def _symbols(elf: Any) -> Iterator[tuple[str, int]]:
    table = elf.get_section_by_name(".symtab")
    if table is not None:
        for symbol in table.iter_symbols():
            yield symbol.name, symbol["st_value"]


def _cores(file: str, elf: Any, machine: str) -> Told[tuple[str, ...]] | None:
    if machine in _MACHINES:
        return Told(_MACHINES[machine], f"{file}: machine {machine}")
    section = elf.get_section_by_name(".ARM.attributes")
    if section is None:
        return None
    tags: dict[str, Any] = {}
    for part in section.iter_subsections():
        for scope in part.iter_subsubsections():
            tags |= {a.tag: a.value for a in scope.iter_attributes()}
    named = str(tags.get("TAG_CPU_NAME", "")).lower()
    if named.startswith("cortex-"):
        return Told((named,), f"{file}: Tag_CPU_name")
    arch, fpu = tags.get("TAG_CPU_ARCH", -1), tags.get("TAG_FP_ARCH", 0)
    known = _FPU.get((arch, fpu)) or _ARCHITECTURES.get(arch)
    if known is None:
        return None
    return Told(known, f"{file}: Tag_CPU_arch {arch}, Tag_FP_arch {fpu or 'none'}")
