"""One dataset's gradient: which rows it is of, what decides it, and measuring it into the store chunk by chunk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

from merit.conflict.gradients import GradientMeter, vector_width
from merit.conflict.reliability import PARTS, SubSamples, calibration_steps, reliability
from merit.conflict.store import GradientStore, StoredVector, Sums, content_key
from merit.errors import ConflictError
from merit.hf.base import Base
from merit.hf.models import autocast, load_model, trainable_parameters
from merit.hf.rows import EncodedRow
from merit.mixture.calibration import draw
from merit.mixture.dataset import EncodedDataset
from merit.recipe.schema import ConflictSettings


@dataclass(frozen=True)
class Probe:
    """What decides a gradient next to the rows; workers get it whole.

    Attributes:
        base: The base; its settings name the trainable subset.
        settings: Sample, representation, weighting.
        seed: Of draws, sketch and new adapters.
        device: Where to compute.
    """

    base: Base
    settings: ConflictSettings
    seed: int
    device: torch.device

    def meter(self, device: torch.device | None = None) -> GradientMeter:
        """The base loaded, ready to measure."""
        device = device or self.device
        model = load_model(self.base, device, trainable=True, seed=self.seed)
        return GradientMeter(
            model,
            self.settings,
            seed=self.seed,
            batcher=self.base.batcher,
            device=device,
            autocast=partial(autocast, self.base.settings, device),
        )

    def layout(self) -> dict[str, int]:
        """Entries of every trainable parameter, in order; the model is loaded for it and dropped."""
        model = load_model(self.base, torch.device("cpu"), trainable=True, seed=self.seed)
        return {name: parameter.numel() for name, parameter in trainable_parameters(model).items()}

    def width(self) -> int:
        """D, without keeping a model in this process."""
        if self.settings.representation == "sketch":
            return self.settings.sketch_size
        return vector_width(self.settings, sum(self.layout().values()))

    def facts(self) -> dict[str, object]:
        """What decides the vectors of given rows, as JSON."""
        settings, model = self.settings, self.base.settings
        size = {"sketch": [settings.sketch_size, self.seed], "stride": settings.stride, "exact": 1}
        return {
            "base": self.base.fingerprint,
            "trainable": model.trainable,
            "lora": model.lora.model_dump(mode="json") | {"seed": self.seed} if model.trainable == "lora" else None,
            "representation": settings.representation,
            "size": size[settings.representation],
            "weighting": settings.weighting,
            "arithmetic": "float32" if self.device.type == "cpu" else model.dtype,
            "device": self.device.type,
        }


@dataclass(frozen=True)
class Task:
    """One dataset's measurement: what a worker needs, and nothing more.

    Attributes:
        name: The dataset's name.
        content: Fingerprint of its rows.
        rows: The largest sample that may be needed, in the order drawn.
        steps: Sample sizes to stop at; a fixed sample has one.
        keys: Content key of the chunk that ends at each step.
        q_all: Q of all the dataset's rows (:mod:`merit.conflict.reliability`).
        dataset_rows: s_t.
    """

    name: str
    content: str
    rows: list[EncodedRow]
    steps: list[int]
    keys: list[str]
    q_all: float
    dataset_rows: int


@dataclass(frozen=True)
class Measured:
    """One dataset's gradient: the entries it is stored in, and its sums.

    Attributes:
        name: The dataset's name.
        content: Fingerprint of its rows.
        keys: Entries of the store whose sum it is.
        examples: Size of the sample.
        dataset_rows: s_t.
        q_all: Q of all the dataset's rows.
        weight: (4,) Σw per quarter.
        weight_squared: (4,) Σw² per quarter.
        example_loss: Σ of the examples' mean losses (nats).
        token_loss: Σ of the target tokens' losses (nats).
        tokens: Target tokens.
        seconds: Time it took when it was measured (reused entries keep their own).
        width: D.
        reused: No entry had to be computed.
        bad: Why the dataset was left out; None where it was not.
    """

    name: str
    content: str
    keys: tuple[str, ...]
    examples: int
    dataset_rows: int
    q_all: float
    weight: np.ndarray
    weight_squared: np.ndarray
    example_loss: float = 0.0
    token_loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    width: int = 0
    reused: bool = False
    bad: str | None = None

    def vector(self, store: GradientStore, *parts: int) -> StoredVector:
        """The mean gradient, or the share of it that lies in some quarters of the sample."""
        return store.vector(self.keys, self.width, parts or tuple(range(PARTS)), 1.0 / float(self.weight.sum()))


def make_task(dataset: EncodedDataset, probe: Probe, *, with_rows: bool) -> Task:
    """What to measure of one dataset, and under which keys."""
    settings, rows = probe.settings, len(dataset)
    if rows == 0:
        raise ConflictError(f"conflict: {dataset.name} has no rows.", "Exclude it (mixture.exclude) or give it rows.")
    fixed = settings.examples
    steps = calibration_steps(rows, settings.max_examples) if fixed == "auto" else [min(rows, fixed)]
    drawn = draw(rows, steps[-1], probe.seed, dataset.name)
    shared = {"dataset": dataset.fingerprint, **probe.facts()}
    keys, begin = [], 0
    for end in steps:
        digest = hashlib.sha256(drawn[begin:end].astype("<i8").tobytes()).hexdigest()
        keys.append(content_key(shared | {"rows": digest}))
        begin = end
    weights = np.asarray(dataset.target_counts if settings.weighting == "tokens" else np.ones(rows), dtype=np.float64)
    return Task(
        name=dataset.name,
        content=dataset.fingerprint,
        rows=[dataset[int(i)] for i in drawn] if with_rows else [],
        steps=steps,
        keys=keys,
        q_all=float((weights**2).sum() / weights.sum() ** 2),
        dataset_rows=rows,
    )


def from_store(task: Task, store: GradientStore, settings: ConflictSettings) -> Measured | None:
    """The dataset's gradient if the store has all that it needs."""
    chunks: list[Sums] = []
    for key in task.keys:
        sums = store.read(key)
        if sums is None:
            return None
        chunks.append(sums)
        measured = _combine(task, chunks, reused=True)
        if len(chunks) == len(task.keys) or _enough(measured, store, settings):
            return _refuse_zero(task, measured, store)
    return None


def measure_task(task: Task, store: GradientStore, meter: GradientMeter, settings: ConflictSettings) -> Measured:
    """Measure chunk by chunk until the sample is large enough; chunks that stand are reused."""
    chunks: list[Sums] = []
    begin = 0
    for end, key in zip(task.steps, task.keys, strict=True):
        sums = store.read(key)
        if sums is None:
            try:
                with store.writing(key, meter.width) as (vectors, sums):
                    # Steps are multiples of four, so that a chunk's quarters are the sample's.
                    meter.measure(task.name, task.rows[begin:end], vectors, sums)
            except ConflictError as error:
                return _bad(task, error.message)
        chunks.append(sums)
        begin = end
        measured = _combine(task, chunks, reused=False)
        if len(chunks) == len(task.keys) or _enough(measured, store, settings):
            break
    return _refuse_zero(task, measured, store)


def _refuse_zero(task: Task, measured: Measured, store: GradientStore) -> Measured:
    if _products(measured, store).sum() > 0:
        return measured
    return _bad(task, f"conflict: the gradient of {task.name} is zero: nothing of it reaches a trainable parameter.")


def _bad(task: Task, why: str) -> Measured:
    return Measured(
        task.name, task.content, (), 0, task.dataset_rows, task.q_all, np.zeros(PARTS), np.zeros(PARTS), bad=why
    )


def _combine(task: Task, chunks: list[Sums], *, reused: bool) -> Measured:
    def total(field: str) -> np.ndarray:
        sums: np.ndarray = np.array([asdict(chunk)[field] for chunk in chunks], dtype=np.float64).sum(axis=0)
        return sums

    return Measured(
        name=task.name,
        content=task.content,
        keys=tuple(task.keys[: len(chunks)]),
        examples=task.steps[len(chunks) - 1],
        dataset_rows=task.dataset_rows,
        q_all=task.q_all,
        weight=total("weight"),
        weight_squared=total("weight_squared"),
        example_loss=float(total("example_loss").sum()),
        token_loss=float(total("token_loss").sum()),
        tokens=int(total("tokens").sum()),
        seconds=float(sum(chunk.seconds for chunk in chunks)),
        width=chunks[0].width,
        reused=reused,
    )


def _products(item: Measured, store: GradientStore) -> np.ndarray:
    """Inner products (4, 4) of one dataset's quarters, in slices."""
    vectors = [item.vector(store, part) for part in range(PARTS)]
    products = np.zeros((PARTS, PARTS))
    for start in range(0, item.width, 2**20):
        block = np.array([vector[start : start + 2**20] for vector in vectors], dtype=np.float64)
        products += block @ block.T
    return products


def sub_samples(measured: Sequence[Measured], gram: np.ndarray) -> SubSamples:
    """Inner products of all first quarters, then all second ones, ... (4T, 4T), joined with the samples' weights."""
    weight = np.array([item.weight for item in measured])
    squared = np.array([item.weight_squared for item in measured])
    total = weight.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        q_parts = np.where(weight > 0, squared / weight**2, np.inf)
    return SubSamples(
        gram=gram,
        shares=weight / total[:, None],
        q_parts=q_parts,
        q=squared.sum(axis=1) / total**2,
        q_all=np.array([item.q_all for item in measured]),
    )


def _enough(item: Measured, store: GradientStore, settings: ConflictSettings) -> bool:
    expected = reliability(sub_samples([item], _products(item, store))).expected_cosine[0]
    return bool(expected >= settings.target_reliability)
