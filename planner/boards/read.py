"""Which kind of file it is, by what stands in it, and what it tells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ...ir.errors import UsageError
from .cmsis_pack import read_pack
from .elf import read_elf
from .facts import Facts, unreadable
from .linker_map import read_map
from .linker_script import read_script
from .platformio import read_platformio
from .probe_rs import read_probe_rs

#: ELFs with debug sections are large; nothing else is.
LARGEST_ELF_BYTES = 1 << 28
LARGEST_TEXT_BYTES = 1 << 26
KNOWN = (
    "a linker script, map or ELF of GNU ld, a board file of PlatformIO (JSON), a target"
    " description of probe-rs (YAML) or of a CMSIS-Pack (.pdsc)"
)
_OTHERS = {
    "Component: Arm Compiler": "a map of armlink; give the ELF (.axf)",
    "IAR ELF Linker": "a map of IAR; give the ELF (.out)",
    "VMA      LMA     Size Align": "a map of LLVM's lld; give the ELF",
}


def read_facts(
    path: Path,
    chip: str | None = None,
    core: str | None = None,
    symbols: Mapping[str, str] | None = None,
) -> Facts:
    """What a file tells about a device.

    Args:
        path: The file.
        chip: Chooses of several chips in a vendor's file.
        core: Chooses of several cores of a chip.
        symbols: ``--defsym`` of a linker script.

    Raises:
        UsageError: It can't be read, is none of the known kinds, or is broken.
    """
    file, data = path.name, _bytes(path)
    if data.startswith(b"\x7fELF"):
        return read_elf(file, data)
    if len(data) > LARGEST_TEXT_BYTES:
        raise unreadable(file, f"{len(data):,} bytes are neither an ELF nor {KNOWN}")
    if data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return read_pack(file, data, chip, core)
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        raise unreadable(file, f"neither an ELF nor UTF-8 text at byte {e.start}") from None
    if text.lstrip().startswith("{"):
        return read_platformio(file, _json(file, text))
    for mark, why in _OTHERS.items():
        if mark in text[:4096]:
            raise unreadable(file, why)
    if "\nLinker script and memory map" in text:
        return read_map(file, text)
    if text.startswith("variants:") or "\nvariants:" in text:
        return read_probe_rs(file, text, chip)
    if any(word in text for word in ("MEMORY", "SECTIONS", "INCLUDE")):
        return read_script(file, text, symbols)
    raise unreadable(file, f"is not understood; give {KNOWN}")


def _bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a device may never end
            raise UsageError(f"{path}: can't read the file: it is a folder or a device")
        if path.stat().st_size > LARGEST_ELF_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size:,} bytes are too many; give {KNOWN}")
        return path.read_bytes()
    except OSError as e:
        raise UsageError(f"{path}: can't read the file: {e.strerror or e}") from None


def _json(file: str, text: str) -> dict[str, object]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        raise unreadable(f"{file}:{e.lineno}", f"broken JSON: {e.msg}") from None
    except (RecursionError, ValueError) as e:
        raise unreadable(file, f"broken JSON: {type(e).__name__}") from None
    if not isinstance(data, dict) or not {"build", "upload"} & set(data):
        raise unreadable(file, "is no board file of PlatformIO: it has neither build nor upload")
    return data
