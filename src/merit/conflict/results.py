"""From measured gradients to the stage's files: geometry arrays, sketches, the table of datasets, the summary.

It computes nothing but what :mod:`merit.conflict.geometry` and :mod:`merit.conflict.reliability` offer, and runs no model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merit.conflict import geometry
from merit.conflict.reliability import cross_half_cosine, noise_corrected_cosine, reliability
from merit.conflict.store import GradientStore, write_vectors
from merit.files import write_json
from merit.recipe.schema import Recipe
from merit.split.balance import bisect
from merit.split.view import Groups

if TYPE_CHECKING:
    from merit.conflict.stage import Measured

COMPONENTS = 6
"""R: principal axes that are kept (fewer with fewer datasets); recipes ask for at most as many."""

_DOUBLE_LIMIT = 256
"""Up to so many datasets half-sample products are computed in float64; above, blocks in float32 added in float64."""


def write_results(
    recipe: Recipe,
    measured: Sequence[Measured],
    left_out: Sequence[Measured],
    store: GradientStore,
    width: int,
    folder: Path,
) -> dict[str, Any]:
    """Write ``geometry.npz``, ``sketches.safetensors`` (for sketches), ``datasets.json`` and ``summary.json``.

    Returns:
        Extras for the stage's record.
    """
    arrays, concentration = compute_geometry(measured, store, width)
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.conflict.representation == "sketch":
        vectors = (_total(item, store, width)[:] for item in measured)
        write_vectors(folder / "sketches.safetensors", [item.name for item in measured], vectors, width)
    _save_arrays(folder / "geometry.npz", arrays)
    table = dataset_table(measured, left_out, arrays)
    reasons = {item.name: str(item.bad) for item in left_out}
    write_json(folder / "datasets.json", table)
    summary = summarise(recipe, arrays, concentration, reasons)
    write_json(folder / "summary.json", summary)
    return {
        "datasets": len(measured),
        "examples": int(arrays["examples"].sum()),
        "target_tokens": int(sum(item.facts["tokens"].sum() for item in measured)),
        "entries_per_gradient": width,
        "left_out": reasons,
        "suggested_axes": summary["suggested_axes"],
        "suggestion": summary["suggestion"],
        "lowest_reliability": summary["expected_cosine"]["min"],
        "warnings": summary["warnings"],
    }


def _total(item: Measured, store: GradientStore, width: int) -> Any:
    return store.vector(item.keys, width, (0, 1), 1.0 / item.weight)


def compute_geometry(
    measured: Sequence[Measured], store: GradientStore, width: int
) -> tuple[dict[str, np.ndarray], list[geometry.Concentration]]:
    """All arrays of ``geometry.npz``, in the order of ``measured``; computed in name order, so it changes no figure."""
    from merit.conflict.stage import half_samples

    order = sorted(range(len(measured)), key=lambda i: measured[i].name)
    items = [measured[i] for i in order]
    count = len(items)
    gram = geometry.gram_matrix([_total(item, store, width) for item in items])
    halves_rows = [store.vector(item.keys, width, (half,), 1.0 / item.weight) for half in (0, 1) for item in items]
    half_gram = geometry.gram_matrix(halves_rows, np.float64 if count <= _DOUBLE_LIMIT else np.float32)
    halves = half_samples(items, half_gram[:count, :count], half_gram[count:, count:], half_gram[:count, count:])
    found = reliability(halves)
    cosine = geometry.cosine_matrix(gram)
    column = geometry.principal_components(cosine, COMPONENTS)
    double = geometry.principal_components(cosine, COMPONENTS, "double")
    raw = geometry.principal_components(gram, COMPONENTS)
    splits = successive_splits(column.scores, [item.dataset_rows for item in items], [item.name for item in items])
    concentration = geometry.spectral_concentration(cosine, splits, cross_half_cosine(halves))
    back = np.argsort(order)
    grid = np.ix_(back, back)
    twice = np.concatenate([back, back + count])
    arrays = {
        "names": np.array([item.name for item in measured]),
        "gram": gram[grid],
        "cosine": cosine[grid],
        "cosine_corrected": noise_corrected_cosine(gram, found)[grid],
        "half_gram": half_gram[np.ix_(twice, twice)],
        "examples": np.array([item.examples for item in measured], dtype=np.int64),
        "rows": np.array([item.dataset_rows for item in measured], dtype=np.int64),
        "norm": np.sqrt(np.diag(gram))[back],
    }
    for suffix, pca in (("", column), ("_doubly_centred", double), ("_raw", raw)):
        arrays[f"scores{suffix}"] = pca.scores[back]
        arrays[f"explained_variance{suffix}"] = pca.explained_variance
    for field in ("unbiased_squared_norm", "noise", "reliability", "expected_cosine"):
        arrays[field] = getattr(found, field)[back]
    for field in ("share_even", "q_even", "q_odd", "q", "q_all"):
        arrays[field] = getattr(halves, field)[back]
    return arrays, concentration


def successive_splits(scores: np.ndarray, weights: Sequence[float], names: Sequence[str]) -> list[Groups]:
    """The split's own groups along 1, 2, ... axes, for as many as T datasets can fill; none where an axis is empty.

    Args:
        scores: (T, R), as :func:`merit.conflict.geometry.principal_components` gives them.
        weights: (T,) what the cuts balance.
        names: (T,) sorted.
    """
    most = min(scores.shape[1], len(names).bit_length() - 1)
    heavy = np.asarray(weights, dtype=np.float64)
    return [bisect(scores[:, :k], heavy, names) if scores[:, k - 1].any() else [] for k in range(1, most + 1)]


def dataset_table(
    measured: Sequence[Measured], left_out: Sequence[Measured], arrays: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """One entry per dataset, unknown figures as null; those left out come last, with the reason in ``left_out``."""
    table: list[dict[str, Any]] = []
    for i, item in enumerate(measured):
        unbiased = float(arrays["unbiased_squared_norm"][i])
        table.append(
            {
                "name": item.name,
                "rows": item.dataset_rows,
                "examples": item.examples,
                "target_tokens": int(item.facts["tokens"].sum()),
                "loss_per_example": _number(item.facts["example_loss"].sum() / item.examples),
                "loss_per_token": _number(item.facts["token_loss"].sum() / max(1.0, item.facts["tokens"].sum())),
                "norm": _number(arrays["norm"][i]),
                "unbiased_norm": _number(np.sqrt(unbiased)) if unbiased > 0 else None,
                "reliability": _number(arrays["reliability"][i]),
                "expected_cosine": _number(arrays["expected_cosine"][i]),
                "seconds": round(item.seconds, 3),
                "reused": item.reused,
                "keys": list(item.keys),
            }
        )
    unknown = ("loss_per_example", "loss_per_token", "norm", "unbiased_norm", "reliability", "expected_cosine")
    for item in left_out:
        facts = {"name": item.name, "rows": item.dataset_rows, "examples": 0, "target_tokens": 0}
        table.append(facts | dict.fromkeys(unknown) | {"left_out": item.bad})
    return table


def summarise(
    recipe: Recipe,
    arrays: Mapping[str, np.ndarray],
    concentration: Sequence[geometry.Concentration],
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """What the geometry says, in figures and words."""
    names, cosine = arrays["names"], arrays["cosine"]
    count = len(names)
    suggested, why = geometry.suggest_axes(concentration, count)
    pairs = [(float(cosine[i, j]), str(names[i]), str(names[j])) for i in range(count) for j in range(i)]
    pairs.sort()
    off = np.array([pair[0] for pair in pairs])
    known = arrays["expected_cosine"][np.isfinite(arrays["expected_cosine"])]
    return {
        "datasets": count,
        "left_out": dict(left_out),
        "suggested_axes": suggested,
        "suggestion": why,
        "spectral_concentration": [{key: _number(value) for key, value in asdict(c).items()} for c in concentration],
        "explained_variance": arrays["explained_variance"].tolist(),
        "explained_variance_doubly_centred": arrays["explained_variance_doubly_centred"].tolist(),
        "explained_variance_raw": arrays["explained_variance_raw"].tolist(),
        "norms": {key: _number(value) for key, value in geometry.norm_concentration(arrays["norm"]).items()},
        "cosine": _spread(off),
        "negative_share": float((off < 0).mean()) if len(off) else None,
        "most_conflicting": [{"a": a, "b": b, "cosine": value} for value, b, a in pairs[:10]],
        "most_aligned": [{"a": a, "b": b, "cosine": value} for value, b, a in pairs[::-1][:5]],
        "expected_cosine": _spread(known),
        "examples": {"total": int(arrays["examples"].sum()), **_spread(arrays["examples"].astype(float))},
        "representation": recipe.conflict.representation,
        "warnings": _warnings(arrays, recipe),
    }


def _warnings(arrays: Mapping[str, np.ndarray], recipe: Recipe) -> list[str]:
    found = []
    names = arrays["names"]
    drowned = [str(n) for n, u in zip(names, arrays["unbiased_squared_norm"], strict=True) if not u > 0]
    if drowned:
        found.append(
            f"sampling noise drowns the gradient of {len(drowned)} dataset(s), first {drowned[0]}: no corrected cosine "
            "there; take more examples (conflict.examples: auto)."
        )
    faint = arrays["norm"] < 1e-6 * np.median(arrays["norm"])
    if faint.any():
        found.append(
            f"the gradient of {int(faint.sum())} dataset(s), first {names[int(faint.argmax())]}, is a millionth of the "
            "median: rounding, not a direction."
        )
    if recipe.conflict.examples == "auto":
        target = recipe.conflict.target_reliability
        short = [str(n) for n, c in zip(names, arrays["expected_cosine"], strict=True) if c < target]
        if short:
            found.append(f"{len(short)} dataset(s) stay under the target {target} at max_examples, first {short[0]}.")
    single = [str(n) for n, e in zip(names, arrays["examples"], strict=True) if e == 1]
    if single:
        found.append(
            f"{len(single)} dataset(s) have a single example, first {single[0]}: no half-samples, no error bar."
        )
    return found


def _spread(values: np.ndarray) -> dict[str, float | None]:
    if not len(values):
        return {"min": None, "mean": None, "max": None}
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}


def _number(value: Any) -> Any:
    """A JSON number; null for NaN and infinity."""
    if isinstance(value, int | np.integer):
        return int(value)
    return float(value) if np.isfinite(value) else None


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
