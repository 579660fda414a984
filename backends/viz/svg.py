"""SVG text: elements, escaping, measured and shortened strings."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
#: Mean glyph width of the fonts above in ems; a little generous, so text is not clipped.
GLYPH_EM = 0.58
#: What a file begins with.
DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>\n'


def printable(text: str) -> str:
    """``text`` without characters that XML 1.0 forbids or that reorder the text around them."""
    return "".join(c if _allowed(c) else "\ufffd" for c in text)


def escaped(text: str) -> str:
    """``text`` for XML content and attribute values."""
    safe = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return safe.replace('"', "&quot;").replace("\t", "&#9;").replace("\r", "&#13;")


def element(tag: str, content: str | Iterable[str] | None = None, /, **attributes: object) -> str:
    """One element; ``_`` in attribute names becomes ``-`` and a leading ``_`` goes (``_class``).

    ``content`` is XML already, numbers are written with at most one decimal.
    """
    parts = [tag]
    for key, value in attributes.items():
        name = key.removeprefix("_").replace("_", "-")
        parts.append(
            f'{name}="{number(value) if isinstance(value, float) else escaped(str(value))}"'
        )
    head = " ".join(parts)
    if content is None:
        return f"<{head}/>"
    body = content if isinstance(content, str) else "".join(content)
    return f"<{head}>{body}</{tag}>"


def text(x: float, y: float, content: str, size: float = 11, **attributes: object) -> str:
    """A text element; ``y`` is the base line."""
    return element(
        "text", escaped(content), x=float(x), y=float(y), font_size=float(size), **attributes
    )


def tooltip(*lines: str) -> str:
    """A <title> element, shown by browsers on hover and read by screen readers."""
    return element("title", escaped("\n".join(lines)))


def document(width: float, height: float, title: str, body: Iterable[str], style: str = "") -> str:
    """An ``<svg>`` element with a white background: part of a page; a file begins before it."""
    w, h = number(float(width)), number(float(height))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}"'
        f' role="img" font-family="{escaped(FONT)}" fill="#000000">'
    )
    rows = [head, tooltip(title)]
    if style:
        rows.append(element("style", style))
    rows.append(element("rect", width=float(width), height=float(height), fill="#ffffff"))
    return "\n".join([*rows, *body, "</svg>"]) + "\n"


def number(x: float) -> str:
    """At most one decimal, no trailing zero, no minus zero."""
    rounded = f"{x:.1f}"
    rounded = rounded.removesuffix(".0")
    return "0" if rounded == "-0" else rounded


def text_width(content: str, size: float) -> float:
    """Estimated width in pixels; East Asian wide characters count double."""
    return sum(_cells(c) for c in content) * GLYPH_EM * size


def shorten(content: str, cells: int) -> str:
    """``content`` in one line and at most ``cells`` character cells, cut in the middle."""
    line = printable(content).replace("\n", " ").replace("\t", " ").replace("\r", " ")
    if sum(map(_cells, line)) <= cells:
        return line
    head = _prefix(line, (cells - 1) // 2)
    tail = _prefix(line[::-1], cells - 1 - (cells - 1) // 2)[::-1]
    return f"{head}…{tail}"


def _prefix(content: str, cells: int) -> str:
    used = 0
    for i, c in enumerate(content):
        used += _cells(c)
        if used > cells:
            return content[:i]
    return content


def _cells(c: str) -> int:
    if unicodedata.combining(c):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


def _allowed(c: str) -> bool:
    code = ord(c)
    if code < 0x20:
        return c in "\t\n\r"
    if 0xD800 <= code <= 0xDFFF or code & 0xFFFE == 0xFFFE or 0x7F <= code <= 0x9F:
        return False
    return not (0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069)  # bidirectional controls
