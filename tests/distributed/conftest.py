"""Shares one pool of two and one of four processes between all tests."""

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Pool]]:
    """Yield the pools by number of processes."""
    made = {size: Pool(size) for size in (2, 4)}
    yield made
    for pool in made.values():
        pool.close()
