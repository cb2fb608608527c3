"""A branch away from its run: exported, trained alone, taken back; what does not belong is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests import builders
from tests.builders import Case, call, read, weights


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Case:
    """A run of two tiny groups whose branches are trained here; read-only."""
    case = builders.make_case(
        tmp_path_factory.mktemp("home"), base, split={"axes": 1, "method": "random"}, baselines=["joint"]
    )
    for task in list(builders.TASKS)[2:]:
        shutil.rmtree(case.folder / "mixture" / task)
    assert call("run", case.recipe, "--output", case.run, "--until", "merge", "--quiet").code == 0
    return case


@pytest.fixture(scope="module")
def out(home: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Branch 1, exported with its base, trained in another folder as on another machine; read-only."""
    there = tmp_path_factory.mktemp("there") / "one"
    assert call("branch", "export", home.run, 1, "--to", there, "--with-base").code == 0
    moved = there.parent / "moved"
    shutil.move(there, moved)
    done = call("branch", "train", moved, "--quiet")
    assert done.code == 0, done.err
    return moved


def without_branch(home: Case, folder: Path) -> Path:
    shutil.copytree(home.run, folder / "run")
    shutil.rmtree(folder / "run" / "branches" / "1")
    return folder / "run"


def test_a_branch_trained_elsewhere_has_the_same_bits_and_comes_back(home: Case, out: Path, tmp_path: Path) -> None:
    run = without_branch(home, tmp_path)
    result = tmp_path / "only"
    shutil.copytree(out / "branch", result)  # only the result crosses machines
    assert call("branch", "import", run, result, "--quiet").code == 0
    mine, theirs = weights(run / "branches/1/model"), weights(home.run / "branches/1/model")
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert read(run / "branches/1/record.json")["tokens"] == read(home.run / "branches/1/record.json")["tokens"]
    again = call("run", home.recipe, "--output", run, "--until", "merge", "--quiet")
    assert again.code == 0, again.err
    assert call("branch", "import", run, out, "--quiet").code == 0  # once more changes nothing
    assert "merged" not in [row["stage"] for row in status(run) if row["state"] == "stale"]


def status(run: Path) -> list[dict[str, Any]]:
    return list(json.loads(call("status", run, "--json").out)["stages"])


def test_the_folder_says_all_that_is_needed(out: Path, home: Case) -> None:
    manifest = read(out / "branch.json")
    counts = {item["name"]: item for item in read(home.run / "mixture/datasets.json")}
    assert set(manifest["group"]) == set(read(home.run / "split/split.json")["groups"][1])
    assert manifest["tokens"] == sum(counts[name]["tokens"] for name in manifest["group"])
    assert {path.stem for path in (out / "mixture/train").iterdir()} == set(manifest["group"])
    assert os.access(out / "train.sh", os.X_OK)
    assert "merit branch train ." in (out / "train.sh").read_text()
    assert not list(out.rglob("*.bin"))


def test_scheduler_files_have_the_keys_of_their_schemas(out: Path) -> None:
    """SkyPilot's task schema (sky/utils/schemas.py) and batch/v1 Job, as far as these files use them."""
    task = yaml.safe_load((out / "sky.yaml").read_text())
    assert task.keys() <= {
        "name",
        "workdir",
        "resources",
        "envs",
        "file_mounts",
        "setup",
        "run",
        "num_nodes",
        "secrets",
    }
    assert task["resources"].keys() <= {"accelerators", "use_spot", "job_recovery", "cpus", "memory", "disk_size"}
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    assert all(
        mount.keys() <= {"name", "source", "store", "mode", "persistent"} for mount in task["file_mounts"].values()
    )
    job = yaml.safe_load((out / "kubernetes.yaml").read_text())
    assert "CANNOT START" not in (out / "sky.yaml").read_text()  # the base is in the folder
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # required by podFailurePolicy
    assert pod["containers"][0]["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert all(len(rule.keys() & {"onExitCodes", "onPodConditions"}) == 1 for rule in rules)
    assert rules[1]["onExitCodes"] == {"containerName": "branch", "operator": "In", "values": [2]}
    assert len(job["metadata"]["name"]) <= 63


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train.learning_rate": "1e-4"}, "train.learning_rate: 0.0001 -> 0.005"),
        ({"seed": "3"}, "seed: 3 -> 0"),
    ],
)
def test_a_branch_of_another_recipe_is_refused_by_field(
    home: Case, tmp_path: Path, change: dict[str, str], named: str
) -> None:
    key, value = next(iter(change.items()))
    other = tmp_path / "other"
    shutil.copytree(home.run, other)
    for folder in ("branches", "merged", "baselines"):
        shutil.rmtree(other / folder)
    words = ["split", home.recipe, "--output", other, "--quiet", "--redo", "--set", f"{key}={value}"]
    if key == "seed":
        shutil.rmtree(other / "mixture")
        words[0] = "run"
        words += ["--until", "split"]
    assert call(*words).code == 0
    assert call("branch", "export", other, 0, "--to", tmp_path / "b").code == 0
    assert call("branch", "train", tmp_path / "b", "--quiet").code == 0
    run = without_branch(home, tmp_path)
    found = call("branch", "import", run, tmp_path / "b", "--redo")
    assert found.code == 2
    assert named in " ".join(found.err.split())
    assert "Nothing was changed" in found.err


def refused(run: Path, folder: Path) -> str:
    found = call("branch", "import", run, folder)
    assert found.code == 2, found.err
    assert not (run / "branches/1/record.json").exists()
    return " ".join(found.err.split())


def test_damage_version_and_foreign_files_are_refused(home: Case, out: Path, tmp_path: Path) -> None:
    from merit.files import sealed

    run, there = without_branch(home, tmp_path), tmp_path / "b"
    shutil.copytree(out / "branch", there)
    record = read(there / "record.json")

    def write(**changes: Any) -> None:
        (there / "record.json").write_text(json.dumps(sealed({**record, **changes})))

    write(merit="0.1.9")
    assert "merit: 0.1.9 -> " in refused(run, there)
    write(outputs={**record["outputs"], "../evil.json": {"bytes": 1, "xxh3": "0"}})
    assert "outside its folder" in refused(run, there)
    write(outputs={**record["outputs"], "model/x.py": {"bytes": 1, "xxh3": "0"}})
    assert "could run code" in refused(run, there)
    write(inputs={**record["inputs"], "base": "0" * 64})
    assert "input.base: " in refused(run, there)
    name = next(key for key in record["inputs"] if key.startswith("rows of "))
    write(inputs={**record["inputs"], name: "0" * 64})
    assert f"input.{name}: " in refused(run, there)
    write()
    data = bytearray((there / "model/model.safetensors").read_bytes())
    data[-1] ^= 1
    (there / "model/model.safetensors").write_bytes(data)
    assert "model.safetensors is damaged" in refused(run, there)
    (there / "record.json").unlink()
    assert "not trained to its end" in refused(run, there)
    assert "not an exported branch" in refused(run, home.folder / "mixture")


def test_another_base_or_changed_rows_are_refused_before_training(home: Case, out: Path, tmp_path: Path) -> None:
    there = tmp_path / "b"
    assert call("branch", "export", home.run, 1, "--to", there, "--refer-to-data").code == 0
    assert not (there / "mixture").exists()
    for name in ("sky.yaml", "kubernetes.yaml"):  # the base is a folder of this machine only
        first, second = (there / name).read_text().splitlines()[:2]
        assert first.startswith("# CANNOT START AS IT IS")
        assert "--with-base" in second
        assert "--base DIR" in second
    other = builders.make_base(tmp_path / "other", seed=5)
    found = call("branch", "train", there, "--base", other)
    assert found.code == 2
    assert "is not the base of this branch: base: " in " ".join(found.err.split())
    recipe = (there / "recipe.yaml").read_text()
    (there / "recipe.yaml").write_text(recipe.replace("learning_rate: 0.005", "learning_rate: 0.006"))
    found = call("branch", "train", there)
    assert found.code == 2
    assert "train.learning_rate: 0.005 -> 0.006" in found.err
    assert not (there / "branch").exists()


def test_set_says_how_to_compute_and_never_what(home: Case, out: Path, tmp_path: Path) -> None:
    run, what = without_branch(home, tmp_path), ("--set", "train.learning_rate=1e-4")
    words = ["branch", "export", run, 1, "--to", tmp_path / "b", "--refer-to-data"]
    for command in (words, ["branch", "import", run, out]):
        found = call(*command, *what)
        assert found.code == 2
        assert "train.learning_rate: 0.005 -> 0.0001" in found.err
    assert not (tmp_path / "b").exists()
    assert call(*words, "--set", "train.checkpoint_minutes=7").code == 0
    assert "checkpoint_minutes: 7" in (tmp_path / "b" / "recipe.yaml").read_text()
    found = call("branch", "train", tmp_path / "b", *what)
    assert found.code == 2
    assert "train.learning_rate: 0.005 -> 0.0001" in found.err
    done = call("branch", "train", tmp_path / "b", "--set", "train.device=cpu", "--quiet")
    assert done.code == 0, done.err
    assert call("branch", "import", run, tmp_path / "b", "--set", "train.device=cpu", "--quiet").code == 0


@pytest.mark.exhaustive
def test_a_killed_export_goes_on(home: Case, out: Path, tmp_path: Path) -> None:
    there = tmp_path / "b"
    assert call("branch", "export", home.run, 1, "--to", there).code == 0
    words = [sys.executable, "-m", "merit", "branch", "train", str(there)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (there / "branch/progress.json").exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
    assert process.returncode in (0, 75), err
    assert call("branch", "train", there, "--quiet").code == 0
    mine, theirs = weights(there / "branch/model"), weights(out / "branch/model")
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


def test_detached_run_hands_over_and_takes_back(home: Case, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(home.run, run)
    for folder in ("branches", "merged", "baselines/joint/branches"):
        shutil.rmtree(run / folder)
    words = ["run", home.recipe, "--output", run, "--until", "merge", "--launch", "detached"]
    first = call(*words)
    assert first.code == 75, first.err
    assert "3 of 3 branches are to be trained elsewhere" in " ".join(first.err.split())
    for name in ("0", "1", "joint-0"):
        assert call("branch", "train", run / "detached" / name, "--quiet").code == 0
    last = call(*words, "--quiet")
    assert last.code == 0, last.err
    mine, theirs = weights(run / "merged/model"), weights(home.run / "merged/model")
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
