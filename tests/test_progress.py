from merit.progress import count, size


def test_counts_agree_with_their_nouns():
    assert [count(n, "row") for n in (0, 1, 2, 1200)] == ["0 rows", "1 row", "2 rows", "1,200 rows"]
    assert [count(n, "branch") for n in (1, 2)] == ["1 branch", "2 branches"]
    assert [count(n, "entry", "entries") for n in (1, 2)] == ["1 entry", "2 entries"]


def test_sizes_are_in_powers_of_1000():
    assert [size(n) for n in (812, 1300, 999_499, 14e9, 3.2e12)] == ["812 B", "1.3 kB", "999 kB", "14.0 GB", "3.2 TB"]
