"""`merit report` of a study's folder: the same page as of its run, and one message for what is no study."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path

import pytest
from tests.builders import Case, make_case

from merit.run.store import claim
from report.page_cases import make_study


@pytest.fixture
def studied(tmp_path: Path, base: Path) -> Case:
    """A run folder that holds nothing but a study."""
    case = make_case(tmp_path / "case", base)
    claim(case.run)
    (case.run / "recipe.yaml").write_bytes(case.recipe.read_bytes())
    make_study().save(case.run / "study")
    return case


def test_the_page_of_a_study_is_written_next_to_it(studied, merit, monkeypatch):
    told = merit("report", studied.run / "study")
    assert told.code == 0, told.err
    page = (studied.run / "report.html").read_text(encoding="utf-8")
    assert str(studied.run / "report.html") in told.out.replace("\n", "")
    verdict = make_study().verdict[0]
    assert page.index(escape(verdict)) < page.index('id="study"')  # the page begins with it
    assert page.count(escape(verdict)) == 1
    assert set(re.findall(r'<section id="(\w+)"', page)) == {"verdict", "study", "provenance"}  # no empty ones
    for method in make_study().methods:
        assert f'scope="row">{method}<' in page
    assert not (studied.run / "study" / "report.html").exists()
    monkeypatch.chdir(studied.run / "study")
    other = studied.folder / "other.html"
    facts = json.loads(merit("report", ".", "--output", other, "--json").out)
    assert facts == {"report": str(other), "bytes": other.stat().st_size}
    assert other.read_text(encoding="utf-8") == page


def damaged(file: Path) -> None:
    """Another digit in a figure: JSON as before, but not what was written."""
    text = file.read_text(encoding="utf-8")
    place = text.index("0.", text.index('"learned"')) + 3
    file.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :], encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda file: file.unlink(), "run folder"),
        (damaged, "study.json is damaged"),
        (lambda file: file.write_text(file.read_text()[:99]), "study.json"),
        (lambda file: file.write_text("[]"), "study.json"),
        (lambda file: file.write_text('{"name": "case", "seeds": 3}'), "study.json"),
        (lambda file: (file.parents[1] / "recipe.yaml").unlink(), "run folder"),
        (lambda file: (file.parents[1] / "recipe.yaml").write_text("name: [case"), "recipe.yaml"),
    ],
)
def test_what_is_no_study_is_one_message(studied, merit, spoil, named):
    spoil(studied.run / "study" / "study.json")
    told = merit("report", studied.run / "study")
    assert told.code == 2
    assert named in told.err
    assert "Traceback" not in told.err
    assert not (studied.run / "report.html").exists()


def test_where_the_page_cannot_go_is_said(studied, merit):
    told = merit("report", studied.run / "study", "--output", studied.folder / "nowhere" / "page.html")
    assert told.code == 2
    assert "nowhere" in told.err
    folder = merit("report", studied.run / "study", "--output", studied.folder)
    assert folder.code == 2
    assert str(studied.folder) in folder.err
    assert merit("report", studied.folder / "absent").code == 2
