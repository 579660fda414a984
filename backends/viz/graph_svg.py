"""plan.svg: the decided graph as a drawing that needs no Graphviz."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...ir.training import TrainingGraph
from ...planner.plan import Plan
from . import routing
from .files import write_whole
from .layers import arrange
from .picture import PLAIN, STYLES, Box, Picture, Style, draw, kib
from .svg import DECLARATION, document, element, escaped, number, shorten, text, text_width, tooltip

if TYPE_CHECKING:
    from ...planner.check import CheckReport

BOX_WIDTH = 208.0
BOX_HEIGHT = 54.0
PORT_WIDTH = 62.0  # a box grows with its operands, so that the edge labels fit
PASS_WIDTH = 22.0
CHANNEL = 46.0  # usual height of the edges between two layers
MARGIN = 24.0
CORNER = 4.0
EDGE = "#444444"
CELLS = 29  # characters that fit a box


def write_svg(plan: Plan, training: TrainingGraph, report: CheckReport, path: Path) -> None:
    """Write the forward graph with its decisions as SVG.

    Args:
        plan: A checked plan.
        training: The training graph that the plan executes.
        report: The checker's report on this plan.
        path: File to write; it appears whole or not at all.

    Raises:
        OdtPlanError: The file can't be written.
    """
    write_whole(path, DECLARATION + graph_drawing(plan, training, report))


def graph_drawing(plan: Plan, training: TrainingGraph, report: CheckReport) -> str:
    """The ``<svg>`` element of that file; box 5 of ``draw`` has the id ``node5``."""
    picture = draw(plan, training, report)
    operands = [0] * len(picture.boxes)
    for link in picture.links:
        operands[link.target] += 1
    widths = [max(BOX_WIDTH, PORT_WIDTH * n) for n in operands]
    edges = [(e.source, e.target, e.value) for e in picture.links]
    drawing = routing.place(arrange(widths, edges, PASS_WIDTH, BOX_HEIGHT + CHANNEL), BOX_HEIGHT)
    legend, legend_width = _legend()
    heading_width = max(text_width(shorten(picture.title, 100), 16), text_width(picture.facts, 11))
    body = [
        text(MARGIN, MARGIN + 14, shorten(picture.title, 100), 16, font_weight="bold"),
        text(MARGIN, MARGIN + 34, picture.facts, 11),
        element("g", legend, transform=f"translate({number(MARGIN)} {number(MARGIN + 46)})"),
        "<defs>"
        + element(
            "marker",
            element("path", d="M0 0L7 3L0 6z", fill=EDGE),
            id="arrow",
            markerWidth=7,
            markerHeight=6,
            refX=6.5,
            refY=3,
            orient="auto",
            markerUnits="userSpaceOnUse",
        )
        + "</defs>",
    ]
    shift = MARGIN + 92
    body.append(f'<g transform="translate({number(MARGIN)} {number(shift)})">')
    body += _links(picture, drawing)
    placed = zip(picture.boxes, drawing.x, drawing.y, widths, strict=True)
    for i, (box, x, y, width) in enumerate(placed):
        shapes = ["\n", *_box(box, x, y, width), "\n"]
        body.append(element("g", shapes, _class="node", id=f"node{i}"))
    body.append("</g>")
    inner = max(drawing.width, heading_width, legend_width)
    return document(inner + 2 * MARGIN, drawing.height + shift + MARGIN, picture.title, body)


def _links(picture: Picture, drawing: routing.Drawing) -> Iterator[str]:
    labels = []
    for link, points in zip(picture.links, drawing.routes, strict=True):
        target = picture.boxes[link.target].name
        tip = tooltip(f"{link.value} to {target}", f"{link.type}, {link.bytes:,} B")
        shape = element(
            "path", d=_rounded(points), fill="none", stroke=EDGE, marker_end="url(#arrow)"
        )
        yield element("g", [tip, shape], _class="edge")
        x, y = points[-1]
        # the halo keeps the label readable where an edge passes behind it
        labels.append(
            text(
                x + 5,
                y - 4,
                kib(link.bytes),
                9.5,
                fill=EDGE,
                stroke="#ffffff",
                stroke_width=3,
                paint_order="stroke",
            )
        )
    yield from labels


def _rounded(points: list[routing.Point]) -> str:
    path = [f"M{number(points[0][0])} {number(points[0][1])}"]
    for (ax, ay), (bx, by), (cx, cy) in zip(points, points[1:], points[2:], strict=False):
        before, after = abs(bx - ax) + abs(by - ay), abs(cx - bx) + abs(cy - by)
        r = min(CORNER, before / 2, after / 2)
        px, py = bx - r * _sign(bx - ax), by - r * _sign(by - ay)
        qx, qy = bx + r * _sign(cx - bx), by + r * _sign(cy - by)
        path.append(
            f"L{number(px)} {number(py)}Q{number(bx)} {number(by)} {number(qx)} {number(qy)}"
        )
    path.append(f"L{number(points[-1][0])} {number(points[-1][1])}")
    return "".join(path)


def _sign(x: float) -> int:
    return 0 if abs(x) < 0.05 else (1 if x > 0 else -1)


def _box(box: Box, x: float, y: float, width: float) -> Iterator[str]:
    styles = tuple(STYLES[d] for d in box.decisions) or (PLAIN,)
    yield tooltip(*box.details)
    yield from _panel(styles, x, y, width, BOX_HEIGHT, 26 if box.op == "input" else 3)
    middle = x + width / 2
    top = y + (17 if box.note else 24)
    op, cells = shorten(box.op, 16), int(CELLS * width / BOX_WIDTH)
    name = shorten(box.name, max(8, cells - len(op) - 2))
    spans = [
        element("tspan", escaped(op), font_weight="bold"),
        element("tspan", escaped(name), dx=6),
    ]
    yield element("text", spans, x=middle, y=top, font_size=11, text_anchor="middle")
    kind = shorten(f"{box.type} · {kib(box.bytes)}", cells + 3)
    yield text(middle, top + 14, kind, 10, text_anchor="middle")
    if box.note:
        yield text(middle, top + 28, shorten(box.note, cells + 3), 10, text_anchor="middle")


def _panel(
    styles: tuple[Style, ...], x: float, y: float, width: float, height: float, radius: float
) -> Iterator[str]:
    """One vertical stripe per decision; the borders lie inside each other."""
    stripe = width / len(styles)
    if len(styles) == 1:
        yield _rect(x, y, width, height, radius, fill=styles[0].tint)
    else:
        for i, style in enumerate(styles):
            yield _rect(x + i * stripe, y, stripe, height, 0, fill=style.tint)
    inset = 0.0
    for style in styles:
        at = inset + style.width / 2
        yield _rect(
            x + at,
            y + at,
            width - 2 * at,
            height - 2 * at,
            radius,
            fill="none",
            stroke=style.color,
            stroke_width=style.width,
            stroke_dasharray=style.dash or "none",
        )
        inset += style.width + 0.5


def _rect(
    x: float, y: float, width: float, height: float, radius: float, **attributes: object
) -> str:
    return element(
        "rect",
        x=float(x),
        y=float(y),
        width=float(width),
        height=float(height),
        rx=float(radius),
        **attributes,
    )


def _legend() -> tuple[list[str], float]:
    parts: list[str] = []
    x = 0.0
    for style in (*STYLES.values(), PLAIN):
        parts += _panel((style,), x, 0.0, 30.0, 18.0, 3)
        parts.append(text(x + 36, 13, style.text, 10.5))
        x += 36 + text_width(style.text, 10.5) + 18
    return parts, x
