"""`merge.weights: auto` on a run: what chooses, what reports, and going on after a kill."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.builders import Case, encoded, read, task_rows, weights, write_rows

from merit.evaluation.fixed import FixedBatches
from merit.evaluation.halves import halves_of
from merit.merge.direction import AdapterDirection
from merit.merge.weights import Losses
from merit.run import evaluating, weight_search
from merit.run.evaluating import held_out_rows, reporting_rows
from merit.run.weight_search import log_file

FEW = ("--set", "merge.search.evaluations=12", "--set", "merge.search.rows=3")


def content(rows) -> set[bytes]:
    return {row.input_ids.tobytes() + row.targets.tobytes() for row in rows}


def held_out(sets) -> set[bytes]:
    return content(row for rows in sets.values() for row in rows)


@dataclass
class Seen:
    """Rows that went through a model while weights were searched, and rows that prompts of the drift were taken from."""

    choosing: set[bytes] = field(default_factory=set)
    reporting: set[bytes] = field(default_factory=set)


@pytest.fixture
def seen(monkeypatch) -> Seen:
    """Filled while searches run."""
    found, prompts, now = Seen(), {}, []
    read_rows, reference = FixedBatches.losses, weight_search.drift_reference

    def measured(batches, model):
        for side in now:
            side |= content(batches.rows)
        return read_rows(batches, model)

    def referred(session, model, datasets, folder):
        made = reference(session, model, datasets, folder)
        prompts[id(made)] = held_out(datasets)
        return made

    def during(name, side):
        original = getattr(weight_search._Half, name)

        def wrapped(half, model):
            if half.reference is not None:
                side.update(prompts[id(half.reference)])
            now.append(side)
            try:
                return original(half, model)
            finally:
                now.pop()

        monkeypatch.setattr(weight_search._Half, name, wrapped)

    monkeypatch.setattr(FixedBatches, "losses", measured)
    monkeypatch.setattr(weight_search, "drift_reference", referred)
    during("losses", found.choosing)
    during("rows", found.reporting)
    return found


def test_searched_weights_are_merged_as_they_were_measured(finished: Case, merit, tmp_path: Path) -> None:
    result = merit("merge", finished.run, "--weights", "auto", *FEW, "--output", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    search = record["weight_search"]
    assert len(search["points"]) == 12
    assert search["points"][0]["coefficients"] == [0.0, 0.0]
    assert search["points"][0]["kept"] == pytest.approx(0, abs=1e-6), "no drift from the base at the base"
    chosen = search["chosen"]["coefficients"]
    assert record["scale"] == pytest.approx(sum(chosen), abs=1e-6)
    assert record["weights"] == pytest.approx([c / sum(chosen) for c in chosen])
    assert record["counted"] == "auto"
    folders = [finished.run / "branches" / str(k) / "model" for k in range(2)]
    zero, parts, merged = (
        weights(Path(finished.settings["model"]["base"])),
        list(map(weights, folders)),
        weights(tmp_path / "out"),
    )
    for name, start in zero.items():
        theta = start.astype(np.float64)
        for c, part in zip(chosen, parts, strict=True):
            theta = theta + c * (part[name].astype(np.float64) - start)
        np.testing.assert_allclose(merged[name], theta, rtol=1e-6, atol=1e-8)
    assert set(search["reported"]) == {"base", "by tokens", "chosen"}
    assert search["reported"]["by tokens"]["learned"] < search["reported"]["base"]["learned"]
    groups = read(finished.run / "split" / "split.json")["groups"]
    assert [ratio["dataset"] for ratio in search["ratios"]] == [name for group in groups for name in group]
    assert sum(ratio["share"] for ratio in search["ratios"]) == pytest.approx(1)
    assert sum(ratio["implied"] for ratio in search["ratios"]) == pytest.approx(1)
    assert (tmp_path / "out" / "weights.svg").is_file()
    assert not log_file(tmp_path / "out").exists()
    assert read(tmp_path / "out" / "merge.json")["weight_search"] == search
    shown = merit("merge", finished.run, "--weights", "auto", *FEW, "--output", tmp_path / "again")
    assert "implied" in shown.out
    assert "weight search" in shown.out


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("objective", ["knee", "learned_under_drift"])
def test_a_killed_search_goes_on_to_the_same_result(
    finished: Case, merit, tmp_path: Path, monkeypatch, objective
) -> None:
    """Also where a digit of what it kept has changed meanwhile."""
    words = ("merge", finished.run, "--weights", "auto", *FEW, "--set", f"merge.search.objective={objective}", "--json")
    whole = json.loads(merit(*words, "--output", tmp_path / "whole").out)
    measured: list[Losses] = []
    measure = weight_search._Half.losses

    def counted(half, model):
        if len(measured) == 7:
            raise Killed
        measured.append(measure(half, model))
        return measured[-1]

    monkeypatch.setattr(weight_search._Half, "losses", counted)
    with pytest.raises(Killed):
        merit(*words, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    log = log_file(tmp_path / "out")
    assert len(log.read_text().splitlines()) == 8
    damaged = log.read_text().splitlines()
    damaged[3] = re.sub(r'("learned": \d+\.)(\d)', lambda found: f"{found[1]}{9 - int(found[2])}", damaged[3])
    log.write_text("\n".join(damaged) + '\n{"coefficients": [0.12')  # and the kill came while a line was written
    measured.clear()
    again = json.loads(merit(*words, "--output", tmp_path / "out").out)
    assert len(measured) == 6, "what was measured before is not measured again, but for the point that is damaged"
    assert again["model_fingerprint"] == whole["model_fingerprint"]
    for key in ("points", "chosen", "ratios", "reported"):
        assert again["weight_search"][key] == whole["weight_search"][key], key
    log.write_text(
        '{"search": "of something else"}\n{"coefficients": [0.0, 0.0], "learned": 9, "kept": 9, "seconds": 0}\n'
    )
    shutil.rmtree(tmp_path / "out")
    measured[:] = measured[:1]
    monkeypatch.setattr(weight_search._Half, "losses", measure)
    assert (
        json.loads(merit(*words, "--output", tmp_path / "out").out)["model_fingerprint"] == whole["model_fingerprint"]
    )


def test_baselines_search_their_own_and_the_evaluation_reads_the_other_rows(
    finished: Case, merit, tmp_path: Path, seen: Seen, monkeypatch
) -> None:
    evaluated, evaluate = [], evaluating.evaluate
    monkeypatch.setattr(
        evaluating,
        "evaluate",
        lambda models, rows, *args, **kwargs: evaluated.append(rows) or evaluate(models, rows, *args, **kwargs),
    )
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    for folder in ("merged", "baselines/random/merged", "evaluation"):
        shutil.rmtree(run / folder)
    result = merit("run", run, "--set", "merge.weights=auto", *FEW, "--quiet")
    assert result.code == 0, result.err
    found = [read(run / place / "merged" / "record.json")["weight_search"] for place in ("", "baselines/random")]
    assert found[0]["points"] != found[1]["points"]
    assert not (run / "merged" / ".model.search.jsonl").exists()
    assert merit("run", run, "--set", "merge.weights=auto", *FEW, "--quiet").code == 0, "done stages stand"
    (reporting,) = evaluated
    assert seen.choosing
    assert not seen.choosing & (seen.reporting | held_out(reporting.test))
    assert seen.choosing | held_out(reporting.test) <= held_out(held_out_rows(run / "mixture").test)
    results = read(run / "evaluation" / "results.json")
    assert {name: figures["examples"] for name, figures in results["merged"].items()} == {
        name: len(part) for name, part in reporting.test.items()
    }
    stale = merit("evaluate", run, "--set", "merge.weights=tokens")
    assert stale.code == 2
    assert "merge.weights" in stale.err


def test_kept_sets_take_the_place_of_drift_and_bound_what_is_lost(
    finished: Case, merit, tmp_path: Path, seen: Seen
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    write_rows(tmp_path / "kept" / "old" / "test.jsonl", task_rows("double", 9, seed=5))
    for folder in ("mixture", "merged", "baselines/random/merged", "evaluation"):
        shutil.rmtree(run / folder)
    words = ("--set", f"evaluate.kept_folder={tmp_path / 'kept'}", "--set", "baselines=[]", *FEW)
    words += ("--set", "merge.weights=auto", "--set", "merge.search.objective=learned_under_kept")
    result = merit("run", run, "--until", "merge", "--quiet", *words, "--set", "merge.search.bound=0.01")
    assert result.code == 0, result.err
    search = read(run / "merged" / "record.json")["weight_search"]
    assert search["kept"] == "held-out loss on the kept sets"
    assert search["chosen"]["kept"] <= search["points"][0]["kept"] + 0.01
    rows = held_out_rows(run / "mixture")
    reporting = reporting_rows(rows, 0)
    assert seen.choosing & held_out(rows.kept)
    assert seen.reporting & held_out(rows.kept)
    assert not seen.choosing & (seen.reporting | held_out(reporting.test) | held_out(reporting.kept))
    refused = merit(
        "check", finished.recipe, "--set", "merge.weights=auto", "--set", "merge.search.objective=learned_under_kept"
    )
    assert refused.code == 2
    assert "evaluate.kept_folder" in refused.err


def test_equal_rows_of_test_and_kept_sets_are_in_one_half() -> None:
    rows = encoded("a", 10, seed=4)
    halves = halves_of({"a": rows}, {"b": rows.take(range(5))}, 0)
    assert set(halves["kept"].choosing["b"]) == {i for i in halves["test"].choosing["a"] if i < 5}


def test_streamed_and_held_branches_give_the_same_weights(finished: Case, merit, tmp_path: Path, monkeypatch) -> None:
    words = ("merge", finished.run, "--weights", "auto", *FEW, "--json", "--set", "merge.search.scale_range=[0, 0.2]")
    words += ("--set", "merge.search.objective=learned_under_drift", "--set", "merge.search.bound=10")
    held = json.loads(merit(*words, "--output", tmp_path / "held").out)
    monkeypatch.setattr(weight_search.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    streamed = json.loads(merit(*words, "--output", tmp_path / "streamed").out)
    assert held["weight_search"]["memory"].startswith("held in memory")
    assert streamed["weight_search"]["memory"].startswith("read from disk")
    assert streamed["model_fingerprint"] == held["model_fingerprint"]
    assert [text for text in held["warnings"] if "the end of its range of λ (0.2)" in text]
    assert "the end of its range of λ (0.2)" in (tmp_path / "held" / "README.md").read_text()


def test_a_run_without_two_different_test_rows_says_so(finished: Case, merit, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    mixture = tmp_path / "mixture"
    shutil.copytree(finished.folder / "mixture", mixture)
    for file in mixture.glob("*/test.jsonl"):
        file.unlink()
    shutil.rmtree(run / "mixture")
    words = ("merge", run, "--weights", "auto", "--set", f"mixture.folder={mixture}", "--output", tmp_path / "out")
    assert merit("run", run, "--until", "mixture", "--set", f"mixture.folder={mixture}", "--quiet").code == 0
    refused = merit(*words)
    assert refused.code == 2
    assert "merge.weights: auto needs at least two" in refused.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_s_update_block_by_block_is_the_whole_one(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from tests.builders import make_base
    from transformers import AutoModelForCausalLM

    from merit.hf.checkpoint import read_headers
    from merit.hf.inplace import Block
    from merit.merge.adapter import read_adapter
    from merit.merge.weights import Branch

    base = make_base(tmp_path / "base")
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    head = read_headers(base)
    adapter = read_adapter(Branch(tmp_path / "adapter", 1, "a"), head)
    start = load_file(base / "model.safetensors")
    seen = 0
    for name in head.tensors:
        theta = start[name]
        whole = torch.from_numpy(adapter.update(name, theta.double().numpy())).float()
        parts = [(0, 1), (1, len(theta))]
        changes = [AdapterDirection(adapter).change(Block(name, a, b), theta[a:b]) for a, b in parts]
        if name not in (*adapter.pairs, *adapter.full):
            assert changes == [None, None]
            continue
        seen += 1
        torch.testing.assert_close(torch.cat([part for part in changes if part is not None]), whole)
    assert seen == 9
