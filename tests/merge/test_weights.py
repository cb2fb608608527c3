"""How much each branch counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from merge_cases import near, random_tensors, write_checkpoint

from merit.errors import MergeError
from merit.merge import merge_branches
from merit.merge.weights import lopsided, weigh
from merit.recipe.schema import MergeSettings


@dataclass(frozen=True)
class Part:
    model: Path
    tokens: int
    target_tokens: int
    samples: int


def parts(tmp_path, *counts):
    return {k: Part(tmp_path / f"b{k}", *numbers) for k, numbers in enumerate(counts)}


@pytest.mark.parametrize(
    ("rule", "want"), [("tokens", [90, 60]), ("target_tokens", [10, 40]), ("samples", [5, 3]), ("uniform", [1, 1])]
)
def test_rules_count_what_they_say(tmp_path, rule, want):
    """Fails on commit f5727a1: ``tokens`` counted target tokens alone."""
    assert [branch.weight for branch in weigh(rule, parts(tmp_path, (90, 10, 5), (60, 40, 3)), 2)] == want


def test_listed_weights_belong_to_branch_numbers(tmp_path):
    three = parts(tmp_path, (1, 1, 1), (1, 1, 1), (1, 1, 1))
    assert [b.weight for b in weigh([3.0, 1.0, 0.5], {k: three[k] for k in (0, 2)}, 3)] == [3.0, 0.5]
    with pytest.raises(MergeError, match="2 weights for 3 branches"):
        weigh([1.0, 2.0], three, 3)


def test_far_from_an_equal_share_is_said_for_counted_weights_alone(tmp_path):
    """Fails on commit f5727a1: one branch of the demo had 58 % of the weight without a word."""
    branches = weigh("target_tokens", parts(tmp_path, (1, 6315, 1), (1, 5782, 1), (1, 9888, 1), (1, 30921, 1)), 4)
    total = sum(float(b.weight) for b in branches)
    said = lopsided(branches, [float(b.weight) / total for b in branches])
    assert len(said) == 3
    assert "branch 0 has 12 %".replace(" %", "%") in said[0]
    assert "mostly this branch" in said[2]
    assert not lopsided(branches, [0.25] * 4)
    assert not lopsided(branches, [0.125, 0.25, 0.25, 0.375])
    assert not lopsided(weigh([1.0, 99.0], parts(tmp_path, (1, 1, 1), (1, 1, 1)), 2), [0.01, 0.99])


@pytest.mark.parametrize(
    ("settings", "said"),
    [({}, True), ({"operator": "uniform"}, False), ({"operator": "ties", "options": {"weighted": True}}, True)],
)
def test_results_of_training_are_merged_by_their_token_budgets(tmp_path, settings, said):
    """Fails on commit f5727a1: there the shares were those of the target tokens (1/4, 3/4)."""
    start = random_tensors(0)
    base = write_checkpoint(tmp_path / "base", start)
    for k in range(2):
        write_checkpoint(tmp_path / f"b{k}", near(start, k))
    trained = list(parts(tmp_path, (90, 10, 5), (10, 30, 3)).values())
    result = merge_branches(base, trained, tmp_path / "out", MergeSettings(**settings))
    assert result.weights == (0.9, 0.1)
    assert result.counts == (90, 10)
    assert result.counted == "tokens"
    assert any("90% of the weight (by tokens)" in warning for warning in result.warnings) == said
