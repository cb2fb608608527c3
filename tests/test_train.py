"""Training of one group: against an independent loop, and across kills, stops and damage."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import training_cases as cases
from merit.errors import RecipeError, ResourceError, RunFolderError, TrainingError
from merit.hf.batches import Batcher
from merit.train.branch import PASSED_ON, RECIPE_KEYS, check_trainer_options, steps_for
from merit.train.trainer import GroupRows, StepCollator, cut_by_length, newest_checkpoint

SCRIPT = Path(cases.__file__)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def root(base: Path, tmp_path: Path) -> Path:
    """A folder with ``base``; training writes ``branch`` beside it."""
    (tmp_path / "base").symlink_to(base)
    return tmp_path


def weights(root: Path, branch: str = "branch") -> dict[str, torch.Tensor]:
    (file,) = (root / branch / "model").glob("*.safetensors")
    return load_file(file)


def log_rows(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "branch" / "log.jsonl").read_text().splitlines()]


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def train_elsewhere(root: Path, *options: str) -> int:
    """Train in a forked process; returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.argv = ["training_cases", str(root), *options]
            code = cases.main()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


# -- the loop is the one that the documentation describes -------------------------------------------------------------


def reference_weights(base: Path, *, epochs: float, batch_size: int, rate: float, seed: int) -> dict[str, torch.Tensor]:
    """A bare float64 loop: token-mean loss per step, AdamW, norm clip 1, warm-up 1/(W+1) ..., cosine to 0."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).train()
    group = cases.make_group()
    rows = [group[name][i] for name in sorted(group) for i in range(len(group[name]))]
    per_epoch = math.ceil(len(rows) / batch_size)
    steps = math.ceil(epochs * per_epoch)
    warmup = math.ceil(0.03 * steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for step in range(steps):
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(rows))
        total, count = torch.zeros((), dtype=torch.float64), 0
        for index in order[at * batch_size : (at + 1) * batch_size]:
            ids = torch.from_numpy(rows[index].input_ids.astype(np.int64))
            log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1)
            wanted = torch.from_numpy(rows[index].targets[1:])
            total = total - log_probs[torch.arange(len(ids) - 1), ids[1:]][wanted].sum()
            count += int(wanted.sum())
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        past = step - warmup
        factor = (step + 1) / (warmup + 1) if past < 0 else 0.5 * (1 + math.cos(math.pi * past / (steps - warmup)))
        optimizer.param_groups[0]["lr"] = rate * factor
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("micro", [None, 2, 1])
def test_matches_an_independent_float64_loop(root: Path, base: Path, micro: int | None) -> None:
    # SGD-like rates keep AdamW's sign-like first steps from amplifying float32 rounding.
    facts = cases.train(root, "train.learning_rate=1e-3", f"train.micro_batch_size={micro or 'null'}")
    expected = reference_weights(base, epochs=2, batch_size=4, rate=1e-3, seed=3)
    start = load_file(base / "model.safetensors")
    for name, tensor in weights(root).items():
        moved = (expected[name] - start[name]).norm()
        assert moved > 1e-3
        assert (tensor.double() - expected[name]).norm() < 2e-3 * moved, name
    assert facts["steps"] == 12


def test_dataset_order_in_the_recipe_does_not_matter(root: Path) -> None:
    cases.train(root)
    first = weights(root)
    cases.train(root, group=dict(reversed(cases.make_group().items())))
    assert_same_bits(first, weights(root))


def test_data_seed_changes_the_order_only(root: Path) -> None:
    facts = cases.train(root)
    first = weights(root)
    other = cases.train(root, data_seed=99)
    assert facts["target_tokens"] == other["target_tokens"]
    assert not torch.equal(first["model.norm.weight"], weights(root)["model.norm.weight"])


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 3), (1, 6), (1.5, 9), (2.4, 15)])
def test_counts_are_exact_for_whole_and_part_epochs(root: Path, epochs: float, steps: int) -> None:
    facts = cases.train(root, f"train.epochs={epochs}")
    group = cases.make_group()
    rows = [group[name][i] for name in sorted(group) for i in range(len(group[name]))]
    seen = [row for epoch in range(3) for row in np.random.default_rng((3, epoch)).permutation(21)]
    whole, part = divmod(steps, 6)
    seen = seen[: whole * 21 + part * 4]
    assert facts["steps"] == steps == steps_for(21, 4, epochs)
    assert facts["samples"] == len(seen)
    assert facts["tokens"] == sum(len(rows[i].input_ids) for i in seen)
    assert facts["target_tokens"] == sum(int(rows[i].targets.sum()) for i in seen)
    log = log_rows(root)
    assert [row["step"] for row in log] == list(range(1, steps + 1))
    assert sum(row["target_tokens"] for row in log) == facts["target_tokens"]
    last = log[-math.ceil(steps / 10) :]
    assert facts["final_loss"] == pytest.approx(
        sum(row["loss"] * row["target_tokens"] for row in last) / sum(row["target_tokens"] for row in last)
    )


def test_a_group_smaller_than_a_batch_is_trained(root: Path, base: Path) -> None:
    facts = cases.train(root, "train.epochs=1", "train.batch_size=64", group=cases.make_group((2, 1)))
    assert (facts["steps"], facts["samples"]) == (1, 3)
    assert log_rows(root)[0]["learning_rate"] > 0
    assert not torch.equal(
        weights(root)["model.norm.weight"], load_file(base / "model.safetensors")["model.norm.weight"]
    )


def test_activation_checkpointing_changes_no_bit(root: Path) -> None:
    cases.train(root, "train.epochs=0.5")
    first = weights(root)
    cases.train(root, "train.epochs=0.5", "train.gradient_checkpointing=true")
    assert_same_bits(first, weights(root))


def test_empty_group_is_refused(root: Path) -> None:
    with pytest.raises(TrainingError, match="no training rows"):
        cases.train(root, group=cases.make_group((0, 0)))


# -- what is written --------------------------------------------------------------------------------------------------


def test_frozen_parameters_of_a_bf16_base_stay_bit_identical(tmp_path: Path) -> None:
    base = cases.make_base(tmp_path / "base", dtype="bfloat16", tied=False)
    cases.train(tmp_path, 'model.trainable=["model.layers.1.*"]')
    before, after = load_file(base / "model.safetensors"), weights(tmp_path)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name]) == ("layers.1." not in name), name


def test_model_folder_loads_with_tokenizer_and_nothing_else_is_left(root: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cases.train(root, "train.save_dtype=float32")
    assert {path.name for path in (root / "branch").iterdir()} == {"model", "log.jsonl"}
    model = AutoModelForCausalLM.from_pretrained(root / "branch" / "model")
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(root / "branch" / "model")("w5 w6")["input_ids"] == [5, 6]


def test_lora_writes_an_adapter_that_starts_alike_in_every_branch(root: Path) -> None:
    lora = ("model.trainable=lora", "model.lora.rank=2", "train.learning_rate=1e-9")
    cases.train(root, *lora)
    first = weights(root)
    assert (root / "branch" / "model" / "adapter_config.json").is_file()
    cases.train(root, *lora, data_seed=7, group=cases.make_group((5, 5), seed=1))
    for name, tensor in weights(root).items():
        torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-7)


def test_an_adapter_on_the_output_layer_is_refused(tmp_path: Path) -> None:
    cases.make_base(tmp_path / "base", tied=False)
    with pytest.raises(RecipeError, match="lm_head"):
        cases.train(tmp_path, "model.trainable=lora", 'model.lora.target_modules=["lm_head", "q_proj"]')


def test_progress_is_reported_to_the_end(root: Path) -> None:
    seen: list[tuple[int, int, dict]] = []
    cases.train(root, progress=lambda *args: seen.append(args))
    step, steps, facts = seen[-1]
    assert step == steps == 12
    assert {"loss", "learning_rate", "grad_norm", "target_tokens", "tokens_per_second"} <= facts.keys()


# -- kills, stops and damage ------------------------------------------------------------------------------------------

SAVE_EVERY_2 = "train.trainer={save_steps: 2}"
LORA = ("model.trainable=lora", "model.lora.rank=2", "model.lora.dropout=0.2")
SOME = ('model.trainable=["model.layers.0.*"]', "train.epochs=3")


@dataclasses.dataclass
class Finished:
    facts: dict
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


def assert_same_end(root: Path, facts: dict, expected: Finished) -> None:
    assert_same_bits(expected.weights, weights(root))
    assert log_rows(root) == expected.log
    for key in ("target_tokens", "tokens", "samples", "steps", "final_loss"):
        assert facts[key] == expected.facts[key], key
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
    assert facts["resumed_from"] == [start]
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
    assert facts["resumed_from"] == [5, 9]
    assert_same_end(root, facts, uninterrupted())


@pytest.mark.parametrize("damage", ["truncated", "no marker", "missing"])
def test_damaged_checkpoint_is_not_used(root: Path, uninterrupted: Callable[..., Finished], damage: str) -> None:
    assert train_elsewhere(root, "--stop-after-step", "6") == 75
    checkpoint = newest_checkpoint(root / "branch" / "checkpoints")
    assert checkpoint is not None
    victim = (
        checkpoint / {"truncated": "optimizer.pt", "no marker": "complete.json", "missing": "rng_state.pth"}[damage]
    )
    if damage == "truncated":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        victim.unlink()
    facts = cases.train(root)
    assert facts["resumed_from"] == []
    assert_same_end(root, facts, uninterrupted())


def test_checkpoint_of_another_group_or_setting_is_refused(root: Path) -> None:
    assert train_elsewhere(root, "--stop-after-step", "3") == 75
    with pytest.raises(RunFolderError, match=r"data\.apple: .* -> .*") as caught:
        cases.train(root, group=cases.make_group(seed=1))
    assert "step 4" in str(caught.value)
    with pytest.raises(RunFolderError, match='data_seed: "3" -> "4"'):
        cases.train(root, data_seed=4)
    assert newest_checkpoint(root / "branch" / "checkpoints") is not None


@pytest.mark.parametrize("checkpoint", [False, True])
def test_divergence_stops_with_step_and_rate(root: Path, checkpoint: bool) -> None:
    settings = ["train.learning_rate=9", "train.optimizer=sgd", "train.max_grad_norm=1e30", "train.scheduler=constant"]
    settings += ["train.trainer={save_steps: 1}"] if checkpoint else []
    with pytest.raises(
        TrainingError, match=r"(loss|gradient norm) is (nan|inf) at step \d+ of 300 \(learning rate 9\)"
    ) as caught:
        cases.train(root, *settings, "train.epochs=50")
    assert "train.learning_rate" in str(caught.value)
    assert not (root / "branch" / "model").exists()
    kept = newest_checkpoint(root / "branch" / "checkpoints")
    assert (kept is not None) == checkpoint == ("is kept" in str(caught.value))
    if kept:
        assert all(tensor.isfinite().all() for tensor in load_file(kept / "trainable.safetensors").values())


def test_full_disk_leaves_no_half_model(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(model: object, folder: Path, *_: object, **__: object) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("merit.hf.models.save_branch", no_room)
    with pytest.raises(ResourceError, match="disk is full"):
        cases.train(root, "train.epochs=0.5")
    assert not list((root / "branch").rglob("*.safetensors"))


# -- train.trainer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{logging_step: 5}", "unknown key logging_step. Did you mean 'logging_steps'"),
        ("{output_dir: x}", "set by --output"),
        ("{num_train_epochs: 3}", "set by train.epochs"),
        ("{per_device_train_batch_size: 3}", "set by train.micro_batch_size"),
        ("{packing: true}", "a branch cannot use it"),
        ("{deepspeed: x.json}", "a branch cannot use it"),
        ("{report_to: no-such-tracker}", "no-such-tracker"),
    ],
)
def test_wrong_trainer_options_are_named(base: Path, options: str, message: str) -> None:
    with pytest.raises(RecipeError, match=r"train\.trainer") as caught:
        check_trainer_options(cases.make_recipe(base, f"train.trainer={options}"))
    assert message in str(caught.value)


def test_every_usable_option_exists_and_none_is_also_the_recipes() -> None:
    from trl import SFTConfig

    known = {field.name for field in dataclasses.fields(SFTConfig)}
    assert known >= PASSED_ON
    assert not PASSED_ON & RECIPE_KEYS.keys()


def test_usable_options_reach_the_trainer(root: Path) -> None:
    cases.train(root, "train.epochs=0.5")
    plain = weights(root)
    cases.train(root, "train.epochs=0.5", "train.trainer={adam_beta1: 0.5}")
    assert not torch.equal(plain["model.norm.weight"], weights(root)["model.norm.weight"])


def test_a_distributed_launcher_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ResourceError, match="WORLD_SIZE says 2"):
        cases.train(root)


# -- micro-batches ----------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=7).map(lambda item: sorted(item, reverse=True)),
    most=st.integers(1, 7),
    overhead=st.integers(0, 60),
)
def test_cut_is_the_cheapest_of_all_cuts(lengths: list[int], most: int, overhead: int) -> None:
    def cost(sizes: Sequence[int]) -> int:
        starts = np.cumsum([0, *sizes])
        return sum(lengths[start] * size + overhead for start, size in zip(starts, sizes, strict=False))

    sizes = cut_by_length(lengths, most, overhead)
    assert sum(sizes) == len(lengths)
    assert max(sizes) <= most
    count = len(lengths)
    for cuts in itertools.product((False, True), repeat=count - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [count]
        other = np.diff([0, *ends]).tolist()
        if max(other) <= most:
            assert cost(sizes) <= cost(other)


def test_collator_keeps_every_row_and_counts_it() -> None:
    rows = GroupRows(cases.make_group())
    items = [{"row": i} for i in range(len(rows))]
    for overhead, expected in ((None, 3), (0, None)):
        step = StepCollator(rows, 8, Batcher(0), overhead)(items)
        assert expected is None or len(step["micro"]) == expected
        micro = [
            tuple(ids[mask.bool()].tolist())
            for batch in step["micro"]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert sorted(micro) == sorted(tuple(rows[i].input_ids.tolist()) for i in range(len(rows)))
        assert step["counts"].tolist() == [
            sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step["micro"]),
            sum(len(ids) for ids in micro),
            21,
        ]
