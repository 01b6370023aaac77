"""Checkpoints of shared experts are whole and readable by any number of processes, also after a
rank was killed; ranks that fail are named, with plan and use if memory was short."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparselong.finetune import checkpoints
from sparselong.parallel import explain_exchange
from sparselong.tiny.build import TinySpec, build_tiny
from tests.distributed import expert_faults
from tests.distributed.expert_training import Run, draw_adapters
from tests.distributed.pool import Pool
from tests.distributed.test_expert_training import VOCABULARY, steps


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("faults")
    spec = TinySpec(layers=1, vocab_size=VOCABULARY, steps=0)
    base = build_tiny(folder / "base", spec, seed=1)
    draw_adapters(base, folder / "adapters.pt")
    return Run(base, folder / "adapters.pt", steps(1))


def message_of(outcome: tuple, told: Path, rank: int) -> str:
    kind, text = outcome
    return text if kind == "done" else (told / f"{rank}.txt").read_text()


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("killed", "rank 1: no heartbeat for"),
        (
            "memory",
            "rank 1: OutOfMemory: CUDA out of memory. Tried to allocate 2.00 GiB. (plan: 21",
        ),
    ],
)
def test_a_rank_that_fails_in_an_exchange_of_experts_is_named(run, tmp_path, how, cause):
    pool = Pool(2, timeout_seconds=60)
    outcomes = pool.try_run(expert_faults.fail_in_exchange, how, 1, run, tmp_path)
    pool.close()
    message = message_of(outcomes[0], tmp_path, 0)
    assert cause in message and "rank 0 stops because rank 1 of 2 failed" in message
    if how == "killed":
        assert outcomes[1] == ("died", -9)
    else:
        own = message_of(outcomes[1], tmp_path, 1)
        assert "the GPU ran out of memory" in own and "21.00 GiB by the plan" in own


def test_a_lack_of_memory_inside_a_collective_is_this_ranks_own_failure():
    """NCCL's collectives allocate too; as an ExchangeError, it would be blamed on another rank."""

    def gather() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        explain_exchange("expert rows", gather)


def same(left, right) -> bool:
    if isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in right)
    return torch.equal(left, right) if isinstance(right, torch.Tensor) else left == right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_are_one_process_s_and_are_read_by_any_number(pools, run, tmp_path, dtype):
    run = replace(run, dtype=dtype)
    folders = {size: tmp_path / str(size) for size in (1, 2, 4)}
    wanted = expert_faults.save_and_load(run, folders[1], 1)
    assert {t.dtype for n, t in wanted["adapters"].items() if "experts" in n} == {dtype}
    for size in (2, 4):
        (first, *others) = pools[size].run(expert_faults.save_and_load, run, folders[size], size)
        assert same(first, wanted)
        assert all(other["dtypes"] == wanted["dtypes"] for other in others)
        names = ("adapter_model.safetensors", "optimizer.pt")
        files = [folders[n] / "checkpoint-2" for n in (1, size)]
        adapters = [folder / names[0] for folder in files]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()
        assert same(*(torch.load(folder / names[1]) for folder in reversed(files)))
    (found, *_) = pools[2].run(expert_faults.load_only, run, folders[4], 2)
    assert same(found, wanted)
    assert same(expert_faults.load_only(run, folders[2], 1), wanted)


@pytest.mark.parametrize(("where", "which"), [("gathering", 1), ("gathering", 0), ("writing", 0)])
def test_a_rank_killed_while_saving_leaves_the_checkpoint_before(run, tmp_path, where, which):
    pool, folder = Pool(2, timeout_seconds=60), tmp_path / "checkpoints"
    outcomes = pool.try_run(expert_faults.fail_while_saving, where, which, run, folder, tmp_path)
    pool.close()
    assert outcomes[which] == ("died", -9)
    assert f"rank {which}: " in message_of(outcomes[1 - which], tmp_path, 1 - which)
    found, faults = checkpoints.find_last(folder)
    assert found == folder / "checkpoint-2" and not faults
    left = {path.name for path in folder.iterdir()}
    assert left == {"checkpoint-2"} | ({".unfinished"} if where == "writing" else set())


@pytest.mark.parametrize(
    ("which", "name", "found"),
    [
        (None, "", None),
        (1, "a", "different values on rank 1, first in a"),
        (3, "own", "different values on rank 3, first in own"),
    ],
)
def test_ranks_compare_what_they_share_and_replicas_of_experts(pools, which, name, found):
    for message in pools[4].run(expert_faults.compare, which, name):
        assert message == "none" if found is None else found in message
