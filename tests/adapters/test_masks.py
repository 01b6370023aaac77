"""Mask and scale arithmetic on cases small enough to check by hand."""

import pytest
import torch

from sparselong.adapters.masks import (
    find_margin,
    flipped_fraction,
    score_two_four,
    update_mask,
    update_scale,
    update_steps,
)

KEPT_02 = torch.tensor([[True, False, True, False]])
# Stage 02 kept positions 0 and 2 here, against magnitude by h = 5 - 1 = 4.
MASTER = torch.tensor([[1.0, 5.0, 2.0, 0.5]])
# Half a step: m = 0.25.
SCALE = torch.tensor([[0.5]], dtype=torch.bfloat16)


def choose(weight: list[float], current: torch.Tensor = KEPT_02, criterion="hysteresis") -> list:
    mask = update_mask(torch.tensor([weight]), MASTER, KEPT_02, current, SCALE, criterion)
    return torch.where(mask[0])[0].tolist()


def mask_of(positions: list[int]) -> torch.Tensor:
    return torch.tensor([[position in positions for position in range(4)]])


@pytest.mark.parametrize(
    ("weight", "expected", "why"),
    [
        ([1.0, 5.0, 2.0, 0.5], [0, 2], "no training, no flips"),
        ([1.0, 5.2, 2.0, 0.5], [0, 2], "gained 0.2 over the old lead of 4, less than half a step"),
        ([1.0, 5.5, 2.0, 0.5], [1, 2], "gained 0.5"),
        ([1.4, 5.5, 2.0, 0.5], [0, 2], "gained 0.5, but the kept weight gained 0.4"),
        ([0.8, 5.0, 2.0, 0.5], [0, 2], "the kept weight shrank by 0.2, less than half a step"),
        ([0.7, 5.0, 2.0, 0.5], [1, 2], "the kept weight shrank by 0.3"),
        ([1.0, 5.0, 2.0, 5.5], [2, 3], "5.5 - 4 - 0.25 exceeds 1.0: the other weight returns"),
        ([-1.0, -5.5, 2.0, 0.5], [1, 2], "signs do not matter"),
        ([1.0, 9.0, 2.0, 8.0], [1, 3], "both can return"),
    ],
)
def test_which_two_weights_are_kept(weight, expected, why):
    assert choose(weight) == expected, why


def test_magnitude_keeps_the_two_largest_whatever_stage_02_chose():
    assert choose([1.0, 5.0, 2.0, 0.5], criterion="magnitude") == [1, 2]


def test_scores_by_hand():
    margin = find_margin(MASTER, KEPT_02, SCALE)
    assert margin.tolist() == [[0.25] * 4]
    scores = score_two_four(MASTER, MASTER, KEPT_02, KEPT_02, margin)
    assert scores.tolist() == [[1.0, 0.75, 2.0, -3.75]]
    scores = score_two_four(MASTER, MASTER, KEPT_02, mask_of([1, 2]), margin)
    assert scores.tolist() == [[0.75, 1.0, 2.0, -3.75]]


def test_the_margin_is_half_a_step_of_the_group_or_a_fraction_of_the_row():
    master = torch.tensor([[1.0, 5.0, 2.0, 0.5, 3.0, 0.0, 2.0, 0.0]])
    mask = KEPT_02.repeat(1, 2)
    scale = torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16)
    assert find_margin(master, mask, scale).tolist() == [[0.25] * 4 + [1.0] * 4]
    assert find_margin(master, mask, None).tolist() == [[2.0 / 16]]  # mean of 1, 2, 3, 2


def test_only_the_margin_is_required_where_stage_02_agreed():
    master = torch.tensor([[5.0, 1.0, 4.0, 2.0]])
    for rival, expected in ((4.2, [0, 2]), (4.3, [0, 3])):
        weight = torch.tensor([[5.0, 1.0, 4.0, rival]])
        mask = update_mask(weight, master, KEPT_02, KEPT_02, SCALE, "hysteresis")
        assert torch.equal(mask, mask_of(expected))


def test_ties_keep_the_current_mask():
    weight = torch.full((1, 4), 3.0)
    for current in (mask_of([0, 1]), mask_of([1, 3]), mask_of([2, 3])):
        for criterion in ("hysteresis", "magnitude"):
            chosen = update_mask(weight, weight, current, current, SCALE, criterion)
            assert torch.equal(chosen, current)


def test_the_margin_favours_the_weights_in_use():
    returned = mask_of(choose([1.0, 5.5, 2.0, 0.5]))
    assert torch.equal(returned, mask_of([1, 2]))
    # Within one margin of the old lead, either mask is stable.
    for value in (4.8, 5.0, 5.2):
        assert choose([1.0, value, 2.0, 0.5], returned) == [1, 2]
        assert choose([1.0, value, 2.0, 0.5], KEPT_02) == [0, 2]
    assert choose([1.0, 4.7, 2.0, 0.5], returned) == [0, 2], (
        "a weight that lost its gain is dropped"
    )


def random_mask(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    order = torch.rand(rows * columns // 4, 4, generator=generator).argsort(-1)[:, :2]
    mask = torch.zeros(rows * columns // 4, 4, dtype=torch.bool).scatter_(1, order, True)
    return mask.reshape(rows, columns)


def scale_of(master: torch.Tensor, mask: torch.Tensor, bits: int) -> torch.Tensor | None:
    if bits == 16:
        return None
    kept = torch.where(mask, master.float(), 0.0).abs().reshape(len(master), -1, 64)
    return (kept.amax(-1) / (2 ** (bits - 1) - 0.5)).to(torch.bfloat16)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_untrained_flips_nothing_over_the_whole_range_of_bf16(bits):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-100, 100, (512, 256), generator=generator).float()
    master = (torch.randn(512, 256, generator=generator) * 2.0**exponents).to(torch.bfloat16)
    mask = random_mask(512, 256, generator)
    scale = scale_of(master, mask, bits)
    chosen = update_mask(master.float(), master, mask, mask, scale, "hysteresis")
    assert flipped_fraction(mask, chosen) == 0.0
    plain = update_mask(master.float(), master, mask, mask, scale, "magnitude")
    assert flipped_fraction(mask, plain) > 0.2  # a random mask is far from the largest two


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("noise", [1e-6, 1e-3])
def test_noise_flips_nothing(bits, noise):
    """A random mask disagrees with magnitude nearly everywhere, so h alone leaves ties."""
    generator = torch.Generator().manual_seed(3)
    master = torch.randn(512, 256, generator=generator).to(torch.bfloat16)
    mask = random_mask(512, 256, generator)
    weight = master.float() + noise * torch.randn(512, 256, generator=generator)
    scale = scale_of(master, mask, bits)
    chosen = update_mask(weight, master, mask, mask, scale, "hysteresis")
    assert flipped_fraction(mask, chosen) < 1e-4


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_no_mask_bit_oscillates_under_noise_on_trained_weights(bits):
    """Noise on weights that moved far may flip a mask bit once, but never back."""
    generator = torch.Generator().manual_seed(4)
    master = torch.randn(256, 256, generator=generator).to(torch.bfloat16)
    first = random_mask(256, 256, generator)
    scale = scale_of(master, first, bits)
    trained = master.float() + 0.3 * torch.randn(256, 256, generator=generator)
    mask = update_mask(trained, master, first, first, scale, "hysteresis")
    assert flipped_fraction(first, mask) > 0.02, "real gains must readmit weights"
    flips = torch.zeros(256, 256)
    for _ in range(10):
        weight = trained + 1e-3 * torch.randn(256, 256, generator=generator)
        chosen = update_mask(weight, master, first, mask, scale, "hysteresis")
        flips += chosen != mask
        mask = chosen
    assert flips.max() <= 1


def test_always_exactly_two_of_four():
    generator = torch.Generator().manual_seed(1)
    master = torch.randn(64, 128, generator=generator).to(torch.bfloat16)
    mask = torch.tensor([True, True, False, False]).repeat(64, 32)
    weight = master.float() + 0.5 * torch.randn(64, 128, generator=generator)
    for criterion in ("hysteresis", "magnitude"):
        chosen = update_mask(weight, master, mask, mask, scale_of(master, mask, 4), criterion)
        assert (chosen.reshape(-1, 4).sum(-1) == 2).all()


def test_scale_follows_the_largest_kept_weight():
    before = torch.tensor([[1.0, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    now = torch.tensor([[1.0, -3.0, 0.0, 0.0, 0.0, 0.75, 0.0, 0.0]])
    scale = torch.tensor([[0.25, 0.0]], dtype=torch.bfloat16)
    new = update_scale(now, before, scale, bits=4)
    assert new.dtype == torch.bfloat16
    assert new[0].tolist() == pytest.approx([0.375, 0.75 / 7.5], rel=4e-3)
    eight = update_scale(now, before, scale, bits=8)
    assert eight[0, 1].item() == pytest.approx(0.75 / 127.5, rel=4e-3)


def test_unchanged_groups_keep_bitwise_equal_scales():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(32, 256, generator=generator)
    scale = torch.rand(32, 4, generator=generator).to(torch.bfloat16)
    assert torch.equal(update_scale(weight, weight, scale, 4), scale)


@pytest.mark.parametrize(
    ("total", "frequency", "expected"),
    [
        (20, 0.25, [5, 10, 15]),
        (60, 0.05, list(range(3, 58, 3))),
        (10, 0.05, list(range(1, 10))),  # an interval is at least one step
        (7, 0.3, [2, 4]),  # 6 is within the last interval
        (10, 1.0, []),
        (1, 0.5, []),
        (100, 0.0, []),
    ],
)
def test_update_steps(total, frequency, expected):
    assert update_steps(total, frequency) == expected
