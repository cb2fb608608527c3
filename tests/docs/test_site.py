"""The documentation: every page is in the site, the reference is whole, recipes and links in the pages are valid."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from merit.cli.commands import app
from merit.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference():
    return script("write_reference")


def pages(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [page for value in values for page in pages(value)]


def test_every_page_is_in_the_site_and_every_entry_is_a_page():
    nav = set(pages(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]))
    written = {"reference/recipe.md", "reference/cli.md", "results/index.md"}
    assert nav == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} | written


def keys(model: type[BaseModel]) -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        found.add(name)
        for part in re.findall(r"merit\.recipe\.[\w.]+", str(field.annotation)):
            module, _, kind = part.rpartition(".")
            inner = getattr(sys.modules.get(module), kind, None)
            if isinstance(inner, type) and issubclass(inner, BaseModel) and inner is not model:
                found |= keys(inner)
    return found


def test_the_recipe_reference_has_every_key_with_a_meaning(reference):
    text = reference.recipe_page()
    assert keys(Recipe) > {"learning_rate", "max_pixels", "kept_folder", "rank"}
    for key in keys(Recipe):
        assert f"| `{key}` |" in text, key
    for line in text.splitlines():
        if re.match(r"\| `\w+` \|", line) and "[block]" not in line:
            assert line.rstrip(" |").count("|") >= 4, f"no meaning: {line}"


def test_the_command_reference_has_every_command_and_option(reference):
    import typer

    text = reference.cli_page()
    command = typer.main.get_command(app)
    for name, found in command.commands.items():
        assert f"## `merit {name}`" in text
        for parameter in found.params:
            for option in parameter.opts:
                assert not option.startswith("--") or re.search(rf"[`\s]{option}[`\s]", text), (name, option)


def test_links_between_pages_lead_somewhere():
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and "reference/" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_recipes_in_the_pages_are_valid():
    """Blocks that are whole recipes or parts of one: unknown keys and wrong values are refused."""
    seen = 0
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md"]:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            value = yaml.safe_load(block)
            if not isinstance(value, dict) or not set(value) <= set(Recipe.model_fields) or "..." in value.values():
                continue
            whole = {"name": "x", "model": {"base": "org/base"}, "mixture": {"folder": "data"}}
            for key, part in value.items():
                whole[key] = {**whole[key], **part} if key == "model" and "base" not in part else part
            if "split" not in value and "weights" in str(value.get("merge", "")):
                whole["split"] = {"axes": 1}  # the pages' lists are of two branches
            Recipe.model_validate(whole)
            seen += 1
    assert seen >= 5
