"""Experts shared by two and four processes give one process's outputs and gradients."""

from dataclasses import replace

import pytest
import torch

from sparselong.errors import StageError
from sparselong.parallel.placement import Placement
from tests.distributed.experts import (
    PIECES,
    Layer,
    infer_alone,
    infer_sharded,
    infer_through,
    record_calls,
    run_alone,
    run_replicated,
    run_sharded,
)

TOLERANCE = 1e-12
LAYERS = {
    "equal rows": Layer((6, 6, 6, 6)),
    "one chunk": Layer((5, 5, 5, 5), chunk=64),
    "larger chunks backward": Layer((6, 6, 6, 6), backward_chunk=5),
    "without adapters": Layer((6, 6, 6, 6), adapted=False),
    "recomputed": Layer((6, 6, 6, 6), checkpointed=True),
    "ragged rows": Layer((3, 9, 1, 6)),
    "ragged rows, recomputed": Layer((3, 9, 1, 6), checkpointed=True),
    "ranks without rows": Layer((0, 9, 0, 2)),
    "no rows at all": Layer((0, 0, 0, 0)),
    "one expert gets everything": Layer((6, 6, 6, 6), routing="one"),
    "a rank whose experts get nothing": Layer((6, 5, 6, 6), routing="last"),
    "fewer experts than choices": Layer((6, 6, 6, 6), experts=4),
}


def on(size: int, layer: Layer) -> Layer:
    """Return the layer for `size` processes: the last two of four bring no rows of their own."""
    return layer if size == 4 else replace(layer, rows=layer.rows[:size])


def whole(parts: list[dict]) -> dict[str, torch.Tensor]:
    """Join the processes' parts: rows and experts in rank order."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "sent"}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    return float((found - wanted).abs().max()) / (scale or 1.0) if wanted.numel() else 0.0


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_one_process_s(pools, size, name):
    layer = on(size, LAYERS[name])
    found, wanted = whole(pools[size].run(run_sharded, layer, size)), run_alone(layer)
    assert found.keys() == wanted.keys()
    for part, tensor in wanted.items():
        assert error(found[part], tensor) < TOLERANCE, part


@pytest.mark.parametrize("rows", [(60, 60), (31, 77)], ids=["equal", "ragged"])
def test_without_gradients_sums_are_rounded_once(pools, rows):
    """Shares rounded to bf16 would change every third value; torch's backend sums in fp32."""
    layer = Layer(rows, chunk=32, dtype=torch.bfloat16)
    found, wanted = torch.cat(pools[2].run(infer_sharded, layer, 2)), infer_alone(layer)
    assert (found != wanted).double().mean() < 1e-3
    trained = torch.cat([part["out"] for part in pools[2].run(run_sharded, layer, 2)])
    assert (trained != wanted).double().mean() > 0.1


@pytest.mark.parametrize(
    ("rows", "calls"),
    [
        ((6, 4), [("small", 6)] * 2),  # together more than few
        ((7, 9), [("packed", 6)] * 3),
        ((3, 9), [("small", 3), ("packed", 3)] * 3),
    ],
)
def test_without_gradients_rows_take_the_backend_of_their_process_alone(pools, rows, calls):
    """Backends round differently."""
    layer = Layer(rows, chunk=4)
    outs, found = zip(*pools[2].run(infer_through, layer, 2, 6), strict=True)
    assert error(torch.cat(outs), infer_alone(layer)) < 1e-12
    assert list(found) == [calls, calls]


@pytest.mark.parametrize("piece", PIECES)
def test_every_piece_is_needed(pools, piece):
    layer = LAYERS["equal rows"]
    found = whole(pools[4].run(run_sharded, replace(layer, broken=piece), 4))
    wanted = run_alone(layer)
    assert max(error(found[part], wanted[part]) for part in wanted) > 0.01


def test_chunks_travel_while_another_one_is_computed(pools):
    """The next chunk is requested before one is computed; the one before is awaited after it."""
    for calls in pools[2].run(record_calls, Layer((6, 6), chunk=2, checkpointed=True), 2):
        assert not any(call.endswith(" 3") for call in calls), "the recomputation exchanges nothing"
        order = {call: place for place, call in enumerate(calls)}
        passes = [
            ("forward", ["expert rows"], "expert sums"),
            ("backward", ["expert rows again", "expert gradients"], "expert row gradients"),
        ]
        for name, gathered, returned in passes:
            for number in range(3):
                computed = order[f"{name} {number}"]
                for tag in gathered:
                    assert order[f"gather {tag} {min(number + 1, 2)}"] < computed
                assert computed < order[f"send {returned} {number}"]
                assert order[f"send {returned} {number}"] < order[f"await {returned} {number}"]
                if number < 2:
                    after = order[f"{name} {number + 1}"]
                    assert order[f"send {returned} {number}"] < after
                    assert after < order[f"await {returned} {number}"]
        assert order["gather expert gradients 0"] < order["recompute"]


def test_no_call_sees_more_rows_than_a_chunk_of_every_process(pools):
    for calls in pools[2].run(record_calls, Layer((5, 3), chunk=2), 2, True):
        for name in ("forward", "backward"):
            rows = [count for call, count in calls if call.startswith(name)]
            assert sum(rows) == 10 and max(rows) == 4, "five padded rows of each, two at a time"


def test_two_groups_of_two_do_not_mix(pools):
    """Each pair of four processes computes the same rows on its own."""
    layer = on(2, LAYERS["ragged rows"])
    parts, wanted = pools[4].run(run_sharded, layer, 2), run_alone(layer)
    for pair in (parts[:2], parts[2:]):
        found = whole(pair)
        assert max(error(found[part], wanted[part]) for part in wanted) < TOLERANCE


@pytest.mark.parametrize("size", [2, 4])
def test_replicated_rows_are_computed_by_all(pools, size):
    layer = Layer((5,) * size)
    wanted = run_alone(layer)["out"]
    for found in pools[size].run(run_replicated, layer, size):
        assert error(found, wanted) < TOLERANCE


def test_bytes_are_those_of_the_rows(pools):
    """Forward: rows out, sums back; backward: rows and gradients out, row gradients back."""
    layer = Layer((6, 6, 6, 6), dtype=torch.float32, checkpointed=True)
    rows = 3 * 6 * 64 * 4
    for part in pools[4].run(run_sharded, layer, 4):
        sent = part["sent"]
        assert sent.pop("expert rows") == 2 * rows
        for tag in ("expert sums", "expert gradients", "expert row gradients"):
            assert sent.pop(tag) == rows
        assert sent.pop("expert routing") == 3 * 6 * 3 * (4 + 4)
        assert sent.pop("routing gradients") == 3 * 6 * 3 * 4
        assert not sent


def test_experts_that_cannot_be_split_evenly_are_refused():
    with pytest.raises(StageError, match="6 experts cannot be split evenly over 4 processes"):
        Placement(0, 4).experts(6)
