"""Sizes, times and energies as people write them, and as reports print them.

K, KB and KiB are 1024 bytes, M, MB and MiB 1024^2, as in linker scripts and datasheets.
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import floor

from ..ir.errors import UsageError

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SIZE = re.compile(r"([0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?) ?(?:([kmg])i?b?|b)?", re.IGNORECASE)
_HEX = re.compile(r"0x[0-9a-f]+(?:_[0-9a-f]+)*", re.IGNORECASE)
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?) ?([a-zµμ]*)", re.IGNORECASE)
#: More than any memory that a plan could be for; a larger number is a slip of the finger.
LARGEST_BYTES = 1 << 50
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0}
_HERTZ = {"hz": 1.0, "khz": 1e3, "mhz": 1e6, "ghz": 1e9}
_JOULES = {"j": 1.0, "mj": 1e-3, "uj": 1e-6}


def parse_bytes(text: str, what: str = "size") -> int:
    """Bytes of a size such as ``320KB``, ``320 KiB``, ``1.5MB``, ``0x50000`` or ``327,680``.

    Part of a byte is dropped where there is a unit: ``0.3KB`` is 307 bytes.

    Args:
        text: The size, in any case.
        what: Name of the option or field, for the message.

    Raises:
        UsageError: Not a size, no whole number of bytes, zero, or beyond any memory.
    """
    stripped = text.strip()
    if _HEX.fullmatch(stripped):
        size = Fraction(int(stripped, 16))
    else:
        match = _SIZE.fullmatch(stripped)
        if match is None:
            raise UsageError(
                f"{what}: {_shown(text)} is not a size; write for example 320KB, 1.5MB, 327680"
                " or 0x50000"
            )
        size = Fraction(match[1].replace(",", "")) * _UNITS[(match[2] or "").lower()]
        if match[2]:  # a budget of 32.3MB is meant as a round figure; nothing may exceed it
            size = Fraction(floor(size))
    if size.denominator != 1:
        raise UsageError(
            f"{what}: {_shown(text)} is {float(size):.9g} bytes, not a whole number;"
            " write the bytes themselves"
        )
    if not 0 < size <= LARGEST_BYTES:
        raise UsageError(
            f"{what}: {_shown(text)} is outside 1 byte to {LARGEST_BYTES:,} bytes;"
            " write for example 320KB"
        )
    return int(size)


def parse_seconds(text: str, what: str = "time") -> float:
    """Seconds of a time such as ``0.5s``, ``500 ms`` or ``0.5`` (seconds).

    Raises:
        UsageError: Not a time, or zero.
    """
    return _quantity(text, what, _SECONDS, "s", "0.5s or 500ms")


def parse_joules(text: str, what: str = "energy") -> float:
    """Joules of an energy such as ``2mJ`` or ``0.002`` (joules).

    Raises:
        UsageError: Not an energy, or zero.
    """
    return _quantity(text, what, _JOULES, "j", "2mJ or 0.002J")


def parse_hertz(text: str, what: str = "clock") -> float:
    """Hertz of a frequency such as ``72MHz`` or ``72000000`` (hertz).

    Raises:
        UsageError: Not a frequency, or zero.
    """
    return _quantity(text, what, _HERTZ, "hz", "72MHz or 72000000")


def format_bytes(n: int) -> str:
    """``327,680 B (320.00 KiB)``; below 1 KiB only the bytes."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n:,} B ({n / size:.2f} {unit})"
    return f"{n:,} B"


def format_seconds(s: float) -> str:
    """Three significant digits in s, ms or us."""
    return _scaled(s, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)))


def format_joules(j: float) -> str:
    """Three significant digits in J, mJ or uJ."""
    return _scaled(j, (("J", 1.0), ("mJ", 1e-3), ("uJ", 1e-6)))


def _scaled(x: float, units: tuple[tuple[str, float], ...]) -> str:
    unit, factor = next((u for u in units if x >= u[1]), units[-1])
    value = x / factor
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def _quantity(text: str, what: str, units: dict[str, float], default: str, example: str) -> float:
    match = _NUMBER.fullmatch(text.strip())
    unit = (match[2].lower().replace("µ", "u").replace("μ", "u") or default) if match else ""
    if match is None or unit not in units:
        raise UsageError(f"{what}: {_shown(text)} can't be read; write for example {example}")
    value = float(match[1]) * units[unit]
    if not 0 < value < 1e12:
        raise UsageError(f"{what}: {_shown(text)} can't be kept by any plan; write {example}")
    return value


def _shown(text: str) -> str:
    """The user's text on one line, shortened."""
    shown = repr(text)
    return shown if len(shown) <= 40 else f"{shown[:36]}...'"
