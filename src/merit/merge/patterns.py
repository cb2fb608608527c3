"""Weights by tensor name: which pattern of ``merge.weights`` a tensor belongs to. Pure, names only.

A pattern is compared with whole components of a name (the parts between dots), anywhere in it: ``layers.*.mlp`` matches
``model.layers.3.mlp.up_proj.weight``, ``mlp`` matches it too, ``ml`` does not. ``*`` and ``?`` are those of the shell, and
``*`` may span dots. The first pattern that matches a name decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from merit.errors import MergeError

__all__ = ["assign_patterns"]


def assign_patterns(patterns: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The pattern that decides each tensor's weights; tensors that none matches are left out.

    Args:
        patterns: In order of precedence.
        names: Names of the tensors that are merged, as in the base's files.

    Raises:
        MergeError: A pattern matches no tensor, or only tensors that an earlier one takes.
    """
    taken: dict[str, str] = {}
    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(f".{name}.", f"*.{pattern}.*")]
        fresh = [name for name in matches if name not in taken]
        if not matches:
            raise MergeError(
                f"merge.weights: pattern {pattern!r} matches none of the {len(names)} tensors that are merged.",
                "A pattern fits whole parts of a name between its dots (h.*.mlp fits transformer.h.3.mlp.c_fc.weight)."
                + (f" Names look like {names[0]} and {names[-1]}." if names else ""),
            )
        if not fresh:
            raise MergeError(
                f"merge.weights: pattern {pattern!r} decides nothing: {taken[matches[0]]!r}, listed before it, takes all "
                f"{len(matches)} of its tensors.",
                "Put the narrower pattern first, or leave one out.",
            )
        taken |= dict.fromkeys(fresh, pattern)
    return taken
