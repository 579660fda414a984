"""The HTML report: it tells what the plan and the terminal tell, and works in a real browser."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import onnx
import plans
import pytest
from cli_run import Cli
from PIL import Image
from zoo import exhibit

from odt_plan import figures
from odt_plan.backends.html import plan_page, write_page
from odt_plan.backends.viz.notes import node_cycles
from odt_plan.figures import Budgeted
from odt_plan.ir.errors import OdtPlanError
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan

MODEL = Path(__file__).resolve().parent.parent / "examples" / "digits_cnn.onnx"
BUDGET = ("--ram", "100KB", "--flash", "1MB")
GIVEN = Budgeted(102_400, 1 << 20)
FORWARD = ("forward", "loss")
#: Each ends in the mark of its node.
HOSTILE = (
    "<script>document.title='broken'</script>",
    "</title></svg><img src=x onerror=\"document.title='broken'\">",
    "{{ 7*7 }}&lt;b&gt;'\"",
    "Süß/層\U0001f600 \u202egnorw",
    "x" * 500,
)


def _planned(model: Path) -> PlannedModel:
    board = load_device("generic-cortex-m7")
    return make_plan(Request(model, board, ram_bytes=102_400, flash_bytes=1 << 20))


@pytest.fixture(scope="module")
def planned() -> PlannedModel:
    return _planned(MODEL)


@pytest.fixture(scope="module")
def page(planned: PlannedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_page(plan_page(planned, GIVEN), path)
    return path


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose nodes, tensors and model have names that try to break out."""
    folder = tmp_path_factory.mktemp("hostile")
    model = onnx.load(MODEL)
    graph = model.graph
    graph.name = HOSTILE[0]
    new = {}
    for i, tensor in enumerate(graph.initializer):
        new[tensor.name] = tensor.name = f"{HOSTILE[i % len(HOSTILE)]} t{i}"
    for i, node in enumerate(graph.node):
        node.name = f"{HOSTILE[i % len(HOSTILE)]} n{i}"
        for k, name in enumerate(node.input):
            node.input[k] = new.get(name, name)
    onnx.save(model, folder / "model.onnx")
    write_page(plan_page(_planned(folder / "model.onnx"), GIVEN), folder / "report.html")
    return folder / "report.html"


class _Parsed(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.code: dict[str, str] = {}
        self._in = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in in ("script", "style"):
            self.code[self._in] = self.code.get(self._in, "") + data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def _numbers(path: Path, section: str) -> list[list[float]]:
    """The numbers of each row of the table of a section."""
    _, _, text = path.read_text(encoding="utf-8").partition(f'<section id="{section}">')
    rows = text[text.index("<tbody>") : text.index("</tbody>")].split("<tr>")[1:]
    return [[float(v) for v in re.findall(r'data-value="([^"]*)"', row)] for row in rows]


# -- what it tells ------------------------------------------------------------------------------


def test_the_report_tells_what_the_terminal_tells(odt: Cli, tmp_path: Path) -> None:
    done = odt(MODEL, *BUDGET, "--emit", "html", "-o", "out")
    assert done.code == 0, done.err
    assert "report.html" in done.out
    text = _Parsed(tmp_path / "out" / "report.html").text
    told = [" ".join(row.split()) for row in done.out.splitlines()]
    told = [row for row in told if row and "─" not in row and not row.startswith("written")]
    assert len(told) > 25
    for row in told:
        if row.startswith(("RAM [", "flash [")):  # a meter, drawn otherwise here
            row = row.partition("% ")[2]
        assert row in text, row
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_quiet_runs_compare_too(odt: Cli, tmp_path: Path) -> None:
    assert odt(MODEL, *BUDGET, "--emit", "html", "-o", "out", "-q").code == 0
    assert "keep-all" in _Parsed(tmp_path / "out" / "report.html").text


def test_layers_cost_together_what_the_plan_costs(planned: PlannedModel, page: Path) -> None:
    nodes = [n for n in planned.training.graph.nodes if n.phase in FORWARD]
    rows = _numbers(page, "layers")
    assert len(rows) == len(nodes)
    assert [row[0] for row in rows] == [n.out.type.nbytes for n in nodes]
    claims = planned.plan.claims
    assert sum(sum(row[1:4]) for row in rows) == claims.cycles
    first = [sum(s.cycles for s in planned.plan.steps if s.nodes == (n.name,)) for n in nodes]
    assert [row[1] for row in rows] == first  # nothing is computed twice in this plan
    assert sum(row[3] for row in rows) > 0
    updates = planned.plan.decisions.updates
    scores = [sum(u.importance for u in updates if u.node == n.name) for n in nodes]
    assert [row[4] for row in rows] == pytest.approx(scores)
    assert sum(scores) > 0


def test_parts_of_time_and_energy_make_up_the_whole() -> None:
    """With transfers beside the computation, in which the storage takes power of its own."""
    shown = exhibit("overlapped-accumulate")
    report, storage = shown.report(), shown.plan.device.storage
    assert report.transfer_cycles > report.phase_cycles["paging"] > 0
    grid = figures.part_grid(report, load_device(plans.BOARD), storage)
    told = figures.time_lines(report, load_device(plans.BOARD), storage)[-1]
    assert [s.split()[0] for s in told.text.split(": ")[1].split(", ")] == [
        row[0].text for row in grid.rows
    ]
    assert told.text.endswith(f"storage {grid.rows[-1][4].text}")
    assert {"forward", "loss", "backward", "update", "storage"} < {row[0].text for row in grid.rows}
    assert sum(row[1].value or 0 for row in grid.rows) == pytest.approx(report.latency_s)
    assert sum(row[3].value or 0 for row in grid.rows) == pytest.approx(report.energy_j)


def test_accumulated_gradients_belong_to_their_layers() -> None:
    shown = exhibit("paged-accumulate")
    nodes, report = shown.training.graph.nodes, shown.report()
    names = {n.name for n in nodes if n.phase in FORWARD}
    cycles = node_cycles(shown.training, report, shown.plan, names)
    assert cycles.keys() <= names
    spent = sum(s.cycles for s in report.steps if s.phase != "paging")
    assert sum(parts.total() for parts in cycles.values()) == spent


# -- one safe file ------------------------------------------------------------------------------


def test_the_file_needs_nothing_else_and_lets_nothing_else_run(page: Path) -> None:
    parsed = _Parsed(page)
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a[k] or "" for _, a in parsed.tags for k in ("src", "href", "data") if k in a]
    assert len(links) > 20
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    (policy,) = [a["content"] for _, a in parsed.tags if "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(parsed.code[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not [a for _, a in parsed.tags if "style" in a or any(k.startswith("on") for k in a)]


def test_hostile_names_stay_text(page: Path, hostile: Path) -> None:
    plain, parsed = _Parsed(page), _Parsed(hostile)
    assert {t for t, _ in parsed.tags} <= {t for t, _ in plain.tags}
    assert sum(t == "script" for t, _ in parsed.tags) == 1
    for name in (HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[4]):
        assert f"{name} n" in parsed.text
    assert "Süß/層\U0001f600 \ufffdgnorw n3" in parsed.text  # nothing reorders the text around it
    assert "\u202e" not in parsed.text


def test_unwritable_target_is_one_line_and_leaves_nothing(
    planned: PlannedModel, tmp_path: Path
) -> None:
    done = plan_page(planned, GIVEN)
    with pytest.raises(OdtPlanError, match=r"report\.html: can't write: .*; choose another"):
        write_page(done, tmp_path / "missing" / "report.html")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OdtPlanError):
        write_page(done, tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


# -- in a browser -------------------------------------------------------------------------------


#: Pixels from the left of the page to the end of what is in it, cut off or not.
WIDEST = """Math.max(...[document.documentElement, ...document.querySelectorAll('section')]
    .map(e => e.getBoundingClientRect().left + e.scrollWidth))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    with api.sync_playwright() as playwright:  # root and most containers can't have the sandbox
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


class _Opened:
    """A page in a browser that may not go wrong, and may ask for nothing but its own file."""

    def __init__(self, browser, path: Path, **options: bool) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.on("console", lambda m: self.wrong.append(m.text))
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("dialog", lambda d: (self.wrong.append(d.message), d.dismiss()))
        self.url = path.as_uri()
        self.page.goto(self.url)

    def __enter__(self):
        return self.page

    def __exit__(self, kind: object, *_: object) -> None:
        self.context.close()
        if kind is None:
            assert self.asked == [self.url]
            assert self.wrong == []


def _column(page, section: str, name: str) -> list[str]:
    """What stands in a column of the table of a section."""
    heads = page.locator(f"#{section} thead th").all_text_contents()
    cells = f"#{section} tbody tr > :nth-child({heads.index(name) + 1})"
    return [text.strip() for text in page.locator(cells).all_text_contents()]


def test_search_zoom_hover_and_sort(browser, planned: PlannedModel, page: Path) -> None:
    with _Opened(browser, page) as it:
        graph = it.locator("#graph")
        canvas, width = graph.locator(".canvas"), "drawings[0].svg.getBoundingClientRect().width"
        # zoom by button, key and wheel
        before = it.evaluate(width)
        graph.get_by_role("button", name="Zoom in").click()
        assert it.evaluate(width) == pytest.approx(1.4 * before, rel=0.01)
        canvas.focus()
        it.keyboard.press("-")
        assert it.evaluate(width) == pytest.approx(before, rel=0.01)
        canvas.hover()
        it.keyboard.down("Control")
        it.mouse.wheel(0, -400)
        it.keyboard.up("Control")
        it.wait_for_function(f"before => {width} > 2 * before", arg=before)
        # search: the match stands in the middle, outlined, and is told
        graph.get_by_role("searchbox").fill("CLASSIFIER")
        assert graph.locator(".count").inner_text().startswith("1 of ")
        node = next(n for n in planned.training.graph.nodes if n.name == "classifier")
        told = graph.locator(".details").inner_text()
        assert told.startswith(f"{node.op} classifier [forward]\nresult {node.out.name}: ")
        halo, frame = graph.locator(".halo").bounding_box(), canvas.bounding_box()
        assert frame["x"] < halo["x"] < halo["x"] + halo["width"] < frame["x"] + frame["width"]
        assert frame["y"] < halo["y"] < halo["y"] + halo["height"] < frame["y"] + frame["height"]
        graph.get_by_role("searchbox").fill("no such node")
        assert graph.locator(".count").inner_text() == "no match"
        # hover: a rectangle of the memory picture says what the plan says
        lives = [b for b in planned.plan.buffers if b.space == "arena"]
        index = max(range(len(lives)), key=lambda i: (lives[i].last - lives[i].first, i))
        it.locator("#memory .lifetime").nth(index).hover()
        b, tip = lives[index], it.get_by_role("tooltip").inner_text()
        assert tip.startswith(f"{b.value} ({b.id})\n")
        assert f"{b.bytes:,} B at offset {b.offset:,}\nsteps {b.first} to {b.last}" in tip
        it.locator("#memory .peak circle").hover()
        claims = planned.plan.claims.ram_bytes
        assert f"live peak {claims.live_peak:,} B" in it.get_by_role("tooltip").inner_text()
        # sort: by numbers downwards, then upwards; by words
        head = it.locator("#layers thead").get_by_role("button")
        nodes = [n for n in planned.training.graph.nodes if n.phase in FORWARD]
        sizes = sorted(n.out.type.nbytes for n in nodes)
        for wanted in (sizes[::-1], sizes):
            head.filter(has_text="bytes").click()
            assert [int(t.replace(",", "")) for t in _column(it, "layers", "bytes")] == wanted
        assert it.locator("#layers th[aria-sort=ascending]").inner_text().startswith("bytes")
        head.filter(has_text="operator").click()
        assert (found := _column(it, "layers", "operator")) == sorted(found, key=str.lower)
        # a layer leads to its node, also where the address has led there before; the browser
        # tells the page of a new address in its own time
        told = graph.locator(".details")
        for _ in range(2):
            graph.get_by_role("searchbox").fill("CLASSIFIER")
            assert " classifier [forward]" in told.inner_text()
            it.locator("#layers tbody a", has_text="conv1").first.click()
            told.filter(has_text=" conv1 [forward]").wait_for()


def test_light_dark_narrow_and_printed(browser, page: Path) -> None:
    with _Opened(browser, page) as it:
        for scheme in ("light", "dark"):
            it.emulate_media(color_scheme=scheme)
            shot = Image.open(io.BytesIO(it.screenshot())).convert("RGB")
            *others, (most, ground) = sorted(shot.getcolors(1 << 24))
            assert (min(ground) > 240) == (scheme == "light")
            assert (max(ground) < 40) == (scheme == "dark")
            assert len(others) > 50  # not blank
            assert sum(n for n, _ in others) > 0.05 * most
            for element, of_page in (("svg > rect", "backgroundColor"), ("svg", "color")):
                fill = it.locator(f"#graph {element}").evaluate("e => getComputedStyle(e).fill")
                assert fill == it.evaluate(f"getComputedStyle(document.body).{of_page}")
        it.set_viewport_size({"width": 360, "height": 740})
        assert it.evaluate(WIDEST) <= 360
        it.set_viewport_size({"width": 720, "height": 1000})  # as wide as A4
        it.locator("#graph").get_by_role("button", name="1:1").click()
        it.emulate_media(media="print")
        assert not it.locator(".tools").first.is_visible()
        assert it.evaluate(WIDEST) <= 720
        for drawing in it.locator(".canvas svg").all():
            assert 600 < drawing.bounding_box()["width"] <= 720


def test_works_without_scripts(browser, planned: PlannedModel, page: Path) -> None:
    with _Opened(browser, page, java_script_enabled=False) as it:
        assert not it.locator(".tools").first.is_visible()
        for section in ("graph", "memory"):
            box = it.locator(f"#{section} svg").first.bounding_box()
            assert box["width"] > 500
            assert box["height"] > 300
        assert _column(it, "comparison", "compared with")[0] == "this plan"
        own = f"{planned.plan.claims.ram_bytes.total:,} B"
        assert _column(it, "comparison", "RAM")[0] == own
        assert it.locator("#graph .node").count() > 10


def test_hostile_names_break_nothing(browser, hostile: Path) -> None:
    with _Opened(browser, hostile) as it:
        assert it.title() != "broken"
        graph = it.locator("#graph")
        graph.get_by_role("searchbox").fill(HOSTILE[1])
        assert HOSTILE[1] in graph.locator(".details").inner_text()
        graph.get_by_role("button", name="Next match").click()
        assert it.title() != "broken"
        assert it.locator("img").count() == 0
        assert it.evaluate(WIDEST) <= 1280
        graph.locator(".node", has_text="n1").first.hover()
        assert HOSTILE[1] in it.get_by_role("tooltip").inner_text()
