"""What the conflict stage hands on: arrays, a table of datasets, a summary, and their files.

The keys of the stage's files are the fields below.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from merit.conflict.reliability import SubSamples
from merit.conflict.resampling import resampled_grams
from merit.conflict.spectrum import Concentration
from merit.errors import RunFolderError
from merit.files import read_as, write_bytes, write_json
from merit.recipe.schema import SplitSettings


@dataclass(frozen=True)
class DatasetFacts:
    """One dataset's line in ``datasets.json``; unknown figures are None.

    Attributes:
        name: The dataset.
        rows: s_t.
        examples: Size of its calibration sample; 0 where it was left out.
        target_tokens: Target tokens of the sample.
        loss_per_example: Mean over examples of the example's mean loss (nats).
        loss_per_token: Mean loss over target tokens (nats).
        norm: ‖g‖.
        unbiased_norm: ‖G‖ estimated without the noise's share.
        reliability: Expected cosine of g with that of another such sample.
        expected_cosine: Expected cosine of g with the gradient of all rows.
        seconds: Time it took when it was measured.
        reused: It was not measured again.
        keys: Its entries in the store of gradients.
        left_out: Why it is not in the geometry; None where it is.
    """

    name: str
    rows: int
    examples: int = 0
    target_tokens: int = 0
    loss_per_example: float | None = None
    loss_per_token: float | None = None
    norm: float | None = None
    unbiased_norm: float | None = None
    reliability: float | None = None
    expected_cosine: float | None = None
    seconds: float = 0.0
    reused: bool = False
    keys: list[str] = field(default_factory=list)
    left_out: str | None = None


@dataclass(frozen=True)
class Spread:
    """Least, mean and largest of some figures; None where there are none."""

    min: float | None
    mean: float | None
    max: float | None

    @classmethod
    def of(cls, values: np.ndarray) -> Self:
        """The spread of (n,) figures."""
        return cls(float(values.min()), float(values.mean()), float(values.max())) if len(values) else cls(*3 * (None,))


@dataclass(frozen=True)
class Pair:
    """Two datasets and the cosine of their gradients."""

    a: str
    b: str
    cosine: float


@dataclass(frozen=True)
class Summary:
    """What the geometry says, in figures and words: ``summary.json``.

    Attributes:
        datasets: T.
        left_out: Why, by name of the dataset.
        suggested_axes: r; 0 where no split is recommended.
        suggestion: The same in words, with the reason.
        spectral_concentration: Per axis, how far its cut pulls gradients apart.
        explained_variance: Shares of variance on the axes of ``scores``.
        explained_variance_doubly_centred: The same of the doubly centred cosines.
        explained_variance_raw: The same of the inner products.
        norms: :func:`merit.conflict.geometry.norm_concentration`.
        cosine: Over all pairs.
        negative_share: Share of pairs with a negative cosine.
        most_conflicting: Up to ten pairs, lowest cosine first.
        most_aligned: Up to five pairs, highest cosine first.
        expected_cosine: Over datasets.
        examples: Sample sizes.
        examples_in_all: Their sum.
        representation: As set.
        duplicates: Datasets with the same rows, or the same gradient up to rounding.
        warnings: Plain sentences.
        judged: ``split.cosine`` and ``split.balance`` of the split whose axes were judged.
    """

    datasets: int
    left_out: dict[str, str]
    suggested_axes: int
    suggestion: str
    spectral_concentration: list[Concentration]
    explained_variance: list[float]
    explained_variance_doubly_centred: list[float]
    explained_variance_raw: list[float]
    norms: dict[str, float | None]
    cosine: Spread
    negative_share: float | None
    most_conflicting: list[Pair]
    most_aligned: list[Pair]
    expected_cosine: Spread
    examples: Spread
    examples_in_all: int
    representation: str
    duplicates: list[list[str]]
    warnings: list[str]
    judged: dict[str, str] = field(default_factory=lambda: {"cosine": "plain", "balance": "samples"})


@dataclass(frozen=True)
class Arrays:
    """The content of ``geometry.npz``; row t = dataset t of ``names``, in the mixture's order; float64 unless said.

    Attributes:
        names: (T,) text.
        gram: (T, T) inner products ⟨g_i, g_j⟩.
        cosine: (T, T).
        cosine_corrected: (T, T) without the norms' noise; NaN where a dataset's noise drowns its gradient.
        quarter_gram: (4T, 4T): all first quarters, all second ones, ..., which add up to the gradients; float32 above 200
            datasets.
        examples: (T,) int64 sample sizes.
        rows: (T,) int64 s_t.
        norm: (T,) ‖g‖.
        scores: (T, R): PCA of the column-centred cosine.
        explained_variance: (R,) shares.
        scores_doubly_centred: (T, R): PCA of the doubly centred cosine.
        explained_variance_doubly_centred: (R,).
        scores_raw: (T, R): PCA of the column-centred Gram matrix.
        explained_variance_raw: (R,).
        unbiased_squared_norm: (T,), as ``noise``, ``reliability`` and ``expected_cosine``:
            :class:`merit.conflict.reliability.Reliability`.
        noise: (T,).
        reliability: (T,).
        expected_cosine: (T,).
        shares: (T, 4), as ``q_parts`` (T, 4), ``q`` and ``q_all``: :class:`merit.conflict.reliability.SubSamples`.
        q_parts: (T, 4).
        q: (T,).
        q_all: (T,).
        sketch_size: () int64: m; 0 where gradients were kept whole or by stride.
    """

    names: np.ndarray
    gram: np.ndarray
    cosine: np.ndarray
    cosine_corrected: np.ndarray
    quarter_gram: np.ndarray
    examples: np.ndarray
    rows: np.ndarray
    norm: np.ndarray
    scores: np.ndarray
    explained_variance: np.ndarray
    scores_doubly_centred: np.ndarray
    explained_variance_doubly_centred: np.ndarray
    scores_raw: np.ndarray
    explained_variance_raw: np.ndarray
    unbiased_squared_norm: np.ndarray
    noise: np.ndarray
    reliability: np.ndarray
    expected_cosine: np.ndarray
    shares: np.ndarray
    q_parts: np.ndarray
    q: np.ndarray
    q_all: np.ndarray
    sketch_size: np.ndarray

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read ``geometry.npz``.

        Raises:
            RunFolderError: It is missing, damaged, or of another version.
        """
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # NumPy does not read far enough to notice a wrong checksum
            if damaged:
                raise ValueError(f"{damaged} has a wrong checksum")
            with np.load(file, allow_pickle=False) as stored:
                arrays = cls(**{item.name: stored[item.name] for item in fields(cls)})
            count = len(arrays.names)
            if arrays.cosine.shape != (count, count) or arrays.gram.shape != (count, count):
                raise ValueError(f"{count} names, but cosines of shape {arrays.cosine.shape}")
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise RunFolderError(
                f"{file} is missing or damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__}).",
                f"Remove {file.parent / 'record.json'} and run `merit gradients` again: gradients already measured "
                "(partial/) are reused.",
            ) from None
        return arrays


@dataclass(frozen=True)
class Geometry:
    """The datasets' gradients compared.

    Attributes:
        arrays: Matrices and figures, row t = dataset t.
        datasets: One line per dataset, those left out last.
        summary: What it all says.
    """

    arrays: Arrays
    datasets: list[DatasetFacts]
    summary: Summary

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Dataset names (T,)."""
        return tuple(map(str, self.arrays.names))

    @property
    def cosine(self) -> np.ndarray:
        """Cosines of the gradients (T, T)."""
        return self.arrays.cosine

    @property
    def gram(self) -> np.ndarray:
        """Inner products of the gradients (T, T)."""
        return self.arrays.gram

    @property
    def parts(self) -> SubSamples:
        """Inner products and weights of the quarter-samples."""
        arrays = self.arrays
        return SubSamples(arrays.quarter_gram, arrays.shares, arrays.q_parts, arrays.q, arrays.q_all)

    @property
    def inflation(self) -> np.ndarray:
        """‖g‖ over the unbiased norm (T,): what takes the noise out of cosines; 1 where noise drowns the gradient."""
        unbiased = self.arrays.unbiased_squared_norm
        known = unbiased > 0
        return np.where(known, self.arrays.norm / np.sqrt(np.where(known, unbiased, 1.0)), 1.0)

    @property
    def unknown(self) -> list[str]:
        """Datasets whose sample has fewer than four examples: nothing tells how sure their gradient is."""
        return [name for name, shares in zip(self.names, self.arrays.shares, strict=True) if not (shares > 0).all()]

    @property
    def duplicates(self) -> list[list[str]]:
        """Datasets with the same rows, or with the same gradient up to rounding; each list is sorted."""
        return self.summary.duplicates

    def resampled(self, replicates: int, seed: int) -> Iterator[np.ndarray]:
        """Gram matrices as other calibration samples would have given (:mod:`merit.conflict.resampling`)."""
        return resampled_grams(self.parts, replicates, seed, int(self.arrays.sketch_size))

    def judged_otherwise(self, split: SplitSettings) -> str | None:
        """A note where the suggested number of axes is about cuts other than the split's; None where it is about them."""
        judged = self.summary.judged
        if judged == {"cosine": split.cosine, "balance": split.balance}:
            return None
        return (
            f"the suggested number of axes is about {judged['cosine']} cosines balanced by {judged['balance']}, which this "
            "split does not cut. To judge this split, remove conflict/record.json and run `merit gradients`: it measures "
            "nothing again."
        )

    def facts(self) -> dict[str, object]:
        """What a record of the stage should say."""
        return {
            "datasets": self.summary.datasets,
            "examples": self.summary.examples_in_all,
            "reused_datasets": sum(item.reused for item in self.datasets),
            "left_out": self.summary.left_out,
            "suggested_axes": self.summary.suggested_axes,
            "suggestion": self.summary.suggestion,
            "warnings": self.summary.warnings,
        }

    def summary_json(self) -> object:
        """The content of ``summary.json``."""
        return _plain(asdict(self.summary))

    def save(self, folder: Path) -> None:
        """Write ``geometry.npz``, ``datasets.json`` and ``summary.json``."""
        buffer = io.BytesIO()
        np.savez(buffer, **{item.name: getattr(self.arrays, item.name) for item in fields(self.arrays)})
        write_bytes(folder / "geometry.npz", buffer.getvalue())
        write_json(folder / "datasets.json", _plain([asdict(item) for item in self.datasets]))
        write_json(folder / "summary.json", self.summary_json())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            RunFolderError: A file is missing or damaged.
        """
        return cls(
            Arrays.load(folder / "geometry.npz"),
            read_as(folder / "datasets.json", list[DatasetFacts]),
            read_as(folder / "summary.json", Summary),
        )


def _plain(value: object) -> object:
    """The same for JSON: null for NaN and infinity."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
