"""How far models lie from the base: the norms of their differences, written out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from merge.merge_cases import near, random_tensors, write_checkpoint
from merit.hf import inplace
from merit.merge.displacement import measure_displacements
from merit.merge.result import Displacements


def norm(tensors: dict[str, torch.Tensor], origin: dict[str, torch.Tensor] | None, names: set[str]) -> float:
    parts = [tensors[n].double() - (origin[n].double() if origin else 0) for n in names]
    return math.sqrt(sum(float((part**2).sum()) for part in parts))


def test_norms_are_those_of_the_differences_in_the_weights_that_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inplace, "BLOCK", 100)  # several blocks per tensor
    base = random_tensors(0)
    moved = {n for n, t in base.items() if t.is_floating_point() and "embed" not in n}
    models = [near(base, seed, step) for seed, step in ((1, 0.01), (2, 0.03), (3, 0.005))]
    folders = [write_checkpoint(tmp_path / f"{i}", tensors, shards=i + 1) for i, tensors in enumerate(models)]
    found = measure_displacements(write_checkpoint(tmp_path / "base", base), folders[:2], folders[2], moved)
    assert found.base == pytest.approx(norm(base, None, moved), rel=1e-12)
    expected = [norm(tensors, base, moved) for tensors in models]
    assert [*found.branches, found.merged] == pytest.approx(expected, rel=1e-6)  # differences are taken in float32


def test_ratios() -> None:
    found = Displacements(10.0, (3.0, 4.0), 2.5)
    assert found.relative(2.5) == 0.25
    assert found.rest((0.5, 0.5)) == pytest.approx(2.5 / math.sqrt(12.5))
    assert Displacements(0.0, (0.0,), 0.0).relative(1.0) is None
    assert Displacements(1.0, (0.0,), 0.0).rest((1.0,)) is None
