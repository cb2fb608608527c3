"""What the README and the pages tell a reader to type: commands and Python blocks run as they stand, on a tiny base."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from tests.builders import TASKS, make_base, task_rows, write_rows

from merit.cli.commands import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLACEHOLDER = "Qwen/Qwen2.5-0.5B"
PYTHON = (
    "docs/python-api.md",
    "README.md",
    "docs/evaluation.md",
    "docs/training.md",
    "docs/merge.md",
    "docs/preparation.md",
)
"""Pages with Python, in the order in which one's blocks may use what an earlier one's made."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def here(base: Path, tmp_path, monkeypatch) -> Path:
    """A working directory with what the pages speak of: data/mixture, and checkpoints of the base."""
    for seed, task in enumerate(TASKS):
        folder = tmp_path / "data" / "mixture" / ("gsm8k" if not seed else task)
        write_rows(folder / "train.jsonl", task_rows(task, 12, seed))
        write_rows(folder / "test.jsonl", task_rows(task, 3, 90 + seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_the_starter(recipe: Path, base: Path, *, settings: bool) -> None:
    """Edit the starter recipe as a reader would. The tiny base has a context of 128 tokens."""
    text = recipe.read_text(encoding="utf-8").replace("max_length: 2048", "max_length: 96")
    if settings:
        text = text.replace("PATH_OR_HUB_ID", str(base)).replace("PATH_TO_MIXTURE", "data/mixture")
        text = text.replace("baselines: [joint, random]", "baselines: []")
    recipe.write_text(text, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_commands_run_as_they_stand(page, merit, base, here):
    lines = [line for block in blocks(ROOT / page, "bash") for line in block.splitlines() if line.startswith("merit ")]
    assert [line.split()[1] for line in lines[:3]] == ["init", "check", "run"]
    for line in lines:
        words = shlex.split(line.replace(PLACEHOLDER, str(base)), comments=True)[1:]
        done = merit(*words)
        assert done.code == 0, f"{line}\n{done.err}"
        if words[0] == "init":
            in_the_starter(here / "recipe.yaml", base, settings=page == "README.md")
    for name in ("report.html", "merged/model/model.safetensors", "evaluation/results.json", "split/split.json"):
        assert (here / "runs" / "my-run" / name).is_file(), name
    if page == "docs/index.md":
        assert (here / "report.html").read_bytes() == (here / "runs/my-run/report.html").read_bytes()


@pytest.mark.slow
def test_the_python_of_the_pages_runs(base, here, capsys):
    written = {page.relative_to(ROOT).as_posix() for page in PAGES if blocks(page, "python")}
    assert written == set(PYTHON)
    text = (ROOT / "src/merit/starter_recipe.yaml").read_text(encoding="utf-8")
    (here / "recipe.yaml").write_text(text, encoding="utf-8")
    in_the_starter(here / "recipe.yaml", base, settings=True)
    for name in ("A", "B", "a", "b", "base"):
        make_base(here / name, seed=ord(name[0]))
    names: dict[str, object] = {}
    for page in PYTHON:
        for source in blocks(ROOT / page, "python"):
            if '"merged"' in source and "merge_branches" in source:
                shutil.rmtree(here / "merged", ignore_errors=True)  # more than one page makes it
            source = source.replace(PLACEHOLDER, str(base)).replace("max_length=2048", "max_length=96")
            source = source.replace('"data/"', '"data/mixture"')
            exec(compile(source, page, "exec"), names)
    assert "base" in capsys.readouterr().out
    for folder in ("merged", "AB"):
        assert (here / folder / "model.safetensors").is_file()


def told() -> Iterator[tuple[str, str]]:
    """Every `merit ...` line of a code block and every one in running text, with the page's name."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
        for block in fenced:
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip().startswith("merit "):
                    yield page.name, line.strip()
        rest = re.sub(r"```\w*\n(.*?)```", "", text, flags=re.DOTALL)
        for line in re.findall(r"`(merit [^`]+)`", rest):
            yield page.name, " ".join(line.split())


def test_every_command_and_option_that_a_page_names_exists():
    root = typer.main.get_command(app)
    seen = 0
    for page, line in told():
        words = shlex.split(line, comments=True)[1:]
        command = root
        while words and hasattr(command, "commands") and not words[0].startswith("-"):
            assert words[0] in command.commands, f"{page}: {line}"
            command = command.commands[words.pop(0)]
        known = {name for item in command.params for name in (*item.opts, *item.secondary_opts)} | {"--help"}
        for word in words:
            if word.startswith("-") and word != "-":
                option = word.split("=")[0].rstrip(",.")
                assert option in known, f"{page}: {line}: {option}"
        seen += 1
    assert seen > 60
