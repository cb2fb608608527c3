"""A tiny base for the training tests."""

from pathlib import Path

import pytest
from tests.train import cases


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def root(base: Path, tmp_path: Path) -> Path:
    """A folder with ``base``; training writes ``branch`` next to it."""
    (tmp_path / "base").symlink_to(base)
    return tmp_path
