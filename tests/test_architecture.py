"""The rules that keep the house in shape: layers, one writer, sizes, true messages, mirrored tests.

Each rule lists what breaks it. ``NOT_YET`` names what may still break it; an entry that is no longer needed fails the
test too, so that the list only shrinks.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

import merit
from merit.recipe.load import recipe_schema

SOURCE = Path(merit.__file__).parent
TESTS = Path(__file__).parent
LEAVES = ("recipe", "files", "signals", "progress", "parallel", "errors")
STAGES = {
    "mixture": (),
    "split": ("mixture",),
    "conflict": ("mixture", "split"),
    "train": ("mixture", "launch"),
    "launch": (),
    "merge": ("mixture",),
    "evaluation": ("mixture",),
    "diagnostics": ("mixture", "split", "conflict", "train", "merge", "evaluation", "theory"),
    "prepare": ("mixture", "split", "conflict", "train", "merge", "evaluation", "launch"),
    "demo": (),
    "theory": (),
}
"""Stage packages, and the stage packages that each may import."""
LAYERS = (("__init__", "__main__", "cli"), ("report",), ("study",), ("run",), tuple(STAGES), ("hf",), LEAVES)
"""From top to bottom: a module imports from lower layers, or from its own package."""
ML = {"torch", "transformers", "accelerate", "peft", "datasets", "sklearn", "scipy"}
LONGEST = 400

# not yet: begin
NOT_YET: dict[str, set[str]] = {
    "layers": set(),
    "circles": set(),
    "package circles": set(),
    "writers": set(),
    "length": set(),
    "flags": set(),
    "keys": set(),
    "mirror": set(),
}
# not yet: end


# ---- the tree, parsed once ------------------------------------------------------------------------------------------


def name_of(file: Path) -> str:
    parts = ("merit", *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}


def imported(module: str) -> set[str]:
    """Modules of this package that a module imports anywhere, for type checking too."""
    names: set[str] = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name in FILES}
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in whole if name in FILES} or {node.module}
    return names - {module, "merit"}


IMPORTS = {module: imported(module) for module in FILES}


def package(module: str) -> str:
    """The package or top-level module that a module belongs to: ``mixture`` for ``merit.mixture.encode``."""
    return module.split(".")[1] if "." in module else "__init__"


def check(rule: str, broken: dict[str, Any]) -> None:
    """Compare what breaks a rule with what still may."""
    new = {name: broken[name] for name in sorted(broken.keys() - NOT_YET[rule])}
    assert not new, f"{rule}: " + "; ".join(f"{name}: {why}" for name, why in new.items())
    assert not NOT_YET[rule] - broken.keys(), f"{rule}: fulfilled now, remove from NOT_YET"


# ---- who imports whom -----------------------------------------------------------------------------------------------


def allowed(importer: str, target: str) -> bool:
    if importer == target:
        return True
    rank = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    if importer in STAGES and target in STAGES:
        return target in STAGES[importer]
    lower = rank[target] > rank[importer]
    return lower or (importer in LEAVES and target in LEAVES) or importer in ("__init__", "__main__")


def test_every_module_has_a_layer() -> None:
    placed = {name for layer in LAYERS for name in layer}
    assert {package(module) for module in FILES} <= placed


def test_modules_import_from_lower_layers_only() -> None:
    broken = {
        module: sorted(wrong)
        for module, names in IMPORTS.items()
        if (wrong := {name for name in names if not allowed(package(module), package(name))})
    }
    check("layers", broken)


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Sets of nodes that reach each other."""

    @cache
    def reach(start: str) -> frozenset[str]:
        seen: set[str] = set()
        queue = [start]
        while queue:
            for name in edges.get(queue.pop(), set()) - seen:
                seen.add(name)
                queue.append(name)
        return frozenset(seen)

    return [{b for b in edges if b in reach(a) and a in reach(b)} for a in edges if a in reach(a)]


def test_no_circles() -> None:
    check("circles", {name: sorted(circle) for circle in circles(IMPORTS) for name in circle})
    between: dict[str, set[str]] = {}
    for module, names in IMPORTS.items():
        targets = {package(name) for name in names} - {package(module)}
        between.setdefault(package(module), set()).update(targets)
    check("package circles", {name: sorted(circle) for circle in circles(between) for name in circle})


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}, {"b", "c"}]


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("merit", ML | {"numpy", "pydantic", "typer", "yaml"}),
        ("merit.cli", ML | {"numpy", "pydantic", "typer", "yaml"}),
        ("merit.cli.commands", ML),
        ("merit.recipe.load", ML),
        ("merit.files", ML),
        ("merit.merge", ML),
        ("merit.run.status", ML),
        ("merit.run.merge_command", ML),
        ("merit.demo", ML),
    ],
)
def test_light_modules_import_nothing_heavy(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; sys.exit(', '.join({heavy!r} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_kmeans_library_is_loaded_by_kmeans_alone() -> None:
    code = "import sys, merit.split, merit.run.chain, merit.study.stage; sys.exit('sklearn' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom merit.cli.commands import app\n"
        "try: app(['--help'], standalone_mode=False)\nexcept SystemExit: pass\n"
        f"sys.exit(', '.join({ML!r} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_recipes_error_is_told_before_anything_heavy_is_imported(command: str, tmp_path: Path) -> None:
    """The starter recipe as it is, and one that is no YAML: told in a third of a second, not after PyTorch's start."""
    starter = (SOURCE / "starter_recipe.yaml").read_text(encoding="utf-8")
    for text, named in ((starter, "placeholder"), (starter.replace("seed: 0", "seed: ["), "YAML")):
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        code = (
            f"import sys\nfrom merit.cli import main\nsys.argv = ['merit', {command!r}, 'recipe.yaml']\n"
            f"try: main()\nexcept SystemExit as end: code = end.code\n"
            f"sys.exit(', '.join({ML!r} & set(sys.modules)) or code)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        assert named in result.stderr
        assert list(tmp_path.iterdir()) == [tmp_path / "recipe.yaml"]


RULES = {"PLC0415", "ANN401", "SLF001", "PLR0913", "C901"}


def test_lint_exceptions_are_still_needed() -> None:
    """pyproject.toml excepts a package from a rule only while something in it breaks the rule."""
    root = TESTS.parent
    lint = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    limits = [f"lint.pylint.max-args={lint['pylint']['max-args']}"]
    limits += [f"lint.mccabe.max-complexity={lint['mccabe']['max-complexity']}"]
    assert set(lint["select"]) >= RULES
    words = ["check", "--isolated", "--select", ",".join(RULES), "--output-format", "json", "src"]
    words += [word for limit in limits for word in ("--config", limit)]
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *words], cwd=root, capture_output=True, text=True, check=False
    )
    needed: dict[str, set[str]] = {}
    for found in json.loads(result.stdout):
        place = Path(found["filename"]).relative_to(SOURCE)
        name = f"src/merit/{place.parts[0]}/**" if len(place.parts) > 1 else f"src/merit/{place}"
        needed.setdefault(name, set()).add(found["code"])
    excepted = {name: set(codes) & RULES for name, codes in lint["per-file-ignores"].items() if name.startswith("src/")}
    unneeded = {name: codes - needed.get(name, set()) for name, codes in excepted.items()}
    assert not {name: codes for name, codes in unneeded.items() if codes}


# ---- one writer, short modules --------------------------------------------------------------------------------------


def writes(module: str) -> Iterator[str]:
    """Calls that write, rename or look for space without :mod:`merit.files`."""
    for node in ast.walk(TREES[module]):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        name = call.rpartition(".")[2]
        texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        texts += [k.value.value for k in node.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
        modes = [text for text in texts if re.fullmatch(r"[wax]b?\+?|r\+b?|rb\+", str(text))]
        if (
            (name in ("open", "fdopen") and modes)
            or (name in ("write_text", "write_bytes") and "." in call and not call.startswith("files."))
            or call in ("os.replace", "os.rename", "os.renames", "shutil.move", "shutil.disk_usage", "os.statvfs")
            or (name == "rename" and len(node.args) == 1)
            or (name == "replace" and len(node.args) == 1 and not node.keywords)
        ):
            yield f"line {node.lineno}: {call}(...)"


def test_only_files_writes() -> None:
    check(
        "writers", {module: list(writes(module)) for module in FILES if module != "merit.files" and any(writes(module))}
    )


def test_modules_are_short_and_say_what_they_do() -> None:
    lines = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in FILES.items()}
    check("length", {module: f"{count} lines" for module, count in lines.items() if count > LONGEST})
    assert not [module for module, tree in TREES.items() if not ast.get_docstring(tree)]


# ---- messages name what exists --------------------------------------------------------------------------------------

FOREIGN_FLAGS = {
    *("--head", "--requeue", "--parsable", "--me", "--noheader", "--array"),
    *("--model", "--tasks", "--batch", "--limit"),
}
"""Options of other programs (Ray's, Slurm's; lmms-eval's) that a text may name."""


def texts(module: str) -> Iterator[tuple[int, str]]:
    """String literals of a module, docstrings left out; the gaps of f-strings are a space."""
    tree = TREES[module]
    docs = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            docs |= {id(part) for part in node.values}
            parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


def options() -> set[str]:
    """Every option of every command."""
    from merit.cli.commands import app

    command = typer.main.get_command(app)
    commands, waiting = [], [command]
    while waiting:
        commands.append(one := waiting.pop())
        waiting += getattr(one, "commands", {}).values()
    return {name for one in commands for p in one.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}


def test_every_flag_in_a_message_exists() -> None:
    """Fails on commit f5727a1: three messages advised ``--skip-bad``, which no command had."""
    known = options() | FOREIGN_FLAGS
    broken: dict[str, list[str]] = {}
    for module in FILES:
        for line, text in texts(module):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text):
                if flag not in known:
                    broken.setdefault(module, []).append(f"line {line}: {flag}")
    check("flags", broken)


def keys_of(schema: dict[str, Any], node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every recipe key, dotted; ``*`` stands for a list's items and for names that the user gives."""
    for part in (*node.get("anyOf", ()), *node.get("allOf", ()), *node.get("oneOf", ())):
        yield from keys_of(schema, part, prefix)
    if "$ref" in node:
        yield from keys_of(schema, schema["$defs"][node["$ref"].rpartition("/")[2]], prefix)
    if isinstance(node.get("items"), dict):
        yield from keys_of(schema, node["items"], prefix + "*.")
    if isinstance(node.get("additionalProperties"), dict) or node.get("additionalProperties") is True:
        yield prefix + "**"
    for name, inner in node.get("properties", {}).items():
        yield prefix + name
        yield from keys_of(schema, inner, f"{prefix}{name}.")


def is_key(dotted: str, known: set[str]) -> bool:
    pattern = dotted.replace("\0", "*")
    for key in known:
        expected, found = key.split("."), pattern.split(".")
        if expected[-1] == "**" and len(found) >= len(expected):
            expected, found = expected[:-1], found[: len(expected) - 1]
        if len(expected) == len(found) and all("*" in (a, b) or a == b for a, b in zip(expected, found, strict=True)):
            return True
    return False


FILE_ENDINGS = (
    "json",
    "jsonl",
    "npz",
    "npy",
    "parquet",
    "yaml",
    "py",
    "txt",
    "md",
    "safetensors",
    "c",
    "so",
    "html",
    "sh",
    "sbatch",
)
TENSORS = ("model.layers.", "model.language_model.", "model.vision_tower.", "model.multi_modal_projector.")


def test_every_recipe_key_in_a_message_exists() -> None:
    schema = recipe_schema()
    known = set(keys_of(schema, schema))
    blocks = "|".join(name for name in schema["properties"] if any(key.startswith(f"{name}.") for key in known))
    broken: dict[str, list[str]] = {}
    for module in FILES:
        for line, text in texts(module):
            for match in re.finditer(rf"(?<![\w./-])(?:{blocks})(?:\.[a-z_]+|\.\0)+(?![\w(/])", text):
                key = match[0]
                file = any(part in FILE_ENDINGS for part in key.split("."))
                if not file and not key.startswith(TENSORS) and not is_key(key, known):
                    broken.setdefault(module, []).append(f"line {line}: {key}")
    check("keys", broken)


def test_invented_keys_are_noticed() -> None:
    schema = recipe_schema()
    known = set(keys_of(schema, schema))
    assert is_key("train.learning_rate", known)
    assert is_key("mixture.images.bad", known)
    assert is_key("mixture.datasets.\0.samples", known)
    assert not is_key("train.lerning_rate", known)
    assert not is_key("mixture.skip_bad", known)


# ---- the public names and the tests ---------------------------------------------------------------------------------


def test_public_names_are_pinned_and_load() -> None:
    assert merit.__all__ == [
        "Base", "Branch", "BranchResult", "Evaluation", "Geometry", "MergeResult", "MeritError", "Mixture", "Recipe",
        "Split", "UserError", "encode_mixture", "evaluate", "find_datasets", "load_recipe", "measure_gradients",
        "merge_branches", "open_base", "split_mixture", "train_branch",
    ]  # fmt: skip
    for name in merit.__all__:
        assert getattr(merit, name).__module__.startswith("merit.")
    with pytest.raises(AttributeError, match="nothing"):
        _ = merit.nothing


def test_tests_mirror_the_package() -> None:
    """A folder of tests is a package's, a file at the top is a module's."""
    packages = {package(module) for module in FILES} | {"e2e", "scripts", "benchmarks", "examples", "docs"}
    broken = {}
    for file in TESTS.rglob("test_*.py"):
        place = file.relative_to(TESTS)
        top = place.parts[0] if len(place.parts) > 1 else place.stem.removeprefix("test_")
        if top not in packages | {"architecture"}:
            broken[str(place)] = f"no package or module merit.{top}"
    check("mirror", broken)
