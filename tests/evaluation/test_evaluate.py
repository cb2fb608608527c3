"""The whole evaluation on tiny real checkpoints: files, resume, refusals."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from evaluation_cases import END, make_dataset, tiny_model

from merit.errors import CheckpointError, RunFolderError
from merit.evaluation import stage as module
from merit.evaluation.decode import decode
from merit.evaluation.forward import Forward
from merit.evaluation.results import Evaluation
from merit.evaluation.stage import About, Candidate, HeldOut, ModelSet
from merit.evaluation.stage import evaluate as evaluate_models
from merit.hf.base import open_base
from merit.hf.batches import Batcher
from merit.hf.rows import EncodedRow
from merit.mixture import EncodedDataset
from merit.recipe.schema import EvaluateSettings

SEEDS = {"base": 0, "joint": 1, "merged": 2, "branch-0": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """Four checkpoints and a way to evaluate them."""
    root = tmp_path_factory.mktemp("evaluation")
    for name, seed in SEEDS.items():
        tiny_model(seed=seed, sharpness=2.0).save_pretrained(root / name)
    tokenizer.save_pretrained(root / "base")
    test = {f"t{i}": make_dataset(f"t{i}", 9 + i) for i in range(3)}
    test["long"] = make_dataset("long", 4, longest=60)
    kept = {"known": make_dataset("known", 5)}

    base = open_base(root / "base")

    def evaluate(
        folder, names=tuple(SEEDS), fingerprints=None, test=test, kept=kept, about=None, seed=0, unseen=(), **settings
    ):
        content = fingerprints or {name: f"content of {name}" for name in names}
        models = {name: Candidate(None if name == "base" else root / name, content[name]) for name in names}
        settings = {"drift": {"prompts": 6, "tokens": 5}, "short_answer": 10, **settings}
        return evaluate_models(
            ModelSet(base, models, about or About()),
            HeldOut(test, kept, dict(unseen)),
            EvaluateSettings(**settings),
            seed=seed,
            folder=folder,
            device=torch.device("cpu"),
        )

    evaluate.root, evaluate.test, evaluate.kept = root, test, kept
    return evaluate


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_files_hold_what_a_reference_computes(run, tmp_path):
    found = run(tmp_path)
    assert found.summary.models == ("base", "joint", "merged", "branch-0")
    assert found.reused == ()
    results, kept = read(tmp_path, "results.json"), read(tmp_path, "kept.json")
    assert list(results) == list(found.summary.models)
    assert list(results["merged"]) == list(run.test)
    for name, seed in SEEDS.items():
        model = tiny_model(seed=seed, sharpness=2.0)
        for tables, sets in ((results, run.test), (kept, run.kept)):
            for dataset, rows in sets.items():
                wanted = reference(model, rows, dataset != "long")
                assert tables[name][dataset].pop("exact_match") == wanted.pop("exact_match")
                assert tables[name][dataset] == pytest.approx(wanted, rel=1e-5)
    drift = read(tmp_path, "drift.json")
    assert drift["base"]["kl"] == 0.0
    assert drift["merged"]["kl"] > 0.01
    assert drift["merged"]["prompts"] == 6
    summary = read(tmp_path, "summary.json")
    assert summary["short_answer_datasets"] == ["t0", "t1", "t2"]
    assert summary["macro"]["joint"]["mixture"]["loss"] == pytest.approx(
        np.mean([figures["loss"] for figures in results["joint"].values()])
    )
    assert summary["verdict"] == list(found.verdict.sentences)
    assert Evaluation.load(tmp_path).summary == found.summary
    answers = [json.loads(line) for line in (tmp_path / "models/merged.answers.jsonl").read_text().splitlines()]
    assert len(answers) == sum(len(rows) for name, rows in run.test.items() if name != "long") + 5


def test_unseen_tasks_are_a_column_of_their_own(run, tmp_path):
    """Their figures are those of the same rows as a kept set; they change no other column."""
    unseen = {"new": run.kept["known"]}
    found = run(tmp_path / "unseen", ("base", "merged"), unseen=unseen)
    plain = run(tmp_path / "plain", ("base", "merged"))
    assert found.unseen == {name: {"new": figures["known"]} for name, figures in found.kept.items()}
    assert (found.results, found.kept, plain.unseen) == (plain.results, plain.kept, {"base": {}, "merged": {}})
    assert read(tmp_path / "unseen", "unseen.json")["merged"]["new"]["loss"] == found.unseen["merged"]["new"].loss
    assert found.summary.macro["merged"].unseen.loss == found.unseen["merged"]["new"].loss
    assert Evaluation.load(tmp_path / "unseen").unseen == found.unseen
    (tmp_path / "plain" / "unseen.json").unlink()
    assert Evaluation.load(tmp_path / "plain").unseen == {}, "an evaluation of an earlier version"
    assert run(tmp_path / "unseen", ("base", "merged"), unseen=unseen).reused == ("base", "merged")


def reference(model, rows, generate):
    """Loss and exact match row by row, without batches or cache."""
    loss, tokens, hits = 0.0, 0, 0
    longest = max(len(row.answer) + 1 for row in rows) + 4
    for row in rows:
        ids = torch.tensor(row.input_ids[None].astype(np.int64))
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].double().log_softmax(-1)
            prompt, said = ids[:, : row.prompt_length], []
            while len(said) < min(longest, 64 - row.prompt_length) and (not said or said[-1] not in (1, END)):
                said.append(int(model(input_ids=prompt).logits[0, -1].argmax()))
                prompt = torch.cat([prompt, torch.tensor([[said[-1]]])], dim=1)
        for i in np.flatnonzero(row.targets):
            loss -= float(logp[i - 1, int(row.input_ids[i])])
            tokens += 1
        hits += said == row.input_ids[row.prompt_length :].tolist()
    return {
        "loss": loss / tokens,
        "exact_match": hits / len(rows) if generate else None,
        "examples": len(rows),
        "target_tokens": tokens,
    }


def test_a_model_is_right_about_its_own_answers(run, tmp_path, tokenizer):
    """Rows made of the base's own greedy answers: exact match 1 for the base, lower for the others."""
    prompts = [row.prompt() for row in make_dataset("own", 60)]
    model = tiny_model(seed=0, sharpness=2.0)
    forward = Forward(Batcher(0), torch.device("cpu"), 999)
    own = []
    for prompt, answer in zip(prompts, decode(model, prompts, [8] * 60, (1, END), forward), strict=True):
        text = tokenizer.decode(answer, skip_special_tokens=True)
        if answer[-1] == END and text.strip():
            length = prompt.prompt_length
            ids = np.asarray([*prompt.input_ids, *answer], np.int32)
            own.append(EncodedRow(ids, np.arange(len(ids)) >= length, length, False, text))
    assert len(own) >= 3
    run(tmp_path, test={"own": EncodedDataset("own", own)}, kept={}, exact_match="always")
    found = read(tmp_path, "results.json")
    assert found["base"]["own"]["exact_match"] == 1.0
    assert found["merged"]["own"]["exact_match"] < 1.0


def test_figures_do_not_depend_on_batch_size(run, tmp_path):
    run(tmp_path / "a", ("base", "merged"), batch_tokens=1)
    run(tmp_path / "b", ("base", "merged"), batch_tokens=100_000)
    for file in ("results.json", "kept.json", "drift.json"):
        a, b = read(tmp_path / "a", file), read(tmp_path / "b", file)
        flat_a, flat_b = (np.asarray(list(numbers(x)), dtype=float) for x in (a, b))
        np.testing.assert_allclose(flat_a, flat_b, rtol=1e-5, atol=1e-12)


def numbers(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif value is not None:
        yield value


def test_what_is_done_is_not_measured_again(run, tmp_path, monkeypatch):
    loads = []
    load = module.load_model
    monkeypatch.setattr(module, "load_model", lambda *a, **k: loads.append(k.get("weights")) or load(*a, **k))
    names = ("base", "joint", "merged")
    run(tmp_path, names, max_examples=2)
    before = (tmp_path / "results.json").read_bytes()
    loads.clear()
    assert run(tmp_path, names, max_examples=2, batch_tokens=7).reused == ("base", "joint", "merged")
    assert loads == []
    changed = {"base": "content of base", "joint": "other content", "merged": "content of merged"}
    assert run(tmp_path, names, changed, max_examples=2).reused == ("base", "merged")
    assert loads == [None, run.root / "joint"]  # the base once, for its answers' logits
    assert (tmp_path / "results.json").read_bytes() == before
    (tmp_path / "models/joint.json").write_text("{")
    assert run(tmp_path, names, changed, max_examples=2).reused == ("base", "merged")


@pytest.mark.parametrize("file", ["merged.json", "merged.answers.jsonl", "base.json", "answers-of-the-base.json"])
def test_a_changed_digit_is_measured_again(run, tmp_path, file):
    """On commit f5727a1 a figure of a kept model that lost a digit goes into the results."""
    names = ("base", "merged")
    run(tmp_path, names, max_examples=2)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    path = tmp_path / "models" / file
    text = path.read_text()
    place = max(text.rfind(digit) for digit in "0123456789") if file == "merged.json" else len(text) // 2
    path.write_text(text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :])
    assert len(run(tmp_path, names, max_examples=2).reused) == 1
    assert path.read_text() == text or file in ("merged.json", "base.json")  # those hold the time that it took
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.json")} == before


@pytest.mark.parametrize(
    "change",
    [{"max_new_tokens": 3}, {"max_examples": 1}, {"drift": {"prompts": 0}}, {"seed": 1}, {"kept": {}}, {"test": None}],
)
def test_what_changed_is_measured_again(run, tmp_path, change):
    run(tmp_path, ("base",), max_examples=2)
    if change.get("test", ()) is None:
        change = {"test": run.test | {"t0": make_dataset("t0", 9, seed=1)}}
    assert run(tmp_path, ("base",), **{"max_examples": 2, **change}).reused == ()


def test_two_names_of_one_model_are_measured_once(run, tmp_path, monkeypatch):
    loads = []
    load = module.load_model
    monkeypatch.setattr(module, "load_model", lambda *a, **k: loads.append(k["weights"]) or load(*a, **k))
    names = ("base", "joint", "merged")
    run(tmp_path, names, fingerprints={"base": "b", "joint": "same", "merged": "same"})
    assert loads == [None, run.root / "joint"]
    results = read(tmp_path, "results.json")
    assert results["merged"] == results["joint"]


def test_settings_choose_what_is_measured(run, tmp_path):
    run(tmp_path, exact_match="never", branches=False, drift={"prompts": 0}, max_examples=2)
    results = read(tmp_path, "results.json")
    assert list(results) == ["base", "joint", "merged"]
    assert {(item["exact_match"], item["examples"]) for item in results["base"].values()} == {(None, 2)}
    assert read(tmp_path, "drift.json") == {}
    run(tmp_path, ("base",), exact_match="always", heldout=False)
    assert read(tmp_path, "results.json")["base"] == {}
    assert read(tmp_path, "kept.json")["base"]["known"]["exact_match"] is not None
    run(tmp_path, ("base",), test={"long": run.test["long"]}, exact_match="always")
    assert read(tmp_path, "results.json")["base"]["long"]["exact_match"] == 0.0


def test_nothing_to_measure_loads_no_model_and_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_model", None)
    found = run(tmp_path, test={}, kept={})
    assert found.verdict.sentences[0].startswith("Nothing was measured")
    assert found.reused == ()
    assert read(tmp_path, "results.json") == read(tmp_path, "kept.json") == {name: {} for name in SEEDS}
    assert read(tmp_path, "drift.json") == {}
    assert read(tmp_path, "summary.json")["macro"]["merged"]["mixture"] is None


def test_drift_alone_can_be_measured(run, tmp_path):
    run(tmp_path, ("base", "merged"), kept={}, heldout=False)
    assert read(tmp_path, "results.json") == {"base": {}, "merged": {}}
    assert read(tmp_path, "drift.json")["merged"]["kl"] > 0.01
    assert any(said.startswith("Learned: not measured") for said in read(tmp_path, "summary.json")["verdict"])


def test_what_the_caller_says_of_the_models_is_shown(run, tmp_path):
    about = About("kmeans", {"base": 0, "joint": 30, "merged": 20}, {"merged": "operator ties"})
    run(tmp_path, ("base", "joint", "merged"), max_examples=1, about=about)
    summary = read(tmp_path, "summary.json")
    assert summary["method"] == "kmeans"
    assert summary["about"] == {"merged": "operator ties"}
    assert any(said.endswith("average of all branches: operator ties.") for said in summary["verdict"])
    assert run(tmp_path, ("base", "joint", "merged"), max_examples=1).reused == ("base", "joint", "merged")
    assert read(tmp_path, "summary.json")["method"] == "pca"


def test_non_finite_loss_names_model_and_dataset(run, tmp_path):
    broken = tiny_model(seed=2)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("inf")
    broken.save_pretrained(run.root / "broken")
    with pytest.raises(CheckpointError, match="model broken on dataset t0") as caught:
        run(tmp_path, ("base", "broken"))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "results.json").exists()
    assert (tmp_path / "models/base.json").exists()
    assert not (tmp_path / "models/broken.json").exists()


def test_base_must_be_there(run, tmp_path):
    with pytest.raises(ValueError, match="'base'"):
        run(tmp_path, ("merged",))


def test_prompts_that_fill_the_context_get_no_answer(run, tmp_path):
    ids = np.full(65, 8, np.int32)
    row = EncodedRow(ids[:64], np.arange(64) >= 63, 63, False, "c")
    full = EncodedRow(ids, np.arange(65) >= 64, 64, False, "c")
    run(
        tmp_path,
        ("base",),
        test={"full": EncodedDataset("full", [row, full])},
        kept={},
        drift={"prompts": 2, "tokens": 3},
    )
    assert math.isfinite(read(tmp_path, "results.json")["base"]["full"]["loss"])
    assert read(tmp_path, "drift.json")["base"]["tokens"] == 1


def evaluate_in_child(root, folder):
    """Evaluate; the first time, die when the second model starts."""
    models = {name: Candidate(None if name == "base" else root / name, name) for name in ("base", "joint", "merged")}

    def progress(done, total, label=""):
        if label == "joint":
            os.kill(os.getpid(), signal.SIGKILL)

    evaluate_models(
        ModelSet(open_base(root / "base"), models),
        {"t0": make_dataset("t0", 9)},
        folder=folder,
        device=torch.device("cpu"),
        **({} if (folder / "models").exists() else {"progress": progress}),
    )


def test_killed_and_run_again_gives_the_same_figures(run, tmp_path):
    child = multiprocessing.get_context("spawn").Process(target=evaluate_in_child, args=(run.root, tmp_path / "killed"))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "killed/models").iterdir()) == [
        "answers-of-the-base.json",
        "base.answers.jsonl",
        "base.json",
    ]
    stamp = (tmp_path / "killed/models/base.json").stat().st_mtime_ns
    evaluate_in_child(run.root, tmp_path / "killed")
    (tmp_path / "whole/models").mkdir(parents=True)
    evaluate_in_child(run.root, tmp_path / "whole")
    assert (tmp_path / "killed/models/base.json").stat().st_mtime_ns == stamp
    for name in ("results.json", "kept.json", "drift.json", "summary.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_as_in_a_notebook(run, tmp_path):
    """Base and folders in, an evaluation out; nothing is written where no folder is given."""
    models = {"base": open_base(run.root / "base"), "merged": run.root / "merged"}
    settings = EvaluateSettings(drift={"prompts": 6, "tokens": 5}, short_answer=10)
    found = evaluate_models(models, run.test, settings)
    assert found.results == run(tmp_path, ("base", "merged"), kept={}).results
    assert "Learned (mean over 4 held-out datasets" in str(found.verdict)
    with pytest.raises(ValueError, match="open_base"):
        evaluate_models({"base": str(run.root / "base")}, run.test)


@pytest.mark.parametrize("damage", ["[]", "{", '{"base": {"t0": {"loss": "low"}}}', "[" * 200_000, "NaN", "\x00"])
@pytest.mark.parametrize("file", ["results.json", "kept.json", "drift.json", "summary.json"])
def test_a_damaged_file_is_named(run, tmp_path, file, damage):
    """Fails on commit f5727a1 (B3): JSON of another shape ended in a traceback where it was shown."""
    run(tmp_path, ("base", "merged"), max_examples=1)
    (tmp_path / file).write_text(damage, encoding="utf-8")
    with pytest.raises(RunFolderError, match=file):
        Evaluation.load(tmp_path)


def test_a_kept_figure_that_changed_is_measured_again(run, tmp_path):
    """Fails on commit f5727a1 (A8): a flipped digit in models/*.json became the run's result."""
    first = run(tmp_path, ("base", "merged"), max_examples=2)
    file = tmp_path / "models" / "merged.json"
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    content = whole.index(b'"mixture"')
    for place in rng.integers(content, len(whole) - 100, size=4):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        again = run(tmp_path, ("base", "merged"), max_examples=2)
        assert again.results == first.results
        assert again.drift == first.drift
        stored = json.loads(file.read_text(encoding="utf-8"))
        assert stored["mixture"] == json.loads(whole)["mixture"]


def test_no_byte_of_a_kept_figure_can_change_unnoticed(run, tmp_path):
    """A letter of ``unseen``, a key with a default, once changed in silence: the checksum was of the keys that are known."""
    run(tmp_path, ("base",), test={"t": make_dataset("t", 1)}, kept={}, drift={"prompts": 0})
    file = tmp_path / "models" / "base.json"
    whole = file.read_bytes()
    value = json.loads(whole)
    name = "base"
    reader = object.__new__(module._Measuring)
    reader._folder, reader._keys = file.parent, {name: value["key"]}
    assert reader._read(name) is not None
    accepted = []
    for place, bit in ((place, 1 << (place % 7)) for place in range(len(whole))):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        if reader._read(name) is not None and json.loads(file.read_bytes()) != value:
            accepted.append(place)
    assert not accepted
    for key in value:
        file.write_text(json.dumps({f"{key}x" if other == key else other: item for other, item in value.items()}))
        assert reader._read(name) is None, key


def test_who_takes_no_part_is_said(run, tmp_path):
    """Fails on commit f5727a1 (A9): an unfinished model was left out without a word."""
    about = About(missing={"merged": "unfinished: merged holds no record.json"})
    found = run(tmp_path, ("base", "joint"), max_examples=2, about=about)
    assert found.summary.missing == {"merged": "unfinished: merged holds no record.json"}
    assert "Not measured: merged (unfinished: merged holds no record.json)." in found.verdict.sentences
    assert Evaluation.load(tmp_path).summary == found.summary
