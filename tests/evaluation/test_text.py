"""Normalisation forgives typing, never content."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merit.evaluation.text import exact_match, normalise


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("Paris.", "paris"),
        ('  "Paris"\n', "Paris"),
        ("**Paris**", "Paris"),
        ("new\n york", "New York"),
        ("(a)", "A"),
        ("[[a]]", "a"),
        ("Straße", "STRASSE"),
        ("１２３", "123"),
        ("ﬁne", "fine"),
        ("是。", "是"),
        ("yes!!", "yes"),
        ('"yes".', "yes"),
    ],
)
def test_equal_but_for_typing(answer, reference):
    assert exact_match(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("-5", "5"),
        (".5", "5"),
        ("5%", "5"),
        ("$5", "5"),
        ("the cat", "cat"),
        ("1.5", "15"),
        ("f(x)", "f x"),
        ("f(", "f"),
        ("(a) or (b)", "a) or (b"),
        ("", "yes"),
        ("!", "?"),
        ("yes no", "yes"),
        ("C#", "C"),
        ("C++", "C"),
    ],
)
def test_different_in_content(answer, reference):
    assert not exact_match(answer, reference)


@given(st.text(max_size=30))
def test_idempotent_and_blind_to_case_and_space(text):
    once = normalise(text)
    assert normalise(once) == once
    assert normalise(f"  {text}\t") == once
    assert normalise(once.upper()) == normalise(once.upper().lower())


@given(st.text(min_size=1, max_size=10))
def test_never_empty_unless_blank(text):
    assert (normalise(text) == "") == (not text.split())
