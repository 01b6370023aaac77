"""The base of tests that train again and again."""

from pathlib import Path

import pytest

from sparselong.tiny.build import TinySpec, build_tiny


@pytest.fixture(scope="session")
def small_base(tmp_path_factory) -> Path:
    """A random gpt-oss of two layers, one of each kind of attention, in the upstream format."""
    spec = TinySpec(steps=0, layers=2, hidden=64, intermediate=64, experts=4)
    return build_tiny(tmp_path_factory.mktemp("small") / "base", spec, seed=1)
