"""The flash-attn package itself on a GPU, and ring-flash-attn on it; elsewhere stand-ins serve.

The bounds are those of test_attention.py: at most twice the error of torch's own FlashAttention-2
against fp64. In shards they are those of test_context_parallel.py. Two processes run there: each on
its own GPU and connected by NCCL if there are two, else both on one GPU and connected by gloo,
because NCCL refuses two ranks on one device. That shows the same sums, but no overlap and no speed.

Only bf16 and head_dim 64 are used, so a flash-attn built for these alone suffices.
"""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.ring_flash_attn_arm import refuse_ring
from sparselong.kernels.attention import flash_attn
from sparselong.kernels.attention.installed import refuse_flash_attn
from sparselong.runtime import using
from tests.distributed import cases
from tests.distributed.pool import Pool
from tests.gpu.test_attention import CASES, NAMES, Case, check, draw, pack, run, run_exactly
from tests.gpu.test_context_parallel import ATTENTION_LIMITS, find_excess
from tests.poisoned import PoisonedTorch

pytestmark = pytest.mark.skipif(
    refuse_flash_attn() is not None, reason=refuse_flash_attn() or "flash_attn is installed"
)
NO_RING = refuse_ring()
LIMITS = ATTENTION_LIMITS["triton"]  # likewise rounds out once, and key gradients three times
SHARDS = [
    (None, (0, 256), 1),
    (None, (0, 102, 153, 256), 2),
    (None, (0, 128, 256), 1),
    (20, (0, 256), 1),
    (20, (0, 102, 153, 256), 1),
    (150, (0, 256), 2),
]


@pytest.fixture
def poison(monkeypatch):
    """Make gradients begin as NaN, also those that the package allocates itself."""
    monkeypatch.setattr(flash_attn, "torch", PoisonedTorch())
    torch.cuda.empty_cache()
    freed = [torch.full((n,), float("nan"), device="cuda") for n in (1 << 17, 1 << 20, 1 << 25)]
    torch.cuda.synchronize()
    freed.clear()  # the allocator hands this memory out again


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_errs_no_more_than_twice_torchs_flash_attention(case, poison):
    inputs = draw(case, torch.bfloat16)
    exact, yardstick = run_exactly(case, inputs), run(case, inputs, "torch_flash")
    check(case, run(case, inputs, "flash_attn"), yardstick, exact, torch.bfloat16)


@pytest.mark.parametrize(
    "case",
    [
        Case("repeat", 2000, heads=64, kv_heads=8),
        Case("repeat_window", 2000, heads=64, kv_heads=8, window=128),
        Case("repeat_packed", 2000, heads=64, kv_heads=8, boundaries=pack(300, 1500, 1, 199)),
    ],
    ids=lambda case: case.name,
)
def test_deterministic_runs_are_bit_identical(case):
    inputs = draw(case, torch.bfloat16)
    with using(deterministic=True):
        first = run(case, inputs, "flash_attn")
        for _ in range(3):
            again = run(case, inputs, "flash_attn")
            assert [
                name for name in (*NAMES, "lse") if not torch.equal(first[name], again[name])
            ] == []


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    own_gpus = torch.cuda.device_count() >= 2
    pool = Pool(2, 60.0, "nccl" if own_gpus else "gloo", fresh=True)
    yield pool
    pool.close()


@pytest.mark.parametrize("window, boundaries, stride", SHARDS)
def test_shards_round_key_gradients_at_most_three_times(two, window, boundaries, stride):
    arguments = ("flash_attn", window, boundaries, stride, "cuda")
    assert find_excess(two, LIMITS, cases.rounding_errors, *arguments) == {}


@pytest.mark.skipif(NO_RING is not None, reason=NO_RING or "ring_flash_attn is installed")
@pytest.mark.parametrize("window, boundaries, stride", SHARDS)
def test_ring_flash_attn_with_sinks_is_as_close(two, window, boundaries, stride):
    """The baseline of benchmarks/context_parallel.py is thus the same attention as ours."""
    arguments = (window, boundaries, stride, "cuda")
    assert find_excess(two, LIMITS, cases.ring_rounding_errors, *arguments) == {}
