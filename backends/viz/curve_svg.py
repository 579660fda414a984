"""A trade-off curve: the best value under each budget, its proven bound, one marker per point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import floor, log10
from pathlib import Path
from typing import Literal

from .files import write_whole
from .svg import DECLARATION, document, element, number, shorten, text, text_width, tooltip

MARGIN = 20.0
LEFT = 104.0  # room for the labels of y
TOP = 84.0  # heading and legend
WIDTH = 640.0
HEIGHT = 360.0
BOTTOM = 56.0
GREY = "#666666"
#: Okabe and Ito's palette; shapes and line styles say the same without colour.
VALUE, BOUND, NONE, DEVICE = "#0072b2", "#e69f00", "#d55e00", "#00795a"

Mark = Literal["optimal", "feasible", "none"]
WORDS: dict[Mark, str] = {
    "optimal": "proven within the gap",
    "feasible": "plan with a larger gap",
    "none": "no plan",
}


@dataclass(frozen=True)
class CurvePoint:
    """A budget and what is reached; without a plan ``y`` and ``bound`` are None.

    Attributes:
        details: Lines of the tooltip.
    """

    x: float
    y: float | None
    bound: float | None
    mark: Mark
    details: tuple[str, ...]


@dataclass(frozen=True)
class CurvePicture:
    """What is drawn.

    Attributes:
        points: At least one, by rising x.
        limit: What the device offers of x, marked if it is in the range.
        x_label: Name of an axis, as ``y_label``; ``x_text`` and ``y_text`` write its values.
    """

    title: str
    facts: str
    points: tuple[CurvePoint, ...]
    limit: float | None
    x_label: str
    y_label: str
    x_text: Callable[[float], str]
    y_text: Callable[[float], str]


def write_curve_svg(picture: CurvePicture, path: Path) -> None:
    """Write the picture.

    Args:
        picture: The curve.
        path: File to write; it appears whole or not at all.

    Raises:
        OdtPlanError: The file can't be written.
    """
    write_whole(path, DECLARATION + curve_drawing(picture))


@dataclass(frozen=True)
class _Scale:
    """Values to pixels."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return LEFT + WIDTH * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return TOP + HEIGHT * (1 - (value - self.low) / (self.high - self.low))


def curve_drawing(picture: CurvePicture) -> str:
    """The ``<svg>`` element of that file."""
    scale = _scale(picture.points)
    legend, legend_width = _legend(picture)
    body = [
        text(MARGIN, MARGIN + 14, shorten(picture.title, 84), 16, font_weight="bold"),
        text(MARGIN, MARGIN + 34, picture.facts, 11),
        element("g", legend, transform=f"translate({number(MARGIN)} {number(MARGIN + 42)})"),
        *_axes(picture, scale),
        *_limit(picture, scale),
        *_steps([(p.x, p.bound) for p in picture.points], scale, BOUND, "5 4", "bound"),
        *_steps([(p.x, p.y) for p in picture.points], scale, VALUE, "", "value"),
        '<g class="markers">',
        *(_marker(p, scale) for p in picture.points),
        "</g>",
    ]
    width = max(
        LEFT + WIDTH + MARGIN + 40,
        legend_width + 2 * MARGIN,
        text_width(picture.facts, 11) + 2 * MARGIN,
    )
    return document(width, TOP + HEIGHT + BOTTOM, picture.title, body)


def _scale(points: Sequence[CurvePoint]) -> _Scale:
    """Both axes with a little air; y starts at 0 where the curve comes near to it."""
    xs = [p.x for p in points]
    ys = [v for p in points for v in (p.y, p.bound) if v is not None] or [0.0, 1.0]
    low, high = min(ys), max(ys)
    if low < 0.5 * high:
        low = 0.0
    air = 0.04 * (max(xs) - min(xs)) or 0.5 * max(xs)
    room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return _Scale(
        max(0.0, min(xs) - air), max(xs) + air, low - (room if low else 0.0), high + room
    )


def _steps(
    values: Sequence[tuple[float, float | None]],
    scale: _Scale,
    color: str,
    dash: str,
    name: str,
) -> Iterator[str]:
    """A plan is valid for every larger budget, so values hold to the right until the next."""
    known = [(x, y) for x, y in values if y is not None]
    if not known:
        return
    path = [f"M{number(scale.x(known[0][0]))} {number(scale.y(known[0][1]))}"]
    for x, y in known[1:]:
        if name == "bound":  # a bound holds for every smaller budget, so it holds to the left
            path.append(f"V{number(scale.y(y))}H{number(scale.x(x))}")
        else:
            path.append(f"H{number(scale.x(x))}V{number(scale.y(y))}")
    style = {"stroke_dasharray": dash} if dash else {}
    yield element(
        "path", d="".join(path), fill="none", stroke=color, stroke_width=2, _class=name, **style
    )


def _marker(point: CurvePoint, scale: _Scale) -> str:
    x = scale.x(point.x)
    y = TOP + HEIGHT - 8 if point.y is None else scale.y(point.y)
    return element(
        "g", [tooltip(*point.details), _shape(point.mark, x, y)], _class=f"marker {point.mark}"
    )


def _shape(mark: Mark, x: float, y: float) -> str:
    """Disc, open square, cross."""
    if mark == "optimal":
        return element("circle", cx=x, cy=y, r=4.5, fill=VALUE, stroke="#ffffff", stroke_width=1)
    if mark == "feasible":
        return element(
            "rect", x=x - 4.5, y=y - 4.5, width=9.0, height=9.0, fill="#ffffff", stroke=VALUE,
            stroke_width=2,
        )  # fmt: skip
    a, b, c, d = (number(v) for v in (x - 5, x + 5, y - 5, y + 5))
    return element("path", d=f"M{a} {c}L{b} {d}M{a} {d}L{b} {c}", stroke=NONE, stroke_width=2.5)


def _axes(picture: CurvePicture, scale: _Scale) -> Iterator[str]:
    bottom, right = TOP + HEIGHT, LEFT + WIDTH
    for v in _ticks(scale.low, scale.high, 6):
        y = scale.y(v)
        yield element("line", x1=LEFT, y1=y, x2=right, y2=y, stroke="#dddddd", stroke_width=1)
        yield text(LEFT - 8, y + 3.5, picture.y_text(v), 10, text_anchor="end")
    for v in _ticks(scale.left, scale.right, 7):
        x = scale.x(v)
        yield element("line", x1=x, y1=bottom, x2=x, y2=bottom + 4, stroke=GREY, stroke_width=1)
        yield text(x, bottom + 16, picture.x_text(v), 10, text_anchor="middle")
    yield element("line", x1=LEFT, y1=TOP, x2=LEFT, y2=bottom, stroke=GREY, stroke_width=1)
    yield element("line", x1=LEFT, y1=bottom, x2=right, y2=bottom, stroke=GREY, stroke_width=1)
    yield text(LEFT + WIDTH / 2, bottom + 38, picture.x_label, 11, text_anchor="middle")
    middle = TOP + HEIGHT / 2
    turn = f"rotate(-90 {number(MARGIN + 4)} {number(middle)})"
    yield text(MARGIN + 4, middle, picture.y_label, 11, text_anchor="middle", transform=turn)


def _limit(picture: CurvePicture, scale: _Scale) -> Iterator[str]:
    if picture.limit is None or not scale.left <= picture.limit <= scale.right:
        return
    x, label = scale.x(picture.limit), f"device: {picture.x_text(picture.limit)}"
    yield element(
        "line", x1=x, y1=TOP, x2=x, y2=TOP + HEIGHT, stroke=DEVICE, stroke_width=2,
        stroke_dasharray="9 5", _class="device",
    )  # fmt: skip
    left = x > LEFT + WIDTH / 2
    at, anchor = (x - 6, "end") if left else (x + 6, "start")
    yield text(at, TOP + HEIGHT - 22, label, 11, text_anchor=anchor, fill=DEVICE)


def _legend(picture: CurvePicture) -> tuple[list[str], float]:
    parts: list[str] = []
    x = 0.0
    lines = [("best plan", VALUE, "")]
    if any(p.bound is not None for p in picture.points):
        lines.append(("proven bound", BOUND, "5 4"))
    for name, color, dash in lines:
        style = {"stroke_dasharray": dash} if dash else {}
        parts.append(
            element("line", x1=x, y1=8.5, x2=x + 24, y2=8.5, stroke=color, stroke_width=2, **style)
        )
        parts.append(text(x + 30, 13, name, 10.5))
        x += 30 + text_width(name, 10.5) + 14
    used = {p.mark for p in picture.points}
    for mark, words in WORDS.items():
        if mark in used:
            parts += [_shape(mark, x + 6, 8.5), text(x + 17, 13, words, 10.5)]
            x += 17 + text_width(words, 10.5) + 14
    return parts, x


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten) between low and high."""
    unit = 10.0 ** floor(log10((high - low) / wanted))
    step = next(unit * f for f in (1, 2, 5, 10) if (high - low) / (unit * f) <= wanted)
    first = floor(low / step) + (0 if low <= floor(low / step) * step else 1)
    return [i * step for i in range(first, floor(high / step) + 1)]
