"""Real gradients without conflict: a small version of ``benchmarks/conflict/null.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.conflict.null import Pool, draw_nulls, judge, own_datasets

from merit.demo import write_demo


@pytest.mark.exhaustive
@pytest.mark.slow
def test_no_split_is_recommended_for_rows_of_one_pool(tmp_path: Path) -> None:
    """Fails on commit f5727a1: datasets cut at random from one pool of real rows got a split in 19 of 20 draws."""
    demo = tmp_path / "demo"
    write_demo(demo)
    pool = Pool.open(tmp_path / "pool.npz", str(demo / "base"), str(demo / "mixture"), rows=16)
    null = draw_nulls(pool, 20, uneven=False, count=16)
    assert null["recommended"] <= 1
    members = own_datasets(pool, np.random.default_rng(0))
    assert judge(pool.mixture(members), np.ones(len(members)))[0] >= 1, (
        "the same rows in their own datasets do conflict"
    )
