"""From measured gradients to a :class:`merit.conflict.result.Geometry`: figures computed elsewhere, put together here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from merit.conflict import geometry
from merit.conflict.reliability import PARTS, noise_corrected_cosine, reliability
from merit.conflict.result import Arrays, DatasetFacts, Geometry, Pair, Spread, Summary
from merit.conflict.sample import Measured, sub_samples
from merit.conflict.spectrum import PAPER_AXES, Concentration, spectral_concentration, suggest_axes
from merit.conflict.store import GradientStore
from merit.progress import count
from merit.recipe.schema import ConflictSettings
from merit.split.components import cosine_matrix, principal_components

COMPONENTS = 6
"""R: principal axes that are kept (fewer with fewer datasets); recipes ask for at most as many."""

SAME = 1e-6
"""Cosines closer to 1 than this are of one gradient, measured twice."""


@dataclass(frozen=True)
class Judged:
    """What a split cuts along, and what it balances.

    Attributes:
        cosine: ``plain`` or ``corrected``.
        tokens: Target tokens by dataset where they are balanced; empty where samples are.
    """

    cosine: str = "plain"
    tokens: Mapping[str, int] = field(default_factory=dict)

    def facts(self) -> dict[str, str]:
        """The same as the split's settings."""
        return {"cosine": self.cosine, "balance": "tokens" if self.tokens else "samples"}

    def words(self) -> str:
        """What a suggestion adds where the split is not the default one."""
        facts = self.facts()
        return "" if self == Judged() else f" Judged with {facts['cosine']} cosines, balanced by {facts['balance']}."


def build_geometry(
    measured: Sequence[Measured],
    left_out: Sequence[Measured],
    store: GradientStore,
    settings: ConflictSettings,
    judged: Judged | None = None,
) -> Geometry:
    """Compare the gradients of ``measured``; computed in name order, so that the order of datasets changes no figure.

    Args:
        measured: One per dataset.
        left_out: Datasets without a usable gradient.
        store: Holds the vectors.
        settings: How they were measured.
        judged: The split whose axes are judged. Default: plain cosines, balanced by samples.
    """
    judged = judged or Judged()
    order = sorted(range(len(measured)), key=lambda i: measured[i].name)
    items = [measured[i] for i in order]
    count = len(items)
    gram, quarters = _products(items, store)
    parts = sub_samples(items, quarters)
    noise = reliability(parts)
    cosine = cosine_matrix(gram)
    column, double = (principal_components(cosine, COMPONENTS, centring) for centring in ("columns", "double"))
    raw = principal_components(gram, COMPONENTS)
    heavy = np.array([judged.tokens.get(item.name, item.dataset_rows) for item in items], dtype=np.float64)
    concentration = spectral_concentration(
        parts, heavy, [item.name for item in items], PAPER_AXES, corrected=judged.cosine == "corrected"
    )
    back = np.argsort(order)
    grid = np.ix_(back, back)
    fourfold = np.concatenate([back + part * count for part in range(PARTS)])
    arrays = Arrays(
        names=np.array([item.name for item in measured]),
        gram=gram[grid],
        cosine=cosine[grid],
        cosine_corrected=noise_corrected_cosine(gram, noise)[grid],
        quarter_gram=quarters[np.ix_(fourfold, fourfold)],
        examples=np.array([item.examples for item in measured], dtype=np.int64),
        rows=np.array([item.dataset_rows for item in measured], dtype=np.int64),
        norm=np.sqrt(np.diag(gram))[back],
        scores=column.scores[back],
        explained_variance=column.explained_variance,
        scores_doubly_centred=double.scores[back],
        explained_variance_doubly_centred=double.explained_variance,
        scores_raw=raw.scores[back],
        explained_variance_raw=raw.explained_variance,
        **{
            key: getattr(noise, key)[back]
            for key in ("unbiased_squared_norm", "noise", "reliability", "expected_cosine")
        },
        **{key: getattr(parts, key)[back] for key in ("shares", "q_parts", "q", "q_all")},
        sketch_size=np.array(settings.sketch_size if settings.representation == "sketch" else 0),
    )
    table = [_facts(item, arrays, i) for i, item in enumerate(measured)]
    table += [DatasetFacts(item.name, item.dataset_rows, left_out=item.bad) for item in left_out]
    summary = _summary(arrays, table, concentration, settings, _duplicates(measured, arrays.cosine))
    return Geometry(
        arrays, table, replace(summary, judged=judged.facts(), suggestion=summary.suggestion + judged.words())
    )


def _products(items: Sequence[Measured], store: GradientStore) -> tuple[np.ndarray, np.ndarray]:
    """Inner products of the gradients (T, T) and of their quarters (4T, 4T)."""
    quarters = [[item.vector(store, part) for part in range(PARTS)] for item in items]
    if len(items) <= geometry.DOUBLE_LIMIT:
        vectors = [item[part] for part in range(PARTS) for item in quarters]
        return geometry.gram_matrix([item.vector(store) for item in items]), geometry.gram_matrix(vectors)
    return geometry.folded_products(quarters, geometry.fold_size(PARTS * len(items)))


def _duplicates(measured: Sequence[Measured], cosine: np.ndarray) -> list[list[str]]:
    """Datasets with the same rows, or with the same direction up to rounding, in groups."""
    first: dict[str, int] = {}
    pairs = np.argwhere(np.tril(cosine, -1) > 1.0 - SAME).tolist()
    group = list(range(len(measured)))
    for i, j in (*pairs, *((i, first.setdefault(item.content, i)) for i, item in enumerate(measured))):
        old, new = group[i], group[j]
        if old != new:
            group = [new if label == old else label for label in group]
    names: dict[int, list[str]] = {}
    for label, item in zip(group, measured, strict=True):
        names.setdefault(label, []).append(item.name)
    return sorted(sorted(found) for found in names.values() if len(found) > 1)


def _facts(item: Measured, arrays: Arrays, i: int) -> DatasetFacts:
    unbiased = float(arrays.unbiased_squared_norm[i])
    return DatasetFacts(
        name=item.name,
        rows=item.dataset_rows,
        examples=item.examples,
        target_tokens=item.tokens,
        loss_per_example=item.example_loss / item.examples,
        loss_per_token=item.token_loss / max(1, item.tokens),
        norm=float(arrays.norm[i]),
        unbiased_norm=math.sqrt(unbiased) if unbiased > 0 else None,
        reliability=float(arrays.reliability[i]),
        expected_cosine=float(arrays.expected_cosine[i]),
        seconds=round(item.seconds, 3),
        reused=item.reused,
        keys=list(item.keys),
    )


def _summary(
    arrays: Arrays,
    table: Sequence[DatasetFacts],
    concentration: list[Concentration],
    settings: ConflictSettings,
    duplicates: list[list[str]],
) -> Summary:
    names, cosine = arrays.names, arrays.cosine
    count = len(names)
    suggested, why = suggest_axes(concentration, count)
    off = cosine[np.tril_indices(count, -1)]
    return Summary(
        datasets=count,
        left_out={item.name: item.left_out for item in table if item.left_out},
        suggested_axes=suggested,
        suggestion=why,
        spectral_concentration=concentration,
        explained_variance=arrays.explained_variance.tolist(),
        explained_variance_doubly_centred=arrays.explained_variance_doubly_centred.tolist(),
        explained_variance_raw=arrays.explained_variance_raw.tolist(),
        norms=dict(geometry.norm_concentration(arrays.norm)),
        cosine=Spread.of(off),
        negative_share=float((off < 0).mean()) if len(off) else None,
        most_conflicting=_extreme(names, cosine, 10),
        most_aligned=_extreme(names, cosine, 5, highest=True),
        expected_cosine=Spread.of(arrays.expected_cosine[np.isfinite(arrays.expected_cosine)]),
        examples=Spread.of(arrays.examples.astype(float)),
        examples_in_all=int(arrays.examples.sum()),
        representation=settings.representation,
        duplicates=duplicates,
        warnings=_warnings(arrays, settings, duplicates),
    )


def _extreme(names: np.ndarray, cosine: np.ndarray, number: int, *, highest: bool = False) -> list[Pair]:
    """The pairs of lowest, or of highest cosine; by name among equals."""
    first, second = np.tril_indices(len(cosine), -1)
    values = cosine[first, second]
    if len(values) > number:
        edge = np.partition(values, -number if highest else number - 1)[-number if highest else number - 1]
        near = np.flatnonzero(values >= edge if highest else values <= edge)
        first, second, values = first[near], second[near], values[near]
    pairs = sorted((float(v), str(names[i]), str(names[j])) for v, i, j in zip(values, first, second, strict=True))
    return [Pair(a, b, value) for value, b, a in (pairs[::-1] if highest else pairs)[:number]]


def _warnings(arrays: Arrays, settings: ConflictSettings, duplicates: Sequence[Sequence[str]]) -> list[str]:
    names = arrays.names
    warnings = [
        f"{', '.join(group)} have the same rows or the same gradient; a split keeps them together."
        for group in duplicates
    ]
    drowned = names[~(arrays.unbiased_squared_norm > 0)]
    if len(drowned):
        warnings.append(
            f"sampling noise drowns the gradient of {count(len(drowned), 'dataset')}, first {drowned[0]}: no corrected "
            "cosine there; take more examples (conflict.examples: auto)."
        )
    faint = names[arrays.norm < 1e-6 * np.median(arrays.norm)]
    if len(faint):
        warnings.append(
            f"the gradient of {count(len(faint), 'dataset')}, first {faint[0]}, is a millionth of the median: "
            "rounding, not a direction."
        )
    short = names[arrays.expected_cosine < settings.target_reliability]
    if settings.examples == "auto" and len(short):
        warnings.append(
            f"conflict.target_reliability {settings.target_reliability} is not reached at conflict.max_examples by "
            f"{count(len(short), 'dataset')}, first {short[0]}."
        )
    few = names[~(arrays.shares > 0).all(axis=1)]
    if len(few):
        warnings.append(
            f"fewer than four examples in {count(len(few), 'dataset')}, first {few[0]}: how reliable such a gradient is "
            "cannot be said."
        )
    return warnings
