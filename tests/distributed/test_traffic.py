"""Bytes that attention sends at 16,384 tokens over four ranks, counted as they are sent."""

import pytest

from tests.distributed import cases

TOKENS = 16_384


def busiest(counts: list[dict[str, int]]) -> int:
    return max(sum(count.values()) for count in counts)


@pytest.mark.parametrize("keep", [None, True, False])
def test_a_window_layer_sends_its_halos_once_and_their_gradients(pools, keep):
    counts = pools[4].run(cases.traffic, TOKENS, (128,), keep)
    assert 0 < busiest(counts) <= 1.1e6
    assert all(set(count) == {"halo", "halo gradients"} for count in counts)
    # One halo crosses each chunk border, except that of chunks 3 and 4, which share a rank.
    halo_bytes = 127 * 2 * 8 * 64 * 2
    assert sum(count["halo"] for count in counts) == 6 * halo_bytes
    assert sum(count["halo gradients"] for count in counts) == 6 * halo_bytes


def test_a_full_layer_sends_only_visible_keys(pools):
    chunk_bytes = TOKENS // 8 * 2 * 8 * 64 * 2
    counts = pools[4].run(cases.traffic, TOKENS, (None,), True)
    assert [count["keys"] for count in counts] == [2 * n * chunk_bytes for n in (3, 4, 5, 6)]
    assert [count["key gradients"] for count in counts] == [n * chunk_bytes for n in (6, 5, 4, 3)]
    again = pools[4].run(cases.traffic, TOKENS, (None,), False)
    assert [count["keys"] for count in again] == [3 * n * chunk_bytes for n in (3, 4, 5, 6)]


def test_traffic_of_36_layers_with_kept_attention(pools):
    """18 pairs of a window layer and a full layer: every pair sends as much as the first."""
    pair, four = (pools[4].run(cases.traffic, TOKENS, (128, None) * n, True) for n in (1, 4))
    assert four == [{tag: 4 * count for tag, count in rank.items()} for rank in pair]
    assert 1e9 < 18 * busiest(pair) <= 1.45e9


@pytest.mark.parametrize(("keep", "begun"), [(None, 0), (True, 1), (False, 3)])
def test_keys_are_gathered_during_the_experts_backward(pools, keep, begun):
    """Keys of the first head; without kept attention the recomputation also gathers both heads."""
    found = pools[2].run(cases.exchanges_before_the_experts_backward, keep)
    assert [count for count, _ in found] == [begun] * 2
    assert keep is None or {tag for _, tag in found} == {"keys"}


def test_calls_that_do_not_match_the_layout_are_refused(pools):
    assert pools[2].run(cases.attend_wrongly, 3, 8)[1] == (
        "heads_k_stride: 3 with 2 KV heads; allowed: a divisor of their number"
    )
    message = pools[2].run(cases.attend_wrongly, 1, 16)[0]
    assert message.startswith(
        "q: 1 rows of 16 queries and 16 keys; allowed in this shard: 1 rows of 8"
    )


def test_second_derivatives_are_refused(pools):
    assert all("once_differentiable" in m for m in pools[2].run(cases.differentiate_twice))
