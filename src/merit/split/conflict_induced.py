"""Conflict-induced split: the opposite hypothesis, groups as conflicting inside as possible (paper §5, A.1.3)."""

from __future__ import annotations

import numpy as np

from merit.split.view import Groups, MixtureView


def split(view: MixtureView, axes: int, seed: int) -> Groups:
    """Greedy: every group starts from a most conflicting pair, then takes what keeps its mean inner cosine lowest.

    The K lowest-cosine disjoint pairs start the groups (single datasets where T < 2K). Then, one at a time, the
    (dataset, group) with the lowest resulting mean cosine inside the group is placed. A group that has its share of the
    total weight takes no more while another has room: the paper does not say how it balances. Finally, datasets are swapped
    between groups while that lowers the cosines inside them: greedy placement alone is hardly better than chance for two
    groups. ``seed`` is not used.
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
    _swap(groups, cosine, weights, fixed=2)
    return sorted(sorted(group) for group in groups)


def _swap(groups: Groups, cosine: np.ndarray, weights: np.ndarray, fixed: int) -> None:
    """Swap datasets between groups, in place, as long as the total of the cosines inside groups decreases.

    The best swap comes first. The ``fixed`` first datasets of every group stay; no group's weight moves further than 5 %
    from its share, or further than the groups were before.
    """
    share = float(weights.sum()) / len(groups)
    label = np.empty(len(cosine), dtype=np.int64)
    place = {i: (k, n) for k, group in enumerate(groups) for n, i in enumerate(group)}
    for i, (k, _) in place.items():
        label[i] = k
    movable = sorted(i for i, (_, n) in place.items() if n >= fixed)
    if not movable:
        return
    totals = np.array([weights[group].sum() for group in groups])
    slack = max(0.05 * share, float(np.abs(totals - share).max()))
    for _ in range(len(cosine) ** 2):
        one_hot = np.eye(len(groups))[label]
        inner = (cosine - np.diag(np.diag(cosine))) @ one_hot  # (T, K): cosines of a dataset with each group
        a = np.array(movable)
        here, there = label[a], inner[a]
        change = there[:, here] - there[np.arange(len(a)), here][:, None]  # i in the group of j, less in its own
        change = change + change.T - 2 * cosine[np.ix_(a, a)]
        moved = weights[a][None, :] - weights[a][:, None]  # what the group of i gains
        off = np.abs(totals[here] - share)[:, None]
        new = np.abs((totals[here] - share)[:, None] + moved)
        allowed = (here[:, None] != here[None, :]) & ((new <= slack) | (new <= off))
        allowed &= allowed.T
        change = np.where(allowed, change, 0.0)
        if change.min() > -1e-9:
            return
        i, j = (int(a[x]) for x in np.unravel_index(int(change.argmin()), change.shape))
        k, m = int(label[i]), int(label[j])
        groups[k][groups[k].index(i)], groups[m][groups[m].index(j)] = j, i
        label[i], label[j] = m, k
        totals[k] += weights[j] - weights[i]
        totals[m] += weights[i] - weights[j]


def _lowest(means: np.ndarray) -> np.ndarray:
    """Positions (row, column) of the entries within rounding of the lowest."""
    return np.argwhere(means <= means.min() + 1e-12)
