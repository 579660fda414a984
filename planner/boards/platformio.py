"""Board files of PlatformIO (``boards/*.json``): sizes, clock and CPU, without addresses."""

from __future__ import annotations

from typing import Any

from .facts import Facts, Memory, MemoryKind, Told, unreadable

#: CPUs of chips whose board file does not name one.
_CPUS = {
    "esp32": "xtensa-lx6",
    "esp32s2": "xtensa-lx7",
    "esp32s3": "xtensa-lx7",
    "esp32c3": "riscv",
    "esp32c6": "riscv",
    "esp32h2": "riscv",
    "rp2040": "cortex-m0plus",
    "rp2350": "cortex-m33",
}
_RAM_ORIGIN = 0x2000_0000
_FLASH_ORIGINS = {"stm32": 0x0800_0000, "rp2": 0x1000_0000}


def read_platformio(file: str, data: dict[str, Any]) -> Facts:
    """What a board file tells.

    Raises:
        UsageError: A field has another form.
    """
    build, upload = (_table(file, data, name) for name in ("build", "upload"))
    mcu = str(build.get("mcu", "")).lower()
    flash_origin = next((o for m, o in _FLASH_ORIGINS.items() if mcu.startswith(m)), 0)
    sizes: tuple[tuple[str, MemoryKind, str, int], ...] = (
        ("RAM", "ram", "maximum_ram_size", _RAM_ORIGIN),
        ("FLASH", "flash", "maximum_size", flash_origin),
    )
    memories = []
    for name, kind, field, origin in sizes:
        size = _number(file, f"upload.{field}", upload.get(field))
        if size:
            told = f"{file}: upload.{field}; its address is an estimate"
            memories.append(Memory(name, kind, origin, int(size), told))
    clock = _number(file, "build.f_cpu", build.get("f_cpu"))
    cpu, field = str(build.get("cpu", "")).lower(), "build.cpu"
    if not cpu:
        cpu, field = _CPUS.get(mcu, ""), "build.mcu"
    return Facts(
        "platformio",
        file,
        name=str(data.get("name") or mcu) or None,
        cores=Told((cpu,), f"{file}: {field}") if cpu else None,
        clock_hz=Told(clock, f"{file}: build.f_cpu") if clock else None,
        memories=tuple(memories),
        placed=False,
    )


def _table(file: str, data: dict[str, Any], name: str) -> dict[str, Any]:
    found = data.get(name, {})
    if not isinstance(found, dict):
        raise unreadable(file, f"{name} is no table, as it is in a board file of PlatformIO")
    return found


def _number(file: str, field: str, value: object) -> float | None:
    """A number, which may be written as C does: ``"72000000L"``."""
    if value is None:
        return None
    text = str(value).strip().rstrip("uUlL")
    try:
        number = float(int(text, 0)) if not isinstance(value, float) else value
    except ValueError:
        number = -1.0
    if isinstance(value, bool) or not 0 < number < 1 << 50:
        raise unreadable(file, f"{field}: {str(value)[:40]!r} is no size or frequency")
    return number
