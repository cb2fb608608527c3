from merit.progress import count


def test_counts_agree_with_their_nouns():
    assert [count(n, "row") for n in (0, 1, 2, 1200)] == ["0 rows", "1 row", "2 rows", "1,200 rows"]
    assert [count(n, "branch") for n in (1, 2)] == ["1 branch", "2 branches"]
    assert [count(n, "entry", "entries") for n in (1, 2)] == ["1 entry", "2 entries"]
