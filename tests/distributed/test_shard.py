"""Mesh, shards, counts and gradients agree between one process and several."""

import pytest
import torch

from sparselong.parallel.loss import StepCounts
from tests.distributed import cases

IGNORED = -100


def packed(*lengths: int, rows: int = 1) -> dict[str, torch.Tensor]:
    """Return a batch of documents of these lengths; even tokens have labels."""
    tokens = sum(lengths)
    ids = torch.randint(9, 99, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(ids % 2 == 1, IGNORED)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def whole(shards: list[dict[str, torch.Tensor]], key: str) -> torch.Tensor:
    """Reassemble the padded sequence from all ranks' shards."""
    halves = [shard[key].chunk(2, 1) for shard in shards]
    return torch.cat([h[0] for h in halves] + [h[1] for h in reversed(halves)], 1)


def test_ranks_of_a_sequence_are_consecutive(pools):
    assert pools[4].run(cases.place, 2) == [
        (0, 2, 0, 2, (0, 1), (0, 2)),
        (1, 2, 0, 2, (0, 1), (1, 3)),
        (0, 2, 1, 2, (2, 3), (0, 2)),
        (1, 2, 1, 2, (2, 3), (1, 3)),
    ]
    assert pools[2].run(cases.place, 2)[1] == (1, 2, 0, 1, (0, 1), (1,))


@pytest.mark.parametrize("size", [0, 3, 8, "2"])
def test_a_degree_that_does_not_divide_the_processes_is_refused(pools, size):
    for rank, message in enumerate(pools[4].run(cases.refused, size)):
        assert message == (
            f"context_size: {size!r} with 4 processes (this is rank {rank}); "
            "allowed: a divisor of their number, 1, 2, 4"
        )


@pytest.mark.parametrize("lengths", [(64,), (61,), (1,), (5, 30, 2, 20)])
def test_shards_cover_the_sequence(pools, lengths):
    batch = packed(*lengths, rows=2)
    shards = pools[4].run(cases.shard, batch, 4)
    tokens, padded = sum(lengths), -(-sum(lengths) // 8) * 8
    for key in ("input_ids", "labels", "position_ids"):
        assert torch.equal(whole(shards, key)[:, :tokens], batch[key].expand(2, -1))
    assert whole(shards, "labels")[:, tokens:].eq(IGNORED).all()
    shifted = whole(shards, "shift_labels")
    assert torch.equal(shifted[:, : tokens - 1], batch["labels"][:, 1:])
    assert shifted.shape == (2, padded) and shifted[:, tokens - 1 :].eq(IGNORED).all()
    starts = [sum(lengths[:n]) for n in range(len(lengths))] + [tokens] * (padded > tokens)
    expected = [*starts, *(padded + s for s in starts), 2 * padded]
    for local in shards:
        assert local["cu_seqlens"].tolist() == expected
        assert local["input_ids"].shape == (2, padded // 4)


def test_padding_is_a_separate_document(pools):
    batch = packed(12, 4)
    batch["attention_mask"] = torch.tensor([[1] * 10 + [0] * 6])
    for local in pools[2].run(cases.shard, batch, 2):
        assert "attention_mask" not in local
        assert local["cu_seqlens"].tolist() == [0, 10, 16]


def test_unequal_batches_are_reported_on_every_rank(pools):
    same, other = packed(16), packed(16)
    other["input_ids"] = other["input_ids"].clone()
    other["input_ids"][0, 7] += 1
    messages = pools[4].run(cases.shard_own, [same, same, other, same], 4)
    assert all("another batch on rank 2 ([1, 16] tokens)" in message for message in messages)
    messages = pools[4].run(cases.shard_own, [same, same, packed(16), packed(24)], 2)
    assert messages[:2] == ["", ""]
    assert all("another batch on rank 3 ([1, 24] tokens)" in message for message in messages[2:])
    without = {key: value for key, value in same.items() if key != "position_ids"}
    messages = pools[2].run(cases.shard_own, [same, without], 2)
    assert all("another batch on rank 1" in message for message in messages)


def test_an_unknown_entry_is_refused(pools):
    batch = packed(16) | {"token_type_ids": torch.zeros(1, 16)}
    for message in pools[2].run(cases.shard_own, [batch, batch], 2):
        assert message.startswith("ValueError: batch: ") and "allowed: input_ids and lab" in message


def test_tokens_after_padding_are_refused_as_on_one_gpu(pools):
    batch = packed(12, 4)
    batch["attention_mask"] = torch.tensor([[1] * 5 + [0] * 2 + [1] * 9])
    for message in pools[2].run(cases.shard_own, [batch, batch], 2):
        assert message.startswith("ValueError: attention_mask: tokens on both sides of padding")
    batch["attention_mask"] = torch.tensor([[1] * 10 + [0] * 2 + [1] * 4])  # another document
    for local in pools[2].run(cases.shard, batch, 2):
        assert local["cu_seqlens"].tolist() == [0, 10, 12, 16]


def test_tokens_are_counted_over_all_ranks_and_micro_batches(pools):
    ids = torch.tensor([[5, 6, 7, 0]])  # the first label belongs to a token that is never predicted
    some = {"input_ids": ids, "labels": torch.tensor([[3, IGNORED, 4, 5]])}
    none = {"input_ids": ids, "labels": torch.tensor([[3, IGNORED, IGNORED, IGNORED]])}
    expected = [StepCounts(tokens=11, divisor=4)] * 4
    assert pools[4].run(cases.count, [[some, none], [none, some]], [6, 5], 2) == expected
    assert pools[4].run(cases.count, [[some], [none], [some], [none]], [3, 3, 2, 3], 1) == expected
    assert pools[2].run(cases.count, [[none]], [3], 2) == [StepCounts(tokens=3, divisor=1)] * 2


def test_losses_are_sums_over_all_ranks(pools):
    assert pools[4].run(cases.losses, 2) == [(10.0, 5.0)] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part, parts", [(100, 1), (18, 2), (10, 3)])  # of 3, 15 and 6 elements
def test_gradients_are_summed_once_and_bit_identical(pools, dtype, part, parts):
    results = pools[4].run(cases.reduced, dtype, 2, part)
    generators = [torch.Generator().manual_seed(rank) for rank in range(4)]
    expected = [torch.zeros(n, 3) for n in (1, 5, 2)]
    for rank, generator in enumerate(generators):
        for n, total in enumerate(expected):
            if n != 1 or rank != 1:
                total += torch.randn(total.shape, generator=generator).to(dtype)
    for gradients, sent_bytes, exchanges in results:
        assert exchanges == 2 * parts
        if parts == 1:  # 24 elements in 4 slices: 3 x 6 values and 3 x 6 sums sent, in fp32
            assert sent_bytes == 6 * 6 * 4
        for got, total in zip(gradients, expected, strict=True):
            assert torch.equal(got, total.to(dtype))
