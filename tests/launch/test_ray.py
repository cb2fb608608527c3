"""Branches as tasks of a real Ray cluster of several nodes on this machine; without Ray only what is said about that."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

import merit.launch.ray
from merit.errors import Interrupted, ResourceError, TrainingError
from merit.launch.job import BranchCrashed, BranchJob
from merit.launch.outcome import Outcome
from merit.launch.ray import Ray
from merit.progress import silent
from merit.recipe.launch import RaySettings

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (pip install -e '.[ray]')")


def job(folder: Path, name: str, code: str, *words: object) -> BranchJob:
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    argv = [sys.executable, "-S", "-c", code, *map(str, words)]
    return BranchJob(name, argv, logs / f"{name}.txt", logs / f"{name}.outcome.json", 1)


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_it_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"pip install -e '\.\[ray\]' in MERIT's checkout"):
        Ray(RaySettings(), 1, 0).run([job(tmp_path, "0", "")], silent)


def test_signals_have_their_effect_again_after_ray_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails on commit 7afef29: SIGTERM after a stage on Ray ended the command without a word."""

    def takes_signals(**_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    stand_in = types.ModuleType("ray")
    stand_in.__spec__ = ModuleSpec("ray", None)
    for name, does in (("is_initialized", lambda: False), ("init", takes_signals), ("shutdown", takes_signals)):
        setattr(stand_in, name, does)
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    seen: list[object] = []
    try:
        with merit.launch.ray._connected(None):
            seen += [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        seen += [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert seen == 2 * before


@pytest.fixture(scope="module")
def nodes() -> Iterator[object]:
    """Three nodes, with token authentication."""
    from benchmarks.chaos.ray import cluster

    token = "f" * 64
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    with cluster() as made:
        yield made
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        del os.environ[name]


def launcher(nodes: object, **settings: object) -> Ray:
    return Ray(RaySettings.model_validate({"address": nodes.address, **settings}), 1, 0)  # type: ignore[attr-defined]


TOUCH = "import sys; open(sys.argv[1], 'a').write('x')"
STAYS_ONCE = """
import os, sys, time
with open(sys.argv[1], "a+") as file:
    file.seek(0); first = not file.read(); file.write("x")
if first:
    open(sys.argv[1] + ".pid", "w").write(str(os.getpid()))
    os.rename(sys.argv[1] + ".pid", sys.argv[1] + ".ready")
    time.sleep(120)
"""


def when_ready(path: Path, then: object) -> None:
    def watch() -> None:
        while not path.exists():
            time.sleep(0.05)
        then(int(path.read_text()))  # type: ignore[operator]

    threading.Thread(target=watch, daemon=True).start()


@needs_ray
@pytest.mark.exhaustive
def test_tasks_run_and_no_token_is_written(tmp_path: Path, nodes: object) -> None:
    jobs = [job(tmp_path, str(k), TOUCH, tmp_path / f"done-{k}") for k in range(3)]
    seen: list[str] = []
    launcher(nodes).run(jobs, lambda _done, _total, text: seen.append(text))
    assert [(tmp_path / f"done-{k}").read_text() for k in range(3)] == ["x"] * 3
    assert seen[-1].startswith("3 of 3 branches done")
    token = os.environ["RAY_AUTH_TOKEN"].encode()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and token in path.read_bytes()]
    wrong = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = f"""
from pathlib import Path
from tests.launch.test_ray import *
Ray(RaySettings(address={nodes.address!r}), 1, 0).run([job(Path({str(tmp_path)!r}), "w", "")], silent)
"""  # type: ignore[attr-defined]
    refused = subprocess.run([sys.executable, "-c", code], env=wrong, capture_output=True, text=True, check=False)
    assert "RAY_AUTH_TOKEN" in refused.stderr


@needs_ray
@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", ["trainer", "worker", "node"])
def test_a_lost_task_is_started_again(tmp_path: Path, nodes: object, victim: str) -> None:
    def kill(pid: int) -> None:
        if victim == "trainer":
            os.kill(pid, signal.SIGKILL)
        elif victim == "worker":
            psutil.Process(pid).parent().send_signal(signal.SIGKILL)  # type: ignore[union-attr]
        else:
            for _ in range(2):  # wherever it runs
                nodes.kill_one(random.Random(0))  # type: ignore[attr-defined]

    when_ready(tmp_path / "tries.ready", kill)
    launcher(nodes).run([job(tmp_path, "0", STAYS_ONCE, tmp_path / "tries")], silent)
    assert set((tmp_path / "tries").read_text()) == {"x"}
    assert len((tmp_path / "tries").read_text()) >= 2


@needs_ray
@pytest.mark.exhaustive
def test_errors_stops_and_requests_that_cannot_be_met(tmp_path: Path, nodes: object) -> None:
    bad = job(tmp_path, "bad", "")
    Outcome.of(TrainingError("loss is nan.", "Use less.")).save(written := tmp_path / bad.outcome_path.name)
    code = f"import shutil, sys; shutil.copy({str(written)!r}, {str(bad.outcome_path)!r}); sys.exit(2)"
    with pytest.raises(TrainingError, match="loss is nan"):
        launcher(nodes).run([job(tmp_path, "bad", code)], silent)
    with pytest.raises(BranchCrashed, match="ZeroDivisionError"):
        launcher(nodes).run([job(tmp_path, "worse", "1/0")], silent)
    with pytest.raises(ResourceError, match="reserves 64 CPU"):
        launcher(nodes, cpus=64).run([job(tmp_path, "0", "")], silent)
    told = """
import signal, sys, time
def stop(*_):
    open(sys.argv[1], "w").write("checkpoint"); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1] + ".ready", "w").write("1")
time.sleep(120)
"""
    when_ready(tmp_path / "saved.ready", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        launcher(nodes).run([job(tmp_path, "0", told, tmp_path / "saved")], silent)
    assert (tmp_path / "saved").read_text() == "checkpoint"
