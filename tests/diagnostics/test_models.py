"""Real models: products against a full Hessian, a known barrier, adapters and images through the same code."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests import builders
from tests.builders import encoded
from tests.diagnostics.labs import open_lab
from tests.hf.vision_cases import picture_chats

from merit.conflict.stage import measure_gradients
from merit.diagnostics import connectivity, curvature, displacement, gain, gap, perturbation
from merit.diagnostics.hessian import Hessian
from merit.diagnostics.lab import Lab
from merit.diagnostics.registry import DIAGNOSTICS
from merit.hf.base import Base, open_base
from merit.hf.models import load_model
from merit.mixture import EncodedDataset
from merit.mixture.encode import ChatEncoder
from merit.recipe.schema import ConflictSettings, ModelSettings

CPU = torch.device("cpu")
ROWS = {name: encoded(name, 6, seed=seed, high=20) for seed, name in enumerate(("a", "b"))}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 20 tokens and one layer: a few hundred weights."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    return builders.make_base(folder, hidden=4, vocab_size=20, num_hidden_layers=1, initializer_range=0.5)


def mean_loss(model, rows: dict[str, EncodedDataset]) -> torch.Tensor:
    """Loss per target token, one row at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in (row for dataset in rows.values() for row in dataset):
        logits = model(torch.tensor(row.input_ids[None].astype(np.int64))).logits[0]
        places = torch.tensor(np.flatnonzero(row.targets))
        targets = torch.tensor(row.input_ids.astype(np.int64))[places]
        total = total + torch.nn.functional.cross_entropy(logits[places - 1], targets, reduction="sum")
        count += len(places)
    return total / count


def test_products_are_those_of_the_full_hessian(tiny: Path) -> None:
    rows = {name: dataset.take(range(2)) for name, dataset in ROWS.items()}
    lab = open_lab(tiny, {}, rows)
    hessian = Hessian(lab, lab.hessian_rows, method="exact")
    model = load_model(lab.subject.base, CPU).double()
    model.set_attn_implementation("eager")
    parameters = [p.requires_grad_(True) for p in model.parameters()]
    first = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(mean_loss(model, rows), parameters, create_graph=True)]
    )
    blocks = torch.autograd.grad(first, parameters, torch.eye(len(first), dtype=torch.float64), is_grads_batched=True)
    full = torch.cat([block.reshape(len(first), -1) for block in blocks], dim=1).numpy()
    assert hessian.size == len(full)
    assert hessian.gradient() == pytest.approx(first.detach().numpy(), rel=1e-3, abs=1e-5)
    vectors = np.random.default_rng(0).standard_normal((3, len(full))).astype(np.float32)
    scale = float(np.abs(full @ vectors[0]).max())
    for vector in vectors:
        assert hessian.product(vector) == pytest.approx(full @ vector, rel=1e-3, abs=1e-4 * scale)
    differences = Hessian(lab, lab.hessian_rows, method="difference")
    assert differences.product(vectors[0]) == pytest.approx(full @ vectors[0], rel=0.02, abs=5e-3 * scale)
    lab.settings = lab.settings.model_copy(update={"lanczos_steps": 40})
    found = curvature.measure(lab)
    exact = np.linalg.eigvalsh(full)
    assert found.leading[:2] == pytest.approx(exact[::-1][:2], rel=1e-2)
    assert found.smallest == pytest.approx(exact[0], rel=2e-2)
    assert found.method == "exact"
    before = load_model(lab.subject.base, CPU).state_dict()
    assert all(torch.equal(t, before[name]) for name, t in lab.model.state_dict().items())


def test_the_barrier_between_two_permuted_nets_is_found(tmp_path: Path) -> None:
    """The same function with its hidden units in another order: equal losses, and a hill between them."""
    base = builders.make_base(tmp_path / "base", vocab_size=20, num_hidden_layers=1, hidden=24)
    lab = open_lab(base, {}, ROWS)
    model = load_model(lab.subject.base, CPU)
    for p in model.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        mean_loss(model, ROWS).backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "one")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p.copy_(p[order])
            elif p.dim() == 2:
                p.copy_(p[:, order])
            else:
                p.copy_(p[order])
    model.save_pretrained(tmp_path / "two")
    lab = open_lab(base, {"one": tmp_path / "one", "two": tmp_path / "two"}, ROWS)
    found = connectivity.measure(lab)
    path = next(path for path in found.paths if (path.start, path.end) == ("one", "two"))
    assert path.losses[0] == pytest.approx(path.losses[-1], rel=1e-4)
    assert path.relative > 0.3
    assert path.barrier_ci95[0] > 0
    assert found.verdict == "not ready"


def noisy_copy(base: Path, folder: Path, seed: int) -> Path:
    """The base with small noise on its language weights."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    state = load_file(base / "model.safetensors")
    moved = {
        name: t if "visual" in name or "vision" in name else t + 0.02 * torch.randn(t.shape, generator=generator)
        for name, t in state.items()
    }
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def all_finite(lab: Lab) -> None:
    """Every diagnostic that needs no gradients of datasets."""
    found = [module.measure(lab) for module in (connectivity, displacement, gap, perturbation, curvature, gain)]
    assert all(result.reason for result in found)
    assert found[1].identity_error < 1e-10  # type: ignore[attr-defined]
    assert np.isfinite(found[5].predicted)  # type: ignore[attr-defined]


def test_adapters_pass_through_the_same_code(tmp_path: Path, tiny: Path) -> None:
    lab = open_lab(tiny, {}, ROWS, model={"trainable": "lora"})
    branches = {}
    for k in range(2):
        adapted = get_peft_model(
            load_model(lab.subject.base, CPU), LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
        )
        torch.manual_seed(k)
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
        adapted.save_pretrained(tmp_path / str(k))
        branches[f"branch-{k}"] = tmp_path / str(k)
    lab = open_lab(tiny, branches, ROWS, ROWS, model={"trainable": "lora"})
    all_finite(lab)
    found = displacement.measure(lab)
    moved = {layer.layer: layer.norms[0] for layer in found.layers}
    assert moved["layer 0"] > 0
    assert moved["embed_tokens"] == 0


def test_vision_language_models_with_pictures_pass_through_the_same_code(tmp_path: Path) -> None:
    base = builders.make_vision_base("qwen2_5_vl", tmp_path / "base")
    branches = {f"branch-{k}": noisy_copy(base, tmp_path / str(k), k) for k in range(2)}
    opened = open_base(ModelSettings(base=str(base), dtype="float32"))
    assert opened.images is not None
    encoder = ChatEncoder(opened.tokenizer, 512, opened.images)
    rows = {
        name: EncodedDataset(name, encoder.encode(picture_chats(tmp_path / name, 4, seed)), opened.images.settings)  # type: ignore[arg-type]
        for seed, name in enumerate("abcd")
    }
    settings, groups = ConflictSettings(examples=4, sketch_size=1024), [("a", "b"), ("c", "d")]
    lab = open_lab(
        base,
        branches,
        rows,
        rows,
        groups=groups,
        geometry=lambda: measure_gradients(rows, opened, settings, device=CPU),
    )
    few = {"lanczos_steps": 3, "points": 3, "noise_seeds": 2, "sigmas": [0.05], "examples": 2, "hessian_examples": 4}
    lab.settings = lab.settings.model_copy(update=few)
    assert not any("visual" in name for name in lab.place.tensors)
    pixels = [name for _, batch in lab.train.batches() for name in batch if "pixel" in name]
    assert pixels
    found = {name: entry.measure(lab) for name, entry in DIAGNOSTICS.items()}
    assert all(np.isfinite(number) for result in found.values() for number in numbers(result.facts()))
    line = found["gap"].lines[0]  # type: ignore[attr-defined]
    assert line.test == pytest.approx(pictured_loss(lab, opened), rel=1e-4)


def pictured_loss(lab: Lab, base: Base) -> float:
    """The base's loss by the library's own class, one row with its own pixels at a time."""
    model, total, count = load_model(base, CPU), 0.0, 0
    for row in lab.test.rows:
        batch = base.batcher([row])
        with torch.no_grad():
            loss = model(**batch).loss
        targets = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + float(loss) * targets, count + targets
    return total / count


def numbers(facts: object) -> Iterator[float]:
    """Every float in JSON values."""
    if isinstance(facts, dict | list | tuple):
        for item in facts.values() if isinstance(facts, dict) else facts:
            yield from numbers(item)
    elif isinstance(facts, float):
        yield facts
