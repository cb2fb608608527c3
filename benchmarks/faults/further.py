"""More tiny runs that are damaged: everything that the package writes only where a recipe or a command asks for it."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from benchmarks.faults import launched
from benchmarks.faults.calling import command
from benchmarks.faults.case import (
    CHAIN,
    EVALUATE,
    GRADIENTS,
    MERGE,
    ROWS,
    SPLIT,
    TEST_ROWS,
    TRAIN,
    Place,
    done,
    interrupted_after,
    text_case,
    text_run,
    vision_run,
    words_in,
    write_pictures,
)

DIAGNOSE = (
    *("diagnose", "RUN", "--only", "displacement", "--only", "gap", "--only", "alignment"),
    *("--set", "diagnose.examples=2", "--set", "diagnose.task_examples=2", "--set", "diagnose.points=3"),
)
STUDY = ("study", "RECIPE", "--output", "RUN", "--yes", "--quiet")
PREPARE = ("prepare", "RECIPE", "--output", "RUN", "--quiet")
SEARCH = (
    *("merge", "RUN", "--output", "@run/searched", "--weights", "auto"),
    *("--set", "merge.search.evaluations=10", "--set", "merge.search.rows=2"),
)
ADD, REMOVE = ("add", "RUN", "@double", "--quiet"), ("remove", "RUN", "upper", "--quiet")
TRAIN_OUT, IMPORT = ("branch", "train", "RUN", "--quiet"), ("branch", "import", "RUN", "@out", "--quiet")

PLACES = (
    Place("second moments", "moments", ("run/branches/*/second_moments.safetensors",), (MERGE, CHAIN)),
    Place("unseen tasks: encoded rows", "moments", ("run/mixture/unseen/*",), (EVALUATE, CHAIN)),
    Place("diagnostics", "moments", ("run/diagnostics/*.json", "run/diagnostics/*/*"), (DIAGNOSE,)),
    Place("shared cache of gradients", "cached", ("cache/*",), (GRADIENTS,), unread=True),
    Place("LoRA: adapters and configs", "lora", ("run/branches/*/model/*",), (MERGE, CHAIN)),
    Place("LoRA: merged model", "lora", ("run/merged/**/*",), (MERGE, EVALUATE)),
    Place("rounds: what the last one left", "rounds", ("run/rounds/*/**/*.json*",), (CHAIN, MERGE), unread=True),
    Place(
        "rounds: branches to be merged", "open", ("run/rounds/1/branches/*/*/*",), (("merge", "RUN", "--round", "1"),)
    ),
    Place("rounds: start of the next one", "between", ("run/rounds/1/merged/**/*",), (TRAIN, CHAIN)),
    Place("rounds: optimizer states", "between", ("run/rounds/1/branches/*/state/*/*",), (TRAIN, CHAIN), unread=True),
    Place("study: result and tables", "study", ("run/study/*",), (STUDY,)),
    Place("study: branches and splits", "study", ("run/study/s*/*/branches/**/*", "run/study/s*/*/split/*"), (STUDY,)),
    Place("study: gradients", "study", ("run/study/s*/conflict/*",), (STUDY,)),
    Place("study: merges and lines", "study", ("run/study/s*/merges/**/*", "run/study/s*/lines/**/*"), (STUDY,)),
    Place("study: figures", "study", ("run/study/evaluation/*.json", "run/study/rate/*"), (STUDY,)),
    Place("search of weights, gone on with", "searching", ("run/.searched.search.jsonl",), (SEARCH,), unread=True),
    Place("change of a dataset, gone on with", "adding", ("run/change.json",), (ADD,)),
    Place("first split and statements", "added", ("run/split/*", "run/changes/*"), (REMOVE,), unread=True),
    Place(
        "exported branch",
        "exported",
        ("run/*.json", "run/*.yaml", "run/split/*", "run/mixture/**/*"),
        (TRAIN_OUT,),
        unread=True,
    ),
    Place("exported branch, taken back", "returned", ("out/branch.json", "out/branch/**/*"), (IMPORT,), unread=True),
    Place("preparation: joined and trained models", "prepared", ("run/preparation/**/*",), (PREPARE, CHAIN)),
    Place("preparation: the base made", "prepared", ("run/prepared/**/*",), (PREPARE, CHAIN, SPLIT, MERGE)),
    Place("preparation: checkpoints and rows", "prepared", ("vlm/*", "lm/*", "align/*"), (PREPARE,), unread=True),
)


def moments(folder: Path) -> dict[str, Path]:
    """With second moments, unseen tasks, a shared cache, diagnostics; and before its gradients are compared."""
    from tests import builders

    top = folder / "moments"
    case = text_case(
        top,
        conflict={"examples": 8, "sketch_size": 256, "cache": str(folder / "cached" / "cache")},
        train={"learning_rate": 5e-3, "batch_size": 8, "max_length": 96, "threads": 1, "save_second_moments": True},
        merge={"operator": "fisher"},
        evaluate={"max_new_tokens": 3, "drift": {"prompts": 2, "tokens": 3}, "unseen_folder": "unseen"},
    )
    for task in ("double", "length"):
        builders.write_rows(top / "unseen" / task / "test.jsonl", builders.task_rows(task, TEST_ROWS, 2))
    for _ in range(2):
        done("run", case.recipe, "--output", case.run, "--quiet")
        done(*words_in(DIAGNOSE, top))
    done("run", case.recipe, "--output", case.run, "--quiet")
    cached = Path(shutil.copytree(top, folder / "cached", dirs_exist_ok=True))
    for path in (cached / "run" / "conflict").iterdir():
        if path.is_file() and path.name != ".lock":
            path.unlink()
    return {"moments": top, "cached": cached}


def lora(folder: Path) -> dict[str, Path]:
    """A run of LoRA branches."""
    lora = {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "down_proj"]}
    case = text_case(
        folder / "lora", model={"base": "base", "dtype": "float32", "trainable": "lora", "lora": lora}, name="lora"
    )
    for _ in range(2):
        done("run", case.recipe, "--output", case.run, "--quiet")
    return {"lora": case.folder}


def rounds(folder: Path) -> dict[str, Path]:
    """A run in two rounds: before the first merge, after it, and finished."""
    case = text_case(
        folder / "open",
        train={"learning_rate": 5e-3, "batch_size": 8, "max_length": 96, "threads": 1, "rounds": 2, "epochs": 2},
        evaluate={"heldout": False, "drift": {"prompts": 0}},
    )
    done("run", case.recipe, "--output", case.run, "--quiet", "--until", "split")
    for k in "01":
        done("train", case.run, "--branch", k, "--quiet")
    between = Path(shutil.copytree(case.folder, folder / "between"))
    done("merge", between / "run", "--round", "1", "--quiet")
    rounds = Path(shutil.copytree(between, folder / "rounds"))
    done("run", rounds / "run", "--quiet")
    return {"open": case.folder, "between": between, "rounds": rounds}


def study(folder: Path) -> dict[str, Path]:
    """A finished study of two seeds."""
    case = text_case(
        folder / "study",
        evaluate={"exact_match": "never", "drift": {"prompts": 0}},
        study={"methods": ["base", "joint", "own", "own+ties"], "seeds": 2, "scales": [0.5]},
    )
    for _ in range(2):
        done("study", case.recipe, "--output", case.run, "--yes", "--quiet")
    return {"study": case.folder}


def changes(folder: Path) -> dict[str, Path]:
    """Runs in which weights are searched or a dataset is added, and branches that leave the run and come back."""
    from tests import builders

    from merit.run import training, weight_search

    case = text_case(folder / "source", evaluate={"heldout": True, "drift": {"prompts": 0}})
    builders.write_rows(case.folder / "double" / "train.jsonl", builders.task_rows("double", ROWS, 0))
    builders.write_rows(case.folder / "double" / "test.jsonl", builders.task_rows("double", TEST_ROWS, 1))
    done("run", case.recipe, "--output", case.run, "--quiet", "--until", "merge")
    found = {}
    for moment in ("searching", "adding", "added", "returned"):
        found[moment] = Path(shutil.copytree(case.folder, folder / moment))
    with interrupted_after(6, weight_search._Log, "measured"):
        stopped = command(*words_in(SEARCH, found["searching"]))
    assert stopped.code == 75, stopped
    with interrupted_after(1, training, "train_branch"):
        stopped = command("add", found["adding"] / "run", found["adding"] / "double", "--quiet")
    assert stopped.code == 75, stopped
    done("add", found["added"] / "run", found["added"] / "double", "--quiet")
    found["exported"] = folder / "exported"
    done("branch", "export", case.run, 1, "--to", found["exported"] / "run", "--with-base")
    back = found["returned"]
    done("branch", "export", back / "run", 1, "--to", back / "out", "--with-base")
    done("branch", "train", back / "out", "--quiet")
    shutil.rmtree(back / "run" / "branches" / "1")
    shutil.rmtree(back / "run" / "merged")
    return found


def prepared(folder: Path) -> dict[str, Path]:
    """A vision base joined, trained in two stages, and a run from it."""
    import yaml
    from tests import builders
    from tests.prepare.test_assemble import make_language_model

    top = folder / "prepared"
    builders.make_vision_base("qwen2_5_vl", top / "vlm")
    make_language_model(top / "lm", hidden_size=48, num_attention_heads=2, dtype="float32")
    write_pictures(top / "align", "colour", "train", 10)
    for number, task in enumerate(("colour", "shout")):
        for split, count in (("train", 8 + 2 * number), ("test", 2)):
            write_pictures(top / "mixture" / task, task, split, count)
    stages = [
        {
            "name": name,
            "mixture": {"datasets": [{"name": f"{name}-data", "path": "align/train.jsonl", "images": "align"}]},
            "trainable": trainable,
        }
        for name, trainable in (("align", "projector"), ("instruct", "language"))
    ]
    settings = {
        "name": "prepared",
        "model": {"base": "lm", "dtype": "float32"},
        "prepare": {"assemble": {"vision_from": "vlm", "projector": "new"}, "stages": stages},
        "mixture": {"folder": "mixture"},
        "conflict": {"examples": 8, "sketch_size": 256},
        "split": {"axes": 1},
        "train": {"learning_rate": 5e-3, "batch_size": 4, "max_length": 128, "threads": 1},
        "evaluate": {"max_new_tokens": 2, "drift": {"prompts": 0}},
    }
    (top / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    for _ in range(2):
        done("run", top / "recipe.yaml", "--output", top / "run", "--quiet")
    return {"prepared": top}


MAKERS = {
    text_run: ("finished", "gradients", "evaluation", "half"),
    vision_run: ("vision", "untrained"),
    moments: ("moments", "cached"),
    lora: ("lora",),
    rounds: ("open", "between", "rounds"),
    study: ("study",),
    changes: ("searching", "adding", "added", "exported", "returned"),
    prepared: ("prepared",),
    **launched.MAKERS,
}
"""What makes which moments."""


def make_runs(folder: Path, moments: Collection[str]) -> dict[str, Path]:
    """The runs below ``folder`` that these moments are of; folders by moment."""
    found: dict[str, Path] = {}
    for make, names in MAKERS.items():
        if set(names) & set(moments):
            found |= make(folder)
    return found
