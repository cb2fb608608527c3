"""The conflict stage: measure every dataset's gradient at the base (resuming and reusing), compare them, write the files.

It joins the store, the model and the maths; it contains none of them. Files in the stage's folder:

- ``geometry.npz``: arrays in the mixture's order (:func:`measure_conflict` lists them);
- ``sketches.safetensors``: one float32 vector per dataset (representation: sketch);
- ``datasets.json``, ``summary.json``: the same for people;
- ``partial/``: half-sample vectors by content key, from which a killed run goes on and a changed mixture starts; with
  ``conflict.cache`` they lie there instead.
"""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merit.conflict.gradients import GradientMeter
from merit.conflict.reliability import HalfSamples, calibration_steps, reliability
from merit.conflict.results import write_results
from merit.conflict.store import GradientStore, check_space, content_key
from merit.errors import ConflictError, ResourceError
from merit.hf.models import autocast, load_model, trainable_parameters
from merit.mixture.calibration import draw
from merit.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch

    from merit.hf.base import Base
    from merit.hf.rows import EncodedRow
    from merit.mixture.encode import EncodedDataset

__all__ = ["Measured", "half_samples", "measure_conflict", "measure_datasets"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Task:
    """One dataset's measurement: what a worker needs, and nothing more.

    Attributes:
        name: The dataset's name.
        rows: The largest sample that may be needed, in the order drawn.
        steps: Sample sizes to stop at; a fixed sample has one.
        keys: Content key of the chunk that ends at each step.
        q_all: Q of all the dataset's rows (:mod:`merit.conflict.reliability`).
        dataset_rows: s_t.
    """

    name: str
    rows: list[EncodedRow]
    steps: list[int]
    keys: list[str]
    q_all: float
    dataset_rows: int


@dataclass(frozen=True)
class Measured:
    """One dataset's gradient: which entries hold it, and its sums.

    Attributes:
        name: The dataset's name.
        keys: Entries of the store whose sum it is.
        examples: Size of the sample.
        dataset_rows: s_t.
        q_all: Q of all the dataset's rows.
        facts: Per half: weight, weight_squared, example_loss, token_loss, tokens, examples.
        seconds: Time it took when it was measured (reused entries keep their own).
        reused: No entry had to be computed.
        bad: Why the dataset was left out; None where it was not.
    """

    name: str
    keys: tuple[str, ...]
    examples: int
    dataset_rows: int
    q_all: float
    facts: Mapping[str, np.ndarray]
    seconds: float
    reused: bool
    bad: str | None = None

    @property
    def weight(self) -> float:
        """Σ w over the sample."""
        return float(self.facts["weight"].sum())


def measure_conflict(
    recipe: Recipe,
    mixture: Mapping[str, EncodedDataset],
    folder: Path,
    *,
    base: Base,
    device: torch.device,
    jobs: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure gradients, then write geometry, sketches, tables and a summary into ``folder``.

    Arrays of ``geometry.npz``, row t = dataset t of ``names``, in the mixture's order; float64 unless said: names (T,) text;
    gram, cosine (T, T); scores (T, R), explained_variance (R,) shares: PCA of the column-centred cosine; the same with
    suffix _doubly_centred and _raw (Gram matrix); cosine_corrected (T, T), NaN where a dataset's noise drowns its gradient;
    norm, unbiased_squared_norm, noise, reliability, expected_cosine (T,); examples, rows (T,) int64;
    half_gram (2T, 2T): even halves, then odd halves, whose pairwise sums are the gradients; share_even, q_even, q_odd, q,
    q_all (T,): see :class:`merit.conflict.reliability.HalfSamples`.

    Args:
        recipe: ``seed``, ``model`` and ``conflict`` are read.
        mixture: Training rows by dataset name.
        folder: The stage's folder. Its ``partial`` sub-folder may stand from before.
        base: The base.
        device: Where to compute; with several CUDA devices and jobs > 1 each worker takes one.
        jobs: Processes. Workers on a CPU have one thread each; where this process has one too, results are the same bit for
            bit whatever ``jobs`` is, otherwise up to float rounding.
        progress: Called with datasets done, datasets in all, and the latest name.

    Returns:
        What the stage's record should say.

    Raises:
        ConflictError: A gradient is zero or not finite (and ``skip_bad`` is off), or fewer than one dataset is left.
        ResourceError: Disk or memory does not suffice, or a worker was killed.
    """
    started = time.perf_counter()
    store = GradientStore(Path(recipe.conflict.cache) if recipe.conflict.cache else folder / "partial")
    measured, width = measure_datasets(
        recipe,
        mixture,
        store,
        base=base,
        device=device,
        jobs=jobs,
        progress=progress,
    )
    good = [item for item in measured if item.bad is None]
    if not good:
        raise ConflictError("conflict: no dataset is left; every gradient was zero or not finite.")
    extras = write_results(recipe, good, [item for item in measured if item.bad], store, width, folder)
    if not recipe.conflict.cache:
        store.prune(key for item in good for key in item.keys)
    return {
        **extras,
        "device": str(device),
        "jobs": jobs,
        "reused_datasets": sum(item.reused for item in good),
        "stage_seconds": round(time.perf_counter() - started, 3),
    }


def measure_datasets(
    recipe: Recipe,
    mixture: Mapping[str, EncodedDataset],
    store: GradientStore,
    *,
    base: Base,
    device: torch.device,
    jobs: int = 1,
    progress: Progress | None = None,
) -> tuple[list[Measured], int]:
    """Gradients of every dataset into ``store``, computing only those that are not there; in the mixture's order, and D.

    Raises:
        ConflictError: As :func:`measure_conflict`.
        ResourceError: As :func:`measure_conflict`.
    """
    if not mixture:
        raise ConflictError("conflict: the mixture holds no dataset.")
    makers = {name: partial(_task, recipe, dataset, base.fingerprint, device) for name, dataset in mixture.items()}
    load = partial(_make_meter, recipe, base)
    found: dict[str, Measured] = {}
    missing: list[str] = []
    for name, make in makers.items():
        task = make(with_rows=False)
        whole = _from_store(task, store, recipe)
        if whole is None:
            missing.append(name)
        else:
            found[name] = _usable(whole, recipe)
    total = len(makers)

    def tell(label: str) -> None:
        if progress is not None:
            progress(len(found), total, label)

    tell("")
    if missing:
        in_process = jobs == 1 or len(missing) == 1
        meter = load(device) if in_process else None
        width = meter.width if meter else _width(recipe, base)
        largest = max(len(makers[name](with_rows=False).steps) for name in missing)
        check_space(
            store.folder, len(missing) * largest * 8 * width, f"conflict: {len(missing)} gradients of {width} entries"
        )
        tasks: Iterator[Task] = (makers[name](with_rows=True) for name in missing)
        results = (
            (_measure(task, store, recipe, meter) for task in tasks)
            if meter
            else _in_workers(tasks, store, recipe, load, device, min(jobs, len(missing)))
        )
        for result in results:
            found[result.name] = _usable(result, recipe)
            tell(result.name)
    else:
        width = int(next(iter(found.values())).facts["width"][0])
    return [found[name] for name in makers], width


def _usable(result: Measured, recipe: Recipe) -> Measured:
    if result.bad is None or recipe.conflict.skip_bad:
        return result
    raise ConflictError(
        result.bad,
        "Leave such datasets out with conflict.skip_bad (--skip-bad) or mixture.exclude.",
        "What was measured of other datasets stands; the next run goes on from there.",
    )


def _task(recipe: Recipe, dataset: EncodedDataset, base: str, device: torch.device, *, with_rows: bool) -> Task:
    """What to measure of one dataset, and under which keys."""
    settings, rows = recipe.conflict, len(dataset)
    if rows == 0:
        raise ConflictError(f"conflict: {dataset.name} has no rows.", "Exclude it (mixture.exclude) or give it rows.")
    automatic = settings.examples == "auto"
    steps = calibration_steps(rows, settings.max_examples) if automatic else [min(rows, int(settings.examples))]
    drawn = draw(rows, steps[-1], recipe.seed, dataset.name)
    shared = {
        "dataset": dataset.fingerprint,
        "base": base,
        "trainable": recipe.model.trainable,
        "lora": recipe.model.lora.model_dump(mode="json") | {"seed": recipe.seed}
        if recipe.model.trainable == "lora"
        else None,
        "representation": settings.representation,
        "size": {"sketch": [settings.sketch_size, recipe.seed], "stride": settings.stride, "exact": 1}[
            settings.representation
        ],
        "weighting": settings.weighting,
        "arithmetic": "float32" if device.type == "cpu" else recipe.model.dtype,
        "device": device.type,
    }
    keys, begin = [], 0
    for end in steps:
        digest = hashlib.sha256(drawn[begin:end].astype("<i8").tobytes()).hexdigest()
        keys.append(content_key(shared | {"rows": digest, "first_half": begin % 2}))
        begin = end
    weights = np.asarray(dataset.target_counts if settings.weighting == "tokens" else np.ones(rows), dtype=np.float64)
    return Task(
        name=dataset.name,
        rows=[dataset[int(i)] for i in drawn] if with_rows else [],
        steps=steps,
        keys=keys,
        q_all=float((weights**2).sum() / weights.sum() ** 2),
        dataset_rows=rows,
    )


def _from_store(task: Task, store: GradientStore, recipe: Recipe) -> Measured | None:
    """The dataset's gradient if the store has all that it needs."""
    facts = []
    for step, key in enumerate(task.keys):
        entry = store.read_intact(key)
        if entry is None:
            return None
        facts.append(entry)
        measured = _combine(task, facts, reused=True)
        if step + 1 == len(task.keys) or _enough(measured, store, recipe):
            return _refuse_zero(task, measured, store)
    return None


def _measure(task: Task, store: GradientStore, recipe: Recipe, meter: GradientMeter) -> Measured:
    """Measure chunk by chunk until the sample is large enough; chunks that stand are reused."""
    facts: list[dict[str, Any]] = []
    begin = 0
    for step, (end, key) in enumerate(zip(task.steps, task.keys, strict=True)):
        entry = store.read(key)
        if entry is None:
            try:
                with store.writing(key, meter.width) as (vectors, entry):
                    # Steps are even, so that a chunk's even places are the sample's even places.
                    entry |= meter.measure(task.name, task.rows[begin:end], vectors) | {"width": [meter.width]}
            except ConflictError as error:
                return _bad(task, error.message)
        facts.append(entry)
        begin = end
        measured = _combine(task, facts, reused=False)
        if step + 1 == len(task.keys) or _enough(measured, store, recipe):
            break
    return _refuse_zero(task, measured, store)


def _refuse_zero(task: Task, measured: Measured, store: GradientStore) -> Measured:
    if _products(measured, store)[0] > 0:
        return measured
    return _bad(task, f"conflict: the gradient of {task.name} is zero: nothing of it reaches a trainable parameter.")


def _bad(task: Task, why: str) -> Measured:
    return Measured(task.name, (), 0, task.dataset_rows, task.q_all, {}, 0.0, False, why)


def _combine(task: Task, facts: list[dict[str, Any]], *, reused: bool) -> Measured:
    fields = ("examples", "weight", "weight_squared", "example_loss", "token_loss", "tokens")
    count = len(facts)
    return Measured(
        name=task.name,
        keys=tuple(task.keys[:count]),
        examples=task.steps[count - 1],
        dataset_rows=task.dataset_rows,
        q_all=task.q_all,
        facts={field: np.sum([np.asarray(f[field], dtype=np.float64) for f in facts], axis=0) for field in fields}
        | {"width": np.asarray(facts[0]["width"])},
        seconds=float(sum(f["seconds"] for f in facts)),
        reused=reused,
    )


def _products(item: Measured, store: GradientStore) -> tuple[float, float, float, float]:
    """‖g‖², ⟨S_e,S_e⟩, ⟨S_o,S_o⟩, ⟨S_e,S_o⟩ of one dataset, in slices."""
    width = int(item.facts["width"][0])
    even, odd = (store.vector(item.keys, width, (half,), 1.0 / item.weight) for half in (0, 1))
    sums = np.zeros(3)
    for start in range(0, width, 2**20):
        part = slice(start, start + 2**20)
        e, o = even[part].astype(np.float64), odd[part].astype(np.float64)
        sums += (e @ e, o @ o, e @ o)
    ee, oo, eo = sums.tolist()
    return ee + oo + 2 * eo, ee, oo, eo


def half_samples(measured: list[Measured], even_even: Any, odd_odd: Any, even_odd: Any) -> HalfSamples:
    """Inner products joined with the samples' weights."""
    weight = np.array([item.facts["weight"] for item in measured])
    squared = np.array([item.facts["weight_squared"] for item in measured])
    total = weight.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        q_half = np.where(weight > 0, squared / weight**2, np.inf)
    return HalfSamples(
        even_even=np.asarray(even_even),
        odd_odd=np.asarray(odd_odd),
        even_odd=np.asarray(even_odd),
        share_even=weight[:, 0] / total,
        q_even=q_half[:, 0],
        q_odd=q_half[:, 1],
        q=squared.sum(axis=1) / total**2,
        q_all=np.array([item.q_all for item in measured]),
    )


def _enough(item: Measured, store: GradientStore, recipe: Recipe) -> bool:
    _, ee, oo, eo = _products(item, store)
    found = reliability(half_samples([item], np.array([ee]), np.array([oo]), np.array([eo])))
    return bool(found.expected_cosine[0] >= recipe.conflict.target_reliability)


def _make_meter(recipe: Recipe, base: Base, device: torch.device) -> GradientMeter:
    model = load_model(base, device, trainable=True, seed=recipe.seed)
    return GradientMeter(
        model,
        recipe.conflict,
        seed=recipe.seed,
        batcher=base.batcher,
        device=device,
        autocast=partial(autocast, recipe.model, device),
    )


def _width(recipe: Recipe, base: Base) -> int:
    """D without keeping a model in this process."""
    if recipe.conflict.representation == "sketch":
        return recipe.conflict.sketch_size
    import torch

    from merit.conflict.gradients import vector_width

    model = load_model(base, torch.device("cpu"), trainable=True, seed=recipe.seed)
    return vector_width(recipe.conflict, trainable_parameters(model))


# ---- worker processes ----------------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}


@contextmanager
def _pool(
    load: Callable[[torch.device], GradientMeter], device: torch.device, store: GradientStore, recipe: Recipe, jobs: int
) -> Iterator[ProcessPoolExecutor]:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for index in range(jobs):
        places.put(index)
    pool = ProcessPoolExecutor(
        jobs, context, initializer=_start_worker, initargs=(load, str(device), store, recipe, places)
    )
    try:
        yield pool
    except BaseException:  # stopped, or failed: whole datasets may be under way; what is finished is on disk
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started in here ignore Ctrl-C, which the terminal sends to all: the parent stops them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _in_workers(
    tasks: Iterator[Task],
    store: GradientStore,
    recipe: Recipe,
    load: Callable[[torch.device], GradientMeter],
    device: torch.device,
    jobs: int,
) -> Iterator[Measured]:
    """Results as they come, with few tasks' rows in flight at a time."""
    with _pool(load, device, store, recipe, jobs) as pool:
        flying = set()
        try:
            for task in tasks:
                with _deaf_to_interrupts():
                    flying.add(pool.submit(_work, task))
                if len(flying) >= 2 * jobs:
                    done = next(as_completed(flying))
                    flying.discard(done)
                    yield done.result()
            for done in as_completed(flying):
                yield done.result()
        except BrokenProcessPool:
            raise ResourceError(
                "conflict: a worker process was killed (most often: not enough memory).",
                "Use fewer --jobs or a smaller conflict.batch_tokens. Run it again: it goes on by dataset.",
            ) from None


def _start_worker(
    load: Callable[[torch.device], GradientMeter], device: str, store: GradientStore, recipe: Recipe, places: Any
) -> None:
    import os
    import threading
    from multiprocessing import parent_process

    import torch

    def leave_with_parent() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    place = places.get()
    where = torch.device(device)
    if where.type == "cuda":
        where = torch.device("cuda", place % torch.cuda.device_count())
        torch.cuda.set_device(where)
    else:
        torch.set_num_threads(1)
    _worker.update(meter=load(where), store=store, recipe=recipe)


def _work(task: Task) -> Measured:
    return _measure(task, _worker["store"], _worker["recipe"], _worker["meter"])
