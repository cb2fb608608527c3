"""The example of docs/python-api.md runs, and gives what it announces."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tests.builders import weights

import merit
from examples import python_api

DOCS = Path(__file__).parents[2] / "docs" / "python-api.md"


@pytest.mark.exhaustive  # the notebook does the same in every run of the tests
def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = python_api.main(tmp_path)
    assert isinstance(result, merit.Evaluation)
    assert "group 1:" in capsys.readouterr().out
    figures = result.sets["mixture"]
    mean = {model: np.mean([item.loss for item in datasets.values()]) for model, datasets in figures.items()}
    assert mean["merged"] < mean["base"]
    base, merged = weights(tmp_path / "demo" / "base"), weights(tmp_path / "merged")
    assert base.keys() == merged.keys()
    assert any(not np.array_equal(base[name], merged[name]) for name in base)


def test_the_page_names_every_public_name_and_no_other() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert set(re.findall(r"merit\.([A-Za-z_]+)\(", text)) <= set(merit.__all__)
    assert set(merit.__all__) <= set(re.findall(r"`(?:merit\.)?([A-Za-z_]+)[`(]", text))
