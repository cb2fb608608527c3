"""Conflict-induced split: the opposite hypothesis, groups as conflicting inside as possible (paper §5, A.1.3)."""

from __future__ import annotations

import numpy as np

from merit.split.view import Groups, MixtureView


def split(view: MixtureView, axes: int, seed: int) -> Groups:
    """Greedy: every group starts from a most conflicting pair, then takes what keeps its mean inner cosine lowest.

    The K lowest-cosine disjoint pairs start the groups (single datasets where T < 2K). Then, one at a time, the
    (dataset, group) with the lowest resulting mean cosine inside the group is placed. A group that holds its share of the
    total weight takes no more while another has room: the paper does not say how it balances. ``seed`` plays no part.
    """
    assert view.cosine is not None
    cosine, weights = view.cosine, view.weights
    count, group_count = len(view.names), 2**axes
    pairs = sorted((cosine[i, j], i, j) for i in range(count) for j in range(i + 1, count))
    groups: Groups = []
    free = set(range(count))
    for _, i, j in pairs:
        unopened = group_count - len(groups)
        if unopened and i in free and j in free and len(free) - 2 >= unopened - 1:
            groups.append([i, j])
            free -= {i, j}
    for i in sorted(free)[: group_count - len(groups)]:
        groups.append([i])
        free.discard(i)
    share = weights.sum() / group_count
    to_group = np.array([cosine[:, group].sum(axis=1) for group in groups])  # (K, T): sum of cosines to each group
    inner = np.array([to_group[k, group].sum() - cosine[group, group].sum() for k, group in enumerate(groups)])
    while free:
        held = np.array([weights[group].sum() for group in groups])
        room = np.flatnonzero(held < share)
        room = room if len(room) else np.array([int(held.argmin())])
        rest = np.array(sorted(free))
        sizes = np.array([len(groups[k]) for k in room])
        means = (inner[room, None] + 2 * to_group[np.ix_(room, rest)]) / (sizes * (sizes + 1))[:, None]
        column, row = min((float(means[a, b].round(12)), int(b), int(a)) for a, b in _lowest(means))[1:]
        i, k = int(rest[column]), int(room[row])
        inner[k] += 2 * to_group[k, i]
        to_group[k] += cosine[:, i]
        groups[k].append(i)
        free.discard(i)
    return sorted(sorted(group) for group in groups)


def _lowest(means: np.ndarray) -> np.ndarray:
    """Positions (row, column) of the entries within rounding of the lowest."""
    return np.argwhere(means <= means.min() + 1e-12)
