"""Unkind places and moments: no room, no right to write, no home, no compiler, another process, Ctrl-C, a clock set back."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.builders import Case, Result, call, make_base, make_case, snapshot

from merit.run import record, store

STAGES = ("mixture", "gradients", "split", "train", "merge", "evaluate")
SMALL = {
    "train": {"learning_rate": 5e-3, "batch_size": 16, "max_length": 96, "threads": 1, "epochs": 0.5},
    "evaluate": {"max_new_tokens": 2, "max_examples": 2, "drift": {"prompts": 2, "tokens": 2}},
    "baselines": [],
}
MODELS = ("branches/0/model", "branches/1/model", "merged/model")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Case:
    """A finished run that takes a second or two."""
    case = make_case(tmp_path_factory.mktemp("small"), base, **SMALL)
    assert run(case).code == 0
    return case


def run(case: Case, *words: object) -> Result:
    return call("run", case.recipe, "--output", case.run, "--quiet", *words)


def contents(run: Path) -> dict[str, bytes]:
    """What a run found out, byte by byte: weights and figures."""
    files = [run / model / "model.safetensors" for model in MODELS]
    files += [run / "split" / "split.json", run / "conflict" / "geometry.npz"]
    files += [run / "evaluation" / f"{name}.json" for name in ("results", "drift", "summary")]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def assert_no_traceback(result: Result, *codes: int) -> None:
    assert result.code in codes, result.err
    assert "Traceback" not in result.err


# ---- room and rights ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more than ``size`` bytes into a file fails, as on a full disk, whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_disk_fills_up_at_each_stage(small: Case, tmp_path: Path, base: Path) -> None:
    """Each stage fails with one message, leaves no half of anything under a final name, and goes on with room again."""
    case = make_case(tmp_path, base, **SMALL)
    for stage in STAGES:
        for size in (700, 3000):
            with files_of_at_most(size):
                result = run(case, "--until", stage)
            if stage == "split" and size == 3000:
                assert_no_traceback(result, 0, 2)  # its files are smaller
            else:
                assert_no_traceback(result, 2)
                assert "Check the place's permissions" in result.err or "disk" in result.err.lower()
        assert not [path for path in case.run.rglob("*.partial") if path.name != ".model.partial"]
        assert run(case, "--until", stage).code == 0
    assert contents(case.run) == contents(small.run)


_COMMANDS = """
import ctypes, sys
from tests.builders import call
from pathlib import Path
run, other = Path(sys.argv[1]), sys.argv[2]
for words in (["status", run], ["run", run], ["run", run / "recipe.yaml", "--output", Path(sys.argv[3])], ["evaluate", run],
              ["merge", run], ["split", run], ["merge", run, "--output", other]):
    result = call(*words)
    print(words[0], result.code, result.err.replace(chr(10), " "))
"""


def _without_root_s_rights() -> None:
    """A child of root's that may write where its permissions say, and nowhere else."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.slow
def test_a_run_folder_that_may_only_be_read(small: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small.run, tmp_path / "run"))
    before = snapshot(folder)
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    try:
        words = [sys.executable, "-c", _COMMANDS, str(folder), str(tmp_path / "elsewhere"), str(locked / "run")]
        done = subprocess.run(
            words, capture_output=True, text=True, check=True, preexec_fn=_without_root_s_rights, env=_environment()
        )
    finally:
        for path in [locked, *paths]:
            path.chmod(0o755)
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    ended = {(word, number): (code, err) for number, (word, code, err) in enumerate(lines)}
    assert ended["status", 0][0] == "0"
    assert ended["merge", 6][0] == "0"  # it writes elsewhere
    for key in [("run", 1), ("run", 2), ("evaluate", 3), ("merge", 4), ("split", 5)]:
        assert ended[key][0] == "2", ended[key]
        assert "ermission denied" in ended[key][1], ended[key]
    assert snapshot(folder) == before


# ---- names and surroundings -----------------------------------------------------------------------------------------


def _environment(**changes: str | None) -> dict[str, str]:
    found = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    return {key: value for key, value in found.items() if value is not None}


@pytest.mark.exhaustive
@pytest.mark.slow
def test_no_home_no_compiler_no_locale_and_odd_names(small: Case, tmp_path: Path) -> None:
    """One run in a process with none of them gives the same bits."""
    place = tmp_path / "ordner mit leerzeichen" / "数据 é ☃'\"$(x) [y]"
    base = make_base(place / "the base ü")
    case = make_case(place, base, **SMALL)
    changes = {"HOME": None, "XDG_CACHE_HOME": None, "LC_ALL": "C", "LANG": None, "PATH": "/nonexistent"}
    words = [sys.executable, "-m", "merit", "run", str(case.recipe), "--output", str(case.run)]
    done = subprocess.run(
        words, capture_output=True, check=False, env=_environment(**changes, PYTHONPATH=os.pathsep.join(sys.path))
    )
    assert done.returncode == 0, done.stderr.decode()
    assert contents(case.run) == contents(small.run)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_cannot_write_every_character(small: Case, encoding: str) -> None:
    changes = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": encoding}
    words = [sys.executable, "-m", "merit", "status", str(small.run)]
    done = subprocess.run(words, capture_output=True, check=False, env=_environment(**changes))
    assert done.returncode == 0, done.stderr.decode()
    assert b"branch 0" in done.stdout


def test_the_clock_goes_back_between_stages(
    small: Case, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(tmp_path, base, **SMALL)
    for path in (case.folder / "mixture").rglob("*.jsonl"):
        os.utime(path, (4e9, 4e9))  # in the year 2096
    for year, stage in zip(range(2030, 2024, -1), STAGES, strict=True):
        said = f"{year}-01-01T00:00:00+00:00"
        monkeypatch.setattr(store, "now", lambda said=said: said)
        monkeypatch.setattr(record, "now", lambda said=said: said)
        monkeypatch.setattr(time, "time", lambda year=year: float(year))
        assert run(case, "--until", stage).code == 0
    result = run(case)
    assert result.code == 0
    assert contents(case.run) == contents(small.run)


# ---- other processes and signals ------------------------------------------------------------------------------------

_HOLDER = """
import sys
from pathlib import Path
from merit.run.store import lock
with lock(Path(sys.argv[1]), "this run"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_command_in_one_folder_is_refused_by_name(small: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small.run, tmp_path / "run"))
    words = [sys.executable, "-c", _HOLDER, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment()) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        before = snapshot(folder)
        for command in ("run", "gradients", "split", "train", "merge", "evaluate"):
            result = call(command, folder)
            assert_no_traceback(result, 2)
            assert "in use" in result.err
            assert f"process {holder.pid}" in result.err
        assert call("status", folder).code == 0
        assert snapshot(folder) == before
        assert holder.stdin is not None
        holder.stdin.close()
    assert call("run", folder, "--quiet").code == 0


@contextlib.contextmanager
def ctrl_c_after(seconds: float) -> Iterator[None]:
    """SIGINT to this process after a while, as Ctrl-C sends it."""
    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_ctrl_c_at_twenty_moments(small: Case, tmp_path: Path, base: Path) -> None:
    started = time.monotonic()
    assert run(make_case(tmp_path / "timed", base, **SMALL)).code == 0
    seconds, stopped = time.monotonic() - started, 0
    for moment in range(20):
        case = make_case(tmp_path / str(moment), base, **SMALL)
        with ctrl_c_after(seconds * (moment + 0.5) / 20):
            result = run(case)
        assert_no_traceback(result, 0, 75)
        stopped += result.code == 75
        if result.code == 75:
            assert "Run the same command again" in result.err
            result = run(case)
            assert result.code == 0, result.err
        assert contents(case.run) == contents(small.run)
        assert not list(case.run.rglob("*.partial"))
        shutil.rmtree(case.folder)
    assert stopped >= 12  # the rest was faster than the clock


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_ctrl_c_leaves_no_worker_behind(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path, base, **SMALL | {"train": {**SMALL["train"], "epochs": 20}})
    monkeypatch.setenv("MERIT_TEST", str(tmp_path))  # which its workers inherit
    assert run(case, "--until", "split").code == 0
    words = [sys.executable, "-m", "merit", "run", str(case.recipe), "--output", str(case.run), "--jobs", "2"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        while process.poll() is None and next(case.run.glob("branches/*/progress.json"), None) is None:
            time.sleep(0.005)
        assert len(_living(tmp_path)) > 1
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 75, err
    for _ in range(100):  # a helper of Python's own ends when it notices that its parent is gone
        if not _living(tmp_path):
            break
        time.sleep(0.2)
    assert not _living(tmp_path)


def _living(folder: Path) -> set[int]:
    """Processes that inherited the mark of ``folder``, this one aside."""
    found, mark = set(), f"MERIT_TEST={folder}\0".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ended = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not ended and mark in (process / "environ").read_bytes() + b"\0":
                found.add(int(process.name))
    return found - {os.getpid()}
