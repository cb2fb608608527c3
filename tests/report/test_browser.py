"""The page in a real browser: renders, sorts, saves, prints nothing to the console, and passes an accessibility check (axe).

Needs playwright and axe (the extra ``browser``) and a Chromium of the system; skipped where there is none.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

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
