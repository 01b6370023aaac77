"""A sharded vocabulary on GPUs: its kernels against fp64, and NCCL against one process.

The kernels' bound is that of test_layer.py: at most twice the error of plain torch in the same
dtype. The rest needs two GPUs.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from sparselong.kernels.experts import sum_parts
from sparselong.kernels.layer import cross_entropy_shard
from tests.distributed import vocabulary
from tests.distributed.pool import Pool
from tests.distributed.test_vocabulary import CASES, close, differences
from tests.distributed.vocabulary import compute, compute_alone, compute_replicated
from tests.gpu.test_layer import DTYPES, compare, draw, exact_in_pieces
from tests.poisoned import PoisonedTorch
from tests.references.cross_entropy import linear_cross_entropy_reference

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
SIZES = [size for size in (2, 4) if size <= torch.cuda.device_count()]


@pytest.fixture(scope="module")
def gpus() -> Iterator[dict[int, Pool]]:
    made = {size: Pool(size, 60.0, "nccl") for size in SIZES}
    yield made
    for pool in made.values():
        pool.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "widths", "width"),
    [
        (1, (1000,), 128),
        (129, (50_272,) * 4, 2880),
        (300, (4097, 0, 33, 1), 100),
        (700, (25_000, 25_000), 512),
        (2048, (50_272,) * 4, 2880),
    ],
)
def test_shards_kernels(monkeypatch, rows, widths, width, dtype):
    """2,048 rows of four shards of gpt-oss's vocabulary are a chunk of four ranks."""
    monkeypatch.setattr(cross_entropy_shard, "torch", PoisonedTorch())
    torch.manual_seed(rows)
    hidden = draw(rows, width, dtype=dtype)
    weight = draw(sum(widths), width, dtype=dtype, scale=3 * width**-0.5)
    labels = torch.randint(0, sum(widths), (rows,), device="cuda")
    labels[0] = sum(widths) - 1
    leaf = hidden.clone().requires_grad_()
    plain = linear_cross_entropy_reference(leaf, weight, labels)
    yardstick = (plain.detach(), torch.autograd.grad(plain, leaf, plain.new_tensor(1 / rows))[0])
    loss, dhidden = in_shards(hidden, weight, labels, widths)
    exact = exact_in_pieces(hidden.double(), weight.double(), labels)
    compare((loss, (dhidden.float() / rows).to(dtype)), yardstick, exact)


def in_shards(hidden, weight, labels, widths) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss and its gradient from shards of these numbers of tokens."""
    shards = weight.split(widths)
    firsts = [sum(widths[:n]) for n in range(len(widths))]
    logits = [hidden @ shard.T for shard in shards]
    statistics = [
        cross_entropy_shard.shard_statistics(part, labels, first)
        for part, first in zip(logits, firsts, strict=True)
    ]
    losses, normalizers = cross_entropy_shard.combine_statistics(torch.stack(statistics))
    partial = []
    for part, first, shard in zip(logits, firsts, shards, strict=True):
        cross_entropy_shard.turn_into_shard_gradients(part, labels, first, normalizers)
        partial.append(part @ shard)
    dhidden = torch.empty_like(hidden)
    sum_parts(torch.stack(partial), dhidden)
    return losses.sum(), dhidden


@needs_two
@pytest.mark.parametrize("case", CASES)
def test_fp32_results_match_one_process(gpus, case):
    one = replace(CASES[case], dtype=torch.float32)
    size = len(one.rows)
    if max(size, 2) not in gpus:
        pytest.skip(f"needs {size} GPUs")
    found = gpus[max(size, 2)].run(compute, one, "cuda")
    for got, expected in zip(found[:size], compute_alone(one), strict=True):
        assert differences(got, expected, 1e-5) == []


@needs_two
def test_bf16_gradients_are_rounded_no_more_than_twice_as_much_as_on_one_gpu(gpus):
    case = replace(CASES["two ranks"], rows=(300, 200), width=256, vocab=5000, chunk_rows=64)
    case = replace(case, dtype=torch.bfloat16)
    found, alone = gpus[2].run(compute, case, "cuda"), compute_alone(case)
    inputs, _, head = vocabulary.draw(case)
    for got, one, each in zip(found, alone, inputs, strict=True):
        hidden = each.hidden.double().requires_grad_()
        loss = vocabulary.linear_cross_entropy(hidden, head.double(), each.labels)
        (exact,) = torch.autograd.grad(loss * each.upstream, hidden)
        assert (got.dhidden - exact).norm() <= 2 * (one.dhidden - exact).norm()
        assert abs(got.loss - loss) <= 2 * abs(one.loss - loss) + 1e-5 * loss
        assert torch.equal(got.embedded, one.embedded)


@needs_two
def test_replicated_rows_match_one_process_without_synchronizing(gpus):
    case = replace(CASES["two ranks"], dtype=torch.float32)
    expected = compute_alone(case)[0]
    for embedded, logits, loss, scores, best in gpus[2].run(compute_replicated, case, "cuda"):
        assert torch.equal(embedded, expected.embedded) and torch.equal(best, expected.best)
        assert torch.equal(logits[0, 0].argmax(), expected.best[0])
        assert close(loss, expected.loss, 1e-5) and close(scores, expected.scores, 1e-5)
    assert all(gpus[2].run(vocabulary.replicated_never_synchronizes))


@needs_two
def test_memory_is_that_of_a_chunk(gpus):
    rows, vocab, width, chunk = 4096, 50_000, 512, 512
    most = 1.3 * (2 * chunk) * (vocab // 2) * 2 + 6 * rows * width * 2
    assert max(gpus[2].run(vocabulary.peak_bytes, rows, vocab, width, chunk)) < most


@needs_two
def test_an_id_out_of_range_stops_every_rank():
    """In processes of its own: a device-side assertion ends their use of the GPU."""
    pool = Pool(2, 60.0, "nccl")
    outcomes = pool.try_run(vocabulary.refused, CASES["two ranks"], "id", "cuda")
    pool.close()
    for kind, message in outcomes:
        assert kind == "died" or (kind == "raised" and "device-side assert" in message), message
