"""Embedding, loss and scores with a sharded vocabulary equal those of one process."""

from dataclasses import replace

import pytest
import torch

from tests.distributed import vocabulary
from tests.distributed.vocabulary import Case, Outcome, compute, compute_alone, compute_replicated

CASES = {
    "one rank": Case((9,), (0.7,)),
    "two ranks": Case((7, 7), (0.8, 0.8)),
    "four ranks, 31 tokens": Case((5, 5, 5, 5)),
    "different numbers of rows": Case((3, 11, 1, 6), (0.9, 0.6, 1.0, 0.8)),
    "a rank without rows": Case((6, 0, 9, 2)),
    "one rank has rows": Case((0, 0, 0, 9)),
    "ranks without supervised rows": Case((6, 5), (0.0, 1.0)),
    "no supervised rows": Case((4, 4), (0.0, 0.0)),
    "no rows": Case((0, 0)),
    "labels of the last shard": Case((6, 6, 6, 6), labels=range(24, 31)),
    "labels of the second shard": Case((6, 6, 6, 6), labels=range(8, 16)),
    "fewer tokens than a share each": Case((3, 3, 3, 3), vocab=5),
    "large logits": Case((6, 6, 6, 6), whole_numbers=True, scale=20.0),
    "ties": Case((8, 8, 8, 8), whole_numbers=True),
    "one chunk": Case((5, 7), chunk_rows=512),
}


def close(got: torch.Tensor, expected: torch.Tensor, limit: float) -> bool:
    if got.shape != expected.shape:
        return False
    distance = (got.double() - expected.double()).abs().max() if got.numel() else torch.zeros(())
    return bool(distance <= limit * (expected.double().abs().max() if got.numel() else 1.0))


def differences(got: Outcome, expected: Outcome, limit: float) -> list[str]:
    """Return the names of what differs."""
    found = [
        name
        for name in ("loss", "loss_without_gradient", "dhidden", "scores")
        if not close(getattr(got, name), getattr(expected, name), limit)
    ]
    exact = [
        n
        for n in ("embedded", "best")
        if not torch.equal(*(getattr(o, n) for o in (got, expected)))
    ]
    return found + exact


def run(pools, case: Case) -> list[Outcome]:
    """Return the outcomes of one group of the smallest pool, others having the same."""
    size = len(case.rows)
    found = pools[max(size, 2)].run(compute, case)
    for first in range(size, len(found), size):
        again = found[first : first + size]
        assert all(
            torch.equal(a.dhidden, b.dhidden) for a, b in zip(found[:size], again, strict=True)
        )
    return found[:size]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_results_are_those_of_one_process(pools, case, dtype, limit):
    one = replace(CASES[case], dtype=dtype)
    for got, expected in zip(run(pools, one), compute_alone(one), strict=True):
        assert differences(got, expected, limit) == []
        assert torch.equal(got.loss, got.loss_without_gradient)


def test_two_groups_of_a_world_are_apart(pools):
    """Four processes, two groups of two ranks."""
    case = CASES["two ranks"]
    found = pools[4].run(compute, case)
    for got, expected in zip(found, compute_alone(case) * 2, strict=True):
        assert differences(got, expected, 1e-12) == []


def test_bf16_rounds_gradients_no_more_than_twice_one_process(pools):
    case = replace(CASES["different numbers of rows"], dtype=torch.bfloat16)
    alone, sharded = compute_alone(case), run(pools, case)
    inputs, _, head = vocabulary.draw(case)
    for got, one, each in zip(sharded, alone, inputs, strict=True):
        hidden = each.hidden.double().requires_grad_()
        loss = vocabulary.linear_cross_entropy(hidden, head.double(), each.labels)
        (exact,) = torch.autograd.grad(loss * each.upstream, hidden)
        assert (got.dhidden - exact).norm() <= 2 * (one.dhidden - exact).norm()
        assert got.embedded.dtype == torch.bfloat16 and torch.equal(got.embedded, one.embedded)


@pytest.mark.parametrize("piece", vocabulary.PIECES)
def test_a_missing_piece_is_noticed(pools, piece):
    names = {"owner": "embedded", "first of ties": "best"}
    gradients = ("sum of parts", "home")
    name = names.get(piece, "dhidden" if piece in gradients else "loss")
    case = replace(CASES["ties" if piece == "first of ties" else "large logits"], broken=piece)
    found = zip(run(pools, case), compute_alone(case), strict=True)
    assert any(name in differences(got, expected, 1e-5) for got, expected in found)


def test_bytes_are_counted_and_as_few_as_documented(pools):
    case = replace(CASES["different numbers of rows"], dtype=torch.float32)
    kept = [int((each.labels != -100).sum()) for each in vocabulary.draw(case)[0]]
    for rank, got in enumerate(run(pools, case)):
        assert got.sent == {
            "token ids": 3 * max(case.rows) * 8,
            "embeddings": (sum(case.rows) - case.rows[rank]) * case.width * 4,
            "loss counts": 3 * 4 * 8,
            "loss labels": 3 * max(kept) * 8,
            "loss rows": 3 * max(kept) * case.width * 4,
            "loss statistics": 3 * sum(kept) * 3 * 4,
            "loss gradients": (sum(kept) - kept[rank]) * case.width * 4,
        }


@pytest.mark.parametrize("chunk_rows", [16, 512])
def test_no_rank_holds_whole_logits_or_tables(pools, chunk_rows):
    """A chunk's logits are the largest tensor; larger chunks are noticed."""
    case = Case((100, 100, 100, 100), vocab=1031, chunk_rows=chunk_rows, dtype=torch.float32)
    for got in run(pools, case):
        assert got.largest_of_vocabulary == 0
        assert (got.largest <= 4 * 16 * 258) == (chunk_rows == 16)


@pytest.mark.parametrize(
    "what", ["id", "id, negative", "label", "label, negative", "score, negative"]
)
def test_ids_and_labels_out_of_range_are_refused_on_every_rank(pools, what):
    """31 is in the last rank's share of 8, of which 7 exist."""
    found = pools[4].run(vocabulary.refused, CASES["four ranks, 31 tokens"], what)
    wrong, allowed = "-1" if what.endswith("negative") else "31", "0 to 30"
    for message in found:
        error = "IndexError: token ids: between " if what.startswith("id") else "ValueError: labels"
        assert message.startswith(error) and wrong in message and message.endswith(allowed)
        assert what.startswith("id") or "on rank 3" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("placement", "placement: Placement(rank=0, size=3); allowed: "),
        ("rows", "ids: 2 on rank "),
        ("share", "table: [5, 4]; allowed: ["),
        ("trained embedding", "table: requires a gradient"),
        ("trained head", "table: requires a gradient"),
        ("dtype", "weight: torch.float32 [5, 4]; allowed: torch.float16"),
        ("two rows", "part: [2, 5]; allowed: [..., 5], one row's logits"),
        ("gradient", "hidden: requires a gradient"),
        ("label", "labels: between -1 and -1; allowed: 0 to 9"),
    ],
)
def test_wrong_arguments_are_named(pools, name, message):
    assert pools[2].run(vocabulary.refused_alone, name)[0].startswith(message)


def test_embeddings_can_require_a_gradient_for_checkpointing(pools):
    assert all(pools[2].run(vocabulary.embed_with_checkpointing))


@pytest.mark.parametrize("case", ["four ranks, 31 tokens", "two ranks", "ties", "one rank"])
def test_replicated_rows_match_one_process(pools, case):
    one = CASES[case]
    (expected, *_), (inputs, *_), head = compute_alone(one), *vocabulary.draw(one)[::2]
    whole = (inputs.hidden[:1] @ head.T)[None]
    found = pools[max(len(one.rows), 2)].run(compute_replicated, one)
    for embedded, logits, loss, scores, best in found:
        assert torch.equal(embedded, expected.embedded) and torch.equal(best, expected.best)
        assert torch.equal(logits, found[0][1]) and close(logits, whole, 1e-12)
        assert close(loss, expected.loss, 1e-12) and close(scores, expected.scores, 1e-12)


def test_an_unshared_embedding_of_replicated_rows_is_noticed(pools):
    case = replace(CASES["four ranks, 31 tokens"], broken="owner")
    expected = compute_alone(case)[0].embedded
    assert not any(torch.equal(f[0], expected) for f in pools[4].run(compute_replicated, case))
