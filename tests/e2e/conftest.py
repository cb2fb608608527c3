"""Names of :mod:`tests.builders` and fixtures of the tests' root, where tests here still look for them."""

from tests.builders import TASKS, Case, Result, make_base, make_case, task_rows, write_rows  # noqa: F401
from tests.conftest import merit  # noqa: F401
