"""A page of sections: figures, drawings and tables in one file.

Names come from model files of any origin. Jinja escapes them, drawings hold them escaped, and the
page's own policy lets no script and no style run but the two that belong to it; nothing is fetched.
"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...figures import Grid, Line, Meter
from ..viz.files import write_whole
from ..viz.svg import printable

_TEMPLATES = Path(__file__).parent / "templates"
#: Okabe and Ito's palette, for the parts of a meter, which are named below it in their order.
_PARTS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#999999")
_BAR = "#56b4e9"


@dataclass(frozen=True)
class Tile:
    """A figure in large letters, and what to know about it."""

    label: str
    value: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table that can be sorted.

    Attributes:
        grid: Its cells.
        bars: Columns whose numbers are drawn as bars, too.
        colors: Of the bars in each row; none: all alike.
        links: What the first cell of each row leads to, as ``#id``; none: nothing.
        caption: What the numbers are.
    """

    grid: Grid
    bars: tuple[int, ...] = ()
    colors: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    caption: str = ""

    def share(self, row: int, column: int) -> float:
        """Length of a bar: 1 for the largest number of its column."""
        values = [cells[column].value or 0.0 for cells in self.grid.rows]
        return values[row] / (max(values) or 1.0)


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        id: What links lead to.
        title: Its heading.
        meters: Budgets and what uses them.
        tiles: Further figures.
        lines: Figures in words.
        drawing: An ``<svg>`` element whose text is escaped; empty: none.
        found: CSS class of what a search in the drawing finds.
        things: What these are, in the plural.
        tables: Tables.
    """

    id: str
    title: str
    meters: tuple[Meter, ...] = ()
    tiles: tuple[Tile, ...] = ()
    lines: tuple[Line, ...] = ()
    drawing: str = ""
    found: str = ""
    things: str = ""
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: Its heading.
        facts: What stands below it.
        sections: Its parts.
        made_by: The program and its version.
    """

    title: str
    facts: str
    sections: tuple[Section, ...]
    made_by: str


@dataclass(frozen=True)
class _Segment:
    """A part of a meter's bar, 0 to 100 wide."""

    name: str
    bytes: int
    x: float
    width: float
    color: str


def write_page(page: Page, path: Path) -> None:
    """Write a page.

    Args:
        page: What it shows.
        path: File to write; it appears whole or not at all.

    Raises:
        OdtPlanError: The file can't be written.
    """
    write_whole(path, _render(page))


def _render(page: Page) -> str:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    style, script = (
        (_TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    policy = (
        f"default-src 'none'; style-src {_hashed(style)}; script-src {_hashed(script)};"
        " base-uri 'none'; form-action 'none'"
    )
    return environment.get_template("page.html").render(
        page=page,
        style=style,
        script=script,
        policy=policy,
        segments=_segments,
        default_color=_BAR,
    )


def _hashed(text: str) -> str:
    """What a policy calls an inline script or style."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _segments(meter: Meter) -> list[_Segment]:
    """The parts that take bytes, side by side."""
    found: list[_Segment] = []
    scale, x = 100 / max(meter.limit, meter.used, 1), 0.0
    for (name, size), color in zip(meter.parts, _PARTS, strict=False):
        if size:
            found.append(_Segment(name, size, x, size * scale, color))
            x += size * scale
    return found
