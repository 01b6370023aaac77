"""Training over two and four processes matches one: losses, gradients, five steps."""

import math
from dataclasses import replace

import pytest
import torch

from tests.distributed import training
from tests.distributed.training import Run, train_alone, train_sharded

IGNORED = -100
TOLERANCE = 1e-5


def packed(*lengths: int, seed: int = 0, rows: int = 1) -> dict[str, torch.Tensor]:
    """Pack documents of these lengths; two of three tokens have a label."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(lengths))
    ids = torch.randint(0, 96, (rows, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(rows, -1)
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ids % 3 == 0, IGNORED),
        "position_ids": positions.contiguous(),
    }


def padded(tokens: int, total: int) -> dict[str, torch.Tensor]:
    """Return one document followed by padding."""
    batch = packed(total)
    del batch["position_ids"]
    batch["attention_mask"] = (torch.arange(total) < tokens).long()[None]
    batch["labels"][:, tokens:] = IGNORED
    return batch


def labelled(first: int, last: int, total: int) -> dict[str, torch.Tensor]:
    """Return one document with labels only for tokens in [first, last)."""
    batch = packed(total)
    at = torch.arange(total)
    batch["labels"] = batch["input_ids"].masked_fill((at < first) | (at >= last), IGNORED)
    return batch


def two_rows(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch of two sequences whose documents begin at different positions."""
    one, other = packed(30, 34, seed=seed), packed(7, 50, 7, seed=seed + 1)
    return {key: torch.cat([one[key], other[key]]) for key in one}


# Two layers, one of each kind: the cases test single layers. `five_steps` has four.
CASES: dict[str, Run] = {
    "one long document": Run([[[packed(64)]]], layers=2),
    "many short documents": Run([[[packed(5, 9, 3, 20, 1, 2, 11, 6, 7)]]], layers=2),
    "a document that spans all ranks": Run([[[packed(3, 58, 3)]]], layers=2),
    "a window that crosses several borders": Run([[[packed(64)]]], window=21, layers=2),
    "a window longer than the sequence": Run([[[packed(64)]]], window=100, layers=2),
    "a length that does not divide": Run([[[packed(61)]]], layers=2),
    "fewer tokens than chunks": Run([[[packed(5)]]], layers=2),
    "shards that are all padding": Run([[[padded(7, 64)]]], layers=2),
    "shards without a label": Run([[[labelled(9, 15, 64)]]], layers=2),
    "a label at a shard's border only": Run([[[labelled(16, 17, 64)]]], layers=2),
    "no label at all": Run([[[labelled(0, 0, 64)]]], layers=2),
    "documents of one token": Run([[[packed(*[1] * 20)]]], layers=2),
    "two rows": Run([[[two_rows()]]], layers=2),
    "all heads at a time": Run([[[packed(64)]]], heads_k_stride=2, layers=2),
    "checkpointed, attention kept": Run([[[packed(30, 34)]]], keep=True, layers=2),
    "checkpointed, attention again": Run([[[packed(30, 34)]]], keep=False, layers=2),
}  # fmt: skip


def far(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative distance, or the absolute one if zero is expected."""
    scale = expected.norm()
    return float((got - expected).norm() / (scale if scale > 0 else 1))


def differences(got: training.Result, expected: training.Result) -> dict[str, float]:
    """Return the differences larger than fp32 rounding explains."""
    pairs = {f"loss {n}": pair for n, pair in enumerate(zip(got.losses, expected.losses))}  # noqa: B905
    pairs["eval loss"] = (got.eval_loss, expected.eval_loss)
    found = {name: far(*map(torch.tensor, pair)) for name, pair in pairs.items()}
    for kind in ("gradients", "weights"):
        ours, theirs = getattr(got, kind), getattr(expected, kind)
        assert ours.keys() == theirs.keys()
        found |= {f"{kind} {name}": far(ours[name], theirs[name]) for name in theirs}
    if math.isnan(got.eval_loss) and math.isnan(expected.eval_loss):  # there are no labels
        del found["eval loss"]
    return {name: value for name, value in found.items() if not value <= TOLERANCE}


def shapes() -> list[tuple[int, int]]:
    """Return (number of processes, how many of them share a sequence) pairs."""
    return [(2, 2), (4, 4)]


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_weights_match_one_process(pools, case):
    run = replace(CASES[case], steps=CASES[case].steps * 5)
    expected = train_alone(run)
    if case != "no label at all":
        assert all(g.norm() > 0 for g in expected.gradients.values())
    for processes, context_size in shapes():
        for result in pools[processes].run(train_sharded, run, context_size):
            assert differences(result, expected) == {}
            assert result.losses == pytest.approx(expected.losses, rel=TOLERANCE)


def five_steps(accumulation: int, data_size: int) -> Run:
    """Return packed sequences of different lengths, one of them with a single label."""
    steps, seed = [], 0
    for _ in range(5):
        step = []
        for _ in range(accumulation):
            seed += 1
            step.append(
                [packed(9, 15, 24 + 8 * rank, seed=seed + 50 * rank) for rank in range(data_size)]
            )
        steps.append(step)
    steps[1][0][0] = labelled(3, 4, 48)
    return Run(steps, keep=True)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("processes, context_size", [(2, 2), (4, 4), (4, 2), (2, 1)])
def test_five_steps_give_the_same_weights(pools, accumulation, processes, context_size):
    run = five_steps(accumulation, processes // context_size)
    expected = train_alone(run)
    results = pools[processes].run(train_sharded, run, context_size)
    for result in results:
        assert differences(result, expected) == {}
        for name, weight in result.weights.items():
            assert torch.equal(weight, results[0].weights[name]), name


@pytest.mark.parametrize("piece", training.PIECES)
def test_disabling_any_piece_is_noticed(pools, piece):
    at_border = piece == "label pre-shift"
    run = CASES["a label at a shard's border only" if at_border else "one long document"]
    expected = train_alone(run)
    for processes, context_size in shapes():
        broken = replace(run, broken=piece)
        for result in pools[processes].run(train_sharded, broken, context_size):
            assert max(differences(result, expected).values(), default=0) > 100 * TOLERANCE
