"""A line's losses against models that are interpolated by hand: full checkpoints and adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests import builders

from merit.evaluation.figures import Part
from merit.evaluation.forward import Forward
from merit.evaluation.measure import HeldOut
from merit.hf.base import Base, open_base
from merit.hf.models import load_model, save_branch
from merit.mixture import EncodedDataset
from merit.recipe.schema import EvaluateSettings, ModelSettings
from merit.study.line import measure_line, rows_by_part

CPU = torch.device("cpu")
SETTINGS = EvaluateSettings(max_examples=5)


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    made = {name: builders.encoded(name, 7, seed=seed) for seed, name in enumerate(("a", "b", "k"))}
    return HeldOut({"a": made["a"], "b": made["b"]}, {"k": made["k"]})


def by_hand(model: torch.nn.Module, datasets: dict[str, EncodedDataset], rows: dict[str, list[int]]) -> float:
    """Macro loss, row by row."""
    means = []
    for name, numbers in rows.items():
        total, count = 0.0, 0
        for number in numbers:
            row = datasets[name][number]
            ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            wanted = torch.from_numpy(row.targets[1:].copy())
            total -= float(scores[torch.arange(len(scores)), ids[0, 1:]][wanted].sum())
            count += int(wanted.sum())
        means.append(total / count)
    return float(np.mean(means))


def losses(base: Base, model: torch.nn.Module, held_out: HeldOut) -> dict[Part, float]:
    rows = rows_by_part(held_out, SETTINGS, 3)
    found: dict[Part, float] = {}
    for part, datasets in rows.items():
        whole = dict(held_out.of(part))
        numbers = {
            name: [
                i
                for i in range(len(whole[name]))
                if any(np.array_equal(whole[name][i].input_ids, r.input_ids) for r in drawn)
            ]
            for name, drawn in datasets.items()
        }
        assert all(len(found) >= 5 for found in numbers.values())
        found[part] = by_hand(model, whole, {name: chosen[:5] for name, chosen in numbers.items()})
    return found


def moved(base: Base, folder: Path) -> Path:
    torch.manual_seed(1)
    model = load_model(base, CPU, trainable=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_branch(model, folder, base, save_dtype="base")
    return folder


def line(base: Base, folder: Path, held_out: HeldOut) -> dict[float, dict[Part, float]]:
    found = measure_line(base, folder, rows_by_part(held_out, SETTINGS, 3), [0.5, 1.5], Forward(base.batcher, CPU))
    assert [point.scale for point in found.points] == [0.0, 0.5, 1.0, 1.5]
    return {point.scale: point.losses for point in found.points}


def test_points_are_interpolated_models(base: Path, held_out: HeldOut, tmp_path: Path) -> None:
    opened = open_base(ModelSettings(base=str(base), dtype="float32"))
    folder = moved(opened, tmp_path / "model")
    found = line(opened, folder, held_out)
    start, end = load_model(opened, CPU), load_model(opened, CPU, folder)
    for scale, measured in found.items():
        between = load_model(opened, CPU)
        with torch.no_grad():
            pairs = zip(between.parameters(), start.parameters(), end.parameters(), strict=True)
            for parameter, zero, one in pairs:
                parameter.copy_(zero + scale * (one - zero))
        assert measured == pytest.approx(losses(opened, between, held_out), rel=1e-4)
    squares = sum(
        float((a - b).double().square().sum()) for a, b in zip(start.parameters(), end.parameters(), strict=True)
    )
    whole = measure_line(opened, folder, {}, [], Forward(opened.batcher, CPU))
    assert whole.displacement == pytest.approx(squares**0.5, rel=1e-6)


def test_an_adapters_line_scales_its_update(base: Path, held_out: HeldOut, tmp_path: Path) -> None:
    settings = ModelSettings(base=str(base), dtype="float32", trainable="lora")
    opened = open_base(settings)
    folder = moved(opened, tmp_path / "adapter")
    assert (folder / "adapter_config.json").is_file()
    found = line(opened, folder, held_out)
    assert found[0.0] == pytest.approx(losses(opened, load_model(opened, CPU), held_out), rel=1e-4)
    assert found[1.0] == pytest.approx(losses(opened, load_model(opened, CPU, folder), held_out), rel=1e-4)
    folded = load_model(opened, CPU, folder).merge_and_unload()  # type: ignore[operator]
    start = load_model(opened, CPU)
    with torch.no_grad():
        for parameter, zero in zip(folded.parameters(), start.parameters(), strict=True):
            parameter.copy_((parameter + zero) / 2)
    assert found[0.5] == pytest.approx(losses(opened, folded, held_out), rel=1e-4)
