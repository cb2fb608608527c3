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

import pytest

from merit.errors import Interrupted, UserError
from merit.launch.local import BranchCrashed, BranchJob, ProgressFile, read_progress, run_branches

GRACEFUL = """
import signal, sys, time
def stop(*_):
    open(sys.argv[1], "w").write("checkpoint")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1] + ".ready", "w").close()
time.sleep(60)
"""


def job(folder: Path, name: str, code: str, *arguments: object, work: float = 1) -> BranchJob:
    return BranchJob(name, [sys.executable, "-S", "-c", code, *map(str, arguments)], folder / "logs" / name, work)


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
time.sleep(0.15)
open(f"{folder}/most", "a").write(str(len([f for f in os.listdir(folder) if f.startswith("now-")])))
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


def test_cores_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])"
    run_branches([job(tmp_path, "a", code)], 3)
    assert (tmp_path / "logs" / "a").read_text() == "2 2\n"


def test_user_error_comes_back_as_the_commands_own_message(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "bad").write_text("merit: a message of yesterday\n")
    code = """
import sys
print('noise')
print('merit: loss is nan at step 3.\\n  Ways out: less.', file=sys.stderr)
sys.exit(2)
"""
    with pytest.raises(UserError) as caught:
        run_branches([job(tmp_path, "bad", code)], 1)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("branch bad: loss is nan at step 3.\n  Ways out: less.")
    assert "noise" not in str(caught.value)
    assert "yesterday" not in str(caught.value)


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
    with pytest.raises(KeyboardInterrupt):
        run_branches([job(tmp_path, "a", deaf, tmp_path)], 1)


def test_killed_launcher_leaves_no_process_behind(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    code = f"""
import sys
from pathlib import Path
from merit.launch.local import BranchJob, run_branches
run_branches([BranchJob("a", [sys.executable, "-c", {GRACEFUL!r}, {str(saved)!r}], Path({str(tmp_path / "log")!r}))], 1)
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


def test_running_commands_count_by_their_share_of_steps(tmp_path: Path) -> None:
    progress = tmp_path / "progress.json"
    code = f"""
import sys, time; sys.path.insert(0, {str(Path(__file__).parents[2] / "src")!r})
from pathlib import Path
from merit.launch.local import ProgressFile
ProgressFile(Path({str(progress)!r}))(1, 4, {{"tokens_per_second": 5.0}})
while not Path({str(tmp_path / "seen")!r}).exists(): time.sleep(0.02)
"""
    shares: list[float] = []

    def tick(done: float, total: float, text: str) -> None:
        shares.append(done / total)
        if done and "5 target tokens/s" in text:
            (tmp_path / "seen").touch()

    run_branches([BranchJob("a", [sys.executable, "-c", code], tmp_path / "log", 8, [progress])], 1, progress=tick)
    assert 0.25 in shares
    assert shares[-1] == 1
