"""Settings of an answer: texts and numbers are read, everything out of range is refused."""

import pytest

from sparselong.chat.settings import Settings
from sparselong.errors import ConfigError


def test_texts_and_numbers_are_read():
    values = {"temperature": "0.5", "top_p": 1, "top_k": "3", "seed": "7", "max_new_tokens": 9.0}
    found = Settings().changed(values)
    assert found == Settings(9, 0.5, 1.0, 3, 7, "medium")
    assert found.changed({"seed": "none", "reasoning": "high"}) == Settings(
        9, 0.5, 1.0, 3, None, "high"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("temperature", value) for value in (-1, "nan", "inf", "x", 101, None, True)],
        *[("top_p", value) for value in (0, 1.1, "nan")],
        *[("top_k", value) for value in (-1, 1.5, "x")],
        *[("max_new_tokens", value) for value in (0, "1.5", 1e400)],
        *[("seed", value) for value in (-1, 1 << 63, "x")],
        *[("reasoning", value) for value in ("", "HIGH", 3)],
        ("unknown", 1),
    ],
)
def test_values_out_of_range_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        Settings().changed({key: value})


def test_a_seed_is_drawn_once_and_then_kept():
    seeded = Settings().seeded()
    assert seeded.seed is not None and seeded.seeded() == seeded
    assert Settings(seed=0).seeded().seed == 0
    assert len({Settings().seeded().seed for _ in range(8)}) > 1
