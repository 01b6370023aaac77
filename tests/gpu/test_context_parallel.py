"""A sequence over two and four GPUs, through NCCL, trains as on one (two GPUs or more).

The cases are those of the gloo tests, on the Triton kernels. In fp32 they must agree as there. In
bf16 (autocast) shards may differ from one GPU by twice of what bf16 itself does to one GPU.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.distributed import faults
from tests.distributed.pool import Pool
from tests.distributed.test_parity import CASES, differences, far, five_steps, packed
from tests.distributed.training import Result, Run, peak_bytes, train_alone, train_sharded

SIZES = [size for size in (2, 4) if size <= torch.cuda.device_count()]
BF16_CASES = (
    "one long document",
    "many short documents",
    "two rows",
    "checkpointed, attention kept",
)


@pytest.fixture(scope="module")
def gpus() -> Iterator[dict[int, Pool]]:
    made = {size: Pool(size, 60.0, "nccl") for size in SIZES}
    yield made
    for pool in made.values():
        pool.close()


def on_gpu(run: Run, dtype: torch.dtype = torch.float32) -> Run:
    return replace(run, device="cuda", dtype=dtype)


@pytest.mark.parametrize("case", CASES)
def test_in_fp32_losses_and_gradients_are_those_of_one_gpu(gpus, case):
    run = on_gpu(CASES[case])
    expected = train_alone(run)
    for size, pool in gpus.items():
        for result in pool.run(train_sharded, run, size):
            assert differences(result, expected) == {}


@pytest.mark.parametrize("case", BF16_CASES)
def test_in_bf16_shards_err_no_more_than_bf16_does(gpus, case):
    exact = train_alone(on_gpu(CASES[case]))
    run = on_gpu(CASES[case], torch.bfloat16)
    error = distance(train_alone(run), exact)
    for size, pool in gpus.items():
        for result in pool.run(train_sharded, run, size):
            assert distance(result, exact) <= 2 * error


def distance(got: Result, expected: Result) -> float:
    """Of all gradients together."""
    names = sorted(expected.gradients)
    ours, theirs = (
        torch.cat([result.gradients[name].flatten() for name in names])
        for result in (got, expected)
    )
    return far(ours, theirs)


@pytest.mark.parametrize("degree", [1, *SIZES])
def test_five_steps_end_in_the_same_weights(gpus, degree):
    size = max(gpus)
    run = on_gpu(five_steps(4, size // degree))
    expected = train_alone(run)
    results = gpus[size].run(train_sharded, run, degree)
    for result in results:
        assert differences(result, expected) == {}
        for name, weight in result.weights.items():
            assert torch.equal(weight, results[0].weights[name]), name


def test_no_gpu_holds_anything_of_sequence_squared(gpus):
    tokens = 65_536
    run = on_gpu(Run([[[packed(tokens)]]], keep=True))
    for size, pool in gpus.items():
        assert max(pool.run(peak_bytes, run, size)) < tokens**2 // 4  # a quarter of it, as bool


@pytest.mark.parametrize(
    "how, cause",
    [
        ("is killed", "rank 1: has not been heard of for"),
        ("hangs", "rank 1: time-out: 4 s after exchange 11 ('test')"),
    ],
)
def test_the_rank_that_others_wait_for_is_named_before_nccl_gives_up(tmp_path, how, cause):
    pool = Pool(2, 60.0, "nccl")
    outcome, result = pool.try_run(faults.fail, how, 1, tmp_path)[0]
    pool.close()
    message = (tmp_path / "0.txt").read_text() if outcome == "died" else result
    assert message.count("error: ") == 1 and cause in message, message
