"""The page: sections in order, style and script inlined, nothing loaded from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from merit.files import write_text
from merit.recipe.schema import Recipe
from merit.report.page import conflict, diagnosed, groups, merging, provenance, results, studied, training, verdict
from merit.report.page.data import RunData, read_run
from merit.report.page.markup import Html, join, tag

__all__ = ["Written", "page", "write_page"]

SECTIONS = (
    ("verdict", "Verdict", verdict.build),
    ("conflict", "Conflict", conflict.build),
    ("groups", "Groups", groups.build),
    ("training", "Training", training.build),
    ("merge", "Merge", merging.build),
    ("diagnostics", "Merge-readiness", diagnosed.build),
    ("evaluation", "Evaluation", results.build),
    ("study", "Study", studied.build),
    ("provenance", "Provenance", provenance.build),
)
"""Address, short name and builder of every section, top to bottom."""

POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content security policy: whatever the page shows, it loads nothing."""


@dataclass(frozen=True)
class Written:
    """A written page."""

    path: Path
    bytes: int


def write_page(run: Path, output: Path | None = None, recipe: Recipe | None = None) -> Written:
    """Write the page of a run.

    Args:
        run: The run folder; stages that are not done are said to be missing.
        output: Where to; default ``report.html`` in the run folder.
        recipe: Instead of the one in the run folder.

    Raises:
        RunFolderError: A finished stage's file is damaged.
    """
    path = output or run / "report.html"
    text = page(read_run(run, recipe))
    if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
        write_text(path, text)
    return Written(path, len(text.encode("utf-8")))


def page(data: RunData) -> str:
    """The whole page as text."""
    title = f"{data.recipe.name} · MERIT"
    style, script = _asset("style.css"), _asset("page.js")
    built = {key: build(data) for key, _, build in SECTIONS if key not in _left_out(data)}
    links = [tag("li", tag("a", name, href=f"#{key}")) for key, name, _ in SECTIONS if built.get(key)]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content="MERIT"),
        tag("title", title),
        tag("style", Html(style)),
    )
    body = tag(
        "body",
        tag("a", "Skip to the verdict", href="#verdict", class_="skip"),
        tag(
            "header",
            tag("h1", data.recipe.name),
            tag("p", _subtitle(data)),
            tag("nav", tag("ul", *links), aria_label="Sections"),
        ),
        tag("main", *built.values(), id="main"),
        tag("footer", tag("p", "Written by MERIT from the run folder's own results; it loads nothing from elsewhere.")),
        tag("script", Html(script)),
    )
    return join([Html("<!doctype html>\n"), tag("html", head, body, lang="en")]) + "\n"


def _left_out(data: RunData) -> set[str]:
    """Sections of stages that a study does not need; a run's own say that they are not done yet."""
    if data.study is None:
        return set()
    done = {
        "conflict": data.geometry,
        "groups": data.own.split,
        "training": any(method.branches for method in data.methods),
        "merge": data.own.merge,
        "evaluation": data.evaluation,
    }
    return {key for key, found in done.items() if not found}


def _subtitle(data: RunData) -> str:
    groups = len(data.own.split.groups) if data.own.split else 0
    parts = [f"{len(data.counts)} datasets"] if data.counts else []
    if groups:
        parts.append(f"{groups} groups by {data.recipe.split.method}")
    parts += ["base " + "/".join(Path(data.recipe.model.base).parts[-2:]), f"seed {data.recipe.seed}"]
    return " · ".join(parts)


def _asset(name: str) -> str:
    return resources.files("merit.report.page").joinpath(name).read_text(encoding="utf-8")
