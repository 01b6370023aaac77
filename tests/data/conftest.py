"""A byte-level tokenizer with gpt-oss's control tokens, trained in a second."""

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="session")
def harmony_tokenizer():
    from sparselong.tiny.tokenizer import train_tokenizer

    names = "assistant analysis commentary final to=functions.get_weather json code " * 20
    return train_tokenizer([names, (ROOT / "README.md").read_text("utf-8")], 1000, 4096)
