"""Training of one group: against an independent loop, and what it writes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.train import cases
from tests.train.cases import assert_same_bits, log_rows, weights

from merit.errors import RecipeError, ResourceError, RunFolderError, TrainingError
from merit.launch.job import read_progress
from merit.train.batches import steps_for
from merit.train.result import BranchResult


def reference_weights(
    base: Path, *, epochs: float, batch_size: int, rate: float, seed: int, decay: float
) -> dict[str, torch.Tensor]:
    """A bare float64 loop: token-mean loss per step, AdamW, norm clip 1, warm-up 1/(W+1) ..., cosine to 0.

    ``decay`` shrinks the matrices by rate × decay per step; biases and norms are vectors.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).train()
    group = cases.make_group()
    rows = [group[name][i] for name in sorted(group) for i in range(len(group[name]))]
    per_epoch = math.ceil(len(rows) / batch_size)
    steps = math.ceil(epochs * per_epoch)
    warmup = math.ceil(0.03 * steps)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
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
        with torch.no_grad():
            for matrix in matrices:
                matrix.mul_(1 - rate * factor * decay)
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize(("micro", "epochs", "decay"), [(None, 2, 0.0), (2, 2, 0.0), (1, 3, 20.0)])
def test_matches_an_independent_float64_loop(
    root: Path, base: Path, micro: int | None, epochs: int, decay: float
) -> None:
    # SGD-like rates keep AdamW's sign-like first steps from amplifying float32 rounding.
    asked = (f"train.epochs={epochs}", f"train.weight_decay={decay}", f"train.micro_batch_size={micro or 'null'}")
    facts = cases.train(root, "train.learning_rate=1e-3", *asked)
    expected = reference_weights(base, epochs=epochs, batch_size=4, rate=1e-3, seed=3, decay=decay)
    start = load_file(base / "model.safetensors")
    for name, tensor in weights(root).items():
        moved = (expected[name] - start[name]).norm()
        assert moved > 1e-3
        assert (tensor.double() - expected[name]).norm() < 2e-3 * moved, name
    assert facts.steps == 6 * epochs


def test_dataset_order_in_the_recipe_does_not_matter(root: Path) -> None:
    cases.train(root)
    first = weights(root)
    cases.train(root, group=dict(reversed(cases.make_group().items())))
    assert_same_bits(first, weights(root))


def test_data_seed_changes_the_order_only(root: Path) -> None:
    facts = cases.train(root)
    first = weights(root)
    other = cases.train(root, "train.data_seed=99")
    assert facts.target_tokens == other.target_tokens
    assert not torch.equal(first["model.norm.weight"], weights(root)["model.norm.weight"])


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 3), (1, 6), (1.5, 9), (2.4, 15)])
def test_counts_are_exact_for_whole_and_part_epochs(root: Path, epochs: float, steps: int) -> None:
    facts = cases.train(root, f"train.epochs={epochs}")
    group = cases.make_group()
    rows = [group[name][i] for name in sorted(group) for i in range(len(group[name]))]
    seen = [row for epoch in range(3) for row in np.random.default_rng((3, epoch)).permutation(21)]
    whole, part = divmod(steps, 6)
    seen = seen[: whole * 21 + part * 4]
    assert facts.steps == steps == steps_for(21, 4, epochs)
    assert facts.samples == len(seen)
    assert facts.tokens == sum(len(rows[i].input_ids) for i in seen)
    assert facts.target_tokens == sum(int(rows[i].targets.sum()) for i in seen)
    log = log_rows(root)
    assert [row["step"] for row in log] == list(range(1, steps + 1))
    assert sum(row["target_tokens"] for row in log) == facts.target_tokens
    last = log[-math.ceil(steps / 10) :]
    assert facts.final_loss == pytest.approx(
        sum(row["loss"] * row["target_tokens"] for row in last) / sum(row["target_tokens"] for row in last)
    )


def test_a_group_smaller_than_a_batch_is_trained(root: Path, base: Path) -> None:
    facts = cases.train(root, "train.epochs=1", "train.batch_size=64", group=cases.make_group((2, 1)))
    assert (facts.steps, facts.samples) == (1, 3)
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
    assert {path.name for path in (root / "branch").iterdir()} == {
        "model",
        "log.jsonl",
        "result.json",
        "progress.json",
    }
    model = AutoModelForCausalLM.from_pretrained(root / "branch" / "model")
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(root / "branch" / "model")("w5 w6")["input_ids"] == [5, 6]


def test_lora_writes_an_adapter_that_starts_alike_in_every_branch(root: Path) -> None:
    lora = ("model.trainable=lora", "model.lora.rank=2", "train.learning_rate=1e-9")
    cases.train(root, *lora)
    first = weights(root)
    assert (root / "branch" / "model" / "adapter_config.json").is_file()
    cases.train(root, *lora, "train.data_seed=7", group=cases.make_group((5, 5), seed=1))
    for name, tensor in weights(root).items():
        torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-7)


def test_an_adapter_on_the_output_layer_is_refused(tmp_path: Path) -> None:
    cases.make_base(tmp_path / "base", tied=False)
    with pytest.raises(RecipeError, match="lm_head"):
        cases.train(tmp_path, "model.trainable=lora", 'model.lora.target_modules=["lm_head", "q_proj"]')


def test_progress_is_reported_to_the_end(root: Path) -> None:
    seen: list[tuple[float, float, str]] = []
    cases.train(root, progress=lambda *args: seen.append(args))
    done, total, label = seen[-1]
    assert done == total == 12
    assert "loss" in label
    assert (read_progress(root / "branch" / "progress.json") or {})["step"] == 12


def test_result_is_kept_and_a_damaged_one_is_named(root: Path) -> None:
    result = cases.train(root, "train.epochs=0.5")
    assert BranchResult.load(root / "branch") == result
    file = root / "branch" / "result.json"
    file.write_text(file.read_text().replace('"steps": 3', '"steps": []'))
    with pytest.raises(RunFolderError, match=r"result\.json is damaged: steps"):
        BranchResult.load(root / "branch")


def test_loss_by_dataset_is_that_of_a_plain_forward_pass(root: Path, base: Path) -> None:
    """At the first step, whose loss is taken at the base: each dataset's share, one row at a time in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    group = cases.make_group()
    rows = [(name, row) for name in sorted(group) for row in (group[name][i] for i in range(len(group[name])))]
    expected: dict[str, list[float]] = {}
    for index in np.random.default_rng((3, 0)).permutation(len(rows))[:4]:
        name, row = rows[index]
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        wanted = torch.from_numpy(row.targets[1:])
        loss = -log_probs[torch.arange(len(ids) - 1), ids[1:]][wanted].sum()
        entry = expected.setdefault(name, [0.0, 0])
        entry[0] += loss.item()
        entry[1] += int(wanted.sum())
    cases.train(root, "train.epochs=0.5")
    found = log_rows(root)
    assert found[0]["datasets"] == {name: [pytest.approx(loss, rel=1e-6), n] for name, (loss, n) in expected.items()}
    for line in found:
        losses, targets = zip(*line["datasets"].values(), strict=True)
        assert sum(targets) == line["target_tokens"]
        assert sum(losses) / sum(targets) == pytest.approx(line["loss"], rel=1e-6)


def test_trackers_get_the_figures_of_every_step(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import tracking

    lines: dict[int, dict[str, float]] = {}
    closed: list[str] = []

    class Fake(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "wandb", False, None

        def __init__(self, run_name: str, **_: object) -> None:
            super().__init__()
            assert run_name == "merit"

        def store_init_configuration(self, values: dict[str, object]) -> None:
            assert values["learning_rate"] == "0.01"

        def log(self, values: dict[str, float], step: int, **_: object) -> None:
            lines[step] = values

        def finish(self) -> None:
            closed.append(self.name)

    monkeypatch.setattr("merit.train.requirements.find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"train\.report_to: wandb is not installed"):
        cases.train(root, "train.report_to=[wandb]")
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [tracking.LoggerType.WANDB])
    monkeypatch.setattr("merit.train.requirements.find_spec", lambda _: True)
    cases.train(root, "train.epochs=0.5", "train.report_to=[wandb]")
    log = log_rows(root)
    assert closed == ["wandb"]
    assert [lines[row["step"]]["loss"] for row in log] == [row["loss"] for row in log]
    loss, targets = log[0]["datasets"]["apple"]
    assert lines[1]["dataset_loss/apple"] == loss / targets


def test_workers_of_the_loader_change_no_bit(root: Path) -> None:
    cases.train(root, "train.epochs=0.5")
    first = weights(root)
    cases.train(root, "train.epochs=0.5", "train.loader_workers=2")
    assert_same_bits(first, weights(root))


@pytest.mark.parametrize(
    ("settings", "package", "way_out"),
    [
        (["train.optimizer=adamw_8bit"], "bitsandbytes", "pip install -e '.[quantize]'"),
        (["model.trainable=lora", "model.quantize=4bit"], "bitsandbytes", "pip install -e '.[quantize]'"),
        (["train.sharding=deepspeed", "train.processes=2"], "DeepSpeed", "pip install -e '.[deepspeed]'"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    root: Path, settings: list[str], package: str, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merit.train.requirements.find_spec", lambda _: None)
    with pytest.raises(ResourceError, match=f"needs {package}, which is not installed") as caught:
        cases.train(root, *settings)
    assert way_out in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "key"),
    [(["model.dtype=float16"], "model.dtype"), (["model.trainable=lora", "model.quantize=4bit"], "model.quantize")],
)
def test_what_deepspeed_cannot_train_is_refused(
    root: Path, settings: list[str], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merit.train.requirements.find_spec", lambda _: True)
    with pytest.raises(RecipeError, match=f"deepspeed cannot be combined with {key}"):
        cases.train(root, "train.sharding=deepspeed", "train.processes=2", *settings)


def test_another_number_of_processes_than_the_recipes_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match=r"train\.processes is 2, but this is one of 1"):
        cases.train(root, "train.processes=2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ResourceError, match=r"train\.processes is 1, but this is one of 2"):
        cases.train(root)
