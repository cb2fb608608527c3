"""Workers that measure: a stop ends them in the middle of a dataset."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from merit.conflict.measure import worker_pool
from merit.signals import deaf_to_interrupts


def _take_place(places) -> None:
    places.get()


def _write_late(path: str) -> None:
    Path(path).with_suffix(".begun").touch()
    time.sleep(4)
    Path(path).write_text("waited for")


def test_a_stop_does_not_wait_for_the_workers_datasets(tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches only the parent."""
    late = tmp_path / "late"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), worker_pool(1, _take_place) as pool:
        with deaf_to_interrupts():
            worker = pool.submit(os.getpid).result()
        assert signal.getsignal(signal.SIGINT) == before
        os.kill(worker, signal.SIGINT)  # ignored
        assert pool.submit(os.getpid).result() == worker
        pool.submit(_write_late, str(late))
        while not late.with_suffix(".begun").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert not late.exists()
    assert not psutil.pid_exists(worker)
