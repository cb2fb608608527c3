"""What every test of evaluation may ask for."""

import pytest
from evaluation_cases import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()
