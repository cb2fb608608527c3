"""Damage and interruption: every fault is detected, and a killed merge leaves nothing that loads."""

import fcntl
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest
import torch
from merge_cases import make_plan, near, random_tensors, write_checkpoint

from merit.errors import CheckpointError, MergeError
from merit.hf import checkpoint
from merit.merge import Branch, run_merge


@pytest.fixture
def case(tmp_path):
    start = random_tensors(0) | {"model.layers.1.big.weight": torch.randn(600, 500).bfloat16()}
    base = write_checkpoint(tmp_path / "base", start)
    branches = []
    for k in range(2):
        path = write_checkpoint(tmp_path / f"b{k}", near(start, k), shards=2)
        branches.append(Branch(path, k + 1, f"branch {k}", checkpoint.fingerprint(path)))
    return base, branches


def left(folder):
    return sorted(p.name for p in folder.iterdir())


def flip(path, where, bit=0):
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    data[start + int((len(data) - start - 1) * where)] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("where", [0.0, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("operator", ["average", "ties"])
def test_a_bit_flipped_since_training_is_found(tmp_path, case, where, operator):
    base, branches = case
    flip(sorted(branches[1].path.glob("*.safetensors"))[0], where)
    # at 0.0 lies an integer tensor, which then differs between the branches as well
    with pytest.raises((CheckpointError, MergeError), match=r"branch 1 .* is not what was recorded|must be identical"):
        run_merge(make_plan(base, branches, operator, output=tmp_path / "out"))
    assert left(tmp_path) == ["b0", "b1", "base"]


def test_a_changed_config_or_base_is_found(tmp_path, case):
    base, branches = case
    recorded = checkpoint.fingerprint(base)
    plan = make_plan(base, branches, "task_arithmetic", scale=0.5, base_fingerprint=recorded, output=tmp_path / "out")
    flip(base / "model.safetensors", 0.3)
    with pytest.raises(CheckpointError, match=r"the base .* is not what was recorded"):
        run_merge(plan)
    assert left(tmp_path) == ["b0", "b1", "base"]


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_truncated_or_swapped_shard_is_found(tmp_path, case, cut):
    base, branches = case
    one, two = sorted(branches[0].path.glob("*.safetensors"))
    plan = make_plan(base, branches, output=tmp_path / "out")
    os.truncate(two, two.stat().st_size - cut)
    with pytest.raises(CheckpointError, match="truncated"):
        make_plan(base, branches, output=tmp_path / "out")
    with pytest.raises(CheckpointError, match="became shorter"):
        run_merge(plan)  # truncated after it was planned
    two.rename(tmp_path / "x")
    one.rename(two)
    (tmp_path / "x").rename(one)
    with pytest.raises(CheckpointError):
        make_plan(base, branches, output=tmp_path / "out")
    assert left(tmp_path) == ["b0", "b1", "base"]


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_output_that_does_not_read_back_is_refused(tmp_path, case, where, monkeypatch):
    """A write whose bytes change on their way to the disk."""
    base, branches = case
    plan = make_plan(base, branches, output=tmp_path / "out")
    total, real, seen = plan.output_bytes, os.pwrite, []

    def faulty(descriptor, data, offset):
        place = int((total - 1) * where)
        if offset <= place < offset + len(data) and offset > 0:
            data = bytearray(data)
            data[place - offset] ^= 4
            seen.append(place)
        elif offset == 0 and where == 0.0:
            data = b"\x01" + bytes(data)[1:]
            seen.append(0)
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", faulty)
    with pytest.raises(CheckpointError, match=r"reads back differently|different header"):
        run_merge(plan)
    assert seen
    assert left(tmp_path) == ["b0", "b1", "base"]


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path, case):
    base, branches = case
    plan = make_plan(base, branches, output=tmp_path / "out")

    def progress(done, total, label=""):
        (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(MergeError, match="already exists"):
        run_merge(plan, progress)
    assert left(tmp_path) == ["b0", "b1", "base", "out"]
    assert left(tmp_path / "out") == []


def test_interruption_cleans_up(tmp_path, case):
    base, branches = case

    def progress(done, total, label=""):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_merge(make_plan(base, branches, output=tmp_path / "out"), progress)
    assert left(tmp_path) == ["b0", "b1", "base"]


def test_progress_reaches_the_end(tmp_path, case):
    base, branches = case
    seen = []
    run_merge(
        make_plan(base, branches, output=tmp_path / "out"), lambda done, total, label="": seen.append((done, total))
    )
    dones, totals = zip(*seen, strict=True)
    assert sorted(dones) == list(dones)
    assert len(set(totals)) == 1
    assert 0.9 < dones[-1] / totals[0] <= 1


def test_leftovers_of_killed_merges_are_swept_and_of_running_ones_are_not(tmp_path, case):
    base, branches = case
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    (tmp_path / f".out.{host}.{dead.pid}.partial").mkdir()
    running = f".out.{host}.{os.getppid()}.partial"
    (tmp_path / running).mkdir()
    run_merge(make_plan(base, branches, output=tmp_path / "out"))
    assert left(tmp_path) == [running, "b0", "b1", "base", "out"]


def test_work_of_other_hosts_and_containers_is_not_swept(tmp_path, case):
    """Fails on commit f5727a1: a process number unknown here counted as dead, so two hosts deleted each other's work."""
    base, branches = case
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    elsewhere = tmp_path / f".out.otherhost.{dead.pid}.partial"
    abandoned = tmp_path / f".out.thirdhost.{dead.pid}.partial"
    held = (
        tmp_path / f".out.{socket.gethostname()}.{dead.pid}.partial"
    )  # of a container whose processes are not seen here
    for folder in (elsewhere, abandoned, held):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    for path in (abandoned / "model.safetensors", abandoned):
        os.utime(path, (time.time() - 90_000,) * 2)
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    run_merge(make_plan(base, branches, output=tmp_path / "out"))
    os.close(descriptor)
    assert left(tmp_path) == sorted([held.name, elsewhere.name, "b0", "b1", "base", "out"])


@pytest.mark.parametrize("name", ["README.md", "merge.json", "config.json"])
def test_shards_are_safetensors_by_name(tmp_path, case, name):
    """Fails on commit f5727a1: a shard named README.md was overwritten by the card, one named merge.json a traceback."""
    base, branches = case
    one, _ = sorted(branches[0].path.glob("*.safetensors"))
    index = branches[0].path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(one.name, name))
    one.rename(one.with_name(name))
    with pytest.raises(CheckpointError, match=r"expected \*\.safetensors|safetensors"):
        make_plan(base, branches, output=tmp_path / "out")
    with pytest.raises(CheckpointError):
        make_plan(branches[0].path, branches[1:], output=tmp_path / "out")
    assert left(tmp_path) == ["b0", "b1", "base"]


KILLED = """
import os, sys
from pathlib import Path
from merit.merge import Branch, plan_merge, run_merge, stream
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
calls = 0

def count(event, args):
    # Every open, rename, mkdir and the like of the merge itself is a point to die at.
    global calls
    calls += 1
    if calls == limit:
        os.kill(os.getpid(), 9)

plan = plan_merge(folder / "base", [Branch(folder / f"b{k}", k + 1, f"branch {k}") for k in range(2)], folder / "out")
stream.threads = lambda: 1
real = os.pwrite
def pwrite(*args):
    count("pwrite", args)
    return real(*args)
os.pwrite = pwrite
sys.addaudithook(lambda event, args: count(event, args) if event.split(".")[0] in ("open", "os", "shutil") else None)
run_merge(plan)
print(calls)
"""


def loads(folder):
    try:
        checkpoint.read_headers(folder)
        return (folder / "config.json").is_file()
    except CheckpointError:
        return False


def test_a_kill_at_any_point_leaves_nothing_that_loads(tmp_path, case):
    """SIGKILL at random system calls of the merge; the folder under its final name is absent or complete."""
    base, branches = case
    run_merge(make_plan(base, branches, output=tmp_path / "want"))
    want = checkpoint.fingerprint(tmp_path / "want")

    def attempt(limit):
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), str(limit)], capture_output=True, text=True, check=False
        )

    whole = attempt(0)
    assert whole.returncode == 0, whole.stderr
    total = int(whole.stdout)
    assert checkpoint.fingerprint(tmp_path / "out") == want
    points = [*random.Random(0).sample(range(1, total + 1), min(total, 12)), total]
    for limit in points:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert attempt(limit).returncode == -signal.SIGKILL
        if (tmp_path / "out").exists():
            assert checkpoint.fingerprint(tmp_path / "out") == want
        for path in tmp_path.glob(".out.*.partial"):
            # Before the last file is in place nothing loads; after it the folder is complete and verified.
            assert not loads(path) or checkpoint.fingerprint(path) == want
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    run_merge(make_plan(base, branches, output=tmp_path / "out"))
    assert checkpoint.fingerprint(tmp_path / "out") == want
    assert not list(tmp_path.glob(".out.*.partial"))


def test_a_kill_at_a_random_moment_leaves_nothing_that_loads(tmp_path):
    start = {f"model.layers.{i}.w.weight": torch.randn(1000, 1000).bfloat16() for i in range(4)}
    write_checkpoint(tmp_path / "base", start)
    for k in range(2):
        write_checkpoint(tmp_path / f"b{k}", near(start, k))
    code = KILLED.replace("calls == limit", "False").replace(
        "run_merge(plan)", "print('go', flush=True); run_merge(plan)"
    )
    chance = random.Random(1)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), "0"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.08))
        process.kill()
        process.wait()
        if (tmp_path / "out").exists():
            checkpoint.fingerprint(tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        assert not any(loads(p) for p in tmp_path.glob(".out.*.partial") if not (p / "config.json").exists())
