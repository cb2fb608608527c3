"""Trackers with their own local backends: what arrives is what the run measured, and it lies in the run folder.

TensorBoard, Weights & Biases (offline) and MLflow (files) are each tried where they are installed (the extra ``trackers``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.builders import Case, make_case, read

from merit.report.page.data import read_run
from merit.report.tracked import tracked_figures
from merit.train.trackers import own_folder, plain_name

pytestmark = pytest.mark.slow


@pytest.fixture
def run_with(base: Path, merit, tmp_path: Path, monkeypatch):
    """A whole run that reports to one tracker, in an empty working directory."""

    def run(tracker: str) -> Case:
        case = make_case(tmp_path / "case", base)
        here = tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        done = merit("run", case.recipe, "--output", case.run, "--quiet", "--set", f"train.report_to=[{tracker}]")
        assert done.code == 0, done.err
        assert list(here.iterdir()) == [], "nothing outside the run folder"
        return case

    return run


def expected(case: Case) -> dict[str, float]:
    figures = tracked_figures(read_run(case.run))
    summary = read(case.run / "evaluation" / "summary.json")
    assert figures["evaluation/merged/learned_loss"] == summary["macro"]["merged"]["mixture"]["loss"]
    assert figures["merge/weight_0"] == read(case.run / "merged/record.json")["weights"][0]
    assert {"conflict/mean_cosine", "group_0/rows", "group_1/tokens", "branch_1/final_loss"} <= set(figures)
    return figures


def losses(case: Case, k: int) -> list[float]:
    return [json.loads(line)["loss"] for line in (case.run / f"branches/{k}/log.jsonl").read_text().splitlines()]


def test_tensorboard(run_with):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    case = run_with("tensorboard")

    def scalars(folder: Path) -> dict[str, list[float]]:
        found = {}
        for file in folder.rglob("events.out.tfevents.*"):
            events = accumulator.EventAccumulator(str(file.parent)).Reload()
            for tag in events.Tags()["scalars"]:
                found[tag] = [event.value for event in events.Scalars(tag)]
        return found

    branch = scalars(case.run / "branches/0/trackers")
    assert branch["loss"] == pytest.approx(losses(case, 0), rel=1e-6)
    assert any(name.startswith("dataset_loss/") for name in branch)
    whole = scalars(case.run / "trackers")
    for name, value in expected(case).items():
        assert whole[name] == pytest.approx([value], rel=1e-6), name


def test_mlflow(run_with, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    case = run_with("mlflow")
    assert "MLFLOW_TRACKING_URI" not in os.environ
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def runs(folder: Path):
        client = mlflow.MlflowClient(tracking_uri=(folder / "mlflow").as_uri())
        experiment = client.get_experiment_by_name("merit")
        return client, client.search_runs([experiment.experiment_id])

    client, [branch] = runs(case.run / "branches/0/trackers")
    assert branch.info.run_name == "run/branches/0"
    history = [metric.value for metric in client.get_metric_history(branch.info.run_id, "loss")]
    assert history == pytest.approx(losses(case, 0))
    _, [whole] = runs(case.run / "trackers")
    assert whole.info.run_name == "run"
    assert whole.data.metrics == pytest.approx(expected(case))


def stored(data: bytes) -> Iterator[bytes]:
    """The records of an offline file: LevelDB's log format after seven bytes of its own; CRC, length, kind per piece."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def test_wandb_offline(run_with):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    case = run_with("wandb")
    assert wandb

    def history(folder: Path) -> list[dict[str, str]]:
        [file] = folder.rglob("*.wandb")
        found = []
        for data in stored(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                found.append({item.key or ".".join(item.nested_key): item.value_json for item in record.history.item})
        return found

    branch = history(case.run / "branches/0/trackers")
    assert [float(row["loss"]) for row in branch] == pytest.approx(losses(case, 0))
    [whole] = history(case.run / "trackers")
    for name, value in expected(case).items():
        assert float(whole[name]) == pytest.approx(value), name


def test_what_the_user_has_set_stands(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere")
    with own_folder(tmp_path, ["mlflow"]):
        assert os.environ["MLFLOW_TRACKING_URI"] == "http://somewhere"


@pytest.mark.parametrize(
    ("name", "plain"), [("loss/a b", "loss/a b"), ("loss/ü|x", "loss/__x"), ("a.b-c_d", "a.b-c_d")]
)
def test_names_that_every_tracker_takes(name, plain):
    assert plain_name(name) == plain
