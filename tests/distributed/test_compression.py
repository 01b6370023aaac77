"""Several processes compress to the bytes of one, and resume each other's work."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.compression import BATCH_TOKENS, compress
from tests.distributed.pool import Pool

SEQUENCES, LENGTH = 10, 96


@pytest.fixture(scope="module")
def given(small_arguments, untrained_base) -> tuple[list[str], str]:
    return [*small_arguments, f"calibration.sequence_len={LENGTH}"], str(untrained_base)


@pytest.fixture(scope="module")
def tokens() -> list[list[int]]:
    assert -(-SEQUENCES // (BATCH_TOKENS // LENGTH)) == 5, "batches: two and three"
    return [[(7 * n + 31 * k) % 1900 for k in range(LENGTH)] for n in range(SEQUENCES)]


@pytest.fixture(scope="module")
def alone() -> Iterator[Pool]:
    pool = Pool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def clean(given, tokens, alone, tmp_path_factory) -> dict[str, bytes]:
    """The files that one process writes."""
    folder = tmp_path_factory.mktemp("one")
    assert alone.run(compress, *given, str(folder), tokens, 4) == [4]
    found = files(folder)
    assert len(found) == 8
    return found


def files(folder: Path) -> dict[str, bytes]:
    parts = [folder / "02_compress" / name for name in ("model.partial", "masters")]
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes() for p in parts for path in p.iterdir()
    }


def test_two_processes_write_the_bytes_of_one(pools, given, tokens, clean, tmp_path):
    assert pools[2].run(compress, *given, str(tmp_path), tokens, 4) == [4, 4]
    assert files(tmp_path) == clean


def test_one_process_resumes_what_two_began(pools, alone, given, tokens, clean, tmp_path):
    assert pools[2].run(compress, *given, str(tmp_path), tokens, 2) == [2, 2]
    assert len(files(tmp_path)) == 4
    assert alone.run(compress, *given, str(tmp_path), tokens, 3) == [3]
    assert pools[2].run(compress, *given, str(tmp_path), tokens, 4) == [4, 4]
    assert files(tmp_path) == clean


def test_a_process_that_is_lost_ends_the_other_and_its_work_is_resumed(
    alone, given, tokens, clean, tmp_path
):
    """Layer 2 was being written when layer 3's Hessians waited for the lost process."""
    pool = Pool(2, timeout_seconds=20)
    try:
        first, second = pool.try_run(compress, *given, str(tmp_path), tokens, 4, 3)
    finally:
        pool.close()
    assert second == ("died", 1)
    assert first[0] == "raised" and "Hessians" in first[1]
    assert alone.run(compress, *given, str(tmp_path), tokens, 4) == [4]
    assert files(tmp_path) == clean


def test_two_processes_keep_the_experts_that_one_keeps(pools, alone, given, tokens, tmp_path):
    arguments, base = given
    plain = ["shared_dense.weight_bits=16", "shared_dense.sparsity=none", "experts.keep=5"]
    found = []
    for pool, size in ((alone, 1), (pools[2], 2)):
        folder = tmp_path / str(size)
        assert pool.run(compress, [*arguments, *plain], base, str(folder), tokens, 4) == [4] * size
        found.append(files(folder))
    assert len(found[0]) == 4 and found[0] == found[1]
