"""What made this: recipe, versions, seeds, hashes, machine; and the commands that make it again."""

from __future__ import annotations

import json
import shlex

import yaml

from merit.progress import duration
from merit.report.page.data import RunData
from merit.report.page.markup import Cell, Html, Row, details, paragraph, section, table, tag


def build(data: RunData) -> Html:
    """Stages with their fingerprints, versions and machines, the recipe, the commands."""
    stages: list[Row] = [
        [
            name,
            Cell(tag("span", record.finished[:19].replace("T", " "), class_="nowrap"), record.finished),
            Cell(duration(record.seconds), record.seconds),
            Cell(str(record.seed), record.seed),
            Cell(tag("code", record.fingerprint[:16]), record.fingerprint),
            Cell(f"{record.host.get('name', '?')}, {record.host.get('cores', '?')} cores"),
        ]
        for name, record in data.records.items()
    ]
    versions: dict[str, set[str]] = {}
    for record in data.records.values():
        for library, version in record.versions.items():
            versions.setdefault(library, set()).add(version)
    libraries: list[Row] = [[library, ", ".join(sorted(found))] for library, found in versions.items()]
    mixed = sorted(library for library, found in versions.items() if len(found) > 1)
    recipe = yaml.safe_dump(json.loads(data.recipe.model_dump_json()), sort_keys=False, allow_unicode=True)
    header = ("stage", "finished (UTC)", "time", "seed", "fingerprint", "machine")
    return section(
        "provenance",
        "Provenance",
        paragraph(
            "Every stage's record.json holds its settings, the fingerprint of every input, and the hash of every file."
        ),
        tag("pre", _commands(data), tabindex="0", aria_label="Commands that reproduce this run", role="region"),
        table("stages", "Stages", header, stages, most=24),
        details("Versions", table("versions", "Versions of what affects results", ("library", "version"), libraries)),
        paragraph(f"Stages were made with different versions of {', '.join(mixed)}.") if mixed else None,
        details("Recipe", tag("pre", recipe, tabindex="0", aria_label="The resolved recipe", role="region")),
    )


def _commands(data: RunData) -> str:
    run = shlex.quote(data.run.name)
    version = next((r.versions.get("merit-tuning", "") for r in data.records.values()), "")
    return (
        f"pip install -e .  # in the checkout of MERIT {version}\n"
        f"merit check {run}/recipe.yaml\n"
        f"merit run {run}/recipe.yaml --output {run}-again\n"
        f"merit report {run}-again"
    )
