"""Plans of `plan_exchange` against the definition of which keys a query sees."""

import random

import pytest
import torch

from sparselong.kernels.attention import op as attention
from sparselong.kernels.attention.mask import Mask
from sparselong.parallel.sequence import context
from sparselong.parallel.sequence.exchange import ExchangePlan, plan_exchange

CPU = torch.device("cpu")


def plans(
    boundaries: tuple[int, ...], rows: int, size: int, window: int | None
) -> list[ExchangePlan]:
    given = (window, 0.125, False, True, CPU)
    return [plan_exchange(boundaries, rows, rank, size, *given) for rank in range(size)]


def draw(seed: int) -> tuple[tuple[int, ...], int, int, int, int | None]:
    """Draw boundaries, rows, tokens per row, ranks and window."""
    chance = random.Random(seed)
    size, rows = chance.choice([2, 3, 4]), chance.choice([1, 1, 2])
    tokens = 2 * size * chance.choice([1, 3, 8])
    inside = {chance.randrange(rows * tokens) for _ in range(chance.choice([0, 1, 5]))}
    boundaries = tuple(sorted(inside | {row * tokens for row in range(rows + 1)}))
    return boundaries, rows, tokens, size, chance.choice([None, 1, 2, 5, 17, 1000])


def own_positions(rank: int, size: int, tokens: int) -> list[int]:
    chunk = tokens // (2 * size)
    firsts = (rank * chunk, (2 * size - 1 - rank) * chunk)
    return [position for first in firsts for position in range(first, first + chunk)]


def assembled_positions(
    rank: int, all_plans: list[ExchangePlan], size: int, tokens: int
) -> list[int]:
    """Return the positions of the assembled keys after executing all ranks' plans."""
    received = []
    for source, plan in enumerate(all_plans):
        positions = own_positions(source, size, tokens)
        came = [p for first, last in plan.sent[rank] for p in positions[first:last]]
        assert len(came) == all_plans[rank].received_rows[source]
        received += came
    mine = own_positions(rank, size, tokens)
    pieces = [(mine if own else received)[a:b] for own, (a, b) in all_plans[rank].assembly]
    return [position for piece in pieces for position in piece]


def seen(query: int, boundaries: tuple[int, ...], row: int, tokens: int, window: int | None):
    """Return the positions that a query of a row sees."""
    start = max(b for b in boundaries if b <= row * tokens + query) - row * tokens
    start = start if window is None else max(start, query - window + 1)
    return list(range(start, query + 1))


def seen_in(mask: Mask, row: int, query: int) -> list[int]:
    """Return the same as indices into a call's keys."""
    at = mask.offset + query
    start = 0 if mask.documents is None else int(mask.documents.starts[row, at])
    if mask.window is not None:
        start = max(start, at - mask.window + 1)
    return list(range(start, at + 1))


@pytest.mark.parametrize("seed", range(60))
def test_every_query_sees_its_keys_and_gradients_return_to_the_owner(seed):
    boundaries, rows, tokens, size, window = draw(seed)
    all_plans = plans(boundaries, rows, size, window)
    for rank, plan in enumerate(all_plans):
        keys = assembled_positions(rank, all_plans, size, tokens)
        assert keys == sorted(set(keys)) and len(keys) == plan.keys
        mine = own_positions(rank, size, tokens)
        for run in plan.runs:
            positions = keys[run.keys]
            for row in range(rows):
                for n, query in enumerate(mine[run.queries]):
                    got = [positions[at] for at in seen_in(run.call.mask, row, n)]
                    assert got == seen(query, boundaries, row, tokens, window)
        for (a, b), (c, d) in plan.own:
            assert mine[a:b] == keys[c:d]
        rows_of = [~at if own else at for own, part in plan.assembly for at in range(*part)]
        assert plan.places.tolist() == rows_of
        for source, ranges in enumerate(plan.received):
            back = [p for first, last in ranges for p in keys[first:last]]
            theirs = own_positions(source, size, tokens)
            sent = [p for first, last in all_plans[source].sent[rank] for p in theirs[first:last]]
            assert back == sent


def test_no_rank_is_sent_what_it_cannot_see():
    whole = plans((0, 64), 1, 4, None)
    assert [sum(plan.sent_rows) for plan in whole] == [3 * 8, 4 * 8, 5 * 8, 6 * 8]
    assert [plan.received_rows[plan_rank] for plan_rank, plan in enumerate(whole)] == [0] * 4
    # One document per chunk: no rank needs remote keys.
    alone = plans(tuple(range(0, 65, 8)), 1, 4, None)
    assert all(sum(plan.sent_rows) == 0 for plan in alone)
    halos = plans((0, 64), 1, 4, 5)
    assert [sum(plan.sent_rows) for plan in halos] == [4, 8, 8, 4]


def test_chunks_share_a_backend_unless_cudnn_would_plan_for_one_batch(monkeypatch):
    monkeypatch.setattr(attention, "architecture_of", lambda _: "sm_90")
    q = torch.zeros(1, 8, 2048, 64, dtype=torch.bfloat16)

    def picked(boundaries: tuple[int, ...], rank: int) -> tuple[str, str]:
        return context._pick_backends(None, q, plans(boundaries, 1, 2, None)[rank])

    assert [picked((0, 4096), rank) for rank in (0, 1)] == [("torch_cudnn", "torch_cudnn")] * 2
    assert picked((0, 100, 2048, 4096), 1) == ("triton", "torch_cudnn")
    assert picked((0, 100, 4096), 1) == ("triton", "triton")
