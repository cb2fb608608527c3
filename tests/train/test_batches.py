"""Micro-batches, their shares among processes, and the order of rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.train import cases

from merit.hf.batches import Batcher
from merit.train.batches import GroupRows, StepCollator, StepOrder, cut_by_length


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=7).map(lambda item: sorted(item, reverse=True)),
    most=st.integers(1, 7),
    overhead=st.integers(0, 60),
)
def test_cut_is_the_cheapest_of_all_cuts(lengths: list[int], most: int, overhead: int) -> None:
    def cost(sizes: Sequence[int]) -> int:
        starts = np.cumsum([0, *sizes])
        return sum(lengths[start] * size + overhead for start, size in zip(starts, sizes, strict=False))

    sizes = cut_by_length(lengths, most, overhead)
    assert sum(sizes) == len(lengths)
    assert max(sizes) <= most
    count = len(lengths)
    for cuts in itertools.product((False, True), repeat=count - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [count]
        other = np.diff([0, *ends]).tolist()
        if max(other) <= most:
            assert cost(sizes) <= cost(other)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("overhead", [None, 0])
def test_collators_share_out_every_row_and_count_it(processes: int, overhead: int | None) -> None:
    rows = GroupRows(cases.make_group())
    numbers = list(range(20))
    shares = [StepCollator(rows, 8, Batcher(0), overhead, (rank, processes))(numbers) for rank in range(processes)]
    assert len({len(share.micro) for share in shares}) == 1  # FSDP's processes go through the layers together
    if overhead is None:
        assert len(shares[0].micro) == -(-len(numbers) // (8 * processes))
    trained = []
    for share in shares:
        datasets = iter(share.datasets.tolist())
        for batch in share.micro:
            for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
                which = next(datasets)
                if (labels != -100).any():
                    trained.append((which, tuple(ids[mask.bool()].tolist()), int((labels[1:] != -100).sum())))
        assert next(datasets, None) is None
    assert sorted(trained) == sorted(
        (int(rows.dataset[i]), tuple(rows[i].input_ids.tolist()), int(rows[i].targets.sum())) for i in numbers
    )
    targets = sum(count for _, _, count in trained)
    for share in shares:
        assert share.counts.tolist() == [targets, sum(len(ids) for _, ids, _ in trained), 20]
        assert share.targets == {k: sum(count for which, _, count in trained if which == k) for k in (0, 1)}


def test_order_of_a_resumed_run_is_that_of_a_whole_one() -> None:
    whole = list(StepOrder(21, 4, seed=3, steps=15))
    assert len(whole) == 15
    assert sorted(itertools.chain(*whole[:6])) == sorted(itertools.chain(*whole[6:12])) == list(range(21))
    assert whole[:6] != whole[6:12]
    for start in (0, 5, 6, 14):
        assert list(StepOrder(21, 4, seed=3, steps=15, start=start)) == whole[start:]
