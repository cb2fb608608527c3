"""The page in a real browser: renders, sorts, saves, prints nothing to the console, and passes an accessibility check (axe).

Needs playwright and axe (the extra ``browser``) and a Chromium of the system; skipped where there is none.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from base64 import b64decode
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from merit.diagnostics.result import Diagnosis
from merit.report.page.document import page
from report.page_cases import make_run, make_study
from report.test_page import HOSTILE

CHROMIUM = os.environ.get("MERIT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser: pip install -e '.[browser]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (set MERIT_CHROMIUM)"),
]


@dataclass(frozen=True)
class Found(Diagnosis):
    """A diagnosis with a drawing."""

    name, title, rule, units = "found", "a title", "ready up to 1, doubtful up to 2", {}


SIZES = {"desktop": (1200, 900, "light"), "phone": (390, 844, "dark")}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    models = folder / "evaluation" / "models"
    models.mkdir(parents=True)
    for model in ("base", "joint", "merged"):
        row = {"part": "mixture", "dataset": "a", "row": 0, "match": True, "prompt": HOSTILE[1], "answer": HOSTILE[0]}
        (models / f"{model}.answers.jsonl").write_text(json.dumps(row | {"reference": HOSTILE[2]}), encoding="utf-8")
    drawing = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="30"><circle cx="20" cy="15" r="9"/></svg>'
    (folder / "diagnostics").mkdir()
    (folder / "diagnostics" / "found.svg").write_text(drawing, encoding="utf-8")
    run = make_run(folder, sorted([*HOSTILE, *(f"dataset-{i:02d}" for i in range(32))]))
    found = folder / "report.html"
    found.write_text(page(replace(run, study=make_study(), diagnoses={"found": Found("ready", "0.5")})), "utf-8")
    return found


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture(params=SIZES)
def opened(request, browser, file):
    width, height, scheme = SIZES[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    tab = context.new_page()
    tab.said = []
    tab.on("console", lambda message: tab.said.append(message.text))
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.on("dialog", lambda dialog: (tab.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    tab.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else tab.said.append(request.url),
    )
    tab.goto(file.as_uri())
    tab.add_style_tag(content="section,.tall{content-visibility:visible!important}")  # axe looks at what is laid out
    yield tab
    context.close()


def test_renders_quietly_and_fits(opened):
    opened.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    opened.wait_for_timeout(200)
    assert opened.said == []
    assert opened.evaluate("document.documentElement.scrollWidth") <= opened.viewport_size["width"]
    painted = "(c) => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    assert opened.locator("canvas.heatmap").evaluate(painted) > 20
    opened.locator("canvas.heatmap").hover()
    assert " and " in opened.locator(".reading").inner_text()


def test_the_heatmap_is_read_by_keyboard(opened, file):
    text = file.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="cosines-data">(.*?)</script>', text)[1])
    names, cells = data["names"], b64decode(data["cells"])
    rows, columns = np.triu_indices(len(names))
    matrix = np.zeros((len(names), len(names)))
    matrix[rows, columns] = matrix[columns, rows] = np.frombuffer(cells, np.uint8) / 127 - 1
    heatmap, reading = opened.locator("canvas.heatmap"), opened.locator("#cosines-reading")

    def said(i: int, j: int) -> str:
        return f"{names[i]} and {names[j]}: {matrix[i, j]:.2f}".replace("-0.00", "0.00")

    def shown() -> str:
        return reading.evaluate("(e) => e.textContent").replace("-0.00", "0.00")

    opened.locator("#cosines .scroll").focus()
    opened.keyboard.press("Tab")
    assert heatmap.evaluate("(e) => e === document.activeElement")
    assert shown() == said(0, 0)
    for key, i, j in (
        ("ArrowDown", 1, 0), ("ArrowRight", 1, 1), ("ArrowRight", 1, 2), ("ArrowUp", 0, 2), ("ArrowUp", 0, 2),
        ("End", 0, len(names) - 1), ("PageDown", 10, len(names) - 1), ("Home", 10, 0), ("ArrowLeft", 10, 0),
    ):  # fmt: skip
        opened.keyboard.press(key)
        assert shown() == said(i, j), key
        assert reading.get_attribute("aria-live") == "polite"
    box, cell = heatmap.bounding_box(), opened.locator("#cosines .cell").bounding_box()
    assert cell["y"] - box["y"] == pytest.approx(10 * box["height"] / len(names), abs=1)
    assert cell["x"] == pytest.approx(box["x"], abs=1)
    heatmap.hover()
    assert reading.get_attribute("aria-live") == "off"  # a pointer passes many cells
    opened.keyboard.press("Tab")
    assert not heatmap.evaluate("(e) => e === document.activeElement")
    assert not opened.locator("#cosines .cell").is_visible()


def test_the_heatmap_saves_as_csv(opened, tmp_path):
    saved = _saved(opened, opened.locator("button[data-cells=cosines]"), tmp_path)
    assert saved.name == "cosines.csv"
    with saved.open(encoding="utf-8-sig", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[0] == ""
    assert [row[0] for row in rows] == head[1:]
    assert len(rows) == 40
    matrix = np.array([[float(cell) for cell in row[1:]] for row in rows])
    assert (matrix == matrix.T).all()
    assert (np.diag(matrix) == 1).all()
    assert not [cell for cell in head if cell.startswith(("=", "+", "@"))]


def test_passes_axe(opened):
    opened.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    found = axe.Axe().run(opened).response["violations"]
    assert [(item["id"], item["nodes"][0]["html"][:120]) for item in found] == []


def test_tables_sort_by_keyboard(opened):
    header = opened.locator("#mixture-loss thead th", has_text="merged")
    button = header.locator("button")
    column = "(t) => [...t.tBodies[0].rows].map((r) => Number(r.cells[4].dataset.v))"
    values = opened.locator("#mixture-loss").evaluate(column)
    button.focus()
    opened.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert opened.locator("#mixture-loss").evaluate(column) == sorted(values)
    opened.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert opened.locator("#mixture-loss").evaluate(column) == sorted(values, reverse=True)


def test_every_figure_saves(opened, tmp_path):
    opened.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    buttons = opened.locator("button[data-figure]").all()
    names = {button.get_attribute("data-figure") for button in buttons}
    assert names >= {"cosines", "scatter", "diagnosis-found", "study-kept"}
    assert len(buttons) == 2 * len(names)
    for button in buttons:
        key, kind = button.get_attribute("data-figure"), button.get_attribute("data-kind")
        saved = _saved(opened, button, tmp_path)
        assert saved.name == f"{key}.{kind}"
        if kind == "png":
            with Image.open(saved) as image:
                assert any(low < high for low, high in image.convert("RGBA").getextrema()), f"{key} is one colour"
        else:
            assert ElementTree.parse(saved).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert opened.said == []


def test_every_table_saves_as_csv(opened, tmp_path):
    opened.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    buttons = opened.locator("button[data-csv]").all()
    assert {button.get_attribute("data-csv") for button in buttons} >= {"overview", "mixture-loss", "study-0"}
    for button in buttons:
        key = button.get_attribute("data-csv")
        saved = _saved(opened, button, tmp_path)
        assert saved.name == f"{key}.csv"
        with saved.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
        shown = opened.locator(f"table[id='{key}']").evaluate("(t) => [...t.rows].map((r) => r.cells.length)")
        assert [len(row) for row in rows] == shown, key
        assert not [
            cell for row in rows for cell in row if cell.startswith(("=", "+", "@"))
        ]  # a spreadsheet would run it
        if key == "mixture-loss":
            assert rows[0][:5] == ["dataset", "rows", "base", "joint", "merged"]
            assert any(cell.startswith("'=cmd") for row in rows for cell in row)
    assert opened.said == []


def _saved(tab, button, folder: Path) -> Path:
    with tab.expect_download() as waiting:
        button.click()
    saved = folder / waiting.value.suggested_filename
    waiting.value.save_as(saved)
    return saved
