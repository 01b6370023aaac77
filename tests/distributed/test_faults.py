"""If a rank fails, every rank ends soon, and its one message names that rank and the cause."""

import time

import pytest

from tests.distributed import faults
from tests.distributed.pool import Pool


@pytest.mark.parametrize(
    "how, which, cause",
    [
        ("raises", 1, "rank 1: ValueError: boom"),
        ("is killed", 2, "rank 2: no heartbeat for"),
        ("is killed", 0, "rank 0: "),  # rank 0 also hosts the rendezvous
        ("hangs", 3, "rank 3: timeout: 4 s after exchange 11 ('test')"),
        ("hangs, seen by itself", 3, "rank 3: timeout: 4 s after exchange 11 ('test')"),
    ],
)
def test_every_rank_ends_and_names_the_failed_rank(tmp_path, how, which, cause):
    pool = Pool(4, timeout_seconds=60)
    started = time.monotonic()
    outcomes = pool.try_run(faults.fail, how, which, tmp_path)
    assert time.monotonic() - started < 20  # the exchanges' own timeout is a minute
    pool.close()
    for rank, (outcome, result) in enumerate(outcomes):
        if rank == which and how == "is killed":
            assert (outcome, result) == ("died", -9)
            continue
        if outcome == "died":
            assert result == 1
            result = (tmp_path / f"{rank}.txt").read_text()
        if rank == which and how == "raises":
            assert result == "ValueError: boom"
            continue
        assert result.count("error: ") == 1 and cause in result, result
        assert f"rank {rank} stops because rank {which} of 4 failed" in result


def test_ranks_that_finish_are_not_reported_as_failed(tmp_path):
    pool = Pool(2, timeout_seconds=60)
    assert [o[1] for o in pool.try_run(faults.fail, "never", 9, tmp_path)] == ["none"] * 2
    pool.close()
