"""Who may import whom: pure maths, model-facing code and storage are kept apart, and only the pipeline joins them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import merit

SOURCE = Path(merit.__file__).parent
PURE = (
    "merit.split",
    "merit.merge.operators",
    "merit.merge.arithmetic",
    "merit.conflict.geometry",
    "merit.conflict.reliability",
    "merit.conflict.stability",
    "merit.conflict.sketch",
    "merit.evaluation.text",
    "merit.evaluation.summary",
    "merit.evaluation.verdict",
)
STORAGE = ("merit.hf.checkpoint", "merit.run.store", "merit.conflict.store")
MODEL_FACING = (
    "merit.hf.models",
    "merit.hf.batches",
    "merit.hf.families",
    "merit.train.branch",
    "merit.train.trainer",
    "merit.prepare.assemble",
    "merit.prepare.encoder",
    "merit.conflict.gradients",
    "merit.evaluation.heldout",
    "merit.evaluation.decode",
    "merit.evaluation.drift",
)
JOINING = (
    "merit.run.chain",
    "merit.run.branches",
    "merit.run.merging",
    "merit.run.evaluating",
    "merit.run.scale_search",
    "merit.prepare.stage",
    "merit.run.key",
    "merit.cli",
)
ML = ("transformers", "trl", "peft", "accelerate", "datasets")


def name_of(file: Path) -> str:
    parts = ("merit", *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    """Modules imported anywhere in a file, except for type checking only."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, families: tuple[str, ...]) -> bool:
    return any(module == family or module.startswith(family + ".") for family in families)


MODULES = {name_of(file): imports(file) for file in sorted(SOURCE.rglob("*.py"))}


def offenders(families: tuple[str, ...], forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{module} imports {found}"
        for module, imported in MODULES.items()
        if within(module, families)
        for found in sorted(imported)
        if within(found, forbidden)
    ]


def test_pure_modules_know_no_model_no_file_and_no_pipeline() -> None:
    assert not offenders(
        PURE,
        (
            *MODEL_FACING,
            *STORAGE,
            *JOINING,
            *ML,
            "merit.mixture",
            "merit.recipe.schema",
            "merit.recipe.load",
            "merit.demo",
        ),
    )


def test_storage_knows_no_model_and_no_pipeline() -> None:
    assert not offenders(
        STORAGE, (*MODEL_FACING, *JOINING, *ML, "torch", "merit.recipe.schema", "merit.recipe.load", "merit.mixture")
    )


def test_model_facing_modules_choose_no_stages() -> None:
    assert not offenders(MODEL_FACING, JOINING)


def test_only_joining_modules_know_the_pipeline() -> None:
    insiders = (*JOINING, "merit.run.merge_command", "merit.__main__")
    outside = tuple(module for module in MODULES if module != "merit" and not within(module, insiders))
    assert not offenders(outside, ("merit.run.chain", "merit.cli"))


def test_the_families_name_modules_that_exist() -> None:
    for family in (*PURE, *STORAGE, *MODEL_FACING, *JOINING):
        assert any(within(module, (family,)) for module in MODULES), family


def test_every_module_says_what_it_does() -> None:
    for file in SOURCE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), file


def test_public_names_are_pinned_and_load() -> None:
    assert merit.__all__ == [
        "Branch", "MeritError", "Pipeline", "Recipe", "UserError",
        "load_recipe", "parse_recipe", "plan_merge", "run_merge", "split_mixture",
    ]  # fmt: skip
    for name in merit.__all__:
        assert getattr(merit, name).__module__.startswith("merit.")
    with pytest.raises(AttributeError, match="nothing"):
        _ = merit.nothing


def test_import_merit_imports_nothing_heavy() -> None:
    code = "import sys, merit; assert not {'torch', 'numpy', 'pydantic', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
