"""Training with shared experts and vocabulary matches one process: losses, norms, gradients, five
steps, checkpoints at another number of processes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparselong.config import load
from sparselong.tiny.build import TinySpec, build_tiny
from tests.conftest import ROOT
from tests.distributed.expert_training import (
    PIECES,
    Result,
    Run,
    draw_adapters,
    train_alone,
    train_on_machines,
    train_sharded,
)
from tests.distributed.test_parity import IGNORED, far

TOLERANCE = 1e-5
VOCABULARY = 602
"""Divisible by two processes, not by four."""
SHAPES = [(2, 2, 2), (2, 1, 2), (4, 4, 4), (4, 2, 4), (4, 1, 4), (4, 4, 2), (4, 2, 2), (4, 1, 1)]
"""Numbers of processes, of those that share a sequence, and of those that share experts."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    spec = TinySpec(layers=2, vocab_size=VOCABULARY, steps=0)
    return build_tiny(tmp_path_factory.mktemp("base") / "base", spec, seed=1)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "adapters.pt"
    draw_adapters(base, path)
    return path


def packed(*lengths: int, seed: int) -> dict[str, torch.Tensor]:
    """Pack documents of these lengths; two of three tokens have a label."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(lengths))
    ids = torch.randint(0, VOCABULARY, (1, sum(lengths)), generator=generator)
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ids % 3 == 0, IGNORED),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }


def steps(data_size: int, count: int = 5) -> list:
    """Return steps of two micro-batches, whose lengths differ between data ranks.

    One micro-batch of the last data rank is all padding, as at the end of an epoch.
    """
    made = []
    for seed in range(count):
        made.append(
            [
                [packed(9, 15, 16 + 7 * rank, seed=9 * seed + rank) for rank in range(data_size)],
                [packed(30, 3 + 5 * rank, seed=9 * seed + 50 + rank) for rank in range(data_size)],
            ]
        )
    last = made[1][1][-1]
    last["labels"] = torch.full_like(last["labels"], IGNORED) if data_size > 1 else last["labels"]
    return made


def differences(got: Result, expected: Result, kinds=("gradients", "weights")) -> dict[str, float]:
    """Return the differences larger than fp32 rounding explains."""
    pairs = {}
    for kind in ("losses", "norms"):
        both = zip(getattr(got, kind), getattr(expected, kind), strict=True)
        pairs |= {f"{kind} {n}": tuple(map(torch.tensor, pair)) for n, pair in enumerate(both)}
    pairs["eval loss"] = (torch.tensor(got.eval_loss), torch.tensor(expected.eval_loss))
    for kind in kinds:
        ours, theirs = getattr(got, kind), getattr(expected, kind)
        assert ours.keys() == theirs.keys()
        pairs |= {f"{kind} {name}": (ours[name], theirs[name]) for name in theirs}
    found = {name: far(*pair) for name, pair in pairs.items()}
    return {name: value for name, value in found.items() if not value <= TOLERANCE}


@pytest.fixture(scope="module")
def alone(base, adapters) -> dict[int, tuple[Run, Result]]:
    """One process's training of the data of one, two and four data ranks."""
    runs = {size: Run(base, adapters, steps(size)) for size in (1, 2, 4)}
    return {size: (run, train_alone(run)) for size, run in runs.items()}


@pytest.mark.parametrize("processes, context_size, expert_size", SHAPES)
def test_five_steps_match_one_process(pools, alone, processes, context_size, expert_size):
    run, expected = alone[processes // context_size]
    assert all(g.norm() > 0 for g in expected.gradients.values())
    assert max(expected.norms) > run.norm > 0  # clipping matters
    results = pools[processes].run(train_sharded, run, context_size, expert_size)
    for result in results:
        assert differences(result, expected) == {}
        assert result.norms == results[0].norms and result.losses == results[0].losses
        for name, weight in result.weights.items():
            assert torch.equal(weight, results[0].weights[name]), name


@pytest.mark.parametrize(
    ("processes", "context_size", "expert_size"), [(1, 1, 1), (2, 2, 2), (4, 2, 4), (2, 2, 1)]
)
def test_layers_in_slices_of_rows_match(pools, alone, processes, context_size, expert_size):
    """Also where sequences of different lengths share experts: all have as many slices."""
    run, expected = alone[processes // context_size]
    sliced = replace(run, rows=7)
    if processes == 1:
        results = [train_alone(sliced)]
    else:
        results = pools[processes].run(train_sharded, sliced, context_size, expert_size)
    for result in results:
        assert differences(result, expected) == {}


@pytest.mark.parametrize(("context_size", "expert_size"), [(2, 2), (1, 2)])
def test_experts_in_host_memory_train_the_same_bits(
    pools, untrained_base, tmp_path, context_size, expert_size
):
    """Four layers, so that the device never holds all; each process copies its own experts only."""
    draw_adapters(untrained_base, tmp_path / "adapters.pt")
    run = Run(untrained_base, tmp_path / "adapters.pt", steps(2 // context_size, 2))
    expected, found = (
        pools[2].run(train_sharded, replace(run, placement=where), context_size, expert_size)
        for where in ("gpu", "host")
    )
    layer_bytes = sum(8 * n for n in (256 * 4 * 17, 128 * 4 * 17)) // expert_size
    copied = (2 * 4 - 2) + 3 * (2 * 4 - 4)  # four passes forward and backward
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.copied_bytes, theirs.copied_bytes) == (copied * layer_bytes, 0)
        for kind in ("losses", "norms", "eval_loss"):
            assert getattr(mine, kind) == getattr(theirs, kind)
        for kind in ("gradients", "weights"):
            ours, wanted = getattr(mine, kind), getattr(theirs, kind)
            assert ours.keys() == wanted.keys()
            assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("context_size", "expert_size"), [(2, 2), (1, 2), (2, 1)])
def test_two_machines_match_one_process(pools, alone, context_size, expert_size):
    """What shares a sequence or experts is on one machine; only gradients pass between the two."""
    run, expected = alone[4 // context_size]
    keys = [f"sequence_parallel_degree={context_size}", f"expert_parallel_degree={expert_size}"]
    config = load(ROOT / "configs/tiny.yaml", keys)
    outcomes = pools[4].run(train_on_machines, run, 2, config)
    for rank, (groups, result) in enumerate(outcomes):
        machine = rank - rank % 2
        assert groups["context"] == ([machine, machine + 1] if context_size == 2 else [rank])
        assert groups["expert"] == ([machine, machine + 1] if expert_size == 2 else [rank])
        every = [rank % 2, rank % 2 + 2]
        assert groups["data"] == (every if context_size == 2 else [0, 1, 2, 3])
        assert groups["replica"] == (every if expert_size == 2 else [0, 1, 2, 3])
        assert differences(result, expected) == {}
        for name, weight in result.weights.items():
            assert torch.equal(weight, outcomes[0][1].weights[name]), name


@pytest.mark.parametrize("piece", PIECES)
def test_disabling_any_piece_is_noticed(pools, alone, piece):
    """Two sequences at once, each shared by two processes, which also share experts."""
    run, expected = alone[2]
    short = replace(run, broken=piece, last=2)
    wanted = replace(expected, losses=expected.losses[:2], norms=expected.norms[:2])
    for result in pools[4].run(train_sharded, short, 2, 2):
        found = differences(result, wanted, ("gradients",))
        del found["eval loss"]  # of other weights
        assert max(found.values(), default=0) > 100 * TOLERANCE


def test_training_continues_at_another_number_of_processes(pools, alone, tmp_path):
    """Each step begins with the adapters and optimizer states that the one before wrote."""
    run, expected = alone[1]
    one = [(1, 1, 1)] * 2
    for number, shape in enumerate([one[0], (2, 2, 2), (4, 4, 4), (4, 4, 2), one[1]]):
        part = replace(run, first=number, last=number + 1, saved=tmp_path)
        processes, *sizes = shape
        if processes == 1:
            results = [train_alone(part)]
        else:
            results = pools[processes].run(train_sharded, part, *sizes)
        for result in results:
            wanted = replace(
                expected,
                losses=expected.losses[number : number + 1],
                norms=expected.norms[number : number + 1],
            )
            found = differences(result, wanted, ("weights",) if number == 4 else ())
            if number < 4:
                found.pop("eval loss", None)
            assert found == {}
