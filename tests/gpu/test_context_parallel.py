"""Training a sequence over two and four GPUs through NCCL matches one GPU (needs two GPUs).

The cases are those of the gloo tests, on the Triton kernels. In fp32 they must agree as closely.

In bf16 both differ from fp32. For the whole model under autocast, the shards' error may be at most
1.4 times that of one GPU, over six batches and for each kind of parameter. Every token goes to all
experts there. With two of four experts, rounding occasionally routes a token differently in the
shards or on one GPU, which changes its gradients several times more than all other rounding.

For attention alone a single rounding is visible. Key gradients are rounded three times (by the
kernel, for sending, and after the sum) instead of once, so their error grows by the root of three.
Everything else is rounded as often as on one GPU. cuDNN, however, attends separately to the keys
before a shard's queries and to its own: outputs are rounded twice, query gradients three times.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparselong.kernels.attention.installed import refuse_flash_attn_4
from tests.distributed import cases, faults
from tests.distributed.pool import Pool
from tests.distributed.test_parity import CASES, differences, far, five_steps, packed, two_rows
from tests.distributed.training import Result, Run, peak_bytes, train_alone, train_sharded

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
SIZES = [size for size in (2, 4) if size <= torch.cuda.device_count()]
SEEDS = 6
BF16_CASES: dict[str, Callable[[int], Run]] = {
    "one long document": lambda seed: Run([[[packed(64, seed=seed)]]]),
    "many short documents": lambda seed: Run([[[packed(5, 9, 3, 20, 1, 2, 11, 6, 7, seed=seed)]]]),
    "two rows": lambda seed: Run([[[two_rows(2 * seed)]]]),
    "checkpointed, attention kept": lambda seed: Run([[[packed(30, 34, seed=seed)]]], keep=True),
}
MODEL_LIMIT = 1.4
ATTENTION = [
    ("triton", None, (0, 256), 1),
    ("triton", None, (0, 102, 153, 256), 2),
    ("triton", 20, (0, 256), 1),
    ("torch_cudnn", None, (0, 1024), 1),
    ("flash_attn_4", None, (0, 1024), 1),
    ("flash_attn_4", None, (0, 102, 153, 256), 2),
    ("flash_attn_4", 20, (0, 256), 1),
]
ATTENTION_LIMITS = {
    "triton": {"out": 1.2, "dq": 1.2, "dk": 3**0.5, "dv": 3**0.5, "dsinks": 1.5},
    "flash_attn_4": {"out": 1.2, "dq": 1.2, "dk": 3**0.5, "dv": 3**0.5, "dsinks": 1.5},
    "torch_cudnn": {"out": 1.5, "dq": 3**0.5, "dk": 3**0.5, "dv": 3**0.5, "dsinks": 2.0},
}
SUMS_ERROR = 1e-6  # of fp32 sums, such as dsinks if out is not rounded


@pytest.fixture(scope="module")
def gpus() -> Iterator[dict[int, Pool]]:
    made = {size: Pool(size, 60.0, "nccl") for size in SIZES}
    yield made
    for pool in made.values():
        pool.close()


def on_gpu(run: Run) -> Run:
    return replace(run, device="cuda")


@pytest.mark.parametrize("case", CASES)
def test_fp32_losses_and_gradients_match_one_gpu(gpus, case):
    run = on_gpu(CASES[case])
    expected = train_alone(run)
    for size, pool in gpus.items():
        for result in pool.run(train_sharded, run, size):
            assert differences(result, expected) == {}


@pytest.mark.parametrize("case", BF16_CASES)
def test_bf16_errors_of_shards_stay_within_those_of_one_gpu(gpus, case):
    alone, shards = [], {size: [] for size in gpus}
    for seed in range(SEEDS):
        run = on_gpu(replace(BF16_CASES[case](seed), experts_per_token=4))
        exact = train_alone(run)
        run = replace(run, dtype=torch.bfloat16)
        alone.append(errors(train_alone(run), exact))
        for size, pool in gpus.items():
            results = pool.run(train_sharded, run, size)
            shards[size].append([errors(result, exact) for result in results])
    expected = {kind: MODEL_LIMIT * value for kind, value in over_seeds(alone).items()}
    for size, found in shards.items():
        for rank, errors_of_rank in enumerate(zip(*found, strict=True)):
            over = over_seeds(list(errors_of_rank))
            too_far = {k: (v, expected[k]) for k, v in over.items() if v > expected[k]}
            assert too_far == {}, f"rank {rank} of {size}"


def errors(got: Result, exact: Result) -> dict[str, float]:
    """Return the distance of the gradients over all layers, by kind of parameter."""
    names: dict[str, list[str]] = {}
    for name in exact.gradients:
        names.setdefault(name.split("self_attn.")[1], []).append(name)
    ours, theirs = (
        {kind: torch.cat([each.gradients[n].flatten() for n in names[kind]]) for kind in names}
        for each in (got, exact)
    )
    return {kind: far(ours[kind], theirs[kind]) for kind in names}


def over_seeds(found: list[dict[str, float]]) -> dict[str, float]:
    """Return the root mean square over seeds."""
    return {
        kind: sum(each[kind] ** 2 for each in found) ** 0.5 / len(found) ** 0.5 for kind in found[0]
    }


@pytest.mark.parametrize("backend, window, boundaries, stride", ATTENTION)
def test_bf16_key_gradients_are_rounded_at_most_three_times(
    gpus, backend, window, boundaries, stride
):
    if backend == "flash_attn_4" and (refusal := refuse_flash_attn_4()) is not None:
        pytest.skip(refusal)
    arguments = (backend, window, boundaries, stride, "cuda")
    for pool in gpus.values():
        assert find_excess(pool, ATTENTION_LIMITS[backend], cases.rounding_errors, *arguments) == {}


def find_excess(
    pool: Pool, limits: dict[str, float], function: Callable, *arguments: Any
) -> dict[tuple[int, str], float]:
    """Return the errors in shards that are more than `limits` times those of one process.

    Args:
        pool: the processes.
        limits: of out, dq, dk, dv and dsinks.
        function: returns each rank's errors in shards and in one process, as in `cases`.
        arguments: its arguments, but for the seed.

    Returns:
        The ratios that are too large, by rank and name.
    """
    found = [pool.run(function, *arguments, seed) for seed in range(SEEDS)]
    excess = {}
    for rank in range(pool.size):
        shards, alone = (
            over_seeds([dict(zip(limits, each[rank][n], strict=True)) for each in found])
            for n in range(2)
        )
        ratios = {name: shards[name] / max(alone[name], SUMS_ERROR) for name in alone}
        excess |= {(rank, name): r for name, r in ratios.items() if not r <= limits[name]}
    return excess


@pytest.mark.parametrize("degree", [1, *SIZES])
def test_five_steps_give_the_same_weights(gpus, degree):
    size = max(gpus)
    run = on_gpu(five_steps(4, size // degree))
    expected = train_alone(run)
    results = gpus[size].run(train_sharded, run, degree)
    for result in results:
        assert differences(result, expected) == {}
        for name, weight in result.weights.items():
            assert torch.equal(weight, results[0].weights[name]), name


def test_no_gpu_holds_a_tensor_of_sequence_squared(gpus):
    tokens = 65_536
    run = on_gpu(Run([[[packed(tokens)]]], keep=True))
    for size, pool in gpus.items():
        assert max(pool.run(peak_bytes, run, size)) < tokens**2 // 4  # a quarter of it, as bool


@pytest.mark.parametrize(
    "how, cause",
    [
        ("is killed", "rank 1: no heartbeat for"),
        ("hangs", "rank 1: timeout: 4 s after exchange 11 ('test')"),
    ],
)
def test_a_failed_rank_is_named_before_nccl_times_out(tmp_path, how, cause):
    pool = Pool(2, 60.0, "nccl")
    outcome, result = pool.try_run(faults.fail, how, 1, tmp_path)[0]
    pool.close()
    message = (tmp_path / "0.txt").read_text() if outcome == "died" else result
    assert message.count("error: ") == 1 and cause in message, message
