"""Threads for work on files and blocks that mostly runs without the interpreter lock. No processes, no ordering."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import count
from threading import Event

__all__ = ["parallel", "threads"]


def threads() -> int:
    """Threads for reading, hashing and merging: one per core that this process may use, at most 8."""
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def parallel(work: Callable[[Callable[[], int]], None], workers: int) -> None:
    """Run ``work(take)`` in threads; ``take()`` hands out 0, 1, 2, ... once each. The first error stops all."""
    counter, stop = count(), Event()

    def take() -> int:
        return sys.maxsize if stop.is_set() else next(counter)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in as_completed([pool.submit(work, take) for _ in range(workers)]):
                future.result()
        except BaseException:  # an interrupt as well: the other threads must not run to the end
            stop.set()
            raise
