"""The outer step against its formula in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.builders import make_base, weights

from merit.merge.outer import outer_step
from merit.recipe.schema import OuterSettings


def reference(points: list[dict[str, np.ndarray]], start: dict[str, np.ndarray], settings: OuterSettings) -> list:
    """torch's SGD on the outer gradients, in float64: every round's next start."""
    parameters = {name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)) for name, value in start.items()}
    optimizer = torch.optim.SGD(
        parameters.values(),
        lr=settings.scale,
        momentum=settings.momentum,
        nesterov=settings.nesterov and settings.momentum > 0,
    )
    found = []
    for merged in points:
        for name, parameter in parameters.items():
            parameter.grad = parameter.detach() - torch.tensor(merged[name], dtype=torch.float64)
        optimizer.step()
        found.append({name: parameter.detach().numpy().copy() for name, parameter in parameters.items()})
    return found


@pytest.mark.parametrize(
    "settings",
    [
        OuterSettings(scale=0.7),
        OuterSettings(scale=0.7, momentum=0.9),
        OuterSettings(scale=1.0, momentum=0.5, nesterov=False),
    ],
)
def test_the_outer_step_is_torchs_sgd(tmp_path: Path, settings: OuterSettings) -> None:
    start = make_base(tmp_path / "start", seed=0)
    merges = [make_base(tmp_path / f"merged{i}", seed=i) for i in (1, 2, 3)]
    expected = reference([weights(folder) for folder in merges], weights(start), settings)
    velocity = None
    for number, merged in enumerate(merges):
        folder = tmp_path / f"round{number}"
        folder.mkdir()
        outer_step(start, merged, velocity, folder, settings)
        start, velocity = folder / "model", folder / "momentum"
        for name, value in weights(start).items():
            assert value.dtype == np.float32
            np.testing.assert_allclose(value, expected[number][name], atol=2e-6)
    assert (start / "config.json").is_file()


def test_scale_one_without_momentum_is_the_merge() -> None:
    assert OuterSettings().is_merge
    assert not OuterSettings(momentum=0.1).is_merge
