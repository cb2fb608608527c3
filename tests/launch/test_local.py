"""Branches side by side as real processes: order, signals, failures, messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from merit.errors import Interrupted, TrainingError
from merit.launch.job import BranchCrashed, BranchJob, ProgressFile, progress_of, read_progress
from merit.launch.local import run_branches
from merit.launch.outcome import Outcome, outcome_of
from merit.signals import stop_on_sigterm

GRACEFUL = """
import signal, sys, time
def stop(*_):
    open(sys.argv[1], "w").write("checkpoint")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1] + ".ready", "w").close()
time.sleep(60)
"""


def job(folder: Path, name: str, code: str, *arguments: object, work: float = 1, **options: Any) -> BranchJob:
    argv = [sys.executable, "-S", "-c", code, *map(str, arguments)]
    return BranchJob(name, argv, folder / "logs" / name, folder / "logs" / f"{name}.json", work, **options)


def when_there(path: Path, then: object) -> threading.Thread:
    """Call ``then`` once ``path`` exists."""

    def watch() -> None:
        while not path.exists():
            time.sleep(0.01)
        then()  # type: ignore[operator]

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_longest_first_at_most_n_at_once_and_all_run(tmp_path: Path) -> None:
    code = """
import os, sys, time
folder, name = sys.argv[1:]
open(f"{folder}/order", "a").write(name)
open(f"{folder}/now-{name}", "w").close()
def now():
    return len([f for f in os.listdir(folder) if f.startswith("now-")])
while now() < 2 and not os.path.exists(f"{folder}/most"): time.sleep(0.01)
open(f"{folder}/most", "a").write(str(now()))
os.remove(f"{folder}/now-{name}")
"""
    sizes = {"a": 1, "b": 30, "c": 2, "d": 40}
    seen: list[tuple[float, float]] = []
    run_branches(
        [job(tmp_path, name, code, tmp_path, name, work=work) for name, work in sizes.items()],
        2,
        progress=lambda done, total, _: seen.append((done, total)),
    )
    order = (tmp_path / "order").read_text()
    assert set(order[:2]) == {"b", "d"}
    assert sorted(order) == list("abcd")
    assert max((tmp_path / "most").read_text()) == "2"
    assert seen[-1] == (73, 73)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_threads_are_passed_on(tmp_path: Path) -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])"
    run_branches([job(tmp_path, "a", code, threads=2)], 3)
    assert (tmp_path / "logs" / "a").read_text() == "2 2\n"


RANKS = """
import os, sys, time
rank = os.environ["RANK"]
open(f"{sys.argv[1]}/{rank}", "w").write(" ".join(os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")))
open(f"{sys.argv[1]}/port-{rank}", "w").write(os.environ["MASTER_PORT"])
"""


def test_processes_of_one_command_can_find_each_other(tmp_path: Path) -> None:
    run_branches([job(tmp_path, "a", RANKS, tmp_path, processes=2)], 1)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 0 127.0.0.1", "2 1 127.0.0.1"]
    assert (tmp_path / "port-0").read_text() == (tmp_path / "port-1").read_text()


def test_processes_that_wait_for_a_failed_one_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merit.launch.local._PATIENCE_SECONDS", 0.3)
    code = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)"
    with pytest.raises(BranchCrashed):
        run_branches([job(tmp_path, "a", code, processes=2)], 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_user_error_comes_back_as_it_was_raised(tmp_path: Path, rank: int) -> None:
    """By the outcome file of whichever process left one; what it prints does not matter."""
    error = TrainingError("loss is nan at step 3.", "Ways out: less.", "No model was written.")
    to = outcome_of(tmp_path / "logs" / "bad.json", rank)
    Outcome.of(error).save(tmp_path / to.name)
    code = f"""
import os, shutil, sys
print("merit: noise")
if os.environ["RANK"] == "{rank}":
    shutil.copy({str(tmp_path / to.name)!r}, {str(to)!r})
    sys.exit(2)
sys.exit(1)
"""
    with pytest.raises(TrainingError) as caught:
        run_branches([job(tmp_path, "bad", code, processes=2)], 1)
    assert caught.value.message == "branch bad: loss is nan at step 3."
    assert caught.value.ways_out == ("Ways out: less.", "No model was written.")


def test_outcome_of_an_earlier_attempt_is_not_read(tmp_path: Path) -> None:
    Outcome.of(TrainingError("yesterday's")).save(tmp_path / "logs" / "bad.json")
    with pytest.raises(BranchCrashed, match="exit code 2"):
        run_branches([job(tmp_path, "bad", "import sys; sys.exit(2)")], 1)


@pytest.mark.parametrize("error", [TrainingError("a", "b"), Interrupted("stop"), ZeroDivisionError("x")])
def test_outcome_is_written_and_read_back(tmp_path: Path, error: Exception) -> None:
    outcome = Outcome.of(error)
    outcome.save(tmp_path / "o.json")
    assert Outcome.load(tmp_path / "o.json") == outcome
    again = outcome.user_error("branch 0")
    assert (again is not None) == isinstance(error, TrainingError)
    (tmp_path / "o.json").write_text("[]")
    assert Outcome.load(tmp_path / "o.json") is None


def test_crash_comes_back_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(BranchCrashed, match="ZeroDivisionError") as caught:
        run_branches([job(tmp_path, "bad", "1/0")], 1)
    assert caught.value.exit_code == 1


def test_a_killed_command_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(BranchCrashed, match=r"SIGKILL.*out of memory"):
        run_branches([job(tmp_path, "bad", "import os; os.kill(os.getpid(), 9)")], 1)


def test_one_failure_stops_the_others_gracefully_and_starts_no_more(tmp_path: Path) -> None:
    fails = f"""
import os, sys, time
while not os.path.exists({str(tmp_path / "saved.ready")!r}): time.sleep(.01)
sys.exit("x")
"""
    with pytest.raises(BranchCrashed, match="branch bad"):
        run_branches(
            [
                job(tmp_path, "good", GRACEFUL, tmp_path / "saved", work=3),
                job(tmp_path, "bad", fails, work=2),
                job(tmp_path, "later", f"open({str(tmp_path / 'later')!r}, 'w')", work=1),
            ],
            2,
        )
    assert (tmp_path / "saved").read_text() == "checkpoint"
    assert not (tmp_path / "later").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_passed_on_and_checkpoints_are_waited_for(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    when_there(tmp_path / "saved.ready", lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match="2 of 2"):
        run_branches(
            [job(tmp_path, "a", GRACEFUL, tmp_path / "saved", work=2), job(tmp_path, "b", "open('/nonexistent/x')")], 1
        )
    assert (tmp_path / "saved").read_text() == "checkpoint"
    assert signal.getsignal(number) is before


def test_second_signal_kills(tmp_path: Path) -> None:
    deaf = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: open(sys.argv[1] + "/told", "w").close())
open(sys.argv[1] + "/up", "w").close()
while True: time.sleep(1)
"""
    when_there(tmp_path / "up", lambda: os.kill(os.getpid(), signal.SIGTERM))
    when_there(tmp_path / "told", lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    stop_on_sigterm()  # as a command does
    try:
        with pytest.raises(KeyboardInterrupt):
            run_branches([job(tmp_path, "a", deaf, tmp_path)], 1)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_killed_launcher_leaves_no_process_behind(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    code = f"""
import sys
from pathlib import Path
from merit.launch.job import BranchJob
from merit.launch.local import run_branches
argv = [sys.executable, "-c", {GRACEFUL!r}, {str(saved)!r}]
run_branches([BranchJob("a", argv, Path({str(tmp_path / "log")!r}), Path({str(tmp_path / "out")!r}))], 1)
"""
    launcher = subprocess.Popen([sys.executable, "-c", code])
    watch = when_there(tmp_path / "saved.ready", launcher.kill)
    launcher.wait()
    watch.join()
    for _ in range(1000):
        if saved.exists():
            break
        time.sleep(0.01)
    assert saved.exists()


def test_progress_file_is_whole_sparse_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    note = ProgressFile(path)
    assert read_progress(path) is None
    facts = {"loss": 1.5, "learning_rate": 0.1, "grad_norm": None, "tokens_per_second": 7.0}
    note(1, 9, facts)
    note(2, 9, facts)
    assert read_progress(path)["step"] == 1  # type: ignore[index]  # not again within the second
    note(9, 9, facts)
    found = json.loads(path.read_text())
    assert (found["step"], found["steps"], found["loss"], found["tokens_per_second"]) == (9, 9, 1.5, 7.0)
    path.write_text('{"step": 1')
    assert read_progress(path) is None


@pytest.mark.parametrize("unit", ["branches", "tasks"])
def test_progress_calls_commands_what_they_are_part_of(tmp_path: Path, unit: str) -> None:
    jobs = [job(tmp_path, name, "", unit=unit) for name in ("a", "b")]
    assert progress_of(jobs, jobs[:1], [], time.time()) == (1, 2, f"1 of 2 {unit} done")


def test_running_commands_count_by_their_share_of_steps(tmp_path: Path) -> None:
    progress = tmp_path / "progress.json"
    code = f"""
import sys, time; sys.path.insert(0, {str(Path(__file__).parents[2] / "src")!r})
from pathlib import Path
from merit.launch.job import ProgressFile
ProgressFile(Path({str(progress)!r}))(1, 4, {{"tokens_per_second": 5.0}})
while not Path({str(tmp_path / "seen")!r}).exists(): time.sleep(0.02)
"""
    shares: list[float] = []

    def tick(done: float, total: float, text: str) -> None:
        shares.append(done / total)
        assert text.startswith(("0 of 2 branches done", "2 of 2 branches done"))
        if done and "5 target tokens/s" in text:
            (tmp_path / "seen").touch()

    paths = [progress, tmp_path / "another.json"]
    argv = [sys.executable, "-c", code]
    run_branches([BranchJob("a", argv, tmp_path / "log", tmp_path / "out", 8, paths)], 1, progress=tick)
    assert shares[0] == 0
    assert 0.125 in shares
    assert shares[-1] == 1
