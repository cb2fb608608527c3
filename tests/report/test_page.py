"""The page: nothing in the data can break or run anything, missing stages are said, sizes stay small."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from tests.builders import make_vision_base
from tests.hf.vision_cases import COLOURS, picture, save

from merit.diagnostics.result import Diagnosis
from merit.hf.base import open_base
from merit.merge import MergeResult
from merit.merge.result import Displacements, Source
from merit.merge.searched import Ratio, WeightPoint, WeightSearch
from merit.merge.weights import Losses
from merit.progress import size
from merit.recipe.load import parse_recipe
from merit.report.page import charts
from merit.report.page.document import page
from merit.report.page.markup import Cell, Html, join, number, page_data, table, tag
from merit.run.round_stages import RoundLine
from mixture.mixture_cases import prepare_mixture
from report.page_cases import make_record, make_run, make_study

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</script><script>alert(3)</script>",
    "a & b < c",
    "=cmd|' /C calc'!A0",
    "javascript:alert(4)",
    "]]>\u2028\u0000\x1b[31m",
    "ünïcode 数据",
]


class Reader(HTMLParser):
    """Elements with their attributes, and whether every one that opens is closed."""

    VOID = frozenset({"meta", "img", "br", "input", "link"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, element, attributes):
        self.elements.append((element, dict(attributes)))
        if element not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, element, attributes):
        self.elements.append((element, dict(attributes)))

    def handle_endtag(self, element):
        if not self.open or self.open.pop() != element:
            self.wrong.append(element)

    def handle_data(self, text):
        self.text.append(text)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


@pytest.fixture(scope="module")
def names() -> list[str]:
    return sorted([*HOSTILE, *(f"dataset-{i}" for i in range(22))])


@pytest.fixture(scope="module")
def hostile(names, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("run")
    models = folder / "evaluation" / "models"
    models.mkdir(parents=True)
    for model in ("base", "joint", "merged"):
        rows = [
            {
                "part": "mixture",
                "dataset": name,
                "row": 0,
                "match": model == "merged",
                "prompt": HOSTILE[1],
                "answer": HOSTILE[0] + model,
                "reference": HOSTILE[2],
            }
            for name in names
        ]
        (models / f"{model}.answers.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return page(make_run(folder, names))


def test_text_from_data_is_only_ever_text(hostile):
    found = read(hostile)
    assert found.wrong == []
    assert found.open == []
    scripts = [attributes for element, attributes in found.elements if element == "script"]
    assert [a.get("type") for a in scripts] == ["application/json", None]
    assert not [e for e, a in found.elements if any(key.startswith("on") for key in a)]
    assert not [e for e, a in found.elements if e in ("img", "iframe", "object", "embed", "link", "base", "form")]
    shown = "".join(found.text)
    assert HOSTILE[0] in shown  # it is shown as it is
    assert HOSTILE[3] in shown
    assert "\x1b" not in hostile
    assert "\x00" not in hostile


def test_nothing_is_loaded_from_elsewhere(hostile):
    found = read(hostile)
    for element, attributes in found.elements:
        for key in ("src", "href", "action", "data"):
            if value := attributes.get(key):
                assert value.startswith(("#", "data:image/png;base64,")), (element, key, value)
    policy = next(a["content"] for e, a in found.elements if e == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket", hostile)


def test_headings_ids_and_labels(hostile):
    found = read(hostile)
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for e, a in found.elements if e == "a"}
    assert targets <= set(ids)
    assert [e for e, _ in found.elements if e == "h1"] == ["h1"]
    for element, attributes in found.elements:
        if element in ("svg", "canvas"):
            assert attributes["role"] == ("img" if element == "svg" else "application")
            assert attributes["aria-label"]
    labels = [a["aria-label"] for _, a in found.elements if a.get("role") == "region"]
    assert len(labels) == len(set(labels))


def test_the_heatmap_is_reached_and_read_without_a_pointer(hostile):
    """What the script needs for it; tests/report/test_browser.py presses the keys."""
    found = read(hostile)
    (canvas,) = [a for e, a in found.elements if e == "canvas"]
    assert canvas["tabindex"] == "0"
    assert "arrow keys" in canvas["aria-label"]
    (reading,) = [a for e, a in found.elements if a.get("id") == canvas["aria-describedby"]]
    assert "aria-live" in reading
    (save,) = [a for e, a in found.elements if "data-cells" in a]
    assert save["data-cells"] in {a.get("id") for e, a in found.elements if e == "figure"}
    assert "CSV" in save["aria-label"]


def test_the_verdict_says_how_sure_it_is_measure_by_measure(tmp_path):
    run = make_run(tmp_path, [f"dataset-{i:02d}" for i in range(16)])
    text = page(run)
    grid = text[text.index('<table id="compared"') :]
    grid = grid[: grid.index("</table>")]
    assert run.evaluation is not None
    found = run.evaluation.verdict.comparisons
    assert [c.other for c in found] == re.findall(r"<button[^>]*>([^<]+)</button></th>", grid)[1:]
    rows = grid[grid.index("<tbody>") :].split("<tr>")[1:]
    measures = {(d.part, d.metric) for c in found for d in c.differences}
    assert len(rows) == len(measures) >= 6
    shown = re.findall(r'data-v="([^"]+)">([+-][\d.]+)<span class="interval"> ([+-][\d.]+) to ([+-][\d.]+)', grid)
    wanted = {(f"{d.difference:+.3f}", *(f"{end:+.3f}" for end in d.ci95)) for c in found for d in c.differences}
    assert {cells[1:] for cells in shown} == wanted
    for comparison in found:
        for item in comparison.differences:
            mark = {"better": "▲", "worse": "▼"}.get(item.outcome, "")
            cell = re.search(rf'data-v="{re.escape(f"{item.difference:.10g}")}">(.*?)</td>', grid)
            assert cell is not None
            assert re.findall("[▲▼]", cell[1]) == ([mark] if mark else [])


def test_script_data_cannot_end_its_element():
    markup = page_data("x", {"names": ["</script><script>alert(1)</script>", "<!--", "a&b"]})
    inside = markup[markup.index(">") + 1 : markup.rindex("</script>")]
    assert "<" not in inside
    assert json.loads(inside)["names"][0] == "</script><script>alert(1)</script>"


def test_markup_is_escaped_once_and_only_text():
    assert tag("p", "<b>", Html("<i>x</i>"), class_='a"b') == '<p class="a&quot;b">&lt;b&gt;<i>x</i></p>'
    assert join(["<", Html("<")]) == "&lt;<"
    assert tag("td", None, hidden=False, open=True) == "<td open></td>"


def test_table_sorts_by_values_and_dashes_have_none():
    markup = table("t", "T", ("name", "loss"), [["a", number(1.25)], ["b", number(None)], ["c", number(float("nan"))]])
    found = read(markup)
    values = [a.get("data-v") for e, a in found.elements if e == "td"]
    assert values == ["1.25", None, None]
    assert number(None) == Cell("–") == number(float("nan"))


def test_stages_that_are_missing_are_said(names, tmp_path):
    whole = make_run(tmp_path, names)
    bare = replace(whole.own, split=None, branches=(), merge=None)
    text = page(replace(whole, geometry=None, methods=(bare,), evaluation=None, counts=(), records={}))
    for words in ("no finished evaluation", "No gradients", "not split yet", "No branch is trained", "not merged yet"):
        assert words in text


def test_groups_say_what_their_members_have_in_common(tmp_path):
    run = make_run(tmp_path, [f"d{i}" for i in range(12)])
    text = page(run)
    tables = [text[text.index(f'id="{key}"') :] for key in ("groups-table", "members")]
    figures, members = (
        re.findall(r"<tr><th scope=\"row\".*?</tr>", found[: found.index("</table>")]) for found in tables
    )
    place = {name: i for i, name in enumerate(run.geometry.names)}
    for row, shared, group in zip(figures, members, run.own.split.groups, strict=True):
        means = {
            name: np.mean([run.geometry.cosine[place[name], place[other]] for other in group if other != name])
            for name in group
        }
        assert f"<td>{max(means, key=means.get)}</td>" in shared
        assert all(name in shared for name in group)
        assert ">4.0<" in row  # 800 target tokens of 200 rows


def test_the_merge_shows_searched_weights_and_rounds(names, tmp_path):
    run = make_run(tmp_path, names)
    points = tuple(WeightPoint(1 - k / 9, 0.1 + k / 20, (0.1 * k, 0.05 * k)) for k in range(10))
    ratio = Ratio("<x>", "branch 0", 0.25, 0.375, 0.3, 0.45)
    search = WeightSearch(
        "knee", 0.0, (0.0, 1.0), 0, ("branch 0", "branch 1"), (0.5, 0.5), points[4], points, "kept loss",
        {"base": Losses(2.0, 0.1)}, (ratio,), {"choosing": 12, "reporting": 13},
    )  # fmt: skip
    source = Source("branch 0", "/x", None)
    merge = MergeResult(
        "average", {}, 1.0, (0.6, 0.4), (6, 4), "tokens", source, (source, source), "", {}, weight_search=search
    )
    own = replace(run.own, merge=merge)
    text = page(replace(run, methods=(own,), rounds=(RoundLine(1, 2, (3,), 10**6, 0, 2.0),)))
    assert read(text).wrong == []
    for shown in ("37.50%", "30.00% to 45.00%", "&lt;x&gt;", "On 13 rows that did not choose", size(10**6), "round 1"):
        assert shown in text, shown
    assert len(re.findall(r"λ \d\.\d\d, weights", text)) == 10  # every point is named on hover


def test_the_merge_shows_how_far_every_model_moved(names, tmp_path):
    run = make_run(tmp_path, names)
    sources = tuple(Source(f"branch {k}", "/x", None) for k in range(2))
    merge = MergeResult(
        "average", {}, 1.0, (0.5, 0.5), (6, 6), "tokens", sources[0], sources, "", {},
        displacements=Displacements(50.0, (3.0, 4.0), 2.5),
    )  # fmt: skip
    alone = replace(merge, weights=(1.0,), branches=sources[:1], displacements=Displacements(50.0, (5.0,), 5.0))
    joint = replace(run.own, name="joint", branches=(), merge=alone)
    text = page(replace(run, methods=(replace(run.own, merge=merge), joint)))
    assert read(text).wrong == []
    moved = text[text.index('id="moved"') :]
    assert re.findall(r"[\d.]+%", moved[: moved.index("</table>")]) == ["6.000%", "8.000%", "5.000%", "10.000%"]
    assert "The merge lies 0.71 × as far out" in text
    assert "joint training lies 2.00 × as far out as the merge" in text
    assert "was not measured" in page(
        replace(run, methods=(replace(run.own, merge=replace(merge, displacements=None)),))
    )
    facts = {"displacements": {"joint": {"base": 50.0, "branches": [], "merged": 7.5}}}
    measured = make_record("evaluation").model_copy(update=facts)
    text = page(replace(run, methods=(replace(run.own, merge=merge),), records={"evaluation": measured}))
    assert "joint training lies 3.00 × as far out as the merge" in text
    assert ">15.000%<" in text


def test_diagnostics_are_a_section_and_nothing_in_their_drawings_can_run(names, tmp_path):
    @dataclass(frozen=True)
    class Found(Diagnosis):
        name, title, rule, units = "found", "a title", "ready up to 1, doubtful up to 2", {}

    (tmp_path / "diagnostics").mkdir()
    drawing = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    (tmp_path / "diagnostics" / "found.svg").write_text(drawing)
    diagnoses = {"found": Found("not ready", "2.5 <nats>"), "other": Found("ready", "0.5")}
    text = page(replace(make_run(tmp_path, names), diagnoses=diagnoses))
    found = read(text)
    assert found.wrong == []
    assert "2.5 &lt;nats&gt;" in text
    assert "ready up to 1" in text
    assert drawing not in text
    pictures = [a["src"] for e, a in found.elements if e == "img"]
    assert [b64decode(src.partition(",")[2]).decode() for src in pictures] == [drawing]
    assert 'href="#diagnostics"' not in page(make_run(tmp_path, names))


def test_a_study_is_a_section_with_its_tables_and_lines(names, tmp_path):
    study = make_study()
    text = page(replace(make_run(tmp_path, names), evaluation=None, study=study))
    found = read(text)
    assert found.wrong == []
    main = text[text.index("<main") :]
    assert re.findall(r"<p[^>]*>.*?</p>", main)[0] == '<p class="verdict">Own does better than joint &lt;here&gt;.</p>'
    mean = np.mean([run.values["kept"] for run in study.of("random-4")])
    assert f"{mean:.3f} ±" in text
    assert ("a", {"href": "#study"}) in found.elements
    assert "Learned against kept" in text
    assert "Learned against unseen" not in text  # not measured
    assert 'href="#study"' not in page(make_run(tmp_path, names))


def test_sample_answers_show_the_pictures_of_their_rows(tmp_path):
    files = ['0"><script>alert(1)<', "1.png"]  # a picture's name is text from data, too
    (tmp_path / "data" / "d" / files[0]).mkdir(parents=True)
    files[0] += "/svg onload=alert(2)>.png"
    save(picture("red", (224, 160)), tmp_path / "data" / "d" / files[0])
    save(picture("blue", (32, 48)), tmp_path / "data" / "d" / files[1])
    for part in ("train", "test"):
        rows = [{"image": files[i], "prompt": "<image>\nWhich?", "completion": "a"} for i in (0, 1)]
        (tmp_path / "data" / "d" / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    base = open_base(make_vision_base("llava", tmp_path / "base"))
    settings = {"name": "t", "model": {"base": "none"}, "mixture": {"folder": str(tmp_path / "data")}}
    counts = prepare_mixture(parse_recipe(settings, folder=tmp_path), base, tmp_path / "mixture")
    models = tmp_path / "evaluation" / "models"
    models.mkdir(parents=True)
    answer = {"part": "mixture", "dataset": "d", "match": True, "prompt": "Which?", "answer": "a", "reference": "a"}
    rows = [json.dumps(answer | {"row": row}) for row in (0, 1)]
    (models / "merged.answers.jsonl").write_text("\n".join(rows), encoding="utf-8")
    text = page(replace(make_run(tmp_path, [f"d{i}" for i in range(8)]), counts=tuple(counts)))
    answers = text[text.index('id="answers"') :]
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', answers[: answers.index("</table>")])
    shown = [Image.open(BytesIO(b64decode(source))).convert("RGB") for source in sources]
    assert read(text).wrong == []
    assert "<script>alert" not in text
    assert "<svg onload" not in text
    assert [image.size for image in shown] == [(112, 80), (32, 48)]
    assert [image.getpixel((8, 8)) for image in shown] == [COLOURS["red"], COLOURS["blue"]]


@pytest.mark.parametrize(("count", "limit"), [(8, 200_000), (200, 1_500_000)])
def test_size_stays_small(count, limit, tmp_path):
    text = page(make_run(tmp_path, [f"dataset-{i:04d}" for i in range(count)]))
    assert len(text.encode()) < limit


def test_scale_ticks_are_round_and_inside():
    for low, high in ((0.0, 1.0), (-3.2, 17.9), (1e-7, 3e-7), (5.0, 5.0)):
        scale = charts._Scale.over([low, high], 0.0, 100.0)
        assert 2 <= len(scale.ticks) <= 11
        assert all(scale.low <= tick <= scale.high for tick in scale.ticks)
        assert scale(scale.low) == 0.0
        assert scale(scale.high) == pytest.approx(100.0)


def test_thinned_curve_keeps_the_mean():
    values = np.random.default_rng(0).normal(size=1200)
    at, means = charts.thin(values, 120)
    assert len(at) == len(means) == 120
    assert means.mean() == pytest.approx(values.mean())
    at, means = charts.thin(values[:7], 120)
    assert means.tolist() == values[:7].tolist()


def test_names_next_to_points_do_not_cover_each_other():
    points = [charts.Point(f"name {i}", 0.01 * (i % 3), 0.01 * (i // 3), 0) for i in range(12)]
    drawn = charts.scatter("s", points, ("x", "y"), ["group 0"])
    shown = re.findall(r'<text x="([\d.-]+)" y="([\d.-]+)" text-anchor="start" class="name">([^<]*)', drawn)
    boxes = [(float(x), float(y), 5.4 * len(name)) for x, y, name in shown]
    for i, (x, y, wide) in enumerate(boxes):
        assert not any(abs(y - b) < 11 and x < a + w and a < x + wide for a, b, w in boxes[:i])
    assert drawn.count("<title>name ") == 12  # all are named on hover
