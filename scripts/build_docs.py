"""Build the documentation site into site/: docs/, the benchmarks' results, and reference pages written from the code.

    python scripts/build_docs.py            # strict: a warning fails the build. Needs the extra `docs`.

The pages are put together in build/docs, where links into the rest of the repository
(../benchmarks/results/x.md) become links within the site.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from write_reference import PAGES

ROOT = Path(__file__).resolve().parents[1]
STAGED = ROOT / "build" / "docs"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def stage() -> None:
    """Put the pages together in build/docs."""
    shutil.rmtree(STAGED, ignore_errors=True)
    shutil.copytree(ROOT / "docs", STAGED)
    for name, page in PAGES.items():
        (STAGED / "reference" / name).write_text(page(), encoding="utf-8")
    results = STAGED / "results"
    results.mkdir()
    for file in sorted((ROOT / "benchmarks" / "results").iterdir()):
        if file.suffix in (".md", ".png", ".svg"):
            shutil.copy2(file, results / file.name)
    listed = "\n".join(f"- [{file.stem}]({file.name})" for file in sorted(results.glob("*.md")))
    text = "# Benchmark results\n\nAs the benchmarks wrote them, each with its date, machine and command.\n\n"
    (results / "index.md").write_text(f"{text}{listed}\n", encoding="utf-8")
    for page in STAGED.rglob("*.md"):
        depth = len(page.relative_to(STAGED).parts) - 1
        page.write_text(_within(page.read_text(encoding="utf-8"), "../" * depth), encoding="utf-8")


def _within(text: str, up: str) -> str:
    """Links that leave docs/ as links within the site; those to other files of the repository as plain code."""
    text = re.sub(r"\]\((?:\.\./)+benchmarks/results/?\)", f"]({up}results/index.md)", text)
    text = re.sub(r"\]\((?:\.\./)+benchmarks/results/", f"]({up}results/", text)
    return re.sub(
        r"\[`?([^\]`]+)`?\]\((?:\.\./)+(?!results/)([\w/.-]+\.(?:py|ipynb|toml|yaml|md))\)", r"\1 (`\2`)", text
    )


def main() -> int:
    """Stage and build; the builder's exit code."""
    stage()
    command = [str(Path(sys.executable).parent / "zensical"), "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(_COLOUR.sub("", done.stdout + done.stderr).strip()[-6000:])
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
