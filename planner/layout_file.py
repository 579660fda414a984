"""Blocks in the CSV format of MiniMalloc: ``id,lower,upper,size[,alignment]``.

Lifetimes are half-open: a block lives from ``lower`` up to, not including, ``upper``. As there,
columns may be called ``begin`` or ``start`` (``lower``), ``end`` (the last time, inclusive), and
``buffer`` or ``buffer_id`` (``id``).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from ..ir.errors import OdtPlanError, UsageError
from .blocks import Block, peak_bytes

#: Integers beyond this are not exact everywhere a layout may go.
MAX_INTEGER = 1 << 53
COLUMNS = ("id", "lower", "upper", "size")
_OTHER_NAMES = {
    "buffer": "id", "buffer_id": "id", "begin": "lower", "start": "lower", "end": "upper"
}  # fmt: skip
#: Columns of the format that this program does not plan for, and the value that asks for nothing.
_REFUSED = {"gaps": "", "hint": "-1", "offset": ""}


@dataclass(frozen=True)
class BlockFile:
    """The rows of a file.

    Attributes:
        header: Column names as they stand there.
        rows: Fields as they stand there.
        ids: Name per block.
        blocks: Size, lifetime and alignment per block.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    ids: tuple[str, ...]
    blocks: tuple[Block, ...]


def load_blocks(path: Path) -> BlockFile:
    """Read a file of blocks.

    Raises:
        OdtPlanError: It can't be read.
        UsageError: A column is missing or not supported, or a row is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise OdtPlanError(f"{path}: can't read: {e.strerror or e}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is no UTF-8 text; give a CSV file") from None
    lines = [
        (n, [f.strip() for f in fields])
        for n, fields in enumerate(csv.reader(StringIO(text, newline="")), start=1)
        if any(f.strip() for f in fields)
    ]
    if not lines:
        raise UsageError(f"{path}: is empty; the first line names the columns {','.join(COLUMNS)}")
    header = tuple(lines[0][1])
    at = _columns(path, header)
    ids: dict[str, int] = {}
    blocks = []
    for line, row in lines[1:]:
        where = f"{path}:{line}"
        if len(row) != len(header):
            raise UsageError(f"{where}: has {len(row)} fields, the header names {len(header)}")
        name = row[at["id"]]
        if name in ids:
            raise UsageError(f"{where}: id {name!r} stands in line {ids[name]} too")
        ids[name] = line
        blocks.append(_block(f"{where} (id {name})", header, row, at))
    if not blocks:
        raise UsageError(f"{path}: has no block below the header")
    if peak_bytes(blocks) > MAX_INTEGER:
        raise UsageError(f"{path}: more than 2^53 bytes live at a time")
    return BlockFile(header, tuple(tuple(r) for _, r in lines[1:]), tuple(ids), tuple(blocks))


def _columns(path: Path, header: Sequence[str]) -> dict[str, int]:
    names = [_OTHER_NAMES.get(c, c) for c in header]
    known = (*COLUMNS, "alignment", *_REFUSED)
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{path}: column {name} is there twice")
        if name not in known:
            raise UsageError(f"{path}: unknown column {name!r}; known are {', '.join(known)}")
    missing = [c for c in COLUMNS if c not in names]
    if missing:
        raise UsageError(f"{path}: column {missing[0]} is missing; needed are {','.join(COLUMNS)}")
    return {name: k for k, name in enumerate(names)}


def _block(where: str, header: Sequence[str], row: Sequence[str], at: dict[str, int]) -> Block:
    for name, nothing in _REFUSED.items():
        if name in at and row[at[name]] not in ("", nothing):
            raise UsageError(
                f"{where}: {name} {row[at[name]]} is not supported; remove the column {name}"
            )

    def number(name: str) -> int:
        text = row[at[name]]
        try:
            value = int(text)
        except ValueError:
            raise UsageError(f"{where}: {header[at[name]]} {text!r} is no integer") from None
        if abs(value) > MAX_INTEGER:
            raise UsageError(f"{where}: {header[at[name]]} {text} is beyond 2^53")
        return value

    lower, upper, size = number("lower"), number("upper"), number("size")
    alignment = number("alignment") if "alignment" in at else 1
    last = upper if header[at["upper"]] == "end" else upper - 1
    if last < lower:
        raise UsageError(f"{where}: ends at {upper}, not after its start at {lower}")
    if size < 0:
        raise UsageError(f"{where}: size {size} is negative")
    if alignment < 1:
        raise UsageError(f"{where}: alignment {alignment} is below 1")
    return Block(size, lower, last, alignment)


def placed_csv(file: BlockFile, offsets: Sequence[int]) -> str:
    """The same rows with a column ``offset``."""
    out = StringIO()
    keep = [k for k, c in enumerate(file.header) if c != "offset"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*(file.header[k] for k in keep), "offset"])
    for row, offset in zip(file.rows, offsets, strict=True):
        writer.writerow([*(row[k] for k in keep), offset])
    return out.getvalue()
