"""Machines: which could train a branch of a recipe, and how those that trained a run's branches differ. Pure.

What must match among branches is compared when a branch comes in and when it is merged: base, rows, settings, MERIT's
version (major and minor). What may differ changes the last bits of a branch and nothing else: device, threads, processes,
versions of the libraries. It is told, since a run on other machines then gives other bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merit.errors import MergeError
from merit.recipe.schema import Recipe
from merit.run.needs import Weights, state_bytes
from merit.run.record import Record

USUAL = ((1, 140), (2, 80), (8, 40))
"""Machines that people rent: GPUs, and memory of each (GB = 10^9 bytes)."""
_SHARE = 0.9
"""Of a GPU's memory that weights and optimizer state may take; the rest is for activations and the allocator."""


@dataclass(frozen=True)
class Fit:
    """Whether a branch's weights, gradients and optimizer state fit a machine; activations come on top.

    Attributes:
        gpus: Number of GPUs.
        gigabytes: Memory of each, in 10^9 bytes.
        needed: Of it taken on each, in 10^9 bytes.
        settings: What the recipe has to say, as ``train.a: b``; empty if as it is.
        fits: Whether at least a tenth of the memory is left.
    """

    gpus: int
    gigabytes: int
    needed: float
    settings: str
    fits: bool

    def __str__(self) -> str:
        left = self.gigabytes - self.needed
        how = f"{self.needed:.0f} GB on each, {left:.0f} GB left for activations" if self.fits else "too small"
        words = f" ({self.settings})" if self.settings else ""
        return f"{self.gpus} × {self.gigabytes} GB{words}: {how}"


def fits(recipe: Recipe, weights: Weights) -> list[Fit]:
    """How the recipe's training fits the usual machines: as it is, and on one GPU if need be with 8-bit Adam.

    Float32 weights (4 bytes), and for trained weights gradients (4) and the optimizer's state; sharded over GPUs by FSDP2.
    """
    trained = 0 if recipe.model.trainable == "lora" else weights.trainable
    found = []
    for gpus, gigabytes in USUAL:
        sharding = f"train.processes: {gpus}, sharding: fsdp2" if gpus > 1 else ""
        state = (4 * weights.parameters + (4 + state_bytes(recipe.train.optimizer)) * trained) / gpus / 1e9
        choices = [Fit(gpus, gigabytes, state, sharding, state <= _SHARE * gigabytes)]
        if gpus == 1 and recipe.train.optimizer.startswith("adamw") and trained:
            small = (4 * weights.parameters + (4 + state_bytes("adamw_8bit")) * trained) / 1e9
            choices.append(Fit(1, gigabytes, small, "train.optimizer: adamw_8bit", small <= _SHARE * gigabytes))
        found.append(next((choice for choice in choices if choice.fits), choices[0]))
    return found


def trained_on(record: Record) -> dict[str, Any]:
    """Where and with what a branch was trained."""
    facts = record.facts
    told: dict[str, Any] = {key: facts[key] for key in ("device", "threads", "processes", "trained_by") if key in facts}
    libraries: dict[str, Any] = {
        key: record.versions[key] for key in ("torch", "transformers") if key in record.versions
    }
    return {**told, **libraries, "machine": record.host.get("name", "")}


def unlike(records: Mapping[int, Record]) -> list[str]:
    """What differs among the machines of branches that are to be merged, as notes.

    Args:
        records: The branches' records, by number.

    Raises:
        MergeError: They were trained by versions of MERIT that may not agree.
    """
    versions = {
        k: ".".join(str(record.facts["merit"]).split(".")[:2]) for k, record in records.items() if _says(record)
    }
    if len(set(versions.values())) > 1:
        told = ", ".join(f"branch {k}: {version}" for k, version in versions.items())
        raise MergeError(
            f"merge: the branches were trained by different versions of MERIT ({told}).",
            "Train them with one version, or leave some out with --exclude. Nothing was written.",
        )
    where = {k: trained_on(record) for k, record in records.items()}
    notes = []
    for key in ("device", "threads", "processes", "torch", "transformers", "trained_by"):
        values = {k: str(found.get(key, "merit" if key == "trained_by" else "unknown")) for k, found in where.items()}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{k}: {value}" for k, value in values.items())
            notes.append(
                f"the branches' {key.replace('_', ' ')} differs ({told}); it changes the last bits of a branch"
            )
    return notes


def _says(record: Record) -> bool:
    return "merit" in record.facts
