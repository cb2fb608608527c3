"""Groups that the recipe lists (``split.groups``) instead of a cut: by hand, or by `merit add` and `merit remove`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merit.errors import RecipeError
from merit.split.result import Split


def given_split(method: str, groups: Sequence[Sequence[str]], weights: Mapping[str, float], balance: str) -> Split:
    """The listed groups as a split; datasets that no group names are left out, with a warning.

    Args:
        method: The method that the groups came from; recorded.
        groups: Dataset names per group.
        weights: Weight per dataset of the mixture.
        balance: What the weights count; recorded.

    Raises:
        RecipeError: A group is empty, names a dataset that is not there, or one that another group has.
    """
    named = [name for group in groups for name in group]
    twice = sorted({name for name in named if named.count(name) > 1})
    unknown = sorted(set(named) - set(weights))
    if twice or unknown or not all(groups):
        problem = f"{twice[0]} is in two groups" if twice else "a group is empty"
        problem = f"the mixture has no dataset {unknown[0]}" if unknown else problem
        raise RecipeError(
            f"split.groups: {problem}.", "List every dataset once, or remove split.groups and let split.method decide."
        )
    left_out = sorted(set(weights) - set(named))
    return Split(
        method=method,
        axes=max(0, (len(groups) - 1).bit_length()),
        balance=balance,
        groups=[sorted(group) for group in groups],
        weights=[float(sum(weights[name] for name in group)) for group in groups],
        left_out=left_out,
        warnings=[f"{name} is in none of split.groups, so nothing is trained on it." for name in left_out],
        stability=None,
        open=[],
    )
