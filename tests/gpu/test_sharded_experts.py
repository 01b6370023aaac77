"""Experts shared by two and four GPUs through NCCL match one GPU (needs two GPUs)."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from sparselong.kernels.experts.op import expert_mlp
from tests.distributed.experts import (
    Layer,
    draw,
    infer_sharded,
    run_alone,
    run_replicated,
    run_sharded,
)
from tests.distributed.pool import Pool
from tests.distributed.test_experts import LAYERS, error, on, whole

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
SIZES = [size for size in (2, 4) if size <= torch.cuda.device_count()]
BF16_LIMIT = 1.5
"""Error of the shards over one GPU's: shares are rounded once more before they are added."""


@pytest.fixture(scope="module")
def gpus() -> Iterator[dict[int, Pool]]:
    made = {size: Pool(size, 60.0, "nccl") for size in SIZES}
    yield made
    for pool in made.values():
        pool.close()


def to_cpu(parts: list[dict]) -> list[dict]:
    return [{k: v if k == "sent" else v.cpu() for k, v in part.items()} for part in parts]


@pytest.mark.parametrize("name", LAYERS)
def test_fp32_outputs_and_gradients_match_one_gpu(gpus, name):
    for size, pool in gpus.items():
        layer = replace(on(size, LAYERS[name]), dtype=torch.float32, device="cuda")
        found, wanted = whole(to_cpu(pool.run(run_sharded, layer, size))), run_alone(layer)
        for part, tensor in wanted.items():
            assert error(found[part], tensor.cpu()) < 1e-5, part


def test_bf16_errors_stay_near_those_of_one_gpu(gpus):
    """The mean over tensors of the distance from fp64."""
    for size, pool in gpus.items():
        layer = Layer((256,) * size, chunk=96, dtype=torch.bfloat16, device="cuda")
        exact = run_alone(replace(layer, dtype=torch.float64, device="cpu"))
        alone = run_alone(layer)
        found = whole(to_cpu(pool.run(run_sharded, layer, size)))
        for part, tensor in exact.items():
            one, many = (
                float((t.cpu().double() - tensor).norm()) for t in (alone[part], found[part])
            )
            assert many < BF16_LIMIT * one, part


def test_two_runs_give_the_same_bits(gpus):
    for size, pool in gpus.items():
        layer = Layer((100,) * size, chunk=64, dtype=torch.bfloat16, device="cuda")
        one, other = (whole(to_cpu(pool.run(run_sharded, layer, size))) for _ in range(2))
        assert all(torch.equal(one[part], other[part]) for part in one)


def test_inference_has_the_bits_of_each_process_alone(gpus):
    """40 rows take the table's backend for few rows, those of all processes another."""
    for size, pool in gpus.items():
        layer = Layer((40,) * size, chunk=64, dtype=torch.bfloat16, device="cuda")
        found, rows = pool.run(infer_sharded, layer, size), draw(layer)
        names = ("x", "indices", "weights")
        for number, part in enumerate(found):
            own = (rows[name][40 * number : 40 * (number + 1)] for name in names)
            with torch.no_grad():
                wanted = expert_mlp(*own, rows["stack"], rows["adapters"])
            assert torch.equal(part.cpu(), wanted.cpu())


def test_replicated_rows_are_computed_by_all(gpus):
    for size, pool in gpus.items():
        layer = Layer((5,) * size, dtype=torch.float32, device="cuda")
        wanted = run_alone(layer)["out"].cpu()
        for found in pool.run(run_replicated, layer, size):
            assert error(found.cpu(), wanted) < 1e-5
