"""Rows that choose are never rows that report."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.builders import encoded

from merit.evaluation.halves import halve, row_digest
from merit.hf.rows import EncodedRow


def mixed(picks: dict[str, list[int]]) -> dict[str, list[EncodedRow]]:
    """Datasets whose rows are picked from twelve different ones, with repetitions."""
    pool = list(encoded("pool", 12, seed=1))
    return {name: [pool[i] for i in numbers] for name, numbers in picks.items()}


def content(row: EncodedRow) -> tuple[bytes, bytes]:
    return row.input_ids.tobytes(), row.targets.tobytes()


picked = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]), st.lists(st.integers(0, 11), min_size=1, max_size=20), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(picked, st.integers(0, 5))
def test_no_content_is_in_both_halves_and_no_row_is_lost(picks, seed):
    rows = mixed(picks)
    halves = halve(rows, seed)
    choosing = {content(rows[name][i]) for name, numbers in halves.choosing.items() for i in numbers}
    reporting = {content(rows[name][i]) for name, numbers in halves.reporting.items() for i in numbers}
    assert not choosing & reporting
    for name, items in rows.items():
        assert sorted(halves.choosing[name] + halves.reporting[name]) == list(range(len(items)))


@settings(max_examples=30, deadline=None)
@given(picked, st.randoms())
def test_the_halves_do_not_depend_on_the_order_of_datasets_or_rows(picks, random):
    def of(rows):
        halves = halve(rows, 3)
        return {name: sorted(content(rows[name][i]) for i in numbers) for name, numbers in halves.choosing.items()}

    rows = mixed(picks)
    shuffled = {name: random.sample(rows[name], len(rows[name])) for name in random.sample(list(rows), len(rows))}
    assert of(rows) == of(shuffled)


def test_different_rows_are_halved_evenly_and_seeds_differ():
    rows = {"a": list(encoded("a", 40, seed=2, lengths=(9, 30))), "b": list(encoded("b", 7, seed=3, lengths=(9, 30)))}
    assert len({row_digest(row, 0) for items in rows.values() for row in items}) == 47
    one, two = halve(rows, 0), halve(rows, 1)
    assert (len(one.choosing["a"]), len(one.choosing["b"])) == (20, 4)
    assert one != two
