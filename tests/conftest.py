"""One thread per test process, set before torch is imported: two under contention are far slower, and bits depend on it."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

settings.register_profile(
    "fresh", deadline=None
)  # no test may fail by the clock; new examples each time (make test-all)
settings.register_profile("same", deadline=None, derandomize=True)  # the same examples each time
settings.load_profile("same")

from tests import builders  # noqa: E402  (after the environment is set)
from tests.builders import Case, Result  # noqa: E402


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's folder."""
    return builders.make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def case(tmp_path: Path, base: Path) -> Case:
    """A recipe with six small datasets, in a folder of its own."""
    return builders.make_case(tmp_path, base)


@pytest.fixture(scope="session")
def merit() -> Callable[..., Result]:
    """The command line, called in this process."""
    return builders.call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Case:
    """One whole run with both usual baselines; read-only for the tests that share it."""
    made = builders.make_case(tmp_path_factory.mktemp("finished"), base, baselines=["joint", "random"])
    result = builders.call("run", made.recipe, "--output", made.run, "--quiet")
    assert result.code == 0, result.err
    return made


def pytest_collection_finish() -> None:
    """What the imports left is never searched for garbage again: a full collection takes 0.02 s instead of half a second."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs are slow: `make check` leaves out what shares one, and everything in these files."""
    whole = {"test_kill.py", "test_preparation.py", "test_run.py", "test_vision_demo.py", "test_vision_run.py"}
    for item in items:
        if "finished" in getattr(item, "fixturenames", ()) or (item.path.parent.name, item.path.name in whole) == (
            "e2e",
            True,
        ):
            item.add_marker(pytest.mark.slow)
