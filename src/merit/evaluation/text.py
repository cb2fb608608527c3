"""When two short answers count as the same. Strings in, strings out.

The rules are deliberately few (docs/evaluation.md lists them): they forgive how an answer is typed, never what it says.
"""

from __future__ import annotations

import unicodedata

__all__ = ["exact_match", "normalise"]

_QUOTES = "\"'`*_“”‘’«»„‚「」『』"
_CLOSING = ".,;:!?…。、，；：！？।"
_BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">", "【": "】", "《": "》"}


def normalise(text: str) -> str:
    """The form in which answers are compared.

    1. Unicode NFKC and casefold (full-width forms, ligatures, ß = ss).
    2. Runs of white space become one space; none at the ends.
    3. Until nothing changes: quotes and Markdown emphasis at both ends, sentence punctuation at the *end*, and one pair
       of brackets around everything are removed. A minus sign, a leading point, %, $ and units stay: -5 is not 5.

    Articles stay. A text consisting only of such marks stays as it is after step 2.
    """
    folded = text
    while True:  # casefold can undo NFKC and vice versa; it settles after a round or two
        again = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", folded).casefold())
        if again == folded:
            break
        folded = again
    spaced = " ".join(folded.split())
    stripped = _strip_marks(spaced)
    return stripped or spaced


def _strip_marks(text: str) -> str:
    while True:
        before = text
        text = text.strip(_QUOTES + " ").rstrip(_CLOSING + " ")
        if len(text) >= 2 and _BRACKETS.get(text[0]) == text[-1] and _is_pair(text):
            text = text[1:-1]
        if text == before:
            return text


def _is_pair(text: str) -> bool:
    """Whether the bracket that opens the text is closed by its last character, as in (a) and not as in (a) or (b)."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == text[0]) - (letter == text[-1])
        if depth == 0:
            return index == len(text) - 1
    return False


def exact_match(prediction: str, answer: str) -> bool:
    """Whether two answers are equal after :func:`normalise`."""
    return normalise(prediction) == normalise(answer)
