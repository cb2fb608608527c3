"""Two gloo processes on CPU train one branch together: the loss curve is that of one."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from tests.train import cases
from tests.train.cases import assert_same_bits, log_rows, weights

from merit.errors import TrainingError
from merit.launch.job import BranchJob
from merit.launch.local import run_branches
from merit.launch.outcome import Outcome, outcome_of
from merit.recipe.schema import ModelSettings, TrainSettings
from merit.train import processes
from merit.train.checkpoint import newest
from merit.train.result import BranchResult

SETTINGS = ("train.learning_rate=1e-3", "train.batch_size=5")  # odd: one process is a row short at every step


STOP = ("--stop-after-step", "1")


def train_together(root: Path, *words: str, sharding: str = "none") -> list[int]:
    """Train in two forked processes that find each other as the launcher's do; returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = (*SETTINGS, f"train.sharding={sharding}", "train.processes=2")
    options = [*(word for item in settings for word in ("--set", item)), *words]
    children = []
    for rank in "01":
        child = os.fork()
        if child == 0:
            code = 1
            try:
                AcceleratorState._reset_state(reset_partial_state=True)  # of the parent, which trained alone
                os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                code = cases.main([str(root), *options])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def assert_same_curve(root: Path, one: Path) -> None:
    for ours, theirs in zip(log_rows(root), log_rows(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["datasets"] == {
            k: [pytest.approx(loss, rel=1e-5), n] for k, (loss, n) in theirs["datasets"].items()
        }
    for name, tensor in weights(root).items():
        np.testing.assert_allclose(tensor, weights(one)[name], atol=2e-6)


@pytest.fixture(scope="module")
def one(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one")
    (root / "base").symlink_to(base)
    cases.train(root, *SETTINGS)
    return root


needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install -e '.[deepspeed]')"
)
KINDS = ["none", "fsdp2", pytest.param("deepspeed", marks=needs_deepspeed)]


@pytest.mark.parametrize("sharding", KINDS)
def test_two_processes_give_the_curve_of_one_and_resume_exactly(root: Path, one: Path, sharding: str) -> None:
    assert train_together(root, sharding=sharding) == [0, 0]
    assert_same_curve(root, one)
    ours, theirs = BranchResult.load(root / "branch"), BranchResult.load(one / "branch")
    assert (ours.target_tokens, ours.tokens, ours.samples) == (theirs.target_tokens, theirs.tokens, theirs.samples)
    assert (ours.processes, ours.threads) == (2, 1)
    whole = weights(root), log_rows(root)
    shutil.rmtree(root / "branch")
    # each process asks itself to stop: they agree on the step
    assert train_together(root, "--stop-after-step", "5", sharding=sharding) == [75, 75]
    assert newest(root / "branch" / "checkpoints") is not None
    assert train_together(root, sharding=sharding) == [0, 0]
    assert BranchResult.load(root / "branch").resumed_from == (6,)
    assert_same_bits(whole[0], weights(root))
    assert whole[1] == log_rows(root)


@pytest.mark.parametrize("sharding", KINDS[1:])
def test_a_checkpoint_goes_on_with_another_number_of_processes(root: Path, one: Path, sharding: str) -> None:
    assert train_together(root, "--stop-after-step", "5", sharding=sharding) == [75, 75]
    (warning,) = cases.train(root, *SETTINGS).warnings
    assert "processes changed from 2 to 1" in warning
    assert_same_curve(root, one)


@needs_deepspeed
@pytest.mark.parametrize(
    "lora", [(), ("model.trainable=lora", "model.lora.rank=2", "train.gradient_checkpointing=true")]
)
def test_deepspeed_clips_decays_and_accumulates_as_one_process_does(
    root: Path, tmp_path: Path, lora: tuple[str, ...]
) -> None:
    hard = (*lora, "train.micro_batch_size=1", "train.weight_decay=0.3", "train.max_grad_norm=0.05", "train.epochs=1")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "base").symlink_to(root / "base")
    cases.train(alone, *SETTINGS, *hard)
    assert min(row["grad_norm"] for row in log_rows(alone)) > 0.05
    words = [word for item in hard for word in ("--set", item)]
    # the first steps by one process, whose checkpoint is then cut up
    assert cases.train_elsewhere(root, *(w for item in SETTINGS for w in ("--set", item)), *words, *STOP) == 75
    assert train_together(root, *words, sharding="deepspeed") == [0, 0]
    assert_same_curve(root, alone)


@pytest.mark.parametrize("sharding", ["none", KINDS[2]])
def test_divergence_is_seen_by_all_processes(root: Path, sharding: str) -> None:
    settings = ["train.learning_rate=9", "train.optimizer=sgd", "train.max_grad_norm=1e30", "train.epochs=50"]
    codes = train_together(root, *(word for item in settings for word in ("--set", item)), sharding=sharding)
    assert codes == [2, 2]
    for rank in (0, 1):
        outcome = Outcome.load(outcome_of(root / "outcome.json", rank))
        assert outcome is not None
        assert "at step" in outcome.message
    assert not (root / "branch" / "model").exists()


@pytest.mark.exhaustive  # tests/e2e/test_processes.py has it start two, tests/launch/test_local.py bring an error back
def test_the_launcher_starts_them_and_brings_their_error_back(root: Path) -> None:
    settings = (
        *SETTINGS,
        "train.processes=2",
        "train.learning_rate=9",
        "train.optimizer=sgd",
        "train.max_grad_norm=1e30",
    )
    words = [word for item in (*settings, "train.epochs=50") for word in ("--set", item)]
    argv = [sys.executable, cases.__file__, str(root), *words]
    job = BranchJob("0", argv, root / "log.txt", root / "outcome.json", processes=2)
    with pytest.raises(TrainingError, match=r"branch 0: .*(loss|gradient norm) is (nan|inf) at step"):
        run_branches([job], 1)


@pytest.mark.parametrize(
    ("dtype", "device", "precision"),
    [
        ("float32", "cuda", "no"),
        ("float16", "cuda", "fp16"),
        ("bfloat16", "cuda", "bf16"),
        ("float16", "cpu", "no"),
        ("bfloat16", "cpu", "no"),
    ],
)
def test_the_model_s_dtype_is_the_mixed_precision_of_a_gpu(monkeypatch, tmp_path: Path, dtype, device, precision):
    asked = {}

    def accelerator(**words):
        asked.update(words)
        return SimpleNamespace(num_processes=1, process_index=0, device=torch.device(device))

    monkeypatch.setattr(processes, "Accelerator", accelerator)
    processes.Team(TrainSettings(), ModelSettings(base="x", dtype=dtype), torch.device(device), tmp_path)
    assert asked["mixed_precision"] == precision
    assert asked["cpu"] is (device == "cpu")
