"""Measuring every dataset's gradient into the store: what stands is used again, the rest is computed, in workers if asked.

:mod:`merit.conflict.sample` measures one; :mod:`merit.conflict.stage` turns what was measured into a geometry.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.queues import Queue

import torch

from merit.conflict.gradients import GradientMeter
from merit.conflict.reliability import PARTS
from merit.conflict.sample import Measured, Probe, Task, from_store, make_task, measure_task
from merit.conflict.store import GradientStore
from merit.errors import ConflictError, ResourceError
from merit.files import require_space
from merit.mixture.dataset import EncodedDataset
from merit.progress import Progress, silent
from merit.recipe.schema import ConflictSettings
from merit.signals import deaf_to_interrupts


def measure_datasets(
    datasets: Mapping[str, EncodedDataset],
    probe: Probe,
    store: GradientStore,
    *,
    jobs: int = 1,
    progress: Progress = silent,
) -> list[Measured]:
    """Gradients of every dataset into ``store``, computing only those that are not there; in the mixture's order.

    Raises:
        ConflictError: As :func:`merit.conflict.stage.measure_gradients`.
        ResourceError: As :func:`merit.conflict.stage.measure_gradients`.
    """
    if not datasets:
        raise ConflictError("conflict: the mixture has no datasets.")
    skip = probe.settings.skip_bad
    done: dict[str, Measured] = {}
    missing: list[str] = []
    steps = 1
    for name, dataset in datasets.items():
        task = make_task(dataset, probe, with_rows=False)
        whole = from_store(task, store, probe.settings)
        if whole is None:
            missing.append(name)
            steps = max(steps, len(task.steps))
        else:
            done[name] = _usable(whole, skip)
    progress(len(done), len(datasets), "")
    if missing:
        meter = probe.meter() if jobs == 1 or len(missing) == 1 else None
        width = meter.width if meter else probe.width()
        require_space(
            store.folder,
            int(len(missing) * steps * 4 * PARTS * width * 1.05) + 2**26,
            f"{len(missing)} gradients of {width:,} entries",
            "Ways out: conflict.representation: sketch (4 MB per dataset by default), a smaller conflict.sketch_size, "
            "a larger conflict.stride, or another disk (conflict.cache; for a whole run: --output DIR).",
        )
        tasks = (make_task(datasets[name], probe, with_rows=True) for name in missing)
        results = (
            (measure_task(task, store, meter, probe.settings) for task in tasks)
            if meter
            else _in_workers(tasks, store, probe, min(jobs, len(missing)))
        )
        for result in results:
            done[result.name] = _usable(result, skip)
            progress(len(done), len(datasets), result.name)
    return [done[name] for name in datasets]


def _usable(result: Measured, skip: bool) -> Measured:
    if result.bad is None or skip:
        return result
    raise ConflictError(
        result.bad,
        "Leave such datasets out with conflict.skip_bad: true or mixture.exclude.",
        "What was measured of other datasets is kept; the next run continues from there.",
    )


# ---- worker processes ----------------------------------------------------------------------------------------------

_worker: list[tuple[GradientMeter, GradientStore, ConflictSettings]] = []


@contextmanager
def worker_pool(jobs: int, start: Callable[..., None], *arguments: object) -> Iterator[ProcessPoolExecutor]:
    """Processes that run ``start(places, *arguments)`` first, and are stopped in the middle of their work on any error."""
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for index in range(jobs):
        places.put(index)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, context, initializer=start, initargs=(places, *arguments))
    try:
        yield pool
    except BaseException:  # stopped, or failed: whole datasets may be under way; what is finished is on disk
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _in_workers(tasks: Iterator[Task], store: GradientStore, probe: Probe, jobs: int) -> Iterator[Measured]:
    """Results as they come, with few tasks' rows in flight at a time."""
    with worker_pool(jobs, _start_worker, probe, store) as pool:
        flying = set()
        try:
            for task in tasks:
                with deaf_to_interrupts():
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
                "Use fewer processes (--jobs) or a smaller conflict.batch_tokens. Run it again: finished datasets are kept.",
            ) from None


def _start_worker(places: Queue[int], probe: Probe, store: GradientStore) -> None:
    def leave_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    place = places.get()
    device = probe.device
    if device.type == "cuda":
        device = torch.device("cuda", place % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    _worker.append((probe.meter(device), store, probe.settings))


def _work(task: Task) -> Measured:
    meter, store, settings = _worker[-1]
    return measure_task(task, store, meter, settings)
