"""Text of C: identifiers that can't collide, comments that can't end early, exact constants."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

import numpy as np

from ...ir.errors import GraphError
from ...ir.graph import Array
from .emit_call import C_TYPES, float_literal

_PER_LINE = 6
_COLUMNS = 100
#: Names that a model must not have: ``<name>.h`` would hide a standard header ...
_HEADERS = re.compile(
    r"assert|complex|ctype|errno|fenv|float|inttypes|iso646|limits|locale|math|setjmp|signal|string"
    r"|std(align|arg|atomic|bool|def|int|io|lib)|tgmath|threads|time|wchar|wctype"
)
#: ... ``<name>_t`` would be a type of the C library ...
_TYPES = re.compile(
    r"u?int(_least|_fast)?\d+|u?int(ptr|max)|s?size|ptrdiff|wchar|wint|char\d+|max_align|sig_atomic"
    r"|double|div|l+div|imaxdiv|fpos|clock|off|pid|uid|gid|mode|dev|ino|nlink|key|id"
)
#: ... ``<name>.h`` would be a header of Arduino where case does not count, or a reserved name ...
_ARDUINO = re.compile(
    r"arduino.*|client|eeprom|ethernet|print(able)?|sd|server|spi|stream|udp|wifi|wire"
)
#: ... CMake would not have a target of that name ...
_TARGETS = re.compile(
    r"all|clean|depend|edit_cache|help|install|package|package_source|preinstall|rebuild_cache|test"
)
#: ... or its files and symbols could be those of another model.
_ENDINGS = ("_weights", "_selftest", "_store", "_delta", "_train", "_host")


def identifier(text: str) -> str:
    """A lower-case C identifier made of ``text``, usable as prefix and as file stem.

    Names that start with a digit, clash with the kernel library (``odtplan``), a header of C or of
    Arduino, a type of the C library or a target of CMake get the prefix ``model_``.
    """
    name = re.sub(r"_+", "_", re.sub(r"[^a-z0-9]", "_", text.lower())).strip("_")
    clash = any(p.fullmatch(name) for p in (_HEADERS, _TYPES, _ARDUINO, _TARGETS))
    if not name or name[0].isdigit() or clash or name.startswith("odtplan"):
        name = f"model_{name}".rstrip("_")
    return f"{name}_model" if name.endswith(_ENDINGS) else name


def symbol(prefix: str, index: int, text: str) -> str:
    """``<prefix><index>_<text>``: readable, and unique through the index."""
    tail = re.sub(r"_+", "_", re.sub(r"[^A-Za-z0-9]", "_", text)).strip("_")[:40].rstrip("_")
    return f"{prefix}{index}_{tail}" if tail else f"{prefix}{index}"


def comment(text: str) -> str:
    """``text`` as it may stand inside a block comment: printable ASCII that can't end it.

    Nor does it look like the beginning of another one.
    """
    plain = "".join(c if " " <= c <= "~" else "?" for c in text)
    return re.sub(r"(?<=/)(?=[/*])|(?<=\*)(?=/)|(?<=\?)(?=\?)", " ", plain).rstrip("\\")


def block_comment(text: str) -> list[str]:
    """``text`` as the lines of a block comment."""
    lines = textwrap.wrap(comment(text), _COLUMNS - 12, break_long_words=False) or [""]
    lines = [f"/* {lines[0]}", *(f" * {line}" for line in lines[1:])]
    lines[-1] += " */"
    return lines


def c_type(dtype: str, where: str) -> str:
    """The C element type of a tensor dtype.

    Raises:
        GraphError: The C back end has no type for it.
    """
    if dtype not in C_TYPES:
        raise GraphError(f"{where}: the C back end has no type for {dtype}")
    return C_TYPES[dtype]


def array(name: str, data: Array, dtype: str, *, note: str) -> str:
    """Definition of a constant array that holds ``data`` exactly.

    Args:
        name: C identifier.
        data: Values in storage form.
        dtype: Key of ``ir.graph.DTYPES``.
        note: Comment before it.
    """
    head = f"/* {comment(note)} */\nconst {c_type(dtype, name)} {name}[{data.size}] = {{\n"
    return head + rows(data) + "};\n"


def rows(data: Array) -> str:
    """The values of an array as lines of C literals, each line ended by a comma."""
    flat = np.ascontiguousarray(data).reshape(-1)
    if flat.dtype == np.float16:
        flat = flat.view(np.uint16)  # as C_TYPES has it
    if flat.dtype.kind == "f":
        literals = [float_literal(v) for v in flat.tolist()]
    else:
        literals = [str(v) for v in flat.tolist()]
    lines = [literals[i : i + _PER_LINE] for i in range(0, len(literals), _PER_LINE)]
    return "".join(f"    {', '.join(line)},\n" for line in lines)


def block(head: str, lines: Sequence[str]) -> list[str]:
    """``head { lines }``; nothing when there are no lines."""
    return [head, *(f"    {line}" for line in lines), "}"] if lines else []


def wrap(statement: str) -> list[str]:
    """A call statement on lines of at most 100 columns, broken between arguments."""
    lines = [""]
    for piece in statement.replace(", ", ", \0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > _COLUMNS - 12:
            lines.append("    ")
        lines[-1] += piece
    return [line.rstrip() for line in lines]
