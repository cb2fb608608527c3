"""Kills, stops and damage: a branch that was interrupted ends in the same bits."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.train import cases
from tests.train.cases import assert_same_bits, log_rows, train_elsewhere, weights

from merit.errors import ResourceError, RunFolderError, TrainingError
from merit.train.checkpoint import newest
from merit.train.result import BranchResult

SCRIPT = Path(cases.__file__)

SAVE_EVERY_2 = "train.checkpoint_steps=2"
LORA = ("model.trainable=lora", "model.lora.rank=2", "model.lora.dropout=0.2")
SOME = ('model.trainable=["model.layers.0.*"]', "train.epochs=3")


@dataclasses.dataclass
class Finished:
    facts: BranchResult
    weights: dict[str, torch.Tensor]
    log: list[dict]


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """What training gives when nothing happens to it, by settings."""

    @functools.cache
    def finish(*settings: str) -> Finished:
        root = tmp_path_factory.mktemp("uninterrupted")
        (root / "base").symlink_to(base)
        return Finished(cases.train(root, *settings), weights(root), log_rows(root))

    return finish


def assert_same_end(root: Path, facts: BranchResult, expected: Finished) -> None:
    assert_same_bits(expected.weights, weights(root))
    assert log_rows(root) == expected.log
    for key in ("target_tokens", "tokens", "samples", "steps", "final_loss"):
        assert getattr(facts, key) == getattr(expected.facts, key), key
    assert not (root / "branch" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("settings", "kill", "start"),
    [
        ((), "--kill-after-step 9", 8),  # in the second epoch: its order is drawn anew
        ((), "--kill-after-step 7", 6),  # goes on from an epoch's end
        ((), "--kill-in-save 8", 6),  # weights and optimizer are written, the rest of the checkpoint is not
        (LORA, "--kill-after-step 9", 8),  # dropout: the random state has to come back
        (SOME, "--kill-after-step 13", 12),
    ],
)
def test_killed_and_resumed_is_bit_identical(
    root: Path, uninterrupted: Callable[..., Finished], settings: tuple[str, ...], kill: str, start: int
) -> None:
    overrides = (*settings, SAVE_EVERY_2)
    words = [word for item in overrides for word in ("--set", item)]
    assert train_elsewhere(root, *words, *kill.split()) == -signal.SIGKILL
    assert not (root / "branch" / "model").exists()
    facts = cases.train(root, *overrides)
    assert facts.resumed_from == (start,)
    assert_same_end(root, facts, uninterrupted(*overrides))


def test_stopped_twice_then_finished_is_bit_identical(root: Path, uninterrupted: Callable[..., Finished]) -> None:
    """SIGTERM ends a process with 75 after a checkpoint; the first part runs in an interpreter of its own."""
    command = [sys.executable, str(SCRIPT), str(root), "--stop-after-step", "4"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 75, ended.stderr
    assert "stopped at step 5 of 12" in ended.stderr  # the signal came during step 5, which is finished first
    assert train_elsewhere(root, "--stop-after-step", "8") == 75
    assert not (root / "branch" / "model").exists()
    facts = cases.train(root)
    assert facts.resumed_from == (5, 9)
    assert_same_end(root, facts, uninterrupted())


VICTIMS = {
    "truncated": "state.pt",
    "no marker": "complete.json",
    "missing": "trainable.safetensors",
    "flipped weight": "trainable.safetensors",
    "flipped state": "state.pt",
    "flipped log": "log.jsonl",
    "other count": "complete.json",
}


@pytest.mark.parametrize("damage", VICTIMS)
def test_damaged_checkpoint_is_not_used(root: Path, uninterrupted: Callable[..., Finished], damage: str) -> None:
    """On commit f5727a1 flipped bits and a changed count are gone on from: only sizes were compared."""
    assert train_elsewhere(root, "--stop-after-step", "6") == 75
    checkpoint = newest(root / "branch" / "checkpoints")
    assert checkpoint is not None
    victim = checkpoint / VICTIMS[damage]
    data = bytearray(victim.read_bytes())
    if damage == "truncated":
        os.truncate(victim, len(data) // 2)
    elif damage.startswith("flipped"):
        data[-9 if damage == "flipped weight" else len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "other count":
        victim.write_text(re.sub(r'"target_tokens": \d', '"target_tokens": 9', victim.read_text(), count=1))
    else:
        victim.unlink()
    facts = cases.train(root)
    assert facts.resumed_from == ()
    assert_same_end(root, facts, uninterrupted())


def test_checkpoint_of_another_group_or_setting_is_refused(root: Path) -> None:
    assert train_elsewhere(root, "--stop-after-step", "3") == 75
    with pytest.raises(RunFolderError, match=r"data\.apple: .* -> .*") as caught:
        cases.train(root, group=cases.make_group(seed=1))
    assert "step 4" in str(caught.value)
    with pytest.raises(RunFolderError, match=r"train\.data_seed: null -> 4"):
        cases.train(root, "train.data_seed=4")
    assert newest(root / "branch" / "checkpoints") is not None


@pytest.mark.parametrize("checkpoint", [False, True])
def test_divergence_stops_with_step_and_rate(root: Path, checkpoint: bool) -> None:
    settings = ["train.learning_rate=9", "train.optimizer=sgd", "train.max_grad_norm=1e30", "train.scheduler=constant"]
    settings += ["train.checkpoint_steps=1"] if checkpoint else []
    with pytest.raises(
        TrainingError, match=r"(loss|gradient norm) is (nan|inf) at step \d+ of 300 \(learning rate 9\)"
    ) as caught:
        cases.train(root, *settings, "train.epochs=50")
    assert "train.learning_rate" in str(caught.value)
    assert not (root / "branch" / "model").exists()
    kept = newest(root / "branch" / "checkpoints")
    assert (kept is not None) == checkpoint == ("is kept" in str(caught.value))
    if kept:
        assert all(tensor.isfinite().all() for tensor in load_file(kept / "trainable.safetensors").values())


def test_full_disk_leaves_no_half_model(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(model: object, folder: Path, *_: object, **__: object) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("merit.train.branch.save_branch", no_room)
    with pytest.raises(ResourceError, match="disk is full"):
        cases.train(root, "train.epochs=0.5")
    assert not list((root / "branch").rglob("*.safetensors"))


def test_other_threads_after_a_stop_are_warned_of(root: Path) -> None:
    """On commit f5727a1 other threads after a stop changed the bits without a warning."""
    assert train_elsewhere(root, "--stop-after-step", "3") == 75
    (warning,) = cases.train(root, "train.threads=2").warnings
    assert "threads changed from 1 to 2 between step 4" in warning
    assert not cases.train(root).warnings
