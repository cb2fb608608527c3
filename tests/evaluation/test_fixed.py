"""Losses on a fixed batch set: against one row at a time in float64, kept or made anew."""

import numpy as np
import pytest
import torch
from tests.builders import encoded
from tests.evaluation.evaluation_cases import tiny_model

from merit.evaluation.fixed import FixedBatches, choose_rows
from merit.evaluation.forward import Forward
from merit.hf.batches import Batcher
from merit.hf.rows import EncodedRow
from merit.mixture import EncodedDataset

FORWARD = Forward(Batcher(0), torch.device("cpu"), 64)


def alone(model, row: EncodedRow) -> tuple[float, int]:
    """Summed loss of one row from the model's own float64 logits."""
    with torch.inference_mode():
        logits = model(torch.tensor(row.input_ids[None].astype(np.int64))).logits[0].double()
    places = np.flatnonzero(row.targets)
    chances = torch.log_softmax(logits, dim=-1)
    return -float(sum(chances[i - 1, row.input_ids[i]] for i in places)), len(places)


@pytest.mark.parametrize("cache", [2**30, 3000, 0])
def test_losses_are_those_of_one_row_at_a_time(cache: int) -> None:
    model = tiny_model(sharpness=1.0).eval()
    datasets = {name: list(encoded(name, rows, seed=rows, high=40)) for name, rows in (("a", 7), ("b", 12))}
    fixed = FixedBatches(datasets, FORWARD, model, cache=cache)
    found = fixed.losses(model)
    pairs = [alone(model, row) for rows in datasets.values() for row in rows]
    sums, counts = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
    assert found.sums == pytest.approx(sums, rel=1e-5)
    assert found.counts.tolist() == counts.tolist()
    assert found.rows == pytest.approx(sums / counts, rel=1e-5)
    expected = [sums[:7].sum() / counts[:7].sum(), sums[7:].sum() / counts[7:].sum()]
    assert list(found.datasets.values()) == pytest.approx(expected, rel=1e-5)
    assert found.macro == pytest.approx(np.mean(expected), rel=1e-5)
    assert found.mean == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)
    again = fixed.losses(model)
    assert np.array_equal(found.sums, again.sums)
    assert fixed.target_tokens == counts.sum()


def test_rows_are_drawn_per_purpose_and_have_targets() -> None:
    rows = list(encoded("a", 20))
    empty = EncodedRow(np.arange(4, dtype=np.int32), np.zeros(4, dtype=bool))
    datasets = {"a": EncodedDataset("a", [empty, *rows, empty]), "none": EncodedDataset("none", [empty])}
    chosen = choose_rows(datasets, 5, 0, "one")
    assert list(chosen) == ["a"]
    assert len(chosen["a"]) == 5
    assert all(row.targets.any() for row in chosen["a"])
    lengths = [
        [row.input_ids.tolist() for row in choose_rows(datasets, 5, seed, purpose)["a"]]
        for seed, purpose in ((0, "one"), (0, "two"), (1, "one"))
    ]
    assert [row.input_ids.tolist() for row in chosen["a"]] == lengths[0]
    assert lengths[0] != lengths[1]
    assert lengths[0] != lengths[2]
    with pytest.raises(ValueError, match="at least one row"):
        FixedBatches({"a": []}, FORWARD, tiny_model())
