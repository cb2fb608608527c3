"""`merit diagnose`: of a finished run, of loose checkpoints, of a recipe; what is kept, reused and refused."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests import builders
from tests.builders import Case, read

from merit.diagnostics.registry import DIAGNOSTICS
from merit.run.diagnose_checkpoints import _names as names_of

SMALL = [
    word
    for setting in ("points=3", "surface_points=5", "noise_seeds=2", "examples=3", "lanczos_steps=4", "hessian_examples=6",
                    "task_examples=4", "probe_steps=4")
    for word in ("--set", f"diagnose.{setting}")
]  # fmt: skip


def png(file: Path) -> bool:
    return file.read_bytes().startswith(b"\x89PNG")


def test_every_diagnostic_of_a_run_has_a_verdict_figures_and_a_record(
    finished: Case, merit: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    result = merit("diagnose", run, *SMALL, "--figures", tmp_path / "figures")
    assert result.code == 0, result.err
    folder = run / "diagnostics"
    for name in DIAGNOSTICS:
        found = read(folder / f"{name}.json")
        assert found["verdict"] in ("ready", "doubtful", "not ready")
        assert all(found[key] for key in ("reason", "rule", "units"))
        assert (folder / name / "record.json").is_file()
        assert png(tmp_path / "figures" / f"{name}.png")
        assert (tmp_path / "figures" / f"{name}.svg").read_text().startswith("<?xml")
        assert name in result.out
    measured, kept = read(folder / "displacement.json"), read(run / "merged" / "model" / "merge.json")["displacements"]
    norms = dict(zip(measured["models"], measured["norms"], strict=True))
    branches = [norms[name] for name in norms if name.startswith("branch-")]
    merged = [*kept["branches"], kept["merged"], kept["base"]]
    assert merged == pytest.approx([*branches, norms["merged"], measured["base_norm"]], rel=1e-5)
    moved = read(run / "evaluation" / "record.json")["displacements"]["joint"]
    assert moved["branches"] == []
    assert [moved["base"], moved["merged"]] == pytest.approx([kept["base"], norms["joint"]], rel=1e-5)
    assert f"{100 * moved['merged'] / moved['base']:.3f}%" in (run / "report.html").read_text(encoding="utf-8")
    record = read(folder / "gain" / "record.json")
    assert {"base", "merged", "joint", "branch-0", "geometry", "split"} <= set(record["inputs"])
    before = builders.snapshot(folder / "gain")
    again = merit("diagnose", run, *SMALL, "--only", "gain", "--json")
    assert set(parsed(again.out)["diagnostics"]) == {"gain"}
    assert builders.snapshot(folder / "gain") == before
    changed = merit("diagnose", run, *SMALL, "--only", "gain", "--set", "diagnose.hessian_examples=8")
    assert changed.code == 2
    assert "diagnose.hessian_examples" in changed.err
    unknown = merit("diagnose", run, "--only", "gian")
    assert unknown.code == 2
    assert "Did you mean 'gain'?" in unknown.err


def parsed(text: str) -> Any:
    return json.loads(text)


def test_loose_checkpoints_are_diagnosed_with_rows_from_a_folder(case: Case, base: Path, merit: Any) -> None:
    others = [builders.make_base(case.folder / name, seed=seed) for seed, name in ((0, "a"), (5, "b"))]
    words = [
        "--base",
        base,
        "--checkpoint",
        others[0],
        "--checkpoint",
        f"{others[1]}=2",
        "--rows",
        case.folder / "mixture",
    ]
    result = merit("diagnose", *words, "--only", "displacement", "--only", "gap", "--json")
    assert result.code == 0, result.err
    found = parsed(result.out)["diagnostics"]
    assert found["displacement"]["models"] == ["a", "b", "average"]
    assert found["displacement"]["norms"][0] == 0  # the base's own weights again
    assert found["displacement"]["norms"][2] == pytest.approx(2 / 3 * found["displacement"]["norms"][1], rel=1e-6)
    assert {line["model"] for line in found["gap"]["lines"]} == {"base", "a", "b", "merged"}


def test_every_checkpoint_has_a_name_of_its_own() -> None:
    paths = [Path("x/a"), Path("y/a/model"), Path("z/average"), Path("a-1"), Path("base/model")]
    assert names_of(paths) == ["a", "a-1", "average-2", "a-1-3", "base-4"]


def test_without_matplotlib_everything_but_the_figures_is_made(
    case: Case, base: Path, merit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    words = ["--base", base, "--checkpoint", base, "--rows", case.folder / "mixture", "--only", "displacement"]
    result = merit("diagnose", *words, "--figures", case.folder / "figures")
    assert result.code == 0, result.err
    assert "'.[plots]'" in result.out
    assert not (case.folder / "figures").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "B"], "--rows"),
        (["--base", "BASE", "--rows", "nowhere"], "--rows nowhere: no such file or folder"),
        (
            ["--base", "BASE", "--rows", "ROWS", "--checkpoint", "nowhere"],
            "--checkpoint nowhere: expected",
        ),
        (["--base", "BASE", "--rows", "ROWS", "--only", "gain"], "it needs 2 branches or more, there are 0"),
        (["--base", "BASE", "--rows", "ROWS", "--redo"], "--redo"),
        (["RUN", "--base", "BASE"], "not both"),
        (["--probe"], "give a recipe"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(
    case: Case, base: Path, merit: Any, words: list[str], message: str
) -> None:
    places = {"BASE": base, "ROWS": case.folder / "mixture", "RUN": case.recipe}
    result = merit("diagnose", *(places.get(word, word) for word in words))
    assert result.code == 2
    assert message in result.err


def test_a_run_without_branches_is_told_what_to_do(case: Case, merit: Any) -> None:
    merit("run", case.recipe, "--output", case.run, "--until", "mixture", "--quiet")
    result = merit("diagnose", case.run)
    assert result.code == 2
    assert "is not split yet" in result.err
    merit("run", case.recipe, "--output", case.run, "--until", "split", "--quiet", "--set", "split.method=random")
    result = merit("diagnose", case.run)
    assert result.code == 2
    assert "diagnose: branches 0, 1 of 2 not trained yet" in result.err
    assert "merge: " not in result.err


def test_a_recipe_is_probed_before_it_is_trained(case: Case, merit: Any) -> None:
    result = merit("diagnose", "--probe", case.recipe, "--output", case.run, *SMALL)
    assert result.code == 0, result.err
    found = read(case.run / "diagnostics" / "probe.json")
    assert found["steps"] == 4
    assert len(found["own_gain"]) == 2
    assert [answer["verdict"] in ("ready", "doubtful", "not ready") for answer in found["answers"]] == [True] * 4
    assert not list((case.run / "diagnostics" / "probe").glob("*/model"))
    assert not (case.run / "branches").exists()
    again = merit("diagnose", "--probe", case.recipe, "--output", case.run, *SMALL, "--json")
    assert parsed(again.out)["merged_gain"] == found["merged_gain"]
