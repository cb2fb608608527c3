"""Rounds: the parts of a budget add up to the whole, and a branch in parts is the branch in one go."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.train import cases

from merit.errors import TrainingError
from merit.hf.base import open_base
from merit.hf.checkpoint import fingerprint
from merit.merge import Branch, merge_branches
from merit.recipe.schema import MergeSettings
from merit.train.batches import GroupRows, StepOrder, steps_for
from merit.train.branch import train_branch
from merit.train.checkpoint import newest
from merit.train.result import BranchResult
from merit.train.rounds import Round


@given(
    rows=st.integers(1, 60),
    batch=st.integers(1, 9),
    epochs=st.sampled_from([0.3, 0.5, 1, 1.5, 2, 3.7]),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_rounds_take_the_steps_of_one_go_in_order(
    rows: int, batch: int, epochs: float, share: float, seed: int
) -> None:
    total = steps_for(rows, batch, epochs)
    rounds = 1 + int(share * (total - 1))
    taken = []
    for number in range(1, rounds + 1):
        span = Round(number, rounds).span(rows, batch, epochs)
        assert span.total == total
        mine = list(StepOrder(rows, batch, seed, span.last, span.first))
        assert abs(len(mine) - total / rounds) < 1
        taken += mine
    assert taken == list(StepOrder(rows, batch, seed, total))


def test_more_rounds_than_steps_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"train\.rounds"):
        Round(1, 4).span(rows=6, batch_size=2, epochs=1)


@given(
    sizes=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 30), min_size=2, max_size=5),
    rounds=st.integers(1, 9),
    epochs=st.sampled_from([0.5, 1, 1.5, 3]),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_after_new_splits_every_dataset_has_its_budget(
    sizes: dict[str, int], rounds: int, epochs: float, seed: int, data: st.DataObject
) -> None:
    seen: dict[str, Counter[int]] = {name: Counter() for name in sizes}
    for number in range(1, rounds + 1):
        first = [name for name in sizes if data.draw(st.booleans())]  # the round's groups
        for group in (first, [name for name in sizes if name not in first]):
            for name in group:
                part = Round(number, rounds, resplit=True)
                seen[name].update(part.visits(name, sizes[name], epochs, seed).tolist())
    for name, rows in sizes.items():
        counts = [seen[name][row] for row in range(rows)]
        assert sum(counts) == int(np.ceil(epochs * rows))
        assert max(counts) - min(counts) <= 1


def test_visited_rows_are_the_ones_that_are_read() -> None:
    group = cases.make_group()
    visits = {"apple": np.array([5, 2, 2]), "pear": np.array([7])}
    rows = GroupRows(group, visits)
    expected = [group["apple"][2], group["apple"][2], group["apple"][5], group["pear"][7]]
    assert len(rows) == 4
    for number, row in enumerate(expected):
        assert np.array_equal(rows[number].input_ids, row.input_ids)
        assert rows.lengths[number] == len(row.input_ids)
        assert rows.targets[number] == row.targets.sum()


def in_rounds(root: Path, rounds: int, *overrides: str, optimizer: bool = True, branches: int = 2) -> BranchResult:
    """Identical branches, averaged between the rounds; the first of the last round."""
    recipe = cases.make_recipe(root / "base", "train.threads=1", *overrides)
    base = open_base(recipe.model)
    start: Path | None = None
    carried: list[Path | None] = [None] * branches
    for number in range(1, rounds + 1):
        results = []
        for k in range(branches):
            part = Round(
                number,
                rounds,
                start,
                "" if start is None else fingerprint(start),
                carried[k],
                keeps_optimizer=optimizer,
            )
            folder = root / f"{number}" / f"{k}"
            results.append(train_branch(cases.make_group(), base, folder, recipe.train, seed=recipe.seed, part=part))
            carried[k] = newest(folder / "state")
        if number < rounds:
            parts = [Branch(result.model, result.of_round.tokens, f"b{k}") for k, result in enumerate(results)]
            start = root / f"{number}" / "merged"
            merge_branches(base.folder, parts, start, MergeSettings(dtype="float32"))
    return results[0]


@settings(max_examples=3)
@given(rounds=st.integers(2, 6), branches=st.integers(1, 3))
def test_identical_branches_with_kept_optimizers_are_training_in_one_go(base: Path, rounds: int, branches: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "base").symlink_to(base)
        one_go_and_rounds_agree(root, rounds, branches)


def one_go_and_rounds_agree(root: Path, rounds: int, branches: int) -> None:
    few = "train.batch_size=7"  # six steps
    whole = cases.train(root, few)
    mine = in_rounds(root, rounds, few, branches=branches)
    expected = cases.weights(root)
    for name, tensor in cases.weights(root, f"{rounds}/0").items():
        assert float((tensor - expected[name]).abs().max()) <= 1e-7 * float(expected[name].abs().max()), name
    for key in ("target_tokens", "tokens", "samples", "steps", "final_loss"):
        assert getattr(mine, key) == getattr(whole, key), key
    assert mine.round is not None
    assert mine.round.steps < whole.steps
    assert (root / f"{rounds}/0/log.jsonl").read_text() == (root / "branch/log.jsonl").read_text()


def test_a_reset_optimizer_is_another_training(root: Path) -> None:
    cases.train(root)
    in_rounds(root, 2, optimizer=False, branches=1)
    expected = cases.weights(root)
    changed = [not tensor.equal(expected[name]) for name, tensor in cases.weights(root, "2/0").items()]
    assert any(changed)
    one, other = ((root / folder / "log.jsonl").read_text().splitlines() for folder in ("branch", "2/0"))
    assert one[: len(one) // 2] == other[: len(one) // 2]
    rates = [[line.split('"learning_rate"')[1].split(",")[0] for line in lines] for lines in (one, other)]
    assert rates[0] == rates[1]


def test_one_round_records_nothing_about_rounds(root: Path) -> None:
    assert "round" not in cases.train(root).facts()
