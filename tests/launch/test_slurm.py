"""Job arrays: the script, submitting, watching, finding them again; with a stand-in, and with a real Slurm."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.chaos import slurm as loopback

from merit.errors import Interrupted, ResourceError, RunFolderError, TrainingError
from merit.launch.job import BranchCrashed, BranchJob
from merit.launch.one import main as run_task
from merit.launch.outcome import Outcome
from merit.launch.slurm import Slurm
from merit.progress import silent
from merit.recipe.launch import SlurmSettings

SBATCH = """#!/bin/bash
# Runs an array's tasks side by side on this machine; task i of job N is the file N_i in $QUEUE while it runs.
script=${@: -1}
number=$(($(cat $QUEUE/last 2>/dev/null || echo 0) + 1)); echo $number > $QUEUE/last
array=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for task in $(seq 0 $array); do
  touch $QUEUE/${number}_$task
  ( restarts=0
    while :; do
      SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_JOB_ID=$number SLURM_JOB_ID=${number}_$task SLURM_RESTART_COUNT=$restarts \\
        setsid bash "$script" >> $QUEUE/out_${number}_$task.txt 2>&1
      [ -f $QUEUE/again_${number}_$task ] || break
      rm $QUEUE/again_${number}_$task; restarts=$((restarts + 1))
    done
    rm $QUEUE/${number}_$task ) > /dev/null 2>&1 &
done
echo $number
"""
SQUEUE = """#!/bin/bash
cd $QUEUE
for file in [0-9]*_[0-9]*; do [ -f "$file" ] && echo "${file%_*} ${file#*_} RUNNING"; done
exit 0
"""
SCONTROL = '#!/bin/bash\n[ "$1" = requeue ] && touch $QUEUE/again_$2\n'


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for sbatch, squeue and scontrol that runs arrays on this machine."""
    programs, folder = tmp_path / "bin", tmp_path / "queue"
    programs.mkdir()
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(folder))
    return folder


def job(folder: Path, name: str, code: str, *words: object, fingerprint: str = "f") -> BranchJob:
    argv = [sys.executable, "-S", "-c", code, *map(str, words)]
    logs = folder / "logs"
    return BranchJob(name, argv, logs / f"{name}.txt", logs / f"{name}.outcome.json", 1, fingerprint=fingerprint)


def launcher(**settings: object) -> Slurm:
    return Slurm(SlurmSettings.model_validate({"poll_seconds": 0.1, "hours": 0.2, **settings}), "merit-x", 1)


TOUCH = "import sys; open(sys.argv[1], 'a').write('x')"
KILLED_ONCE = """
import os, signal, sys
with open(sys.argv[1], "a+") as file:
    file.seek(0); first = not file.read(); file.write("x")
if first: os.kill(os.getpid(), getattr(signal, sys.argv[2])) if sys.argv[2] != "75" else sys.exit(75)
"""


def test_the_script_can_be_read_and_says_what_was_asked(tmp_path: Path) -> None:
    jobs = [job(tmp_path, name, TOUCH) for name in ("0", "random/0")]
    settings = {"partition": "gpu", "gpus": 2, "memory": "64G", "at_once": 1, "hours": 1.5, "options": ["--qos=long"]}
    text = launcher(**settings, setup=["module load cuda"]).script(jobs, tmp_path)
    lines = text.splitlines()
    for line in ("--array=0-1%1", "--gpus-per-node=2", "--mem=64G", "--time=01:30:00", "--qos=long", "--requeue"):
        assert f"#SBATCH {line}" in lines
    assert "#SBATCH --signal=B:TERM@120" in lines
    assert lines.index("module load cuda") < next(n for n, line in enumerate(lines) if "merit.launch.one" in line)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert "account" not in text


def test_a_folder_with_a_space_and_a_percent_sign_is_one_word(tmp_path: Path) -> None:
    folder = tmp_path / 'my "100%A" runs'
    text = launcher().script([job(folder, "0", TOUCH)], folder)
    line = next(line for line in text.splitlines() if "--output" in line)
    assert shlex.split(line.removeprefix("#SBATCH")) == [f'--output={tmp_path}/my "100%%A" runs/%A_%a.txt']
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_an_array_runs_to_its_end(tmp_path: Path, queue: Path) -> None:
    seen: list[str] = []
    jobs = [job(tmp_path, str(k), TOUCH, tmp_path / f"done-{k}") for k in range(2)]
    launcher().run(jobs, lambda _done, _total, text: seen.append(text))
    assert [(tmp_path / f"done-{k}").read_text() for k in range(2)] == ["x", "x"]
    assert seen[-1].startswith("2 of 2 branches done")
    assert (tmp_path / "logs/slurm/train.sbatch").is_file()


@pytest.mark.parametrize("how", ["SIGKILL", "75"])
def test_a_killed_or_interrupted_task_is_requeued(tmp_path: Path, queue: Path, how: str) -> None:
    launcher().run([job(tmp_path, "0", KILLED_ONCE, tmp_path / "tries", how)], silent)
    assert (tmp_path / "tries").read_text() == "xx"


@pytest.mark.parametrize(
    ("codes", "tries"), [((75, 75, 75, 137, 0), 5), ((75, 137, 75, 137, 137, 137, 0), 6), ((75, 75, 1, 0), 3)]
)
def test_only_kills_count_as_kills(
    tmp_path: Path, queue: Path, monkeypatch: pytest.MonkeyPatch, codes: tuple[int, ...], tries: int
) -> None:
    """Fails on commit f703190: killed once after three preemptions, a task was given up."""
    stub = tmp_path / "python"
    words = " ".join(map(str, codes))
    stub.write_text(f"#!/bin/bash\necho >> $QUEUE/tries; codes=(- {words}); exit ${{codes[$(wc -l < $QUEUE/tries)]}}\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    script = launcher().script([job(tmp_path, "0", "")], tmp_path)
    for restarts in range(len(codes)):
        task = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "7_0"}
        environment = {**os.environ, **task, "SLURM_RESTART_COUNT": str(restarts)}
        subprocess.run(["bash", "-c", script], env=environment, check=False)
        if not (queue / "again_7_0").exists():
            break
        (queue / "again_7_0").unlink()
    assert len((queue / "tries").read_text().splitlines()) == tries


def test_errors_come_back_as_they_are(tmp_path: Path, queue: Path) -> None:
    bad = job(tmp_path, "bad", "")
    Outcome.of(TrainingError("loss is nan.", "Use less.")).save(written := tmp_path / bad.outcome_path.name)
    code = f"import shutil, sys; shutil.copy({str(written)!r}, {str(bad.outcome_path)!r}); sys.exit(2)"
    with pytest.raises(TrainingError, match="loss is nan"):
        launcher().run([job(tmp_path, "bad", code)], silent)
    with pytest.raises(BranchCrashed, match="ZeroDivisionError"):
        launcher().run([job(tmp_path, "worse", "1/0")], silent)
    with pytest.raises(BranchCrashed, match="SIGKILL"):
        launcher(requeues=0).run([job(tmp_path, "0", KILLED_ONCE, tmp_path / "tries", "SIGKILL")], silent)


WAITS = (
    "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(.02)\nopen(sys.argv[2], 'a').write('x')"
)


def test_a_stopped_watcher_finds_its_array_again(tmp_path: Path, queue: Path) -> None:
    def once(fingerprint: str = "f") -> BranchJob:
        return job(tmp_path, "0", WAITS, tmp_path / "go", tmp_path / "done", fingerprint=fingerprint)

    def stop_soon() -> None:
        while not (queue / "1_0").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), 15)

    threading.Thread(target=stop_soon, daemon=True).start()
    with pytest.raises(Interrupted, match="scancel 1"):
        launcher().run([once()], silent)
    with pytest.raises(RunFolderError, match="job 1 still trains branch 0 with other settings"):
        launcher().run([once("g")], silent)
    (tmp_path / "go").touch()
    launcher().run([once()], silent)
    assert (tmp_path / "done").read_text() == "x"
    assert (queue / "last").read_text().strip() == "1"  # nothing was submitted twice


def test_a_damaged_note_of_the_queue_is_named_and_nothing_is_submitted(tmp_path: Path, queue: Path) -> None:
    """One flipped digit of a fingerprint or of an array's number submitted a second array beside the first."""
    launcher().run([job(tmp_path, "0", TOUCH, tmp_path / "done")], silent)
    note = tmp_path / "logs/slurm/submitted.json"
    note.write_text(note.read_text().replace('"number": 1', '"number": 7'))
    with pytest.raises(RunFolderError, match=r"submitted\.json is damaged") as caught:
        launcher().run([job(tmp_path, "0", TOUCH, tmp_path / "done")], silent)
    assert "scancel" in str(caught.value)
    assert (tmp_path / "done").read_text() == "x"


@pytest.mark.parametrize("content", ["{", None])
def test_a_damaged_or_missing_outcome_is_named(
    tmp_path: Path, queue: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.setattr("merit.launch.slurm._OUTCOME_SECONDS", 0.1)
    task = job(tmp_path, "0", "")
    spoil = "" if content is None else f"echo '{content}' > {shlex.quote(str(task.outcome_path))}"
    (queue.parent / "bin" / "sbatch").write_text(f"#!/bin/bash\n{spoil}\necho 1\n")
    with pytest.raises(ResourceError, match=r"0\.outcome\.json is missing or damaged"):
        launcher().run([task], silent)


def test_a_task_names_its_damaged_job_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped letter in the command, or another task's file in the place of this one, ran something else."""
    one, two = tmp_path / "0.launch.json", tmp_path / "1.launch.json"
    for file in (one, two):
        job(tmp_path, file.name[0], TOUCH, tmp_path / "done").save(file)
    assert run_task(one) == 0
    for content in (one.read_text().replace("done", "dome"), two.read_text(), "[]"):
        one.write_text(content)
        assert run_task(one) == 2
        assert str(one) in capsys.readouterr().err
    assert (tmp_path / "done").read_text() == "x"
    assert not (tmp_path / "dome").exists()


def test_no_slurm_and_a_refusal_are_told(tmp_path: Path, queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (queue.parent / "bin" / "sbatch").write_text("#!/bin/bash\necho 'invalid partition' >&2; exit 1\n")
    with pytest.raises(ResourceError, match="invalid partition"):
        launcher().run([job(tmp_path, "0", TOUCH)], silent)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ResourceError, match="no sbatch here"):
        launcher().run([job(tmp_path, "0", TOUCH)], silent)


# ---- a real one -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loopback.Loopback]:
    """A real Slurm on loopback."""
    if why := loopback.why_not():
        pytest.skip(why)
    with loopback.loopback(tmp_path_factory.mktemp("slurm") / "cluster") as made:
        for name, value in made.environment.items():
            os.environ[name] = value
        yield made
        del os.environ["SLURM_CONF"]


@pytest.mark.exhaustive
def test_a_real_slurm_runs_requeues_and_preempts(tmp_path: Path, cluster: loopback.Loopback) -> None:
    stopped = """
import signal, sys, time
def stop(*_): sys.exit(75)
signal.signal(signal.SIGTERM, stop)
with open(sys.argv[1], "a+") as file:
    file.seek(0); first = not file.read(); file.write("x")
if first: time.sleep(60)
"""
    jobs = [
        job(tmp_path, "0", KILLED_ONCE, tmp_path / "killed", "SIGKILL"),
        job(tmp_path, "1", stopped, tmp_path / "stopped"),
    ]

    def preempt() -> None:
        while not (tmp_path / "stopped").exists():
            time.sleep(0.05)
        urgent = tmp_path / "urgent.sh"
        urgent.write_text("#!/bin/bash\nsleep 1\n")
        for _ in range(2):  # both nodes
            cluster.call("sbatch", "--partition=high", f"--output={tmp_path}/urgent.txt", str(urgent))

    threading.Thread(target=preempt, daemon=True).start()
    launcher().run(jobs, silent)
    for name in ("killed", "stopped"):  # a slow machine may see an urgent job preempt either of them once more
        assert (tmp_path / name).read_text() in ("xx", "xxx", "xxxx")
    assert json.loads((tmp_path / "logs/slurm/submitted.json").read_text())["arrays"][0]["tasks"] == {
        "0": "f",
        "1": "f",
    }
