"""What files of vendors have in common: many chips in one file, and a Cortex-M's address map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from ...ir.errors import UsageError
from .facts import MemoryKind

#: Data RAM starts here or above; below are flash, and RAM on the buses of instructions.
_CODE_END = 0x1000_0000
_SHOWN = 6


def data_ram(origin: int) -> MemoryKind:
    """Kind of writable memory by its address: ITCM and the like hold instructions."""
    return "code" if origin < _CODE_END else "ram"


def choose(file: str, names: Mapping[str, Sequence[str]], wanted: str | None) -> str:
    """The chip that is meant: by its name or by that of a package, or by how one of them starts.

    Args:
        file: Name of the file.
        names: Chip -> names of its packages.
        wanted: ``--chip``.

    Raises:
        UsageError: None is, or several are.
    """
    if not names:
        raise UsageError(f"{file}: describes no chip")
    if wanted is None:
        if len(names) == 1:
            return next(iter(names))
        some = _few(names)
        raise UsageError(f"{file}: describes {len(names)} chips; choose by --chip, as {some}")
    low = wanted.lower()
    known = {alias.lower(): chip for chip, more in names.items() for alias in (*more, chip)}
    if low in known:
        return known[low]
    begun = {c for alias, c in known.items() if alias.startswith(low) or low.startswith(alias)}
    if len(begun) == 1:
        return begun.pop()
    if begun:
        raise UsageError(f"--chip {wanted}: may be {_few(sorted(begun))} of {file}")
    near = [known[n] for n in get_close_matches(low, known, n=3)]
    hint = f"did you mean {_few(near)}?" if near else f"it knows {_few(names)}"
    raise UsageError(f"--chip {wanted}: {file} has no such chip; {hint}")


def _few(names: Sequence[str] | Mapping[str, object]) -> str:
    shown = list(dict.fromkeys(names))
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
