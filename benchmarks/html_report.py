"""The HTML report in a browser: bytes, seconds until it is open, pauses of what one does with it.

python -m benchmarks.html_report [FOLDER]   (pictures of the first two into this folder)
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from odt_plan.backends.html import plan_page, write_page
from odt_plan.figures import Budgeted
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan

from .large_nets import bert
from .models import shared
from .results import put

TITLE = "### The HTML report in a browser"
SIZE = {"width": 1280, "height": 900}
TIME_LIMIT_S = 60.0
#: Milliseconds until the second frame after something was done.
_PAUSE = """async code => {
  const begin = performance.now();
  new Function(code)();
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.now() - begin;
}"""
_DONE = {
    "zoom": "drawings[0].zoom(1.5, 300, 300)",
    "search": "drawings[0].search.value = 'add'; drawings[0].find()",
    "sort": "document.querySelector('#layers thead th:last-child button').click()",
}


def plans(folder: Path) -> dict[str, tuple[PlannedModel, Budgeted]]:
    """A small network on a microcontroller, BERT, and one of more than a thousand nodes."""
    found = {}
    models = shared()
    if models is not None:
        path = models / "models" / "mbv2-w0.35-head10-qdq.onnx"
        request = Request(path, load_device("stm32h743"), time_limit_s=TIME_LIMIT_S)
        found["MobileNetV2"] = make_plan(request), Budgeted(None, None)
    large = {"BERT-base": bert(), "34 narrow layers of BERT": bert(34, width=256, heads=4)}
    for name, model in large.items():
        path = folder / f"{model.graph.name}.onnx"
        onnx.save(model, path)
        ram, flash = 300_000_000, 1 << 30
        board = load_device("raspberry-pi-4b")
        limits = {"ram_bytes": ram, "flash_bytes": flash, "time_limit_s": TIME_LIMIT_S}
        found[name] = make_plan(Request(path, board, **limits)), Budgeted(ram, flash)
    return found


def row(page: Page, name: str, planned: PlannedModel, path: Path) -> str:
    """Open a report and measure."""
    page.goto(path.as_uri())
    entry = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    opened = page.evaluate(entry) / 1000
    pauses = []
    for code in _DONE.values():
        page.wait_for_timeout(2000)  # what was done before is drawn by then
        pauses.append(page.evaluate(_PAUSE, code))
    nodes = page.locator("#graph .node").count()
    told = " | ".join(f"{p:.0f} ms" for p in pauses)
    steps, size = len(planned.plan.steps), path.stat().st_size
    return f"| {name} | {nodes:,} | {steps:,} | {size:,} B | {opened:.2f} s | {told} |"


def picture(page: Page, path: Path, search: str, sections: tuple[str, str], target: Path) -> None:
    """From the first section to the end of the last, after a search in the graph."""
    page.goto(path.as_uri())
    page.set_viewport_size({**SIZE, "height": 2600})  # so that all of it is laid out
    page.evaluate("for (const d of drawings) { d.canvas.style.maxHeight = '720px'; d.fit() }")
    if search:
        page.locator("#graph input").fill(search)
        page.evaluate("drawings[0].zoom(0.62, 0, 0); drawings[0].step(0)")
    page.wait_for_timeout(500)
    first, last = (page.locator(f"#{s}").bounding_box() for s in sections)
    assert first is not None
    assert last is not None
    top, bottom = first["y"], last["y"] + last["height"]
    clip = {"x": 0, "y": top, "width": SIZE["width"], "height": bottom - top + 16}
    shot = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip))).convert("RGB")
    shot.quantize(256, Image.Quantize.FASTOCTREE).save(target, optimize=True)


def main(arguments: list[str]) -> None:
    """Print the table and put it into the results."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    table = [
        TITLE,
        "",
        "| plan | nodes drawn | steps | file | open after | zoom | search | sort |",
        "|---|---|---|---|---|---|---|---|",
    ]
    options: dict[str, Any] = {"executable_path": program, "args": ["--no-sandbox"]}
    with TemporaryDirectory() as temporary, sync_playwright() as playwright:
        browser = playwright.chromium.launch(**options)
        shown = {
            "MobileNetV2": ("", ("summary", "graph")),
            "BERT-base": ("l3.down.product [", ("graph", "memory")),
        }
        for name, (planned, given) in plans(Path(temporary)).items():
            path = Path(temporary) / f"{planned.plan.model.name}.html"
            write_page(plan_page(planned, given), path)
            page = browser.new_page(viewport=SIZE)
            table.append(row(page, name, planned, path))
            print(table[-1], flush=True)
            if arguments and name in shown:
                target = Path(arguments[0]) / f"report-{name.lower()}.png"
                picture(page, path, *shown[name], target)
            page.close()
        browser.close()
    load = f"a load of {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    put(TITLE, [*table, "", f"Headless Chromium, drawn by the processor, at {load}."])


if __name__ == "__main__":
    main(sys.argv[1:])
