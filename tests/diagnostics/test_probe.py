"""The probe's figures against independent sums, and the reasons that it gives where it cannot answer."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests import builders
from tests.builders import encoded
from tests.diagnostics.labs import open_lab
from tests.diagnostics.test_models import CPU, mean_loss

from merit.diagnostics import probe
from merit.diagnostics.lab import Lab
from merit.hf.models import load_model

SIZES = {"a": (6, 20), "b": (2, 8), "c": (3, 12), "d": (5, 16)}
ROWS = {name: encoded(name, rows, seed=seed, high=20) for seed, (name, (rows, _)) in enumerate(SIZES.items())}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe") / "base"
    return builders.make_base(folder, hidden=4, vocab_size=20, num_hidden_layers=1, initializer_range=0.5)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "RANDOM_SPLITS", 30)
    monkeypatch.setattr(probe, "HALVES", 20)


def lab_of(tiny: Path, groups: list[tuple[str, ...]], branches: dict[str, Path] | None = None, **more: object) -> Lab:
    return open_lab(tiny, branches or {}, ROWS, more.pop("test", None), groups=groups, **more)


def test_the_carried_share_is_one_average_over_another_of_the_same_tokens(tiny: Path, tmp_path: Path) -> None:
    groups = [("a", "b"), ("c", "d")]
    lab = lab_of(tiny, groups)
    states, folders = [], {}
    for k, group in enumerate(groups):
        model = load_model(lab.subject.base, CPU)
        parameters = [p.requires_grad_(True) for p in model.parameters()]
        slopes = torch.autograd.grad(mean_loss(model, {n: ROWS[n] for n in group}), parameters)
        with torch.no_grad():
            for p, slope in zip(parameters, slopes, strict=True):
                p -= 0.05 * slope
        folders[f"branch-{k}"] = tmp_path / str(k)
        model.save_pretrained(folders[f"branch-{k}"])
        states.append({name: t.clone() for name, t in model.state_dict().items()})
    base, average = load_model(lab.subject.base, CPU), load_model(lab.subject.base, CPU)
    average.load_state_dict({name: (states[0][name] + states[1][name]) / 2 for name in states[0]})
    falls, counts = [], []
    with torch.no_grad():
        for state, group in zip(states, groups, strict=True):
            rows = {name: ROWS[name] for name in group}
            branch = load_model(lab.subject.base, CPU)
            branch.load_state_dict(state)
            falls.append(float(mean_loss(base, rows) - mean_loss(branch, rows)))
            counts.append(sum(int(dataset.target_counts.sum()) for dataset in rows.values()))
        gain = float(mean_loss(base, ROWS) - mean_loss(average, ROWS))
    found = probe.measure(lab_of(tiny, groups, folders), 1, 0.05)
    assert min(falls) > 0
    assert found.own_gain == pytest.approx(falls, rel=1e-3)
    assert found.carried == pytest.approx(gain / np.average(falls, weights=counts), rel=1e-3)
    assert found.judged_on == "training"
    part = lab_of(tiny, groups, folders, test={name: ROWS[name] for name in "ab"})  # one group has no held-out rows
    assert probe.measure(part, 1, 0.05).merged_gain == found.merged_gain
    half = {"a": ROWS["a"], "c": ROWS["c"]}
    with torch.no_grad():
        gain = float(mean_loss(base, half) - mean_loss(average, half))
    found = probe.measure(lab_of(tiny, groups, folders, test=half), 1, 0.05)
    assert (found.judged_on, found.merged_gain) == ("held-out", pytest.approx(gain, rel=1e-3))


def test_random_splits_balance_what_the_split_balances(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, make = [], probe.random_splits
    monkeypatch.setattr(probe, "random_splits", lambda balance, *rest: (given.append(balance), make(balance, *rest))[1])
    for balance in ("samples", "tokens"):
        assert isinstance(probe.predict(lab_of(tiny, [("d", "a"), ("c", "b")], balance=balance)), probe.Predicted)
    assert given[0].tolist() == [len(ROWS[name]) for name in "dacb"]
    assert given[1].tolist() == [ROWS[name].target_counts.sum() for name in "dacb"]


def test_groups_weigh_by_their_tokens(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weighed, gain = [], probe.group_gain
    monkeypatch.setattr(probe, "group_gain", lambda *given: (weighed.append(given[4]), gain(*given))[1])
    probe.predict(lab_of(tiny, [("d", "a"), ("c", "b")]))
    assert {tuple(w) for w in weighed} == {tuple(float(ROWS[name].lengths.sum()) for name in "dacb")}


def test_other_than_two_four_eight_groups_are_not_compared(tiny: Path) -> None:
    reason = probe.predict(lab_of(tiny, [("a",), ("b",), ("c", "d")]))
    assert isinstance(reason, str)
    assert "this one has 3" in reason


def test_gradients_that_do_not_fit_are_a_reason(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = lab_of(tiny, [("a", "b"), ("c", "d")])
    size = sum(p.numel() for p in lab.model.parameters())
    for free, fits in ((32 * 4 * size, True), (32 * 4 * size - 1, False)):
        monkeypatch.setattr(probe.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        found = probe.predict(lab)
        assert isinstance(found, probe.Predicted) is fits
        assert fits or "memory" in str(found)


@pytest.mark.parametrize(("noise", "kept"), [(0.01, True), (3.0, False)])
def test_no_interval_where_a_resampled_gain_is_not_positive(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, noise: float, kept: bool
) -> None:
    gradients = np.array([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]])
    half = gradients[:, None] + noise * np.array([1.0, -1.0])[None, :, None]
    monkeypatch.setattr(probe, "_derivatives", lambda *_: (half, gradients))
    found = probe.predict(lab_of(tiny, [("a", "b"), ("c", "d")]))
    assert isinstance(found, probe.Predicted)
    assert found.ratio is not None
    assert (found.ratios is not None) is kept
    second = probe._split(found, 0.1, (0.05, 0.2) if kept else None)[1]
    assert second.verdict == ("ready" if kept else "doubtful")
    assert ("no interval" in second.answer) is not kept
