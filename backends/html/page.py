"""A page of sections: figures, drawings and tables in one file.

Names come from model files of any origin. Jinja escapes them, drawings hold them escaped, and the
page's own policy lets no script and no style run but the two that belong to it; nothing is fetched.
"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...figures import Grid, Line
from ..viz.files import write_whole
from ..viz.svg import printable

_TEMPLATES = Path(__file__).parent / "templates"
_BAR = "#56b4e9"


@dataclass(frozen=True)
class Part:
    """A part of a figure: a stretch of its bar, ``share`` of it long, and what it is."""

    text: str
    share: float
    color: str


@dataclass(frozen=True)
class Tile:
    """A figure in large letters, what to know about it, and what it is made of."""

    label: str
    value: str
    notes: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()

    @property
    def stretches(self) -> list[tuple[float, Part]]:
        """The parts, each with the share of the bar that is before it."""
        ends = accumulate((p.share for p in self.parts), initial=0.0)
        return list(zip(ends, self.parts, strict=False))


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
        tiles: The chief figures.
        lines: Figures in words.
        drawing: An ``<svg>`` element whose text is escaped; empty: none.
        found: CSS class of what a search in the drawing finds.
        things: What these are, in the plural.
        tables: Tables.
    """

    id: str
    title: str
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
        default_color=_BAR,
    )


def _hashed(text: str) -> str:
    """What a policy calls an inline script or style."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
